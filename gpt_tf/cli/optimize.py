"""The command that does it all: optimize."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from gpt_tf.cli.common import app, import_tensorflow, notice
from gpt_tf.cli.options import options_of
from gpt_tf.workflow.config import OptimizationConfig

# Nothing that was measured fits the budgets; the report says what comes nearest.
NOTHING_FITS = 3


@app.command()
@options_of(
    OptimizationConfig,
    "config",
    renamed={"students": "student_layers", "modes": "mode"},
)
def optimize(
    out: Annotated[Path, typer.Option(help="Folder of it all.")] = Path(
        "runs/optimized"
    ),
    max_perplexity_increase: Annotated[
        str | None, typer.Option(help="Over the teacher's: 3% or 0.03.")
    ] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(help="Between two tokens, 95th percentile.")
    ] = None,
    max_size_mb: Annotated[
        float | None, typer.Option(help="Of the file, in 10^6 bytes.")
    ] = None,
    scenario: Annotated[
        str, typer.Option(help="phone, board, server or custom.")
    ] = "custom",
    prefer: Annotated[
        str | None,
        typer.Option(
            help="What is to be best within the budgets: accuracy, latency, size, "
            "memory, first_token, throughput or balance. What has no budget if not "
            "given, and the most room in the tightest one where all have one."
        ),
    ] = None,
    update: Annotated[
        bool, typer.Option(help="Other options than before: redo what they concern.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Begin anew in --out.")] = False,
    *,
    config: dict,
):
    """Train, distil, quantise, export, measure, and choose the file for a budget.

    A second start goes on where the first was stopped. Exit status 3: nothing fits.
    """
    from gpt_tf.advisor.constraints import Budgets

    budgets = Budgets(
        max_perplexity_increase=max_perplexity_increase,
        max_latency_ms=max_latency_ms,
        max_size_mb=max_size_mb,
    )
    import_tensorflow()
    from gpt_tf.advisor.ranking import print_recommendation
    from gpt_tf.workflow import optimization

    report = optimization.optimize(
        config,
        out,
        budgets=budgets,
        scenario=scenario,
        prefer=prefer,
        update=update,
        overwrite=overwrite,
        command=shlex.join(["gpt-tf", *sys.argv[1:]]),
    )
    print_recommendation(report["recommendation"])
    notice(f"report: {out / 'report.html'}")
    if report["recommendation"]["choice"] is None:
        raise typer.Exit(NOTHING_FITS)
    sample = report["recommendation"]["sample"]
    chosen = shlex.quote(str(out / optimization.CHOSEN_NAME))
    prompt = shlex.quote(sample["prompt"])
    # Not folded: a command is copied.
    typer.echo(f"\n$ gpt-tf generate --model {chosen} --prompt {prompt}\n")
    typer.echo(sample["prompt"] + sample["text"])
