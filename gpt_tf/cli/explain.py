"""The command that says why a model said what it said."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gpt_tf.cli.common import app, import_tensorflow, notice
from gpt_tf.errors import InputError


@app.command()
def explain(
    file: Annotated[
        Path,
        typer.Argument(help="A .tflite or .litertlm, or a run's or model's folder."),
    ],
    prompt: Annotated[str, typer.Option(help="What the model read.")],
    target: Annotated[
        str | None,
        typer.Option(help="The next token to explain; default: the most likely."),
    ] = None,
    target_id: Annotated[int | None, typer.Option(help="The same by its id.")] = None,
    method: Annotated[
        str,
        typer.Option(help="lime or shap; of a Keras model attention or gradient too."),
    ] = "lime",
    samples: Annotated[
        int | None,
        typer.Option(help="Masked prompts to score, or steps of the gradient."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same scores.")] = 0,
    neutral: Annotated[
        str | None,
        typer.Option(help="Token in the place of one taken away; default: a space."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write it there: .html, .png, or a folder for both."),
    ] = None,
):
    """Say which tokens of a prompt made a model say the next one."""
    from gpt_tf.evaluation.models import is_keras, open_model
    from gpt_tf.explain.attribution import check_method
    from gpt_tf.explain.attribution import explain as explained
    from gpt_tf.reporting.explanations import (
        check_place,
        print_explanation,
        write_explanation,
    )

    if target is not None and target_id is not None:
        raise InputError(
            "A target is named by its text or by its id. Received: --target and "
            "--target-id. Leave out one."
        )
    if out is not None:
        check_place(out)
    if is_keras(file):
        import_tensorflow()
    with open_model(file) as subject:
        check_method(subject, method)
        with Console(stderr=True).status(f"{method}: scoring prompts"):
            explanation = explained(
                subject,
                prompt,
                target=target if target_id is None else target_id,
                method=method,
                num_samples=samples,
                seed=seed,
                neutral=neutral,
            )
    print_explanation(explanation)
    if out is not None:
        for path in write_explanation(explanation, out):
            notice(f"wrote {path}")
