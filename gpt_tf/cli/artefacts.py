"""The commands for a finished model: export, generate."""

import itertools
import sys
from pathlib import Path
from typing import Annotated

import typer

from gpt_tf.bundled_model import shipped_model
from gpt_tf.cli.common import import_tensorflow
from gpt_tf.cli.options import (
    DraftFile,
    RepetitionPenalty,
    Seed,
    Speculate,
    Temperature,
    TopK,
    TopP,
    WeightCache,
)
from gpt_tf.errors import InputError
from gpt_tf.pretrained.source import is_keras, is_name
from gpt_tf.quantization.modes import MODES


def export(
    model: Annotated[Path, typer.Option(help="A run's or model's folder.")],
    out: Annotated[
        Path, typer.Option(help="File to write, .litertlm or .tflite.")
    ] = Path("gpt.litertlm"),
    mode: Annotated[str, typer.Option(help=f"{', '.join(MODES)}.")] = "dynamic_int8",
    corpus: Annotated[
        list[str] | None,
        typer.Option(help="Typical text; a run brings its own. As for train."),
    ] = None,
    context_length: Annotated[
        int | None, typer.Option(help="Tokens that the cache holds at most.")
    ] = None,
    prefill_lengths: Annotated[
        list[int] | None,
        typer.Option(
            "--prefill-length",
            help="Tokens a prefill takes at once; may be repeated.",
        ),
    ] = None,
    batch_sizes: Annotated[
        list[int] | None,
        typer.Option(
            "--batch-size",
            help="Texts that a server decodes at once: 2, 4, 8, 16; may be repeated. "
            "Default: 4 and 8 for models of 10 million parameters or more.",
        ),
    ] = None,
    prepare: Annotated[
        bool | None,
        typer.Option(
            help="Equalise weights, and round those of int4 by GPTQ. Default: of a "
            "model that was trained elsewhere, and of runs that began with one."
        ),
    ] = None,
    allow_untrained: Annotated[
        bool, typer.Option(help="Write a model that was never trained too.")
    ] = False,
):
    """Write a trained model as one file for a device, verified."""
    import_tensorflow()
    from gpt_tf.export.from_run import export_trained
    from gpt_tf.progress import print_export

    options = {"batch_sizes": batch_sizes}
    if prefill_lengths:
        options["prefill_lengths"] = prefill_lengths
    manifest = export_trained(
        model,
        out,
        mode,
        corpus=corpus or None,
        context_length=context_length,
        prepare=prepare,
        allow_untrained=allow_untrained,
        **options,
    )
    print_export(manifest, out)


def generate(
    model: Annotated[
        Path | None,
        typer.Option(
            help="A run's or model's folder, a .tflite or .litertlm; "
            "without it, the small model of Python that comes along."
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What to continue; without it, a dialogue.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.")] = 128,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    speculate: Speculate = "lookup",
    draft: DraftFile = None,
    weight_cache: WeightCache = "disk",
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends it; may be repeated.")
    ] = None,
    literal: Annotated[
        bool,
        typer.Option(
            "--literal", help="Special tokens in the prompt, <|endoftext|>, are text."
        ),
    ] = False,
):
    """Continue a prompt, streaming; without a prompt, line by line from you."""
    gpt, tokenizer, given = opened(
        model or shipped_model(),
        speculate=speculate,
        draft=draft,
        weight_cache=weight_cache,
    )

    def answer(text):
        if text.endswith(" ") and tokenizer.kind == "bpe":
            typer.echo(
                "gpt-tf: The prompt ends in a space. Words are tokens that begin with "
                "theirs, so a model writes better without it.",
                err=True,
            )
        pieces = gpt.generate(
            # In bytes no special tokens are recognised.
            text.encode("utf-8", "surrogateescape") if literal else text,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop or (),
            stream=True,
            **given,
        )
        for piece in itertools.chain([text], pieces, ["\n"]):
            sys.stdout.write(piece)
            sys.stdout.flush()

    if prompt is not None:
        answer(prompt)
        return
    typer.echo("Type a beginning; an empty line ends.", err=True)
    try:
        while line := input("> "):
            answer(line)
    except EOFError:
        return


def opened(model, **options):
    """Open what writes text.

    Args:
        model: A file or a folder.
        **options: As for `EdgeGPT`, where it is a file.

    Returns:
        It, with `generate` and `chat`; its tokenizer; and what these two are to be
        given, the tokenizer or nothing.
    """
    # Before anything is imported that a device may lack.
    if not (is_name(model) or model.exists()):
        raise InputError(
            f"`model` expects a file or a folder. Received: {model}; there is none. "
            "Check the path."
        )
    if is_keras(model):
        if options.get("draft") is not None:
            raise InputError(
                f"`draft` expects an exported file as the model. Received: {model}. "
                "Export it first, or leave the draft out."
            )
        import_tensorflow()
        from gpt_tf.training.loop import load_model

        gpt, tokenizer = load_model(model)
        given = {"tokenizer": tokenizer}
    else:
        from gpt_tf.edge import EdgeGPT

        gpt = EdgeGPT(model, **options)
        tokenizer, given = gpt.tokenizer, {}
    if tokenizer is None:
        raise InputError(
            f"Expected tokenizer.json with the model {model}. Put it there, or name "
            "what `gpt-tf train` or `gpt-tf export` wrote."
        )
    return gpt, tokenizer, given
