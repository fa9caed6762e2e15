"""The command that says what a file's accuracy is: evaluate."""

from pathlib import Path
from typing import Annotated

import typer

from gpt_tf.cli.common import command_line, import_tensorflow, notice
from gpt_tf.cli.options import Files, Report, options_of
from gpt_tf.training.config import TrainingConfig


@options_of(
    TrainingConfig,
    "text",
    ["corpus", "separator"],
    helps={
        "corpus": "Text that was held out: of a run's folder, of python-stdlib, or of "
        "files and folders as for train; a run brings its own. May be repeated."
    },
    defaults=False,
)
def evaluate(
    file: Files,
    whole: Annotated[
        bool, typer.Option("--whole", help="No model has seen any of --corpus.")
    ] = False,
    reference: Annotated[
        Path | None, typer.Option(help="What the others are compared with.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Tokens that are judged at most.")
    ] = 20_000,
    parse: Annotated[
        bool | None,
        typer.Option(
            help="Let it complete functions, and parse them; where the text is Python."
        ),
    ] = None,
    completions: Annotated[int, typer.Option(help="How many it completes.")] = 64,
    task: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines: prompt or messages, with answer, regex, or choices and "
            "the place of the right one. Text is judged too if --corpus is given.",
            rich_help_panel="Task",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            help="Tokens of an answer at most, of rows that do not say.",
            rich_help_panel="Task",
        ),
    ] = 64,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="Text that ends an answer, of rows that do not say; a line break if "
            "not given, where the answer is one line. May be repeated.",
            rich_help_panel="Task",
        ),
    ] = None,
    ignore_case: Annotated[
        bool,
        typer.Option(
            "--ignore-case",
            help="Capitals are equal to small letters.",
            rich_help_panel="Task",
        ),
    ] = False,
    out: Report = None,
    seed: Annotated[int, typer.Option(help="Same seed, same numbers.")] = 0,
    *,
    text: dict,
):
    """Measure how well files predict text that they have not seen, or do a task."""
    from gpt_tf.evaluation.accuracy import evaluate_files
    from gpt_tf.evaluation.models import is_keras
    from gpt_tf.evaluation.report import place_of_report, write_report
    from gpt_tf.evaluation.tasks import open_task
    from gpt_tf.evaluation.text import is_run
    from gpt_tf.reporting import tables

    options = {"max_new_tokens": max_new_tokens, "ignore_case": ignore_case}
    opened = None if task is None else open_task(task, stop=stop or None, **options)
    models = [*file, *([] if reference is None else [reference])]
    # A run's text is in tokens, which TensorFlow reads; several texts are no run's.
    is_runs = isinstance(text.get("corpus"), str) and is_run(text["corpus"])
    if is_runs or any(map(is_keras, models)):
        import_tensorflow()
    if out is not None:
        out = place_of_report(out)
    with tables.MeasurementProgress() as progress:
        made = evaluate_files(
            file,
            **text,
            whole=whole,
            reference=reference,
            max_tokens=max_tokens,
            parse=parse,
            completions=completions,
            seed=seed,
            task=opened,
            folder=None if out is None else out.parent,
            on_progress=progress.count,
        )
    made["command"] = command_line()
    tables.print_accuracy(made)
    tables.print_task(made)
    if out is not None:
        write_report(out, made)
        notice(f"report: {out}")
