"""What is said of a file's accuracy is what its logits say, and how sure it is."""

import itertools
import math
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from gpt_tf.edge import EdgeGPT
from gpt_tf.errors import InputError
from gpt_tf.evaluation import accuracy
from gpt_tf.evaluation.accuracy import (
    block_bootstrap,
    evaluate_files,
    measure_accuracies,
)
from gpt_tf.evaluation.models import KerasGPT
from gpt_tf.export.litertlm import export_litertlm
from gpt_tf.text.tokenizer import BPETokenizer, CharacterTokenizer

LETTERS = "abcdefghij .\n\u00e9"
CHARACTERS = CharacterTokenizer.train([LETTERS])
CONTEXT = 16


def text_of(length, seed=0):
    letters = np.random.default_rng(seed).choice(list(LETTERS), length)
    return "".join(letters)


class Bigrams:
    """A model whose logits are a table's row: what is read before has no influence.

    It keeps which tokens it was asked for, and how many stood before each.
    """

    def __init__(self, seed, tokenizer=CHARACTERS, context_length=CONTEXT, table=None):
        size = tokenizer.vocab_size
        draws = np.random.default_rng(seed).normal(0, 2, (size, size))
        self.table = draws.astype(np.float32) if table is None else table
        self.config = {"vocab_size": size}
        self.context_length = context_length
        self.tokenizer = tokenizer
        self.position = 0
        self.asked = []

    def reset(self):
        self.position = 0

    def prefill(self, ids):
        self.position += len(ids)
        assert self.position <= self.context_length

    def logits(self, ids):
        self.asked += [self.position + index for index in range(len(ids))]
        self.prefill(ids)
        return self.table[ids]


def measure_accuracy(model, text, reference=None, name="the model", **options):
    """What is measured of one model, beside a reference."""
    models, compared = {name: model}, None
    if reference is not None:
        compared = "the reference"
        models[compared] = reference
    return measure_accuracies(models, compared, text, **options)[name]


def bigram_nats(table, texts, tokenizer=CHARACTERS):
    """The nats of each token of texts, and its row of log-probabilities."""
    exact = np.asarray(table, np.float64)
    logs = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    ids = [[tokenizer.end_of_text_id, *tokenizer.encode(text)] for text in texts]
    pairs = np.array([pair for row in ids for pair in itertools.pairwise(row)])
    return -logs[pairs[:, 0], pairs[:, 1]], logs[pairs[:, 0]], pairs[:, 1]


# What is measured


def own_nats(model, ids, context=CONTEXT):
    """The nats of a text in windows with half a context in common, by `model(...)`."""
    nats, known = [], 0
    while known < len(ids) - 1:
        first = max(0, known - context // 2)
        window = np.array(ids[first : first + context])
        logits = model(window[None]).numpy()[0].astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        for place in range(known - first, len(window)):
            if first + place + 1 < len(ids):
                nats.append(-logs[place, ids[first + place + 1]])
        known = first + len(window)
    return nats


def test_perplexity_is_that_of_the_models_own_logits_in_keras_and_in_a_file(
    make_model, tmp_path
):
    model = make_model(vocab_size=CHARACTERS.vocab_size, num_layers=1)
    generator = np.random.default_rng(8)
    for weight in model.weights:
        weight.assign_add(generator.normal(0, 0.3, weight.shape))
    texts, nats = [text_of(45), text_of(9, seed=1)], []
    for text in texts:
        ids = [CHARACTERS.end_of_text_id, *CHARACTERS.encode(text)]
        nats += own_nats(model, ids)
    perplexity = math.exp(np.mean(nats))
    size = len("".join(texts).encode())
    bits = sum(nats) / math.log(2) / size
    path = tmp_path / "gpt.litertlm"
    options = {"mode": "float32", "prefill_lengths": (1, 8)}
    export_litertlm(model, CHARACTERS, path, **options)
    keras = KerasGPT(model, CHARACTERS)
    with EdgeGPT(path) as file:
        subjects = {"file": file, "keras": keras}
        found = measure_accuracies(subjects, "keras", texts, block_bytes=1000)
    for one in found.values():
        assert one["tokens"] == len(nats) == 54
        assert one["bytes"] == size > 54
        assert one["perplexity"]["value"] == pytest.approx(perplexity, rel=1e-5)
        assert one["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-5)
    assert found["file"]["token_accuracy"] == found["keras"]["token_accuracy"]
    assert found["file"]["divergence_nats"]["value"] < 1e-9
    assert found["file"]["top1_agreement"]["value"] == 1
    # The tolerance notices one weight among hundreds.
    weight = model.weights[-1]
    before = weight.numpy()
    weight.assign(before + 0.01 * np.eye(1, before.size).reshape(before.shape))
    again = measure_accuracy(keras, texts, block_bytes=1000, samples=10)
    assert again["perplexity"]["value"] != pytest.approx(perplexity, rel=1e-5)


@pytest.mark.parametrize("block_bytes", [1, 40, 1000])
def test_each_token_is_judged_once_with_half_a_context_before_it(block_bytes):
    gpt = Bigrams(1)
    text = text_of(150)
    found = measure_accuracy(gpt, text, block_bytes=block_bytes)
    assert found["tokens"] == len(gpt.asked) == 150
    assert found["bytes"] == len(text.encode())
    assert sorted(gpt.asked[:8]) == list(range(8))
    assert min(gpt.asked[8:]) >= CONTEXT // 2
    if block_bytes == 1000:
        # As `EdgeGPT.score` reads: a full window, and then half windows.
        assert gpt.asked == [*range(16), *(list(range(8, 16)) * 17)][:150]


def test_numbers_are_those_of_numpy_however_the_text_is_cut():
    texts = [text_of(200), text_of(33, seed=1), "a"]
    ours, theirs = Bigrams(1), Bigrams(2)
    nats, logs, targets = bigram_nats(ours.table, texts)
    other_nats, other_logs, _ = bigram_nats(theirs.table, texts)
    expected = {
        "perplexity": math.exp(nats.mean()),
        "perplexity_increase": math.exp(nats.mean()) / math.exp(other_nats.mean()) - 1,
        "token_accuracy": (logs.argmax(1) == targets).mean(),
        "divergence_nats": (np.exp(other_logs) * (other_logs - logs)).sum(1).mean(),
        "top1_agreement": (logs.argmax(1) == other_logs.argmax(1)).mean(),
    }
    assert 0 < expected["token_accuracy"] < 1 and 0 < expected["top1_agreement"] < 1
    for block_bytes in (3, 50, 1000):
        found = measure_accuracy(
            ours, texts, reference=theirs, block_bytes=block_bytes, samples=10
        )
        values = {part: found[part]["value"] for part in expected}
        assert values == pytest.approx(expected, rel=1e-6)
    ours.table[0, 0] += 0.01
    found = measure_accuracy(ours, texts, reference=theirs, samples=10)
    for part in ("perplexity", "perplexity_increase", "divergence_nats"):
        assert found[part]["value"] != pytest.approx(expected[part], rel=1e-6)


def test_contexts_of_other_lengths_are_compared_on_the_same_tokens():
    ours, theirs = Bigrams(1, context_length=5), Bigrams(1, context_length=64)
    found = measure_accuracy(ours, text_of(300), reference=theirs, samples=10)
    assert found["perplexity_increase"]["value"] == pytest.approx(0, abs=1e-12)
    assert found["divergence_nats"]["value"] == 0
    nats = bigram_nats(ours.table, [text_of(300)])[0].sum()
    bits = nats / math.log(2) / len(text_of(300).encode())
    assert found["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-6)


def test_a_model_is_equal_to_itself_and_the_reference_runs_once_for_all():
    models = {name: Bigrams(seed) for seed, name in enumerate("abc")}
    found = measure_accuracies(models, "b", text_of(300), block_bytes=30)
    assert list(found) == ["a", "b", "c"]
    assert {len(gpt.asked) for gpt in models.values()} == {300}
    relative = {"perplexity_increase": 0, "divergence_nats": 0, "top1_agreement": 1}
    for part, value in relative.items():
        assert found["b"][part] == {"value": value, "low": value, "high": value}
        assert found["a"][part]["value"] != value
    alone = measure_accuracy(models["b"], text_of(300), block_bytes=30)
    assert alone == found["b"] | dict.fromkeys(relative)


@pytest.fixture(scope="module")
def pieces():
    return BPETokenizer.train([text_of(3000, seed=9)], 300)


def test_other_tokens_are_compared_on_the_same_bytes(pieces):
    text = [text_of(400), text_of(77, seed=4)]
    ours, theirs = Bigrams(1, pieces), Bigrams(2)
    notes = []
    found = measure_accuracies(
        {"ours": ours, "theirs": theirs},
        "theirs",
        text,
        block_bytes=40,
        notes=notes,
    )
    assert found["ours"]["tokens"] < found["theirs"]["tokens"] == 477
    size = len("".join(text).encode())
    assert found["ours"]["bytes"] == found["theirs"]["bytes"] == size
    nats = bigram_nats(ours.table, text, pieces)[0].sum()
    other = bigram_nats(theirs.table, text)[0].sum()
    increase = found["ours"]["perplexity_increase"]["value"]
    assert increase == pytest.approx(math.exp((nats - other) / 477) - 1, rel=1e-6)
    assert found["ours"]["divergence_nats"] is found["ours"]["top1_agreement"] is None
    assert found["theirs"]["top1_agreement"]["value"] == 1
    assert len(notes) == 1 and notes[0].startswith("ours has another tokenizer")


def test_blocks_end_where_tokens_of_all_tokenizers_end(pieces):
    others = BPETokenizer.train([text_of(3000, seed=5)], 290)
    subjects = {"a": Bigrams(1, pieces), "b": Bigrams(1, others)}
    readings = accuracy._readings(subjects, accuracy.HeldOutText.of(text_of(2000)))
    ends = [set(readings[name].ends[0].tolist()) for name in "ab"]
    assert ends[0] - ends[1] and ends[1] - ends[0]
    blocks = accuracy._blocks(readings, 10)
    assert {block.stop for block in blocks} <= ends[0] & ends[1]


def test_a_larger_vocabulary_of_the_same_tokens_is_no_crash():
    ours, notes = Bigrams(1), []
    ours.config, ours.table = {"vocab_size": 20}, np.zeros((20, 20), np.float32)
    found = measure_accuracy(ours, text_of(90), reference=Bigrams(2), notes=notes)
    assert found["divergence_nats"] is None and found["perplexity_increase"]
    assert found["perplexity"]["value"] == pytest.approx(20)
    assert "20 tokens where the reference has 15" in notes[0]


def test_a_hopeless_model_has_a_finite_perplexity():
    gpt = Bigrams(1, table=np.full((15, 15), -1e6, np.float32))
    gpt.table[:, CHARACTERS.end_of_text_id] = 1e6
    found = measure_accuracy(gpt, text_of(50), reference=Bigrams(2))
    assert math.isfinite(found["perplexity"]["value"])
    assert math.isfinite(found["perplexity_increase"]["high"])


# Blocks


@hypothesis.given(
    st.lists(st.integers(1, 9), min_size=1, max_size=60), st.integers(1, 30)
)
def test_cuts_cover_all_bytes_between_tokens(sizes, block_bytes):
    boundaries = np.cumsum(sizes)
    cuts = list(accuracy._cuts(boundaries, block_bytes))
    assert [start for start, _ in cuts] == [0, *(stop for _, stop in cuts[:-1])]
    assert cuts[-1][1] == boundaries[-1]
    assert {stop for _, stop in cuts} <= set(boundaries.tolist())
    # Longer than asked for only where a token is.
    assert all(stop - start <= max(block_bytes, max(sizes)) for start, stop in cuts)


@pytest.mark.parametrize("max_tokens", [300, 3000])
def test_a_budget_is_kept_and_spread_evenly(max_tokens):
    text = accuracy.HeldOutText.of([text_of(4000, seed=i) for i in range(3)])
    readings = accuracy._readings({"a": Bigrams(1)}, text)
    blocks = accuracy._blocks(readings, 20)
    chosen, again, other = (
        accuracy._chosen(blocks, readings["a"], max_tokens, seed) for seed in (0, 0, 1)
    )
    assert chosen == again != other
    judged = sum(map(readings["a"].count, chosen))
    assert max_tokens - 20 < judged <= max_tokens
    found = [blocks.index(block) for block in chosen]
    gaps = np.diff([*found, found[0] + len(blocks)])
    # At random the largest gap would be some six times the mean, and more.
    assert gaps.min() > 0 and gaps.max() <= 2.5 * gaps.mean()


def test_a_budget_judges_no_more_than_it_says_but_one_block():
    gpt, notes = Bigrams(1), []
    assert measure_accuracy(gpt, text_of(4000), max_tokens=None)["tokens"] == 4000
    options = {"max_tokens": 2, "block_bytes": 50, "notes": notes}
    found = measure_accuracy(gpt, text_of(4000), **options)
    assert found["blocks"] == 1 and 2 < found["tokens"] <= 50
    assert found["perplexity"]["low"] == found["perplexity"]["value"]
    assert "intervals are points" in notes[0]


def test_a_seed_decides_everything_and_progress_ends_with_all_blocks():
    def found(seed):
        models = {"a": Bigrams(1), "b": Bigrams(2)}
        return measure_accuracies(
            *(models, "b", text_of(3000)),
            max_tokens=600,
            seed=seed,
            on_progress=lambda *done: calls.append(done),
        )

    calls = []
    first = found(4)
    total = 2 * first["a"]["blocks"]
    assert calls == [(done, total) for done in range(1, total + 1)]
    assert found(4) == first
    assert found(5)["a"]["perplexity"] != first["a"]["perplexity"]


# Intervals


def mean(sums):
    return sums[..., 0] / sums[..., 1]


def coverage(length, rounds):
    """How often an interval of blocks of so many tokens holds the true mean, 3.

    Tokens resemble the others of their 20.
    """
    generator = np.random.default_rng(2)
    hits = 0
    for seed in range(rounds):
        values = 3 + generator.normal(0, 1, (60, 1)) + generator.normal(0, 1, (60, 20))
        sums = values.reshape(-1, length).sum(1)
        totals = np.stack([sums, np.full(len(sums), length)], 1)
        found = block_bootstrap(totals, mean, samples=300, seed=seed)
        hits += found["low"] <= 3 <= found["high"]
    return hits / rounds


def test_an_interval_holds_the_truth_19_times_of_20():
    assert 0.88 <= coverage(length=20, rounds=150) <= 0.99
    # Drawn token by token, as if they were independent, it is far too narrow.
    assert coverage(length=1, rounds=50) < 0.7


def test_the_bootstrap_is_that_of_drawing_blocks_one_by_one():
    totals = np.random.default_rng(3).normal(2, 1, (25, 2)) + [0, 5]
    generator = np.random.default_rng(4)
    draws = [totals[generator.integers(0, 25, 25)].sum(0) for _ in range(20_000)]
    low, high = np.percentile([mean(draw) for draw in draws], [2.5, 97.5])
    found = block_bootstrap(totals, mean, samples=20_000)
    assert found["value"] == pytest.approx(mean(totals.sum(0)))
    width = high - low
    assert abs(found["low"] - low) < 0.05 * width
    assert abs(found["high"] - high) < 0.05 * width


def test_many_blocks_are_drawn_in_parts(monkeypatch):
    totals = np.random.default_rng(3).normal(2, 1, (40, 2))
    at_once = block_bootstrap(totals, mean, samples=105)
    monkeypatch.setattr(accuracy, "_DRAWN_AT_ONCE", 400)
    assert block_bootstrap(totals, mean, samples=105) == pytest.approx(at_once)


def test_a_paired_interval_is_far_narrower_than_one_of_each():
    ours, theirs = Bigrams(1), Bigrams(1)
    noise = np.random.default_rng(5).normal(0, 0.1, ours.table.shape)
    ours.table = theirs.table + noise.astype(np.float32)
    found = measure_accuracy(ours, text_of(6000), reference=theirs)
    increase, own = found["perplexity_increase"], found["perplexity"]
    assert increase["low"] < increase["value"] < increase["high"]
    apart = (own["high"] - own["low"]) / own["value"]
    assert increase["high"] - increase["low"] < 0.25 * apart
    assert found["blocks"] >= 30


# What cannot be used


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" \n", "text"),
        ("a", "two tokens"),
        ("abc?", r"ours.*'\?'"),
        (Path("a.py"), "Path"),
        ([1, 2], "list"),
    ],
)
def test_what_cannot_be_judged_is_said(text, message):
    with pytest.raises(InputError, match=message):
        measure_accuracy(Bigrams(1), text, name="ours")


def test_a_model_that_cannot_be_judged_is_named():
    broken, mute = Bigrams(1), Bigrams(1)
    broken.table[3, 5] = np.nan
    mute.tokenizer = None
    for models, reference, text, message in (
        ({"good": Bigrams(2), "bad": broken}, "good", text_of(300), "bad.*finite.*nan"),
        ({"a": Bigrams(1)}, "b", "abc", "one of a. Received: 'b'"),
        ({"a": mute}, None, "abc", "Judging a .*tokenizer"),
    ):
        with pytest.raises(InputError, match=message):
            measure_accuracies(models, reference, text)
    with pytest.raises(InputError, match="at least one file"):
        evaluate_files([])
    with pytest.raises(InputError, match="at least one block"):
        block_bootstrap(np.zeros((0, 2)), mean)


def test_a_tokenizer_that_changes_text_is_refused():
    changing = CharacterTokenizer.train([LETTERS])
    changing.encode_batch = lambda texts: [CHARACTERS.encode(t[1:]) for t in texts]
    with pytest.raises(InputError, match=r"gives back the text. Received: 2 of"):
        measure_accuracy(Bigrams(1, changing), "abc")


def test_without_an_end_of_text_token_a_line_break_stands_before():
    for letters, before in ((LETTERS, [LETTERS.index("\n")]), ("ab", [0])):
        tokenizer = CharacterTokenizer.train([letters], end_of_text=False)
        if "\n" in letters:
            before = tokenizer.encode("\n")
        text = accuracy.HeldOutText.of("abba")
        reading = accuracy._read(tokenizer, text, "a")
        assert reading.ids[0].tolist() == [*before, *tokenizer.encode("abba")]
