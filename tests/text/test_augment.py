"""Claims about texts that are read otherwise each time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_tf.errors import InputError
from gpt_tf.text.augment import BPEDropout
from gpt_tf.text.dataset import Windows
from gpt_tf.text.rng import draw, uniform
from gpt_tf.text.tokenizer import END_OF_TEXT, BPETokenizer, CharacterTokenizer

TEXT = (
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to "
    "suffer the slings and arrows of outrageous fortune, or to take arms against a "
    "sea of troubles and by opposing end them. 中文 é\u0301\U0001f600\n\n    x = 1\n"
)
BPE = BPETokenizer.train([TEXT * 3], 360)
CHARACTER = CharacterTokenizer.train([TEXT], end_of_text=False)
END = BPE.end_of_text_id
PIECES = BPE.encode(TEXT)
TOKENS = np.array([*PIECES, END] * 8)
LENGTH, ROWS = 12, 6

NOISE = {
    "token_dropout": {"token_dropout": 0.3},
    "token_replacement": {"token_replacement": 0.3},
    "uniform": {"token_replacement": 0.3, "replacement": "uniform"},
}
CHANGES = {
    **NOISE,
    "bpe_dropout": {"bpe_dropout": 0.3},
    "mix_documents": {"mix_documents": 0.7},
    "random_offsets": {"random_offsets": False},
}
ALL = {
    "bpe_dropout": 0.2,
    "token_dropout": 0.1,
    "token_replacement": 0.1,
    "mix_documents": 0.5,
}
EVERYTHING = {**CHANGES, "all": ALL}


def windows_with(fields, tokens=TOKENS, tokenizer=BPE, seed=3, rows=ROWS, **options):
    options = {"augmentation": fields, "tokenizer": tokenizer, **options}
    return Windows(tokens, LENGTH, rows, seed=seed, **options)


def batches_of(windows, steps=range(6)):
    """Return inputs, targets and weights of some steps, each `(N, T)`."""
    batches = [windows.batch(step) for step in steps]
    return [np.concatenate(arrays) for arrays in zip(*batches, strict=True)]


def assert_same(batches, others):
    for array, other in zip(batches, others, strict=True):
        np.testing.assert_array_equal(array, other)


def differ(batches, others):
    pairs = zip(batches, others, strict=True)
    return any(not np.array_equal(array, other) for array, other in pairs)


# Randomness without a state


def test_uniform_numbers_fill_their_range_evenly():
    found = uniform(np.uint64(11), np.arange(100_000))
    assert found.min() >= 0 and found.max() < 1
    counts, _ = np.histogram(found, 20, (0, 1))
    # Five standard deviations of a count of 5000.
    assert np.abs(counts - 5000).max() < 5 * 5000**0.5


# BPE dropout


@settings(max_examples=settings().max_examples // 3)
@given(st.text(), st.floats(0, 1), st.integers(0, 2**40))
def test_bpe_dropout_gives_back_the_text_in_known_ids(text, rate, seed):
    ids = BPEDropout(BPE, rate).encode(text, seed)
    assert BPE.decode(ids) == BPE.decode(BPE.encode(text))
    assert set(ids) <= set(BPE.backend.get_vocab().values()) - {END}


@settings(max_examples=settings().max_examples // 2)
@given(st.text() | st.sampled_from([TEXT, TEXT * 2, "aaaaaaaa", " " * 30, END_OF_TEXT]))
def test_without_dropout_the_ids_are_the_tokenizers_own(text):
    assert BPEDropout(BPE, 0).encode(text) == BPE.encode(text)


def test_with_every_merge_left_out_there_are_bytes():
    ids = BPEDropout(BPE, 1).encode(TEXT)
    assert [BPE.decode_bytes([token]) for token in ids] == [
        bytes([byte]) for byte in TEXT.encode()
    ]


def test_more_dropout_gives_more_tokens_and_seeds_give_others():
    counts = [len(BPEDropout(BPE, rate).encode(TEXT)) for rate in (0, 0.1, 0.5, 1)]
    assert counts == sorted(set(counts))
    seeds = [BPEDropout(BPE, 0.2).encode(TEXT, seed) for seed in (0, 1, 0)]
    assert seeds[0] == seeds[2] != seeds[1]


def test_each_step_leaves_out_merges_anew():
    """Two merges of a word, of which the first step does one, the second the other."""
    tokenizer = BPETokenizer.train(["ab\ncd\n" * 9], 259)
    ids = np.array(tokenizer.encode("abcd"))
    assert len(ids) == 2
    rate, count = 0.5, 4000
    found = BPEDropout(tokenizer, rate).resegment([ids] * count, np.arange(count))
    shares = np.bincount([len(row) for row in found]) / count
    both = (1 - rate**2) * (1 - rate)
    for tokens, expected in ((2, both), (4, rate**2)):
        spread = (expected * (1 - expected) / count) ** 0.5
        assert abs(shares[tokens] - expected) < 5 * spread


def test_a_tokenizer_without_merges_has_nothing_to_leave_out():
    tokenizer = BPETokenizer.train(["ab"], 257)
    assert BPEDropout(tokenizer, 0.5).encode("abc") == tokenizer.encode("abc")


def test_rows_do_not_depend_on_their_neighbours():
    rows = [np.array(PIECES[start : start + 20]) for start in range(0, 80, 9)]
    keys = draw(np.uint64(1), np.arange(len(rows)))
    dropout = BPEDropout(BPE, 0.3)
    together = dropout.resegment(rows, keys)
    for row, key, found in zip(rows, keys, together, strict=True):
        np.testing.assert_array_equal(dropout.resegment([row], [key])[0], found)
    assert dropout.resegment([], [])[0].size == 0
    assert [r.size for r in dropout.resegment([np.array([], int)] * 2, keys[:2])] == [
        0,
        0,
    ]


def test_rows_may_begin_within_a_character_and_hold_ends_of_text():
    broken = BPEDropout(BPE, 1).encode("中文")[1:]
    row = np.array([*broken, END, *BPE.encode("to be"), END, END])
    (found,) = BPEDropout(BPE, 0.5).resegment([row], [np.uint64(4)])
    assert BPE.decode_bytes(found) == BPE.decode_bytes(row)
    assert found.tolist().count(END) == 3
    assert found.tolist()[-2:] == [END, END]


# Windows


@pytest.mark.parametrize("fields", EVERYTHING.values(), ids=EVERYTHING)
def test_a_batch_depends_on_seed_and_step_alone(fields):
    windows = windows_with(fields)
    forwards = [windows.batch(step) for step in range(9)]
    again = windows_with(fields)
    for step in (7, 2, 7, 0, 8):
        assert_same(again.batch(step), forwards[step])
    plain = batches_of(windows_with({}), range(9))
    assert_same(plain, batches_of(windows_with(None), range(9)))
    assert differ(plain, batches_of(windows, range(9)))
    assert differ(windows_with(fields, seed=4).batch(0), forwards[0])
    resumed = windows.dataset(start_step=5, num_steps=4)
    for batch, expected in zip(resumed, forwards[5:], strict=True):
        assert_same([tensor.numpy() for tensor in batch], expected)


@pytest.mark.parametrize("fields", EVERYTHING.values(), ids=EVERYTHING)
def test_shards_make_up_the_batch(fields):
    windows = windows_with(fields)
    for step in (0, 9):
        parts = [windows.batch(step, i, 3) for i in range(3)]
        joined = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
        assert_same(joined, windows.batch(step))


@pytest.mark.parametrize("name", ["bpe_dropout", "token_dropout", "token_replacement"])
def test_an_epoch_reads_the_same_window_otherwise(name):
    """One window of the whole text, without an offset, so that only noise differs."""
    tokens = TOKENS[: LENGTH + 1]
    fields = {**CHANGES[name], "random_offsets": False}
    windows = windows_with(fields, tokens, rows=1)
    assert windows.steps_per_epoch == 1
    assert differ(windows.batch(0), windows.batch(1))


@pytest.mark.parametrize("fields", NOISE.values(), ids=NOISE)
def test_noise_is_in_the_inputs_alone(fields):
    x, y, weights = batches_of(windows_with(fields))
    plain_x, plain_y, plain_weights = batches_of(windows_with(None))
    np.testing.assert_array_equal(y, plain_y)
    np.testing.assert_array_equal(weights, plain_weights)
    assert (x != plain_x).any()
    # The end of a document is never taken away.
    assert (plain_x == END).any() and (x[plain_x == END] == END).all()


def test_dropped_tokens_are_blank_and_as_many_as_the_rate_says():
    windows = windows_with({"token_dropout": 0.2})
    plain, _, _ = batches_of(windows_with(None), range(40))
    x, _, _ = batches_of(windows, range(40))
    changed = x != plain
    assert (x[changed] == END).all()
    share = changed.sum() / (plain != END).sum()
    assert abs(share - 0.2) < 5 * (0.2 * 0.8 / plain.size) ** 0.5


def test_without_an_end_of_text_the_commonest_token_is_the_blank():
    tokens = np.array(CHARACTER.encode(TEXT * 4))
    fields = {"token_dropout": 0.4}
    x, _, _ = batches_of(windows_with(fields, tokens, CHARACTER))
    plain, _, _ = batches_of(windows_with(None, tokens, CHARACTER))
    assert set(x[x != plain]) == set(CHARACTER.encode(" "))


@pytest.mark.parametrize(
    ("replacement", "found_in", "share"),
    [("unigram", "ab", 0.9), ("uniform", "abcd", 0.25)],
)
def test_replacements_are_as_in_the_text_or_any_token_but_the_end(
    replacement, found_in, share
):
    """In a text of an `a` in ten `b`, look at what comes in place of an `a`."""
    tokenizer = CharacterTokenizer.train(["abcd"])
    tokens = np.array(tokenizer.encode("abbbbbbbbb" * 200))
    fields = {"token_replacement": 0.9, "replacement": replacement}
    x, _, _ = batches_of(windows_with(fields, tokens, tokenizer), range(60))
    plain, _, _ = batches_of(windows_with(None, tokens, tokenizer), range(60))
    a, b = tokenizer.encode("ab")
    found = x[plain == a]
    assert set(found) == set(tokenizer.encode(found_in))
    expected = 0.9 * share
    spread = (expected * (1 - expected) / len(found)) ** 0.5
    assert abs((found == b).mean() - expected) < 5 * spread


def test_bpe_dropout_reads_the_text_from_where_the_window_begins():
    windows = windows_with({"bpe_dropout": 0.4})
    for step in range(12):
        plain_x, _, _ = windows_with(None).batch(step)
        x, y, weights = windows.batch(step)
        np.testing.assert_array_equal(
            x[:, 1:][weights[:, :-1] > 0], y[:, :-1][weights[:, :-1] > 0]
        )
        for row, plain in zip(x, plain_x, strict=True):
            # An end of text has no bytes.
            found, expected = BPE.decode_bytes(row), BPE.decode_bytes(plain)
            length = min(len(found), len(expected))
            assert found[:length] == expected[:length]


def test_where_the_text_ends_the_rest_has_no_weight(monkeypatch):
    windows = windows_with({"bpe_dropout": 0.2})

    def shorter(rows, keys):
        return [np.asarray(row)[:5] for row in rows]

    monkeypatch.setattr(windows._augmenter._bpe, "resegment", shorter)
    x, _, weights = windows.batch(0)
    assert (weights[:, :4] == 1).all() and (weights[:, 4:] == 0).all()
    assert (x[:, 5:] == END).all()


def ramp_with(fields, tokenizer, count=200):
    """Windows over ids that rise by one, so that each tells its place."""
    return windows_with(fields, np.arange(1, count + 1), tokenizer)


def test_a_mixed_window_goes_on_elsewhere_behind_a_mark():
    assert END == 0
    windows = ramp_with({"mix_documents": 0.5}, BPE)
    plain, _, _ = batches_of(ramp_with(None, BPE), range(30))
    x, y, weights = batches_of(windows, range(30))
    cuts, places, mixed = set(), [], 0
    for row, targets, weight, before in zip(x, y, weights, plain, strict=True):
        ids = np.append(row, targets[-1])
        np.testing.assert_array_equal(targets, np.where(weight > 0, ids[1:], -100))
        if END not in ids:
            np.testing.assert_array_equal(row, before)
            assert weight.all()
            continue
        mixed += 1
        cut = ids.tolist().index(END)
        cuts.add(cut)
        if cut + 1 < LENGTH:  # else what goes on there is not seen
            places.append(ids[cut + 1])
        np.testing.assert_array_equal(ids[:cut], before[:cut])
        assert (np.diff(row[cut + 1 :]) == 1).all()
        # Neither the mark nor what begins behind it can be foreseen.
        unknown = [place - 1 for place in (cut, cut + 1) if place <= LENGTH]
        assert np.flatnonzero(weight == 0).tolist() == unknown
    assert abs(mixed / len(x) - 0.5) < 5 * (0.25 / len(x)) ** 0.5
    assert cuts == set(range(1, LENGTH))
    # They go on at any place at which there is text enough.
    assert min(places) < 20 and 170 < max(places) <= 200 - LENGTH


def test_without_an_end_of_text_a_mixed_window_has_no_mark():
    alphabet = [chr(0x4E00 + index) for index in range(201)]
    tokenizer = CharacterTokenizer.train(alphabet, end_of_text=False)
    x, y, weights = batches_of(ramp_with({"mix_documents": 0.9}, tokenizer), range(9))
    jumps = np.diff(x) != 1
    assert jumps.any()
    known = weights[:, :-1] > 0
    np.testing.assert_array_equal(x[:, 1:][known], y[:, :-1][known])
    # A jump has no weight; a text may by chance go on at the very next place.
    assert not weights[:, :-1][jumps].any()
    assert (weights == 0).sum(1).max() == 1


def test_windows_of_one_token_cannot_be_mixed_and_are_left():
    options = {"augmentation": {"mix_documents": 0.9}, "tokenizer": BPE}
    mixed, plain = Windows(TOKENS, 1, 4, **options), Windows(TOKENS, 1, 4)
    assert_same(mixed.batch(3), plain.batch(3))


def test_fixed_offsets_cut_the_same_windows_in_each_epoch():
    def rows_of(windows, epoch):
        steps = range(epoch * windows.steps_per_epoch, (epoch + 1) * steps_of)
        return {tuple(row) for step in steps for row in windows.batch(step)[0]}

    count = 12 * LENGTH * ROWS + 1
    fixed = ramp_with({"random_offsets": False}, BPE, count + LENGTH)
    steps_of = fixed.steps_per_epoch
    assert steps_of == 12
    assert rows_of(fixed, 0) == rows_of(fixed, 1)
    free = ramp_with({}, BPE, count + LENGTH)
    assert rows_of(free, 0) != rows_of(free, 1)


@settings(max_examples=settings().max_examples // 4)
@given(
    st.tuples(*[st.sampled_from([0.0, 0.1, 0.9])] * 4), st.integers(0, 300), st.data()
)
def test_any_mixture_gives_sound_batches(rates, step, data):
    names = ("bpe_dropout", "token_dropout", "token_replacement", "mix_documents")
    windows = windows_with(dict(zip(names, rates, strict=True)))
    x, y, weights = windows.batch(step)
    assert x.shape == y.shape == weights.shape == (ROWS, LENGTH)
    assert (x.dtype, y.dtype, weights.dtype) == (np.int32, np.int32, np.float32)
    assert x.min() >= 0
    np.testing.assert_array_equal(y < 0, weights == 0)
    assert max(x.max(), y.max()) < BPE.vocab_size
    assert set(np.unique(weights)) <= {0.0, 1.0}
    if not (rates[1] or rates[2]):
        known = weights[:, :-1] > 0
        np.testing.assert_array_equal(x[:, 1:][known], y[:, :-1][known])


# Bad input


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"written_tokens": 10}, {}, "Give both or none"),
        ({"teacher": "runs/a"}, {}, "Give both or none"),
        ({"token_dropout": 0.1}, {"tokenizer": None}, "`tokenizer`"),
        ({"random_offsets": False}, {"shuffle": False}, "windows for measuring"),
        ({"bpe_dropout": 0.1}, {"tokenizer": CHARACTER}, "expects a bpe tokenizer"),
        (
            {"token_replacement": 0.1},
            {"tokens": np.full(100, BPE.vocab_size + 3)},
            f"Received: {BPE.vocab_size + 3}",
        ),
        (
            {"token_replacement": 0.1},
            {"tokens": np.zeros(100, int)},
            "nothing but ends of text",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(fields, options, message):
    with pytest.raises(InputError, match=message):
        windows_with(fields, **options)
