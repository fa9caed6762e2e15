import dataclasses
import errno
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import typer

import gpt_tf
from gpt_tf import artifacts, cli
from gpt_tf.bundled_model import shipped_model
from gpt_tf.errors import InputError
from gpt_tf.generation import sequence
from gpt_tf.models import cached_forward
from gpt_tf.quantization.config import QuantizationConfig
from gpt_tf.text.augment import AugmentationConfig
from gpt_tf.text.tokenizer import BPETokenizer, CharacterTokenizer
from gpt_tf.training import loop
from gpt_tf.training.config import PRESETS, TrainingConfig

COMMAND = [sys.executable, "-m", "gpt_tf.cli"]


@pytest.fixture
def train(command, corpus_folder):
    """Run `gpt-tf train` with a configuration that takes seconds."""

    def run(out, *options):
        return command(
            *f"train --preset tiny --vocab-size 270 --context-length 16 --steps 6 "
            f"--validate-every 3 --num-layers 1 --jit-compile off "
            f"--strategy one_device --out {out}".split(),
            *("--corpus", corpus_folder) * ("--corpus" not in options),
            *options,
        )

    return run


@pytest.fixture
def generate(command, trained, monkeypatch):
    """Run `gpt-tf generate` on the trained model, which stays compiled."""
    loaded = (trained.model, trained.tokenizer)
    monkeypatch.setattr(loop, "load_model", lambda path: loaded)

    def run(*options, stdin=""):
        return command("generate", "--model", trained.out, *options, stdin=stdin)

    return run


@pytest.fixture
def place(tmp_path):
    """A folder with bad files, a run that must stay, and another's folder."""
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text(" \n")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "run" / "model" / "model.keras").write_text("precious")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    return tmp_path


@pytest.fixture(scope="module")
def interrupted(corpus_folder, tmp_path_factory, interrupt_after):
    """A run that stopped after step 5, with checkpoints at 2 and 4."""
    out = tmp_path_factory.mktemp("runs") / "cut"
    with pytest.raises(KeyboardInterrupt):
        loop.train(
            PRESETS["tiny"],
            out,
            corpus=str(corpus_folder),
            vocab_size=270,
            context_length=16,
            steps=6,
            validate_every=6,
            checkpoint_every=2,
            num_layers=1,
            jit_compile="off",
            strategy="one_device",
            callbacks=[interrupt_after(5)],
            verbose=False,
        )
    return out


def snapshot(folder):
    return {
        path: path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def assert_one_line(result, message):
    assert result.status == 2
    assert result.err.startswith("gpt-tf: ")
    assert result.err.count("\n") == 1 and result.err.endswith("\n"), result.err
    assert message in result.err
    assert "Traceback" not in result.err + result.out


def test_a_run_that_diverges_ends_in_one_line(train, tmp_path):
    result = train(tmp_path / "run", "--learning-rate", "1e30", "--warmup-steps", "0")
    assert_one_line(result, "diverged")
    assert not (tmp_path / "run" / "model").exists()


# Bad input


BAD_TRAINING = {
    "missing corpus": ("--corpus {place}/nowhere", "there is none"),
    "empty corpus": ("--corpus {place}/empty.txt", "empty"),
    "binary corpus": ("--corpus {place}/binary.txt", "binary"),
    "folder without text": ("--corpus {place}/blank", "there are none"),
    "vocabulary too small": ("--vocab-size 256", "at least 257"),
    "context too long": ("--context-length 99999", "longer than the text"),
    "missing tokenizer": ("--tokenizer {place}/no.json", "there is none"),
    "broken tokenizer": ("--tokenizer {place}/broken.json", "cannot be read"),
    "unknown strategy": ("--strategy telepathy", "Received: 'telepathy'"),
    "unknown preset": ("--preset huge", "quickstart, tiny, shakespeare-char, small"),
    "unknown precision": ("--precision float8", "mixed_bfloat16"),
    "no heads": ("--num-heads 0", "`--num-heads`"),
    "more heads than width": ("--num-heads 33", "at most `--embedding-dim`, 32"),
    "no feed-forward": ("--feedforward-dim 0", "`--feedforward-dim`"),
    "no validation": ("--validation-batches 0", "`--validation-batches`"),
    "impossible momentum": ("--beta-2 1", "`--beta-2`"),
    "seed of 33 bits": (f"--seed {2**32}", "`--seed`"),
    "negative seed": ("--seed -1", "`--seed`"),
    "negative decay": ("--weight-decay -1", "`--weight-decay`"),
    "negative end": ("--final-learning-rate -1", "`--final-learning-rate`"),
    "rate that is no number": ("--learning-rate nan", "`--learning-rate`"),
    "batch not divisible": (
        "--batch-size 7 --gradient-accumulation-steps 2",
        "a multiple of 2",
    ),
    "unknown character": (
        "--tokenizer character --sample-every 1 --sample-prompt \u0416",
        "lacks '\u0416'",
    ),
    "split too late": ("--virtual-devices 3", "already runs with 4"),
}


@pytest.mark.parametrize("out", ["new", "run"])
@pytest.mark.parametrize(
    ("options", "message"), BAD_TRAINING.values(), ids=list(BAD_TRAINING)
)
def test_bad_input_is_one_line_and_leaves_all_files_alone(
    train, place, options, message, out
):
    before = snapshot(place)
    options = options.format(place=place).split()
    overwrite = ["--overwrite"] * (out == "run")
    assert_one_line(train(place / out, *options, *overwrite), message)
    assert snapshot(place) == before


def test_an_empty_sample_prompt_is_refused(train, place):
    result = train(place / "new", "--sample-every", 1, "--sample-prompt", "")
    assert_one_line(result, "--sample-prompt")
    assert not (place / "new").exists()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("run", "already holds a run"),
        ("other", "already holds something else"),
        ("empty.txt", "is a file"),
        ("empty.txt/below", "cannot be written"),
    ],
)
def test_a_folder_that_is_taken_is_left_alone(train, place, out, message):
    before = snapshot(place)
    assert_one_line(train(place / out), message)
    assert snapshot(place) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSON"),
        ("[]", "JSON"),
        (
            '{"cluster": {"worker": ["a"]}, "task": {"type": "worker", "index": 0}}',
            "'a' is no host:port",
        ),
        *(
            (
                f'{{"cluster": {{"worker": ["a:{port}"]}}, '
                '"task": {"type": "worker", "index": 0}}',
                "a port from 1 to 65535",
            )
            for port in (0, 65536, 99999)
        ),
        (
            '{"cluster": {"worker": [7]}, "task": {"type": "worker", "index": 0}}',
            "JSON with a cluster",
        ),
        (
            '{"cluster": {"worker": ["a:1"]}, "task": {"type": ["b"], "index": 0}}',
            "index of its own",
        ),
        (
            '{"cluster": {"cook": ["a:1"]}, "task": {"type": "cook", "index": 0}}',
            "cluster that TensorFlow can join",
        ),
    ],
)
@pytest.mark.parametrize("strategy", ["multi_worker", "auto"])
def test_a_broken_tf_config_is_one_line(
    train, place, monkeypatch, strategy, text, message
):
    monkeypatch.setenv("TF_CONFIG", text)
    assert_one_line(train(place / "new", "--strategy", strategy), message)
    assert not (place / "new").exists()


def damage_checkpoints(run, change):
    for path in run.glob("checkpoints/*/state.safetensors"):
        path.write_bytes(change(path.read_bytes()))


def damage_tokens(run, change):
    path = run / "data" / "validation.tokens"
    path.write_bytes(change(path.read_bytes()))


def flip(data):
    return data[:99] + bytes([data[99] ^ 1]) + data[100:]


def another_tokenizer(run, vocab_size):
    texts = ["a b c d e f g h i j k l m " * 9, "nopqrstuvwxyz " * 9]
    BPETokenizer.train(texts, vocab_size).save(run)


def another_shape(run):
    content = artifacts.read_json(run / "run.json")
    content["config"]["num_layers"] = 2
    artifacts.write_sealed_json(run / "run.json", content)


def another_seed(run):
    text = (run / "run.json").read_text()
    (run / "run.json").write_text(text.replace('"seed": 1', '"seed": 2'))


BAD_RUNS = {
    "checkpoints truncated": (
        lambda run: damage_checkpoints(run, lambda data: data[:-1]),
        "None of the 2 checkpoints",
    ),
    "checkpoints tampered": (
        lambda run: damage_checkpoints(run, flip),
        "None of the 2 checkpoints",
    ),
    "checkpoints of another shape": (another_shape, "num_layers=1 instead of 2"),
    "tokens truncated": (
        lambda run: damage_tokens(run, lambda data: data[:-2]),
        "truncated",
    ),
    "tokens tampered": (lambda run: damage_tokens(run, flip), "SHA-256"),
    "ids out of range": (
        lambda run: another_tokenizer(run, 257),
        "Token ids from 0 to 256 were expected",
    ),
    "another tokenizer": (
        lambda run: another_tokenizer(run, 270),
        "the tokenizer that it was written with",
    ),
    "no tokenizer": (lambda run: (run / "tokenizer.json").unlink(), "there is none"),
    "configuration broken": (
        lambda run: (run / "run.json").write_text("{"),
        "Expected JSON",
    ),
    "configuration tampered": (another_seed, "does not have the SHA-256"),
    "configuration of another version": (
        lambda run: (run / "run.json").write_text('{"config": {"depth": 3}}'),
        "no configuration of this version",
    ),
    "no run": (lambda run: (run / "run.json").unlink(), "no run.json"),
}


@pytest.mark.parametrize(("damage", "message"), BAD_RUNS.values(), ids=list(BAD_RUNS))
def test_a_damaged_run_is_one_line_and_stays_as_it_is(
    command, interrupted, tmp_path, damage, message
):
    run = tmp_path / "run"
    shutil.copytree(interrupted, run)
    damage(run)
    before = snapshot(tmp_path)
    assert_one_line(command("train", "--resume", "--out", run), message)
    assert snapshot(tmp_path) == before


def test_a_resumed_run_takes_no_other_options(command, interrupted):
    before = snapshot(interrupted)
    for option, value in (("--batch-size", 9), ("--steps", 5)):
        result = command("train", "--resume", "--out", interrupted, option, value)
        assert_one_line(result, f"`{option}`")
    assert snapshot(interrupted) == before


def test_a_whole_run_is_resumed(command, interrupted, tmp_path):
    shutil.copytree(interrupted, tmp_path / "run")
    result = command("train", "--resume", "--out", tmp_path / "run")
    assert result.status == 0, result.err
    assert "going on from step 4" in result.out
    assert (tmp_path / "run" / "model" / "model.keras").is_file()


def damaged_model(trained, folder, damage):
    shutil.copytree(trained.out / "model", folder)
    damage(folder)
    return folder


def without_manifest(folder):
    (folder / "manifest.json").unlink()


def tampered(folder):
    data = (folder / "model.keras").read_bytes()
    middle = len(data) // 2
    (folder / "model.keras").write_bytes(data[:middle] + flip(data[middle:]))


BAD_MODELS = {
    "nothing": (shutil.rmtree, "there is none"),
    "no model": (lambda f: (f / "model.keras").unlink(), "there is none"),
    "tampered": (tampered, "SHA-256"),
    "tampered without manifest": (
        lambda f: (without_manifest(f), tampered(f)),
        "model.keras",
    ),
    "no Keras file": (
        lambda f: (without_manifest(f), (f / "model.keras").write_text("junk")),
        "model.keras",
    ),
    "no tokenizer": (
        lambda f: (without_manifest(f), (f / "tokenizer.json").unlink()),
        "Expected tokenizer.json",
    ),
    "tokenizer too large": (
        lambda f: (
            without_manifest(f),
            CharacterTokenizer.train(map(chr, range(32, 500))).save(f),
        ),
        "Token ids run from 0 to 299",
    ),
}


@pytest.mark.parametrize(
    ("damage", "message"), BAD_MODELS.values(), ids=list(BAD_MODELS)
)
def test_a_bad_model_is_one_line(command, trained, tmp_path, damage, message):
    model = damaged_model(trained, tmp_path / "model", damage)
    result = command("generate", "--model", model, "--prompt", "\u01f0")
    assert_one_line(result, message)
    assert result.out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "`--temperature`"),
        (["--top-k", "0"], "`--top-k`"),
        (["--top-p", "1.5"], "`--top-p`"),
        (["--repetition-penalty", "0"], "`--repetition-penalty`"),
        (["--seed", "-1"], "`--seed`"),
        (["--max-new-tokens", "-1"], "`--max-new-tokens`"),
        (["--prompt", ""], "--prompt"),
    ],
)
def test_bad_generation_options_are_one_line_and_no_output(generate, options, message):
    result = generate("--prompt", "the", *options)
    assert_one_line(result, message)
    assert result.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--depth", "3"],
        ["train", "--steps", "many"],
        ["train", "runs/gpt"],
        ["export"],
        ["bake"],
    ],
)
def test_unknown_commands_and_options_have_status_2(command, arguments):
    result = command(*arguments)
    assert result.status == 2
    assert "Usage: gpt-tf" in result.err
    assert "Traceback" not in result.err


def test_a_message_of_several_lines_becomes_one(train, place, monkeypatch):
    monkeypatch.setattr(loop, "train", raiser(InputError("first\nsecond\r\n")))
    assert_one_line(train(place / "new"), "first second")


def raiser(error):
    def fail(*arguments, **options):
        raise error

    return fail


def test_debug_shows_the_traceback(command, place):
    with pytest.raises(InputError, match="there is none"):
        command("--debug", "train", "--corpus", place / "nowhere")


def test_a_defect_keeps_its_traceback(train, place, monkeypatch):
    monkeypatch.setattr(loop, "train", raiser(RuntimeError("a defect")))
    with pytest.raises(RuntimeError, match="a defect"):
        train(place / "new")


def test_a_missing_package_is_one_line_if_an_extra_brings_it(train, place, monkeypatch):
    missing = ModuleNotFoundError("No module", name="matplotlib.figure")
    monkeypatch.setattr(loop, "train", raiser(missing))
    assert_one_line(train(place / "new"), "the package matplotlib, which")
    missing.name = "gpt_tf.nothing"
    with pytest.raises(ModuleNotFoundError):
        train(place / "new")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/b"), "a/b cannot be writ"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "Disk quota exceeded"),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG), "a/b"), "File too large"),
        (RuntimeError("Save error: Input/output error (os error 5)"), "Make room"),
        (OSError(errno.ESTALE, os.strerror(errno.ESTALE), "a"), "a cannot be written"),
        (shutil.Error([("a", "b", "[Errno 28] No space left on device")]), "Make room"),
        (OSError(errno.EROFS, "Read-only file system", "a/b"), "a/b cannot be used"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "Permission denied"),
    ],
)
def test_a_disk_that_takes_nothing_is_one_line(
    train, place, monkeypatch, error, message
):
    monkeypatch.setattr(loop, "train", raiser(error))
    assert_one_line(train(place / "new"), message)


def test_what_a_stream_cannot_show_is_replaced(monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    options = ("--prompt", "d\xe9j\xe0", "--max-new-tokens", "0")
    monkeypatch.setattr(sys, "argv", ["gpt-tf", "generate", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert shown.buffer.getvalue() == b"d?j?\n"


def test_an_interruption_has_status_130(train, place, monkeypatch):
    monkeypatch.setattr(loop, "train", raiser(KeyboardInterrupt()))
    result = train(place / "new")
    assert (result.status, result.err) == (130, "gpt-tf: interrupted\n")


def test_special_tokens_in_a_prompt_are_text_if_it_is_literal(
    generate, trained, monkeypatch
):
    asked = []

    def take(model, prompt, *, tokenizer, **options):
        (ids,), _, _ = sequence.rows_of(prompt, tokenizer)
        asked.append(ids.count(tokenizer.end_of_text_id))
        return iter(())

    monkeypatch.setattr(cached_forward, "stream", take)
    for options in ([], ["--literal"]):
        result = generate("--prompt", "fox<|endoftext|>", *options)
        assert result.out == "fox<|endoftext|>\n"
    assert asked == [1, 0]


# Options


OTHER = {field.name: None for field in dataclasses.fields(TrainingConfig)} | {
    "corpus": ("a", "b"),
    "tokenizer": "character",
    "vocab_size": 999,
    "validation_fraction": 0.25,
    "validation": "held/out.txt",
    "separator": "<|endoftext|>",
    "embedding_dim": 48,
    "num_layers": 3,
    "num_heads": 6,
    "context_length": 24,
    "feedforward_dim": 100,
    "dropout": 0.2,
    "tie_embeddings": False,
    "batch_size": 6,
    "gradient_accumulation_steps": 2,
    "steps": 77,
    "learning_rate": 0.002,
    "final_learning_rate": 0.0003,
    "warmup_steps": 5,
    "weight_decay": 0.3,
    "beta_2": 0.95,
    "global_clipnorm": 2.0,
    "validate_every": 11,
    "validation_batches": 3,
    "patience": 4,
    "checkpoint_every": 13,
    "keep_checkpoints": 2,
    "sample_every": 9,
    "sample_prompt": "Once",
    "precision": "mixed_bfloat16",
    "jit_compile": "off",
    "strategy": "mirrored",
    "seed": 8,
    "init_from": "runs/before",
    "micro_batches": 3,
    "pipeline_schedule": "gpipe",
}
del OTHER["quantization"]  # of `gpt-tf quantize`
del OTHER["distillation"]  # of `gpt-tf distil`
del OTHER["augmentation"]  # its own fields are options, below
AUGMENTATION = {
    "bpe_dropout": 0.1,
    "token_dropout": 0.2,
    "token_replacement": 0.3,
    "replacement": "uniform",
    "mix_documents": 0.4,
    "random_offsets": False,
    "teacher": "runs/teacher",
    "written_tokens": 500,
}
# These do not go together with others of the above.
ALONE = {"pipeline_stages": 2, "mesh": "1x2"}
for name in ALONE:
    del OTHER[name]


def test_every_field_of_the_configuration_is_an_option_and_arrives(
    command, trained, monkeypatch
):
    given = []

    def take(config, out, *, resume, overwrite, **changes):
        assert not changes.pop("resume_or_start")
        given.append(dataclasses.replace(config or TrainingConfig(), **changes))
        return trained

    monkeypatch.setattr(loop, "train", take)
    arguments = _options(OTHER)
    for preset in ("small", None):
        start = ["--preset", preset] if preset else []
        assert command("train", *start, *arguments).status == 0
        assert given.pop() == TrainingConfig(**OTHER)
        assert command("train", *start).status == 0
        assert given.pop() == (PRESETS[preset] if preset else TrainingConfig())
    for name, value in ALONE.items():
        assert command("train", "--" + name.replace("_", "-"), value).status == 0
        assert given.pop() == TrainingConfig(**{name: value})
    assert command("train", *_options(AUGMENTATION)).status == 0
    assert given.pop() == TrainingConfig(augmentation=AUGMENTATION)


def _options(values):
    """Write fields as the command line takes them."""
    arguments = []
    for name, value in values.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(option if value else f"--no-{option[2:]}")
        else:
            several = value if isinstance(value, tuple) else (value,)
            arguments += [part for item in several for part in (option, item)]
    return arguments


def test_train_has_no_option_that_is_nothing():
    options = {p.name for p in typer.main.get_command(cli.app).commands["train"].params}
    fields = {field.name for field in dataclasses.fields(TrainingConfig)}
    assert options - fields == {
        "out",
        "preset",
        "resume",
        "overwrite",
        "resume_or_start",
        "workers",
        "ray_address",
        "max_restarts",
        "virtual_devices",
        *AUGMENTATION,
    }
    fields = {field.name for field in dataclasses.fields(AugmentationConfig)}
    assert fields == set(AUGMENTATION)


def test_every_option_of_quantize_arrives(command, trained, monkeypatch, tmp_path):
    given = {}

    def take(source, out, quantization, **options):
        given.update(options, source=source, out=out, quantization=quantization)
        return trained

    monkeypatch.setattr(loop, "quantize", take)
    fields = "steps batch_size validate_every checkpoint_every seed".split()
    changes = {name: index + 2 for index, name in enumerate(fields)}
    changes |= {"learning_rate": 1e-5, "strategy": "mirrored", "corpus": "shakespeare"}
    options = [
        part
        for name, value in changes.items()
        for part in (f"--{name.replace('_', '-')}", value)
    ]
    folders = ("--model", trained.out, "--out", tmp_path)
    result = command("quantize", *folders, "--full", "--overwrite", *options)
    assert result.status == 0, result.err
    full = QuantizationConfig.full()
    expected = {"source": trained.out, "out": tmp_path, "quantization": full}
    expected |= {"resume": False, "resume_or_start": False}
    assert given == {**changes, **expected, "overwrite": True}
    given.clear()
    assert command("quantize", *folders).status == 0
    expected["quantization"] = None
    assert given == {**expected, "overwrite": False}


def test_every_option_of_distil_arrives(command, trained, monkeypatch, tmp_path):
    given = {}

    def take(teacher, out, distillation, **options):
        given.update(options, teacher=teacher, out=out, distillation=distillation)
        return trained

    monkeypatch.setattr(loop, "distil", take)
    numbers = "steps batch_size validate_every checkpoint_every seed".split()
    changes = {name: index + 2 for index, name in enumerate(numbers)}
    changes |= {"learning_rate": 1e-3, "strategy": "mirrored", "corpus": "shakespeare"}
    changes |= {"dropout": 0.1, "init_from": "runs/before"}
    sizes = {"layers": 3, "embedding_dim": 64, "heads": 2, "feedforward_dim": 99}
    sizes |= {"vocab_size": 300}
    wanted = {"layers": "importance", "init": "fresh", "loss": "reverse_kl"}
    wanted |= {"alpha": 0.3, "temperature": 2.0, "on_policy_fraction": 0.5}
    wanted |= {"written_tokens": 7}
    student = {f"student_{name}": value for name, value in sizes.items()}
    options = [
        part
        for name, value in {**changes, **student, **wanted}.items()
        for part in (f"--{name.replace('_', '-')}", value)
    ]
    folders = ("--teacher", trained.out, "--out", tmp_path)
    result = command("distil", *folders, *options, "--quantize", "--overwrite")
    assert result.status == 0, result.err
    config = given.pop("distillation")
    named = {
        "num_layers": 3,
        "embedding_dim": 64,
        "num_heads": 2,
        "feedforward_dim": 99,
        "vocab_size": 300,
    }
    assert config == {**named, **wanted}
    expected = {"teacher": trained.out, "out": tmp_path, "resume": False}
    expected |= {"resume_or_start": False}
    quantization = QuantizationConfig().get_config()
    assert given == {
        **changes,
        **expected,
        "overwrite": True,
        "quantization": quantization,
    }


def test_knowledge_is_extracted_on_the_command_line(command, trained, tmp_path):
    out = tmp_path / "knowledge"
    options = ("--top-k", 4, "--passes", 2)
    result = command("distil", "--teacher", trained.out, "--extract", out, *options)
    assert result.status == 0, result.err
    assert "13 bytes" in result.out  # 4 of 2 for ids, 5 of 1 for probabilities
    again = command("distil", "--teacher", trained.out, "--extract", out, *options)
    assert_one_line(again, "knowledge")


def test_what_cannot_be_distilled_is_one_line(command, trained, tmp_path):
    out = ("--out", tmp_path / "out")
    teacher = ("--teacher", trained.out)
    for options, message in (
        ([], "expects a trained teacher"),
        (["--extract", tmp_path / "store"], "expects a trained teacher"),
        (["--teacher", tmp_path], "there is none"),
        (["--teacher", trained.out / "model"], "without run.json"),
        ([*teacher, "--alpha", 3], "`--alpha`"),
        ([*teacher, "--temperature", 0], "`--temperature`"),
        ([*teacher, "--student-layers", 9], "`--student-layers`"),
        ([*teacher, "--loss", "magic"], "'magic'"),
        ([*teacher, "--knowledge", tmp_path / "nowhere"], "nowhere"),
    ):
        assert_one_line(command("distil", *out, *options), message)
    assert not (tmp_path / "out").exists()


def test_every_option_says_what_it_does():
    for name, command in typer.main.get_command(cli.app).commands.items():
        assert command.help, name
        assert all(parameter.help for parameter in command.params), name


# Good input


@pytest.mark.slow
def test_a_model_is_quantised_resumed_and_generates(train, command, tmp_path):
    assert train(tmp_path / "run").status == 0
    out = tmp_path / "qat"
    result = command(
        *("quantize", "--model", tmp_path / "run", "--method", "qat", "--out", out),
        *("--steps", 2, "--learning-rate", 1e-3),
    )
    assert result.status == 0, result.err
    assert "calibrating" in result.out
    resumed = command("quantize", "--out", out, "--resume")
    assert resumed.status == 0, resumed.err
    assert "going on from step 2" in resumed.out
    options = ("--prompt", "the", "--max-new-tokens", 4, "--seed", 1)
    assert command("generate", "--model", out, *options).out.startswith("the")


def test_what_cannot_be_quantised_is_one_line(command, trained, tmp_path):
    options = ("--model", tmp_path, "--out", tmp_path / "out")
    for more, message in (
        (["--method", "magic"], "`--method` expects"),
        ([], "there is none"),
        (["--corpus", "shakespeare"], "there is none"),
        (["--model", trained.out / "model"], "without run.json"),
    ):
        assert_one_line(command("quantize", *options, *more), message)


def test_a_model_is_trained_and_generates_the_same_text_for_a_seed(
    train, command, tmp_path
):
    result = train(tmp_path / "run")
    assert result.status == 0, result.err
    assert result.err == ""
    for part in ("a vocabulary of 270", "validation loss", "Trained"):
        assert part in result.out, part
    options = ["--prompt", "the quick", "--max-new-tokens", 8, "--top-k", 50]
    texts = [
        command("generate", "--model", tmp_path / folder, *options, "--seed", 7)
        for folder in ("run", "run/model")
    ]
    assert [text.status for text in texts] == [0, 0]
    assert texts[0].out == texts[1].out
    assert texts[0].out.startswith("the quick")
    assert texts[0].err == ""


def test_another_seed_gives_another_text(generate):
    options = ["--prompt", "the", "--max-new-tokens", 16]
    texts = [generate(*options, "--seed", seed).out for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.filterwarnings("default::gpt_tf.models.cached_forward.GenerationNotice")
def test_a_prompt_longer_than_the_context_is_answered_with_a_notice(generate):
    prompt = " the quick brown fox" * 20
    result = generate("--prompt", prompt, "--max-new-tokens", 3, "--seed", 7)
    assert result.status == 0
    assert result.err.count("\n") == 1
    assert result.err.startswith("gpt-tf: The prompt of ")
    assert "cut off" in result.err
    assert len(result.out) > len(prompt) + 1


def test_without_a_prompt_it_answers_line_by_line(generate):
    options = ["--max-new-tokens", 4, "--seed", 7]
    answers = [generate("--prompt", text, *options).out for text in ("the", "fox")]
    for end in ("\n", ""):  # an empty line, or the end of the input
        result = generate(*options, stdin=f"the\nfox\n{end}")
        assert result.status == 0
        assert "empty line ends" in result.err
        assert result.out == "".join(f"> {answer}" for answer in answers) + "> "


def test_stop_texts_end_the_answer(generate):
    options = ["--prompt", "the", "--max-new-tokens", 30, "--seed", 7]
    text = generate(*options).out[len("the") : -1]
    stop = text[len(text) // 2]
    stopped = generate(*options, "--stop", stop, "--stop", "\0\0").out
    assert stopped == f"the{text.partition(stop)[0]}\n"


def test_text_streams_to_the_output_as_it_comes(generate, monkeypatch):
    class Recorder(io.StringIO):
        def flush(self):
            shown.append(self.getvalue())

    shown = []
    monkeypatch.setattr(sys, "stdout", Recorder())
    options = ("--max-new-tokens", 12, "--seed", 1)
    assert generate("--prompt", "the", *options).status == 0
    lengths = sorted({len(text) for text in shown})
    assert shown[0] == "the"
    assert len(lengths) > 6
    assert shown[-1].endswith("\n")


def test_notices_are_printed_as_they_are(train, trained, place, monkeypatch):
    def take(config, out, **options):
        logging.getLogger("gpt_tf.training").info("step 3: '[/b] [red] :smile:'")
        return trained

    monkeypatch.setattr(loop, "train", take)
    assert "step 3: '[/b] [red] :smile:'\n" in train(place / "new").out


# In processes of their own


def start(*arguments, **options):
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def run_process(*arguments):
    process = start(*arguments)
    out, err = process.communicate(timeout=300)
    return SimpleNamespace(status=process.returncode, out=out, err=err)


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )


def test_a_process_ends_with_one_line_and_status_2(tmp_path):
    result = run_process(
        "train", "--corpus", tmp_path / "nowhere", "--out", tmp_path / "run"
    )
    assert_one_line(result, "there is none")
    assert result.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_cpu_is_split_into_virtual_devices(corpus_folder, tmp_path):
    options = (
        f"train --preset tiny --vocab-size 270 --steps 2 --num-layers 1 "
        f"--jit-compile off --virtual-devices 2 "
        f"--corpus {corpus_folder} --out {tmp_path}/run"
    ).split()
    assert_one_line(run_process(*options, "--batch-size", 3), "3 for 2 replicas")
    result = run_process(*options)
    assert (result.status, result.err) == (0, "")
    assert (tmp_path / "run" / "model" / "model.keras").is_file()


def test_a_reader_that_goes_away_is_no_error():
    process = start(
        *("generate", "--model", shipped_model(), "--prompt", "the\nfox"),
        *("--max-new-tokens", 2000, "--seed", 7),
    )
    assert process.stdout.readline() == "the\n"
    process.stdout.close()
    assert process.wait(300) == 1
    assert process.stderr.read() == ""
    process.stderr.close()


def test_an_interrupted_process_says_so_without_a_traceback():
    # What a shell runs in the background ignores the signal, and so do its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = start("generate", "--model", shipped_model(), stdin=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "Type a beginning" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err == "gpt-tf: interrupted\n"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_comes_without_tensorflow(arguments):
    result = run_python(
        "import sys\n"
        "from gpt_tf import cli\n"
        f"sys.argv = ['gpt-tf', *{arguments!r}]\n"
        "try:\n"
        "    cli.main()\n"
        "finally:\n"
        "    print([m for m in ('tensorflow', 'tf_keras') if m in sys.modules])\n"
    )
    assert result.returncode == 0, result.stderr
    assert "Usage: gpt-tf" in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"


def run_without(package, *arguments):
    """Run the command line where a package is not installed."""
    result = run_python(
        "import sys\n"
        f"sys.modules[{package!r}] = None\n"
        "from gpt_tf import cli\n"
        f"sys.argv = ['gpt-tf', *{list(map(str, arguments))!r}]\n"
        "cli.main()\n"
    )
    return SimpleNamespace(
        status=result.returncode, out=result.stdout, err=result.stderr
    )


@pytest.mark.parametrize("arguments", [["train"], ["generate", "--model"]])
def test_without_tensorflow_the_extra_is_named(arguments, tmp_path):
    model = [tmp_path] if arguments[-1] == "--model" else []
    result = run_without("tensorflow", *arguments, *model)
    assert_one_line(result, "package tensorflow, which is not installed")
    assert "pip install 'gpt-tf[train]'" in result.err


@pytest.mark.parametrize("name", ["nosuch", "nosuch.keras", "nosuch.litertlm"])
@pytest.mark.parametrize("package", ["tensorflow", "ai_edge_litert"])
def test_a_model_that_is_not_there_is_said_whatever_is_installed(name, package):
    result = run_without(package, "generate", "--model", name, "--prompt", "a")
    assert_one_line(result, f"{name}; there is none")


def test_the_version_is_printed(command):
    result = command("--version")
    assert (result.status, result.out) == (0, f"gpt-tf {gpt_tf.__version__}\n")


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--corpus", ""],
        ["train", "--out", ""],
        ["train", "--out="],
        ["export", "--model", ""],
        ["evaluate", ""],
    ],
)
def test_what_is_empty_is_refused(command, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text\n" * 999)
    assert_one_line(command(*words), words[-2 if words[-1] == "" else -1].strip("="))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("distil --student-layers 9", "--student-layers"),
        ("distil --student-heads 99", "--student-heads"),
        ("optimize --mode int3", "--mode"),
        ("recommend --prefer size --estimate x", "--prefer"),
    ],
)
def test_messages_speak_in_options(command, trained, tmp_path, words, option):
    verb, *options = words.split()
    place = ["--out", tmp_path / "out"]
    more = {
        "distil": ["--teacher", trained.out, *place],
        "optimize": ["--model", trained.out, *place],
    }
    result = command(verb, *options, *more.get(verb, []))
    assert_one_line(result, f"`{option}`")


def test_a_prompt_that_ends_in_a_space_is_remarked_on(generate):
    options = ("--max-new-tokens", 2, "--seed", 1)
    result = generate("--prompt", "the ", *options)
    assert result.status == 0 and result.out.startswith("the ")
    assert result.err.count("\n") == 1 and "ends in a space" in result.err
    assert generate("--prompt", "the", *options).err == ""


@pytest.mark.parametrize("closed", [[0], [1], [2], [0, 1, 2]])
def test_a_closed_stream_is_no_error(closed):
    code = (
        "import os, sys\n"
        f"for number in {closed}: os.close(number)\n"
        f"os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])\n"
    )
    words = ["generate", "--max-new-tokens", "2", "--seed", "1"]
    words += [] if 0 in closed else ["--prompt", "def"]
    result = subprocess.run(
        [sys.executable, "-c", code, *COMMAND[1:], *words],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0
    assert "Traceback" not in result.stdout + result.stderr
    assert bool(result.stdout) == (1 not in closed)


def test_a_run_too_deep_or_without_a_name_in_utf_8_is_one_line(train, tmp_path):
    for name, said in (("e/" * 1500, "too many folders"), ("r\udcfcn", "UTF-8")):
        assert_one_line(train(tmp_path / name), said)
    assert list(tmp_path.iterdir()) == []


def test_names_of_text_need_not_be_utf_8(train, corpus_folder, tmp_path):
    texts = os.fsdecode(os.fsencode(tmp_path) + b"/t\xfcxts")
    shutil.copytree(corpus_folder, texts)
    assert train(tmp_path / "run", "--corpus", texts).status == 0
    facts = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert facts["config"]["corpus"] == texts


def test_names_of_files_for_a_device_need_not_be_utf_8(command, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/g\xfct.litertlm")
    shutil.copyfile(shipped_model(), path)
    written = command("generate", "--model", path, "--prompt", "def", "--seed", 1)
    assert written.status == 0 and written.out.startswith("def"), written.err


def test_export_writes_a_file_that_generate_runs(command, trained, tmp_path):
    path = tmp_path / "gpt.litertlm"
    options = "--mode int8 --context-length 24 --prefill-length 1 --prefill-length 4"
    result = command("export", "--model", trained.out, "--out", path, *options.split())
    assert result.status == 0, result.err
    assert "Exported and verified" in result.out
    manifest = json.loads((tmp_path / "gpt.litertlm.json").read_text("utf-8"))
    assert (manifest["mode"], manifest["capacity"]) == ("int8", 24)
    assert manifest["prefill_lengths"] == [1, 4]
    written = command("generate", "--model", path, "--prompt", "the", "--seed", 1)
    assert written.status == 0, written.err
    assert written.out.startswith("the")


def test_export_of_an_unknown_mode_is_one_line(command, trained, tmp_path):
    path = tmp_path / "gpt.litertlm"
    result = command("export", "--model", trained.out, "--out", path, "--mode", "int3")
    assert result.status == 2
    assert len(result.err.splitlines()) == 1 and "dynamic_int8" in result.err
    assert not path.exists()
