"""Claims about a teacher's stored knowledge, and the windows that bring it."""

import contextlib
import json
import shutil

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

import gpt_tf
from gpt_tf import artifacts
from gpt_tf.distillation import teacher_cache
from gpt_tf.distillation import top_k as records
from gpt_tf.distillation.teacher_cache import (
    KnowledgeStore,
    KnowledgeWindows,
    extract,
    fingerprint_of,
    unfinished,
)
from gpt_tf.distillation.tokenizer_alignment import (
    VocabularyMap,
    align,
    derive_tokenizer,
)
from gpt_tf.errors import DamagedFileError, InputError, InputTypeError
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
    logits = model(tokens, training=False).numpy().astype(float)
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


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


def test_97_bytes_a_token_by_default(teacher, token_file, tmp_path):
    store = extract(teacher, token_file, tmp_path / "store", tokenizer=BPE)
    assert store.bytes_per_token == store.manifest["bytes_per_token"] == 97
    assert store.context_length == 16


@pytest.mark.parametrize("pass_index", [0, 1, 2])
def test_the_store_holds_what_the_teacher_computes(
    made, teacher, token_file, pass_index
):
    offset = made.manifest["offsets"][pass_index]
    p = direct(teacher, token_file.tokens, offset)
    assert len(p) % (4 * LENGTH)  # the last window is not full
    ids, codes = made.read(pass_index, np.arange(len(p)))
    assert (codes[:offset] == records.unknown(1, 5)[1]).all()
    expected = expected_codes(p[offset:], 5)
    assert np.abs(codes[offset:].astype(int) - expected).max() <= 1
    assert (codes[offset:] == expected).mean() > 0.99
    order = np.argsort(-p[offset:], axis=-1)[:, :5]
    assert (ids[offset:] == order).mean() > 0.999
    assert expected.std() > 20  # the teacher is not always equally sure


def test_another_teacher_would_have_said_something_else(made, token_file):
    p = direct(make_teacher(seed=1), token_file.tokens, 0)
    codes = made.read(0, np.arange(len(p)))[1]
    assert np.abs(codes.astype(int) - expected_codes(p, 5)).max() > 10


def test_all_probabilities_may_be_kept(teacher, token_file, tmp_path):
    store = extracted(teacher, token_file, tmp_path / "store", top_k=280)
    ids, codes = store.read(0, np.arange(50))
    assert (np.sort(ids, axis=-1) == np.arange(280)).all()
    assert (codes[:, -1] == 255).all()


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


@pytest.mark.parametrize("count", [LENGTH + 1, LENGTH + 4, 2 * LENGTH, 3 * LENGTH + 5])
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


@pytest.mark.parametrize("stop", [1, 9, 17, 30])
def test_an_interrupted_extraction_goes_on_to_the_same_bytes(
    made, teacher, token_file, tmp_path, monkeypatch, notices, stop
):
    monkeypatch.setattr(teacher_cache, "_PART_WINDOWS", 8)  # two batches
    path = tmp_path / "store"
    calls = []

    def interrupt(done, total):
        calls.append((done, total))
        if len(calls) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extracted(teacher, token_file, path, passes=3, on_progress=interrupt)
    assert not path.exists()
    with pytest.raises(DamagedFileError, match="interrupted"):
        KnowledgeStore.open(path)
    store = extracted(
        teacher, token_file, path, passes=3, on_progress=lambda *d: calls.append(d)
    )
    assert ("going on" in notices[-1]) == (stop > 2)
    assert bytes_of(path) == bytes_of(made.path)
    assert store.manifest == made.manifest
    assert sorted(file.name for file in tmp_path.iterdir()) == ["store"]
    # Only what was not yet saved is done again.
    saved = stop // 2 * 2
    assert len(calls[stop:]) == len(set(calls)) - saved
    assert calls[-1][0] == calls[-1][1] == calls[0][1]


def test_another_teacher_starts_anew(
    teacher, token_file, tmp_path, monkeypatch, notices
):
    monkeypatch.setattr(teacher_cache, "_PART_WINDOWS", 4)

    def interrupt(done, total):
        if done > 8:
            raise KeyboardInterrupt

    for options in ({"on_progress": interrupt}, {}):
        model = teacher if options else make_teacher(seed=1)
        with contextlib.suppress(KeyboardInterrupt):
            store = extracted(model, token_file, tmp_path / "store", **options)
    assert "starts anew" in notices[-1]
    p = direct(model, token_file.tokens, 0)
    codes = store.read(0, np.arange(len(p)))[1].astype(int)
    assert np.abs(codes - expected_codes(p, 5)).max() <= 1


def test_the_size_is_told_before_it_is_written(teacher, token_file, tmp_path, notices):
    extracted(teacher, token_file, tmp_path / "store")
    assert notices == ["16 bytes a token, 0.0 MB in all"]


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


DAMAGES = [
    (lambda path: flip(path / "ids.bin"), "SHA-256", False),
    (lambda path: flip(path / "codes.bin"), "SHA-256", False),
    (lambda path: (path / "ids.bin").write_bytes(b"123"), "truncated", True),
    (lambda path: (path / "codes.bin").unlink(), r"lacks its file codes\.bin", True),
    (lambda path: change(path / "manifest.json", top_k=4), "was altered", True),
    (lambda path: (path / "manifest.json").unlink(), "none is there", True),
    (lambda path: shutil.rmtree(path), "none is there", True),
]


@pytest.mark.parametrize(("damage", "message", "at_once"), DAMAGES)
def test_damaged_stores_are_refused(store, damage, message, at_once):
    damage(store.path)
    with pytest.raises(DamagedFileError, match=message):
        KnowledgeStore.open(store.path)
    if at_once:
        with pytest.raises(DamagedFileError, match=message):
            KnowledgeStore.open(store.path, verify=False)
    else:
        KnowledgeStore.open(store.path, verify=False)


@pytest.mark.parametrize(
    "facts",
    [
        {"count": 9},
        {"offsets": [0]},
        {"offsets": [0, 10**12]},
        {"offsets": [0, 0.5]},
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


def test_a_store_fits_what_it_was_made_from(made, teacher, token_file):
    made.check_fits(
        token_file=token_file, tokenizer=BPE, teacher=teacher, context_length=LENGTH
    )
    made.check_fits(token_file=token_file, tokenizer=BPE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": DERIVED}, "another tokenizer"),
        ({"token_file": "shorter"}, "another text"),
        ({"token_file": np.arange(100)}, "TokenFile"),
        ({"teacher": "other"}, "another teacher"),
        ({"context_length": 16}, "context_length=16"),
        ({"context_length": 8}, "windows of 12 tokens"),
    ],
)
def test_a_store_of_something_else_is_refused(
    made, token_file, tmp_path, change, message
):
    arguments = {"token_file": token_file, "tokenizer": BPE, **change}
    if change.get("teacher"):
        arguments["teacher"] = make_teacher(seed=1)
    if isinstance(arguments["token_file"], str):
        file = write_token_file(tmp_path / "shorter", DOCUMENTS[:-1], BPE)
        arguments["token_file"] = file
        with pytest.raises(InputError, match=message):
            made.windows(file, 4)
    with pytest.raises(InputError, match=message):
        made.check_fits(**arguments)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_length": 17}, "from 1 to 16"),
        ({"top_k": 281}, "at most 280"),
        ({"top_k": 0}, "`top_k` expects"),
        ({"passes": 0}, "`passes` expects"),
        ({"seed": -1}, "`seed` expects"),
        ({"tokenizer": DERIVED}, "tokenizer that it was written with"),
        ({"student": (DERIVED, "same")}, "tokenizer that it was written with"),
    ],
)
def test_what_cannot_be_extracted_is_refused(
    teacher, token_file, tmp_path, options, message
):
    if "student" in options:
        options = {"student": (DERIVED, token_file)}
    with pytest.raises(InputError, match=message):
        extracted(teacher, token_file, tmp_path / "store", **options)
    assert not list(tmp_path.iterdir())


def test_models_and_texts_that_do_not_belong_together_are_refused(
    teacher, token_file, tmp_path
):
    with pytest.raises(InputError, match="at most the teacher's 31 tokens"):
        extracted(make_teacher(vocab_size=31), token_file, tmp_path / "store")
    with pytest.raises(InputTypeError, match="expects a GPTModel"):
        extracted(lambda tokens: tokens, token_file, tmp_path / "store")
    with pytest.raises(InputTypeError, match="TokenFile"):
        extracted(teacher, np.arange(100), tmp_path / "store")
    other = write_token_file(tmp_path / "other", DOCUMENTS[:-1], BPE)
    with pytest.raises(InputError, match="other tokens"):
        extracted(teacher, token_file, tmp_path / "store", student=(BPE, other))
    broken = make_teacher()
    broken.set_weights([w * np.nan for w in broken.get_weights()])
    with pytest.raises(InputError, match="NaN"):
        extracted(broken, token_file, tmp_path / "store")
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


def test_the_dataset_is_ready_for_fit(made, token_file):
    spec = made.windows(token_file, 4).dataset(num_shards=2, shard=1).element_spec
    inputs, labels, weights = spec
    assert {name: (s.shape, s.dtype) for name, s in inputs.items()} == {
        "tokens": ((2, 12), tf.int32),
        "teacher_ids": ((2, 12, 5), tf.int32),
        "teacher_log_probs": ((2, 12, 6), tf.float32),
    }
    assert labels.dtype == tf.int32 and labels.shape == (2, 12)
    assert weights.dtype == tf.float32 and weights.shape == (2, 12)


@pytest.mark.parametrize("start", [0, 5])
def test_the_dataset_yields_its_steps_and_shards(made, token_file, monkeypatch, start):
    monkeypatch.setattr(datasets, "_CALL_TOKENS", 3 * 4 * LENGTH)
    windows = made.windows(token_file, 4, seed=3)
    assert isinstance(windows, KnowledgeWindows)
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


def test_order_and_seed_are_those_of_plain_windows(made, token_file):
    plain = Windows(token_file, LENGTH, 4, seed=9)
    ours = made.windows(token_file, 4, seed=9)
    assert ours.steps_per_epoch == plain.steps_per_epoch
    one, two = (made.windows(token_file, 4, seed=s).batch(0)[0] for s in (9, 10))
    assert (one["tokens"] != two["tokens"]).any()


# Students with other tokenizers


def store_for(student, teacher, token_file, path, **options):
    own = write_token_file(path / "own", DOCUMENTS, student)
    options = {"student": (student, own), "passes": 2, **options}
    store = extracted(teacher, token_file, path / "store", **options)
    return store, own, align(token_file.tokens, own.tokens, BPE, student)


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
        known, _ = vocabulary_map.to_student(p[index[~silent]], nodes[~silent])
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


@pytest.mark.parametrize("student", [OTHER, CHARACTER], ids=["bpe", "character"])
def test_any_other_student_gets_sorted_probabilities(
    teacher, token_file, tmp_path, student
):
    store, own, alignment = store_for(student, teacher, token_file, tmp_path)
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


@pytest.mark.parametrize("student", [DERIVED, OTHER], ids=["derived", "sorted"])
def test_they_go_on_after_an_interruption_too(
    teacher, token_file, tmp_path, monkeypatch, student
):
    monkeypatch.setattr(teacher_cache, "_PART_WINDOWS", 8)

    def interrupt(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    own = write_token_file(tmp_path / "own", DOCUMENTS, student)
    options = {"student": (student, own), "passes": 2}
    whole = extracted(teacher, token_file, tmp_path / "whole", **options)
    path = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        extracted(teacher, token_file, path, on_progress=interrupt, **options)
    extracted(teacher, token_file, path, **options)
    assert bytes_of(path) == bytes_of(whole.path)


def test_other_words_for_the_student_are_refused(teacher, token_file, tmp_path):
    own = write_token_file(tmp_path / "own", DOCUMENTS[1:], DERIVED)
    with pytest.raises(InputError, match="same text"):
        extracted(teacher, token_file, tmp_path / "store", student=(DERIVED, own))


def test_the_same_tokenizer_twice_is_no_mapping(made, teacher, token_file, tmp_path):
    options = {"passes": 3, "student": (BPE, token_file)}
    store = extracted(teacher, token_file, tmp_path / "store", **options)
    assert bytes_of(store.path) == bytes_of(made.path)


# Filled over several sittings

SIZES = {"squares": 8, "names": 3}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder"


def fill(path, *, stop=20, fail_at=None, every=4, power=2, **options):
    """Write two records a step, and count them every few steps."""
    with unfinished(path, {"power": power}, SIZES, **options) as folder:
        begun = folder.steps
        for step in range(begun, stop):
            values = np.array([2 * step, 2 * step + 1])
            names = np.stack([values.astype("u1")] * 3, axis=1)
            folder.write(squares=values**2, names=names)
            if step == fail_at:
                raise KeyboardInterrupt
            if (step + 1) % every == 0:
                folder.save(step + 1)
    return begun


def interrupted(path, fail_at, **options):
    with pytest.raises(KeyboardInterrupt):
        fill(path, fail_at=fail_at, **options)


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("fail_at", [0, 3, 4, 5, 18, 19])
def test_an_interrupted_folder_goes_on_to_the_same_bytes(
    tmp_path, path, notices, fail_at
):
    fill(tmp_path / "whole")
    interrupted(path, fail_at)
    assert not path.exists()
    begun = fill(path)
    assert begun == fail_at // 4 * 4
    assert not begun or f"after {2 * begun} records" in notices[0]
    assert len(notices) == (begun > 0)
    assert content(path) == content(tmp_path / "whole")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "whole"]
    assert artifacts.check_manifest(path, "knowledge")["power"] == 2
    values = np.fromfile(path / "squares", np.int64)
    np.testing.assert_array_equal(values, np.arange(40) ** 2)


def test_it_may_be_interrupted_again_and_again(path):
    for fail_at in (5, 6, 11, 17):
        interrupted(path, fail_at)
    assert fill(path) == 16
    values = np.fromfile(path / "squares", np.int64)
    np.testing.assert_array_equal(values, np.arange(40) ** 2)


def test_other_facts_start_anew(path, notices):
    interrupted(path, 9)
    assert fill(path, power=2.5) == 0
    assert "starts anew" in notices[0]
    assert len(np.fromfile(path / "squares", np.int64)) == 40


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_file_starts_anew(path, notices, damage):
    interrupted(path, 9)
    file = artifacts.partial_path(path) / "new" / "folder" / "names"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:47])
    assert fill(path) == 0
    assert "lacks" in notices[0]
    assert (path / "names").stat().st_size == 40 * 3


def test_what_it_was_begun_with_does_not_come_along(path):
    interrupted(path, 9)
    with unfinished(path, {}, {"cubes": 8}) as folder:
        folder.write(cubes=np.arange(3))
    assert content(path).keys() == {"cubes", "manifest.json"}


@pytest.mark.parametrize("progress", [None, "", "[1]", '{"steps": 3}'])
def test_a_folder_killed_in_its_first_write_is_begun_anew(tmp_path, path, progress):
    fill(tmp_path / "whole")
    interrupted(path, 2)
    if progress is not None:
        (artifacts.partial_path(path) / "progress.json").write_text(progress)
    assert fill(path) == 0
    assert content(path) == content(tmp_path / "whole")


@pytest.mark.parametrize("link", ["soft", "hard"])
def test_links_among_what_was_begun_are_not_followed(tmp_path, path, link):
    """Such a folder may come from an archive of somebody else's."""
    mine = tmp_path / "thesis"
    mine.write_text("precious")
    interrupted(path, 9)
    planted = artifacts.partial_path(path) / "new" / "folder" / "names"
    planted.unlink()
    planted.symlink_to(mine) if link == "soft" else planted.hardlink_to(mine)
    fill(path)
    assert mine.read_text() == "precious"
    assert len(np.fromfile(path / "squares", np.int64)) == 40


def test_two_cannot_fill_one_folder(path):
    with (
        unfinished(path, {}, SIZES),
        pytest.raises(InputError, match="in use by another process"),
        unfinished(path, {}, SIZES),
    ):
        pytest.fail("two filled it")


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


def test_an_old_folder_stands_until_the_new_one_is_whole(path):
    fill(path)
    before = content(path)
    interrupted(path, 9, stop=10, overwrite=True)
    assert content(path) == before
    assert fill(path, stop=8, overwrite=True) == 8
    assert (path / "squares").stat().st_size == 16 * 8
    assert not artifacts.partial_path(path).exists()
