"""Claims about token files and the windows over them."""

import json
import tracemalloc

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.text import corpus as corpora
from gpt_tf.text import dataset as datasets
from gpt_tf.text.corpus import Document, open_corpus
from gpt_tf.text.dataset import TokenFile, Windows, permute, write_token_file
from gpt_tf.text.tokenizer import BPETokenizer, CharacterTokenizer

DOCUMENTS = [
    Document("a", "to be, or not to be\n"),
    Document("b", "that is ", ends=False),
    Document("b", "the question\n"),
]
CHARACTER = CharacterTokenizer.train(d.text for d in DOCUMENTS)
BPE = BPETokenizer.train([d.text for d in DOCUMENTS], 260)

quick = settings(max_examples=settings().max_examples // 2)


@pytest.fixture
def written(tmp_path):
    return write_token_file(tmp_path / "some.tokens", DOCUMENTS, CHARACTER)


def rows_of(windows, steps):
    """Collect the rows `(x, y, weights)` of some steps."""
    for step in steps:
        yield from zip(*windows.batch(step), strict=True)


def as_numpy(dataset):
    return [tuple(tensor.numpy() for tensor in batch) for batch in dataset]


def assert_same(batches, expected):
    assert len(batches) == len(expected) > 0
    for batch, other in zip(batches, expected, strict=True):
        for array, twin in zip(batch, other, strict=True):
            np.testing.assert_array_equal(array, twin)


# Token files


@pytest.mark.parametrize("tokenizer", [CHARACTER, BPE], ids=["character", "bpe"])
def test_documents_are_joined_by_the_end_of_text(tmp_path, tokenizer):
    file = write_token_file(tmp_path / "some.tokens", DOCUMENTS, tokenizer)
    ids = file.tokens.tolist()
    end = tokenizer.end_of_text_id
    assert ids.count(end) == 2 == file.manifest["documents"]
    assert ids[-1] == end
    first = ids.index(end)
    assert tokenizer.decode(ids[:first]) == DOCUMENTS[0].text
    assert tokenizer.decode(ids[first:]) == "that is the question\n"


def test_the_manifest_says_what_the_file_is(tmp_path):
    path = tmp_path / "some.tokens"
    facts = {"split": "train", "count": -1}
    written = write_token_file(path, DOCUMENTS, CHARACTER, facts=facts)
    opened = TokenFile.open(path)
    assert opened.manifest == written.manifest
    assert opened.manifest["split"] == "train"
    assert opened.count == len(opened.tokens) == path.stat().st_size // 2
    assert opened.text_bytes == sum(len(d.text) for d in DOCUMENTS)
    assert opened.manifest["vocab_size"] == CHARACTER.vocab_size
    assert opened.manifest["tokenizer_fingerprint"] == CHARACTER.fingerprint()


@pytest.mark.parametrize(("size", "dtype"), [(65536, "<u2"), (65537, "<u4")])
def test_ids_are_uint16_where_the_vocabulary_fits(tmp_path, size, dtype):
    alphabet = (chr(0x10000 + index) for index in range(size))
    tokenizer = CharacterTokenizer.train(alphabet, end_of_text=False)
    last = chr(0x10000 + size - 1)
    file = write_token_file(tmp_path / "t", [Document("a", last)], tokenizer)
    assert file.manifest["dtype"] == dtype
    assert file.tokens.tolist() == [size - 1]


def test_long_documents_are_encoded_in_parts_without_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_PART_CHARACTERS", 7)
    monkeypatch.setattr(datasets, "_ENCODE_CHARACTERS", 10)
    documents = [*DOCUMENTS, Document("c", "o" * 50), Document("d", "\n\nbe")]
    file = write_token_file(tmp_path / "t", documents, CHARACTER)
    text = "".join(d.text for d in documents)
    assert CHARACTER.decode(file.tokens) == text
    assert file.tokens.tolist().count(CHARACTER.end_of_text_id) == 4
    assert file.manifest["documents"] == 4
    assert file.text_bytes == len(text)


def test_nothing_is_left_behind_when_writing_fails(tmp_path):
    def failing():
        yield DOCUMENTS[0]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        write_token_file(tmp_path / "some.tokens", failing(), CHARACTER)
    for documents in ([], [Document("a", "")]):
        with pytest.raises(InputError, match="expects text"):
            write_token_file(tmp_path / "some.tokens", documents, CHARACTER)
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "PIECE_BYTES", 1 << 16)
    monkeypatch.setattr(datasets, "_ENCODE_CHARACTERS", 1 << 16)
    monkeypatch.setattr(datasets, "_PART_CHARACTERS", 1 << 14)
    line = "to be, or not to be, that is the question\n"
    tokenizer = CharacterTokenizer.train([line])
    peaks = []
    for lines in (20_000, 60_000):
        path = tmp_path / f"{lines}.txt"
        path.write_text(line * lines)
        corpus = open_corpus(path, validation_fraction=0.01)
        tracemalloc.start()
        write_token_file(tmp_path / "t", corpus.documents("train"), tokenizer)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[0] > 1 << 16  # or nothing was measured


# Damage


def with_bytes(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def with_manifest(**changes):
    def alter(path):
        manifest = path.with_name(path.name + ".json")
        content = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({**content, **changes}))

    return alter


@pytest.mark.parametrize(
    "damage",
    [
        with_bytes(lambda data: data[:-2]),
        with_bytes(lambda data: data + b"\0\0"),
        with_bytes(lambda data: data[:7] + bytes([data[7] ^ 1]) + data[8:]),
        lambda path: path.unlink(),
        lambda path: path.with_name(path.name + ".json").unlink(),
        lambda path: path.with_name(path.name + ".json").write_text("[]"),
        with_manifest(sha256="0" * 64),
        with_manifest(dtype="O"),
        with_manifest(dtype="<u4"),
        with_manifest(count=3),
        with_manifest(count="3"),
        with_manifest(kind="run"),
    ],
)
def test_damaged_token_files_are_refused(written, damage):
    TokenFile.open(written.path)
    damage(written.path)
    with pytest.raises(DamagedFileError, match=r"some\.tokens"):
        TokenFile.open(written.path)


def test_size_is_checked_even_without_verification(written):
    with_bytes(lambda data: data[:-1] + b"\1")(written.path)
    TokenFile.open(written.path, verify=False)
    with_bytes(lambda data: data[:-2])(written.path)
    with pytest.raises(DamagedFileError, match=r"some\.tokens"):
        TokenFile.open(written.path, verify=False)


def test_ids_beyond_a_vocabulary_are_refused(written):
    largest = int(written.tokens.max())
    written.check_fits(largest + 1)
    with pytest.raises(InputError, match=f"Received: {largest}"):
        written.check_fits(largest)


# Windows in order


@given(count=st.integers(2, 90), length=st.integers(1, 12), rows=st.integers(1, 5))
@quick
def test_every_target_is_measured_exactly_once(count, length, rows):
    if count < length + 1:
        return
    tokens = np.arange(1, count + 1)
    windows = Windows(tokens, length, rows, shuffle=False)
    seen = []
    for step in range(windows.steps_per_epoch):
        x, y, weights = windows.batch(step)
        assert x.shape == y.shape == weights.shape == (rows, length)
        assert (x.dtype, y.dtype, weights.dtype) == (np.int32, np.int32, np.float32)
        assert set(weights.ravel()) <= {0.0, 1.0}
        assert (x[weights == 0] == 0).all() and (y[weights == 0] == -100).all()
        assert (x[weights == 1] == y[weights == 1] - 1).all()
        seen += y[weights == 1].tolist()
    assert seen == tokens[1:].tolist()


# Shuffled windows


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1))
@quick
def test_the_permutation_is_a_bijection(size, seed):
    key = np.random.default_rng(seed).integers(0, 2**32, 5, np.uint32)
    image = permute(np.arange(size), size, key)
    np.testing.assert_array_equal(np.sort(image), np.arange(size))


@given(
    count=st.integers(2, 150),
    length=st.integers(1, 12),
    rows=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
@quick
def test_an_epoch_visits_windows_once_and_within_the_text(count, length, rows, epoch):
    if count < length + 1:
        return
    windows = Windows(np.arange(count), length, rows, seed=7)
    steps = windows.steps_per_epoch
    starts = []
    for x, y, weights in rows_of(windows, range(epoch * steps, (epoch + 1) * steps)):
        np.testing.assert_array_equal(x, np.arange(x[0], x[0] + length))
        np.testing.assert_array_equal(y, x + 1)
        assert y[-1] < count and (weights == 1).all()
        starts.append(int(x[0]))
    # All but the remainder of the last batch; a text of less than one comes again.
    assert len(starts) == rows * max(1, windows.num_windows // rows)
    assert len(set(starts)) == min(len(starts), windows.num_windows)
    assert not (np.diff(sorted(starts)) % length).any()


def test_epochs_and_seeds_differ_in_offset_and_order():
    def starts(seed, epoch):
        windows = Windows(np.arange(10_000), 8, 16, seed=seed)
        steps = windows.steps_per_epoch
        steps = range(epoch * steps, (epoch + 1) * steps)
        return [int(x[0]) for x, _, _ in rows_of(windows, steps)]

    runs = [starts(0, 0), starts(0, 1), starts(1, 0), starts(0, 2)]
    assert len({tuple(run) for run in runs}) == 4
    assert len({run[0] % 8 for run in runs}) > 1
    assert all(run != sorted(run) for run in runs)
    assert starts(0, 0) == runs[0]


def test_a_token_file_gives_the_windows_of_its_ids(written):
    ours = Windows(written, 5, 2, seed=3)
    assert ours.token_file is written
    theirs = Windows(np.array(written.tokens), 5, 2, seed=3)
    assert_same([ours.batch(4)], [theirs.batch(4)])


# Datasets


@pytest.fixture(params=["shuffled", "in order"])
def windows(request, monkeypatch):
    """Windows of 11 steps an epoch, loaded three steps at a time."""
    monkeypatch.setattr(datasets, "_CALL_TOKENS", 3 * 4 * 8)
    return Windows(np.arange(380), 8, 4, seed=5, shuffle=request.param == "shuffled")


def test_the_dataset_yields_the_batches_of_its_steps(windows):
    batches = as_numpy(windows.dataset(num_steps=25))
    assert_same(batches, [windows.batch(step) for step in range(25)])


@pytest.mark.parametrize("start", [1, 17])
def test_a_resumed_dataset_is_the_tail_of_an_uninterrupted_one(windows, start):
    whole = as_numpy(windows.dataset().take(25))
    resumed = as_numpy(windows.dataset(start_step=start).take(25 - start))
    assert_same(resumed, whole[start:])


def test_shards_make_up_the_global_batch(windows):
    shards = [
        as_numpy(windows.dataset(num_steps=13, num_shards=4, shard=shard))
        for shard in range(4)
    ]
    together = [
        tuple(np.concatenate(parts) for parts in zip(*batches, strict=True))
        for batches in zip(*shards, strict=True)
    ]
    assert_same(together, [windows.batch(step) for step in range(13)])


def test_shapes_are_static_and_lengths_are_known(windows):
    spec = windows.dataset(num_shards=2, shard=1).element_spec
    assert [tuple(tensor.shape) for tensor in spec] == [(2, 8)] * 3
    assert [tensor.dtype for tensor in spec] == [tf.int32, tf.int32, tf.float32]
    steps = windows.steps_per_epoch
    assert windows.dataset().cardinality() == tf.data.INFINITE_CARDINALITY
    for arguments, length in [
        ({"repeat": False}, steps),
        ({"repeat": False, "start_step": steps + 2}, steps - 2),
        ({"repeat": False, "num_steps": 5}, 5),
        ({"repeat": False, "num_steps": 500}, steps),
        ({"num_steps": 2 * steps}, 2 * steps),
    ]:
        dataset = windows.dataset(**arguments)
        assert dataset.cardinality() == length
        assert len(as_numpy(dataset)) == length


def test_mirrored_replicas_share_the_global_batch(windows):
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    dataset = windows.dataset(num_steps=12)
    distributed = strategy.experimental_distribute_dataset(dataset)
    batches = []
    for batch in distributed:
        parts = [strategy.experimental_local_results(value) for value in batch]
        assert [part.shape for part in parts[0]] == [(2, 8), (2, 8)]
        batches.append(tuple(np.concatenate(part) for part in parts))
    assert_same(batches, [windows.batch(step) for step in range(12)])


def test_the_dataset_is_not_sharded_again(windows):
    policy = windows.dataset().options().experimental_distribute.auto_shard_policy
    assert policy == tf.data.experimental.AutoShardPolicy.OFF


# Bad input


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_context_longer_than_the_text_is_refused(shuffle):
    Windows(np.arange(9), 8, 1, shuffle=shuffle).batch(0)
    with pytest.raises(InputError, match="longer than the text"):
        Windows(np.arange(8), 8, 1, shuffle=shuffle)


@pytest.mark.parametrize("tokens", [np.zeros((5, 5), int), np.zeros(50)])
def test_what_is_no_text_of_ids_is_refused(tokens):
    with pytest.raises(InputError, match="integer ids of shape"):
        Windows(tokens, 4, 2)
