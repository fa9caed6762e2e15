import dataclasses
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from gpt_tf.edge import EdgeGPT
from gpt_tf.errors import InputError
from gpt_tf.evaluation.models import KerasGPT
from gpt_tf.explain.attribution import (
    Explanation,
    MaskedPrompt,
    explain,
    mean_attention,
    neutral_token,
    token_texts,
)
from gpt_tf.generation.sequence import GenerationNotice
from gpt_tf.reporting.explanations import (
    draw_explanation,
    explanation_html,
    print_explanation,
    write_explanation,
)
from gpt_tf.text.tokenizer import BPETokenizer, CharacterTokenizer

LETTERS = "abcdefghijklmnop <>&\n"
PROMPT = "abcdefgh"
WEIGHTS = np.array([0.5, -1.0, 3.0, 0.25, 1.5, -0.3, 0.0, 0.9])


class Additive:
    """A model of which the answer is known.

    A token of `PROMPT` in its place adds its weight to the target's log-probability;
    the target is "p".
    """

    mode = "made"
    context_length = 12
    base = -7.0

    def __init__(self, weights=WEIGHTS):
        self.tokenizer = CharacterTokenizer.train([LETTERS])
        self.config = {"vocab_size": self.tokenizer.vocab_size}
        self.weights = weights
        self.target = self.tokenizer.encode("p")[0]
        self.prompt = self.tokenizer.encode(PROMPT)
        self.scored = 0

    def reset(self):
        pass

    def value(self, same):
        return self.base + self.weights[: len(same)] @ same

    def logits(self, ids):
        self.scored += 1
        same = np.array(ids[: len(self.prompt)]) == self.prompt[: len(ids)]
        value = self.value(same)
        others = np.log(-np.expm1(value)) - np.log(self.config["vocab_size"] - 1)
        logits = np.full((len(ids), self.config["vocab_size"]), others)
        logits[:, self.target] = value
        return logits


def order_of(scores):
    return np.argsort(scores).tolist()


# Scores


@pytest.mark.parametrize("weights", [WEIGHTS, WEIGHTS[::-1]])
def test_lime_finds_the_order_of_the_weights(weights):
    explanation = explain(Additive(weights), PROMPT, target="p", method="lime")
    assert order_of(explanation.scores) == order_of(weights)
    assert (np.sign(explanation.scores) == np.sign(weights))[weights != 0].all()
    assert explanation.order()[0] == np.argmax(weights)


def test_shap_finds_the_weights_themselves():
    explanation = explain(Additive(), PROMPT, target="p", method="shap")
    np.testing.assert_allclose(explanation.scores, WEIGHTS, atol=1e-9)
    assert explanation.base_value == pytest.approx(Additive.base)


def test_base_and_shapley_values_add_up_where_tokens_work_together():
    class Together(Additive):
        def value(self, same):
            return super().value(same) + 2.0 * (same[1] and same[4])

    explanation = explain(Together(), PROMPT, target="p", method="shap", num_samples=18)
    total = explanation.base_value + explanation.scores.sum()
    assert total == pytest.approx(explanation.log_probability, abs=1e-9)
    # Each of the two has half of what they do together.
    expected = WEIGHTS + [0, 1, 0, 0, 1, 0, 0, 0]
    np.testing.assert_allclose(explanation.scores, expected, atol=1e-9)


@pytest.mark.parametrize("method", ["lime", "shap"])
def test_the_seed_decides_the_scores(make_model, method):
    subject = KerasGPT(make_model(jolted=True), None)

    def scores(seed):
        options = {"method": method, "num_samples": 20, "neutral": 30}
        return explain(subject, list(range(9)), seed=seed, **options).scores

    np.testing.assert_array_equal(scores(1), scores(1))
    assert not np.array_equal(scores(1), scores(2))


def test_shap_leaves_numpys_random_numbers_alone():
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    explain(Additive(), PROMPT, method="shap", seed=1)
    assert np.random.random() == expected


def test_equal_prompts_are_scored_once():
    subject = Additive()
    kept = np.ones((50, len(PROMPT)), bool)
    kept[10:, 3] = False
    MaskedPrompt(subject, subject.prompt, 0).values(kept, subject.target)
    assert subject.scored == 2


# Inside a Keras model


@pytest.fixture
def make_model(make_model):
    """As everywhere, or `jolted`: with weights that all matter."""

    def make(jolted=False, **changes):
        model = make_model(**changes)
        if jolted:
            generator = np.random.default_rng(8)
            for weight in model.weights:
                weight.assign_add(generator.normal(0, 0.3, weight.shape))
        return model

    return make


IDS = [4, 17, 2, 9, 9, 25, 11]


@pytest.fixture
def keras_subject(make_model):
    return KerasGPT(make_model(jolted=True), None)


def test_integrated_gradients_add_up(keras_subject):
    explanation = explain(
        keras_subject, IDS, method="gradient", num_samples=256, neutral=30
    )
    total = explanation.base_value + explanation.scores.sum()
    assert total == pytest.approx(explanation.log_probability, abs=1e-3)
    # The same scores do not add up from another beginning.
    other = explain(keras_subject, IDS, method="gradient", neutral=3).base_value
    assert abs(other - explanation.base_value) > 0.1


def test_more_steps_of_the_integral_add_up_better(keras_subject):
    def gap(steps):
        found = explain(
            keras_subject, IDS, method="gradient", num_samples=steps, neutral=30
        )
        return abs(found.base_value + found.scores.sum() - found.log_probability)

    assert gap(512) < gap(8) / 4


def test_a_token_that_is_neutral_has_no_gradient_to_go(keras_subject):
    explanation = explain(keras_subject, IDS, method="gradient", neutral=9)
    assert (explanation.scores[3:5] == 0).all()
    assert (np.delete(explanation.scores, [3, 4]) != 0).all()


def test_rows_of_attention_add_up_to_1_and_see_no_future(keras_subject):
    attention = mean_attention(keras_subject.model, IDS)
    np.testing.assert_allclose(attention.sum(axis=-1), 1, atol=1e-12)
    assert (attention >= 0).all() and (np.triu(attention, 1) == 0).all()
    assert (attention[-1] > 0).all()


def test_attention_is_what_the_last_position_pays_in_all_layers(keras_subject):
    from gpt_tf.distillation.distiller import outputs_of

    first, second = (
        attention.numpy()[0].mean(axis=0)[-1]
        for attention in outputs_of(
            keras_subject.model, np.array([IDS], np.int32), ("attentions",)
        ).attentions
    )
    explanation = explain(keras_subject, IDS, method="attention")
    np.testing.assert_allclose(explanation.scores, (first + second) / 2, atol=1e-6)
    assert np.abs(explanation.scores - second).max() > 1e-2
    assert explanation.num_samples is None and explanation.base_value is None
    assert explanation.neutral_id is None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["attention", "gradient", "shap"])
def test_a_quantisation_aware_model_is_explained_nearly_as_its_float_one(
    keras_subject, method
):
    from gpt_tf import quantize_aware

    aware = KerasGPT(quantize_aware(keras_subject.model), None)
    expected = explain(keras_subject, IDS, method=method, neutral=30)
    found = explain(aware, IDS, method=method, neutral=30, target=expected.target_id)
    np.testing.assert_allclose(found.scores, expected.scores, atol=0.05)
    assert not np.array_equal(found.scores, expected.scores)


def test_masked_prompts_of_a_keras_model_have_its_log_probabilities(keras_subject):
    scorer = MaskedPrompt(keras_subject, IDS, neutral=30)
    kept = np.random.default_rng(1).random((70, len(IDS))) < 0.6
    values = scorer.values(kept, target=5)
    for row, value in zip(kept[::9], values[::9], strict=True):
        keras_subject.reset()
        logits = keras_subject.logits(np.where(row, IDS, 30))[-1].astype(np.float64)
        expected = logits[5] - np.log(np.exp(logits).sum())
        assert value == pytest.approx(expected, abs=1e-4)


# Files


@pytest.fixture(scope="module")
def file_subject(tmp_path_factory):
    """A small float32 file, with the model it was made of."""
    import tf_keras as keras

    import gpt_tf
    from gpt_tf.export.tflite import export_tflite

    keras.utils.set_random_seed(3)
    tokenizer = CharacterTokenizer.train([LETTERS])
    model = gpt_tf.GPTModel(tokenizer.vocab_size, 12, 2, 3, context_length=16)
    generator = np.random.default_rng(8)
    for weight in model.weights:
        weight.assign_add(generator.normal(0, 0.3, weight.shape))
    path = tmp_path_factory.mktemp("file") / "gpt.tflite"
    export_tflite(model, path, "float32", tokenizer=tokenizer, prefill_lengths=(1, 4))
    with EdgeGPT(path) as gpt:
        yield gpt, model


def test_masked_prompts_of_a_file_are_scored_as_from_the_beginning(file_subject):
    gpt, _ = file_subject
    ids = gpt.tokenizer.encode("abcdefghijklmnop")
    assert len(ids) == gpt.context_length
    kept = np.random.default_rng(1).random((40, len(ids))) < 0.7
    values = MaskedPrompt(gpt, ids, neutral=2).values(kept, target=5)
    for row, value in zip(kept, values, strict=True):
        gpt.reset()
        logits = gpt.logits(np.where(row, ids, 2))[-1].astype(np.float64)
        expected = logits[5] - np.log(np.exp(logits).sum())
        assert value == pytest.approx(expected, abs=1e-4)
    assert np.ptp(values) > 0.1


@pytest.mark.parametrize("method", ["lime", "shap"])
def test_a_file_is_explained_as_the_model_it_was_made_of(file_subject, method):
    gpt, model = file_subject
    options = {"method": method, "num_samples": 40}
    of_file = explain(gpt, PROMPT, **options)
    of_model = explain(KerasGPT(model, gpt.tokenizer), PROMPT, **options)
    assert of_file.target_id == of_model.target_id
    np.testing.assert_allclose(of_file.scores, of_model.scores, atol=1e-3)
    assert np.abs(of_file.scores).max() > 0.05


@pytest.mark.parametrize("method", ["attention", "gradient"])
def test_a_file_cannot_be_looked_into(file_subject, method):
    with pytest.raises(InputError, match="Name the Keras model that"):
        explain(file_subject[0], PROMPT, method=method)


# Target and prompt


def test_the_target_is_the_likeliest_token_unless_named():
    subject = Additive(np.full(8, 0.8))
    assert explain(subject, PROMPT, method="shap").target_text == "p"
    by_text = explain(subject, PROMPT, target="b", method="shap")
    by_id = explain(subject, PROMPT, target=by_text.target_id, method="shap")
    assert by_text.target_text == by_id.target_text == "b"
    assert by_text.scores.sum() < 0 < explain(subject, PROMPT, method="shap").scores[0]


def test_probability_and_log_probability_are_the_targets():
    explanation = explain(Additive(), PROMPT, target="p", method="shap")
    expected = Additive.base + WEIGHTS.sum()
    assert explanation.log_probability == pytest.approx(expected)
    assert explanation.probability == pytest.approx(np.exp(expected))


def test_the_end_of_text_can_be_a_target():
    explanation = explain(Additive(), PROMPT, target="<|endoftext|>", method="shap")
    assert explanation.target_id == Additive().tokenizer.end_of_text_id
    assert explanation.target_text == "<|endoftext|>"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("pb", "begins with 'p'"),
        ("", "of 0 tokens"),
        (22, "from 0 to 21"),
        (True, "True"),
    ],
)
def test_a_target_that_is_no_token_is_refused(target, message):
    with pytest.raises(InputError, match=message):
        explain(Additive(), PROMPT, target=target)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "empty"),
        (["ab", "cd"], {}, "list of 2"),
        ([0, 99], {}, "0 to 21"),
        (PROMPT, {"method": "magic"}, "'magic'"),
        (PROMPT, {"num_samples": 17}, "at least 18"),
        (PROMPT, {"neutral": "ab"}, "neutral"),
        (PROMPT, {"neutral": 99}, "neutral"),
        (PROMPT, {"seed": 1 << 32, "method": "shap"}, "seed"),
    ],
)
def test_what_cannot_be_explained_is_refused(prompt, options, message):
    with pytest.raises(InputError, match=message):
        explain(Additive(), prompt, **options)


def test_a_seed_of_numpy_is_written_as_json():
    explanation = explain(Additive(), PROMPT, seed=np.int64(3))
    assert json.loads(json.dumps(explanation.as_dict()))["seed"] == 3


def test_samples_of_the_keras_methods_are_checked(keras_subject):
    with pytest.raises(InputError, match=r"at least 8.*steps"):
        explain(keras_subject, IDS, method="gradient", num_samples=7, neutral=1)
    with pytest.raises(InputError, match=r"takes no samples.*num_samples=9"):
        explain(keras_subject, IDS, method="attention", num_samples=9, neutral=1)


def test_of_a_prompt_longer_than_the_context_the_end_is_explained():
    with pytest.warns(GenerationNotice, match="14 tokens.*context of 12"):
        explanation = explain(Additive(), "ab" + "cdefghijklmn", method="shap")
    assert "".join(explanation.texts) == "cdefghijklmn"


@pytest.mark.parametrize("method", ["lime", "shap"])
def test_a_prompt_of_one_token_is_explained(method):
    explanation = explain(Additive(), "a", target="p", method=method)
    assert explanation.scores.shape == (1,) and explanation.scores[0] > 0


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


# Views


TEXTS = ("<b>", " &", "\n", "x$_1$", "\u4e2d", "\\xe4", "\t", "\x1b[31m", '"')


def made(method="shap"):
    scores = np.array([2.0, -1.0, 0.001, 0.5, 0.0, 0.3, -0.2, 0.1, 0.4])
    return Explanation(
        method=method,
        ids=tuple(range(len(TEXTS))),
        texts=TEXTS,
        target_id=1,
        target_text="<i>",
        probability=0.25,
        log_probability=float(np.log(0.25)),
        scores=np.abs(scores) if method == "attention" else scores,
        base_value=-3.5 if method == "shap" else None,
        neutral_id=3,
        num_samples=100,
        seed=0,
    )


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.tokens = [], [], []
        self.classes = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        self.links += [v for k, v in attributes.items() if k in ("src", "href")]
        if tag == "span" and "title" in attributes:
            self.classes.append(attributes["class"])
            self.tokens.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "span" and "p" not in self.tags:
            self.tokens[-1] += data


def test_the_page_is_escaped_and_needs_nothing_else():
    text = explanation_html(made())
    page = Page(text)
    assert page.links == [] and "url(" not in text and "@import" not in text
    assert not {"script", "link", "img", "b"} & set(page.tags)
    assert page.tags.count("i") == len(TEXTS)  # the bars
    assert "&lt;i&gt;" in text and "<i>" not in text
    assert "width=device-width" in text and "prefers-color-scheme: dark" in text


def test_the_page_shows_every_token_on_its_own_side():
    page = Page(explanation_html(made()))
    assert page.tokens[:6] == ["<b>", " &", "\u23ce\n", "x$_1$", "\u4e2d", "\\xe4"]
    assert "\x1b" not in "".join(page.tokens)
    assert page.classes[:4] == ["up", "down", "none", "up"]


def test_the_terminal_colours_tokens_and_lists_the_strongest():
    file = io.StringIO()
    console = Console(
        file=file, width=100, force_terminal=True, color_system="truecolor"
    )
    print_explanation(made(), console, top=3)
    text = file.getvalue()
    assert "48;2;" in text  # a background
    assert "\x1b[31m" not in text  # the prompt's own codes do not get through
    plain = io.StringIO()
    print_explanation(made(), Console(file=plain, width=100), top=3)
    lines = plain.getvalue().splitlines()
    rows = [line for line in lines if line.startswith("\u2502")]
    assert [row.split()[1] for row in rows] == ["0", "1", "3"]
    assert "+2.000" in rows[0] and "-1.000" in rows[1]
    assert "probability 25.0%" in plain.getvalue() and "-3.50" in plain.getvalue()


def test_attention_is_shown_without_sides_and_signs():
    assert "pushes it down" in explanation_html(made())
    assert "pushes it up" in explanation_html(made())
    assert "+2.000" in explanation_html(made())
    text = explanation_html(made("attention"))
    assert "pushes" not in text and "looked at" in text
    assert "2.000" in text and "+2.000" not in text


def test_small_scores_are_not_all_written_as_nought():
    small = dataclasses.replace(made(), scores=made().scores * 1e-4)
    plain = io.StringIO()
    print_explanation(small, Console(file=plain, width=100), top=3)
    assert "+0.000200" in plain.getvalue() and "-0.000100" in plain.getvalue()
    text = explanation_html(small)
    assert text.count("+0.000200") == 2  # in the prompt and in the table
    none = dataclasses.replace(made(), scores=made().scores * 0)
    assert "+0.000" in explanation_html(none)


def test_the_picture_is_drawn_whatever_the_tokens(tmp_path):
    from matplotlib import image

    draw_explanation(made(), tmp_path / "a.png")
    pixels = image.imread(tmp_path / "a.png")[:, :, :3]
    orange = np.abs(pixels - np.array([217, 95, 2]) / 255).max(axis=-1) < 0.02
    blue = np.abs(pixels - np.array([49, 130, 206]) / 255).max(axis=-1) < 0.02
    assert orange.sum() > blue.sum() > 100


def test_a_folder_gets_page_picture_and_numbers(tmp_path):
    paths = write_explanation(made(), tmp_path / "out")
    assert [path.name for path in paths] == [
        *("explanation.html", "explanation.png", "explanation.json")
    ]
    facts = json.loads(paths[2].read_text("utf-8"))
    assert facts["scores"][:2] == [2.0, -1.0] and facts["texts"][0] == "<b>"


def test_only_pages_pictures_and_folders_are_written(tmp_path):
    (tmp_path / "file").write_text("kept")
    for name in ("a.pdf", "file"):
        with pytest.raises(InputError, match=r"ends in .html or .png, or a folder"):
            write_explanation(made(), tmp_path / name)
    assert (tmp_path / "file").read_text() == "kept"
    assert write_explanation(made(), tmp_path / "a.html") == [tmp_path / "a.html"]
