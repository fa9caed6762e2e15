"""The commands that train: train, quantize, distil, launch."""

import functools
from pathlib import Path
from typing import Annotated

import typer

from gpt_tf.cli.common import (
    AUGMENTATION,
    BatchSize,
    BPEDropout,
    CheckpointEvery,
    JoinTimeout,
    MixDocuments,
    Overwrite,
    RandomOffsets,
    Replacement,
    Resume,
    ResumeOrStart,
    Separator,
    SourceCorpus,
    Strategy,
    TokenDropout,
    TokenReplacement,
    ValidateEvery,
    Validation,
    VirtualDevices,
    app,
    augmentation_of,
    given_of,
    import_tensorflow,
    notice,
)
from gpt_tf.errors import InputError


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
    resume: Resume = False,
    resume_or_start: ResumeOrStart = False,
    overwrite: Overwrite = False,
    join_timeout: JoinTimeout = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="bpe, character, or a tokenizer.json.")
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Tokens to learn.")] = None,
    validation_fraction: Annotated[
        float | None, typer.Option(help="Share of the text to hold out; 0.1.")
    ] = None,
    validation: Validation = None,
    separator: Separator = None,
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
    batch_size: BatchSize = None,
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
    validate_every: ValidateEvery = None,
    validation_batches: Annotated[
        int | None, typer.Option(help="Batches per validation.")
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(help="Stop after so many validations without improvement."),
    ] = None,
    checkpoint_every: CheckpointEvery = None,
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
    strategy: Strategy = None,
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
    virtual_devices: VirtualDevices = None,
    seed: Annotated[int | None, typer.Option(help="Of weights and data.")] = None,
    init_from: Annotated[
        str | None, typer.Option(help="Trained run or model to go on from.")
    ] = None,
    bpe_dropout: BPEDropout = None,
    token_dropout: TokenDropout = None,
    token_replacement: TokenReplacement = None,
    replacement: Replacement = None,
    mix_documents: MixDocuments = None,
    random_offsets: RandomOffsets = None,
    teacher: Annotated[
        str | None, typer.Option(help="Trained run or model that writes text to read.")
    ] = None,
    written_tokens: Annotated[
        int | None, typer.Option(help="Tokens of text that the teacher writes first.")
    ] = None,
):
    """Train a GPT on text and leave a folder to generate from."""
    given = dict(locals())
    augmentation = (*AUGMENTATION, "teacher", "written_tokens")
    changes = given_of(given, ("out", "preset", *augmentation, *_NOT_OF_THE_COURSE))
    changes |= augmentation_of(given, augmentation)
    import_tensorflow()
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
        on_notice=notice,
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
    corpus: SourceCorpus = None,
    validation: Validation = None,
    separator: Separator = None,
    full: Annotated[
        bool, typer.Option(help="Residual, softmax and logits in integers too.")
    ] = False,
    resume: Resume = False,
    resume_or_start: ResumeOrStart = False,
    overwrite: Overwrite = False,
    join_timeout: JoinTimeout = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps; a tenth of the source's.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="At its peak; a twentieth of the source's.")
    ] = None,
    batch_size: BatchSize = None,
    validate_every: ValidateEvery = None,
    checkpoint_every: CheckpointEvery = None,
    strategy: Strategy = None,
    virtual_devices: VirtualDevices = None,
    seed: Annotated[int | None, typer.Option(help="Of the data's order.")] = None,
):
    """Make a trained model ready for integers, by training it a little further."""
    changes = given_of(
        locals(),
        ("model", "method", "out", "full", *_NOT_OF_THE_COURSE),
    )
    if method not in _QUANTIZE_METHODS:
        raise InputError(
            f"`--method` expects one of {', '.join(_QUANTIZE_METHODS)}. "
            f"Received: {method!r}."
        )
    import_tensorflow()
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
        on_notice=notice,
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
    corpus: SourceCorpus = None,
    validation: Validation = None,
    separator: Separator = None,
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
    resume: Resume = False,
    resume_or_start: ResumeOrStart = False,
    overwrite: Overwrite = False,
    join_timeout: JoinTimeout = None,
    steps: Annotated[int | None, typer.Option(help="The teacher's.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="At its peak; the teacher's.")
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="Of the student; 0.")] = None,
    batch_size: BatchSize = None,
    validate_every: ValidateEvery = None,
    checkpoint_every: CheckpointEvery = None,
    strategy: Strategy = None,
    virtual_devices: VirtualDevices = None,
    seed: Annotated[
        int | None, typer.Option(help="Of fresh weights and of the data's order.")
    ] = None,
    bpe_dropout: BPEDropout = None,
    token_dropout: TokenDropout = None,
    token_replacement: TokenReplacement = None,
    replacement: Replacement = None,
    mix_documents: MixDocuments = None,
    random_offsets: RandomOffsets = None,
):
    """Train a small student on what a large teacher knows, or store that first."""
    augmentation = augmentation_of(locals())
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
    text = {"corpus": corpus, "validation": validation, "separator": separator}
    course = {
        **text,
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
    import_tensorflow()
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
                **given_of({**text, "seed": seed}),
                **augmentation,
            )
        print_knowledge(store)
        return
    changes = given_of(course) | augmentation
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
        on_notice=notice,
        **changes,
    )
    print_result(result)


@app.command(
    # What follows the command's name is the command's own.
    context_settings={"allow_extra_args": True, "allow_interspersed_args": False}
)
def launch(
    context: typer.Context,
    workers: Annotated[int, typer.Option(help="Processes on this machine.")] = 2,
    trust_network: Annotated[
        bool,
        typer.Option(
            "--trust-network",
            help="Needed: all who can reach this machine may be trusted.",
        ),
    ] = False,
    max_restarts: Annotated[
        int, typer.Option(help="New starts in a row without a new checkpoint.")
    ] = 3,
    port: Annotated[
        int | None, typer.Option(help="First port of the workers; free ones if not.")
    ] = None,
    join_timeout: JoinTimeout = None,
):
    """Train with several workers on this machine: launch --workers 2 train --out ...

    TensorFlow lets them listen on every interface of the machine, not on the loopback
    only, and they obey whoever connects. Behind a firewall, or in a network of your
    own, say --trust-network.
    """
    from gpt_tf.parallel.launch import launch as launch_workers

    launch_workers(
        context.args,
        workers,
        trust_network=trust_network,
        max_restarts=max_restarts,
        port=port,
        join_timeout=join_timeout,
        on_line=functools.partial(print, flush=True),
    )
