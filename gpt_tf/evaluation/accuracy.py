"""How well a file predicts held-out text, and how sure that is.

The file that ships is run itself. What is judged is cut into blocks, the same bytes
for every file, whatever its tokenizer and its context:

- A block begins and ends where tokens of all the files' tokenizers do.
- Each token of it is judged by at least half a context of text before it, as
  `EdgeGPT.score` judges: a window of `context_length` tokens begins so that its first
  new token has `context_length // 2` before it. At a document's beginning there is
  the end-of-text token, as in training, or a line break where there is no such token.
- Blocks are spread evenly over the text, until the budget of tokens is spent.

Intervals are those of a block bootstrap: whole blocks are drawn anew, because tokens
that follow each other are not independent. Where a file is compared with the
reference, the same blocks are drawn for both, so that what is hard for both cancels.
They are the sampling error of the evaluation text, and say nothing of the chance in
training.

Reference: Kuensch, "The Jackknife and the Bootstrap for General Stationary
Observations", Annals of Statistics 17 (1989); Koehn, "Statistical Significance Tests
for Machine Translation Evaluation", EMNLP 2004 (paired).
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gpt_tf.errors import InputError
from gpt_tf.evaluation import code_validity, report, tasks
from gpt_tf.evaluation.models import (
    check_open,
    check_tokenizer,
    describe,
    open_model,
    unique_names,
)
from gpt_tf.evaluation.text import DEFAULT_CORPUS, HeldOutText, held_out_text, is_run
from gpt_tf.generation.sampler import log_softmax
from gpt_tf.settings import arguments

MAX_TOKENS = 20_000
SAMPLES = 2000
LEVEL = 0.95

# A block holds the reference's logits at once: at GPT-2's vocabulary 1024 bytes have
# about 60 MB of them. Smaller ones where the budget is small: an interval of few
# blocks is worth little.
_LARGEST_BLOCK_BYTES = 1024
_SMALLEST_BLOCK_BYTES = 32
_BLOCKS = 32

# Numbers that are float64 at once: they should fit into a processor's cache.
_FLOATS = 1 << 18
_DRAWN_AT_ONCE = 1 << 20
_MOST_NATS = 700.0  # whose exponential is still a number

# What is added up per block.
_NATS, _TOKENS, _CORRECT, _DIVERGENCE, _AGREED = range(5)
_SUMS = 5
_REFERENCE_NATS, _REFERENCE_TOKENS, _BYTES = range(_SUMS, _SUMS + 3)


def measure_accuracies(
    models: dict,
    reference: str | None,
    text,
    *,
    max_tokens: int | None = MAX_TOKENS,
    block_bytes: int | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
    notes: list[str] | None = None,
) -> dict[str, dict]:
    """Measure how well models predict the same blocks of a text.

    Args:
        models: `EdgeGPT` and `KerasGPT` with their tokenizers, by name.
        reference: Name of the one to compare with, or None; itself is compared too.
        text: A `HeldOutText`, a text, or a list of texts, documents of their own.
        max_tokens: Tokens of the reference, or else of the first model, that are judged
            at most, in whole blocks, but at least one block; None judges all.
        block_bytes: Bytes of a block, at least 1; default: up to 1024, fewer where the
            budget would allow but few blocks.
        samples: Draws of the bootstrap.
        seed: Decides which blocks are judged, and the draws.
        on_progress: Called with blocks done and all of them.
        notes: What could not be compared is appended here, for a report; it is
            logged too.

    Returns:
        `Accuracy` of `gpt_tf.evaluation.report` by name, its `parsed` None.
        `perplexity_increase` is per token of the reference: with other tokens than
        the reference's the nats over the same bytes are compared. Divergence and
        agreement are None where the tokens are not the same.

    Raises:
        InputError: There are not two tokens, an argument is out of its range, a
            tokenizer is missing, or logits are not finite. The message names the model.

    Example:
        >>> with EdgeGPT("gpt.litertlm") as gpt:
        ...     text = held_out_text("python-stdlib")
        ...     found = measure_accuracies({"gpt": gpt}, None, text)
        >>> found["gpt"]["perplexity"]["value"]

    Reference: article 6.2.
    """
    _check(models, reference, max_tokens, block_bytes, samples, seed)
    notes = [] if notes is None else notes
    text = HeldOutText.of(text)
    first = reference if reference is not None else next(iter(models))
    order = [first, *(name for name in models if name != first)]
    readings = _readings({name: models[name] for name in order}, text)
    if block_bytes is None:
        # A token has at least a byte, nearly always.
        judged_bytes = min(text.size_bytes, max_tokens or text.size_bytes)
        block_bytes = max(_SMALLEST_BLOCK_BYTES, judged_bytes // _BLOCKS)
        block_bytes = min(_LARGEST_BLOCK_BYTES, block_bytes)
    blocks = _blocks(readings, block_bytes)
    blocks = _chosen(blocks, readings[first], max_tokens, seed)
    if len(blocks) == 1:
        report.note(
            notes,
            "the text is one block, so that the intervals are points: they say "
            "nothing. Give more text, or smaller blocks",
        )
    comparable = [
        name
        for name in order
        if reference is not None
        and _has_tokens_of(models[name], models[reference], name, notes)
    ]
    sums = {name: np.zeros((len(blocks), _SUMS)) for name in order}
    done = 0
    for index, block in enumerate(blocks):
        of_reference = None
        for name in order:
            ids, begin, end = readings[name].tokens_of(block)
            logits = _logits(models[name], name, ids, begin, end)
            if name == reference:
                of_reference = logits
            sums[name][index] = _judge(
                logits, ids[begin:end], of_reference if name in comparable else None
            )
            done += 1
            if on_progress is not None:
                on_progress(done, len(blocks) * len(order))
    sizes = [block.stop - block.start for block in blocks]
    reference_sums = None if reference is None else sums[reference]
    return {
        name: _summary(
            sums[name], reference_sums, name in comparable, sizes, samples, seed
        )
        for name in models
    }


def block_bootstrap(
    totals,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    samples: int = SAMPLES,
    seed: int = 0,
) -> dict[str, float]:
    """Return a statistic of sums over blocks as `value`, and its 95 % interval.

    Blocks are drawn with replacement, as many as there are; what belongs to a block
    stays together. The interval is between percentiles, `low` to `high`, which for
    fewer than some 30 blocks is rather too narrow.

    Args:
        totals: What was added up in each block, `(blocks, quantities)`.
        statistic: Takes sums over blocks, `(..., quantities)`, and returns `(...)`.
        samples: Number of draws, at least 1.
        seed: Decides the draws: for as many blocks the same blocks are drawn.

    Raises:
        InputError: There are no blocks.

    Example:
        >>> mean = block_bootstrap([[6, 2], [9, 3]], lambda s: s[..., 0] / s[..., 1])
        >>> mean["value"]
        3.0

    Reference: Efron and Tibshirani, "An Introduction to the Bootstrap", section 13.3.
    """
    samples = arguments.integer("samples", samples, 1)
    seed = arguments.integer("seed", seed, most=2**32 - 1)
    totals = np.asarray(totals, np.float64)
    count = len(totals)
    if not count:
        raise InputError("A bootstrap expects at least one block. Received: none.")
    generator = np.random.default_rng(seed)
    found, at_once = [], max(1, _DRAWN_AT_ONCE // count)
    for first in range(0, samples, at_once):
        draws = min(at_once, samples - first)
        blocks = generator.integers(count, size=(draws, count))
        places = (blocks + count * np.arange(draws)[:, None]).ravel()
        times = np.bincount(places, minlength=draws * count).reshape(draws, count)
        found.append(statistic(times @ totals))
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(np.concatenate(found), [tail, 100 - tail])
    value = statistic(totals.sum(axis=0))
    return {"value": float(value), "low": float(low), "high": float(high)}


def evaluate_files(
    paths: Sequence[str | os.PathLike],
    *,
    corpus=None,
    whole: bool = False,
    separator: str | None = None,
    reference: str | os.PathLike | None = None,
    max_tokens: int | None = MAX_TOKENS,
    parse: bool | None = None,
    completions: int = code_validity.COUNT,
    seed: int = 0,
    task: tasks.Task | None = None,
    folder: str | os.PathLike | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict:
    """Measure the accuracy of files and models and put it into a report.

    Args:
        paths: What `gpt_tf.evaluation.models.open_model` opens, at least one.
        corpus: As for `held_out_text`; default: the text that the first run among
            the reference and `paths` held out, or else python-stdlib; none where there
            is a task.
        whole, separator: As for `held_out_text`.
        reference: One to compare with, among `paths` or not.
        max_tokens: As for `measure_accuracies`.
        parse: Whether completions are parsed as Python; default: if the text is.
        completions: How many.
        seed: Decides what is judged, the draws, and the completions.
        task: What to answer, as `gpt_tf.evaluation.tasks.open_task` returns it.
        folder: Where the report will lie, so that paths can be relative to it.
        on_progress: Called with what is counted, how many are done, and all.

    Returns:
        A report with an entry per file, the reference first.

    Example:
        >>> made = evaluate_files(["int8.litertlm"], reference="runs/quickstart")
        >>> write_report("report.json", made)
    """
    notes = []

    def counted(what):
        return functools.partial(on_progress, what) if on_progress else None

    # What costs nothing to see is seen before files are opened.
    repair = "Leave parsing out, with parse=False or --no-parse, to have none."
    arguments.integer("completions", completions, 1, repair=repair)
    whole = arguments.switch("whole", whole)
    if parse is not None:
        parse = arguments.switch("parse", parse)
    paths = arguments.paths("paths", paths)
    if reference is not None:
        reference = arguments.path("reference", reference)
        others = [path for path in paths if path.absolute() != reference.absolute()]
        paths = [reference, *others]
    names = dict(zip(unique_names(paths), paths, strict=True))
    _check(names, None, max_tokens, None, SAMPLES, seed)
    compared = None if reference is None else next(iter(names))
    arguments.instance(
        "task", task, tasks.Task, "what `open_task` returns", or_none=True
    )
    reads_text = task is None or corpus is not None
    if corpus is None:
        runs = [path for path in names.values() if is_run(path)]
        corpus = runs[0] if runs else DEFAULT_CORPUS
        if runs and reads_text:
            report.note(notes, f"judged on the text that {runs[0]} held out")
    facts, found, scores = None, {}, {}
    with contextlib.ExitStack() as stack:
        opened = {
            name: stack.enter_context(open_model(path)) for name, path in names.items()
        }
        if reads_text:
            text = held_out_text(corpus, whole=whole, separator=separator, notes=notes)
            found = measure_accuracies(
                opened,
                compared,
                text,
                max_tokens=max_tokens,
                seed=seed,
                on_progress=counted("blocks"),
                notes=notes,
            )
            judged = next(iter(found.values()))  # the reference, if there is one
            facts = {"name": text.name, "split": text.split}
            facts |= {part: judged[part] for part in ("tokens", "bytes")}
        if reads_text and (text.is_python if parse is None else parse):
            prompts = code_validity.find_prompts(text, completions, seed)
            if not prompts:
                line = f"{text.name} has no Python functions: nothing was parsed"
                report.note(notes, line)
            for name in opened if prompts else ():
                found[name]["parsed"] = code_validity.measure_code_validity(
                    opened[name],
                    prompts,
                    seed=seed,
                    name=name,
                    on_progress=counted(f"completions of {name}"),
                )
        if task is not None:
            options = {"on_progress": on_progress, "notes": notes}
            scores = tasks.measure_tasks(opened, compared, task, **options)
        nothing = dict.fromkeys(report.Accuracy.model_fields)
        accuracies = {
            name: nothing | found.get(name, {}) | {"task": scores.get(name)}
            for name in names
        }
        entries = [
            report.new_entry(describe(path, opened[name]), accuracy=accuracies[name])
            | {"name": name, "path": report.path_in_report(path, folder or ".")}
            for name, path in names.items()
        ]
    return report.new_report(
        entries,
        corpus=facts,
        task=None if task is None else task.describe(),
        reference=compared,
        notes=notes,
    )


# Which bytes are judged


class _Block(NamedTuple):
    """Bytes `start` to `stop` of a document."""

    document: int
    start: int
    stop: int


class _Reading(NamedTuple):
    """The documents in a tokenizer's tokens."""

    ids: list[np.ndarray]  # of each document (before + N,)
    ends: list[np.ndarray]  # where each of its N tokens ends, in bytes
    before: int  # tokens that stand before a document

    def tokens_of(self, block: _Block) -> tuple[np.ndarray, int, int]:
        """Return a document's ids, and where in them the block begins and ends."""
        ends = self.ends[block.document]
        begin, end = np.searchsorted(ends, [block.start, block.stop], side="right")
        ids = self.ids[block.document]
        return ids, int(begin) + self.before, int(end) + self.before

    def count(self, block: _Block) -> int:
        _, begin, end = self.tokens_of(block)
        return end - begin


def _readings(models, text):
    """Encode the documents once per tokenizer."""
    readings, by_tokenizer = {}, {}
    for name, model in models.items():
        check_open(model)
        check_tokenizer(model.tokenizer, name)
        fingerprint = model.tokenizer.fingerprint()
        if fingerprint not in by_tokenizer:
            by_tokenizer[fingerprint] = _read(model.tokenizer, text, name)
        readings[name] = by_tokenizer[fingerprint]
    return readings


def _read(tokenizer, text, name):
    texts = [document.text for document in text.documents]
    try:
        encoded = tokenizer.encode_batch(texts)
    except InputError as error:
        raise InputError(f"{name} cannot read {text.name}. {error}") from None
    if sum(map(len, encoded)) < 2:
        raise InputError(
            f"Judging {name} expects at least two tokens. Received: "
            f"{sum(map(len, encoded))} in {text.name}. Give more text."
        )
    sizes = np.array(
        [len(tokenizer.decode_bytes([token])) for token in range(tokenizer.vocab_size)]
    )
    # The first token of a document needs something before it too.
    before = [tokenizer.end_of_text_id]
    if before == [None]:
        try:
            before = tokenizer.encode("\n") or [0]
        except InputError:  # a character tokenizer of text without lines
            before = [0]
    if tokenizer.kind == "foreign":  # which may change text
        ends = tokenizer.ends_in(texts)
    else:
        ends = [np.cumsum(sizes[ids]) for ids in encoded]
    for document, end in zip(text.documents, ends, strict=True):
        size = len(document.text.encode("utf-8", "replace"))
        if not len(end) or end[-1] != size:
            raise InputError(
                f"Judging {name} expects a tokenizer that gives back the text. "
                f"Received: {end.max(initial=0)} of the {size} bytes of "
                f"{document.name}. Use the tokenizer that the model was trained with."
            )
    ids = [np.array([*before, *ids], np.int64) for ids in encoded]
    return _Reading(ids, ends, len(before))


def _blocks(readings, block_bytes):
    """Cut the documents where tokens of all readings end."""
    different = {id(reading): reading.ends for reading in readings.values()}
    blocks = []
    for document, ends in enumerate(zip(*different.values(), strict=True)):
        common = functools.reduce(np.intersect1d, ends)
        cuts = _cuts(common, block_bytes)
        blocks += [_Block(document, start, stop) for start, stop in cuts]
    return blocks


def _cuts(boundaries, block_bytes):
    """Yield about equal pieces `(start, stop)`, of at most so many bytes if it can."""
    size = int(boundaries[-1])
    largest = math.ceil(size / math.ceil(size / block_bytes))
    start = 0
    while start < size:
        nearest = np.searchsorted(boundaries, start + largest, side="right") - 1
        following = np.searchsorted(boundaries, start, side="right")
        stop = int(boundaries[max(nearest, following)])
        yield start, stop
        start = stop


def _chosen(blocks, reading, max_tokens, seed):
    """Return blocks spread evenly over the text, as many as the budget allows."""
    counts = [reading.count(block) for block in blocks]
    if max_tokens is None or sum(counts) <= max_tokens:
        return blocks
    order = _spread(len(blocks))
    shift = int(np.random.default_rng(seed).integers(len(blocks)))
    chosen, left = [], max_tokens
    for place in order:
        place = (place + shift) % len(blocks)
        if chosen and counts[place] > left:
            break
        chosen.append(place)
        left -= counts[place]
    return [blocks[place] for place in sorted(chosen)]


def _spread(count):
    """Return 0 to `count - 1` so that the first of them, however many, lie evenly.

    Reference: van der Corput, "Verteilungsfunktionen" (1935): counting with the bits
    reversed.
    """
    bits = max(1, (count - 1).bit_length())
    places = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(1 << bits))
    return [place for place in places if place < count]


# What a model says of them


def _logits(model, name, ids, begin, end):
    """Return the logits `(end - begin, V)` by which those tokens are judged."""
    context = model.context_length
    overlap = context // 2
    # The token at `known` is the first that is not read yet; the next is judged by it.
    known, pieces = begin - 1, []
    while known < end - 1:
        first = max(0, known - overlap)
        last = min(first + context, end - 1)
        model.reset()
        model.prefill(ids[first:known].tolist())
        pieces.append(model.logits(ids[known:last].tolist()))
        known = last
    model.reset()
    logits = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    if not np.isfinite(logits).all():
        wrong = logits[~np.isfinite(logits)]
        raise InputError(
            f"Judging {name} expects finite logits. Received: {wrong[0]}, and "
            f"{len(wrong):,} such in a block. Its weights may contain NaN or "
            "Inf: export or train it again."
        )
    return logits


def _judge(logits, targets, of_reference):
    """Add up what a block has: nats, tokens, correct, divergence, agreed."""
    sums = np.zeros(_SUMS)
    sums[_TOKENS] = len(targets)
    at_once = max(1, _FLOATS // logits.shape[1])
    for first in range(0, len(targets), at_once):
        rows = slice(first, first + at_once)
        found = log_softmax(logits[rows])  # (n, V)
        best = found.argmax(axis=-1)
        sums[_NATS] -= found[np.arange(len(found)), targets[rows]].sum()
        sums[_CORRECT] += (best == targets[rows]).sum()
        if of_reference is not None:
            expected = log_softmax(of_reference[rows])
            sums[_AGREED] += (best == expected.argmax(axis=-1)).sum()
            divergences = np.einsum("nv,nv->n", np.exp(expected), expected - found)
            # Rounding may leave less than nothing.
            sums[_DIVERGENCE] += np.maximum(divergences, 0).sum()
    return sums


def _has_tokens_of(model, reference, name, notes):
    """Tell whether distributions over tokens can be compared; say so if not."""
    ours, theirs = model.tokenizer.fingerprint(), reference.tokenizer.fingerprint()
    sizes = [other.config["vocab_size"] for other in (model, reference)]
    if ours == theirs and sizes[0] == sizes[1]:
        return True
    what = (
        "another tokenizer than the reference"
        if ours != theirs
        else f"{sizes[0]} tokens where the reference has {sizes[1]}"
    )
    report.note(
        notes,
        f"{name} has {what}: its increase of perplexity is over the same bytes, "
        "per token of the reference; divergence and agreement are left out",
    )
    return False


# What that comes to


def _summary(sums, reference, is_comparable, sizes, samples, seed):
    sizes = np.array(sizes, np.float64)[:, None]
    others = np.zeros((len(sums), 2)) if reference is None else reference
    totals = np.hstack([sums, others[:, [_NATS, _TOKENS]], sizes])

    def interval(statistic):
        return block_bootstrap(totals, statistic, samples=samples, seed=seed)

    def per_token(quantity):
        return interval(lambda s: s[..., quantity] / s[..., _TOKENS])

    def perplexity(s):
        return np.exp(np.minimum(s[..., _NATS] / s[..., _TOKENS], _MOST_NATS))

    def increase(s):
        more = (s[..., _NATS] - s[..., _REFERENCE_NATS]) / s[..., _REFERENCE_TOKENS]
        return np.expm1(np.minimum(more, _MOST_NATS))

    return {
        "tokens": int(sums[:, _TOKENS].sum()),
        "bytes": int(sizes.sum()),
        "blocks": len(sums),
        "perplexity": interval(perplexity),
        "bits_per_byte": interval(lambda s: s[..., _NATS] / s[..., _BYTES] / np.log(2)),
        "token_accuracy": per_token(_CORRECT),
        "perplexity_increase": interval(increase) if reference is not None else None,
        "divergence_nats": per_token(_DIVERGENCE) if is_comparable else None,
        "top1_agreement": per_token(_AGREED) if is_comparable else None,
        "parsed": None,
    }


def _check(models, reference, max_tokens, block_bytes, samples, seed):
    if not models:
        raise InputError(
            "Measuring expects at least one file or model. Received: none."
        )
    if reference is not None:
        arguments.one_of("reference", reference, models)
    arguments.integer("max_tokens", max_tokens, 2, or_none=True)
    arguments.integer("block_bytes", block_bytes, 1, or_none=True)
    arguments.integer("samples", samples, 1)
    arguments.integer("seed", seed)
