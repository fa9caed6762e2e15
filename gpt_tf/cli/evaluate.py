"""The command that says what a file's accuracy is."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from gpt_tf.cli.common import app, import_tensorflow, notice
from gpt_tf.cli.options import options_of
from gpt_tf.training.config import TrainingConfig


@app.command()
@options_of(TrainingConfig, "text", ["separator"])
def evaluate(
    file: Annotated[
        list[Path],
        typer.Argument(help="A .tflite or .litertlm, or a run's or model's folder."),
    ],
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            help="Text that was held out: of a run's folder, of python-stdlib, or of "
            "files and folders as for train; a run brings its own. May be repeated."
        ),
    ] = None,
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
    out: Annotated[
        Path | None, typer.Option(help="Write the report there, as JSON.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same numbers.")] = 0,
    *,
    text: dict,
):
    """Measure how well files predict text that they have not seen."""
    from gpt_tf.evaluation.accuracy import evaluate_files
    from gpt_tf.evaluation.models import is_keras
    from gpt_tf.evaluation.report import place_of_report, write_report
    from gpt_tf.evaluation.text import is_run
    from gpt_tf.reporting import tables

    named = [*file, *([] if reference is None else [reference])]
    # A run's text is in tokens, which TensorFlow reads.
    if any(map(is_keras, named)) or any(map(is_run, corpus or ())):
        import_tensorflow()
    if out is not None:
        out = place_of_report(out)
    with tables.MeasurementProgress() as progress:
        made = evaluate_files(
            file,
            corpus=corpus[0] if corpus and len(corpus) == 1 else corpus or None,
            whole=whole,
            **text,
            reference=reference,
            max_tokens=max_tokens,
            parse=parse,
            completions=completions,
            seed=seed,
            folder=None if out is None else out.parent,
            on_progress=progress.count,
        )
    made["command"] = shlex.join(["gpt-tf", *sys.argv[1:]])
    tables.print_accuracy(made)
    _say_what_was_judged(made)
    if out is not None:
        write_report(out, made)
        notice(f"report: {out}")


def _say_what_was_judged(made):
    entries, corpus = made["entries"], made["corpus"]
    parsed = [entry["accuracy"]["parsed"] for entry in entries]
    blocks = entries[0]["accuracy"]["blocks"]
    notice(
        f"{corpus['tokens']:,} tokens, {corpus['bytes']:,} bytes in {blocks} blocks of "
        f"{corpus['name']} ({corpus['split']})"
        + (f"; compared with {made['reference']}" if made["reference"] else "")
    )
    if any(parsed):
        shares = {f"{found['of_true_text']:.0%}" for found in parsed if found}
        notice(
            f"parsed: {parsed[0]['count']} functions completed; of their own text, cut "
            f"likewise, {' or '.join(sorted(shares))}"
        )
