"""The commands that train: train, quantize, distil, finetune."""

from pathlib import Path
from typing import Annotated

import typer

from gpt_tf.cli.common import import_tensorflow, show_notices
from gpt_tf.cli.options import options_of
from gpt_tf.distillation.config import DistillationConfig
from gpt_tf.errors import InputError
from gpt_tf.quantization.config import QuantizationConfig
from gpt_tf.settings import arguments
from gpt_tf.text.config import AugmentationConfig
from gpt_tf.training.config import (
    CONTEXT_LENGTH,
    PRESETS,
    LoraConfig,
    RunOptions,
    TrainingConfig,
)

# Of a run that follows another one: what is not given is the other run's.
_SOURCES_TEXT = {"corpus": "As for train; the source's own. May be repeated."}


@options_of(RunOptions, "run")
@options_of(AugmentationConfig, "augmentation")
@options_of(TrainingConfig, "course")
def train(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/gpt"),
    preset: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(PRESETS)}; the defaults below without one."),
    ] = None,
    *,
    course: dict,
    augmentation: dict,
    run: dict,
):
    """Train a GPT on text and leave a folder to generate from."""
    if preset is not None:
        arguments.one_of("preset", preset, PRESETS)
    if augmentation:
        course["augmentation"] = augmentation
    _train("train", PRESETS.get(preset), run, out=out, **course)


@options_of(RunOptions, "run")
@options_of(
    TrainingConfig,
    "course",
    (
        *("corpus", "validation", "separator", "context_length", "steps"),
        *("learning_rate", "batch_size", "validate_every", "checkpoint_every"),
        *("strategy", "seed"),
    ),
    helps={
        **_SOURCES_TEXT,
        "context_length": f"Tokens per window; those of the source's run, or at most "
        f"{CONTEXT_LENGTH}.",
        "steps": "Optimiser steps; a tenth of the source's.",
        "learning_rate": "At its peak; a twentieth of the source's.",
        "seed": "Of the data's order.",
    },
    defaults=False,
)
def quantize(
    model: Annotated[
        Path | None, typer.Option(help="Folder of the trained run or model.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="qat: train on with rounded weights and activations.")
    ] = "qat",
    out: Annotated[Path, typer.Option(help="Folder of the new run.")] = Path(
        "runs/gpt-qat"
    ),
    full: Annotated[
        bool, typer.Option(help="Residual, softmax and logits in integers too.")
    ] = False,
    *,
    course: dict,
    run: dict,
):
    """Make a trained model ready for integers, by training it a little further."""
    arguments.one_of("method", method, ["qat"])
    quantization = QuantizationConfig.full() if full else None
    _train("quantize", model, run, out=out, quantization=quantization, **course)


@options_of(RunOptions, "run")
@options_of(
    AugmentationConfig,
    "augmentation",
    (
        *("bpe_dropout", "token_dropout", "token_replacement", "replacement"),
        *("mix_documents", "random_offsets"),
    ),
)
@options_of(
    TrainingConfig,
    "course",
    (
        *("corpus", "validation", "separator", "init_from", "context_length", "steps"),
        *("learning_rate", "dropout", "batch_size", "validate_every"),
        *("checkpoint_every", "strategy", "seed"),
    ),
    helps={
        **_SOURCES_TEXT,
        "init_from": "Trained student to go on with instead.",
        "context_length": f"Tokens per window; those of the teacher's run, or at most "
        f"{CONTEXT_LENGTH}.",
        "steps": "Optimiser steps; the teacher's.",
        "learning_rate": "At its peak; the teacher's.",
        "dropout": "Of the student; 0.",
        "seed": "Of fresh weights and of the data's order.",
    },
    defaults=False,
)
@options_of(
    DistillationConfig,
    "student",
    spelled={
        "num_layers": "--student-layers",
        "num_heads": "--student-heads",
        "embedding_dim": "--student-embedding-dim",
        "feedforward_dim": "--student-feedforward-dim",
        "vocab_size": "--student-vocab-size",
    },
)
def distil(
    out: Annotated[Path, typer.Option(help="Folder of the student's run.")] = Path(
        "runs/gpt-student"
    ),
    extract: Annotated[
        Path | None, typer.Option(help="Store the teacher's knowledge here, and end.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="Of --extract: tokens kept.")] = 32,
    passes: Annotated[
        int, typer.Option(help="Of --extract: times that the text is cut anew.")
    ] = 1,
    quantize: Annotated[
        bool, typer.Option(help="Make the student ready for integers at once.")
    ] = False,
    *,
    student: dict,
    course: dict,
    augmentation: dict,
    run: dict,
):
    """Train a small student on what a large teacher knows, or store that first."""
    teacher = student.pop("teacher", None)
    if augmentation:
        course["augmentation"] = augmentation
    if extract is None:
        if quantize:
            course["quantization"] = QuantizationConfig().get_config()
        _train("distil", teacher, run, out=out, distillation=student or None, **course)
        return
    run = RunOptions(**run)
    _prepare_devices(run.virtual_devices)
    from gpt_tf.progress import StepProgress, print_knowledge
    from gpt_tf.training import loop

    of_the_text = ("corpus", "validation", "separator", "seed", "augmentation")
    with StepProgress("windows") as progress:
        store = loop.extract_knowledge(
            teacher,
            extract,
            vocab_size=student.get("vocab_size"),
            top_k=top_k,
            passes=passes,
            overwrite=run.overwrite,
            on_progress=progress.update,
            **{name: course[name] for name in of_the_text if name in course},
        )
    print_knowledge(store)


@options_of(RunOptions, "run")
@options_of(
    LoraConfig,
    "lora",
    spelled={name: f"--lora-{name}" for name in ("rank", "alpha", "base")},
    helps={"rank": "Train adapters of this rank; all weights if not given."},
    defaults=False,
)
@options_of(
    TrainingConfig,
    "course",
    (
        *("data", "validation", "validation_fraction", "context_length", "batch_size"),
        *("gradient_accumulation_steps", "steps", "learning_rate", "validate_every"),
        *("patience", "checkpoint_every", "precision", "strategy", "seed"),
    ),
    helps={
        "data": "JSON lines: rows of text, of prompt and completion, or of messages.",
        "validation": "File of rows to hold out; else a share of the rows.",
        "validation_fraction": "Share of the rows to hold out; 0.1.",
        "context_length": "Most tokens of a row; 1024, or what the model reads.",
        "batch_size": "Rows per step over all replicas; 8.",
        "steps": "Optimiser steps, instead of epochs.",
        "learning_rate": "At its peak; 1e-4, or 1e-3 with LoRA.",
        "seed": "Of the rows' order, and of adapters.",
    },
    defaults=False,
)
def finetune(
    model: Annotated[
        str | None, typer.Option(help="Run, model, or GPT that was trained elsewhere.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the new run.")] = Path(
        "runs/gpt-finetuned"
    ),
    epochs: Annotated[float, typer.Option(help="How often each row is read.")] = 3.0,
    *,
    course: dict,
    lora: dict,
    run: dict,
):
    """Fit a trained model to a task, by rows whose answers it is to learn."""
    if lora and "rank" not in lora:
        given = " and ".join(f"--lora-{name}" for name in lora)
        raise InputError(f"{given} expects --lora-rank beside it. Name both.")
    _train("finetune", model, run, out=out, epochs=epochs, lora=lora or None, **course)


def _train(verb, source, run, **options):
    """Call the verb of `gpt_tf.training.loop` here, or in the workers of a cluster."""
    run = RunOptions(**run)
    for name in ("resume", "resume_or_start", "overwrite", "virtual_devices"):
        options[name] = getattr(run, name)
    if run.workers is None:
        _train_here(verb, source, **options)
        return
    from gpt_tf.parallel import cluster

    cluster.run(
        _train_here,
        verb,
        source,
        workers=run.workers,
        address=run.ray_address,
        max_restarts=run.max_restarts,
        **options,
    )


def _train_here(verb, source, *, virtual_devices, **options):
    """Call the verb of `gpt_tf.training.loop`, and print what came out."""
    show_notices()  # in a worker too, where only this is called
    _prepare_devices(virtual_devices)
    from gpt_tf.progress import print_result
    from gpt_tf.training import loop

    result = getattr(loop, verb)(source, **options)
    if options.get("verbose", True):
        print_result(result)


def _prepare_devices(count):
    """Import TensorFlow, and split the CPU before it is used otherwise."""
    import_tensorflow()
    if count is not None:
        from gpt_tf.parallel.data import split_cpu

        split_cpu(count)
