"""The command that does it all: optimize."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from gpt_tf.advisor.constraints import Budgets
from gpt_tf.cli.common import NOTHING_FITS, command_line, import_tensorflow, notice
from gpt_tf.cli.options import Prefer, Scenario, options_of
from gpt_tf.workflow.config import OptimizationConfig


@options_of(
    OptimizationConfig,
    "config",
    spelled={"students": "--student-layers", "modes": "--mode"},
)
@options_of(
    Budgets,
    "budgets",
    ["max_perplexity_increase", "max_score_drop", "max_latency_ms", "max_size_mb"],
)
def optimize(
    out: Annotated[Path, typer.Option(help="Folder of it all.")] = Path(
        "runs/optimized"
    ),
    scenario: Scenario = "custom",
    prefer: Prefer = None,
    update: Annotated[
        bool, typer.Option(help="Other options than before: redo what they concern.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Begin anew in --out.")] = False,
    *,
    config: dict,
    budgets: dict,
):
    """Train, distil, quantise, export, measure, and choose the file for a budget.

    A second start goes on where the first was stopped. Exit status 3: nothing fits.
    """
    budgets = Budgets(**budgets)  # refused before TensorFlow is imported
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
        command=command_line(),
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
