import errno
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
from gpt_tf.export import graph, integrity, signatures
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

# Twenty prompts of saved_models/python-small, in groups that Keras continues at once:
# themselves, or how many tokens of a text they take. Those beyond 32 are longer than
# the largest prefill, and the last leave room for one token.
GROUPS = [
    [
        *(1, 2, 9, 31, 32),
        "import os\n",
        "    return self.",
        "\r\n\t a  b",
        "class Foo:\n    def __init__(self",
        "# Gr\u00f6\u00dfe: na\u00efve \u00e9 \u4e2d\u6587 \U0001f600\n",
        "\u4e2d\u6587 = '\u0440\u0443\u0441\u0441\u043a\u0438\u0439'",
    ],
    [33, 34, 64, 65, "x = [1, 2, 3]\nfor i in x:\n    print(i)\n" * 2],
    [97, 120],
    [126, 127],
]


@pytest.fixture(scope="module")
def groups(python_small):
    _, tokenizer, ids = python_small
    found = [
        [
            tokenizer.decode(ids[300 : 300 + one]) if isinstance(one, int) else one
            for one in group
        ]
        for group in GROUPS
    ]
    assert sum(map(len, found)) == 20
    return found


@pytest.fixture(scope="module")
def prompts(groups):
    return [prompt for group in groups for prompt in group]


@pytest.fixture(scope="module")
def by_keras(python_small, groups):
    """What Keras continues the prompts with, until the longest of a group is full."""
    model, tokenizer, _ = python_small
    found = {}
    for group in groups:
        room = CONTEXT - max(len(tokenizer.encode(prompt)) for prompt in group)
        texts = gpt_tf.generate(
            model, group, tokenizer=tokenizer, max_new_tokens=room, temperature=0
        )
        found |= dict(zip(group, texts, strict=True))
    return found


def options_for(ids):
    return {
        "representative": ids[: 128 * 16].reshape(16, 128),
        "verify_on": ids[5000:5128],
        "prefill_lengths": PREFILL_LENGTHS,
    }


@pytest.fixture(scope="module")
def bundled(python_small, tmp_path_factory):
    """The trained model's `.litertlm` of a mode, and its manifest."""
    model, tokenizer, ids = python_small
    written = {}

    def bundled(mode, prefill_lengths=PREFILL_LENGTHS):
        key = (mode, prefill_lengths)
        if key not in written:
            path = tmp_path_factory.mktemp(mode) / "python.litertlm"
            options = {**options_for(ids), "prefill_lengths": prefill_lengths}
            manifest = export_litertlm(model, tokenizer, path, mode, **options)
            written[key] = path, manifest
        return written[key]

    return bundled


def inner_tflite(path, manifest):
    """The bytes of the `.tflite` within, found by its mark and known by its hash."""
    data, size = path.read_bytes(), manifest["verification"]["size_bytes"]
    start = data.find(b"TFL3") - 4
    inner = data[start : start + size]
    assert hashlib.sha256(inner).hexdigest() == manifest["tflite_sha256"]
    return inner


class Engine:
    """LiteRT-LM's engine, that takes the likeliest token."""

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

    def engine(mode, *arguments):
        key = (mode, *arguments)
        if key not in opened:
            opened[key] = Engine(bundled(*key)[0])
        return opened[key]

    yield engine
    for one in opened.values():
        one.engine.close()


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


def test_litert_lm_continues_as_keras_does(engine, python_small, by_keras):
    """Token for token, in float32; and it goes on until the context is full."""
    _, tokenizer, _ = python_small
    compared = 0
    for prompt, wanted in by_keras.items():
        found = tokenizer.encode(engine("float32").continuation(prompt))
        assert len(tokenizer.encode(prompt)) + len(found) == CONTEXT
        ids = tokenizer.encode(wanted)
        assert found[: len(ids)] == ids, prompt
        compared += len(ids)
    assert compared > 1000


def test_a_change_of_one_weight_would_be_noticed(python_small, by_keras, tmp_path):
    model, tokenizer, _ = python_small
    other = gpt_tf.GPTModel.from_config(model.get_config())
    other.set_weights(model.get_weights())
    bias = other.get_layer("block_3").down_bias
    bias.assign_add(np.random.default_rng(0).normal(0, 0.3, bias.shape))
    path = tmp_path / "other.litertlm"
    export_litertlm(other, tokenizer, path, "float32")
    changed = Engine(path)
    different = sum(
        not changed.continuation(prompt).startswith(wanted)
        for prompt, wanted in by_keras.items()
    )
    assert different > 10


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
    path = tmp_path / "inner.tflite"
    path.write_bytes(inner_tflite(*bundled(mode)))
    runner = Runner(path)
    step = {"dynamic_int8": 1, "int16x8": 10}.get(mode, 5)  # that one is slow
    for prompt in prompts[::-step]:
        wanted = greedy_by_litert(runner, prompt, tokenizer)
        assert engine(mode).continuation(prompt) == wanted, prompt


@pytest.mark.parametrize("lengths", [(1,), (1, 64), (1, 128)])
def test_a_prompt_that_nearly_fills_the_cache_is_prefilled_rightly(
    engine, groups, by_keras, lengths
):
    """Whatever the prefills: near the end LiteRT-LM takes those that still fit."""
    near_the_end = [prompt for group in groups[1:] for prompt in group]
    for prompt in near_the_end:
        found = engine("float32", lengths).continuation(prompt)
        assert found.startswith(by_keras[prompt])


def test_a_prompt_that_fills_the_context_is_refused_by_litert_lm(engine, python_small):
    """gpt_tf goes on with the newest half; LiteRT-LM wants room for a token."""
    _, tokenizer, ids = python_small
    for count in (CONTEXT, CONTEXT + 1):
        prompt = tokenizer.decode(ids[300 : 300 + count])
        assert len(tokenizer.encode(prompt)) == count
        with pytest.raises(RuntimeError, match="prefill"):
            engine("float32").continuation(prompt)
    # Its engine is not spoilt by that.
    assert engine("float32").continuation("import os\n")


def test_litert_lm_reads_the_same_tokens(engine, python_small, prompts):
    _, tokenizer, _ = python_small
    read = engine("float32").engine
    for text in [*prompts, "", "  \n\n\t", "\u00e9" * 9]:
        assert read.tokenize(text) == tokenizer.encode(text)
    assert read.eos_token_ids == [[tokenizer.end_of_text_id]]
    assert read.bos_token_id is None  # the model was trained without one


def test_litert_lm_takes_the_name_of_a_special_token_for_the_token(
    engine, python_small
):
    """A known difference: to gpt_tf what the user writes is text."""
    _, tokenizer, _ = python_small
    text = "a<|endoftext|>b"
    assert tokenizer.end_of_text_id in engine("float32").engine.tokenize(text)
    assert tokenizer.end_of_text_id not in tokenizer.encode(text)


def test_a_model_of_single_characters_runs_too(build_model, tmp_path):
    tokenizer = CharacterTokenizer.train(["abcdefghijklmnopqrstuvwxyz .\n\u00e9"])
    model = build_model(vocab_size=tokenizer.vocab_size)
    path = tmp_path / "letters.litertlm"
    export_litertlm(model, tokenizer, path, "float32")
    prompt = "hello w\u00e9"
    wanted = gpt_tf.generate(
        model, prompt, tokenizer=tokenizer, max_new_tokens=32, temperature=0
    )
    assert Engine(path).continuation(prompt) == wanted


def test_litert_lm_draws_no_id_without_a_token(build_model, tmp_path):
    tokenizer = CharacterTokenizer.train(["abcdefghijklmnopqrstuvwxyz .\n\u00e9"])
    model = build_model(vocab_size=tokenizer.vocab_size + 200)
    path = tmp_path / "padded.litertlm"
    export_litertlm(model, tokenizer, path, "float32")
    prompt, options = "hello w", {"max_new_tokens": 33, "temperature": 0}
    free = gpt_tf.generate(model, tokenizer.encode(prompt), **options)
    assert max(free) >= tokenizer.vocab_size  # what it would draw
    wanted = gpt_tf.generate(model, prompt, tokenizer=tokenizer, **options)
    assert Engine(path).continuation(prompt) == wanted


# The command line


def litert_lm_command(tmp_path, *arguments):
    pytest.importorskip(
        "litert_lm_cli", reason="litert-lm, Google's command line, is missing"
    )
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    command = Path(sys.executable).with_name("litert-lm")
    result = subprocess.run(
        [command, *map(str, arguments), "--backend", "cpu", "--cache", "no"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(home)},
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("mode", ["float32", "dynamic_int8"])
@pytest.mark.parametrize("template", [[], ["--no-template"]])
def test_litert_lm_run_prints_the_continuation(
    bundled, engine, tmp_path, mode, template
):
    path = bundled(mode)[0]
    options = ["--temperature", "0", "--top-k", "1", *template]
    for prompt in ("import os\n", "def \u00e9"):
        printed = litert_lm_command(tmp_path, "run", path, "--prompt", prompt, *options)
        wanted = engine(mode).continuation(prompt)
        assert len(wanted) > 50
        assert printed.strip() == wanted.strip()


def test_litert_lm_benchmark_runs(bundled, tmp_path):
    path = bundled("dynamic_int8")[0]
    printed = litert_lm_command(tmp_path, "benchmark", path, "-p", "40", "-d", "20")
    assert "Decode speed" in printed
    assert "Prefill speed" in printed


# The file


def test_the_file_holds_the_verified_tflite_byte_by_byte(
    bundled, python_small, tmp_path
):
    model, tokenizer, ids = python_small
    path, manifest = bundled("dynamic_int8")
    plain = tmp_path / "python.tflite"
    export_tflite(model, plain, tokenizer=tokenizer, **options_for(ids))
    inner = inner_tflite(path, manifest)
    assert inner == plain.read_bytes()
    assert integrity.read_seal(inner)["mode"] == "dynamic_int8"
    data = path.read_bytes()
    assert data.startswith(b"LITERTLM")
    assert data.count(signatures.SEAL_PREFIX) == 1
    assert len(data) - len(inner) < 200_000


def test_the_same_model_gives_the_same_bytes(model, tokenizer, tmp_path):
    paths = [tmp_path / f"{name}.litertlm" for name in "abc"]
    for path, length in zip(paths, (4, 4, 5), strict=True):
        export_litertlm(model, tokenizer, path, "float32", prefill_lengths=[length])
    first, second, other = (path.read_bytes() for path in paths)
    assert first == second != other
    sealed = integrity.read_seal(first, "a", signatures.BUNDLE_PREFIX)
    assert sealed["format"] == "gpt_tf.litertlm/1"
    assert b"uuid" not in first and b"creation_timestamp" not in first


def test_the_manifest_is_that_of_the_bundle(bundled, python_small):
    path, manifest = bundled("dynamic_int8")
    assert artifacts.check_file_manifest(path) == manifest
    assert manifest["kind"] == "litertlm"
    assert manifest["size_bytes"] == path.stat().st_size
    assert manifest["tokenizer_fingerprint"] == python_small[1].fingerprint()
    assert manifest["verification"]["text"] == "given text"
    beside = {p.name for p in path.parent.iterdir()}
    assert beside == {"python.litertlm", "python.litertlm.json"}


def test_the_bundle_alone_is_enough(bundled, tmp_path):
    path = tmp_path / "moved.litertlm"
    shutil.copy(bundled("float32")[0], path)
    assert Engine(path).continuation("import os\n")
    assert [p.name for p in tmp_path.iterdir()] == ["moved.litertlm"]


def test_nothing_is_printed(model, tokenizer, tmp_path, capfd):
    export_litertlm(model, tokenizer, tmp_path / "gpt.litertlm", "float32")
    assert capfd.readouterr().out == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "gpt.litertlm",
        "gpt.litertlm.json",
    ]


# What cannot be exported


@pytest.fixture
def existing(model, tokenizer, tmp_path):
    """A file that stands there already; what is to stay of it."""
    path = tmp_path / "gpt.litertlm"
    export_litertlm(model, tokenizer, path, "float32")
    return path, {p.name: p.read_bytes() for p in tmp_path.iterdir()}


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_file_that_fails_leaves_what_was_there(
    existing, model, tokenizer, monkeypatch
):
    path, before = existing
    add = graph._Graph._add
    monkeypatch.setattr(
        graph._Graph,
        "_add",
        lambda self, a, b, *c: a if b is self.mask else add(self, a, b, *c),
    )
    with pytest.raises(VerificationError):
        export_litertlm(model, tokenizer, path, "float32")
    assert contents(path.parent) == before


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_full_disk_leaves_what_was_there(
    existing, model, tokenizer, monkeypatch, calls
):
    """Of the forced writes the first, the second, the third: tflite and bundle."""
    path, before = existing
    original, left = os.fsync, [calls]

    def full(handle):
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="cannot be written: No space left"):
        export_litertlm(model, tokenizer, path, "dynamic_int8")
    assert contents(path.parent) == before


def test_a_full_disk_while_the_bundle_is_written_leaves_what_was_there(
    existing, model, tokenizer, monkeypatch
):
    import litert_lm_builder

    def full(self, stream):
        stream.write(b"LITERTLM")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path, before = existing
    monkeypatch.setattr(litert_lm_builder.LitertLmFileBuilder, "build", full)
    with pytest.raises(InputError, match=r"gpt\.litertlm cannot be written: No spa"):
        export_litertlm(model, tokenizer, path)
    assert contents(path.parent) == before


@pytest.mark.parametrize("name", ["gpt.tflite", "gpt", "gpt.litertlm.zip"])
def test_another_suffix_is_refused(model, tokenizer, tmp_path, name):
    with pytest.raises(InputError, match=r"ends in \.litertlm"):
        export_litertlm(model, tokenizer, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_of_another_model_is_refused(model, tmp_path):
    text = "the quick brown fox jumps over a lazy dog and runs away again " * 9
    larger = BPETokenizer.train([text], 289)
    for tokenizer in (larger, None):
        with pytest.raises(InputError, match="`tokenizer` expects"):
            export_litertlm(model, tokenizer, tmp_path / "gpt.litertlm")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("thing", [None, "gpt.keras", 3])
def test_what_is_no_gpt_is_refused(thing, tokenizer, tmp_path):
    with pytest.raises(InputTypeError, match="expects a GPTModel"):
        export_litertlm(thing, tokenizer, tmp_path / "gpt.litertlm")
    assert not list(tmp_path.iterdir())


def test_options_are_those_of_the_tflite(model, tokenizer, tmp_path):
    path = tmp_path / "gpt.litertlm"
    manifest = export_litertlm(
        model, tokenizer, path, context_length=20, prefill_lengths=[5]
    )
    assert manifest["capacity"] == 20
    assert manifest["prefill_lengths"] == [1, 5]
    before = contents(tmp_path)
    with pytest.raises(InputError, match="`mode` expects"):
        export_litertlm(model, tokenizer, path, "int2")
    with pytest.raises(InputError, match="ranges"):
        export_litertlm(model, tokenizer, path, "int8")
    assert contents(tmp_path) == before
