"""The command that chooses among what was measured: recommend."""

from pathlib import Path
from typing import Annotated

import typer

from gpt_tf import artifacts
from gpt_tf.advisor.constraints import Budgets
from gpt_tf.cli.common import NOTHING_FITS
from gpt_tf.cli.options import Prefer, Scenario, options_of
from gpt_tf.errors import InputError


@options_of(Budgets, "budgets")
def recommend(
    report: Annotated[
        list[Path] | None,
        typer.Argument(
            help="A report.json, or the folder that holds it. Of several, accuracy and "
            "speed are each that of the last one that has it."
        ),
    ] = None,
    scenario: Scenario = "custom",
    prefer: Prefer = None,
    estimate: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_OR_FILE",
            help="Before anything is measured: a run, a model or a file whose sizes "
            "to estimate from.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON and nothing else.")
    ] = False,
    *,
    budgets: dict,
):
    """Choose the file to ship among those of a report, and say why.

    Accuracy and speed may be in reports of their own, of `evaluate` and of `benchmark`
    on the device: a file is known by its bytes.

    Budgets come before the scenario's. Exit status 3: nothing fits them.
    """
    if bool(report) == (estimate is not None):
        raise InputError(
            "`recommend` expects a report, or --estimate and a run or file. Received: "
            f"{'both' if report else 'neither'}. Write `gpt-tf recommend "
            "report.json`, for example."
        )
    if prefer is not None and estimate is not None:
        raise InputError(
            f"`prefer` expects a report to choose from. Received: {prefer!r} with "
            "--estimate, which lists every mode. Leave one out."
        )
    if estimate is not None:
        from gpt_tf.advisor.estimate import estimate_modes, print_estimates
        from gpt_tf.evaluation.hardware import describe_machine

        result = estimate_modes(estimate, describe_machine(), budgets, scenario)
        show, fits = print_estimates, any(m["fits"] != "no" for m in result["modes"])
    else:
        from gpt_tf.advisor import ranking
        from gpt_tf.evaluation.report import join_reports, read_report

        reports = [read_report(path) for path in report]
        joined = reports[0] if len(reports) == 1 else join_reports(reports)
        result = ranking.recommend(joined, budgets or None, scenario, prefer)
        show, fits = ranking.print_recommendation, result["choice"] is not None
    if as_json:
        typer.echo(
            artifacts.to_json(result, indent=2, sort_keys=True, ensure_ascii=False)
        )
    else:
        show(result)
    if not fits:
        raise typer.Exit(NOTHING_FITS)
