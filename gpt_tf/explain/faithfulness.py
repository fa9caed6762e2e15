"""Faithfulness of explanations, and whether compression changes them.

A faithful explanation names the tokens that the prediction depends on. The deletion
test takes the highest tokens of each prompt away, all at once, and the target's
probability must fall further than when as many random ones are. All methods are judged
by the same removal, a neutral token in the place.

Reference: Samek et al., "Evaluating the Visualization of What a Deep Neural Network
has Learned", arXiv:1509.06321, section III; DeYoung et al., "ERASER", arXiv:1911.03429,
section 4.2 (comprehensiveness).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from gpt_tf.errors import InputError
from gpt_tf.evaluation.accuracy import block_bootstrap
from gpt_tf.explain import FEWEST_PROMPTS
from gpt_tf.explain.attribution import (
    SAMPLING_METHODS,
    MaskedPrompt,
    check_method,
    explain_prompt,
    neutral_token,
    prompt_ids,
)
from gpt_tf.settings import arguments

_RANDOM_DRAWS = 16


def prompts_of(
    tokens: Sequence[int], count: int = 60, num_tokens: int = 32
) -> list[list[int]]:
    """Cut `count` prompts of `num_tokens` ids out of a text's, evenly spaced.

    They do not overlap.

    Raises:
        InputError: The text is too short for so many.
    """
    count = arguments.integer("count", count, 1)
    num_tokens = arguments.integer("num_tokens", num_tokens, 1)
    tokens = np.asarray(tokens)
    if len(tokens) < count * num_tokens:
        raise InputError(
            f"{count} prompts of {num_tokens} tokens expect a text of "
            f"{count * num_tokens:,}. Received: {len(tokens):,}. Give more text, or "
            "ask for shorter prompts."
        )
    starts = np.linspace(0, len(tokens) - num_tokens, count).astype(np.int64)
    return [tokens[start : start + num_tokens].tolist() for start in starts]


def deletion_test(
    gpt,
    prompts: Sequence,
    methods: Sequence[str],
    *,
    fraction: float = 0.2,
    keep_last: bool = False,
    seed: int = 0,
    num_samples: int | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> dict:
    """Compare taking away the highest tokens with taking away random ones.

    The target of a prompt is the top-1 next token.

    Args:
        gpt: What `gpt_tf.evaluation.models.open_model` returns.
        prompts: At least 50 texts, or lists of ids, of 2 or more tokens.
        methods: Some of `gpt_tf.explain.attribution.METHODS`.
        fraction: Share of each prompt's tokens that is taken away, above 0 and below
            1; at least one is, and one stays.
        keep_last: Judge the methods a second time, with the last token always kept:
            the harder test, for without that one hardly any prediction stands, and
            any method that names it passes.
        seed: The same seed gives the same numbers.
        num_samples: For `lime` and `shap`, as of `explain`.
        on_step: Called with the prompts that are done, and all.

    Returns:
        `prompts` and `prompt_tokens`, their number and mean length; `fraction`;
        `methods`, a dict of name to `drop` and `random_drop` of the target's
        probability, their `difference`, each an INTERVAL over the prompts, and
        `holds`: whether all of the difference's interval is above 0; `over_nearest`,
        the same difference from `nearest_drop`, when the prompt's last tokens are
        taken, which needs no explanation; with `keep_last` a dict of these three,
        `last_kept`; `compression`, empty, for what
        `compare_explanations` returns.

    Raises:
        InputError: There are too few prompts, or something cannot be used.

    Example:
        >>> deletion_test(gpt, prompts_of(tokens), ["lime", "shap"])["methods"]
    """
    _check_methods(gpt, methods)
    rows = _rows_of(gpt, prompts, FEWEST_PROMPTS)
    fraction = arguments.number("fraction", fraction, above=0, below=1)
    keep_last = arguments.switch("keep_last", keep_last)
    seed = arguments.integer("seed", seed, most=2**32 - 1)
    neutral = neutral_token(gpt)
    ways = (False, True) if keep_last else (False,)
    fallen = []
    for index, ids in enumerate(rows):
        scorer = MaskedPrompt(gpt, ids, neutral)
        target = int(np.argmax(scorer.log_probabilities()))
        random = np.random.default_rng((seed, index))
        orders = [random.permutation(len(ids)) for _ in range(_RANDOM_DRAWS)]
        orders.append(np.arange(len(ids))[::-1])
        for method in methods:
            explanation = explain_prompt(
                gpt,
                ids,
                target=target,
                method=method,
                num_samples=num_samples if method in SAMPLING_METHODS else None,
                seed=seed,
                neutral=neutral,
            )
            orders.append(explanation.order())
        fallen.append([_drops(scorer, target, orders, fraction, way) for way in ways])
        if on_step is not None:
            on_step(index + 1, len(rows))
    # (prompts, ways, orders) -> (ways, orders, prompts)
    facts = [
        {"fraction": float(fraction), **_judged(drops, methods, seed)}
        for drops in np.moveaxis(fallen, 0, -1)
    ]
    return {
        "prompts": len(rows),
        "prompt_tokens": float(np.mean([len(ids) for ids in rows])),
        **facts[0],
        **({"last_kept": facts[-1]} if keep_last else {}),
        "compression": {},
    }


def _judged(drops, methods, seed):
    """Return what drops `(orders, prompts)` say of the methods."""
    random_drop = drops[:_RANDOM_DRAWS].mean(axis=0)
    nearest, *of_methods = drops[_RANDOM_DRAWS:]
    judged = {}
    for method, drop in zip(methods, of_methods, strict=True):
        difference = _mean(drop - random_drop, seed)
        judged[method] = {
            "drop": _mean(drop, seed),
            "random_drop": _mean(random_drop, seed),
            "difference": difference,
            "holds": difference["low"] > 0,
            "over_nearest": _mean(drop - nearest, seed),
        }
    return {"nearest_drop": _mean(nearest, seed), "methods": judged}


def compare_explanations(
    gpt_a,
    gpt_b,
    prompts: Sequence,
    method: str,
    *,
    seed: int = 0,
    num_samples: int | None = None,
    names: tuple[str, str] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> dict:
    """Compare how two models rank the tokens of prompts.

    Both explain the top-1 token of the first. The second model's samples are drawn with
    another seed, as the ceiling's are: with the same ones, the noise of sampling would
    be alike in both models and count as agreement.

    Args:
        gpt_a: The model whose top-1 tokens are the targets, float32 for example.
        gpt_b: The other one, of the same vocabulary.
        prompts: Texts, or lists of ids, of 2 or more tokens.
        method: One of `gpt_tf.explain.attribution.METHODS`.
        seed, num_samples, on_step: As of `deletion_test`.
        names: What `a` and `b` are to be called; default: their modes.

    Returns:
        `a` and `b`, names; `prompts`, those whose tokens are ranked by both, which a
        model that no token moves does not; `rank_correlation`, an INTERVAL of
        Spearman's, per prompt, of both models; `ceiling`, the same of the first model
        with itself under another seed, 1 for a method without samples.

    Raises:
        InputError: Something cannot be used, or no prompt is ranked.

    Example:
        >>> compare_explanations(float32, int8, prompts_of(tokens), "shap")
    """
    seed = arguments.integer("seed", seed, most=2**32 - 2)
    for gpt in (gpt_a, gpt_b):
        _check_methods(gpt, [method])
    sizes = [gpt.config["vocab_size"] for gpt in (gpt_a, gpt_b)]
    if sizes[0] != sizes[1]:
        raise InputError(
            "Comparing explanations expects two models of one vocabulary. Received: "
            f"{sizes[0]:,} and {sizes[1]:,} tokens."
        )
    rows = _rows_of(gpt_a, prompts, 1)
    neutral = neutral_token(gpt_a)
    found = []
    for index, ids in enumerate(rows):
        options = {"method": method, "num_samples": num_samples, "neutral": neutral}
        first = explain_prompt(gpt_a, ids, seed=seed, **options)
        options |= {"target": first.target_id, "seed": seed + 1}
        others = [explain_prompt(gpt, ids, **options) for gpt in (gpt_b, gpt_a)]
        found.append([rank_correlation(first.scores, o.scores) for o in others])
        if on_step is not None:
            on_step(index + 1, len(rows))
    found = np.array(found)
    found = found[np.isfinite(found).all(axis=1)]
    if not len(found):
        raise InputError(
            "Comparing ranks expects prompts whose tokens move the model. Received: "
            f"{len(rows)} in which none does. Use a trained model."
        )
    names = names or (gpt_a.mode, gpt_b.mode)
    return {
        "a": names[0],
        "b": names[1],
        "prompts": len(found),
        "rank_correlation": _mean(found[:, 0], seed),
        "ceiling": _mean(found[:, 1], seed),
    }


def _mean(values, seed):
    """Return the mean over prompts, with its 95 % bootstrap interval."""
    values = np.asarray(values, np.float64)[:, np.newaxis]
    count = len(values)
    return block_bootstrap(values, lambda sums: sums[..., 0] / count, seed=seed)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's rank correlation, NaN where all of a row are equal."""
    # Here, since it takes a second.
    from scipy.stats import spearmanr

    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(spearmanr(a, b).statistic)


def _drops(scorer, target, orders, fraction, keep_last):
    """Return how far the probability falls without the first tokens of each order."""
    length = len(scorer.ids)
    count = min(max(1, round(fraction * length)), length - 1)
    kept = np.ones((1 + len(orders), length), bool)  # first the whole prompt
    for row, order in zip(kept[1:], orders, strict=True):
        if keep_last:
            order = order[order != length - 1]
        row[order[:count]] = False
    whole, *others = np.exp(scorer.values(kept, target))
    return whole - np.array(others)


def _rows_of(gpt, prompts, fewest):
    rows = [prompt_ids(gpt, prompt) for prompt in prompts]
    if len(rows) < fewest:
        raise InputError(
            f"The test expects at least {fewest} prompts, for a mean that says "
            f"something. Received: {len(rows)}."
        )
    for row in rows:
        if len(row) < 2:
            raise InputError(
                "The test expects prompts of at least 2 tokens: one is taken away and "
                f"one stays. Received: {row}."
            )
    return rows


def _check_methods(gpt, methods):
    if not isinstance(methods, list | tuple) or not methods:
        arguments.refuse("methods", methods, 'a list, ["lime"] for example')
    for method in methods:
        check_method(gpt, method)
