"""The command line: a verb per stage, no logic of its own."""

import functools
import itertools
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated

import typer
import typer.core
from rich.console import Console

from gpt_tf.errors import InputError, PeerLostError, WorkerFailedError
from gpt_tf.quiet import held_back


class _Commands(typer.core.TyperGroup):
    """Commands that say that they were interrupted, whatever version typer has."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            typer.echo("gpt-tf: interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train a GPT, make it fast, and ship it to an edge device.",
)


@app.callback()
def _main(
    debug: Annotated[
        bool, typer.Option(help="Show the traceback of an error.")
    ] = False,
):
    """Train a GPT, make it fast, and ship it to an edge device."""
    app.debug = debug


# Options that several commands have.
_Resume = Annotated[bool, typer.Option(help="Go on with the interrupted run in --out.")]
_Overwrite = Annotated[bool, typer.Option(help="Replace the run that stands in --out.")]
_ResumeOrStart = Annotated[
    bool,
    typer.Option("--resume-or-start", help="Go on with the run in --out, or start it."),
]
_JoinTimeout = Annotated[
    float | None,
    typer.Option(help="Seconds that workers wait for each other; 600."),
]
_BatchSize = Annotated[int | None, typer.Option(help="Windows per step.")]
_ValidateEvery = Annotated[int | None, typer.Option(help="Steps between validations.")]
_CheckpointEvery = Annotated[
    int | None, typer.Option(help="Steps between checkpoints.")
]
_Strategy = Annotated[
    str | None, typer.Option(help="auto, one_device, mirrored, multi_worker or tpu.")
]
_VirtualDevices = Annotated[
    int | None, typer.Option(help="Split the CPU into so many logical devices.")
]
_SourceCorpus = Annotated[
    list[str] | None,
    typer.Option(help="As for train; the source's own. May be repeated."),
]


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/gpt"),
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            help="python-stdlib, shakespeare, or a file or folder; may be repeated."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="quickstart, tiny, shakespeare-char or small."),
    ] = None,
    resume: _Resume = False,
    resume_or_start: _ResumeOrStart = False,
    overwrite: _Overwrite = False,
    join_timeout: _JoinTimeout = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="bpe, character, or a tokenizer.json.")
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Tokens to learn.")] = None,
    validation_fraction: Annotated[
        float | None, typer.Option(help="Share of the text to hold out.")
    ] = None,
    embedding_dim: Annotated[int | None, typer.Option(help="Width.")] = None,
    num_layers: Annotated[int | None, typer.Option(help="Blocks.")] = None,
    num_heads: Annotated[int | None, typer.Option(help="Attention heads.")] = None,
    feedforward_dim: Annotated[
        int | None, typer.Option(help="Feed-forward width; 4 x embedding-dim.")
    ] = None,
    context_length: Annotated[int | None, typer.Option(help="Tokens seen.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Dropout rate.")] = None,
    tie_embeddings: Annotated[
        bool | None, typer.Option(help="Score with the token table.")
    ] = None,
    batch_size: _BatchSize = None,
    gradient_accumulation_steps: Annotated[
        int | None, typer.Option(help="Parts in which a batch is computed.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="At its peak.")] = None,
    final_learning_rate: Annotated[
        float | None, typer.Option(help="At the end; a tenth of the peak.")
    ] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps of rise.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="On matrices.")] = None,
    beta_2: Annotated[
        float | None, typer.Option(help="Decay of Adam's second moment.")
    ] = None,
    global_clipnorm: Annotated[
        float | None, typer.Option(help="Largest norm of the gradient.")
    ] = None,
    validate_every: _ValidateEvery = None,
    validation_batches: Annotated[
        int | None, typer.Option(help="Batches per validation.")
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(help="Stop after so many validations without improvement."),
    ] = None,
    checkpoint_every: _CheckpointEvery = None,
    keep_checkpoints: Annotated[
        int | None, typer.Option(help="Newest checkpoints that stay.")
    ] = None,
    sample_every: Annotated[
        int | None, typer.Option(help="Steps between samples of text.")
    ] = None,
    sample_prompt: Annotated[
        str | None, typer.Option(help="What the samples begin with.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="float32, mixed_bfloat16 or mixed_float16.")
    ] = None,
    jit_compile: Annotated[str | None, typer.Option(help="auto, on or off.")] = None,
    strategy: _Strategy = None,
    pipeline_stages: Annotated[
        int | None, typer.Option(help="Devices to divide the blocks among.")
    ] = None,
    micro_batches: Annotated[
        int | None, typer.Option(help="Parts of a batch in the pipeline.")
    ] = None,
    pipeline_schedule: Annotated[
        str | None, typer.Option(help="1f1b or gpipe.")
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(
            help="Devices to divide batch x weights (x positions) among: 2x2, 1x2x2, "
            "or batch=2,sequence=2."
        ),
    ] = None,
    virtual_devices: _VirtualDevices = None,
    seed: Annotated[int | None, typer.Option(help="Of weights and data.")] = None,
    init_from: Annotated[
        str | None, typer.Option(help="Trained run or model to go on from.")
    ] = None,
):
    """Train a GPT on text and leave a folder to generate from."""
    changes = _changes(locals(), ("out", "preset", *_NOT_OF_THE_COURSE))
    _import_tensorflow()
    from gpt_tf import training
    from gpt_tf.display import print_result
    from gpt_tf.parallel.strategy import split_cpu

    if preset is not None and preset not in training.PRESETS:
        raise InputError(
            f"A preset is one of {', '.join(training.PRESETS)}. Received: {preset!r}."
        )
    if virtual_devices is not None:
        split_cpu(virtual_devices)
    result = training.train(
        training.PRESETS.get(preset),
        out,
        resume=resume,
        resume_or_start=resume_or_start,
        overwrite=overwrite,
        join_timeout=join_timeout,
        on_notice=_notice,
        **changes,
    )
    print_result(result)


@app.command()
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
    corpus: _SourceCorpus = None,
    full: Annotated[
        bool, typer.Option(help="Residual, softmax and logits in integers too.")
    ] = False,
    resume: _Resume = False,
    resume_or_start: _ResumeOrStart = False,
    overwrite: _Overwrite = False,
    join_timeout: _JoinTimeout = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps; a tenth of the source's.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="At its peak; a twentieth of the source's.")
    ] = None,
    batch_size: _BatchSize = None,
    validate_every: _ValidateEvery = None,
    checkpoint_every: _CheckpointEvery = None,
    strategy: _Strategy = None,
    virtual_devices: _VirtualDevices = None,
    seed: Annotated[int | None, typer.Option(help="Of the data's order.")] = None,
):
    """Make a trained model ready for integers, by training it a little further."""
    changes = _changes(
        locals(),
        ("model", "method", "out", "full", *_NOT_OF_THE_COURSE),
    )
    if method not in _QUANTIZE_METHODS:
        raise InputError(
            f"`--method` expects one of {', '.join(_QUANTIZE_METHODS)}. "
            f"Received: {method!r}."
        )
    _import_tensorflow()
    from gpt_tf import training
    from gpt_tf.display import print_result
    from gpt_tf.parallel.strategy import split_cpu
    from gpt_tf.quantization.config import QuantizationConfig

    if virtual_devices is not None:
        split_cpu(virtual_devices)
    result = training.quantize(
        model,
        out,
        QuantizationConfig.full() if full else None,
        resume=resume,
        resume_or_start=resume_or_start,
        overwrite=overwrite,
        join_timeout=join_timeout,
        on_notice=_notice,
        **changes,
    )
    print_result(result)


_QUANTIZE_METHODS = ("qat",)
_NOT_OF_THE_COURSE = (
    *("resume", "resume_or_start", "overwrite", "join_timeout", "virtual_devices"),
)


@app.command()
def distil(
    teacher: Annotated[
        Path | None, typer.Option(help="Folder of the teacher's run or model.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the student's run.")] = Path(
        "runs/gpt-student"
    ),
    corpus: _SourceCorpus = None,
    student_layers: Annotated[
        int | None, typer.Option(help="Blocks; the teacher's if not given.")
    ] = None,
    student_embedding_dim: Annotated[int | None, typer.Option(help="Width.")] = None,
    student_heads: Annotated[int | None, typer.Option(help="Attention heads.")] = None,
    student_feedforward_dim: Annotated[
        int | None, typer.Option(help="Feed-forward width.")
    ] = None,
    student_vocab_size: Annotated[
        int | None, typer.Option(help="Tokens, the first of the teacher's tokenizer.")
    ] = None,
    layers: Annotated[
        str,
        typer.Option(
            help="Blocks to take: evenly, every_second, first, last, first_and_last, "
            "importance."
        ),
    ] = "evenly",
    init: Annotated[
        str, typer.Option(help="teacher: begin with its weights; or fresh.")
    ] = "teacher",
    init_from: Annotated[
        str | None, typer.Option(help="Trained student to go on with instead.")
    ] = None,
    loss: Annotated[
        str,
        typer.Option(
            help="forward_kl, reverse_kl, jensen_shannon, total_variation, skewed_kl, "
            "skewed_reverse_kl, hidden_states, attention_transfer."
        ),
    ] = "forward_kl",
    alpha: Annotated[
        float, typer.Option(help="Share of the loss by labels, 0 to 1.")
    ] = 0.1,
    temperature: Annotated[
        float, typer.Option(help="Divides the logits of both.")
    ] = 1.0,
    on_policy_fraction: Annotated[
        float, typer.Option(help="Share of steps on the student's own text.")
    ] = 0.0,
    written_tokens: Annotated[
        int, typer.Option(help="Tokens of text that the teacher writes first.")
    ] = 0,
    extract: Annotated[
        Path | None, typer.Option(help="Store the teacher's knowledge here, and end.")
    ] = None,
    knowledge: Annotated[
        Path | None, typer.Option(help="Learn from a store, without the teacher.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="Of --extract: likeliest tokens.")] = 32,
    passes: Annotated[
        int, typer.Option(help="Of --extract: times that the text is cut anew.")
    ] = 1,
    quantize: Annotated[
        bool, typer.Option(help="Make the student ready for integers at once.")
    ] = False,
    resume: _Resume = False,
    resume_or_start: _ResumeOrStart = False,
    overwrite: _Overwrite = False,
    join_timeout: _JoinTimeout = None,
    steps: Annotated[int | None, typer.Option(help="The teacher's.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="At its peak; the teacher's.")
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="Of the student; 0.")] = None,
    batch_size: _BatchSize = None,
    validate_every: _ValidateEvery = None,
    checkpoint_every: _CheckpointEvery = None,
    strategy: _Strategy = None,
    virtual_devices: _VirtualDevices = None,
    seed: Annotated[
        int | None, typer.Option(help="Of fresh weights and of the data's order.")
    ] = None,
):
    """Train a small student on what a large teacher knows, or store that first."""
    wanted = {
        "num_layers": student_layers,
        "embedding_dim": student_embedding_dim,
        "num_heads": student_heads,
        "feedforward_dim": student_feedforward_dim,
        "vocab_size": student_vocab_size,
        "layers": layers,
        "init": init,
        "loss": loss,
        "alpha": alpha,
        "temperature": temperature,
        "on_policy_fraction": on_policy_fraction,
        "written_tokens": written_tokens,
        "knowledge": knowledge,
    }
    course = {
        "corpus": corpus,
        "init_from": init_from,
        "steps": steps,
        "learning_rate": learning_rate,
        "dropout": dropout,
        "batch_size": batch_size,
        "validate_every": validate_every,
        "checkpoint_every": checkpoint_every,
        "strategy": strategy,
        "seed": seed,
    }
    _import_tensorflow()
    from gpt_tf import training
    from gpt_tf.display import StepProgress, print_knowledge, print_result
    from gpt_tf.parallel.strategy import split_cpu
    from gpt_tf.quantization.config import QuantizationConfig

    if virtual_devices is not None:
        split_cpu(virtual_devices)
    if extract is not None:
        with StepProgress("windows") as progress:
            store = training.extract_knowledge(
                teacher,
                extract,
                vocab_size=student_vocab_size,
                top_k=top_k,
                passes=passes,
                overwrite=overwrite,
                on_notice=progress.notice,
                on_progress=progress.update,
                **_changes({"corpus": corpus, "seed": seed}),
            )
        print_knowledge(store)
        return
    changes = _changes(course)
    if quantize:
        changes["quantization"] = QuantizationConfig().get_config()
    result = training.distil(
        teacher,
        out,
        None if resume else wanted,
        resume=resume,
        resume_or_start=resume_or_start,
        overwrite=overwrite,
        join_timeout=join_timeout,
        on_notice=_notice,
        **changes,
    )
    print_result(result)


@app.command()
def export(
    model: Annotated[Path, typer.Option(help="A run's or model's folder.")],
    out: Annotated[
        Path,
        typer.Option(help="File to write, .litertlm or .tflite; a folder for stages."),
    ] = Path("gpt.litertlm"),
    mode: Annotated[
        str,
        typer.Option(
            help="float32, float16, dynamic_int8, int8, int8_full, int16x8 or int4."
        ),
    ] = "dynamic_int8",
    corpus: Annotated[
        list[str] | None,
        typer.Option(help="Typical text; a run brings its own. As for train."),
    ] = None,
    context_length: Annotated[
        int | None, typer.Option(help="Tokens that the cache holds at most.")
    ] = None,
    prefill_length: Annotated[
        list[int] | None,
        typer.Option(help="Tokens a prefill takes at once; may be repeated."),
    ] = None,
    allow_untrained: Annotated[
        bool, typer.Option(help="Write a model that was never trained too.")
    ] = False,
    stages: Annotated[
        int | None,
        typer.Option(help="Cut it by layers into so many files, a core's work each."),
    ] = None,
):
    """Write a trained model as one file for a device, verified."""
    _import_tensorflow()
    from gpt_tf.display import print_export
    from gpt_tf.export.trained import export_trained

    options = {"context_length": context_length, "prefill_lengths": prefill_length}
    manifest = export_trained(
        model,
        out,
        mode,
        corpus=corpus or None,
        num_stages=stages,
        allow_untrained=allow_untrained,
        on_notice=_notice,
        **{name: value for name, value in options.items() if value is not None},
    )
    print_export(manifest, out)


@app.command()
def generate(
    model: Annotated[
        Path,
        typer.Option(
            help="A run's or model's folder, a .tflite or .litertlm, or stages."
        ),
    ],
    prompt: Annotated[
        str | None, typer.Option(help="What to continue; without it, a dialogue.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Among so many tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Among tokens of this probability.")
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 makes repetition less likely.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends it; may be repeated.")
    ] = None,
):
    """Continue a prompt, streaming; without a prompt, line by line from you."""
    stream = _edge_stream(model) if _is_edge(model) else _keras_stream(model)

    def answer(text):
        pieces = stream(
            text,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop or (),
        )
        for piece in itertools.chain([text], pieces, ["\n"]):
            sys.stdout.write(piece)
            sys.stdout.flush()

    if prompt is not None:
        answer(prompt)
        return
    typer.echo("Type a beginning; an empty line ends.", err=True)
    while line := _ask():
        answer(line)


@app.command(
    # What follows the command's name is the command's own.
    context_settings={"allow_extra_args": True, "allow_interspersed_args": False}
)
def launch(
    context: typer.Context,
    workers: Annotated[int, typer.Option(help="Processes on this machine.")] = 2,
    max_restarts: Annotated[
        int, typer.Option(help="New starts in a row without a new checkpoint.")
    ] = 3,
    port: Annotated[
        int | None, typer.Option(help="First port of the workers; free ones if not.")
    ] = None,
    join_timeout: _JoinTimeout = None,
):
    """Train with several workers on this machine: launch --workers 2 train --out ..."""
    from gpt_tf.parallel.launch import launch as launch_workers

    launch_workers(
        context.args,
        workers,
        max_restarts=max_restarts,
        port=port,
        join_timeout=join_timeout,
        on_line=functools.partial(print, flush=True),
    )


def _changes(given, others=()):
    """Return the fields of a configuration that the command line gave."""
    changes = {
        name: value
        for name, value in given.items()
        if name not in others and value is not None
    }
    if "corpus" in changes:
        paths = changes["corpus"]
        changes["corpus"] = paths[0] if len(paths) == 1 else tuple(paths)
    return changes


def _notice(line):
    # It may quote any text; none of it is rich's markup.
    Console(markup=False, emoji=False, highlight=False).print(line)


def _is_edge(model):
    from gpt_tf.export.signatures import is_staged

    if model.suffix in (".tflite", ".litertlm") or is_staged(model):
        return True
    return model.is_file() and model.suffix != ".keras"


def _edge_stream(model):
    from gpt_tf.edge import EdgeGPT, EdgePipeline
    from gpt_tf.export.signatures import is_staged

    gpt = EdgePipeline(model) if is_staged(model) else EdgeGPT(model)
    _require_tokenizer(gpt.tokenizer, model, "the file that `gpt-tf export` wrote")
    return gpt.stream


def _keras_stream(model):
    _import_tensorflow()
    from gpt_tf.models import decoding
    from gpt_tf.training import load_model

    gpt, tokenizer = load_model(model)
    _require_tokenizer(tokenizer, model, "the folder that `gpt-tf train` wrote")
    return functools.partial(decoding.stream, gpt, tokenizer=tokenizer)


def _require_tokenizer(tokenizer, model, instead):
    if tokenizer is None:
        raise InputError(
            f"Expected tokenizer.json with the model {model}. Put it there, or name "
            f"{instead}."
        )


def _ask():
    try:
        return input("> ")
    except EOFError:
        return ""


def main():
    """Run the command line; what the user can mend is one line and status 2."""
    warnings.showwarning = _one_line
    try:
        app(prog_name="gpt-tf")
    except InputError as error:
        if getattr(app, "debug", False):
            raise
        _say(error)
        sys.exit(2)
    except PeerLostError as error:
        if getattr(app, "debug", False):
            traceback.print_exc()
        _say(error)
        _exit_at_once(PeerLostError.EXIT_STATUS)
    except WorkerFailedError as error:
        _say(error)
        sys.exit(error.status)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if getattr(app, "debug", False) or package not in _EXTRAS:
            raise
        _say(
            f"this command expects the package {package}, which is not installed. "
            f"Install it with: pip install 'gpt-tf[{_EXTRAS[package]}]'"
        )
        sys.exit(2)


_EXTRAS = dict.fromkeys(
    (
        *("tensorflow", "tf_keras", "tensorflow_model_optimization", "keras_nlp"),
        *("safetensors", "matplotlib", "flatbuffers", "litert_lm_builder"),
    ),
    "train",
) | {"ai_edge_litert": "edge"}


def _import_tensorflow():
    """Import TensorFlow without the lines that its libraries log meanwhile."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with held_back(lambda line, failed: failed):
        import tensorflow as tf
    tf.get_logger().setLevel("ERROR")


def _exit_at_once(status):
    """Leave without TensorFlow's own farewell, which waits for the lost worker."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _one_line(message, category, filename, lineno, file=None, line=None):
    if category.__module__.startswith("gpt_tf"):
        _say(message)


def _say(message):
    # What a library remarks within a message may run over several lines.
    typer.echo(f"gpt-tf: {' '.join(str(message).splitlines())}", err=True)


if __name__ == "__main__":
    main()
