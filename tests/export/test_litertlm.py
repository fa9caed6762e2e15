import errno
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpt_tf
from gpt_tf import artifacts
from gpt_tf.errors import InputError, InputTypeError
from gpt_tf.export import integrity, operations, signatures
from gpt_tf.export.litertlm import export_litertlm
from gpt_tf.export.tflite import export_tflite
from gpt_tf.export.verify import VerificationError
from gpt_tf.text.tokenizer import BPETokenizer, CharacterTokenizer
from tests.export.runner import Runner

pytest.importorskip(
    "litert_lm_builder", reason="litert-lm-builder, which writes the file, is missing"
)

CONTEXT = 128
PREFILL_LENGTHS = (1, 8, 32)

# Tokens that are taken of a text as a prompt: those beyond 32 are longer than the
# largest prefill, and the last leave room for few tokens or for one.
LENGTHS = (1, 9, 31, 32, 33, 65, 120, 126, 127)
TEXTS = (
    "\r\n\t a  b",
    "class Foo:\n    def __init__(self",
    "# Gr\u00f6\u00dfe: na\u00efve \u00e9 \u4e2d\u6587 \U0001f600\n",
)


@pytest.fixture(scope="module")
def prompts(python_small):
    """Twelve prompts, the longest last."""
    _, tokenizer, ids = python_small
    return [*TEXTS, *(tokenizer.decode(ids[300 : 300 + one]) for one in LENGTHS)]


@pytest.fixture(scope="module")
def options(python_small, python_ranges):
    return {
        "ranges": python_ranges,
        "verify_on": python_small[2][5000:5128],
        "prefill_lengths": (1, 8, 32),
        "batch_sizes": (2,),
    }


@pytest.fixture(scope="module")
def bundled(python_small, options, tmp_path_factory):
    """The trained model's `.litertlm` of a mode, and its manifest."""
    model, tokenizer, _ = python_small

    @functools.cache
    def bundled(mode, **changes):
        path = tmp_path_factory.mktemp(mode) / "python.litertlm"
        return path, export_litertlm(model, tokenizer, path, mode, **options | changes)

    return bundled


def inner_tflite(path, manifest):
    """The bytes of the `.tflite` within, found by its mark and known by its hash."""
    data, size = path.read_bytes(), manifest["verification"]["size_bytes"]
    start = data.find(b"TFL3") - 4
    inner = data[start : start + size]
    assert hashlib.sha256(inner).hexdigest() == manifest["tflite_sha256"]
    return inner


class Engine:
    """LiteRT-LM's engine, that takes the most likely token."""

    def __init__(self, path):
        litert_lm = pytest.importorskip(
            "litert_lm", reason="litert-lm-api, Google's runtime, is missing"
        )
        litert_lm.set_min_log_severity(litert_lm.LogSeverity.SILENT)
        self.library = litert_lm
        # Unless told not to, it writes a cache beside the file, as large as that.
        self.engine = litert_lm.Engine(
            str(path),
            backend=litert_lm.Backend.CPU(thread_count=1),
            cache_dir=":nocache",
        )

    def continuation(self, prompt):
        session = self.engine.create_session(
            sampler_config=self.library.SamplerConfig(
                top_k=1, top_p=1.0, temperature=0.0
            )
        )
        try:
            session.run_prefill([prompt])
            return "".join(answer.texts[0] for answer in session.run_decode_async())
        finally:
            session.close()


@pytest.fixture(scope="module")
def engine(bundled):
    opened = {}

    def engine(mode):
        if mode not in opened:
            opened[mode] = Engine(bundled(mode)[0])
        return opened[mode]

    yield engine
    for one in opened.values():
        one.engine.close()


def is_by_keras(model, tokenizer, prompt, text):
    """Whether Keras takes each token of a continuation to the end, too."""
    ids, found = tokenizer.encode(prompt), tokenizer.encode(text)
    logits = model(np.array([ids + found], np.int32)).numpy()[0, len(ids) - 1 :]
    wanted = [*found, tokenizer.end_of_text_id][: model.context_length - len(ids)]
    likely = logits[:, : tokenizer.vocab_size].argmax(axis=1)
    return likely[: len(wanted)].tolist() == wanted


def greedy_by_litert(runner, prompt, tokenizer):
    """The continuation until the context is full, by the plain `.tflite`."""
    runner.clear()
    ids, found = tokenizer.encode(prompt), []
    logits = runner.decode(ids)[-1]
    while True:
        token = int(logits.argmax())
        if token == tokenizer.end_of_text_id:
            break
        found.append(token)
        if len(ids) + len(found) == CONTEXT:
            break
        logits = runner.decode([token])[-1]
    return tokenizer.decode(found)


# Google's runtime


def test_litert_lm_continues_as_keras_does(engine, python_small, prompts):
    """Token for token, in float32; and it goes on until the context is full."""
    model, tokenizer, _ = python_small
    other = gpt_tf.GPTModel.from_config(model.get_config())
    other.set_weights(model.get_weights())
    bias = other.get_layer("block_3").down_bias
    bias.assign_add(np.random.default_rng(0).normal(0, 0.3, bias.shape))
    differences = 0
    for prompt in prompts:
        text = engine("float32").continuation(prompt)
        assert len(tokenizer.encode(prompt)) + len(tokenizer.encode(text)) == CONTEXT
        assert is_by_keras(model, tokenizer, prompt, text), prompt
        differences += not is_by_keras(other, tokenizer, prompt, text)
    assert differences > 6  # one weight that is changed would be noticed


@pytest.mark.parametrize(
    "mode",
    [
        "dynamic_int8",
        "int8_full",
        *(
            pytest.param(mode, marks=pytest.mark.slow)
            for mode in ("float16", "int8", "int16x8", "int4")
        ),
    ],
)
def test_litert_lm_continues_as_litert_does(
    engine, bundled, python_small, prompts, mode, tmp_path
):
    """The same file without LiteRT-LM: the rounding of a mode is not its business."""
    _, tokenizer, _ = python_small
    (tmp_path / "inner.tflite").write_bytes(inner_tflite(*bundled(mode)))
    runner = Runner(tmp_path / "inner.tflite")
    for prompt in prompts[:: 6 if mode == "int16x8" else 3]:  # that one is slow
        wanted = greedy_by_litert(runner, prompt, tokenizer)
        assert engine(mode).continuation(prompt) == wanted, prompt


@pytest.mark.parametrize("lengths", [(1,), (1, 64)])
def test_a_prompt_that_nearly_fills_the_cache_is_prefilled_rightly(
    engine, bundled, prompts, lengths
):
    """Whatever the prefills: near the end LiteRT-LM takes those that still fit."""
    other = Engine(bundled("float32", prefill_lengths=lengths)[0])
    for prompt in prompts[-5:]:
        wanted = engine("float32").continuation(prompt)
        assert other.continuation(prompt) == wanted
    other.engine.close()


def test_litert_lm_reads_the_same_tokens(engine, python_small, prompts):
    _, tokenizer, _ = python_small
    read = engine("float32").engine
    for text in [*prompts, "", "  \n\n\t", "\u00e9" * 9]:
        assert read.tokenize(text) == tokenizer.encode(text)
    assert read.eos_token_ids == [[tokenizer.end_of_text_id]]
    assert read.bos_token_id is None  # the model was trained without one


def test_litert_lm_draws_single_characters_and_no_id_without_one(build_model, tmp_path):
    tokenizer = CharacterTokenizer.train(["abcdefghijklmnopqrstuvwxyz .\n\u00e9"])
    model = build_model(vocab_size=tokenizer.vocab_size + 200)
    path, prompt = tmp_path / "letters.litertlm", "hello w"
    export_litertlm(model, tokenizer, path, "float32")
    text = Engine(path).continuation(prompt)
    assert is_by_keras(model, tokenizer, prompt, text)
    ids = tokenizer.encode(prompt + text)
    free = model(np.array([ids], np.int32)).numpy()[0].argmax(axis=1)
    assert max(free) >= tokenizer.vocab_size  # what it would draw


def test_litert_lm_s_command_prints_the_continuation(bundled, engine, tmp_path):
    pytest.importorskip(
        "litert_lm_cli", reason="litert-lm, Google's command line, is missing"
    )
    path, prompt = bundled("dynamic_int8")[0], "def \u00e9"
    result = subprocess.run(
        [
            Path(sys.executable).with_name("litert-lm"),
            *("run", path, "--prompt", prompt, "--temperature", "0", "--top-k", "1"),
            *("--backend", "cpu", "--cache", "no"),
        ],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(tmp_path)},
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    wanted = engine("dynamic_int8").continuation(prompt)
    assert len(wanted) > 50
    assert result.stdout.strip() == wanted.strip()


# The file


def test_the_file_holds_the_verified_tflite_byte_by_byte(
    bundled, python_small, options, tmp_path
):
    model, tokenizer, _ = python_small
    path, manifest = bundled("dynamic_int8")
    plain = tmp_path / "python.tflite"
    export_tflite(model, plain, tokenizer=tokenizer, **options)
    inner = inner_tflite(path, manifest)
    assert inner == plain.read_bytes()
    data = path.read_bytes()
    assert data.startswith(b"LITERTLM")
    assert data.count(signatures.SEAL_PREFIX) == 1
    assert len(data) - len(inner) < 200_000
    assert artifacts.check_file_manifest(path) == manifest
    assert manifest["kind"] == "litertlm"
    assert manifest["size_bytes"] == len(data)
    assert manifest["tokenizer_fingerprint"] == tokenizer.fingerprint()
    assert manifest["verification"]["text"] == "given text"


def test_the_same_model_gives_the_same_bytes(model, tokenizer, tmp_path, capfd):
    paths = [tmp_path / f"{name}.litertlm" for name in "abc"]
    for path, length in zip(paths, (4, 4, 5), strict=True):
        export_litertlm(model, tokenizer, path, "float32", prefill_lengths=[length])
    first, second, other = (path.read_bytes() for path in paths)
    assert first == second != other
    sealed = integrity.read_seal(first, "a", signatures.BUNDLE_PREFIX)
    assert sealed["format"] == "gpt_tf.litertlm/1"
    assert b"uuid" not in first and b"creation_timestamp" not in first
    assert capfd.readouterr().out == ""  # the builder prints


def test_the_bundle_alone_is_enough(bundled, tmp_path):
    path = tmp_path / "moved.litertlm"
    shutil.copy(bundled("float32")[0], path)
    assert Engine(path).continuation("import os\n")
    assert [p.name for p in tmp_path.iterdir()] == ["moved.litertlm"]


# What cannot be exported


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def existing(model, tokenizer, tmp_path):
    """A file that stands there already; a failure is to leave it."""
    path = tmp_path / "gpt.litertlm"
    export_litertlm(model, tokenizer, path, "float32")
    before = contents(tmp_path)
    assert set(before) == {path.name, f"{path.name}.json"}
    yield path
    assert contents(tmp_path) == before


def test_a_file_that_fails_leaves_what_was_there(
    existing, model, tokenizer, monkeypatch
):
    monkeypatch.setattr(operations.Operations, "softmax", lambda self, x: x)
    with pytest.raises(VerificationError):
        export_litertlm(model, tokenizer, existing, "float32")


def test_a_full_disk_leaves_what_was_there(existing, model, tokenizer, monkeypatch):
    """Of the forced writes the first, the second, the third: tflite and bundle."""
    original, left = os.fsync, []

    def full(handle):
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(handle)

    monkeypatch.setattr(os, "fsync", full)
    for calls in (1, 2, 3):
        left[:] = [calls]
        with pytest.raises(InputError, match="cannot be written: No space left"):
            export_litertlm(model, tokenizer, existing, "dynamic_int8")


def test_what_does_not_fit_is_refused_and_nothing_is_left(model, tokenizer, tmp_path):
    text = "the quick brown fox jumps over a lazy dog and runs away again " * 9
    larger = BPETokenizer.train([text], 289)
    for match, thing, given, name, mode in (
        ("ends in", model, tokenizer, "gpt.tflite", "float32"),
        ("ends in", model, tokenizer, "gpt", "float32"),
        ("`tokenizer` expects", model, larger, "gpt.litertlm", "float32"),
        ("`tokenizer` expects", model, None, "gpt.litertlm", "float32"),
        ("`mode` expects", model, tokenizer, "gpt.litertlm", "int2"),
        ("ranges", model, tokenizer, "gpt.litertlm", "int8"),
    ):
        with pytest.raises(InputError, match=match):
            export_litertlm(thing, given, tmp_path / name, mode)
    with pytest.raises(InputTypeError, match="expects a GPTModel"):
        export_litertlm("gpt.keras", tokenizer, tmp_path / "gpt.litertlm")
    assert not list(tmp_path.iterdir())
