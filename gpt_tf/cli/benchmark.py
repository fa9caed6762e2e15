"""The command that says how fast files and servers are: benchmark."""

import os
from pathlib import Path
from typing import Annotated

import typer

from gpt_tf.cli.common import command_line, notice
from gpt_tf.cli.options import MODEL_OR_FILE, Report
from gpt_tf.errors import InputError


def benchmark(
    file: Annotated[list[Path] | None, typer.Argument(help=MODEL_OR_FILE)] = None,
    server: Annotated[
        str | None,
        typer.Option(
            help="Address of a server of OpenAI's protocol, instead of files; its key "
            "is that of the environment's GPT_TF_API_KEY."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Which of the server's models; the first.")
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            help="Length of the prompt; 64, or 16 if --quick, or the baseline's, or "
            "half of a shorter context."
        ),
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help="Tokens to write; as many as the prompt.")
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
    thread_counts: Annotated[
        str | None,
        typer.Option(
            "--by-threads", help="Other numbers of threads: 1,2,4. None if --quick."
        ),
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
    out: Report = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Less of everything: a first look.")
    ] = False,
):
    """Measure how fast files answer, in turn, each in processes of its own."""
    from gpt_tf.evaluation.latency import REPETITIONS, REQUESTS, ROUNDS, measure_files
    from gpt_tf.evaluation.regression import (
        compare_with_baseline,
        read_baseline,
        request_of,
    )
    from gpt_tf.evaluation.report import place_of_report, write_report
    from gpt_tf.evaluation.server_load import measure_server
    from gpt_tf.reporting import tables

    settings = {
        "prompt_tokens": 16 if quick else None,
        "new_tokens": 16 if quick else None,
        "repetitions": 10 if quick else REPETITIONS,
        # A comparison takes the medians of as many processes.
        "rounds": 2 if quick and baseline is None else ROUNDS,
        "contexts": () if quick else None,
        "thread_counts": () if quick else None,
        "requests": (1, 4) if quick else REQUESTS,
    }
    given = {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repetitions": repetitions,
        "contexts": _numbers("contexts", contexts),
        "thread_counts": _numbers("thread_counts", thread_counts),
        "requests": _numbers("requests", requests),
    }
    settings |= {name: value for name, value in given.items() if value is not None}
    if out is not None:
        out = place_of_report(out)
    if server is not None:
        _check_of_server(
            file=file,
            threads=threads,
            contexts=contexts,
            thread_counts=thread_counts,
            engine=engine.removeprefix("gpt_tf"),
            baseline=baseline,
        )
    if baseline is not None:
        sizes = {name: settings[name] for name in ("prompt_tokens", "new_tokens")}
        stored = read_baseline(baseline, **sizes)
        settings |= request_of(stored)
    with tables.MeasurementProgress() as progress:
        shared = {"command": command_line(), "on_progress": progress.turn}
        if server is not None:
            del settings["contexts"], settings["thread_counts"]
            key = os.environ.get("GPT_TF_API_KEY") or None
            made = measure_server(
                server, model=model, api_key=key, **settings, **shared
            )
        else:
            made = measure_files(
                file or [],
                threads=threads,
                engine=engine,
                out=out,
                **settings,
                **shared,
            )
    tables.print_latency(made)
    if out is not None:
        write_report(out, made)
        notice(f"report: {out}")
    if baseline is not None:
        compared = compare_with_baseline(made, stored)
        tables.print_baseline(compared)
        if compared["regressed"]:
            raise typer.Exit(1)


def _check_of_server(**given):
    """Refuse options that are about files."""
    for name, value in given.items():
        if value:
            raise InputError(
                f"`{name}` is about files. Received: --server too. Leave one out."
            )


def _numbers(name, text):
    """Return the numbers of a list with commas; none of an empty one."""
    if not text:
        return text if text is None else []
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"`{name}` expects whole numbers with commas between, 16,64 for example. "
            f"Received: {text!r}."
        ) from None
