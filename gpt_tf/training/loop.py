"""Training: the verbs `train`, `quantize`, `distil`, `finetune`, `extract_knowledge`.

A run is a folder. `run.json` holds the configuration, `data/` the tokens, and each
checkpoint the weights, the optimiser's state, the random state and the step, from which
the position in the data follows. So a run that was killed goes on from its newest good
checkpoint exactly as if nothing had happened. `run_folder` lists all that is in it.
"""

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path

import tensorflow as tf

from gpt_tf import artifacts
from gpt_tf.distillation.config import DistillationConfig
from gpt_tf.distillation.teacher_cache import KnowledgeStore
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.models.checks import refuse_keras_3
from gpt_tf.models.precision import precision
from gpt_tf.models.sizes import SIZES, checked_sizes
from gpt_tf.parallel import data as strategies
from gpt_tf.parallel.config import parse_mesh
from gpt_tf.parallel.mesh import check_divides, check_fits, make_mesh
from gpt_tf.parallel.pipeline import Pipeline
from gpt_tf.pretrained.source import absolute
from gpt_tf.quantization.config import QuantizationConfig
from gpt_tf.settings import arguments
from gpt_tf.settings.configuration import differences, fields_of
from gpt_tf.training import checkpoint, preparation
from gpt_tf.training.config import LoraConfig, TrainingConfig
from gpt_tf.training.run import Run, TrainingResult
from gpt_tf.training.run_folder import (
    OWN_ENTRIES,
    PLACEMENT,
    context_length_of,
    load_model,
    model_files,
    read_run,
)

logger = logging.getLogger(__name__)


def train(
    config: TrainingConfig | None = None,
    out: str | Path = "runs/gpt",
    *,
    resume: bool = False,
    resume_or_start: bool = False,
    overwrite: bool = False,
    callbacks=(),
    verbose: bool = True,
    **changes,
) -> TrainingResult:
    """Train a GPT on a corpus, or go on with a run that was interrupted.

    Args:
        config: The settings; `TrainingConfig()` unless given.
        out: Folder of the run.
        resume: Go on with the run in `out`, from its newest checkpoint and with its own
            configuration. With more `steps` than the run's it goes on up to these, even
            if it was finished; the learning rate then is that of a run of so many
            steps, so it may rise again. A run that `patience` has ended stays ended.
        resume_or_start: Go on with the run in `out` if there is one, of this very
            configuration; else start it. A run that is finished is only loaded. So a
            command that is started again after every failure comes to its end.
        overwrite: Replace a run that stands in `out`. Files that gpt_tf did not
            write stay.
        callbacks: More tf_keras callbacks.
        verbose: Whether progress is shown.
        **changes: Fields of `TrainingConfig` to replace.

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
        config = _config_to_resume(out, changes)
    else:
        config = _config_to_start(config, changes)
        if resume_or_start and (finished := _finished(config, out)) is not None:
            logger.info("the run in %s is finished", arguments.printable(out))
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
        replicas = strategy.num_replicas_in_sync
        parts = replicas * config.gradient_accumulation_steps
        if config.batch_size % parts:
            expected = f"a multiple of {parts}, for {replicas} replicas"
            arguments.refuse("batch_size", config.batch_size, expected)

        def begin():
            stack.enter_context(artifacts.locked(out, OWN_ENTRIES))
            if resume:
                _extend(out, config.steps)
            elif resume_or_start and (out / "run.json").is_file():
                _check_same(config, out)
            else:
                # A folder of nothing but our own files has lost its run.json.
                is_ours = artifacts.entries(out) <= set(OWN_ENTRIES)
                replace = overwrite or (resume_or_start and is_ours)
                preparation.prepare(config, out, replace)

        # Of several workers the chief keeps other processes out of the folder.
        strategies.on_chief(strategy, begin)
        if not (out / "run.json").is_file():
            raise InputError(
                f"This worker expects the run that the chief prepared in {out}; there "
                "is none. Name a folder that all workers share."
            )
        if not resume:
            config = read_run(out)  # with the shape of the model that it starts from
        run = Run(config, out, strategy, division)
        if resume or resume_or_start:
            checkpoint.restore_newest(run)
        return run.train(list(callbacks), verbose)


def quantize(
    source: str | Path | None,
    out: str | Path = "runs/gpt-qat",
    quantization: QuantizationConfig | dict | None = None,
    *,
    resume: bool = False,
    **options,
) -> TrainingResult:
    """Fine-tune a trained model with quantisation-aware training (QAT).

    Ranges are calibrated on the training text first. Then weights and ranges are
    trained for a tenth of the steps of the source's run, from a twentieth of its
    learning rate down to 0, unless `options` say otherwise. The text is the source's,
    without augmentation unless that is among the options.

    Args:
        source: A run's folder, or that of a model or a `.keras` file, for which
            `corpus` has to be given. Not needed with `resume`.
        out: Folder of the new run.
        quantization: What becomes integers; `QuantizationConfig()` unless given.
        resume: As for `train`.
        **options: The other options of `train`, and fields of `TrainingConfig` to set.

    Returns:
        A `TrainingResult` whose model is a `QuantizationAwareGPT`.

    Raises:
        InputError: There is no trained model. For this and all else see `train`.

    Example:
        >>> result = quantize("runs/tiny", "runs/tiny-qat", steps=10)

    Reference: the rate and the length are those of Wu et al., "Integer Quantization
    for Deep Learning Inference", arXiv:2004.09602, section 5.2.
    """
    if resume:
        if quantization is not None:
            options["quantization"] = quantization  # `train` refuses it
        return train(None, out, resume=True, **options)
    before = _config_of(source, options, "Quantisation")
    steps = options.get("steps", max(1, before.steps // 10))
    settings = {
        "steps": steps,
        "learning_rate": before.learning_rate / 20,
        "final_learning_rate": 0.0,
        "warmup_steps": steps // 20,
        "patience": 0,
        "precision": "float32",
        "init_from": absolute(source),
        "lora": None,
        "quantization": QuantizationConfig.of(quantization).get_config(),
        "distillation": None,
        "augmentation": None,
    }
    return train(_changed(before, settings, options), out, **options)


def distil(
    teacher: str | Path | None,
    out: str | Path = "runs/gpt-student",
    distillation: DistillationConfig | dict | None = None,
    *,
    resume: bool = False,
    **options,
) -> TrainingResult:
    """Train a small GPT on a text and on what a large one predicts of it.

    The student is cut from the teacher, or is the model of `init_from`. Settings and
    text are those of the teacher's run, without augmentation, unless `options` say
    otherwise.

    Args:
        teacher: The run's folder of the teacher, or that of a model or a `.keras`
            file, for which `corpus` has to be given. Not needed with `resume`.
        out: Folder of the new run.
        distillation: `DistillationConfig`, or a dict of its fields.
        resume: As for `train`.
        **options: The other options of `train`, and fields of `TrainingConfig` to set.

    Returns:
        A `TrainingResult` whose model is the student.

    Raises:
        InputError: There is no teacher, or teacher and student do not fit each other.
            For all else see `train`.

    Example:
        >>> result = distil("runs/tiny", "runs/student", {"num_layers": 1})

    Reference: article 3.3.
    """
    if resume:
        if distillation is not None:
            options["distillation"] = distillation  # `train` refuses it
        return train(None, out, resume=True, **options)
    before = _config_of(teacher, options, "Distillation", "teacher")
    wanted = DistillationConfig.of(distillation)
    wanted = dataclasses.replace(
        wanted,
        teacher=absolute(teacher),
        knowledge=wanted.knowledge and str(Path(wanted.knowledge).absolute()),
    )
    settings = {
        "init_from": None,
        "lora": None,
        "quantization": None,
        "patience": 0,
        "dropout": 0.0,
        "augmentation": None,
        "distillation": wanted.get_config(),
    }
    if options.get("quantization") is not None:
        settings["precision"] = "float32"
    return train(_changed(before, settings, options), out, **options)


def finetune(
    source: str | Path | None,
    data: str | Path | None = None,
    out: str | Path = "runs/gpt-finetuned",
    lora: LoraConfig | dict | None = None,
    *,
    epochs: float = 3.0,
    resume: bool = False,
    **options,
) -> TrainingResult:
    """Fit a trained model to a task, by rows whose answers it is to learn.

    A row is a window of its own, padded on the right to the longest one, and the loss
    is the mean over the tokens of the answers. With `lora` adapters alone are trained;
    the finished model has them merged, and `adapter/` has them in PEFT's form.

    Args:
        source: Whatever `gpt_tf.open_model` opens. Not needed with `resume`.
        data: File of JSON lines; see `gpt_tf.text.examples`. Not needed with `resume`.
        out: Folder of the new run.
        lora: `LoraConfig` or a dict of its fields; None trains all weights.
        epochs: How often each row is read, above 0; `steps` goes before.
        resume: As for `train`.
        **options: The other options of `train`, and fields of `TrainingConfig` to set.
            The learning rate is 1e-4 unless given, or 1e-3 with `lora`; it rises for a
            twentieth of the steps, and falls to 0. A batch has 8 rows. A row has at
            most 1024 tokens, or what the model reads at once if that is less.

    Returns:
        A `TrainingResult` whose model is a plain `GPTModel`.

    Raises:
        InputError: A row cannot be learnt; the message names its line. For this and
            all else see `train`.

    Example:
        >>> result = finetune("smollm2", "train.jsonl", "runs/task", {"rank": 8})

    Reference: Hu et al., "LoRA", arXiv:2106.09685.
    """
    if resume:
        given = {"data": data, "lora": lora}
        options |= {name: v for name, v in given.items() if v is not None}
        return train(None, out, resume=True, **options)  # which refuses these
    config = finetuning_config(source, data, lora, epochs=epochs, **options)
    return train(config, out, **options)


def finetuning_config(source, data, lora=None, *, epochs=3.0, **options):
    """Return the `TrainingConfig` of `finetune`, which states the arguments."""
    epochs = arguments.number("epochs", epochs, above=0)
    if source is None or data is None:
        raise InputError(
            "Fine-tuning expects a trained model and a file of rows. Received: no "
            f"{'model' if source is None else 'rows'}. Name both, with --model and "
            "--data on the command line."
        )
    settings = {
        "data": str(arguments.path("data", data).absolute()),
        "context_length": min(1024, context_length_of(source)),
        "batch_size": 8,
        "learning_rate": 1e-4 if lora is None else 1e-3,
        "final_learning_rate": 0.0,
        "weight_decay": 0.0,
        "keep_checkpoints": 2,
        "init_from": absolute(source),
        "lora": lora and LoraConfig.of(lora).get_config(),
    }
    config = _changed(TrainingConfig(), settings, options)
    rows = len(preparation.open_text(config).splits["train"])
    each = max(1, rows // config.batch_size)
    settings["steps"] = options.get("steps", math.ceil(epochs * each))
    settings["warmup_steps"] = settings["steps"] // 20
    settings["validate_every"] = settings["checkpoint_every"] = min(each, 200)
    return _changed(config, settings, options)


def extract_knowledge(
    teacher: str | Path,
    path: str | Path,
    *,
    vocab_size: int | None = None,
    top_k: int = 32,
    passes: int = 1,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    **changes,
) -> KnowledgeStore:
    """Store what a teacher predicts of its training text, for students to come.

    Args:
        teacher: As for `distil`.
        path: Folder of the store.
        vocab_size: Size of the student's vocabulary, with a tokenizer derived from the
            teacher's; the teacher's own unless given.
        top_k: As for `gpt_tf.distillation.teacher_cache.extract`, like the next three.
        passes: See there.
        overwrite: See there.
        on_progress: See there.
        **changes: Fields of `TrainingConfig` to set: `corpus`, `context_length`.

    Raises:
        InputError: There is no teacher or no text, or a number is out of its range.
    """
    if changes.get("augmentation") is not None:
        raise InputError(
            "Knowledge is stored of the text as it stands. Received: `augmentation`. "
            "Leave it out, or let the teacher run along."
        )
    before = _config_of(teacher, changes, "Extraction", "teacher")
    wanted = DistillationConfig(teacher=absolute(teacher), vocab_size=vocab_size)
    settings = {"init_from": None, "lora": None, "augmentation": None}
    settings["distillation"] = wanted.get_config()
    return preparation.store_knowledge(
        dataclasses.replace(before, **{**settings, **changes}),
        path,
        top_k=top_k,
        passes=passes,
        overwrite=overwrite,
        on_progress=on_progress,
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
    if config.init_from is None:
        sizes = checked_sizes({name: getattr(config, name) for name in SIZES})
    if config.mesh is not None:
        mesh = make_mesh(**parse_mesh(config.mesh))
        if config.context_length is not None:  # else it is the model's
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


def _config_of(source, changes, what, role="model"):
    """Return the configuration of the run that trained a model."""
    source = arguments.path("source", source, or_none=True)
    if source is not None and (source / "run.json").is_file():
        before = read_run(source)
        if "corpus" in changes:  # what its own text was divided by goes with it
            rest = dict.fromkeys(("data", "validation", "separator"))
            return dataclasses.replace(before, **rest)
        return before
    if source is None or not model_files(source)[0].is_file():
        raise InputError(
            f"{what} expects a trained {role}. Received: {source}; there is none. "
            "Name the folder that `gpt-tf train` wrote."
        )
    if "corpus" in changes:
        return TrainingConfig(init_from=absolute(source))
    raise InputError(
        f"{what} expects the run that trained the model, for its text. "
        f"Received: {source}, without run.json. Name the text with `corpus`."
    )


def _changed(config, settings, options):
    """Return a configuration with other settings, of which `options` have the say."""
    own = {name: v for name, v in options.items() if name in fields_of(TrainingConfig)}
    return dataclasses.replace(config, **{**settings, **own})


def _config_to_start(config, changes):
    if config is None or isinstance(config, dict):
        return TrainingConfig.of({**(config or {}), **changes})
    return dataclasses.replace(TrainingConfig.of(config), **changes)


def _config_to_resume(out, changes):
    """Return the configuration of a run, with the changes that one that goes on has."""
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
        expected = f"{before.steps}, the run's own, or more"
        arguments.refuse("steps", config.steps, expected, "Or start a new run.")
    return config


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
        taken = () if config.context_length else ("context_length",)
        for name in (*preparation.SHAPE, *taken):
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
        history = artifacts.read_json(out / "history.json", checkpoint.HISTORY)
        model, tokenizer = load_model(out)
    except DamagedFileError:  # it can be made again from the last checkpoint
        return None
    loss = facts.get("validation_loss")
    return TrainingResult(model, tokenizer, history, out, loss)
