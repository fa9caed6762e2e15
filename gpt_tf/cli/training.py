"""The commands that train: train, quantize, distil."""

from pathlib import Path
from typing import Annotated

import typer

from gpt_tf.cli.common import (
    MaxRestarts,
    Overwrite,
    RayAddress,
    Resume,
    ResumeOrStart,
    VirtualDevices,
    Workers,
    app,
    import_tensorflow,
    show_notices,
)
from gpt_tf.cli.options import options_of
from gpt_tf.distillation.config import DistillationConfig
from gpt_tf.errors import InputError
from gpt_tf.quantization.config import QuantizationConfig
from gpt_tf.settings.configuration import fields_of
from gpt_tf.text.config import AugmentationConfig
from gpt_tf.training.config import PRESETS, TrainingConfig

# Of a run that follows another one: what is not given is the other run's.
_SOURCES_TEXT = {"corpus": "As for train; the source's own. May be repeated."}
_AUGMENTATION = (
    *("bpe_dropout", "token_dropout", "token_replacement", "replacement"),
    *("mix_documents", "random_offsets"),
)


@app.command()
@options_of(AugmentationConfig, "augmentation")
@options_of(TrainingConfig, "course")
def train(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/gpt"),
    preset: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(PRESETS)}; the defaults below without one."),
    ] = None,
    resume: Resume = False,
    resume_or_start: ResumeOrStart = False,
    overwrite: Overwrite = False,
    workers: Workers = None,
    ray_address: RayAddress = None,
    max_restarts: MaxRestarts = 3,
    virtual_devices: VirtualDevices = None,
    *,
    course: dict,
    augmentation: dict,
):
    """Train a GPT on text and leave a folder to generate from."""
    if preset is not None and preset not in PRESETS:
        raise InputError(
            f"A preset is one of {', '.join(PRESETS)}. Received: {preset!r}."
        )
    _train(
        "train",
        PRESETS.get(preset),
        out=out,
        resume=resume,
        resume_or_start=resume_or_start,
        overwrite=overwrite,
        workers=workers,
        ray_address=ray_address,
        max_restarts=max_restarts,
        virtual_devices=virtual_devices,
        **course,
        **({"augmentation": augmentation} if augmentation else {}),
    )


@app.command()
@options_of(
    TrainingConfig,
    "course",
    (
        *("corpus", "validation", "separator", "steps", "learning_rate", "batch_size"),
        *("validate_every", "checkpoint_every", "strategy", "seed"),
    ),
    helps={
        **_SOURCES_TEXT,
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
    resume: Resume = False,
    resume_or_start: ResumeOrStart = False,
    overwrite: Overwrite = False,
    workers: Workers = None,
    ray_address: RayAddress = None,
    max_restarts: MaxRestarts = 3,
    virtual_devices: VirtualDevices = None,
    *,
    course: dict,
):
    """Make a trained model ready for integers, by training it a little further."""
    if method not in _QUANTIZE_METHODS:
        raise InputError(
            f"`--method` expects one of {', '.join(_QUANTIZE_METHODS)}. "
            f"Received: {method!r}."
        )
    _train(
        "quantize",
        model,
        out=out,
        quantization=QuantizationConfig.full() if full else None,
        resume=resume,
        resume_or_start=resume_or_start,
        overwrite=overwrite,
        workers=workers,
        ray_address=ray_address,
        max_restarts=max_restarts,
        virtual_devices=virtual_devices,
        **course,
    )


_QUANTIZE_METHODS = ("qat",)


@app.command()
@options_of(AugmentationConfig, "augmentation", _AUGMENTATION)
@options_of(
    TrainingConfig,
    "course",
    (
        *("corpus", "validation", "separator", "init_from", "steps", "learning_rate"),
        *("dropout", "batch_size", "validate_every", "checkpoint_every", "strategy"),
        "seed",
    ),
    helps={
        **_SOURCES_TEXT,
        "init_from": "Trained student to go on with instead.",
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
    [name for name in fields_of(DistillationConfig) if name != "teacher"],
    renamed={
        "num_layers": "student_layers",
        "num_heads": "student_heads",
        **{
            name: f"student_{name}"
            for name in ("embedding_dim", "feedforward_dim", "vocab_size")
        },
    },
)
def distil(
    teacher: Annotated[
        Path | None, typer.Option(help="Folder of the teacher's run or model.")
    ] = None,
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
    resume: Resume = False,
    resume_or_start: ResumeOrStart = False,
    overwrite: Overwrite = False,
    workers: Workers = None,
    ray_address: RayAddress = None,
    max_restarts: MaxRestarts = 3,
    virtual_devices: VirtualDevices = None,
    *,
    student: dict,
    course: dict,
    augmentation: dict,
):
    """Train a small student on what a large teacher knows, or store that first."""
    if augmentation:
        course["augmentation"] = augmentation
    if extract is None:
        if quantize:
            course["quantization"] = QuantizationConfig().get_config()
        _train(
            "distil",
            teacher,
            out=out,
            distillation=None if resume else student,
            resume=resume,
            resume_or_start=resume_or_start,
            overwrite=overwrite,
            workers=workers,
            ray_address=ray_address,
            max_restarts=max_restarts,
            virtual_devices=virtual_devices,
            **course,
        )
        return
    import_tensorflow()
    from gpt_tf.parallel.data import split_cpu
    from gpt_tf.progress import StepProgress, print_knowledge
    from gpt_tf.training import loop

    if virtual_devices is not None:
        split_cpu(virtual_devices)
    of_the_text = ("corpus", "validation", "separator", "seed", "augmentation")
    with StepProgress("windows") as progress:
        store = loop.extract_knowledge(
            teacher,
            extract,
            vocab_size=student.get("vocab_size"),
            top_k=top_k,
            passes=passes,
            overwrite=overwrite,
            on_progress=progress.update,
            **{name: course[name] for name in of_the_text if name in course},
        )
    print_knowledge(store)


def _train(verb, *arguments, workers, ray_address, max_restarts, **options):
    """Call the verb of `gpt_tf.training.loop` here, or in the workers of a cluster."""
    if workers is None:
        if ray_address is not None:
            raise InputError(
                "--ray-address expects --workers, the number of workers to start there."
            )
        _train_here(verb, *arguments, **options)
        return
    from gpt_tf.parallel import cluster

    cluster.run(
        _train_here,
        verb,
        *arguments,
        workers=workers,
        address=ray_address,
        max_restarts=max_restarts,
        **options,
    )


def _train_here(verb, *arguments, virtual_devices, **options):
    """Call the verb of `gpt_tf.training.loop`, and print what came out."""
    show_notices()  # in a worker too, where only this is called
    import_tensorflow()
    from gpt_tf.parallel.data import split_cpu
    from gpt_tf.progress import print_result
    from gpt_tf.training import loop

    if virtual_devices is not None:
        split_cpu(virtual_devices)
    result = getattr(loop, verb)(*arguments, **options)
    if options.get("verbose", True):
        print_result(result)
