"""A campaign of wrong settings: each is refused in our words, or it is good.

Every setting of every configuration and public function meets every value of `WRONG`.
What is right is stated here once more, independently of the package. Nothing is built:
where an accepted setting would begin to compute, the call is stopped.
"""

import contextlib
import dataclasses
import functools
import math
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import tf_keras as keras
import typer

from gpt_tf import cli
from gpt_tf.advisor import estimate
from gpt_tf.advisor.constraints import Budgets, objective_of
from gpt_tf.distillation import (
    distiller,
    generated_text,
    losses,
    student,
    teacher_cache,
)
from gpt_tf.distillation.config import DistillationConfig
from gpt_tf.distillation.tokenizer_alignment import derive_tokenizer
from gpt_tf.edge import runtime
from gpt_tf.edge.runtime import EdgeGPT
from gpt_tf.edge.scheduler import EdgeScheduler
from gpt_tf.errors import InputError
from gpt_tf.evaluation import accuracy, hardware, latency
from gpt_tf.evaluation import code_validity as parsings
from gpt_tf.evaluation.models import KerasGPT
from gpt_tf.evaluation.text import held_out_text
from gpt_tf.explain import attribution, faithfulness
from gpt_tf.export import from_run, litertlm, tflite
from gpt_tf.generation.sampler import Sampler
from gpt_tf.models import cached_forward, gpt
from gpt_tf.models.gpt import GPTModel
from gpt_tf.models.layers import Dropout
from gpt_tf.models.optimizer import AdamW
from gpt_tf.parallel import cluster, data, pipeline
from gpt_tf.parallel.config import parse_mesh
from gpt_tf.parallel.mesh import make_mesh
from gpt_tf.quantization import calibration
from gpt_tf.quantization.config import QuantizationConfig
from gpt_tf.quantization.weights import quantize_array, quantize_weights
from gpt_tf.settings.configuration import fields_of
from gpt_tf.text import corpus as corpora
from gpt_tf.text.augment import AugmentationConfig, BPEDropout
from gpt_tf.text.dataset import Windows
from gpt_tf.text.tokenizer import BPETokenizer, CharacterTokenizer, load_tokenizer
from gpt_tf.training import loop, preparation
from gpt_tf.training.config import TrainingConfig
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


count, seed32, seed64 = whole(1), whole(0, 2**32 - 1), whole(0, 2**64 - 1)
rate, share, positive = real(0, below=1), real(0, 1), real(above=0)
paths = either(path, many(path))
sampled = {
    "temperature": real(0),
    "top_k": either(count),
    "top_p": either(real(above=0, high=1)),
    "repetition_penalty": positive,
    "seed": either(whole(0, math.inf)),
}

TRAINING = {
    "corpus": lambda v: v is not None and paths(v),
    "tokenizer": path,
    "vocab_size": whole(1, 2**24),
    "validation_fraction": real(above=0, below=1),
    "validation": either(path),
    "separator": either(lambda v: text(v) and v != ""),
    "init_from": either(path),
    "embedding_dim": whole(4, 2**20),  # of the default's 4 heads
    "num_layers": whole(1, 1024),
    "num_heads": whole(1, 256),  # of the default's width
    "context_length": whole(1, 2**20),
    "feedforward_dim": either(count),
    "dropout": rate,
    "tie_embeddings": switch,
    "batch_size": whole(1, 2**20),
    "gradient_accumulation_steps": lambda v: count(v) and 16 % int(v) == 0,
    "steps": count,
    "learning_rate": positive,
    "final_learning_rate": either(real(0)),
    "warmup_steps": whole(),
    "weight_decay": real(0),
    "beta_2": rate,
    "global_clipnorm": positive,
    "seed": seed32,
    "validate_every": count,
    "validation_batches": either(count),
    "patience": whole(),
    "checkpoint_every": whole(),
    "keep_checkpoints": count,
    "sample_every": whole(),
    "sample_prompt": text,
    "precision": choice("float32", "mixed_bfloat16", "mixed_float16"),
    "jit_compile": choice("auto", "on", "off"),
    "strategy": choice("auto", "one_device", "mirrored", "multi_worker", "tpu"),
    "pipeline_stages": count,
    "micro_batches": count,
    "pipeline_schedule": choice("1f1b", "gpipe"),
    "mesh": either(choice("3")),
    "quantization": either(lambda v: False),  # without a model to begin with
    "distillation": either(lambda v: False),  # without a teacher
    "augmentation": either(fields(AugmentationConfig)),
}
DISTILLATION = {
    "teacher": either(path),
    "knowledge": either(path),
    **dict.fromkeys(
        "num_layers embedding_dim num_heads feedforward_dim vocab_size".split(),
        either(count),
    ),
    "layers": lambda v: isinstance(v, list | tuple) and many(whole())(v),
    "init": choice("teacher", "fresh"),
    "loss": lambda v: text(v) or v in ([], ()),
    "alpha": share,
    "temperature": positive,
    "on_policy_fraction": share,
    "written_tokens": whole(),
}
QUANTIZATION = {
    "weight_bits": whole(2, 8),
    "per_channel": switch,
    **dict.fromkeys(
        "inputs outputs residual scores softmax logits".split(),
        choice("float32", "int16", "int8"),
    ),
    "ema_decay": rate,
    "freeze_ranges_at": share,
    "calibration_batches": whole(),
    "calibration_method": choice("minmax", "percentile", "mse"),
}
AUGMENTATION = {
    "bpe_dropout": rate,
    "token_dropout": rate,
    "token_replacement": rate,
    "mix_documents": rate,
    "replacement": choice("unigram", "uniform"),
    "random_offsets": switch,
    "teacher": lambda v: v is None,  # without a number of tokens
    "written_tokens": whole(0, 0),
}
OPTIMIZATION = {
    "corpus": paths,
    "validation": lambda v: v is None,  # without a corpus
    "separator": lambda v: v is None,
    "model": either(path),
    "preset": choice("quickstart", "tiny", "shakespeare-char", "small"),
    "steps": either(count),
    "students": either(many(count)),
    "student_steps": either(count),
    "modes": lambda v: False,
    **dict.fromkeys("evaluated_tokens prompt_tokens new_tokens".split(), whole(2)),
    "repetitions": count,
    "explained_prompts": lambda v: whole(0, 0)(v) or whole(50)(v),
    "seed": seed32,
}


# What is called


@dataclasses.dataclass
class Target:
    """A call with good arguments, the rules of its settings, and where it is stopped.

    Args:
        call: Takes a setting by its name.
        rules: What is right, by setting.
        stop: An object and the name of its attribute whose call means acceptance.
    """

    call: object
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


def explained(**options):
    return attribution.explain(subject(), "the fox", **options)


def deleted(**options):
    prompts = [[1, 2, 3]] * 50
    return faithfulness.deletion_test(subject(), prompts, ["lime"], **options)


def written(**options):
    given = {"num_tokens": 9, **options}
    return next(generated_text.written_documents(model(), bpe(), IDS, **given), None)


def extracted(**options):
    tokens = SimpleNamespace()
    given = {"path": "store", "tokenizer": bpe(), **options}
    return teacher_cache.extract(model(), tokens, **given)


def kl(**options):
    return losses.jensen_shannon(np.zeros((1, 3)), np.ones((1, 3)), **options)


measured = {
    "prompt_tokens": count,
    "new_tokens": whole(2),
    "repetitions": count,
    "rounds": count,
    "threads": either(whole(1, 1024)),
    "contexts": either(many(count)),
    "thread_counts": either(many(count)),
    "engine": choice("gpt_tf", "litert-lm", "both"),
    "paths": many(path),
}
run_flags = {"resume": switch, "resume_or_start": switch, "overwrite": switch}

TARGETS = {
    "TrainingConfig": Target(TrainingConfig, TRAINING),
    "DistillationConfig": Target(DistillationConfig, DISTILLATION),
    "QuantizationConfig": Target(QuantizationConfig, QUANTIZATION),
    "AugmentationConfig": Target(AugmentationConfig, AUGMENTATION),
    "OptimizationConfig": Target(OptimizationConfig, OPTIMIZATION),
    "Budgets": Target(
        Budgets,
        {
            field.name: either(
                real(above=0, below=1 if "increase" in field.name else math.inf),
                choice(*([] if "increase" in field.name else ["3"])),
            )
            for field in dataclasses.fields(Budgets)
        },
    ),
    "objective_of": Target(
        lambda scenario="custom", prefer=None: objective_of(scenario, prefer),
        {"scenario": lambda v: False, "prefer": lambda v: v is None},
    ),
    "Sampler": Target(Sampler, sampled),
    "GPTModel": Target(
        lambda **o: GPTModel(**sizes(**o)),
        {
            "vocab_size": whole(1, 2**40),
            "embedding_dim": whole(2, 2**40),
            "num_layers": whole(1, 1024),
            "num_heads": whole(1, 8),
            "context_length": whole(1, 2**40),
            "feedforward_dim": either(whole(1, 2**40)),
            "dropout": rate,
            "tie_embeddings": switch,
            "layer_norm_epsilon": positive,
        },
        (gpt.placement, "plan_for"),
    ),
    "Dropout": Target(Dropout, {"rate": rate}),
    "AdamW": Target(
        AdamW,
        {
            "learning_rate": lambda v: callable(v) or real(0)(v),
            "weight_decay": either(real(0)),
            "beta_1": rate,
            "beta_2": rate,
            "epsilon": real(0),
            "global_clipnorm": either(real(0)),
        },
    ),
    "GPTModel.compile": Target(
        lambda **o: model().compile(**o),
        {"gradient_accumulation_steps": count, "jit_compile": either(switch)},
        (keras.Model, "compile"),
    ),
    "Distiller.compile": Target(
        lambda **o: pair().compile(**o),
        {
            "alpha": share,
            "temperature": positive,
            "on_policy_fraction": share,
            "on_policy_prompt_length": either(count),
            "on_policy_seed": whole(),
        },
        (losses, "get"),
    ),
    "losses.get": Target(
        losses.get, {"identifier": lambda v: v is None or callable(v)}
    ),
    "losses.jensen_shannon": Target(
        kl, {"temperature": positive, "weight": real(above=0, below=1)}
    ),
    "losses.SkewedKL": Target(losses.SkewedKL, {"skew": real(above=0, below=1)}),
    "losses.WeightedSum": Target(
        lambda weight: losses.WeightedSum([("forward_kl", weight)]),
        {"weight": positive},
    ),
    "losses.HiddenStates": Target(losses.HiddenStates, {"layer_map": many(anything)}),
    "make_student": Target(
        lambda **o: student.make_student(model(), **o),
        {
            "num_layers": either(whole(1, 2)),
            "embedding_dim": either(whole(1, 16)),
            "num_heads": anything,  # `GPTModel` checks these two
            "feedforward_dim": anything,
            "layers": many(whole(0, 1)),
            "init": choice("teacher", "fresh"),
            "seed": seed64,
        },
        (student, "strategy_scope"),
    ),
    "derive_tokenizer": Target(
        lambda vocab_size: derive_tokenizer(bpe(), vocab_size),
        {"vocab_size": whole(257, 270)},
    ),
    "extract": Target(
        extracted,
        {
            "path": path,
            "context_length": either(whole(1, 32)),
            "top_k": count,
            "passes": count,
            "batch_size": count,
            "seed": seed64,
            "overwrite": switch,
        },
        (teacher_cache, "_check_place"),
    ),
    "written_documents": Target(
        written,
        {
            "num_tokens": whole(),
            "prompt_length": whole(1, 31),
            "seed": seed64,
        },
        (cached_forward, "generate"),
    ),
    "calibrate": Target(
        lambda **o: calibration.calibrate(model(), IDS[None, :16], **o),
        {
            "batch_size": count,
            "method": choice("minmax", "percentile", "mse"),
            "percentile": real(above=50, high=100),
            "num_batches": either(count),
            "dtype": lambda v: callable(v) or choice("int8", "int16")(v),
        },
        (calibration, "_extremes"),
    ),
    "quantize_array": Target(
        lambda **o: quantize_array(np.eye(4), **o),
        {"bits": whole(2, 8), "axis": either(whole(-2, 1))},
    ),
    "quantize_weights": Target(
        lambda **o: quantize_weights(model(), **o),
        {"strategy": lambda v: False, "bits": whole(2, 8)},
    ),
    "Pipeline": Target(
        lambda **o: pipeline.Pipeline(**{"num_stages": 2, **o}),
        {
            "num_stages": whole(1, 4),
            "micro_batches": count,
            "schedule": choice("1f1b", "gpipe"),
            "devices": lambda v: v is None,
        },
    ),
    "make_mesh": Target(make_mesh, dict.fromkeys(["batch", "model"], whole(1, 4))),
    "parse_mesh": Target(parse_mesh, {"text": choice("3")}),
    "split_cpu": Target(data.split_cpu, {"num_devices": whole(4, 4)}),
    "make_strategy": Target(data.make_strategy, {"name": lambda v: False}),
    "run": Target(
        lambda **o: cluster.run(
            loop.train, **{"out": "a", "workers": 1, "address": "a:1", **o}
        ),
        {"out": path, "workers": whole(1, 4096), "max_restarts": whole()},
        (cluster, "_check_address"),
    ),
    "Windows": Target(
        windows,
        {
            "context_length": whole(1, len(IDS) - 1),
            "batch_size": count,
            "seed": seed64,
            "shuffle": switch,
            "augmentation": either(fields(AugmentationConfig)),
        },
    ),
    "Windows.batch": Target(
        lambda **o: windows().batch(**{"step": 0, **o}),
        {"step": whole(), "shard": whole(0, 0), "num_shards": whole(1, 2)},
    ),
    "Windows.dataset": Target(
        lambda **o: windows().dataset(**o),
        {
            "start_step": whole(),
            "num_steps": either(whole()),
            "repeat": switch,
            "num_shards": whole(1, 2),
            "shard": whole(0, 0),
        },
    ),
    "BPEDropout": Target(lambda rate: BPEDropout(bpe(), rate), {"rate": share}),
    "BPEDropout.encode": Target(
        lambda **o: BPEDropout(bpe(), 0.5).encode(**{"text": "fox", **o}),
        {"text": text, "seed": seed64},
    ),
    "BPETokenizer.train": Target(
        lambda **o: BPETokenizer.train(**{"texts": TEXT, "vocab_size": 258, **o}),
        {"texts": many(text), "vocab_size": whole(257, 300)},
    ),
    "CharacterTokenizer.train": Target(
        lambda **o: CharacterTokenizer.train(TEXT, **o), {"end_of_text": switch}
    ),
    "Tokenizer.encode": Target(lambda text: bpe().encode(text), {"text": text}),
    "Tokenizer.decode": Target(
        lambda ids: bpe().decode(ids), {"ids": many(whole(0, 269))}
    ),
    "load_tokenizer": Target(load_tokenizer, {"path": lambda v: False}),
    "open_corpus": Target(
        lambda **o: corpora.open_corpus(**{"source": "python-stdlib", **o}),
        {
            "source": lambda v: v is not None and paths(v),
            "validation_fraction": real(above=0, below=1),
            "validation": either(path),
            "separator": either(lambda v: text(v) and v != ""),
            "whole": switch,
        },
        (corpora, "_without_copies"),
    ),
    "held_out_text": Target(
        held_out_text,
        {"whole": switch},
        (corpora, "_without_copies"),
    ),
    "generate": Target(
        lambda **o: cached_forward.generate(model(), **{"prompt": [1], **o}),
        {
            **sampled,
            "prompt": many(whole(0, 269)),
            "max_new_tokens": whole(),
            "stop": lambda v: many(text)(v) and not list(v),
            "stream": switch,
            "tokenizer": lambda v: v is None,
        },
        (cached_forward, "_continue"),
    ),
    "EdgeGPT": Target(
        lambda **o: EdgeGPT(**{"path": "a.litertlm", **o}),
        {
            "num_threads": either(whole(1, 1024)),
            "when_full": choice("slide", "stop"),
        },
        (runtime, "open_artefact"),
    ),
    "EdgeGPT of no file": Target(EdgeGPT, {"path": lambda v: False}),
    "EdgeScheduler": Target(
        scheduler,
        {
            "max_chunk": count,
            "chunked": switch,
            "max_active": count,
            "patience": count,
            "num_threads": lambda v: v is None,
            "when_full": lambda v: False,
        },
    ),
    "KerasGPT.logits": Target(
        lambda ids: KerasGPT(model()).logits(ids), {"ids": many(whole(0, 269))}
    ),
    "export_tflite": Target(
        lambda **o: tflite.export_tflite(
            model(), **{"path": "a.tflite", "allow_untrained": True, **o}
        ),
        {
            "path": lambda v: False,
            "mode": lambda v: False,
            "context_length": either(whole(2, 32)),
            "prefill_lengths": many(count),
            "per_channel": either(switch),
            "allow_untrained": switch,
        },
        (tflite, "ids_without_token"),
    ),
    "export_litertlm": Target(
        lambda **o: litertlm.export_litertlm(
            model(), **{"tokenizer": bpe(), "path": "a.litertlm", **o}
        ),
        {"path": lambda v: False, "tokenizer": lambda v: False},
        (tflite, "export_tflite"),
    ),
    "export_trained": Target(
        lambda **o: from_run.export_trained(**{"source": "a", "out": "a.tflite", **o}),
        {"source": path, "out": lambda v: False},
        (from_run, "load_model"),
    ),
    "train": Target(
        loop.train,
        {
            "config": either(fields(TrainingConfig)),
            "out": path,
            **run_flags,
            "verbose": switch,
            **{name: TRAINING[name] for name in ("steps", "learning_rate", "corpus")},
        },
        (loop, "_division_of"),
    ),
    "quantize": Target(loop.quantize, {"source": lambda v: False}),
    "distil": Target(loop.distil, {"teacher": lambda v: False}),
    "optimize": Target(
        optimization.optimize,
        {
            "config": either(fields(OptimizationConfig)),
            "out": path,
            "update": switch,
            "overwrite": switch,
            "command": either(text),
        },
        (optimization, "_refuse_foreign_folder"),
    ),
    "evaluate_files": Target(
        lambda **o: accuracy.evaluate_files(**{"paths": ["a"], **o}),
        {
            "paths": many(path),
            "whole": switch,
            "reference": either(path),
            "max_tokens": either(whole(2)),
            "parse": either(switch),
            "completions": count,
            "seed": whole(),
        },
        (accuracy, "open_model"),
    ),
    "block_bootstrap": Target(
        lambda **o: accuracy.block_bootstrap([[1]], lambda s: s[..., 0], **o),
        {"samples": count, "seed": seed32},
        (accuracy.np.random, "default_rng"),
    ),
    "measure_files": Target(
        lambda **o: latency.measure_files(**{"paths": ["a.tflite"], **o}),
        measured,
        (latency, "_describe_files"),
    ),
    "find_prompts": Target(
        lambda **o: parsings.find_prompts("text", **o),
        {"count": count, "seed": whole()},
        (parsings.HeldOutText, "of"),
    ),
    "explain": Target(
        explained,
        {
            "method": lambda v: False,
            "num_samples": either(whole(30, 2**20)),
            "seed": seed32,
            "neutral": either(whole(0, 269), lambda v: v in ("3", b"x")),
            "target": either(whole(0, 269), lambda v: v in ("3", b"x")),
        },
        (attribution, "_METHODS"),
    ),
    "deletion_test": Target(
        deleted,
        {
            "fraction": real(above=0, below=1),
            "keep_last": switch,
            "seed": seed32,
        },
        (faithfulness, "neutral_token"),
    ),
    "prompts_of": Target(
        lambda **o: faithfulness.prompts_of(IDS, **{"count": 1, "num_tokens": 2, **o}),
        {"count": whole(1, 200), "num_tokens": whole(1, 400)},
    ),
    "estimate": Target(
        lambda **o: estimate.estimate(
            **{"config": model().get_config(), "mode": "float32", "machine": {}, **o}
        ),
        {
            "config": lambda v: False,
            "mode": lambda v: False,
            "machine": lambda v: isinstance(v, dict),
            "threads": either(whole(1, 1024)),
            "kind": choice("litertlm", "tflite"),
        },
        (estimate, "read_rate"),
    ),
    "measure_read_rate": Target(
        hardware.measure_read_rate,
        {"threads": whole(1, 1024), "seconds": real(0, 3600)},
        (hardware.psutil, "virtual_memory"),
    ),
    "extract_knowledge": Target(
        lambda **o: loop.extract_knowledge(**{"teacher": "a", "path": "b", **o}),
        {"teacher": lambda v: False},
        (preparation, "store_knowledge"),
    ),
}


def try_all(target, monkeypatch):
    """Return what is wrong: bare errors, and what was accepted and is not right."""
    found = []
    if target.stop is not None:
        stop(*target.stop, monkeypatch)
    for name, rule in target.rules.items():
        for value in WRONG:
            said = repr(value)[:40]
            try:
                target.call(**{name: value})
            except Accepted:
                pass
            except InputError as error:
                if "\n" in str(error) or len(str(error)) > 1000:
                    found.append(f"{name}={said}: no line of its own")
                continue
            except Exception as error:
                found.append(f"{name}={said}: {type(error).__name__}: {error}"[:200])
                continue
            if not rule(value):
                found.append(f"{name}={said} was accepted")
    return found


class Methods(dict):
    """A table of methods each of which means acceptance."""

    def __getitem__(self, name):
        raise Accepted


def stop(owner, name, monkeypatch):
    """Let a call, or any method of a table, mean acceptance."""

    def accept(*args, **kwargs):
        raise Accepted

    table = Methods() if isinstance(getattr(owner, name), dict) else accept
    monkeypatch.setattr(owner, name, table)


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


def test_two_thousand_settings_are_tried_and_of_every_configuration_all():
    tried = sum(len(target.rules) for target in TARGETS.values()) * len(WRONG)
    assert tried >= 2000
    for kind in (
        *(TrainingConfig, DistillationConfig, QuantizationConfig),
        *(AugmentationConfig, OptimizationConfig),
    ):
        assert set(TARGETS[kind.__name__].rules) == set(fields_of(kind))


def test_a_setting_without_a_check_is_found(monkeypatch):
    def unchecked(size=1):
        return [0] * size if size != 3 else None

    found = try_all(Target(unchecked, {"size": count}), monkeypatch)
    assert any("TypeError" in line for line in found)
    assert any("-1 was accepted" in line for line in found)


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
            for value in TYPED if option.nargs and not is_switch(option) else ():
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


def is_switch(option):
    return bool(option.secondary_opts) or getattr(option, "is_flag", False)
