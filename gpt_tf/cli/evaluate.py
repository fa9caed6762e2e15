"""The command that says what a file's accuracy is."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

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

    named = [*file, *([] if reference is None else [reference])]
    # A run's text is in tokens, which TensorFlow reads.
    if any(map(is_keras, named)) or any(map(is_run, corpus or ())):
        import_tensorflow()
    if out is not None:
        out = place_of_report(out)
    with _Bars() as bars:
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
            on_progress=bars.update,
        )
    made["command"] = shlex.join(["gpt-tf", *sys.argv[1:]])
    _print_accuracy(made)
    if out is not None:
        write_report(out, made)
        notice(f"report: {out}")


class _Bars:
    """A bar for each thing that is counted, gone once it is done."""

    def __init__(self):
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks = {}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._progress.stop()

    def update(self, what, done, total):
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
            self._progress.start()
        self._progress.update(self._tasks[what], completed=done)


# Headings in two lines: with all columns it has room in 80 characters.
_COLUMNS = (
    ("perplexity", "perplexity", "{:,.2f}", 1),
    ("increase\n%", "perplexity_increase", "{:+.2f}", 100),
    ("bits a\nbyte", "bits_per_byte", "{:.3f}", 1),
    ("right\n%", "token_accuracy", "{:.1f}", 100),
    ("KL\nnats", "divergence_nats", "{:.2g}", 1),
    ("agreed\n%", "top1_agreement", "{:.1f}", 100),
)


def _print_accuracy(made):
    entries, corpus = made["entries"], made["corpus"]
    # Columns in which nothing stands only take space.
    columns = [
        column
        for column in _COLUMNS
        if any(entry["accuracy"][column[1]] for entry in entries)
    ]
    parsed = [entry["accuracy"]["parsed"] for entry in entries]
    table = Table(
        title="Accuracy; below each value the ends of its 95 % interval",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_lines=True,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("file", overflow="fold")
    for title, *_ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    if any(parsed):
        table.add_column("parsed\n%", justify="right", no_wrap=True)
    for entry in entries:
        cells = [
            _cell(entry["accuracy"][part], form, scale)
            for _, part, form, scale in columns
        ]
        if any(parsed):
            found = entry["accuracy"]["parsed"]
            cells.append(_cell(found and found["share"], "{:.0f}", 100))
        size = f"{entry['size_bytes'] / 1e6:,.2f} MB"
        # A name may hold brackets; none of it is rich's markup.
        name = Text(f"{entry['name']}\n{entry['mode']}\n{size}")
        table.add_row(name, *cells)
    Console().print(table)
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


def _cell(interval, form, scale):
    if interval is None:
        return "-"
    return "\n".join(
        form.format(interval[part] * scale) for part in ("value", "low", "high")
    )
