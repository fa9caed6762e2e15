"""The command that talks with a model: chat."""

import functools
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from gpt_tf.cli.artefacts import opened
from gpt_tf.cli.options import (
    DraftFile,
    RepetitionPenalty,
    Seed,
    Speculate,
    Temperature,
    TopK,
    TopP,
    WeightCache,
)
from gpt_tf.errors import InputError
from gpt_tf.text.chat import ChatTemplate, read_source


def chat(
    model: Annotated[
        Path,
        typer.Option(
            help="A .litertlm, a run's or model's folder, a .gguf, or smollm2."
        ),
    ],
    system: Annotated[
        str | None, typer.Option(help="What the model is told before all messages.")
    ] = None,
    template: Annotated[
        Path | None, typer.Option(help="A chat template, instead of the model's own.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 512,
    temperature: Temperature = 0.7,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    speculate: Speculate = "lookup",
    draft: DraftFile = None,
    weight_cache: WeightCache = "disk",
):
    """Talk with a model, in the form that it was taught to chat in."""
    source = None if template is None else read_source(template)
    gpt, tokenizer, given = opened(
        model, speculate=speculate, draft=draft, weight_cache=weight_cache
    )
    own = tokenizer.chat_template
    if source is not None:
        tokenizer.chat_template = ChatTemplate(
            source, own.special_tokens if own else {}
        )
    elif own is None:
        raise InputError(
            f"`model` expects one with a chat template. Received: {model}, which has "
            "none. Name a template with --template, or use `gpt-tf generate`."
        )
    ask = functools.partial(
        gpt.chat,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stream=True,
        **given,
    )
    before = [{"role": "system", "content": system}] if system else []
    messages = [*before]
    is_typed = sys.stdin.isatty()
    if is_typed:
        _remark("/reset begins anew, /exit or Ctrl-D ends, Ctrl-C ends an answer.")
    while (line := _read(is_typed)) not in (None, "/exit"):
        if line == "/reset":
            messages = [*before]
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                answer = _answer(ask, messages, tokenizer)
            except InputError as error:
                if not is_typed:
                    raise
                _remark(f"gpt-tf: {error}")
                answer = ""
            if answer:
                messages.append({"role": "assistant", "content": answer})
            else:
                messages.pop()


def _read(is_typed):
    """Return the next line, or None behind the last."""
    while True:
        try:
            return input("> " if is_typed else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            if not is_typed:
                raise
            typer.echo()


def _answer(ask, messages, tokenizer):
    """Write an answer as it comes, and how fast it came; return it."""
    begun, times, text = time.perf_counter(), [], ""
    try:
        for piece in ask(messages):
            times.append(time.perf_counter())
            text += piece
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:  # what was said stays
        pass
    typer.echo()
    if times:
        count = len(tokenizer.encode(text))
        seconds = time.perf_counter() - times[0]
        speed = f", {(count - 1) / seconds:.1f} tokens/s" if count > 1 else ""
        _remark(f"[{count} tokens{speed}; the first after {times[0] - begun:.2f} s]")
    return text


def _remark(line):
    typer.echo(line, err=True)
