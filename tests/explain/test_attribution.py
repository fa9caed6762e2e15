import numpy as np
import pytest

from gpt_tf.edge import EdgeGPT
from gpt_tf.errors import InputError
from gpt_tf.evaluation.models import KerasGPT
from gpt_tf.explain.attribution import (
    MaskedPrompt,
    explain_prompt,
    neutral_token,
    token_texts,
)
from gpt_tf.generation.sequence import GenerationNotice
from gpt_tf.text.tokenizer import BPETokenizer, CharacterTokenizer
from tests.explain.conftest import Counted, Known

PROMPT = "abcdefgh"
WEIGHTS = np.array([0.5, -1.0, 3.0, 0.25, 1.5, -0.3, 0.0, 0.9])
IDS = [4, 17, 2, 9, 9, 15, 11]


class Additive(Known):
    """A token of `PROMPT` in its place adds its weight to the target's answer."""

    base = -7.0

    def __init__(self, weights=WEIGHTS):
        super().__init__()
        self.weights = weights
        self.prompt = self.tokenizer.encode(PROMPT)
        self.scored = 0

    def logits(self, ids):
        self.scored += 1
        same = np.array(ids[: len(self.prompt)]) == self.prompt[: len(ids)]
        value = self.base + self.weights[: len(same)] @ same
        others = np.log(-np.expm1(value)) - np.log(self.config["vocab_size"] - 1)
        logits = np.full((len(ids), self.config["vocab_size"]), others)
        logits[:, self.target] = value
        return logits


@pytest.fixture
def keras_subject(exported):
    return KerasGPT(exported[1])


# Scores


def test_lime_finds_the_order_of_the_weights():
    explanation = explain_prompt(Additive(), PROMPT, target="p", method="lime")
    assert (np.argsort(explanation.scores) == np.argsort(WEIGHTS)).all()
    assert (np.sign(explanation.scores) == np.sign(WEIGHTS))[WEIGHTS != 0].all()
    assert explanation.order()[0] == np.argmax(WEIGHTS)


def test_shap_finds_the_weights_themselves():
    explanation = explain_prompt(Additive(), PROMPT, target="p", method="shap")
    np.testing.assert_allclose(explanation.scores, WEIGHTS, atol=1e-9)
    assert explanation.base_value == pytest.approx(Additive.base)
    expected = Additive.base + WEIGHTS.sum()
    assert explanation.log_probability == pytest.approx(expected)
    assert explanation.probability == pytest.approx(np.exp(expected))


@pytest.mark.parametrize("method", ["lime", "shap"])
def test_the_seed_decides_the_scores(method):
    def scores(seed):
        options = {"method": method, "num_samples": 20}
        return explain_prompt(Counted(), list(range(9)), seed=seed, **options).scores

    state = np.random.get_state()[1].copy()
    np.testing.assert_array_equal(scores(1), scores(1))
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    assert not np.array_equal(scores(1), scores(2))


def test_equal_prompts_are_scored_once():
    subject = Additive()
    kept = np.ones((50, len(PROMPT)), bool)
    kept[10:, 3] = False
    MaskedPrompt(subject, subject.prompt, 0).values(kept, subject.target)
    assert subject.scored == 2


# Inside a Keras model


def test_integrated_gradients_add_up_the_better_the_more_steps(keras_subject):
    def gap(steps, base=None):
        options = {"method": "gradient", "num_samples": steps, "neutral": 20}
        found = explain_prompt(keras_subject, IDS, **options)
        base = found.base_value if base is None else base
        return abs(base + found.scores.sum() - found.log_probability)

    assert gap(512) < 1e-3 and gap(512) < gap(8) / 4
    # The same scores do not add up from another beginning.
    other = explain_prompt(keras_subject, IDS, method="gradient", neutral=3).base_value
    assert gap(64, other) > 0.1


def test_attention_is_what_the_last_position_pays_in_all_layers(keras_subject):
    from gpt_tf.distillation.distiller import outputs_of

    first, second = (
        attention.numpy()[0].mean(axis=0)[-1]
        for attention in outputs_of(
            keras_subject.model, np.array([IDS], np.int32), ("attentions",)
        ).attentions
    )
    explanation = explain_prompt(keras_subject, IDS, method="attention")
    np.testing.assert_allclose(explanation.scores, (first + second) / 2, atol=1e-6)
    assert explanation.scores.sum() == pytest.approx(1, abs=1e-12)
    assert np.abs(explanation.scores - second).max() > 1e-2
    assert explanation.num_samples is None and explanation.base_value is None
    assert explanation.neutral_id is None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["attention", "gradient"])
def test_a_quantisation_aware_model_is_explained_nearly_as_its_float_one(
    keras_subject, method
):
    from gpt_tf import quantize_aware

    aware = KerasGPT(quantize_aware(keras_subject.model), None)
    expected = explain_prompt(keras_subject, IDS, method=method, neutral=20)
    found = explain_prompt(
        aware, IDS, method=method, neutral=20, target=expected.target_id
    )
    np.testing.assert_allclose(found.scores, expected.scores, atol=0.05)
    assert not np.array_equal(found.scores, expected.scores)


# Files and models


@pytest.mark.parametrize("kind", ["file", "keras"])
def test_masked_prompts_are_scored_as_from_the_beginning(exported, kind):
    path, model = exported
    gpt = KerasGPT(model) if kind == "keras" else EdgeGPT(path)
    ids = np.random.default_rng(2).integers(0, 22, gpt.context_length)
    kept = np.random.default_rng(1).random((70, len(ids))) < 0.7
    values = MaskedPrompt(gpt, ids, neutral=2).values(kept, target=5)
    for row, value in zip(kept[::3], values[::3], strict=True):
        gpt.reset()
        logits = gpt.logits(np.where(row, ids, 2))[-1].astype(np.float64)
        expected = logits[5] - np.log(np.exp(logits).sum())
        assert value == pytest.approx(expected, abs=1e-4)
    assert np.ptp(values) > 0.1


# Target and prompt


def test_the_target_is_the_top_1_token_unless_named():
    subject = Additive(np.full(8, 0.8))
    assert explain_prompt(subject, PROMPT, method="shap").target_text == "p"
    by_text = explain_prompt(subject, PROMPT, target="b", method="shap")
    by_id = explain_prompt(subject, PROMPT, target=by_text.target_id, method="shap")
    assert by_text.target_text == by_id.target_text == "b"
    end = explain_prompt(subject, PROMPT, target="<|endoftext|>", method="shap")
    assert end.target_id == subject.tokenizer.end_of_text_id
    assert (
        by_text.scores.sum()
        < 0
        < explain_prompt(subject, PROMPT, method="shap").scores[0]
    )


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "empty"),
        (["ab", "cd"], {}, "list of 2"),
        ([0, 99], {}, "0 to 21"),
        (PROMPT, {"method": "magic"}, "'magic'"),
        (PROMPT, {"method": "gradient"}, "Name the Keras model"),
        (PROMPT, {"target": "pb"}, "begins with 'p'"),
        (PROMPT, {"target": ""}, "of 0 tokens"),
        (PROMPT, {"target": 22}, "from 0 to 21"),
        (PROMPT, {"num_samples": 17}, "at least 18"),
        (PROMPT, {"neutral": "ab"}, "neutral"),
    ],
)
def test_what_cannot_be_explained_is_refused(prompt, options, message):
    with pytest.raises(InputError, match=message):
        explain_prompt(Additive(), prompt, **options)


def test_samples_of_the_keras_methods_are_checked(keras_subject):
    with pytest.raises(InputError, match=r"at least 8.*steps"):
        explain_prompt(keras_subject, IDS, method="gradient", num_samples=7, neutral=1)
    with pytest.raises(InputError, match=r"takes no samples.*num_samples=9"):
        explain_prompt(keras_subject, IDS, method="attention", num_samples=9, neutral=1)


def test_of_a_prompt_longer_than_the_context_the_end_is_explained():
    with pytest.warns(GenerationNotice, match="14 tokens.*context of 12"):
        explanation = explain_prompt(Additive(), "ab" + "cdefghijklmn", method="shap")
    assert "".join(explanation.texts) == "cdefghijklmn"


def test_a_removed_token_becomes_a_space_unless_named():
    subject = Additive()
    space = subject.tokenizer.encode(" ")[0]
    assert neutral_token(subject) == space
    assert neutral_token(subject, "b") == subject.tokenizer.encode("b")[0]
    assert neutral_token(subject, 7) == 7
    subject.tokenizer = CharacterTokenizer.train(["abp"])
    with pytest.raises(InputError, match="expects a space in the vocabulary"):
        neutral_token(subject)


def test_tokens_that_are_no_text_by_themselves_are_shown_as_bytes():
    subject = Additive()
    subject.tokenizer = BPETokenizer.train(["low lower lowest " * 9], vocab_size=260)
    ids = subject.tokenizer.encode("\u00e9")
    assert token_texts(subject, [*ids, 0]) == ("\\xc3", "\\xa9", "<|endoftext|>")
    subject.tokenizer = None
    assert token_texts(subject, [3]) == ("<3>",)
