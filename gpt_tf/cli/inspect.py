"""The command that says what a GPT is before it is opened: inspect."""

from typing import Annotated

import typer

from gpt_tf import artifacts


def inspect(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of Hugging Face's or KerasHub's, a .gguf, nanoGPT's "
            "ckpt.pt, hf://owner/name, smollm2; a run, a .keras, a .tflite or a "
            ".litertlm of gpt_tf's."
        ),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON and nothing else.")
    ] = False,
):
    """Say what a GPT is, what it needs here, and what can be done with it."""
    from gpt_tf.advisor.inspection import inspect_source, print_inspection

    found = inspect_source(source)
    if as_json:
        typer.echo(artifacts.to_json(found, indent=2, ensure_ascii=False))
    else:
        print_inspection(found)
