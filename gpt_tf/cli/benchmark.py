"""The command that says how fast files are."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from gpt_tf.cli.common import app, notice
from gpt_tf.errors import InputError


@app.command()
def benchmark(
    file: Annotated[
        list[Path],
        typer.Argument(help="A .tflite or .litertlm, or a run's or model's folder."),
    ],
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Length of the prompt; 64, or 16 if --quick.")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help="Tokens to write; 64, or 16 if --quick.")
    ] = None,
    repetitions: Annotated[
        int | None, typer.Option(help="Requests of each file; 20, or 10 if --quick.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads that compute; the physical cores.")
    ] = None,
    contexts: Annotated[
        str | None,
        typer.Option(help="Lengths of other prompts: 16,64. None if --quick."),
    ] = None,
    by_threads: Annotated[
        str | None,
        typer.Option(help="Other numbers of threads: 1,2,4. None if --quick."),
    ] = None,
    requests: Annotated[
        str | None,
        typer.Option(help="Numbers of requests at once; 1,2,4,8, or 1,4 if --quick."),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(help="gpt_tf; litert-lm, Google's, for a .litertlm; or both."),
    ] = "gpt_tf",
    baseline: Annotated[
        Path | None,
        typer.Option(help="A stored report; status 1 if something got worse."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the report there, as JSON.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Less of everything: a first look.")
    ] = False,
):
    """Measure how fast files answer, in turn, each in processes of its own."""
    from gpt_tf.evaluation.latency import REPETITIONS, REQUESTS, ROUNDS, measure_files
    from gpt_tf.evaluation.regression import compare_with_baseline, read_baseline
    from gpt_tf.evaluation.report import place_of_report, write_report
    from gpt_tf.reporting import tables

    tokens = 16 if quick else 64
    sizes = {
        "prompt_tokens": tokens if prompt_tokens is None else prompt_tokens,
        "new_tokens": tokens if new_tokens is None else new_tokens,
    }
    if repetitions is None:
        repetitions = 10 if quick else REPETITIONS
    others = () if quick else None
    if out is not None:
        out = place_of_report(out)
    stored = None if baseline is None else read_baseline(baseline, **sizes)
    with tables.MeasurementProgress() as progress:
        made = measure_files(
            file,
            **sizes,
            repetitions=repetitions,
            # A comparison takes the medians of as many processes.
            rounds=2 if quick and stored is None else ROUNDS,
            threads=threads,
            contexts=_numbers("--contexts", contexts, others),
            thread_counts=_numbers("--by-threads", by_threads, others),
            requests=_numbers("--requests", requests, (1, 4) if quick else REQUESTS),
            engine=engine,
            out=out,
            command=shlex.join(["gpt-tf", *sys.argv[1:]]),
            on_progress=progress.turn,
        )
    tables.print_latency(made)
    if out is not None:
        write_report(out, made)
        notice(f"report: {out}")
    if stored is not None:
        compared = compare_with_baseline(made, stored)
        tables.print_baseline(compared)
        if compared["regressed"]:
            raise typer.Exit(1)


def _numbers(option, text, default):
    """Return the numbers of a list with commas; none of an empty one."""
    if text is None:
        return default
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise InputError(
            f"{option} expects whole numbers with commas between, 16,64 for example. "
            f"Received: {text!r}."
        ) from None
