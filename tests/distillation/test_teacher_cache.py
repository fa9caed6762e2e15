"""Claims about a teacher's stored knowledge, and the windows that bring it."""

import json
import shutil

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from scipy.special import softmax

import gpt_tf
from gpt_tf import artifacts
from gpt_tf.distillation import teacher_cache
from gpt_tf.distillation import top_k as records
from gpt_tf.distillation.teacher_cache import (
    KnowledgeStore,
    extract,
    fill,
    fingerprint_of,
)
from gpt_tf.distillation.tokenizer_alignment import (
    VocabularyMap,
    align,
    derive_tokenizer,
)
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.quantization.qat import quantize_aware
from gpt_tf.text import dataset as datasets
from gpt_tf.text.corpus import Document
from gpt_tf.text.dataset import Windows, write_token_file
from gpt_tf.text.tokenizer import BPETokenizer, CharacterTokenizer

SENTENCE = "low lower lowest, the newest and the widest; slowly we knew that. "
DOCUMENTS = [
    Document(str(index), " ".join(np.random.default_rng(index).permutation(words)))
    for index, words in enumerate([SENTENCE.split() * 4] * 5)
]
BPE = BPETokenizer.train([d.text for d in DOCUMENTS], 280)
DERIVED = derive_tokenizer(BPE, 264)
OTHER = BPETokenizer.train(["wide west, new towel, slow lowland, there " * 20], 270)
CHARACTER = CharacterTokenizer.train(d.text for d in DOCUMENTS)
LENGTH = 12


def make_teacher(seed=0, **changes):
    keras.utils.set_random_seed(seed)
    sizes = {"vocab_size": 280, "embedding_dim": 12, "num_layers": 1, "num_heads": 2}
    model = gpt_tf.GPTModel(**{**sizes, "context_length": 16, **changes})
    # Sure enough of itself that probabilities differ from place to place.
    model.set_weights([20 * w if w.ndim > 1 else w for w in model.get_weights()])
    return model


def softmax_of(model, tokens):
    return softmax(model(tokens, training=False).numpy().astype(float), axis=-1)


def direct(model, tokens, offset, length=LENGTH, vocab_size=280):
    """Return the model's probabilities at each position, window by window, or NaN."""
    tokens = np.array(tokens[:-1], np.int32)
    p = np.full((len(tokens), vocab_size), np.nan)
    last = len(tokens) - (len(tokens) - offset) % length
    for start, stop, width in (
        (offset, last, length),
        (last, len(tokens), len(tokens) - last),
    ):
        if start < stop:
            found = softmax_of(model, tokens[start:stop].reshape(-1, width))
            p[start:stop] = found.reshape(stop - start, -1)[:, :vocab_size]
    return p / p.sum(axis=-1, keepdims=True)


def expected_codes(p, k):
    largest = -np.sort(-p, axis=-1)
    rest = largest[..., k:].sum(axis=-1, keepdims=True)
    return records.codes_of(np.concatenate([largest[..., :k], rest], axis=-1))


def bytes_of(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module", autouse=True)
def compile_once():
    """Let extractions that differ in nothing else share what XLA compiled."""
    compiled, compile_anew = {}, teacher_cache._compiled

    def look_up(teacher, mapping, *shape):
        key = (id(teacher), mapping.name, mapping.top_k, *shape)
        if key not in compiled:
            compiled[key] = teacher, compile_anew(teacher, mapping, *shape)
        return compiled[key][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_cache, "_compiled", look_up)
        yield


@pytest.fixture(scope="module")
def teacher():
    return make_teacher()


@pytest.fixture(scope="module")
def token_file(tmp_path_factory):
    return write_token_file(tmp_path_factory.mktemp("text") / "bpe", DOCUMENTS, BPE)


@pytest.fixture(scope="module")
def made(teacher, token_file, tmp_path_factory):
    """A store that no test changes."""
    path = tmp_path_factory.mktemp("knowledge") / "store"
    return extracted(teacher, token_file, path, passes=3)


@pytest.fixture
def store(made, tmp_path):
    shutil.copytree(made.path, tmp_path / "store")
    return KnowledgeStore.open(tmp_path / "store")


def extracted(teacher, token_file, path, **options):
    options = {"tokenizer": BPE, "context_length": LENGTH, "top_k": 5, **options}
    return extract(teacher, token_file, path, batch_size=4, **options)


# What is extracted


def test_the_store_says_what_it_is(made, teacher, token_file):
    assert (made.top_k, made.passes, made.mapping) == (5, 3, "same")
    assert made.context_length == LENGTH
    assert made.bytes_per_token == 5 * 2 + 6
    assert made.size_bytes == 3 * (token_file.count - 1) * 16
    assert made.size_bytes == sum(f.stat().st_size for f in made.path.glob("*.bin"))
    assert made.manifest["vocab_size"] == 280
    assert made.manifest["count"] == token_file.count
    assert made.manifest["teacher_fingerprint"] == fingerprint_of(teacher)
    assert len(set(made.manifest["offsets"])) == 3
    assert made.manifest["offsets"][0] == 0


def test_the_store_holds_what_the_teacher_computes(made, teacher, token_file):
    for pass_index, offset in enumerate(made.manifest["offsets"]):
        p = direct(teacher, token_file.tokens, offset)
        assert len(p) % (4 * LENGTH)  # the last window is not full
        ids, codes = made.read(pass_index, np.arange(len(p)))
        assert (codes[:offset] == records.unknown(1, 5)[1]).all()
        expected = expected_codes(p[offset:], 5)
        assert np.abs(codes[offset:].astype(int) - expected).max() <= 1
        assert (codes[offset:] == expected).mean() > 0.99
        order = np.argsort(-p[offset:], axis=-1)[:, :5]
        assert (ids[offset:] == order).mean() > 0.999
    other = expected_codes(direct(make_teacher(seed=1), token_file.tokens, 0), 5)
    assert np.abs(made.read(0, np.arange(len(p)))[1] - other.astype(int)).max() > 10


def test_large_vocabularies_take_four_bytes_an_id(tmp_path):
    file = write_token_file(tmp_path / "short", [Document("", SENTENCE)], BPE)
    teacher = make_teacher(vocab_size=(1 << 16) + 1, embedding_dim=2)
    store = extracted(teacher, file, tmp_path / "store")
    assert store.bytes_per_token == 5 * 4 + 6
    p = direct(teacher, file.tokens[: LENGTH + 1], 0, vocab_size=(1 << 16) + 1)
    ids = store.read(0, np.arange(LENGTH))[0]
    assert ids.dtype == np.int32
    assert (ids[:, 0] == p.argmax(axis=-1)).mean() > 0.9


def test_a_quantised_teacher_teaches_what_it_computes(teacher, token_file, tmp_path):
    quantised = quantize_aware(teacher, {"weight_bits": 4})
    quantised.calibrate(Windows(token_file, LENGTH, 4).batch(0)[0])
    store = extracted(quantised, token_file, tmp_path / "store")
    for model, same in ((quantised, True), (teacher, False)):
        p = direct(model, token_file.tokens, 0)
        codes = store.read(0, np.arange(len(p)))[1].astype(int)
        assert ((codes == expected_codes(p, 5)).mean() > 0.97) == same


def test_more_passes_begin_with_the_same_ones(made, teacher, tmp_path):
    file = write_token_file(tmp_path / "short", DOCUMENTS[:1], BPE)
    more = extracted(teacher, file, tmp_path / "store", passes=20)
    offsets = more.manifest["offsets"]
    assert offsets[:3] == made.manifest["offsets"]
    assert set(offsets) == set(range(LENGTH))
    other = extracted(teacher, file, tmp_path / "other", passes=20, seed=1)
    assert other.manifest["offsets"] != offsets


@pytest.mark.parametrize("count", [LENGTH + 1, 3 * LENGTH + 5])
def test_windows_of_short_texts_lie_within_the_text(teacher, tmp_path, count):
    text = BPE.decode(BPE.encode(DOCUMENTS[0].text)[: count - 1])
    file = write_token_file(tmp_path / "short", [Document("", text)], BPE)
    assert file.count == count
    store = extracted(teacher, file, tmp_path / "store", passes=LENGTH)
    windows = store.windows(file, 1)
    for epoch in range(LENGTH):
        for step in range(windows.steps_per_epoch):
            inputs, _, _ = windows.batch(epoch * windows.steps_per_epoch + step)
            assert (inputs["teacher_log_probs"][..., :-1].max(axis=-1) > -20).all()


# Interruption


@pytest.mark.parametrize(
    ("student", "stop"),
    [(BPE, 9), (BPE, 30), (DERIVED, 30), (OTHER, 30)],
    ids=["same", "same, late", "derived", "sorted"],
)
def test_an_interrupted_extraction_goes_on_to_the_same_bytes(
    teacher, token_file, tmp_path, monkeypatch, notices, student, stop
):
    monkeypatch.setattr(teacher_cache, "_PART_WINDOWS", 8)  # two batches
    path, calls = tmp_path / "store", []

    def note(done, total):
        calls.append((done, total))
        if len(calls) == stop:
            raise KeyboardInterrupt

    own = write_token_file(tmp_path / "own", DOCUMENTS, student)
    options = {"student": (student, own), "passes": 3}
    whole = extracted(teacher, token_file, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        extracted(teacher, token_file, path, on_progress=note, **options)
    assert not path.exists()
    with pytest.raises(DamagedFileError, match="interrupted"):
        KnowledgeStore.open(path)
    store = extracted(teacher, token_file, path, on_progress=note, **options)
    assert "going on" in notices[-1]
    assert bytes_of(path) == bytes_of(whole.path)
    assert store.manifest == whole.manifest
    assert not artifacts.partial_path(path).exists()
    # Only what was not yet saved is done again.
    saved = stop // 2 * 2
    assert len(calls[stop:]) == len(set(calls)) - saved
    assert calls[-1][0] == calls[-1][1] == calls[0][1]


def test_a_store_gives_way_only_if_told_and_only_to_a_whole_one(
    store, token_file, made
):
    def fail(done, total):
        raise RuntimeError

    other = make_teacher(seed=1)
    with pytest.raises(InputError, match="something stands there"):
        extracted(other, token_file, store.path)
    with pytest.raises(RuntimeError):
        extracted(other, token_file, store.path, overwrite=True, on_progress=fail)
    assert bytes_of(store.path) == bytes_of(made.path)
    new = extracted(other, token_file, store.path, overwrite=True)
    assert new.manifest["teacher_fingerprint"] == fingerprint_of(other)
    assert KnowledgeStore.open(store.path).passes == 1


# Damage


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def change(file, **facts):
    file.write_text(json.dumps({**json.loads(file.read_text()), **facts}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: flip(path / "codes.bin"), "SHA-256"),
        (lambda path: (path / "ids.bin").write_bytes(b"123"), "truncated"),
        (lambda path: (path / "codes.bin").unlink(), r"lacks its file codes\.bin"),
        (lambda path: change(path / "manifest.json", top_k=4), "was altered"),
        (lambda path: shutil.rmtree(path), "none is there"),
    ],
)
def test_damaged_stores_are_refused(store, damage, message):
    damage(store.path)
    with pytest.raises(DamagedFileError, match=message):
        KnowledgeStore.open(store.path)


@pytest.mark.parametrize(
    "facts",
    [
        {"count": 9},
        {"offsets": [0]},
        {"offsets": [0, 10**12, 1]},
        {"context_length": "8"},
        {"mapping": "sorted"},
        {"tokens_sha256": None},
    ],
)
def test_a_manifest_of_another_version_is_refused(store, facts):
    path = store.path / "manifest.json"
    change(path, **facts)
    names = ["ids.bin", "codes.bin"]
    manifest = json.loads(path.read_text())
    kept = {k: v for k, v in manifest.items() if k not in ("kind", "versions")}
    del kept["files"], kept["sha256"]
    gpt_tf.artifacts.write_manifest(store.path, "knowledge", names, **kept)
    with pytest.raises(DamagedFileError, match=r"of (this|another) version"):
        KnowledgeStore.open(store.path)


# What it fits


def test_a_store_of_something_else_is_refused(made, teacher, token_file, tmp_path):
    right = {"token_file": token_file, "tokenizer": BPE, "teacher": teacher}
    made.check_fits(**right, context_length=LENGTH)
    file = write_token_file(tmp_path / "shorter", DOCUMENTS[:-1], BPE)
    for change, message in (
        ({"tokenizer": DERIVED}, "another tokenizer"),
        ({"token_file": file}, "another text"),
        ({"token_file": np.arange(100)}, "TokenFile"),
        ({"teacher": make_teacher(seed=1)}, "another teacher"),
        ({"context_length": 8}, "windows of 12 tokens"),
    ):
        with pytest.raises(InputError, match=message):
            made.check_fits(**{**right, **change})
    with pytest.raises(InputError, match="another text"):
        made.windows(file, 4)


def test_fingerprints_tell_models_apart(teacher):
    assert fingerprint_of(teacher) == fingerprint_of(make_teacher(name="other"))
    assert fingerprint_of(teacher) != fingerprint_of(make_teacher(seed=1))
    changed = make_teacher(layer_norm_epsilon=1e-6)
    assert fingerprint_of(teacher) != fingerprint_of(changed)
    weights = teacher.get_weights()
    weights[-1].flat[0] = np.nextafter(weights[-1].flat[0], 1, dtype=np.float32)
    changed = make_teacher()
    changed.set_weights(weights)
    assert fingerprint_of(teacher) != fingerprint_of(changed)


def test_what_cannot_be_extracted_is_refused(teacher, token_file, tmp_path):
    file = write_token_file(tmp_path / "file", DOCUMENTS[:-1], BPE)
    own = write_token_file(tmp_path / "own", DOCUMENTS[1:], DERIVED)
    broken = make_teacher()
    broken.set_weights([w * np.nan for w in broken.get_weights()])
    for changes, message in (
        ({"top_k": 281}, "at most 280"),
        ({"tokenizer": DERIVED}, "tokenizer that it was written with"),
        ({"student": (DERIVED, token_file)}, "tokenizer that it was written with"),
        ({"student": (DERIVED, own)}, "same text"),
        ({"student": (BPE, file)}, "other tokens"),
        ({"token_file": np.arange(100)}, "TokenFile"),
        ({"teacher": make_teacher(vocab_size=31)}, "at most the teacher's 31 tokens"),
        ({"teacher": lambda tokens: tokens}, "expects a GPTModel"),
        ({"teacher": broken}, "NaN"),
    ):
        options = {"teacher": teacher, "token_file": token_file, **changes}
        with pytest.raises(InputError, match=message):
            extracted(path=tmp_path / "store", **options)
        assert not (tmp_path / "store").exists()


# Windows


def test_windows_bring_what_the_teacher_says_of_these_very_windows(
    made, teacher, token_file
):
    windows = made.windows(token_file, 4, seed=3)
    per_epoch = windows.steps_per_epoch
    firsts = set()
    for step in (0, 3, per_epoch, per_epoch + 1, 2 * per_epoch, 3 * per_epoch):
        inputs, labels, weights = windows.batch(step)
        assert (weights == 1).all()
        p = softmax_of(teacher, inputs["tokens"])
        ids, log_probs = inputs["teacher_ids"], inputs["teacher_log_probs"]
        assert (ids == np.argsort(-p, axis=-1)[..., :5]).mean() > 0.99
        expected = np.log(np.take_along_axis(p, ids, -1))
        near = expected > -12
        assert near.mean() > 0.5
        error = np.abs(log_probs[..., :-1] - expected)[near]
        assert (error < 0.02 + np.sqrt(-expected[near]) / 64).all()
        np.testing.assert_array_equal(inputs["tokens"][:, 1:], labels[:, :-1])
        firsts.add(int(np.flatnonzero(_is_at(token_file, inputs["tokens"][0]))[0]) % 12)
    assert firsts == set(made.manifest["offsets"])


def _is_at(token_file, window):
    every = np.lib.stride_tricks.sliding_window_view(token_file.tokens, len(window))
    return (every == window).all(axis=-1)


def test_the_dataset_yields_its_steps_and_shards(made, token_file, monkeypatch):
    monkeypatch.setattr(datasets, "_CALL_TOKENS", 3 * 4 * LENGTH)
    windows, start = made.windows(token_file, 4, seed=3), 5
    steps = start + 2 * windows.steps_per_epoch
    shards = [
        windows.dataset(start_step=start, num_steps=steps, num_shards=2, shard=shard)
        for shard in range(2)
    ]
    parts = zip(*(shard.as_numpy_iterator() for shard in shards), strict=True)
    count = 0
    for step, part in enumerate(parts, start):
        found = tf.nest.map_structure(lambda *a: np.concatenate(a), *part)
        expected = windows.batch(step)
        tf.nest.map_structure(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected
        )
        count += 1
    assert count == steps


# Students with other tokenizers


def store_for(student, teacher, token_file, path, **options):
    own = write_token_file(path / "own", DOCUMENTS, student)
    options = {"student": (student, own), "passes": 2, **options}
    store = extracted(teacher, token_file, path / "store", **options)
    return store, own, align(token_file.tokens, own.tokens, BPE, student)


def shares_of(vocabulary_map, rows, nodes):
    """Return the probabilities of all student tokens."""
    ids, values, _ = vocabulary_map.top_k(rows, np.arange(len(rows)), nodes, 264)
    known = np.zeros(ids.shape)
    np.put_along_axis(known, ids, values, axis=1)
    return known


def test_a_derived_student_gets_the_probabilities_of_its_own_tokens(
    token_file, tmp_path
):
    teacher = make_teacher(vocab_size=288)  # padded
    store, own, alignment = store_for(DERIVED, teacher, token_file, tmp_path)
    assert store.mapping == "derived"
    assert store.manifest["vocab_size"] == 264
    assert store.manifest["count"] == own.count
    store.check_fits(token_file=own, tokenizer=DERIVED, teacher=teacher)
    vocabulary_map = VocabularyMap(BPE, DERIVED)
    nodes = vocabulary_map.nodes_for(own.tokens, alignment)[:-1]
    index = alignment.teacher_index[:-1]
    for pass_index, offset in enumerate(store.manifest["offsets"]):
        p = direct(teacher, token_file.tokens, offset)
        ids, codes = store.read(pass_index, np.arange(own.count - 1))
        silent = index < offset
        assert silent.any() or not offset
        assert (codes[silent] == records.unknown(1, 5)[1]).all()
        known = shares_of(vocabulary_map, p[index[~silent]], nodes[~silent])
        expected = expected_codes(known, 5)
        told = codes[~silent].astype(int)
        # Beyond the last code, one is as good as none.
        assert np.abs(np.minimum(told, 245) - np.minimum(expected, 245)).max() <= 1
        best = np.take_along_axis(known, ids[~silent].astype(int), -1)[:, 0]
        np.testing.assert_allclose(best, known.max(axis=-1), rtol=1e-3)


def test_windows_of_a_derived_student_are_cut_anywhere(teacher, token_file, tmp_path):
    store, own, _ = store_for(DERIVED, teacher, token_file, tmp_path)
    store.check_fits(token_file=own, tokenizer=DERIVED, context_length=7)
    windows = store.windows(own, 4, context_length=7, seed=1)
    plain = Windows(own, 7, 4, seed=1)
    for step in (0, windows.steps_per_epoch):
        inputs, labels, _ = windows.batch(step)
        np.testing.assert_array_equal(inputs["tokens"], plain.batch(step)[0])
        np.testing.assert_array_equal(labels, plain.batch(step)[1])
        assert inputs["teacher_ids"].shape == (4, 7, 5)
        window = np.concatenate([inputs["tokens"][0], labels[0, -1:]])
        start = np.flatnonzero(_is_at(own, window))
        ids, codes = store.read(int(step > 0), start[0] + np.arange(7))
        if len(start) == 1:
            np.testing.assert_array_equal(inputs["teacher_ids"][0], ids)
            found = records.log_probabilities_of(codes)
            np.testing.assert_allclose(inputs["teacher_log_probs"][0], found, rtol=1e-5)


def test_any_other_student_gets_sorted_probabilities(teacher, token_file, tmp_path):
    store, own, alignment = store_for(CHARACTER, teacher, token_file, tmp_path)
    assert store.mapping == "sorted"
    assert store.bytes_per_token == 6
    assert not (store.path / "ids.bin").exists()
    for pass_index, offset in enumerate(store.manifest["offsets"]):
        p = direct(teacher, token_file.tokens, offset)
        ids, codes = store.read(pass_index, np.arange(own.count - 1))
        assert ids.shape == (own.count - 1, 5) and (ids == np.arange(5)).all()
        told = alignment.at_boundary & (alignment.teacher_index >= offset)
        told = told[:-1]
        assert (codes[~told] == records.unknown(1, 5)[1]).all()
        expected = expected_codes(p[alignment.teacher_index[:-1][told]], 5)
        assert np.abs(codes[told].astype(int) - expected).max() <= 1
    inputs, _, _ = store.windows(own, 4).batch(0)
    assert set(inputs) == {"tokens", "teacher_log_probs"}
    spec = store.windows(own, 4, context_length=9).dataset().element_spec[0]
    assert spec["teacher_log_probs"].shape == (4, 9, 6)


# Filled over several sittings

SIZES = {"squares": 8, "names": 3}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder"


def fill_folder(path, fail_at=None, power=2):
    """Write two records a step, and count them every four; return where it began."""
    made = []

    def make(step):
        made.append(step)
        values = np.array([2 * step, 2 * step + 1])
        return {"squares": values**2, "names": np.stack([values.astype("u1")] * 3, 1)}

    def tell(steps):
        if steps - 1 == fail_at:
            raise KeyboardInterrupt

    fill(path, {"power": power}, SIZES, 20, make, every=4, tell=tell)
    return made[0]


def interrupted(path, fail_at):
    with pytest.raises(KeyboardInterrupt):
        fill_folder(path, fail_at)


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_file_starts_anew(path, notices, damage):
    interrupted(path, 9)
    file = artifacts.partial_path(path) / "new" / "folder" / "names"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:47])
    assert fill_folder(path) == 0
    assert "lacks" in notices[0]
    assert (path / "names").stat().st_size == 40 * 3


def test_what_it_was_begun_with_does_not_come_along(path):
    interrupted(path, 9)
    fill(path, {}, {"cubes": 8}, 1, lambda step: {"cubes": np.arange(3)}, every=1)
    assert bytes_of(path).keys() == {"cubes", "manifest.json"}


@pytest.mark.parametrize("progress", [None, "", '{"steps": 3}'])
def test_a_folder_killed_in_its_first_write_is_begun_anew(tmp_path, path, progress):
    fill_folder(tmp_path / "whole")
    interrupted(path, 2)
    if progress is not None:
        (artifacts.partial_path(path) / "progress.json").write_text(progress)
    assert fill_folder(path) == 0
    assert bytes_of(path) == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("link", ["soft", "hard"])
def test_links_among_what_was_begun_are_not_followed(tmp_path, path, link):
    """Such a folder may come from an archive of somebody else's."""
    mine = tmp_path / "thesis"
    mine.write_text("precious")
    interrupted(path, 9)
    planted = artifacts.partial_path(path) / "new" / "folder" / "names"
    planted.unlink()
    planted.symlink_to(mine) if link == "soft" else planted.hardlink_to(mine)
    fill_folder(path)
    assert mine.read_text() == "precious"
    assert len(np.fromfile(path / "squares", np.int64)) == 40


@pytest.mark.parametrize("stranger", ["file", "folder", "json"])
def test_strangers_are_never_overwritten(path, stranger):
    if stranger == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        name = "manifest.json" if stranger == "json" else "notes"
        (path / name).write_text("[1]")
    with pytest.raises(InputError, match="did not write"):
        teacher_cache._check_place(path, True)
