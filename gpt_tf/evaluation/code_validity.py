"""Syntactic validity of generated code: the share of completions that parse as Python.

A prompt is the beginning of a function of a held-out file, dedented: its signature and
docstring, or its signature and the first line of its body, without the line break at
its end. Only prompts that parse alone count, of functions whose own text is accepted.

A completion ends with its last complete line, and before the first line at the margin,
where the function's block ends. It is accepted if prompt and completion together parse,
and if it has a line of code after the prompt's own: blank lines and comments do not
complete a function.

The function's own text, cut after as many tokens, is judged alike. Where the cut lies
within a statement it is refused as well: its share is what can be reached.
"""

import ast
import codecs
import itertools
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from gpt_tf.errors import InputError
from gpt_tf.evaluation.models import check_open, check_tokenizer
from gpt_tf.evaluation.text import HeldOutText
from gpt_tf.generation.sequence import GenerationNotice
from gpt_tf.settings import arguments

COUNT = 64
MAX_NEW_TOKENS = 64
TEMPERATURE = 0.8

_LONGEST_PROMPT = 400
_FUNCTIONS_PER_DOCUMENT = 3
_Z = 1.959964  # of 95 %


class Prompt(NamedTuple):
    """The beginning of a function, and the function's own text after it."""

    text: str
    rest: str


def measure_code_validity(
    model,
    prompts: list[Prompt],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = TEMPERATURE,
    seed: int = 0,
    name: str = "the model",
    on_progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Measure the share of completions of Python functions that `ast.parse` accepts.

    Args:
        model: An `EdgeGPT` or `KerasGPT` with its tokenizer.
        prompts: Those that `find_prompts` found in held-out Python files.
        max_new_tokens, temperature, seed: As for `generate`.
        name: How messages call the model.
        on_progress: Called with completions done and all of them.

    Returns:
        `share`, an INTERVAL of `gpt_tf.evaluation.report` after Wilson;
        `of_true_text`, the share of the functions' own text; and `count`.

    Raises:
        InputError: There are no prompts.

    Example:
        >>> prompts = find_prompts(held_out_text("python-stdlib"))
        >>> measure_code_validity(gpt, prompts)["share"]["value"]

    Reference: Wilson, "Probable Inference, the Law of Succession, and Statistical
    Inference", Journal of the American Statistical Association 22 (1927).
    """
    arguments.integer("max_new_tokens", max_new_tokens, 1)
    arguments.number("temperature", temperature, least=0)
    arguments.integer("seed", seed)
    check_open(model)
    check_tokenizer(model.tokenizer, name)
    if not prompts:
        raise InputError(
            "Parsing completions expects Python functions of several statements. "
            "Received: text without any. Name a corpus of .py files."
        )
    tokenizer, accepted, true = model.tokenizer, 0, 0
    for index, prompt in enumerate(prompts):
        own_seed = int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
        text, is_whole = _complete(
            model, prompt.text, max_new_tokens, temperature, own_seed
        )
        accepted += is_accepted(prompt.text, text, is_whole)
        ids = tokenizer.encode(prompt.rest)
        is_whole = len(ids) <= max_new_tokens
        text = tokenizer.decode(ids[:max_new_tokens])
        true += is_accepted(prompt.text, text, is_whole)
        if on_progress is not None:
            on_progress(index + 1, len(prompts))
    return {
        "share": wilson_interval(accepted, len(prompts)),
        "of_true_text": true / len(prompts),
        "count": len(prompts),
    }


def find_prompts(documents, count: int = COUNT, seed: int = 0) -> list[Prompt]:
    """Find beginnings of functions, at most three of a file.

    Args:
        documents: Text as for `measure_accuracies`; what is no Python is left out.
        count: Number of prompts, at least 1; fewer are found where there are no more.
        seed: Decides which.
    """
    arguments.integer("count", count, 1)
    arguments.integer("seed", seed)
    documents = HeldOutText.of(documents).documents
    generator = np.random.default_rng([seed, 1])
    prompts = []
    for place in generator.permutation(len(documents)):
        found = list(_prompts_of(documents[place].text))
        order = generator.permutation(len(found))[:_FUNCTIONS_PER_DOCUMENT]
        prompts += [found[index] for index in sorted(order)]
        if len(prompts) >= count:
            break
    return prompts[:count]


def is_accepted(prompt: str, completion: str, is_whole: bool = False) -> bool:
    """Tell whether a completion continues a function so that it parses.

    Args:
        prompt: The function's beginning, at the margin.
        completion: What follows.
        is_whole: Whether it ended by itself, so that its last line is complete.

    Example:
        >>> is_accepted("def f(x):\\n    y = x", "\\n    return y\\n\\nf(1)")
        True
    """
    lines = completion.split("\n")
    if not is_whole:
        lines.pop()
    own = itertools.takewhile(lambda line: not _is_at_margin(line), lines[1:])
    block = [*lines[:1], *own]
    code = [line for line in block[1:] if line.strip() and line.strip()[0] != "#"]
    return bool(code) and _parse(prompt + "\n".join(block) + "\n") is not None


def wilson_interval(successes: int, count: int) -> dict[str, float]:
    """Return a share as `value` with its 95 % interval after Wilson, `low` to `high`.

    Example:
        >>> round(wilson_interval(0, 10)["high"], 3)
        0.278
    """
    share, spread = successes / count, _Z**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return {
        "value": share,
        "low": min(share, max(0.0, middle - half)),
        "high": max(share, min(1.0, middle + half)),
    }


def _complete(model, prompt, max_new_tokens, temperature, seed):
    """Return the completion until the block ends, and whether it ended by itself."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    tokenizer, text, count = model.tokenizer, "", 0
    with warnings.catch_warnings():
        # Where the context is small, the prompt's end has to do.
        warnings.simplefilter("ignore", GenerationNotice)
        tokens = model.generate(
            tokenizer.encode(prompt),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            stream=True,
        )
    for token in tokens:
        count += 1
        text += decoder.decode(tokenizer.decode_bytes([token]))
        if any(map(_is_at_margin, text.split("\n")[1:])):
            return text, False
    return text + decoder.decode(b"", final=True), count < max_new_tokens


def _is_at_margin(line):
    return bool(line) and not line[0].isspace()


def _prompts_of(text):
    """Yield prompts of the functions in a file's text."""
    tree = _parse(text)
    # Python counts lines by these alone; `splitlines` knows more.
    if tree is None or "\r" in text:
        return
    lines = text.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            prompt = _prompt_of(lines, node)
            if prompt is not None:
                yield prompt


def _prompt_of(lines, node):
    indent, first = node.col_offset, node.body[0]
    own = lines[node.lineno - 1 : node.end_lineno]
    if any(line[:indent].strip() for line in own):
        return None  # a string that reaches to the margin
    own = [line[indent:] for line in own]
    has_docstring = ast.get_docstring(node, clean=False) is not None
    end = first.end_lineno if has_docstring else first.lineno
    length = end - node.lineno + 1
    prompt = Prompt("\n".join(own[:length]), "\n" + "\n".join(own[length:]))
    if len(prompt.text) > _LONGEST_PROMPT or _parse(prompt.text) is None:
        return None
    return prompt if is_accepted(prompt.text, prompt.rest, is_whole=True) else None


def _parse(text):
    """Return the syntax tree, or None; what Python warns of is not of interest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
