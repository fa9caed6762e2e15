"""The command that says why a model said what it said: explain."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gpt_tf.cli.common import import_tensorflow, notice
from gpt_tf.cli.options import MODEL_OR_FILE


def explain(
    file: Annotated[Path, typer.Argument(help=MODEL_OR_FILE)],
    prompt: Annotated[str, typer.Option(help="What the model read.")],
    target: Annotated[
        str | None,
        typer.Option(help="The next token to explain; default: the most likely."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(help="lime or shap; of a Keras model attention or gradient too."),
    ] = "lime",
    num_samples: Annotated[
        int | None,
        typer.Option(
            "--samples", help="Masked prompts to score, or steps of the gradient."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same scores.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Write it there: .html, .png, or a folder for both."),
    ] = None,
):
    """Say which tokens of a prompt made a model say the next one."""
    from gpt_tf.evaluation.models import open_model
    from gpt_tf.explain import attribution
    from gpt_tf.pretrained.source import is_keras
    from gpt_tf.reporting import explanations

    if out is not None:
        explanations.check_place(out)
    if is_keras(file):
        import_tensorflow()
    with open_model(file) as model:
        attribution.check_method(model, method)
        with Console(stderr=True).status(f"{method}: scoring prompts"):
            explanation = attribution.explain_prompt(
                model,
                prompt,
                target=target,
                method=method,
                num_samples=num_samples,
                seed=seed,
            )
    explanations.print_explanation(explanation)
    if out is not None:
        for path in explanations.write_explanation(explanation, out):
            notice(f"wrote {path}")
