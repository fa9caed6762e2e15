"""Training: the one place that knows optimiser, schedule, callbacks and resume.

A run is a folder. Everything that decides its course is in `run.json`; the tokens
lie in `data/`; each checkpoint holds the weights, the optimiser's state, the random
state and the step, from which the position in the data follows. So a run that was
killed goes on from its newest good checkpoint exactly as if nothing had happened.

What a run's folder holds is told in `runs`.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.numpy
import tensorflow as tf
import tf_keras as keras

from gpt_tf import artifacts
from gpt_tf.distillation.config import DistillationConfig
from gpt_tf.distillation.distiller import Distiller
from gpt_tf.distillation.teacher_cache import KnowledgeStore
from gpt_tf.errors import DamagedFileError, InputError, TrainingDivergedError
from gpt_tf.models.checks import refuse_keras_3
from gpt_tf.models.gpt import GPTModel
from gpt_tf.models.interop import read_safetensors
from gpt_tf.models.optimizer import AdamW
from gpt_tf.models.precision import precision
from gpt_tf.parallel import data as strategies
from gpt_tf.parallel.config import parse_mesh
from gpt_tf.parallel.mesh import check_divides, check_fits, make_mesh
from gpt_tf.parallel.mesh_gpt import MeshGPT
from gpt_tf.parallel.pipeline import Pipeline
from gpt_tf.quantization.config import QuantizationConfig
from gpt_tf.settings import arguments
from gpt_tf.settings.configuration import differences
from gpt_tf.text import tokenizer as tokenizers
from gpt_tf.text.dataset import TokenFile
from gpt_tf.training import preparation
from gpt_tf.training.config import TrainingConfig
from gpt_tf.training.run_folder import (
    OWN_ENTRIES,
    PLACEMENT,
    copy_of,
    load_model,
    model_file,
    read_run,
    save_model,
    windows_of,
)


@keras.saving.register_keras_serializable(package="gpt_tf")
class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that rises linearly and then falls along a cosine.

    Args:
        peak: Largest learning rate.
        final: Learning rate at `total_steps` and after.
        warmup_steps: Steps of the rise.
        total_steps: Steps of the whole course.

    Reference: Loshchilov and Hutter, "SGDR", arXiv:1608.03983.
    """

    def __init__(self, peak, final, warmup_steps, total_steps):
        self.peak = peak
        self.final = final
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps

    def __call__(self, step):
        step = tf.cast(step, tf.float32)
        rise = (step + 1.0) / max(1, self.warmup_steps)
        span = max(1, self.total_steps - self.warmup_steps)
        done = tf.clip_by_value((step - self.warmup_steps) / span, 0.0, 1.0)
        fall = self.final / self.peak + (1.0 - self.final / self.peak) * 0.5 * (
            1.0 + tf.cos(math.pi * done)
        )
        return self.peak * tf.where(step < self.warmup_steps, rise, fall)

    def get_config(self):
        return {
            "peak": self.peak,
            "final": self.final,
            "warmup_steps": self.warmup_steps,
            "total_steps": self.total_steps,
        }


# What history.json holds.
HISTORY = {key: [{"step": int, str: float}] for key in ("steps", "validations")}


@dataclasses.dataclass
class TrainingResult:
    """What a training run leaves in memory.

    Attributes:
        model: The trained GPTModel, or `QuantizationAwareGPT`.
        tokenizer: Its tokenizer.
        history: Measurements by step, as in `history.json`.
        out: The run's folder.
        validation_loss: Nats per token of the kept weights, or None.
    """

    model: GPTModel
    tokenizer: tokenizers.Tokenizer
    history: dict
    out: Path
    validation_loss: float | None

    @property
    def validation_perplexity(self):
        return (
            None
            if self.validation_loss is None
            else math.exp(min(self.validation_loss, 700.0))
        )


def train(
    config: TrainingConfig | None = None,
    out: str | Path = "runs/gpt",
    *,
    resume: bool = False,
    resume_or_start: bool = False,
    overwrite: bool = False,
    callbacks=(),
    verbose: bool = True,
    on_notice: Callable[[str], None] | None = None,
    **changes,
) -> TrainingResult:
    """Train a GPT on a corpus, or go on with a run that was interrupted.

    Args:
        config: The course of training; `TrainingConfig()` unless given.
        out: Folder of the run.
        resume: Go on with the run in `out`, from its newest checkpoint. The
            configuration is the run's own, but for `steps`: with more than the run's
            it goes on up to these, even if it was finished. From there on the learning
            rate is that of a run of so many steps, so it may rise again; nothing that
            was computed before is computed anew. A run that `patience` has ended stays
            ended.
        resume_or_start: Go on with the run in `out` if there is one, of this very
            configuration; else start it. A run that is finished is only loaded. So a
            command that is started again after every failure comes to its end.
        overwrite: Replace a run that stands in `out`. Files that gpt_tf did not
            write stay.
        callbacks: More tf_keras callbacks.
        verbose: Whether progress is shown.
        on_notice: Takes one-line notices; they are printed unless given.
        **changes: Fields of `TrainingConfig` to replace.

    Returns:
        A `TrainingResult`.

    Raises:
        InputError: The corpus, the configuration or the folder cannot be used.
            Nothing is then overwritten.
        TrainingDivergedError: The loss or the weights came to contain NaN or infinity.
            The checkpoints before that stay, and no model is written.
        DamagedFileError: No good checkpoint or token file is left to resume from.
        PeerLostError: Another worker of the strategy `multi_worker` is gone.

    Example:
        >>> result = train(PRESETS["tiny"], "runs/tiny")
    """
    notice = on_notice or print
    out = arguments.path("out", out)
    resume = arguments.switch("resume", resume)
    resume_or_start = arguments.switch("resume_or_start", resume_or_start)
    overwrite = arguments.switch("overwrite", overwrite)
    verbose = arguments.switch("verbose", verbose)
    for callback in callbacks:
        refuse_keras_3(callback, "callbacks")
    if resume_or_start and (resume or overwrite):
        raise InputError(
            "--resume-or-start finds out itself whether a run stands there. Received: "
            f"{'--resume' if resume else '--overwrite'} with it. Choose one."
        )
    if resume:
        others = changes.keys() - {*PLACEMENT, "steps"}
        if others:
            raise InputError(
                "A resumed run keeps its own configuration, but for `steps` and what "
                f"says where it is computed: `{'`, `'.join(PLACEMENT)}`. "
                f"Received: `{'`, `'.join(sorted(others))}`. Start a new run for these."
            )
        before = read_run(out)
        config = dataclasses.replace(before, **changes)
        if config.steps < before.steps:
            raise InputError(
                f"`steps` of a resumed run expects {before.steps}, the run's own, or "
                f"more. Received: {config.steps}. Start a new run for fewer."
            )
    else:
        config = dataclasses.replace(TrainingConfig.of(config), **changes)
        if resume_or_start and (finished := _finished(config, out)) is not None:
            notice(f"the run in {out} is finished")
            return finished
    division = _division_of(config)
    strategy = tf.distribute.get_strategy()
    if division is None:
        strategy = strategies.make_strategy(config.strategy)
    with (
        strategies.watched(strategy),
        precision(config.precision),
        contextlib.ExitStack() as stack,
    ):
        _check_division(config, strategy.num_replicas_in_sync)
        # Of several workers the chief keeps other processes out of the folder.
        lock = artifacts.locked(out, OWN_ENTRIES)
        strategies.on_chief(strategy, lambda: stack.enter_context(lock))
        if resume_or_start:
            _start_run_unless_there(config, out, strategy, notice)
        elif resume:
            strategies.on_chief(strategy, lambda: _extend(out, config.steps))
        else:
            _start_run(config, out, overwrite, strategy, notice)
        if not resume:
            config = read_run(out)  # with the shape of the model that it starts from
        return _Run(config, out, strategy, division, notice, verbose).train(
            list(callbacks), resume or resume_or_start
        )


def _division_of(config):
    """Return the pipeline or the mesh that a model is divided by, or None.

    Before TensorFlow is used otherwise: the CPU may have to be split for it.
    """
    if config.pipeline_stages == 1 and config.mesh is None:
        return None
    if os.environ.get("TF_CONFIG"):
        raise InputError(
            "Layers, weights and positions are divided among the devices of one "
            "process. Received: a cluster in TF_CONFIG. Unset it, or leave out "
            "`pipeline_stages` and `mesh`."
        )
    sizes = dataclasses.asdict(config)
    sizes["feedforward_dim"] = config.feedforward_dim or 4 * config.embedding_dim
    if config.mesh is not None:
        mesh = make_mesh(**parse_mesh(config.mesh))
        check_divides(mesh, (config.batch_size, config.context_length))
        if config.init_from is None:
            check_fits(mesh, sizes)
        return mesh
    pipeline = Pipeline(
        config.pipeline_stages, config.micro_batches, config.pipeline_schedule
    )
    if config.init_from is None:
        pipeline.plan(sizes)
    return pipeline


def _check_division(config, replicas):
    if config.batch_size % (replicas * config.gradient_accumulation_steps):
        raise InputError(
            "`batch_size` is divided among replicas and accumulation steps. "
            f"Received: {config.batch_size} for {replicas} replicas and "
            f"{config.gradient_accumulation_steps} accumulation steps. "
            "Use a multiple of their product."
        )


def quantize(
    source: str | Path | None,
    out: str | Path = "runs/gpt-qat",
    quantization: QuantizationConfig | dict | None = None,
    *,
    resume: bool = False,
    resume_or_start: bool = False,
    overwrite: bool = False,
    callbacks=(),
    verbose: bool = True,
    on_notice: Callable[[str], None] | None = None,
    **changes,
) -> TrainingResult:
    """Train a trained model further, as one that will be quantised.

    Ranges are calibrated on the training text first. Then weights and ranges are
    trained for a tenth of the steps of the source's run, from a twentieth of its
    learning rate down to 0; `changes` say otherwise. The text is the source's, read as
    it stands unless `augmentation` is among the changes.

    Args:
        source: A run's folder, or that of a model or a `.keras` file, for which
            `corpus` has to be given. Not needed with `resume`.
        out: Folder of the new run.
        quantization: What becomes integers; `QuantizationConfig()` unless given.
        resume: As for `train`.
        resume_or_start: As for `train`.
        overwrite: As for `train`.
        callbacks: As for `train`.
        verbose: As for `train`.
        on_notice: As for `train`.
        **changes: Fields of `TrainingConfig` to set.

    Returns:
        A `TrainingResult` whose model is a `QuantizationAwareGPT`.

    Raises:
        InputError: There is no trained model, or as for `train`.
        TrainingDivergedError: As for `train`.
        DamagedFileError: As for `train`.

    Example:
        >>> result = quantize("runs/tiny", "runs/tiny-qat", steps=10)

    Reference: the rate and the length are those of Wu et al., "Integer Quantization
    for Deep Learning Inference", arXiv:2004.09602, section 5.2.
    """
    options = {
        "overwrite": overwrite,
        "resume_or_start": resume_or_start,
        "callbacks": callbacks,
        "verbose": verbose,
        "on_notice": on_notice,
    }
    if resume:
        return _resume(out, options, changes, quantization=quantization)
    fields = QuantizationConfig.of(quantization).get_config()
    return train(_course_after(source, fields, changes), out, **options)


def _resume(out, options, changes, **wanted):
    """Go on with a run, which refuses whatever else is asked for."""
    given = {name: value for name, value in wanted.items() if value is not None}
    return train(None, out, resume=True, **options, **given, **changes)


def _course_of(source, changes, what, role="model"):
    """Return the configuration of the run that trained a model."""
    if source is None:
        raise InputError(
            f"{what} expects a trained {role}. Received: none. Name the folder "
            "that `gpt-tf train` wrote."
        )
    source = arguments.path("source", source)
    if (source / "run.json").is_file():
        before = read_run(source)
        if "corpus" in changes:  # what its own text was divided by goes with it
            return dataclasses.replace(before, validation=None, separator=None)
        return before
    if not model_file(source).is_file():
        raise InputError(
            f"{what} expects a trained {role}. Received: {source}; there is none. "
            "Name the folder that `gpt-tf train` wrote."
        )
    if "corpus" in changes:
        return TrainingConfig()
    raise InputError(
        f"{what} expects the run that trained the model, for its text. "
        f"Received: {source}, without run.json. Name the text with `corpus`."
    )


def _course_after(source, quantization, changes):
    """Return the configuration of a run that quantises the model of `source`."""
    before = _course_of(source, changes, "Quantisation")
    steps = changes.get("steps", max(1, before.steps // 10))
    course = {
        "steps": steps,
        "learning_rate": before.learning_rate / 20,
        "final_learning_rate": 0.0,
        "warmup_steps": steps // 20,
        "patience": 0,
        "precision": "float32",
        "init_from": str(Path(source).absolute()),
        "quantization": quantization,
        "distillation": None,
        "augmentation": None,
    }
    return dataclasses.replace(before, **{**course, **changes})


def distil(
    teacher: str | Path | None,
    out: str | Path = "runs/gpt-student",
    distillation: DistillationConfig | dict | None = None,
    *,
    resume: bool = False,
    resume_or_start: bool = False,
    overwrite: bool = False,
    callbacks=(),
    verbose: bool = True,
    on_notice: Callable[[str], None] | None = None,
    **changes,
) -> TrainingResult:
    """Train a small GPT on a text and on what a large one makes of it.

    The student is cut from the teacher, or is the model of `init_from`. The course is
    that of the teacher's run, and so is the text, but for its augmentation; `changes`
    say otherwise.

    Args:
        teacher: The run's folder of the teacher, or that of a model or a `.keras`
            file, for which `corpus` has to be given. Not needed with `resume`.
        out: Folder of the new run.
        distillation: `DistillationConfig`, or a dict of its fields.
        resume: As for `train`.
        resume_or_start: As for `train`.
        overwrite: As for `train`.
        callbacks: As for `train`.
        verbose: As for `train`.
        on_notice: As for `train`.
        **changes: Fields of `TrainingConfig` to set.

    Returns:
        A `TrainingResult` whose model is the student.

    Raises:
        InputError: There is no teacher, teacher and student do not fit each other, or
            as for `train`.
        TrainingDivergedError: As for `train`.
        DamagedFileError: As for `train`.

    Example:
        >>> result = distil("runs/tiny", "runs/student", {"num_layers": 1})

    Reference: article 3.3.
    """
    options = {
        "overwrite": overwrite,
        "resume_or_start": resume_or_start,
        "callbacks": callbacks,
        "verbose": verbose,
        "on_notice": on_notice,
    }
    if resume:
        return _resume(out, options, changes, distillation=distillation)
    before = _course_of(teacher, changes, "Distillation", "teacher")
    wanted = DistillationConfig.of(distillation)
    wanted = dataclasses.replace(
        wanted,
        teacher=str(Path(teacher).absolute()),
        knowledge=wanted.knowledge and str(Path(wanted.knowledge).absolute()),
    )
    course = {"init_from": None, "quantization": None, "patience": 0, "dropout": 0.0}
    course["augmentation"] = None
    if changes.get("quantization") is not None:
        course["precision"] = "float32"
    course["distillation"] = wanted.get_config()
    config = dataclasses.replace(before, **{**course, **changes})
    return train(config, out, **options)


def extract_knowledge(
    teacher: str | Path,
    path: str | Path,
    *,
    vocab_size: int | None = None,
    top_k: int = 32,
    passes: int = 1,
    overwrite: bool = False,
    on_notice: Callable[[str], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    **changes,
) -> KnowledgeStore:
    """Store what a teacher says of its training text, for students to come.

    Args:
        teacher: As for `distil`.
        path: Folder of the store.
        vocab_size: Size of the student's vocabulary, with a tokenizer derived from the
            teacher's; the teacher's own unless given.
        top_k: As for `gpt_tf.distillation.teacher_cache.extract`.
        passes: As for `gpt_tf.distillation.teacher_cache.extract`.
        overwrite: Whether a store that stands at `path` is replaced.
        on_notice: As for `train`.
        on_progress: As for `gpt_tf.distillation.teacher_cache.extract`.
        **changes: Fields of `TrainingConfig` to set: `corpus`, `context_length`.

    Returns:
        The store, opened.

    Raises:
        InputError: There is no teacher or no text, or a number is out of its range.
    """
    if changes.get("augmentation") is not None:
        raise InputError(
            "Knowledge is stored of the text as it stands. Received: `augmentation`. "
            "Leave it out, or let the teacher run along."
        )
    before = _course_of(teacher, changes, "Extraction", "teacher")
    path_of_teacher = str(Path(teacher).absolute())
    wanted = DistillationConfig(teacher=path_of_teacher, vocab_size=vocab_size)
    config = dataclasses.replace(
        before,
        **{
            "distillation": wanted.get_config(),
            "init_from": None,
            "augmentation": None,
            **changes,
        },
    )
    return preparation.store_knowledge(
        config,
        path,
        top_k=top_k,
        passes=passes,
        overwrite=overwrite,
        on_notice=on_notice or print,
        on_progress=on_progress,
    )


@contextlib.contextmanager
def _keras_not_comparing_speeds():
    """Keep Keras from remarking that a callback takes longer than a step.

    With a small model, drawing progress or writing a checkpoint does.
    """

    def keep(record):
        return "is slow compared to the batch time" not in record.getMessage()

    logger = tf.get_logger()
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _start_run(config, out, overwrite, strategy, notice):
    """Let the chief prepare the run, from which all workers then read."""
    strategies.on_chief(
        strategy, lambda: preparation.prepare(config, out, overwrite, notice)
    )
    _check_shared(out)


def _start_run_unless_there(config, out, strategy, notice):
    """Let the chief prepare the run if none stands in its folder."""

    def prepare():
        if (out / "run.json").is_file():
            _check_same(config, out)
            return
        # A folder of nothing but our own files has lost its run.json.
        is_ours = artifacts.entries(out) <= set(OWN_ENTRIES)
        preparation.prepare(config, out, is_ours, notice)

    strategies.on_chief(strategy, prepare)
    _check_shared(out)


def _extend(out, steps):
    """Let a run go on for more steps than it was started with."""
    run = artifacts.read_json(out / "run.json")
    if steps > run["config"]["steps"]:
        run["config"]["steps"] = steps
        run.pop("sha256", None)
        artifacts.write_sealed_json(out / "run.json", run)


def _check_same(config, out):
    """Refuse a run that has another configuration than the one asked for."""
    old, new = (dataclasses.asdict(c) for c in (read_run(out), config))
    if config.init_from is not None or config.distillation is not None:
        for name in preparation.SHAPE:
            del old[name], new[name]
    if old != new:
        raise InputError(
            f"The run in {out} expects the configuration that it was started with. "
            f"Received: another one. It has {differences(old, new)}. Give these "
            "again, or choose another folder."
        )


def _finished(config, out):
    """Return the result of the run in a folder if it is finished, else None."""
    if not (out / "run.json").is_file() or not artifacts.is_settled(out):
        return None
    _check_same(config, out)
    try:
        facts = artifacts.check_manifest(out / "model", "model", verify=False)
        shape = {"made_from?": dict, "validation_loss?": (float, None)}
        artifacts.check_shape(facts, shape, out / "model" / artifacts.MANIFEST_NAME)
        if facts.get("made_from", {}).get("run") != artifacts.sha256_of(
            out / "run.json"
        ):
            return None
        history = artifacts.read_json(out / "history.json", HISTORY)
        model, tokenizer = load_model(out)
    except DamagedFileError:  # it can be made again from the last checkpoint
        return None
    loss = facts.get("validation_loss")
    return TrainingResult(model, tokenizer, history, out, loss)


def _check_shared(out):
    if not (out / "run.json").is_file():
        raise InputError(
            f"This worker expects the run that the chief prepared in {out}; there is "
            "none. Name a folder that all workers share."
        )


# Running


class _Run:
    """A run in progress: model, data and the state that checkpoints hold."""

    def __init__(self, config, out, strategy, division, notice, verbose):
        self.config = config
        self.out = out
        self.strategy = strategy
        self.division = division
        self.notice = notice
        self.verbose = verbose
        self.is_chief = strategies.is_chief(strategy)
        # Somebody may remove it meanwhile; what was trained is written even so.
        self.run_json = (out / "run.json").read_bytes()
        run = artifacts.read_json(out / "run.json", {"made_from?": {str: str}})
        self.made_from = run.get("made_from", {})
        self.tokenizer = tokenizers.load_tokenizer(out)
        self.windows = {
            split: windows_of(
                TokenFile.open(out / "data" / f"{split}.tokens"),
                config,
                shuffle=split == "train",
                tokenizer=self.tokenizer,
            )
            for split in ("train", "validation")
        }
        for windows in self.windows.values():
            self._check_tokens(windows.token_file)
        self.distillation = config.distillation and DistillationConfig.of(
            config.distillation
        )
        self.knowledge = self._open_knowledge()
        if self.knowledge is not None:
            self.windows["train"] = self.knowledge.windows(
                self.windows["train"].token_file,
                config.batch_size,
                context_length=config.context_length,
                seed=config.seed,
            )
        self.step = 0
        self.loss = None  # of the last step
        self.tokens_per_step = config.batch_size * config.context_length
        self.history = {"steps": [], "validations": []}
        self.best = {"loss": None, "step": 0, "waited": 0}
        self.best_weights = None
        self.model = self._build()

    @property
    def trained(self):
        """The model that is trained and shipped: of a Distiller, its student."""
        return getattr(self.model, "student", self.model)

    @property
    def own_loss(self):
        """What Keras calls the trained model's own loss in nats per token."""
        return "loss" if self.distillation is None else "student_loss"

    def _open_knowledge(self):
        if self.distillation is None:
            return None
        path = self.distillation.knowledge
        if path is None and (self.out / "knowledge").is_dir():
            path = self.out / "knowledge"
        if path is None:
            return None
        knowledge = KnowledgeStore.open(path)
        knowledge.check_fits(
            token_file=self.windows["train"].token_file, tokenizer=self.tokenizer
        )
        return knowledge

    def _check_tokens(self, token_file):
        token_file.check_fits(self.tokenizer.vocab_size)
        written_with = token_file.manifest.get("tokenizer_fingerprint")
        if written_with != self.tokenizer.fingerprint():
            raise InputError(
                f"{token_file.path} expects the tokenizer that it was written with. "
                f"Received: another one in {self.out}. Put the right tokenizer.json "
                "back, or start again with --overwrite."
            )

    def _build(self):
        config = self.config
        keras.utils.set_random_seed(config.seed)
        final = config.final_learning_rate
        schedule = WarmupCosine(
            config.learning_rate,
            config.learning_rate / 10 if final is None else final,
            config.warmup_steps,
            config.steps,
        )
        with self.strategy.scope():
            trained = self._new_divided_model()
            model, losses = trained, {}
            if self.distillation is not None:
                model = Distiller(teacher=self._load_teacher(), student=trained)
                losses = self.distillation.compile_arguments()
                losses["on_policy_seed"] = config.seed
            optimizer = AdamW(
                schedule,
                weight_decay=config.weight_decay,
                beta_2=config.beta_2,
                global_clipnorm=config.global_clipnorm,
            )
            model.compile(
                optimizer=optimizer,
                jit_compile={"auto": "auto", "on": True, "off": False}[
                    config.jit_compile
                ],
                gradient_accumulation_steps=config.gradient_accumulation_steps,
                **losses,
            )
            model.optimizer.build(model.trainable_variables)
            if hasattr(trained, "freeze_ranges"):
                share = trained.quantization.freeze_ranges_at
                trained.freeze_ranges(None if share == 1 else int(share * config.steps))
        return model

    def _load_teacher(self):
        """Load the teacher under the strategy's scope, if it is to run along."""
        if self.knowledge is not None:
            return None
        path = self.distillation.teacher
        if artifacts.sha256_of(model_file(path)) != self.made_from.get("teacher"):
            raise InputError(
                f"The student in {self.out} expects the teacher that it began with. "
                f"Received: another model in {path}. Put the first one back, or start "
                "again with --overwrite."
            )
        teacher, _ = load_model(path)
        return copy_of(teacher)

    def _new_divided_model(self):
        """Build the model, its layers or weights on the devices that they belong to."""
        if isinstance(self.division, Pipeline):
            with self.division.scope():
                return self._new_model()
        model = self._new_model()
        return model if self.division is None else MeshGPT(model, self.division)

    def _new_model(self):
        """Build the model that training starts from, under the strategy's scope."""
        config = self.config
        if config.init_from is None and config.distillation is None:
            return GPTModel(
                self.tokenizer.vocab_size,
                config.embedding_dim,
                config.num_layers,
                config.num_heads,
                context_length=config.context_length,
                feedforward_dim=config.feedforward_dim,
                dropout=config.dropout,
                tie_embeddings=config.tie_embeddings,
            )
        initial, _ = load_model(self.out / "initial")
        return copy_of(initial)

    def train(self, callbacks, resume):
        if resume:
            self._restore_newest()
        own = [_Recorder(self), _Checkpointer(self)]
        if self.config.sample_every:
            own.append(_Sampler(self))
        if self.is_chief:
            own.append(
                keras.callbacks.TensorBoard(
                    str(self.out / "logs"), update_freq=10, profile_batch=0
                )
            )
        if not (self.verbose and self.is_chief):
            with _keras_not_comparing_speeds():
                self._fit(own + callbacks)
            return self._finish()
        from gpt_tf.progress import TrainingProgress

        progress = TrainingProgress(self)
        try:
            with _keras_not_comparing_speeds():
                self._fit([*own, progress, *callbacks])
        finally:
            progress.close()
        return self._finish()

    def _fit(self, callbacks):
        validation = self._distribute(
            lambda shards, shard: self.windows["validation"].dataset(
                repeat=False,
                num_steps=self._validation_steps(),
                num_shards=shards,
                shard=shard,
            )
        )
        self.model.stop_training = False
        if self._stopped_early():
            self.notice("validation had not improved any more: the run stays ended")
            return
        for start, stop, length in self._segments():
            first = start // self.config.validate_every
            self.model.fit(
                self._distribute(
                    lambda shards, shard, start=start: self.windows["train"].dataset(
                        start_step=start, num_shards=shards, shard=shard
                    )
                ),
                initial_epoch=first,
                epochs=first + (stop - start) // length,
                steps_per_epoch=length,
                validation_data=validation,
                validation_steps=self._validation_steps(),
                callbacks=callbacks,
                verbose=0,
            )
            if self.model.stop_training:
                break

    def _stopped_early(self):
        return 0 < self.config.patience <= self.best["waited"]

    def _segments(self):
        """Yield (start, stop, epoch length) of the calls of `fit` that are left.

        An epoch ends where a validation is due; only the first and the last one
        may be shorter.
        """
        every, total = self.config.validate_every, self.config.steps
        step = self.step
        if step < total and step % every:
            stop = min(total, (step // every + 1) * every)
            yield step, stop, stop - step
            step = stop
        whole = (total - step) // every * every
        if whole:
            yield step, step + whole, every
            step += whole
        if step < total:
            yield step, total, total - step

    def _validation_steps(self):
        steps = self.windows["validation"].steps_per_epoch
        limit = self.config.validation_batches
        return steps if limit is None else min(limit, steps)

    def _distribute(self, make):
        """Give `fit` a dataset of global batches, or each worker its part."""
        if self.strategy.cluster_resolver is None or isinstance(
            self.strategy, tf.distribute.TPUStrategy
        ):
            return make(1, 0)
        return strategies.distribute(self.strategy, make)

    def _finish(self):
        self.state()  # a callback may have ended training before a checkpoint was due
        if self.best_weights is not None:
            self.trained.set_weights(self.best_weights)
            self.notice(f"kept the weights of step {self.best['step']}, the best")
        loss = None
        validations = self.history["validations"]
        if self.best_weights is not None:
            loss = self.best["loss"]
        elif validations:
            loss = validations[-1]["loss"]
        # A worker that left at once would be taken for a crashed one.
        strategies.on_chief(self.strategy, lambda: self._write_results(loss))
        model = self.trained
        if isinstance(model, MeshGPT):
            model = model.to_model()
        return TrainingResult(model, self.tokenizer, self.history, self.out, loss)

    def _write_results(self, loss):
        from gpt_tf.progress import draw_history

        if not (self.out / "run.json").exists():
            with artifacts.atomic_file(self.out / "run.json") as file:
                file.write(self.run_json)
        artifacts.write_json(self.out / "history.json", self.history)
        draw_history(self.history, self.out / "loss.png")
        # A copy without the optimiser, which would take twice the model's bytes and
        # stands in the checkpoints; under several workers Keras cannot save it.
        made_from = {"run": hashlib.sha256(self.run_json).hexdigest()} | self.made_from
        # The last thing: with it the run is finished.
        save_model(
            copy_of(self.trained),
            self.tokenizer,
            self.out / "model",
            step=self.step,
            validation_loss=loss,
            made_from=made_from,
        )

    # Checkpoints

    def _variables(self):
        """Every variable that decides the further course, by a stable name."""
        optimizer = self.model.optimizer
        named = {
            f"model/{index:04d}": variable
            for index, variable in enumerate(
                getattr(self.model, "changing_weights", self.model.weights)
            )
        }
        if isinstance(optimizer, keras.mixed_precision.LossScaleOptimizer):
            if optimizer.dynamic:
                scale = optimizer._loss_scale
                named["scale/current"] = scale.current_loss_scale
                named["scale/counter"] = scale.counter
            optimizer = optimizer.inner_optimizer
        for index, variable in enumerate(optimizer.variables):
            named[f"optimizer/{index:04d}"] = variable
        return named

    # A mesh has some variables in other shapes than checkpoints have.

    def _read(self, variable):
        if isinstance(self.model, MeshGPT):
            return self.model.read_variable(variable)
        return np.asarray(variable.numpy())

    def _write(self, variable, value):
        if isinstance(self.model, MeshGPT):
            self.model.write_variable(variable, value)
        else:
            variable.assign(value)

    def state(self):
        """Return all that decides the further course, as arrays by name.

        Raises:
            TrainingDivergedError: A number in it is NaN or infinite.
        """
        state = {
            name: self._read(variable) for name, variable in self._variables().items()
        }
        spoilt = _first_not_finite(state)
        if spoilt is not None:
            raise self.divergence(
                f"NaN or infinity in {spoilt}, after a loss of {self.loss},"
            )
        return state

    def divergence(self, received):
        """Return the error to raise when numbers are no longer finite.

        Args:
            received: Where they are.
        """
        kept = sorted((self.out / "checkpoints").glob("step-*"))
        last = f"The last checkpoint, {kept[-1]}, stays as it is. " if kept else ""
        return TrainingDivergedError(
            "Training expects a finite loss and finite weights. Received: "
            f"{received} at step {self.step}: the run diverged. {last}Start again, "
            "with --overwrite, at a `learning_rate` below "
            f"{self.config.learning_rate:g} or with more `warmup_steps`."
        )

    def _checkpoint(self, step):
        return self.out / "checkpoints" / f"step-{step:08d}"

    def save_checkpoint(self):
        """Write the state of this step; the older checkpoints stay until then.

        Raises:
            InputError: The disk is full or fails.
            TrainingDivergedError: The state contains NaN or infinity.
        """
        folder = self._checkpoint(self.step)
        if folder.exists():
            return
        state = self.state()  # by every worker, so that all of them stop
        if not self.is_chief:
            return
        if self.best_weights is not None:
            for index, weight in enumerate(self.best_weights):
                state[f"best/{index:04d}"] = np.asarray(weight)
        with artifacts.atomic_folder(folder) as temporary:
            safetensors.numpy.save_file(state, temporary / "state.safetensors")
            artifacts.write_json(temporary / "history.json", self.history)
            artifacts.write_manifest(
                temporary,
                "checkpoint",
                ["state.safetensors", "history.json"],
                step=self.step,
                best=self.best,
                config=self.trained.get_config(),
            )
        self._remove_old_checkpoints()

    def _remove_old_checkpoints(self):
        kept = sorted((self.out / "checkpoints").glob("step-*"))
        for old in kept[: -self.config.keep_checkpoints]:
            artifacts.remove(old)

    def _restore_newest(self):
        """Let all workers take the checkpoint that the chief takes."""
        strategies.on_chief(self.strategy, self._restore_newest_whole)
        step = strategies.of_chief(self.strategy, self.step)
        if self.is_chief or not step:
            return
        folder = self._checkpoint(step)
        if not folder.is_dir():
            raise InputError(
                "This worker expects the checkpoint that the chief goes on from. "
                f"Received: no {folder}. Name a folder that all workers share."
            )
        self._restore(folder, artifacts.check_manifest(folder, "checkpoint"))

    def _restore_newest_whole(self):
        """Take the newest checkpoint that is whole; say which ones were not."""
        folders = sorted((self.out / "checkpoints").glob("step-*"), reverse=True)
        for folder in folders:
            try:
                manifest = artifacts.check_manifest(folder, "checkpoint")
                self._restore(folder, manifest)
            except DamagedFileError as error:
                self.notice(f"skipping a damaged checkpoint: {error}")
                continue
            self.notice(f"going on from step {self.step}")
            if folder == folders[0]:  # a process may have been killed in this
                self._remove_old_checkpoints()
            return
        if folders:
            raise DamagedFileError(
                f"None of the {len(folders)} checkpoints in {folders[0].parent} is "
                "whole. Start again with --overwrite."
            )
        self.notice("no checkpoint was written yet: starting from step 0")

    def _restore(self, folder, manifest):
        shape = {
            "config": dict,
            "step": int,
            "best": {"loss": (float, None), "step": int, "waited": int},
        }
        artifacts.check_shape(manifest, shape, folder / artifacts.MANIFEST_NAME)
        config = self.trained.get_config()
        if manifest["config"] != config:
            raise InputError(
                f"The checkpoint in {folder} is of another shape: "
                f"{differences(manifest['config'], config)}. "
                "Resume the run that wrote it."
            )
        state = read_safetensors(folder / "state.safetensors")
        variables = self._variables()
        for name, variable in variables.items():
            shape = tuple(variable.shape)
            if isinstance(self.model, MeshGPT):
                shape = self.model.outer_shape(variable)
            expected = f"{variable.dtype.name} {shape}"
            found = "nothing"
            if name in state:
                found = f"{state[name].dtype} {state[name].shape}"
            if found != expected:
                raise InputError(
                    f"The checkpoint in {folder} does not fit this model: {name} "
                    f"expects {expected}. Received: {found}."
                )
        spoilt = _first_not_finite(state)
        if spoilt is not None:
            raise DamagedFileError(
                f"The checkpoint in {folder} contains NaN or infinity in {spoilt}: "
                "training had diverged. Start again with --overwrite and a lower "
                "`learning_rate`."
            )
        with self.strategy.scope():
            for name, variable in variables.items():
                self._write(variable, state[name])
        best = [state[name] for name in sorted(state) if name.startswith("best/")]
        self.best_weights = best or None
        self.best, self.step = manifest["best"], manifest["step"]
        self.history = artifacts.read_json(folder / "history.json", HISTORY)


def _first_not_finite(arrays):
    """Return the name of the first array that contains NaN or infinity, or None."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            return name
    return None


class _Recorder(keras.callbacks.Callback):
    """Count steps, record losses, and decide on stopping: early, or with an error."""

    def __init__(self, run):
        super().__init__()
        self.run = run
        self.began = self.now = (0.0, 0)
        self.sums = {}

    @property
    def tokens_per_second(self):
        """Speed since the first step of the epoch, which may have compiled."""
        seconds, steps = np.subtract(self.now, self.began)
        return float(steps * self.run.tokens_per_step / seconds) if steps else 0.0

    def on_train_batch_end(self, batch, logs=None):
        run = self.run
        run.step += 1
        self._check_losses(logs or {})
        self.now = (time.perf_counter(), run.step)
        if batch == 0:
            self.began = self.now
            self.sums = {}
        if run.step % 10 == 0 or run.step == 1:
            means = self._means(batch + 1, logs or {})
            if run.own_loss in means:
                means["loss"] = means.pop(run.own_loss)
            run.history["steps"].append({"step": run.step, **means})

    def _check_losses(self, logs):
        losses = {name: logs[name] for name in logs if name.endswith("loss")}
        self.run.loss = losses.get("loss")
        spoilt = _first_not_finite(losses)
        if spoilt is not None:
            raise self.run.divergence(f"a {spoilt} of {losses[spoilt]}")

    def _means(self, count, logs):
        """Return the means since they were last asked for.

        Keras's own are since the epoch began, and would hide how the loss falls.
        """
        before = self.sums.get("count", 0)
        sums = {
            key: float(logs[key]) * count
            for key in (self.run.own_loss, "distillation_loss", "token_accuracy")
            if key in logs
        }
        means = {
            key: (total - self.sums.get(key, 0.0)) / (count - before)
            for key, total in sums.items()
        }
        self.sums = {"count": count, **sums}
        return means

    def on_epoch_end(self, epoch, logs=None):
        run, logs = self.run, logs or {}
        if "val_loss" not in logs:
            return
        self._check_losses(logs)
        loss = float(logs[f"val_{run.own_loss}"])
        logs["tokens_per_second"] = self.tokens_per_second
        run.history["validations"].append(
            {
                "step": run.step,
                "loss": loss,
                "perplexity": math.exp(min(loss, 700.0)),
                "token_accuracy": float(logs["val_token_accuracy"]),
                "train_loss": float(logs[run.own_loss]),
                "tokens_per_second": self.tokens_per_second,
                **{
                    key: float(logs[f"val_{key}"])
                    for key in ("teacher_agreement", "kl_divergence")
                    if f"val_{key}" in logs and run.knowledge is None
                },
            }
        )
        better = run.best["loss"] is None or loss < run.best["loss"]
        if better:
            run.best = {"loss": loss, "step": run.step, "waited": 0}
        else:
            run.best["waited"] += 1
        if not run.config.patience:
            return
        if better:
            run.best_weights = run.trained.get_weights()
        elif run.best["waited"] >= run.config.patience:
            run.notice(
                f"validation has not improved for {run.config.patience} rounds: "
                "stopping"
            )
            self.model.stop_training = True


class _Checkpointer(keras.callbacks.Callback):
    """Write checkpoints; where a validation is due, after it."""

    def __init__(self, run):
        super().__init__()
        self.run = run

    def _is_due(self):
        every, step = self.run.config.checkpoint_every, self.run.step
        return step == self.run.config.steps or bool(every and step % every == 0)

    def on_train_batch_end(self, batch, logs=None):
        step, config = self.run.step, self.run.config
        epoch_goes_on = step % config.validate_every and step != config.steps
        if epoch_goes_on and self._is_due():
            self.run.save_checkpoint()

    def on_epoch_end(self, epoch, logs=None):
        if self._is_due():
            self.run.save_checkpoint()


class _Sampler(keras.callbacks.Callback):
    """Write a little text every so many steps, to see what was learnt."""

    def __init__(self, run):
        super().__init__()
        self.run = run

    def on_train_batch_end(self, batch, logs=None):
        run = self.run
        if run.step % run.config.sample_every:
            return
        from gpt_tf.models.cached_forward import generate

        run.state()  # nothing is drawn from NaN
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mesh = isinstance(run.trained, MeshGPT)
            text = generate(
                run.trained.to_model() if mesh else run.trained,
                run.config.sample_prompt,
                tokenizer=run.tokenizer,
                max_new_tokens=min(64, run.config.context_length),
                temperature=0.8,
                seed=run.config.seed,
            )
        run.notice(f"step {run.step} writes:\n{run.config.sample_prompt}{text}\n")
