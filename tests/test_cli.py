import contextlib
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
from typing import Annotated

import pydantic
import pytest
import typer

import gpt_tf
from gpt_tf import cli
from gpt_tf.bundled_model import shipped_model
from gpt_tf.distillation.config import DistillationConfig
from gpt_tf.errors import InputError
from gpt_tf.generation import sequence
from gpt_tf.models import cached_forward
from gpt_tf.quantization.config import QuantizationConfig
from gpt_tf.settings.configuration import fields_of
from gpt_tf.text.config import AugmentationConfig
from gpt_tf.text.tokenizer import BPETokenizer, CharacterTokenizer
from gpt_tf.training import loop
from gpt_tf.training.config import PRESETS, TrainingConfig
from gpt_tf.workflow import optimization
from gpt_tf.workflow.config import OptimizationConfig

COMMAND = [sys.executable, "-m", "gpt_tf.cli"]
PROGRAM = typer.main.get_command(cli.app)
# `trained` is made before that, as a graph, and other modules use it too.
pytestmark = pytest.mark.usefixtures("trained", "eagerly")


@pytest.fixture
def train(command, corpus_folder):
    """Run `gpt-tf train` with a configuration that takes seconds."""

    def run(out, *options):
        return command(
            *f"train --preset tiny --vocab-size 270 --context-length 16 --steps 2 "
            f"--validate-every 1 --num-layers 1 --jit-compile off "
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
    """A run that stopped after step 3, with checkpoints at 2 and 3."""
    out = tmp_path_factory.mktemp("runs") / "cut"
    with pytest.raises(KeyboardInterrupt):
        loop.train(
            PRESETS["tiny"],
            out,
            corpus=str(corpus_folder),
            vocab_size=270,
            context_length=16,
            steps=4,
            validate_every=4,
            checkpoint_every=1,
            keep_checkpoints=2,
            num_layers=1,
            jit_compile="off",
            strategy="one_device",
            callbacks=[interrupt_after(3)],
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


def raiser(error):
    def fail(*arguments, **options):
        raise error

    return fail


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--corpus {place}/nowhere", "there is none"),
        ("--corpus {place}/empty.txt", "empty"),
        ("--corpus {place}/binary.txt", "binary"),
        ("--corpus {place}/blank", "there are none"),
        ("--vocab-size 256", "at least 257"),
        ("--context-length 99999", "longer than the text"),
        ("--tokenizer {place}/no.json", "there is none"),
        ("--tokenizer {place}/broken.json", "cannot be read"),
        ("--preset huge", "quickstart, tiny, shakespeare-char, small"),
        ("--precision float8", "mixed_bfloat16"),
        ("--num-heads 33", "at most `--embedding-dim`, 32"),
        ("--learning-rate nan", "`--learning-rate`"),
        ("--tokenizer character --sample-every 1 --sample-prompt \u0416", "lacks"),
        ("--virtual-devices 3", "already runs with 4"),
        ("--ray-address here:1", "`--workers`"),
    ],
)
def test_bad_input_is_one_line_and_leaves_all_files_alone(
    train, place, options, message
):
    before = snapshot(place)
    options = options.format(place=place).split()
    assert_one_line(train(place / "run", *options, "--overwrite"), message)
    assert snapshot(place) == before


def test_a_run_that_diverges_ends_in_one_line(train, tmp_path):
    result = train(tmp_path / "run", "--learning-rate", "1e30", "--warmup-steps", "0")
    assert_one_line(result, "diverged")
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("run", "already holds a run"),
        ("other", "already holds something else"),
        ("empty.txt", "is a file"),
        ("empty.txt/below", "cannot be written"),
        ("e/" * 1500, "the path of a file or folder"),
        ("r\udcfcn", "UTF-8"),
    ],
)
def test_a_folder_that_cannot_be_used_is_left_alone(train, place, out, message):
    before = snapshot(place)
    assert_one_line(train(place / out), message)
    assert snapshot(place) == before


@pytest.mark.parametrize(
    ("strategy", "worker", "kind", "message"),
    [
        ("multi_worker", '"a"', '"worker"', "'a' is no host:port"),
        ("multi_worker", "7", '"worker"', "JSON with a cluster"),
        ("auto", '"a:99999"', '"worker"', "a port from 1 to 65535"),
        ("auto", '"a:1"', '["b"]', "index of its own"),
    ],
)
def test_a_broken_tf_config_is_one_line(
    train, place, monkeypatch, strategy, worker, kind, message
):
    task = f'{{"type": {kind}, "index": 0}}'
    text = f'{{"cluster": {{"worker": [{worker}]}}, "task": {task}}}'
    monkeypatch.setenv("TF_CONFIG", text)
    assert_one_line(train(place / "new", "--strategy", strategy), message)
    assert not (place / "new").exists()


def damage_checkpoints(run):
    for path in run.glob("checkpoints/*/state.safetensors"):
        path.write_bytes(flip(path.read_bytes()))


def damage_tokens(run):
    path = run / "data" / "validation.tokens"
    path.write_bytes(flip(path.read_bytes()))


def flip(data):
    return data[:99] + bytes([data[99] ^ 1]) + data[100:]


def another_tokenizer(run, vocab_size):
    texts = ["a b c d e f g h i j k l m " * 9, "nopqrstuvwxyz " * 9]
    BPETokenizer.train(texts, vocab_size).save(run)


def another_seed(run):
    text = (run / "run.json").read_text()
    (run / "run.json").write_text(text.replace('"seed": 1', '"seed": 2'))


BAD_RUNS = {
    "checkpoints": (damage_checkpoints, "None of the 2 checkpoints"),
    "tokens": (damage_tokens, "truncated or altered"),
    "ids out of range": (lambda run: another_tokenizer(run, 257), "from 0 to 256"),
    "another tokenizer": (lambda run: another_tokenizer(run, 270), "written with"),
    "no tokenizer": (lambda run: (run / "tokenizer.json").unlink(), "there is none"),
    "configuration": (another_seed, "does not have the SHA-256"),
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
    for option, value in (("--batch-size", 9), ("--steps", 3)):
        result = command("train", "--resume", "--out", interrupted, option, value)
        assert_one_line(result, f"`{option}`")
    assert snapshot(interrupted) == before


def test_a_whole_run_is_resumed(command, interrupted, tmp_path):
    shutil.copytree(interrupted, tmp_path / "run")
    result = command("train", "--resume", "--out", tmp_path / "run")
    assert result.status == 0, result.err
    assert "going on from step 3" in result.out
    assert (tmp_path / "run" / "model" / "model.keras").is_file()


def tampered(folder):
    (folder / "manifest.json").unlink()
    data = (folder / "model.keras").read_bytes()
    middle = len(data) // 2
    (folder / "model.keras").write_bytes(data[:middle] + flip(data[middle:]))


def without_tokenizer(folder):
    (folder / "manifest.json").unlink()
    (folder / "tokenizer.json").unlink()


def with_a_larger_tokenizer(folder):
    without_tokenizer(folder)
    CharacterTokenizer.train(map(chr, range(32, 500))).save(folder)


BAD_MODELS = {
    "nothing": (shutil.rmtree, "there is none"),
    "tampered": (tampered, "model.keras"),
    "no tokenizer": (without_tokenizer, "Expected tokenizer.json"),
    "tokenizer too large": (with_a_larger_tokenizer, "Token ids run from 0 to 299"),
}


@pytest.mark.parametrize(
    ("damage", "message"), BAD_MODELS.values(), ids=list(BAD_MODELS)
)
def test_a_bad_model_is_one_line(command, trained, tmp_path, damage, message):
    model = shutil.copytree(trained.out / "model", tmp_path / "model")
    damage(model)
    result = command("generate", "--model", model, "--prompt", "\u01f0")
    assert_one_line(result, message)
    assert result.out == ""


def test_bad_generation_options_are_one_line_and_no_output(generate):
    result = generate("--prompt", "the", "--top-k", "0")
    assert_one_line(result, "`--top-k`")
    assert result.out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("distil", "expects a trained teacher"),
        ("distil --extract {out}", "expects a trained teacher"),
        ("distil --teacher {out}", "there is none"),
        ("distil --teacher {run}/model", "without run.json"),
        ("distil --teacher {run} --student-layers 9", "`--student-layers`"),
        ("distil --teacher {run} --knowledge {out}", "out"),
        ("quantize --method magic", "`--method` expects"),
        ("quantize --model {out}", "there is none"),
        ("quantize --model {run}/model", "without run.json"),
        ("export --model {run} --mode int3", "dynamic_int8"),
        ("optimize --model {run} --mode int3", "`--mode`"),
    ],
)
def test_what_cannot_be_made_is_one_line_in_the_words_of_options(
    command, trained, tmp_path, words, message
):
    out = tmp_path / "out.tflite"
    words = words.format(run=trained.out, out=out).split()
    assert_one_line(command(*words, "--out", out), message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--corpus", ""],
        ["train", "--out", ""],
        ["train", "--out="],
        ["train", "--sample-prompt", ""],
        ["export", "--model", ""],
        ["generate", "--prompt", ""],
        ["evaluate", ""],
    ],
)
def test_what_is_empty_is_refused(command, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text\n" * 999)
    assert_one_line(command(*words), words[-2 if words[-1] == "" else -1].strip("="))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    "arguments",
    [["train", "--depth", "3"], ["train", "runs/gpt"], ["export"], ["bake"]],
)
def test_unknown_commands_and_options_have_status_2(command, arguments):
    result = command(*arguments)
    assert result.status == 2
    assert "Usage: gpt-tf" in result.err
    assert "Traceback" not in result.err


# What ends a command


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputError("first\nsecond\r\n"), "first second"),
        (ModuleNotFoundError("No", name="matplotlib.figure"), "gpt-tf[train]"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/b"), "a/b cannot be writ"),
        (RuntimeError("Save error: Input/output error (os error 5)"), "Make room"),
        (shutil.Error([("a", "b", "[Errno 28] No space left on device")]), "Make room"),
        (OSError(errno.EROFS, "Read-only file system", "a/b"), "a/b cannot be used"),
    ],
)
def test_what_the_user_can_mend_is_one_line(train, place, monkeypatch, error, message):
    monkeypatch.setattr(loop, "train", raiser(error))
    assert_one_line(train(place / "new"), message)


@pytest.mark.parametrize(
    "error", [RuntimeError("a defect"), ModuleNotFoundError("a", name="gpt_tf.nothing")]
)
def test_a_defect_keeps_its_traceback(train, place, monkeypatch, error):
    monkeypatch.setattr(loop, "train", raiser(error))
    with pytest.raises(type(error)):
        train(place / "new")


def test_debug_shows_the_traceback(command, place):
    result = command("--debug", "train", "--corpus", place / "nowhere")
    assert result.status == 2
    assert "Traceback" in result.err and "there is none" in result.err


def test_an_interruption_has_status_130(train, place, monkeypatch):
    monkeypatch.setattr(loop, "train", raiser(KeyboardInterrupt()))
    result = train(place / "new")
    assert (result.status, result.err) == (130, "gpt-tf: interrupted\n")


def test_what_a_stream_cannot_show_is_replaced(monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    options = ("--prompt", "d\xe9j\xe0", "--max-new-tokens", "0")
    monkeypatch.setattr(sys, "argv", ["gpt-tf", "generate", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert shown.buffer.getvalue() == b"d?j?\n"


def test_notices_are_printed_as_they_are(train, trained, place, monkeypatch):
    def take(config, out, **options):
        logging.getLogger("gpt_tf.training").info("step 3: '[/b] [red] :smile:'")
        return trained

    monkeypatch.setattr(loop, "train", take)
    assert "step 3: '[/b] [red] :smile:'\n" in train(place / "new").out


# Options


SOMETHING = (
    *(0.25, ("a", "b"), "first", (3, 2), ("int4", "int8"), True, False),
    *("tiny", "mixed_bfloat16", "on", "mirrored", "gpipe", "uniform", "fresh"),
)


def another_value(field, number):
    """Return a value that a field may have, other than its default."""
    kind = pydantic.TypeAdapter(Annotated[(field.annotation, *field.metadata, None)])
    for value in (*SOMETHING, number):
        with contextlib.suppress(pydantic.ValidationError):
            kind.validate_python(value, strict=True)
            if value != field.default:
                return value
    raise AssertionError(field)


@pytest.mark.parametrize(
    ("verb", "kinds"),
    [
        ("train", [TrainingConfig, AugmentationConfig]),
        ("quantize", [TrainingConfig]),
        ("distil", [DistillationConfig, TrainingConfig, AugmentationConfig]),
        ("optimize", [OptimizationConfig]),
    ],
)
def test_every_option_of_a_setting_arrives(command, monkeypatch, verb, kinds):
    module, given = optimization if verb == "optimize" else loop, {}

    def take(source, *arguments, **options):
        given.update(options, source=source)
        raise InputError("enough")

    monkeypatch.setattr(module, verb, take)
    stated = {
        name: field for kind in kinds[::-1] for name, field in fields_of(kind).items()
    }
    arguments, wanted = [], {}
    for number, param in enumerate(PROGRAM.commands[verb].params, 1001):
        if param.name not in stated:
            continue
        wanted[param.name] = value = another_value(stated[param.name], number)
        if isinstance(value, bool):
            arguments.append((param.opts if value else param.secondary_opts)[0])
        for item in value if isinstance(value, tuple) else (value,):
            arguments += [] if isinstance(value, bool) else [param.opts[0], item]
    assert_one_line(command(verb, *arguments), "enough")
    found = {**given, **(given.get("augmentation") or {})}
    if verb == "distil":
        found |= {**found["distillation"], "teacher": found["source"]}
    if verb == "optimize":
        found = found["source"]
    assert {name: found[name] for name in wanted} == wanted
    # What is not given is left to the settings, or to the run that another follows.
    given.clear()
    assert_one_line(command(verb), "enough")
    assert not given.keys() & wanted.keys() - {"teacher"}
    assert given["source"] in (None, {}) and not given.get("distillation")


def test_a_preset_and_the_options_of_a_run_arrive(command, monkeypatch, tmp_path):
    given = {}

    def take(source, **options):
        given.update(options, source=source)
        raise InputError("enough")

    for verb in ("train", "quantize", "distil"):
        monkeypatch.setattr(loop, verb, take)
    command("train", "--preset", "small", "--out", tmp_path, "--overwrite")
    assert given == {
        **{"source": PRESETS["small"], "out": tmp_path, "overwrite": True},
        **{"resume": False, "resume_or_start": False},
    }
    command("quantize", "--model", tmp_path, "--full", "--resume-or-start")
    assert (given["source"], given["resume_or_start"]) == (tmp_path, True)
    assert given["quantization"] == QuantizationConfig.full()
    command("distil", "--quantize", "--resume")
    assert given["quantization"] == QuantizationConfig().get_config()
    assert given["resume"] and not given["overwrite"]


def test_every_command_and_option_says_what_it_does():
    assert PROGRAM.list_commands(None)[:2] == ["optimize", "train"]
    for name, command in PROGRAM.commands.items():
        assert command.help, name
        assert all(parameter.help for parameter in command.params), name


# Good input


def test_knowledge_is_extracted_on_the_command_line(command, trained, tmp_path):
    out = tmp_path / "knowledge"
    options = ("--top-k", 4, "--passes", 2)
    result = command("distil", "--teacher", trained.out, "--extract", out, *options)
    assert result.status == 0, result.err
    assert "13 bytes" in result.out  # 4 of 2 for ids, 5 of 1 for probabilities
    again = command("distil", "--teacher", trained.out, "--extract", out, *options)
    assert_one_line(again, "knowledge")


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


def test_a_model_is_trained_and_generates_the_same_text_for_a_seed(
    train, command, corpus_folder, tmp_path, traced
):
    texts = os.fsdecode(os.fsencode(tmp_path) + b"/t\xfcxts")  # not UTF-8
    shutil.copytree(corpus_folder, texts)
    result = train(tmp_path / "run", "--corpus", texts)
    assert result.status == 0, result.err
    assert result.err == ""
    facts = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert facts["config"]["corpus"] == texts
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


@pytest.mark.filterwarnings("default::gpt_tf.generation.sequence.GenerationNotice")
def test_what_is_remarkable_about_a_prompt_is_one_line(generate):
    options = ("--max-new-tokens", 3, "--seed", 7)
    for prompt, said in (
        (" the quick brown fox" * 20, "cut off"),
        ("the ", "ends in a space"),
    ):
        result = generate("--prompt", prompt, *options)
        assert result.status == 0 and result.out.startswith(prompt)
        assert result.err.startswith("gpt-tf: The prompt ")
        assert result.err.count("\n") == 1 and said in result.err
    assert generate("--prompt", "the", *options).err == ""


def test_without_a_prompt_it_answers_line_by_line(generate):
    options = ["--max-new-tokens", 4, "--seed", 7]
    answers = [generate("--prompt", text, *options).out for text in ("the", "fox")]
    for end in ("\n", ""):  # an empty line, or the end of the input
        result = generate(*options, stdin=f"the\nfox\n{end}")
        assert result.status == 0
        assert "empty line ends" in result.err
        assert result.out == "".join(f"> {answer}" for answer in answers) + "> "


def test_special_tokens_in_a_prompt_are_text_if_it_is_literal(generate, monkeypatch):
    asked = []

    def take(model, prompt, *, tokenizer, **options):
        (ids,), _, _ = sequence.rows_of(prompt, tokenizer)
        asked.append((ids.count(tokenizer.end_of_text_id), options["stop"]))
        return iter(())

    monkeypatch.setattr(cached_forward, "generate", take)
    for options in ([], ["--literal", "--stop", "a", "--stop", "b"]):
        result = generate("--prompt", "fox<|endoftext|>", *options)
        assert result.out == "fox<|endoftext|>\n"
    assert asked == [(1, ()), (0, ["a", "b"])]


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


def test_names_of_files_for_a_device_need_not_be_utf_8(command, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/g\xfct.litertlm")
    shutil.copyfile(shipped_model(), path)
    written = command("generate", "--model", path, "--prompt", "def", "--seed", 1)
    assert written.status == 0 and written.out.startswith("def"), written.err


def test_export_writes_a_file_that_generate_runs(command, trained, tmp_path, traced):
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


@pytest.mark.parametrize("closed", [[1], [0, 1, 2]])
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
    assert result.stdout + result.stderr == ""


def test_help_groups_options_and_shows_defaults_without_tensorflow():
    code = (
        "import sys; sys.modules['tensorflow'] = None; from gpt_tf import cli; "
        "sys.argv = ['gpt-tf', 'train', '--help']; cli.main()"
    )
    shown = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert "Usage: gpt-tf" in shown and "Augmentation" in shown
    assert "[default: (quickstart)]" not in shown
    assert "[default: (python-stdlib)]" in shown


@pytest.mark.parametrize("arguments", [["train"], ["generate", "--model"]])
def test_without_tensorflow_the_extra_is_named(
    command, arguments, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    model = [tmp_path] if arguments[-1] == "--model" else []
    result = command(*arguments, *model)
    assert_one_line(result, "package tensorflow, which is not installed")
    assert "pip install 'gpt-tf[train]'" in result.err


@pytest.mark.parametrize("package", ["tensorflow", "ai_edge_litert"])
def test_a_model_that_is_not_there_is_said_whatever_is_installed(
    command, package, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    for name in ("nosuch", "nosuch.litertlm"):
        result = command("generate", "--model", name, "--prompt", "a")
        assert_one_line(result, f"{name}; there is none")


def test_the_version_is_printed(command):
    result = command("--version")
    assert (result.status, result.out) == (0, f"gpt-tf {gpt_tf.__version__}\n")
