import dataclasses

import numpy as np
import pytest

from gpt_tf.errors import InputError
from gpt_tf.explain import faithfulness
from gpt_tf.explain.attribution import explain_prompt
from gpt_tf.explain.faithfulness import (
    compare_explanations,
    deletion_test,
    prompts_of,
    rank_correlation,
)
from tests.explain.conftest import Counted

LENGTH = 10


PROMPTS = (
    np.random.default_rng(3)
    .permuted(np.tile(np.arange(15), (60, 1)), axis=1)[:, :LENGTH]
    .tolist()
)
SAMPLES = 2 * LENGTH + 2


def test_it_holds_for_explanations_of_a_model_whose_answer_is_known():
    methods = ["lime", "shap"]
    result = deletion_test(Counted(), PROMPTS, methods, num_samples=SAMPLES)
    for facts in result["methods"].values():
        assert facts["holds"] is True
        assert facts["difference"]["low"] > 0
        assert facts["drop"]["value"] > facts["random_drop"]["value"] + 0.1
    assert result["prompts"] == 60 and result["prompt_tokens"] == LENGTH
    assert result["compression"] == {} and "last_kept" not in result


def explained_by(monkeypatch, scores_of):
    """Let `deletion_test` get other scores than the method's."""

    def replaced(subject, ids, **options):
        found = explain_prompt(subject, ids, **options)
        return dataclasses.replace(found, scores=scores_of(np.array(ids)))

    monkeypatch.setattr(faithfulness, "explain_prompt", replaced)


def judged(**options):
    return deletion_test(Counted(), PROMPTS, ["shap"], num_samples=SAMPLES, **options)


def test_it_does_not_hold_for_random_scores_or_those_turned_round(monkeypatch):
    generator, weights = np.random.default_rng(4), Counted().weights
    explained_by(monkeypatch, lambda ids: generator.random(len(ids)))
    facts = judged()["methods"]["shap"]
    assert facts["holds"] is False
    assert facts["difference"]["low"] < 0 < facts["difference"]["high"]
    explained_by(monkeypatch, lambda ids: -weights[ids])
    facts = judged()["methods"]["shap"]
    assert facts["holds"] is False and facts["difference"]["high"] < 0


def test_drops_are_those_of_the_probability(monkeypatch):
    weights = Counted().weights
    explained_by(monkeypatch, lambda ids: weights[ids])

    def probability(ids):
        logits = Counted().logits(ids)[-1]
        logits -= logits.max()
        return np.exp(logits) / np.exp(logits).sum()

    drops, (space,) = [], Counted().tokenizer.encode(" ")
    for ids in PROMPTS:
        whole = probability(ids)
        left = np.array(ids)
        left[np.argsort(-weights[ids], kind="stable")[:3]] = space
        drops.append(whole.max() - probability(left)[whole.argmax()])
    facts = judged(fraction=0.3)["methods"]["shap"]
    assert facts["drop"]["value"] == pytest.approx(np.mean(drops), abs=1e-9)


def test_the_last_token_stays_where_it_is_to_be_kept(monkeypatch):
    class Last(Counted):
        """All that counts is the last token."""

        def logits(self, ids):
            logits = np.zeros((len(ids), self.config["vocab_size"]))
            logits[:, self.target] = 3.0 * ([ids[-1]] != self.tokenizer.encode(" "))
            return logits

    found = deletion_test(
        Last(), PROMPTS, ["shap"], num_samples=SAMPLES, keep_last=True
    )
    assert found["methods"]["shap"]["holds"]
    assert found["nearest_drop"]["value"] > 0.3
    assert found["last_kept"]["methods"]["shap"]["drop"]["value"] == 0
    assert not found["last_kept"]["methods"]["shap"]["holds"]


def test_the_seed_decides_the_numbers():
    first, again, other = (judged(seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first["methods"] != other["methods"]


@pytest.mark.parametrize(
    ("prompts", "methods", "options", "message"),
    [
        (PROMPTS[:49], ["lime"], {}, "at least 50 prompts.*Received: 49"),
        ([[3]] * 50, ["lime"], {}, "at least 2 tokens"),
        (PROMPTS, "lime", {}, "expects a list.*'lime'"),
        (PROMPTS, ["attention"], {}, "Name the Keras model"),
        (PROMPTS, ["lime"], {"fraction": 0.0}, "above 0 and below 1. Received: 0.0"),
        (PROMPTS, ["lime"], {"num_samples": 3}, "at least 22"),
    ],
)
def test_what_cannot_be_tested_is_refused(prompts, methods, options, message):
    with pytest.raises(InputError, match=message):
        deletion_test(Counted(), prompts, methods, **options)


# Two models


def compared(a, b, **options):
    options = {"num_samples": SAMPLES, **options}
    return compare_explanations(a, b, PROMPTS[:12], "lime", **options)


def test_a_model_agrees_with_itself_and_not_with_one_turned_round():
    found = compared(Counted(), Counted())
    assert found["rank_correlation"] == found["ceiling"]
    assert 0.5 < found["ceiling"]["value"] < 1
    assert found["prompts"] == 12
    found = compared(Counted(), Counted(sign=-1), names=("float32", "int8"))
    assert found["rank_correlation"]["value"] < -0.5 < 0.5 < found["ceiling"]["value"]
    assert (found["a"], found["b"]) == ("float32", "int8")


def test_targets_are_those_of_the_first_model(monkeypatch):
    targets = []

    class Told(Counted):
        def logits(self, ids):
            logits = super().logits(ids)
            logits[:, 3] = logits[:, self.target].clip(0) + 1.0
            return logits

    def noted(subject, ids, **options):
        found = explain_prompt(subject, ids, **options)
        targets.append((type(subject), found.target_id))
        return found

    monkeypatch.setattr(faithfulness, "explain_prompt", noted)
    compared(Told(), Counted())
    assert {target for _, target in targets} == {3}
    assert {kind for kind, _ in targets} == {Told, Counted}


def test_models_that_cannot_be_compared_are_refused():
    other = Counted()
    other.config = {"vocab_size": 9}
    with pytest.raises(InputError, match="22 and 9 tokens"):
        compared(Counted(), other)
    silent = Counted()
    silent.weights = silent.weights * 0
    with pytest.raises(InputError, match="12 in which none does"):
        compared(silent, silent)


# Numbers


def test_rank_correlation_is_spearmans_and_of_constant_scores_none():
    assert rank_correlation([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)
    assert np.isnan(rank_correlation([1, 2, 3], [5, 5, 5]))


def test_prompts_are_cut_evenly_and_do_not_overlap():
    tokens = np.arange(1000)
    prompts = prompts_of(tokens, 60, 16)
    assert [len(prompt) for prompt in prompts] == [16] * 60
    assert prompts[0][0] == 0 and prompts[-1][-1] == 999
    flat = [token for prompt in prompts for token in prompt]
    assert len(set(flat)) == len(flat)
    with pytest.raises(InputError, match=r"text of 1,020. Received: 1,000"):
        prompts_of(tokens, 60, 17)
