"""The command that does it all: optimize."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from gpt_tf.cli.common import (
    Separator,
    Validation,
    app,
    given_of,
    import_tensorflow,
    notice,
)

# Nothing that was measured fits the budgets; the report says what comes nearest.
NOTHING_FITS = 3


@app.command()
def optimize(
    out: Annotated[Path, typer.Option(help="Folder of it all.")] = Path(
        "runs/optimized"
    ),
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            help="python-stdlib, shakespeare, or a file or folder; may be repeated."
        ),
    ] = None,
    validation: Validation = None,
    separator: Separator = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="A trained run or model as the teacher; else one is trained."
        ),
    ] = None,
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
    preset: Annotated[
        str | None,
        typer.Option(
            help="How the teacher is trained: quickstart, tiny, shakespeare-char, "
            "small."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Of the teacher.")] = None,
    student_layers: Annotated[
        list[int] | None,
        typer.Option(
            help="Blocks of a student; may be repeated. Half and a quarter of the "
            "teacher's if not given."
        ),
    ] = None,
    student_steps: Annotated[
        int | None, typer.Option(help="Of each student; a third of the teacher's.")
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="As for export; may be repeated. dynamic_int8, int8 and int4 if not "
            "given."
        ),
    ] = None,
    evaluated_tokens: Annotated[
        int | None, typer.Option(help="Held-out tokens to judge by; 20,000.")
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Of the request that is timed; 32.")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help="That the request asks for; 32.")
    ] = None,
    repetitions: Annotated[
        int | None, typer.Option(help="Requests of each file that count; 20.")
    ] = None,
    explained_prompts: Annotated[
        int | None,
        typer.Option(help="Prompts of the test of explanations; 50, or 0 for none."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of all that is random.")] = None,
    update: Annotated[
        bool, typer.Option(help="Other options than before: redo what they concern.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Begin anew in --out.")] = False,
):
    """Train, distil, quantise, export, measure, and choose the file for a budget.

    A second start goes on where the first was stopped. Exit status 3: nothing fits.
    """
    config = given_of(
        {
            "corpus": corpus,
            "validation": validation,
            "separator": separator,
            "model": model,
            "preset": preset,
            "steps": steps,
            "students": tuple(student_layers) if student_layers else None,
            "student_steps": student_steps,
            "modes": tuple(mode) if mode else None,
            "evaluated_tokens": evaluated_tokens,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "repetitions": repetitions,
            "explained_prompts": explained_prompts,
            "seed": seed,
        }
    )
    from gpt_tf.evaluation.budgets import Budgets

    budgets = Budgets(
        max_perplexity_increase=max_perplexity_increase,
        max_latency_ms=max_latency_ms,
        max_size_mb=max_size_mb,
    )
    import_tensorflow()
    from gpt_tf import optimization
    from gpt_tf.evaluation.advisor import print_recommendation

    report = optimization.optimize(
        config,
        out,
        budgets=budgets,
        scenario=scenario,
        prefer=prefer,
        update=update,
        overwrite=overwrite,
        command=shlex.join(["gpt-tf", *sys.argv[1:]]),
        on_notice=notice,
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
