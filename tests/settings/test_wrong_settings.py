"""A campaign of wrong settings: each is refused in our words, or it is good.

Every field of every configuration, and every argument of what users call, meets every
value of `WRONG`. What is right of an argument is stated here once more, independently
of the package. Nothing is built: where an accepted setting would begin to compute, the
call is stopped.
"""

import contextlib
import functools
import json
import math
import os
import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import tf_keras as keras
import typer

from gpt_tf import cli
from gpt_tf.advisor.constraints import KINDS, Budgets
from gpt_tf.distillation import distiller, losses, student, teacher_cache
from gpt_tf.distillation.config import DistillationConfig
from gpt_tf.distillation.tokenizer_alignment import derive_tokenizer
from gpt_tf.edge import runtime
from gpt_tf.edge.runtime import EdgeGPT
from gpt_tf.edge.scheduler import EdgeScheduler
from gpt_tf.errors import InputError
from gpt_tf.evaluation import accuracy, latency
from gpt_tf.evaluation.models import KerasGPT
from gpt_tf.explain import attribution
from gpt_tf.export import from_run, litertlm, tflite
from gpt_tf.generation.sampler import Sampler
from gpt_tf.models import cached_forward, gpt
from gpt_tf.models.gpt import GPTModel
from gpt_tf.models.optimizer import AdamW
from gpt_tf.parallel import data, pipeline
from gpt_tf.parallel.mesh import make_mesh
from gpt_tf.quantization import calibration
from gpt_tf.quantization.config import QuantizationConfig
from gpt_tf.quantization.weights import quantize_weights
from gpt_tf.settings.configuration import fields_of
from gpt_tf.text import corpus as corpora
from gpt_tf.text.augment import AugmentationConfig, BPEDropout
from gpt_tf.text.dataset import Windows
from gpt_tf.text.tokenizer import BPETokenizer, CharacterTokenizer, load_tokenizer
from gpt_tf.training import loop, preparation
from gpt_tf.training.config import RunOptions, TrainingConfig
from gpt_tf.workflow import optimization
from gpt_tf.workflow.config import OptimizationConfig

WRONG = (
    *(None, True, False, 0, -1, 3, 10**30, 10**400, 1.5, 0.5, -0.5, 1e300),
    *(math.nan, math.inf, -math.inf, 1j, "", "3", "x" * 100_000, "a\0b", b"x"),
    *([], [1.5], ["x"], {}, {"a": 1}, (), object(), np.int64(3), np.float32(0.5)),
    *(np.array(3), np.array([1, 2]), np.float64("nan"), np.bool_(True), lambda: 3),
)
_SECONDS = 60
_INT32 = 2**31 - 1


class Accepted(Exception):
    """The settings were accepted, and something would be built from here on."""


# What is right


def whole(low=0, high=_INT32):
    return lambda v: (
        isinstance(v, int | np.integer)
        and not isinstance(v, bool)
        and low <= int(v) <= high
    )


def real(low=-math.inf, high=math.inf, above=-math.inf, below=math.inf):
    def is_right(v):
        if isinstance(v, bool) or not isinstance(v, int | float | np.floating):
            return isinstance(v, np.integer) and is_right(int(v))
        with contextlib.suppress(OverflowError):
            v = float(v)
            return math.isfinite(v) and low <= v <= high and above < v < below
        return False

    return is_right


def choice(*names):
    return lambda v: isinstance(v, str) and v in names


def text(v):
    return isinstance(v, str)


def path(v):
    return isinstance(v, str | os.PathLike) and str(v) != "" and "\0" not in str(v)


def switch(v):
    return isinstance(v, bool | np.bool_)


def either(*rules):
    return lambda v: v is None or any(rule(v) for rule in rules)


def many(rule):
    def is_right(v):
        if isinstance(v, str | bytes) or not np.iterable(v):
            return False
        return all(rule(one) for one in v)

    return is_right


def fields(kind):
    return lambda v: isinstance(v, dict) and set(v) <= set(fields_of(kind))


def anything(v):
    return True


def never(v):
    return False


def nothing(v):
    return v is None


count, seed32, seed64 = whole(1), whole(0, 2**32 - 1), whole(0, 2**64 - 1)
rate, share, positive = real(0, below=1), real(0, 1), real(above=0)
paths = either(path, many(path))
maybe_count = either(count)
threads = either(whole(1, 1024))
sampled = {
    real(0): "temperature",
    maybe_count: "top_k",
    either(real(above=0, high=1)): "top_p",
    positive: "repetition_penalty",
    either(whole(0, math.inf)): "seed",
}


# What is called


class Target(NamedTuple):
    """A call with good arguments.

    Attributes:
        call: Takes a setting by its name.
        rules: Names of settings, by what is right of them.
        stop: An object and the name of its attribute whose call means acceptance.
    """

    call: Callable
    rules: dict
    stop: tuple | None = None


TEXT = ["the quick brown fox jumps over the lazy dog " * 40]
IDS = np.arange(400) % 50


@functools.cache
def bpe():
    return BPETokenizer.train(TEXT, 270)


@functools.cache
def model():
    return GPTModel(270, 16, 2, 2, context_length=32)


@functools.cache
def subject():
    return KerasGPT(model(), bpe())


def sizes(**changes):
    made = {"vocab_size": 9, "embedding_dim": 8, "num_layers": 1, "num_heads": 2}
    return {**made, **changes}


@functools.cache
def pair():
    small = GPTModel(270, 8, 1, 2, context_length=32)
    return distiller.Distiller(teacher=model(), student=small)


def scheduler(**options):
    open_gpt = EdgeGPT.__new__(EdgeGPT)
    open_gpt._executor = None
    return EdgeScheduler(open_gpt, **options)


def windows(**options):
    return Windows(IDS, **{"context_length": 4, "batch_size": 2, **options})


def extracted(**options):
    given = {"path": "store", "tokenizer": bpe(), **options}
    return teacher_cache.extract(model(), SimpleNamespace(), **given)


CONFIGURATIONS = (
    *(TrainingConfig, DistillationConfig, QuantizationConfig),
    *(AugmentationConfig, OptimizationConfig, RunOptions),
)
TARGETS = {
    "Budgets": Target(
        Budgets,
        {
            either(real(above=0, below=1)): "max_perplexity_increase max_score_drop",
            either(real(above=0), choice("3")): " ".join([*KINDS][2:]),
        },
    ),
    "Sampler": Target(Sampler, sampled),
    "GPTModel": Target(
        lambda **o: GPTModel(**sizes(**o)),
        {
            whole(1, 2**40): "vocab_size context_length",
            whole(2, 2**40): "embedding_dim",
            whole(1, 1024): "num_layers",
            whole(1, 8): "num_heads",
            either(whole(1, 2**40)): "feedforward_dim",
            rate: "dropout",
            switch: "tie_embeddings",
            positive: "layer_norm_epsilon",
        },
        (gpt.placement, "plan_for"),
    ),
    "AdamW": Target(
        AdamW,
        {
            either(callable, real(0)): "learning_rate",
            either(real(0)): "weight_decay global_clipnorm",
            rate: "beta_1 beta_2",
            real(0): "epsilon",
        },
    ),
    "GPTModel.compile": Target(
        lambda **o: model().compile(**o),
        {count: "gradient_accumulation_steps", either(switch): "jit_compile"},
        (keras.Model, "compile"),
    ),
    "Distiller.compile": Target(
        lambda **o: pair().compile(**o),
        {
            share: "alpha on_policy_fraction",
            positive: "temperature",
            maybe_count: "on_policy_prompt_length",
            whole(): "on_policy_seed",
        },
        (losses, "get"),
    ),
    "make_student": Target(
        lambda **o: student.make_student(model(), **o),
        {
            either(whole(1, 2)): "num_layers",
            either(whole(1, 16)): "embedding_dim",
            anything: "num_heads feedforward_dim",  # `GPTModel` checks these two
            many(whole(0, 1)): "layers",
            choice("teacher", "fresh"): "init",
            seed64: "seed",
        },
        (student, "strategy_scope"),
    ),
    "derive_tokenizer": Target(
        lambda vocab_size: derive_tokenizer(bpe(), vocab_size),
        {whole(257, 270): "vocab_size"},
    ),
    "extract": Target(
        extracted,
        {
            path: "path",
            either(whole(1, 32)): "context_length",
            count: "top_k passes batch_size",
            seed64: "seed",
            switch: "overwrite",
        },
        (teacher_cache, "_check_place"),
    ),
    "calibrate": Target(
        lambda **o: calibration.calibrate(model(), IDS[None, :16], **o),
        {
            count: "batch_size",
            choice("minmax", "percentile", "mse"): "method",
            real(above=50, high=100): "percentile",
            maybe_count: "num_batches",
            lambda v: callable(v) or choice("int8", "int16")(v): "dtype",
        },
        (calibration, "_extremes"),
    ),
    "quantize_weights": Target(
        lambda **o: quantize_weights(model(), **o),
        {never: "strategy", whole(2, 8): "bits"},
    ),
    "Pipeline": Target(
        lambda **o: pipeline.Pipeline(**{"num_stages": 2, **o}),
        {
            whole(1, 4): "num_stages",
            count: "micro_batches",
            choice("1f1b", "gpipe"): "schedule",
            nothing: "devices",
        },
    ),
    "make_mesh": Target(make_mesh, {whole(1, 4): "batch model"}),
    "split_cpu": Target(data.split_cpu, {whole(4, 4): "num_devices"}),
    "make_strategy": Target(data.make_strategy, {never: "name"}),
    "Windows": Target(
        windows,
        {
            whole(1, len(IDS) - 1): "context_length",
            count: "batch_size",
            seed64: "seed",
            switch: "shuffle",
            either(fields(AugmentationConfig)): "augmentation",
        },
    ),
    "Windows.batch": Target(
        lambda **o: windows().batch(**{"step": 0, **o}),
        {whole(): "step", whole(0, 0): "shard", whole(1, 2): "num_shards"},
    ),
    "Windows.dataset": Target(
        lambda **o: windows().dataset(**o),
        {
            whole(): "start_step",
            either(whole()): "num_steps",
            switch: "repeat",
            whole(1, 2): "num_shards",
            whole(0, 0): "shard",
        },
    ),
    "BPEDropout": Target(lambda rate: BPEDropout(bpe(), rate), {share: "rate"}),
    "BPETokenizer.train": Target(
        lambda **o: BPETokenizer.train(**{"texts": TEXT, "vocab_size": 258, **o}),
        {many(text): "texts", whole(257, 300): "vocab_size"},
    ),
    "CharacterTokenizer.train": Target(
        lambda **o: CharacterTokenizer.train(TEXT, **o), {switch: "end_of_text"}
    ),
    "Tokenizer.encode": Target(lambda text: bpe().encode(text), {text: "text"}),
    "Tokenizer.decode": Target(
        lambda ids: bpe().decode(ids), {many(whole(0, 269)): "ids"}
    ),
    "load_tokenizer": Target(load_tokenizer, {never: "path"}),
    "open_corpus": Target(
        lambda **o: corpora.open_corpus(**{"source": "python-stdlib", **o}),
        {
            lambda v: v is not None and paths(v): "source",
            real(above=0, below=1): "validation_fraction",
            either(path): "validation",
            either(lambda v: text(v) and v != ""): "separator",
            switch: "whole",
        },
        (corpora, "_without_copies"),
    ),
    "generate": Target(
        lambda **o: cached_forward.generate(model(), **{"prompt": [1], **o}),
        {
            **sampled,
            many(whole(0, 269)): "prompt",
            whole(): "max_new_tokens",
            lambda v: many(text)(v) and not list(v): "stop",
            switch: "stream",
            nothing: "tokenizer",
        },
        (cached_forward, "_continue"),
    ),
    "EdgeGPT": Target(
        lambda **o: EdgeGPT(**{"path": "a.litertlm", **o}),
        {threads: "num_threads", choice("slide", "stop"): "when_full"},
        (runtime, "open_artefact"),
    ),
    "EdgeGPT of no file": Target(EdgeGPT, {never: "path"}),
    "EdgeScheduler": Target(
        scheduler,
        {
            count: "max_chunk max_active patience",
            switch: "chunked",
            nothing: "num_threads",
            never: "when_full",
        },
    ),
    "export_tflite": Target(
        lambda **o: tflite.export_tflite(
            model(), **{"path": "a.tflite", "allow_untrained": True, **o}
        ),
        {
            never: "path mode",
            either(whole(2, 32)): "context_length",
            many(count): "prefill_lengths",
            either(switch): "per_channel",
            switch: "allow_untrained",
        },
        (tflite, "ids_without_token"),
    ),
    "export_litertlm": Target(
        lambda **o: litertlm.export_litertlm(
            model(), **{"tokenizer": bpe(), "path": "a.litertlm", **o}
        ),
        {never: "path tokenizer"},
        (tflite, "export_tflite"),
    ),
    "export_trained": Target(
        lambda **o: from_run.export_trained(**{"source": "a", "out": "a.tflite", **o}),
        {path: "source", never: "out"},
        (from_run, "load_model"),
    ),
    "train": Target(
        loop.train,
        {
            either(fields(TrainingConfig)): "config",
            path: "out",
            switch: "resume resume_or_start overwrite verbose",
            count: "steps",
            positive: "learning_rate",
            lambda v: v is not None and paths(v): "corpus",
        },
        (loop, "_division_of"),
    ),
    "quantize": Target(loop.quantize, {never: "source"}),
    "distil": Target(loop.distil, {never: "teacher"}),
    "optimize": Target(
        optimization.optimize,
        {
            either(fields(OptimizationConfig)): "config",
            path: "out",
            switch: "update overwrite",
            either(text): "command",
        },
        (optimization, "_refuse_foreign_folder"),
    ),
    "evaluate_files": Target(
        lambda **o: accuracy.evaluate_files(**{"paths": ["a"], **o}),
        {
            many(path): "paths",
            switch: "whole",
            either(path): "reference",
            either(whole(2)): "max_tokens",
            either(switch): "parse",
            count: "completions",
            whole(): "seed",
        },
        (accuracy, "open_model"),
    ),
    "measure_files": Target(
        lambda **o: latency.measure_files(**{"paths": ["a.tflite"], **o}),
        {
            count: "repetitions rounds",
            either(count): "prompt_tokens",
            either(whole(2)): "new_tokens",
            threads: "threads",
            either(many(count)): "contexts thread_counts",
            choice("gpt_tf", "litert-lm", "both"): "engine",
            many(path): "paths",
        },
        (latency, "_describe_files"),
    ),
    "explain": Target(
        lambda **o: attribution.explain_prompt(subject(), "the fox", **o),
        {
            never: "method",
            either(whole(30, 2**20)): "num_samples",
            seed32: "seed",
            either(whole(0, 269), lambda v: v in ("3", b"x")): "neutral",
        },
        (attribution, "MaskedPrompt"),
    ),
    "extract_knowledge": Target(
        lambda **o: loop.extract_knowledge(**{"teacher": "a", "path": "b", **o}),
        {never: "teacher"},
        (preparation, "store_knowledge"),
    ),
}


def try_all(target, monkeypatch):
    """Return what is wrong: bare errors, and what was accepted and is not right."""
    found = []
    if target.stop is not None:
        stop(*target.stop, monkeypatch)
    settings = [
        (n, rule) for rule, names in target.rules.items() for n in names.split()
    ]
    for name, rule in settings:
        for value in WRONG:
            said = repr(value)[:40]
            try:
                target.call(**{name: value})
            except Accepted:
                pass
            except InputError as error:
                assert is_one_line(error), (name, said)
                continue
            except Exception as error:
                found.append(f"{name}={said}: {type(error).__name__}: {error}"[:200])
                continue
            if not rule(value):
                found.append(f"{name}={said} was accepted")
    return found


def is_one_line(error):
    return "\n" not in str(error) and len(str(error)) < 1000


def stop(owner, name, monkeypatch):
    """Let a call mean acceptance."""

    def accept(*args, **kwargs):
        raise Accepted

    monkeypatch.setattr(owner, name, accept)


@pytest.fixture
def in_time(tmp_path, monkeypatch):
    """A folder of its own to run in, and an error where a call hangs."""

    def give_up(*_):
        raise TimeoutError(f"longer than {_SECONDS} s")

    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", TARGETS)
def test_wrong_settings_are_refused_in_our_words(name, monkeypatch, in_time):
    assert try_all(TARGETS[name], monkeypatch) == []


def test_a_setting_without_a_check_is_found(monkeypatch):
    def unchecked(size=1):
        return [0] * size if size != 3 else None

    found = try_all(Target(unchecked, {count: "size"}), monkeypatch)
    assert any("TypeError" in line for line in found)
    assert any("-1 was accepted" in line for line in found)


def test_two_thousand_wrong_fields_are_refused_or_survive_json():
    tried = 0
    for kind in CONFIGURATIONS:
        for name in fields_of(kind):
            for value in WRONG:
                tried += 1
                try:
                    config = kind(**{name: value})
                except InputError as error:
                    assert is_one_line(error), (name, value)
                else:
                    stored = json.dumps(config.get_config(), allow_nan=False)
                    assert kind.of(json.loads(stored)) == config, (name, value)
    assert tried >= 2000


# The command line


TYPED = ("", "-1", "0", "1.5", "three", "nan", "inf", "1e400", "9" * 30, "999x999")


def test_wrong_values_on_the_command_line_are_one_line(monkeypatch, in_time):
    for owner, name in (
        (loop, "_division_of"),
        (loop, "_config_of"),
        (optimization, "_refuse_foreign_folder"),
        (data, "split_cpu"),
    ):
        stop(owner, name, monkeypatch)
    program, tried, found = typer.main.get_command(cli.app), 0, []
    for command in ("train", "quantize", "distil", "optimize"):
        for option in program.commands[command].params:
            for value in () if getattr(option, "is_flag", False) else TYPED:
                arguments = [command, option.opts[0], value, "--out", "out"]
                arguments += ["--model", "a"] * (command == "quantize")
                tried += 1
                try:
                    program.main(arguments, "gpt-tf", standalone_mode=False)
                except (Accepted, InputError):
                    continue
                except Exception as error:
                    # A usage error of the parser's own is one line too.
                    if getattr(error, "exit_code", None) != 2:
                        found.append(f"{command} {option.name} {value!r}: {error!r}")
    assert found == []
    assert tried > 500
