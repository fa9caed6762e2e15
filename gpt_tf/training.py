"""Training: the one place that knows optimiser, schedule, callbacks and resume.

A run is a folder. Everything that decides its course is in `run.json`; the tokens
lie in `data/`; each checkpoint holds the weights, the optimiser's state, the random
state and the step, from which the position in the data follows. So a run that was
killed goes on from its newest good checkpoint exactly as if nothing had happened.

    run.json            configuration, corpus, versions
    tokenizer.json      Hugging Face format
    data/               token files of the two splits
    initial/            the model that training starts from, if it is not a new one
    checkpoints/        step-00000200/, ... each written whole or not at all
    model/              the finished model with its tokenizer and manifest
    history.json        what was measured, step by step
    loss.png            the same as a picture
    logs/               for TensorBoard
"""

import contextlib
import dataclasses
import errno
import math
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.numpy
import tensorflow as tf
import tf_keras as keras

from gpt_tf import files
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.models.gpt import GPTModel
from gpt_tf.models.language_model import refuse_keras_3
from gpt_tf.models.optimizer import AdamW
from gpt_tf.parallel import strategy as strategies
from gpt_tf.quantization.config import QuantizationConfig
from gpt_tf.text import corpus as corpora
from gpt_tf.text import tokenizer as tokenizers
from gpt_tf.text.dataset import TokenFile, Windows, write_token_file

OWN_ENTRIES = (
    "run.json",
    "tokenizer.json",
    "data",
    "initial",
    "checkpoints",
    "model",
    "history.json",
    "loss.png",
    "logs",
)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides the course of a training run.

    Args:
        corpus: `"python-stdlib"`, `"shakespeare"`, or paths of files and folders.
        tokenizer: `"bpe"`, `"character"`, or the path of a tokenizer to use.
        vocab_size: Size of the vocabulary that `"bpe"` trains, at least 257.
        validation_fraction: Share of the text that is held out, in (0, 1).
        embedding_dim, num_layers, num_heads, feedforward_dim, dropout,
            tie_embeddings: As for `GPTModel`.
        context_length: Tokens per window and positions of the model.
        batch_size: Windows per step over all replicas.
        gradient_accumulation_steps: Parts in which a batch is computed.
        steps: Number of optimiser steps.
        learning_rate: Largest learning rate, above 0.
        final_learning_rate: Learning rate at the end, a tenth unless given.
        warmup_steps: Steps over which the learning rate rises.
        weight_decay: Decay of matrices per unit of learning rate.
        beta_2: Decay of Adam's second moment, in [0, 1).
        global_clipnorm: Largest norm of the gradient.
        validate_every: Steps between validations.
        validation_batches: Batches per validation; None takes all.
        patience: Validations without improvement after which training stops and
            the best weights are kept; 0 trains to the end.
        checkpoint_every: Steps between checkpoints; 0 writes one at the end.
        keep_checkpoints: Number of newest checkpoints that stay.
        sample_every: Steps between samples of text; 0 writes none.
        sample_prompt: What the samples begin with.
        precision: `"float32"`, `"mixed_bfloat16"` or `"mixed_float16"`.
        jit_compile: `"auto"`, `"on"` or `"off"`: XLA.
        strategy: One of `gpt_tf.parallel.strategy.STRATEGIES`.
        seed: Seed of weights, data order and dropout.
        init_from: Trained model to start from: a run's or model's folder, or a
            `.keras` file. Architecture and tokenizer are then that model's, whatever
            the fields above say.
        quantization: Fields of a `QuantizationConfig`: the model of `init_from`
            becomes quantisation-aware before it is trained. None leaves it as it is.
    """

    corpus: str | tuple[str, ...] = "python-stdlib"
    tokenizer: str = "bpe"
    vocab_size: int = 4096
    validation_fraction: float = 0.1
    embedding_dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    context_length: int = 128
    feedforward_dim: int | None = None
    dropout: float = 0.0
    tie_embeddings: bool = True
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    steps: int = 1000
    learning_rate: float = 1e-3
    final_learning_rate: float | None = None
    warmup_steps: int = 100
    weight_decay: float = 0.1
    beta_2: float = 0.99
    global_clipnorm: float = 1.0
    validate_every: int = 200
    validation_batches: int | None = 50
    patience: int = 0
    checkpoint_every: int = 200
    keep_checkpoints: int = 3
    sample_every: int = 0
    sample_prompt: str = "\n"
    precision: str = "float32"
    jit_compile: str = "auto"
    strategy: str = "auto"
    seed: int = 1337
    init_from: str | None = None
    quantization: dict | None = None

    def __post_init__(self):
        if not isinstance(self.corpus, str):
            object.__setattr__(self, "corpus", tuple(str(p) for p in self.corpus))
        for name in (
            "vocab_size",
            "embedding_dim",
            "num_layers",
            "num_heads",
            "context_length",
            "batch_size",
            "gradient_accumulation_steps",
            "steps",
            "validate_every",
            "keep_checkpoints",
        ):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("feedforward_dim", "validation_batches"):
            value = getattr(self, name)
            self._check(name, value is None or value >= 1, "at least 1, or None")
        for name in (
            "warmup_steps",
            "weight_decay",
            "patience",
            "checkpoint_every",
            "sample_every",
        ):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        final = self.final_learning_rate
        self._check(
            "final_learning_rate", final is None or final >= 0, "at least 0, or None"
        )
        for name in ("learning_rate", "global_clipnorm"):
            self._check(name, getattr(self, name) > 0, "above 0")
        for name in ("dropout", "beta_2"):
            self._check(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        self._check("seed", 0 <= self.seed < 2**32, "at least 0 and below 2**32")
        width = self.embedding_dim
        self._check(
            "num_heads", self.num_heads <= width, f"at most `embedding_dim`, {width}"
        )
        fraction = self.validation_fraction
        self._check("validation_fraction", 0 < fraction < 1, "between 0 and 1")
        precisions = ("float32", "mixed_bfloat16", "mixed_float16")
        self._check("precision", self.precision in precisions, f"one of {precisions}")
        modes = ("auto", "on", "off")
        self._check("jit_compile", self.jit_compile in modes, f"one of {modes}")
        known = strategies.STRATEGIES
        self._check("strategy", self.strategy in known, f"one of {known}")
        parts = self.gradient_accumulation_steps
        self._check(
            "batch_size", self.batch_size % parts == 0, f"a multiple of {parts}"
        )
        if self.init_from is not None:
            object.__setattr__(self, "init_from", str(self.init_from))
        if self.quantization is not None:
            self._check("init_from", self.init_from, "that names a trained model")
            fields = QuantizationConfig.of(self.quantization).get_config()
            object.__setattr__(self, "quantization", fields)

    def _check(self, name, good, expected):
        if not good:
            raise InputError(
                f"`{name}` expects a value {expected}. "
                f"Received: {getattr(self, name)!r}."
            )


PRESETS = {
    "quickstart": TrainingConfig(
        vocab_size=1024,
        embedding_dim=128,
        num_layers=4,
        num_heads=4,
        context_length=128,
        batch_size=16,
        steps=600,
        learning_rate=4e-3,
        warmup_steps=60,
        validate_every=100,
        validation_batches=30,
        checkpoint_every=100,
    ),
    "tiny": TrainingConfig(
        vocab_size=512,
        embedding_dim=32,
        num_layers=2,
        num_heads=2,
        context_length=32,
        batch_size=8,
        steps=20,
        warmup_steps=2,
        validate_every=10,
        validation_batches=4,
        checkpoint_every=10,
    ),
    "shakespeare-char": TrainingConfig(
        corpus="shakespeare",
        tokenizer="character",
        embedding_dim=128,
        num_layers=4,
        num_heads=4,
        context_length=64,
        batch_size=12,
        steps=2000,
        learning_rate=4e-3,
        final_learning_rate=0.0,
        warmup_steps=100,
        validate_every=250,
        validation_batches=None,
        checkpoint_every=500,
        sample_prompt="\n",
    ),
    "small": TrainingConfig(
        vocab_size=10000,
        embedding_dim=512,
        num_layers=6,
        num_heads=8,
        context_length=256,
        batch_size=16,
        steps=5000,
        learning_rate=6e-4,
        warmup_steps=200,
        validate_every=250,
        checkpoint_every=250,
    ),
}


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
        resume: Go on with the run in `out`. The configuration is the run's own.
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
        DamagedFileError: No good checkpoint or token file is left to resume from.

    Example:
        >>> result = train(PRESETS["tiny"], "runs/tiny")
    """
    notice = on_notice or print
    out = Path(out)
    for callback in callbacks:
        refuse_keras_3(callback, "callbacks")
    if resume:
        if changes:
            raise InputError(
                "A resumed run keeps its own configuration. "
                f"Received: {', '.join(sorted(changes))}. Start a new run for these."
            )
        config = _read_run(out)
    else:
        config = dataclasses.replace(config or TrainingConfig(), **changes)
    strategy = strategies.make_strategy(config.strategy)
    replicas = strategy.num_replicas_in_sync
    if config.batch_size % (replicas * config.gradient_accumulation_steps):
        raise InputError(
            "`batch_size` is divided among replicas and accumulation steps. "
            f"Received: {config.batch_size} for {replicas} replicas and "
            f"{config.gradient_accumulation_steps} accumulation steps. "
            "Use a multiple of their product."
        )
    if not resume:
        _start_run(config, out, overwrite, strategy, notice)
        config = _read_run(out)  # with the shape of the model that it starts from
    with _precision(config.precision):
        return _Run(config, out, strategy, notice, verbose).train(
            list(callbacks), resume
        )


def quantize(
    source: str | Path | None,
    out: str | Path = "runs/gpt-qat",
    quantization: QuantizationConfig | dict | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks=(),
    verbose: bool = True,
    on_notice: Callable[[str], None] | None = None,
    **changes,
) -> TrainingResult:
    """Train a trained model further, as one that will be quantised.

    Ranges are calibrated on the training text first. Then weights and ranges are
    trained for a tenth of the steps of the source's run, from a twentieth of its
    learning rate down to 0; `changes` say otherwise. The text is the source's.

    Args:
        source: A run's folder, or that of a model or a `.keras` file, for which
            `corpus` has to be given. Not needed with `resume`.
        out: Folder of the new run.
        quantization: What becomes integers; `QuantizationConfig()` unless given.
        resume: As for `train`.
        overwrite: As for `train`.
        callbacks: As for `train`.
        verbose: As for `train`.
        on_notice: As for `train`.
        **changes: Fields of `TrainingConfig` to set.

    Returns:
        A `TrainingResult` whose model is a `QuantizationAwareGPT`.

    Raises:
        InputError: There is no trained model, or as for `train`.
        DamagedFileError: As for `train`.

    Example:
        >>> result = quantize("runs/tiny", "runs/tiny-qat", steps=10)

    Reference: the rate and the length are those of Wu et al., "Integer Quantization
    for Deep Learning Inference", arXiv:2004.09602, section 5.2.
    """
    options = {
        "overwrite": overwrite,
        "callbacks": callbacks,
        "verbose": verbose,
        "on_notice": on_notice,
    }
    if resume:
        if quantization is not None:
            changes["quantization"] = quantization
        return train(None, out, resume=True, **options, **changes)
    if source is None:
        raise InputError(
            "Quantisation expects a trained model. Received: none. Name the folder "
            "that `gpt-tf train` wrote."
        )
    fields = QuantizationConfig.of(quantization).get_config()
    return train(_course_after(Path(source), fields, changes), out, **options)


def _course_after(source, quantization, changes):
    """Return the configuration of a run that quantises the model of `source`."""
    if (source / "run.json").is_file():
        before = _read_run(source)
    elif "corpus" in changes:
        before = TrainingConfig()
    else:
        raise InputError(
            f"Quantisation expects the run that trained the model, for its text. "
            f"Received: {source}, without run.json. Name the text with `corpus`."
        )
    steps = changes.get("steps", max(1, before.steps // 10))
    course = {
        "steps": steps,
        "learning_rate": before.learning_rate / 20,
        "final_learning_rate": 0.0,
        "warmup_steps": steps // 20,
        "patience": 0,
        "precision": "float32",
        "init_from": str(source.absolute()),
        "quantization": quantization,
    }
    return dataclasses.replace(before, **{**course, **changes})


def load_model(path: str | Path) -> tuple[GPTModel, "tokenizers.Tokenizer | None"]:
    """Load a trained model and its tokenizer.

    Args:
        path: A run's folder, a model's folder, or a `.keras` file.

    Returns:
        The model, a `GPTModel` or `QuantizationAwareGPT`, and its tokenizer or None
        where none lies beside it.

    Raises:
        InputError: There is no model.
        DamagedFileError: A file is not what its manifest says.
    """
    file = _model_file(path)
    folder = file.parent
    if not file.is_file():
        raise InputError(
            f"Expected a trained model at {path}; there is none. Point to a folder "
            "that `gpt-tf train` finished, or to a .keras file."
        )
    if (folder / files.MANIFEST_NAME).is_file():
        files.check_manifest(folder, "model")
    try:
        model = keras.models.load_model(file, compile=False)
    except Exception as error:  # zipfile's, h5py's, TensorFlow's or Keras's own
        raise DamagedFileError(
            f"{file} cannot be loaded as a Keras model: {error}."
        ) from error
    has_tokenizer = (folder / "tokenizer.json").is_file()
    return model, tokenizers.load_tokenizer(folder) if has_tokenizer else None


def _model_file(path):
    path = Path(path)
    if path.suffix == ".keras":
        return path
    return (path / "model" if (path / "model").is_dir() else path) / "model.keras"


def save_model(model, tokenizer, folder: str | Path, **facts) -> None:
    """Write model, tokenizer and manifest to a folder, whole or not at all.

    Args:
        model: A `GPTModel` or `QuantizationAwareGPT`.
        tokenizer: Its tokenizer.
        folder: Where to write; a folder that stands there is replaced.
        **facts: More to record in the manifest, as JSON values.
    """
    folder = Path(folder)
    with files.atomic_folder(folder, replace=True) as temporary:
        model.save(temporary / "model.keras")
        tokenizer.save(temporary)
        files.write_manifest(
            temporary,
            "model",
            ["model.keras", "tokenizer.json"],
            config=model.get_config(),
            parameters=model.count_params(),
            tokenizer_fingerprint=tokenizer.fingerprint(),
            **facts,
        )


# Starting a run


def _start_run(config, out, overwrite, strategy, notice):
    """Let the chief prepare the run, from which all workers then read."""
    strategies.on_chief(strategy, lambda: _prepare(config, out, overwrite, notice))
    if not (out / "run.json").is_file():
        raise InputError(
            f"This worker expects the run that the chief prepared in {out}; there is "
            "none. Name a folder that all workers share."
        )


def _prepare(config, out, overwrite, notice):
    """Write tokens and configuration beside `out`, then move them in."""
    _refuse_foreign_folder(out, overwrite)
    initial, tokenizer, config = _load_initial(config)
    source = _source_with_this_text(config)
    text = None
    if source is None:
        text = corpora.open_corpus(
            list(config.corpus) if isinstance(config.corpus, tuple) else config.corpus,
            validation_fraction=config.validation_fraction,
            on_notice=notice,
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise InputError(
            f"The run's folder {out} cannot be written: {error.strerror}. "
            "Choose another."
        ) from None
    try:
        tokenizer = tokenizer or _prepare_tokenizer(config, text, notice)
        if config.sample_every and not tokenizer.encode(config.sample_prompt):
            raise InputError(
                "`sample_prompt` expects at least one token. "
                f"Received: {config.sample_prompt!r}."
            )
        tokenizer.save(staging)
        if source is None:
            _encode(text, tokenizer, staging / "data", notice)
            corpus = text.describe()
        else:
            notice(f"taking the tokens of the run {source.name}")
            shutil.copytree(source / "data", staging / "data")
            corpus = files.read_json(source / "run.json")["corpus"]
        windows = [
            _windows(
                TokenFile.open(staging / "data" / f"{split}.tokens"), config, shuffle
            )
            for split, shuffle in (("validation", False), ("train", True))
        ]
        made_from = {}
        if initial is not None:
            made_from["model"] = files.sha256_of(_model_file(config.init_from))
            initial = _quantized(initial, config, windows[1], notice)
            save_model(initial, tokenizer, staging / "initial", made_from=made_from)
        files.write_json(
            staging / "run.json",
            {
                "kind": "run",
                "config": dataclasses.asdict(config),
                "corpus": corpus,
                "made_from": made_from,
                "versions": files.versions(),
            },
        )
        _move_in(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _encode(text, tokenizer, folder, notice):
    notice(f"encoding {text.name} with a vocabulary of {tokenizer.vocab_size}")
    for split in ("train", "validation"):
        token_file = write_token_file(
            folder / f"{split}.tokens",
            text.documents(split),
            tokenizer,
            facts={"corpus": text.name, "split": split},
        )
        notice(f"{split}: {token_file.count:,} tokens")


def _load_initial(config):
    """Return the model to start from, its tokenizer, and what that decides.

    Model and tokenizer are None where a run starts from a new model.
    """
    if config.init_from is None:
        return None, None, config
    model, tokenizer = load_model(config.init_from)
    if tokenizer is None:
        raise InputError(
            f"Expected tokenizer.json beside the model in {config.init_from}. Put it "
            "there, or name the folder that `gpt-tf train` wrote."
        )
    shape = model.gpt if hasattr(model, "gpt") else model.get_config()
    if config.context_length > shape["context_length"]:
        raise InputError(
            f"`context_length` expects at most {shape['context_length']}, the "
            f"positions of the model in {config.init_from}. "
            f"Received: {config.context_length}."
        )
    taken = (
        "vocab_size",
        "embedding_dim",
        "num_layers",
        "num_heads",
        "feedforward_dim",
        "dropout",
        "tie_embeddings",
    )
    shape = {name: shape[name] for name in taken}
    return model, tokenizer, dataclasses.replace(config, **shape)


def _source_with_this_text(config):
    """Return the run whose token files are those that this run wants, or None."""
    folder = Path(config.init_from or "")
    if config.init_from is None or not (folder / "run.json").is_file():
        return None
    before = _read_run(folder)
    same = ("corpus", "validation_fraction")
    if any(getattr(before, name) != getattr(config, name) for name in same):
        return None
    return folder


def _quantized(model, config, windows, notice):
    """Return the model that training starts from, its ranges known."""
    if config.quantization is None:
        return model
    # Here and not above: only who quantises waits for TF-MOT.
    from gpt_tf.quantization.qat import quantize_aware

    model = quantize_aware(model, config.quantization)
    batches = min(model.quantization.calibration_batches, windows.steps_per_epoch)
    if batches:
        notice(f"calibrating ranges on {batches} batches")
        model.calibrate(windows, num_batches=batches)
    return model


def _refuse_foreign_folder(out, overwrite):
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(
            f"The run's folder is to be {out}, but that is a file. Choose another."
        )
    if any(out.iterdir()) and not overwrite:
        what = "a run" if (out / "run.json").exists() else "something else"
        raise InputError(
            f"The folder {out} already holds {what}. Choose another, or add "
            "--overwrite to replace what gpt_tf wrote there"
            + (", or --resume to go on." if what == "a run" else ".")
        )


def _move_in(staging, out):
    out.mkdir(parents=True, exist_ok=True)
    # run.json goes first and comes last: without it the folder is no run.
    for name in OWN_ENTRIES:
        old = out / name
        if old.is_dir():
            shutil.rmtree(old)
        elif old.exists():
            old.unlink()
    for name in reversed(OWN_ENTRIES):
        if (staging / name).exists():
            shutil.move(staging / name, out / name)


def _prepare_tokenizer(config, text, notice):
    texts = (document.text for document in text.documents("train"))
    if config.tokenizer == "character":
        # Every character must be known, those of the held-out text included.
        texts = (
            document.text
            for split in ("train", "validation")
            for document in text.documents(split)
        )
        return tokenizers.CharacterTokenizer.train(texts, end_of_text=False)
    if config.tokenizer == "bpe":
        notice(f"training a tokenizer of {config.vocab_size} tokens on {text.name}")
        return tokenizers.BPETokenizer.train(texts, config.vocab_size)
    return tokenizers.load_tokenizer(config.tokenizer)


def _read_run(out):
    if not (out / "run.json").is_file():
        raise InputError(
            f"Expected an interrupted run in {out}; there is no run.json. "
            "Start a run without --resume first."
        )
    run = files.read_json(out / "run.json")
    try:
        return TrainingConfig(**run["config"])
    except (KeyError, TypeError) as error:
        raise DamagedFileError(
            f"{out / 'run.json'} is no configuration of this version: {error}."
        ) from None


def _windows(token_file, config, shuffle):
    return Windows(
        token_file,
        config.context_length,
        config.batch_size,
        seed=config.seed,
        shuffle=shuffle,
    )


@contextlib.contextmanager
def _precision(name):
    before = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy(name)
    try:
        yield
    finally:
        keras.mixed_precision.set_global_policy(before)


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


# Running


class _Run:
    """A run in progress: model, data and the state that checkpoints hold."""

    def __init__(self, config, out, strategy, notice, verbose):
        self.config = config
        self.out = out
        self.strategy = strategy
        self.notice = notice
        self.verbose = verbose
        self.is_chief = strategies.is_chief(strategy)
        self.tokenizer = tokenizers.load_tokenizer(out)
        self.windows = {
            split: _windows(
                TokenFile.open(out / "data" / f"{split}.tokens"),
                config,
                shuffle=split == "train",
            )
            for split in ("train", "validation")
        }
        for windows in self.windows.values():
            self._check_tokens(windows.token_file)
        self.step = 0
        self.tokens_per_step = config.batch_size * config.context_length
        self.history = {"steps": [], "validations": []}
        self.best = {"loss": None, "step": 0, "waited": 0}
        self.best_weights = None
        self.model = self._build()

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
            model = self._new_model()
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
            )
            model.optimizer.build(model.trainable_variables)
            if hasattr(model, "freeze_ranges"):
                share = model.quantization.freeze_ranges_at
                model.freeze_ranges(None if share == 1 else int(share * config.steps))
        return model

    def _new_model(self):
        """Build the model that training starts from, under the strategy's scope."""
        config = self.config
        if config.init_from is None:
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
        return _copy_of(initial)

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
        from gpt_tf.display import TrainingProgress

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
        return self.strategy.distribute_datasets_from_function(
            lambda context: make(context.num_input_pipelines, context.input_pipeline_id)
        )

    def _finish(self):
        if self.best_weights is not None:
            self.model.set_weights(self.best_weights)
            self.notice(f"kept the weights of step {self.best['step']}, the best")
        loss = None
        validations = self.history["validations"]
        if self.best_weights is not None:
            loss = self.best["loss"]
        elif validations:
            loss = validations[-1]["loss"]
        # A worker that left at once would be taken for a crashed one.
        strategies.on_chief(self.strategy, lambda: self._write_results(loss))
        return TrainingResult(self.model, self.tokenizer, self.history, self.out, loss)

    def _write_results(self, loss):
        from gpt_tf.display import draw_history

        files.write_json(self.out / "history.json", self.history)
        # A copy without the optimiser, which would take twice the model's bytes and
        # stands in the checkpoints; under several workers Keras cannot save it.
        made_from = {"run": files.sha256_of(self.out / "run.json")}
        made_from |= files.read_json(self.out / "run.json").get("made_from", {})
        save_model(
            _copy_of(self.model),
            self.tokenizer,
            self.out / "model",
            step=self.step,
            validation_loss=loss,
            made_from=made_from,
        )
        draw_history(self.history, self.out / "loss.png")

    # Checkpoints

    def _variables(self):
        """Every variable that decides the further course, by a stable name."""
        optimizer = self.model.optimizer
        named = {
            f"model/{index:04d}": variable
            for index, variable in enumerate(self.model.weights)
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

    def save_checkpoint(self):
        """Write the state of this step; the older checkpoints stay until then."""
        if not self.is_chief:
            return
        folder = self.out / "checkpoints" / f"step-{self.step:08d}"
        if folder.exists():
            return
        state = {
            name: np.asarray(variable.numpy())
            for name, variable in self._variables().items()
        }
        if self.best_weights is not None:
            for index, weight in enumerate(self.best_weights):
                state[f"best/{index:04d}"] = np.asarray(weight)
        try:
            with files.atomic_folder(folder) as temporary:
                safetensors.numpy.save_file(state, temporary / "state.safetensors")
                files.write_json(temporary / "history.json", self.history)
                files.write_manifest(
                    temporary,
                    "checkpoint",
                    ["state.safetensors", "history.json"],
                    step=self.step,
                    best=self.best,
                    config=self.model.get_config(),
                )
        except (OSError, safetensors.SafetensorError) as error:
            full = getattr(
                error, "errno", None
            ) == errno.ENOSPC or "os error 28" in str(error)
            if not full:
                raise
            raise InputError(
                f"No space is left to write the checkpoint of step {self.step} to "
                f"{folder.parent}. The last good one stays. Make room, then go on "
                "with --resume."
            ) from None
        kept = sorted((self.out / "checkpoints").glob("step-*"))
        for old in kept[: -self.config.keep_checkpoints]:
            shutil.rmtree(old)

    def _restore_newest(self):
        """Take the newest checkpoint that is whole; say which ones were not."""
        folders = sorted((self.out / "checkpoints").glob("step-*"), reverse=True)
        for folder in folders:
            try:
                manifest = files.check_manifest(folder, "checkpoint")
                self._restore(folder, manifest)
            except DamagedFileError as error:
                self.notice(f"skipping a damaged checkpoint: {error}")
                continue
            self.notice(f"going on from step {self.step}")
            return
        if folders:
            raise DamagedFileError(
                f"None of the {len(folders)} checkpoints in {folders[0].parent} is "
                "whole. Start again with --overwrite."
            )
        self.notice("no checkpoint was written yet: starting from step 0")

    def _restore(self, folder, manifest):
        if manifest["config"] != self.model.get_config():
            raise InputError(
                f"The checkpoint in {folder} is of another shape: "
                f"{_differences(manifest['config'], self.model.get_config())}. "
                "Resume the run that wrote it."
            )
        state = safetensors.numpy.load_file(folder / "state.safetensors")
        variables = self._variables()
        for name, variable in variables.items():
            if name not in state or state[name].shape != tuple(variable.shape):
                raise InputError(
                    f"The checkpoint in {folder} does not fit this model: {name} "
                    f"expects the shape {tuple(variable.shape)}. Received: "
                    f"{state[name].shape if name in state else 'nothing'}."
                )
        with self.strategy.scope():
            for name, variable in variables.items():
                variable.assign(state[name])
        best = [state[name] for name in sorted(state) if name.startswith("best/")]
        self.best_weights = best or None
        self.best = manifest["best"]
        self.step = int(manifest["step"])
        self.history = files.read_json(folder / "history.json")


def _copy_of(model):
    copy = type(model).from_config(model.get_config())
    copy.set_weights(model.get_weights())
    return copy


def _differences(old, new):
    return ", ".join(
        f"{key}={old.get(key)} instead of {new.get(key)}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    )


class _Recorder(keras.callbacks.Callback):
    """Count steps, record losses and decide on early stopping."""

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
        self.now = (time.perf_counter(), run.step)
        if batch == 0:
            self.began = self.now
            self.sums = {}
        if run.step % 10 == 0 or run.step == 1:
            run.history["steps"].append(
                {"step": run.step, **self._means(batch + 1, logs or {})}
            )

    def _means(self, count, logs):
        """Return the means since they were last asked for.

        Keras's own are since the epoch began, and would hide how the loss falls.
        """
        before = self.sums.get("count", 0)
        sums = {
            key: float(logs[key]) * count
            for key in ("loss", "token_accuracy")
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
        loss = float(logs["val_loss"])
        logs["tokens_per_second"] = self.tokens_per_second
        run.history["validations"].append(
            {
                "step": run.step,
                "loss": loss,
                "perplexity": math.exp(min(loss, 700.0)),
                "token_accuracy": float(logs.get("val_token_accuracy", float("nan"))),
                "train_loss": float(logs.get("loss", float("nan"))),
                "tokens_per_second": self.tokens_per_second,
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
            run.best_weights = run.model.get_weights()
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
        from gpt_tf.models.decoding import generate

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text = generate(
                run.model,
                run.config.sample_prompt,
                tokenizer=run.tokenizer,
                max_new_tokens=min(64, run.config.context_length),
                temperature=0.8,
                seed=run.config.seed,
            )
        run.notice(f"step {run.step} writes:\n{run.config.sample_prompt}{text}\n")
