"""How much of a task a model does: the share of rows that it answers rightly.

A task is a file of JSON lines, all of one kind. Each has a `prompt`, or `messages` for
the tokenizer's chat template, and what is right:

- `"answer": "Paris"`: the answer is that text, but for spaces around both; with
  `"ignore_case": true` in capitals or not. It ends at a line break unless `stop` says
  where.
- `"regex": "..."`: the regular expression is found somewhere in the answer.
- `"choices": [" Paris", " Rome"], "answer": 0`: of all choices the one at this place,
  from 0, is the most likely continuation, by log-probability per byte of the choice. A
  choice follows the prompt as it is: it begins with a space where one belongs. The
  unnormalised sum is told as well, and decides nothing.

Answers are the most likely tokens, at most `max_new_tokens` and what the context has
room for, up to a text of `stop`; both may stand in a row.

A score's interval is Wilson's; that of a difference is Newcombe's for pairs, since all
files answer the same rows. Both are the sampling error of the rows.

Reference: Newcombe, "Improved Confidence Intervals for the Difference between Binomial
Proportions Based on Paired Data", Statistics in Medicine 17 (1998), method 10; Gao et
al., "A Framework for Few-Shot Language Model Evaluation" (lm-eval), whose `acc_bytes`
and `acc` of multiple choice these are.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt_tf import artifacts
from gpt_tf.errors import InputError
from gpt_tf.evaluation.code_validity import wilson_interval
from gpt_tf.evaluation.models import check_open, check_tokenizer
from gpt_tf.evaluation.patterns import Patterns
from gpt_tf.evaluation.report import TaskScore, note
from gpt_tf.generation.sampler import log_softmax
from gpt_tf.generation.sequence import common_length
from gpt_tf.settings import arguments
from gpt_tf.text.records import read_records

MAX_NEW_TOKENS = 64
# What tells a kind, by the fields that a row of it has.
KINDS = {
    "exact": "an answer that is a text",
    "regex": "a regular expression",
    "choice": "choices and the place of the right one",
}
_FIELDS = {
    *("prompt", "messages", "answer", "regex", "choices"),
    *("max_new_tokens", "stop", "ignore_case"),
}
_SHOWN_CHARACTERS = 200


class Row(NamedTuple):
    """One question of a task, and what is right."""

    line: int  # of the file
    prompt: str | list  # a text, or messages
    right: str | int  # the answer, the regular expression, or the choice's place
    choices: tuple[str, ...]  # empty where the answer is generated
    max_new_tokens: int
    stop: tuple[str, ...]
    ignore_case: bool


@dataclasses.dataclass(frozen=True)
class Task:
    """The rows of a task, all of one kind.

    Attributes:
        name: Of its file.
        kind: One of `KINDS`.
        rows: At least one.
        sha256: Of its file.
    """

    name: str
    kind: str
    rows: tuple[Row, ...]
    sha256: str

    def describe(self) -> dict:
        """Return what a report says of it."""
        facts = {"name": self.name, "kind": self.kind, "rows": len(self.rows)}
        return facts | {"sha256": self.sha256}


def open_task(
    path: str | os.PathLike,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    stop: Sequence[str] | None = None,
    ignore_case: bool = False,
) -> Task:
    """Read a task, and refuse it where a row could not be judged.

    Args:
        path: A file of JSON lines.
        max_new_tokens: Tokens of a generated answer at most, of rows that do not say.
        stop: Texts that end an answer, of rows that do not say; default: a line break
            where the answer is one line, else none.
        ignore_case: Whether capitals are equal to small letters, of rows that do not
            say.

    Raises:
        InputError: There is no row, or a row is broken, has no answer, or is of another
            kind than the first. The message names its line.

    Example:
        >>> open_task("capitals.jsonl").kind
        'exact'
    """
    defaults = {
        "max_new_tokens": arguments.integer("max_new_tokens", max_new_tokens, 1),
        "stop": None if stop is None else tuple(arguments.texts("stop", stop)),
        "ignore_case": arguments.switch("ignore_case", ignore_case),
    }
    records = read_records(path)
    kinds, rows = [], []
    with Patterns() as patterns:
        for line, record in records:
            try:
                kinds.append(_kind_of(record))
                rows.append(_row_of(line, record, kinds[-1], defaults))
                if kinds[-1] == "regex" and patterns.find(rows[-1].right, "") is None:
                    expected = "a regular expression that ends in time"
                    arguments.refuse("regex", rows[-1].right, expected)
                if kinds[-1] != kinds[0]:
                    raise InputError(
                        f"All rows expect to be of one kind. Received: "
                        f"{KINDS[kinds[-1]]}, after {KINDS[kinds[0]]}. Make two files."
                    )
            except InputError as error:
                raise InputError(f"{path}, line {line}: {error}") from None
    return Task(Path(path).name, kinds[0], tuple(rows), artifacts.sha256_of(path))


def measure_tasks(
    models: dict,
    reference: str | None,
    task: Task,
    *,
    on_progress: Callable[[str, int, int], None] | None = None,
    notes: list[str] | None = None,
) -> dict[str, dict]:
    """Measure how many rows of a task models answer rightly.

    Args:
        models: `EdgeGPT` and `KerasGPT` with their tokenizers, by name.
        reference: Name of the one to compare with, or None.
        task: As `open_task` returns it.
        on_progress: Called with what is counted, how many are done, and all.
        notes: What is worth knowing is appended here, for a report; it is logged too.

    Returns:
        `TaskScore` of `gpt_tf.evaluation.report` by name.

    Raises:
        InputError: A tokenizer or its chat template is missing, a prompt does not fit
            into a context, or logits are not finite. All that does not fit is refused
            before anything is answered.

    Example:
        >>> with EdgeGPT("gpt.litertlm") as gpt:
        ...     found = measure_tasks({"gpt": gpt}, None, open_task("tasks.jsonl"))
        >>> found["gpt"]["score"]["value"]

    Reference: article 6.2.
    """
    notes = [] if notes is None else notes
    if reference is not None:
        arguments.one_of("reference", reference, models)
    prompts = {}
    for name, model in models.items():
        check_open(model)
        limit = model.context_length
        prompts[name] = prompts_of(task, model.tokenizer, limit, name)
    if task.kind == "choice" and any(map(_lacks_space, task.rows)):
        note(
            notes,
            f"{task.name}: a choice follows its prompt without a space, in line "
            f"{next(row.line for row in task.rows if _lacks_space(row))} for example. "
            "If a space belongs there, the choice has to begin with it",
        )
    found = {}
    with Patterns() as patterns:
        judge = _judge_choice if task.kind == "choice" else _judge_answer
        for name, model in models.items():
            judged = []
            for row, prompt in zip(task.rows, prompts[name], strict=True):
                try:
                    judged.append(judge(model, row, prompt, task.kind, patterns))
                except InputError as error:
                    raise InputError(
                        f"{name}, at line {row.line} of {task.name}: {error}"
                    ) from None
                if on_progress is not None:
                    on_progress(f"rows of {name}", len(judged), len(task.rows))
            found[name] = judged
            if slow := sum(one.is_right is None for one in judged):
                note(
                    notes,
                    f"{slow} of the regular expressions of {task.name} took too long "
                    f"on answers of {name}; they count as not found",
                )
    others = None if reference is None else found[reference]
    return {
        name: _summary(task, judged, others, name == reference)
        for name, judged in found.items()
    }


def log_likelihoods(
    model, prompt: str, continuations: Sequence[str]
) -> list[tuple[float, bool]]:
    """Return how likely texts are after a prompt.

    Prompt and continuation are encoded together. Counted are the tokens from the first
    on that is not the prompt's own: one that holds the prompt's end and the
    continuation's beginning counts.

    Args:
        model: An `EdgeGPT` or `KerasGPT` with its tokenizer.
        prompt: A text; where it is empty, the end-of-text token stands before.
        continuations: Texts, none of them empty.

    Returns:
        Of each the sum of its tokens' log-probabilities in nats, and whether each is
        the most likely token at its place.

    Raises:
        InputError: They do not fit into the context, or logits are not finite.
    """
    rows, begins = _continued(model.tokenizer, prompt, continuations)
    longest = max(map(len, rows)) - 1
    if longest > model.context_length:
        raise InputError(_too_long(longest, model.context_length))
    # What all of them begin with is read once.
    shared = min(begins) - 1
    model.reset()
    model.prefill(rows[0][:shared])
    found = []
    for ids, begin in zip(rows, begins, strict=True):
        model.rewind(shared)
        logits = log_softmax(model.logits(ids[shared:-1])[begin - 1 - shared :])
        targets = ids[begin:]
        total = float(logits[np.arange(len(targets)), targets].sum())
        if not math.isfinite(total):
            raise InputError(
                "Comparing choices expects finite logits. Received: NaN or Inf. Its "
                "weights may contain such: export or train it again."
            )
        found.append((total, logits.argmax(axis=-1).tolist() == targets))
    model.reset()
    return found


def answer(
    model, prompt: str, max_new_tokens: int, stop: Sequence[str], **sampling
) -> str:
    """Return the most likely continuation of a prompt that fits into the context.

    Args:
        model: An `EdgeGPT` or `KerasGPT` with its tokenizer.
        prompt: A text, as for `generate`.
        max_new_tokens: Tokens at most; fewer where the context is full before.
        stop: Texts that end it, and are cut off.
        **sampling: As for `generate`, where it is not to be the most likely.

    Raises:
        InputError: The prompt is longer than the context.
    """
    count = len(model.tokenizer.encode(prompt, special=True))
    if count > model.context_length:
        raise InputError(_too_long(count, model.context_length))
    return model.generate(
        prompt,
        max_new_tokens=min(max_new_tokens, model.context_length - count + 1),
        stop=stop,
        **{"temperature": 0, **sampling},
    )


def rendered(tokenizer, messages: list, add_generation_prompt: bool = True) -> str:
    """Return messages as the text of a prompt, by the tokenizer's chat template."""
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        raise InputError(
            "`messages` expect a chat template. Received: a tokenizer without one. "
            "Write `prompt` instead."
        )
    return template.render(messages, add_generation_prompt=add_generation_prompt)


def newcombe_interval(both: int, first: int, second: int, none: int) -> dict:
    """Return how much larger the first of two shares of the same rows is.

    Args:
        both: Rows that count for both shares.
        first: Rows that count for the first alone.
        second: Rows that count for the second alone.
        none: Rows that count for neither.

    Returns:
        The difference as `value`, with its 95 % interval, `low` to `high`. Unlike a
        bootstrap's it has a width where all rows agree.

    Example:
        >>> newcombe_interval(30, 6, 2, 12)["value"]
        0.08
    """
    count = both + first + second + none
    one = wilson_interval(both + first, count)
    other = wilson_interval(both + second, count)
    # The correlation of the two, a little less where it is positive.
    covariance = both * none - first * second
    if covariance > 0:
        covariance = max(covariance - count / 2, 0)
    variances = (both + first) * (second + none) * (both + second) * (first + none)
    phi = covariance / math.sqrt(variances) if variances else 0.0
    value = (first - second) / count

    def distance(up, down):
        up, down = abs(up[0] - up[1]), abs(down[0] - down[1])
        return math.sqrt(max(up**2 - 2 * phi * up * down + down**2, 0))

    below = distance((one["value"], one["low"]), (other["value"], other["high"]))
    above = distance((one["value"], one["high"]), (other["value"], other["low"]))
    return {"value": value, "low": value - below, "high": value + above}


# Rows


def _kind_of(record):
    if unknown := sorted(record.keys() - _FIELDS):
        raise InputError(
            f"A row expects the fields {', '.join(sorted(_FIELDS))}. Received: "
            f"{arguments.shown(unknown[0])}. Remove it, or write it as one of these."
        )
    if len(record.keys() & {"prompt", "messages"}) != 1:
        raise InputError(
            "A row expects either `prompt` or `messages`. Received: "
            f"{'both' if 'prompt' in record else 'none'}. Give one of them."
        )
    if "choices" in record and "regex" not in record:
        return "choice"
    if ("regex" in record) == ("answer" in record) or "choices" in record:
        raise InputError(
            f"A row expects {', or '.join(KINDS.values())}. Received: the fields "
            f"{', '.join(sorted(record))}. Give it one of these."
        )
    return "regex" if "regex" in record else "exact"


def _row_of(line, record, kind, defaults):
    """Return a row of that kind, checked."""
    fields = {**defaults, **{n: record[n] for n in defaults if n in record}}
    arguments.integer("max_new_tokens", fields["max_new_tokens"], 1)
    arguments.switch("ignore_case", fields["ignore_case"])
    prompt, choices = record.get("prompt"), ()
    if "messages" in record:
        prompt = arguments.items("messages", record["messages"], "a list of messages")
    elif not isinstance(prompt, str) or (not prompt and kind != "choice"):
        arguments.refuse("prompt", prompt, "a text that is not empty")
    if kind == "choice":
        choices = tuple(arguments.texts("choices", record["choices"]))
        if len(choices) < 2 or not all(choices):
            expected = "at least two texts, none of them empty"
            arguments.refuse("choices", record["choices"], expected)
        if "answer" not in record:
            raise InputError(
                "A row of choices expects `answer`, the place of the right one. "
                "Received: none. Add it, from 0."
            )
        right = arguments.integer("answer", record["answer"], 0, len(choices) - 1)
    elif kind == "regex":
        right = arguments.text("regex", record["regex"])
    else:
        right = arguments.text("answer", record["answer"])
        if not right.strip():
            arguments.refuse("answer", right, "a text that is not empty")
        if fields["stop"] is None and "\n" not in right.strip():
            fields["stop"] = ("\n",)
    fields["stop"] = tuple(arguments.texts("stop", fields["stop"] or ()))
    return Row(line, prompt, right, choices, **fields)


def _lacks_space(row):
    """Tell whether a word of the prompt goes on in the choice, as it is written."""
    parts = (row.prompt[-1:], *(choice[0] for choice in row.choices))
    return isinstance(row.prompt, str) and all(
        c.isascii() and c.isalnum() for c in parts
    )


def prompts_of(task: Task, tokenizer, context_length: int, name: str) -> list[str]:
    """Return the text of each row's prompt, seen to fit into a context.

    Args:
        task: The task.
        tokenizer: The tokenizer of the model that answers.
        context_length: Tokens that it sees at once.
        name: How messages call the model.

    Raises:
        InputError: There is no tokenizer, or no chat template for messages, or a prompt
            is too long, or has no tokens. The message names its line.
    """
    check_tokenizer(tokenizer, name)
    prompts = []
    for row in task.rows:
        try:
            prompt = row.prompt
            if not isinstance(prompt, str):
                prompt = rendered(tokenizer, prompt)
            if row.choices:
                rows, _ = _continued(tokenizer, prompt, row.choices)
                longest = max(map(len, rows)) - 1
            else:
                longest = len(tokenizer.encode(prompt, special=True))
            if longest > context_length:
                raise InputError(_too_long(longest, context_length))
        except InputError as error:
            raise InputError(
                f"{name}, at line {row.line} of {task.name}: {error}"
            ) from None
        prompts.append(prompt)
    return prompts


def _too_long(count, context):
    return (
        f"A prompt, with its choice, expects to fit into the context of {context} "
        f"tokens. Received: {count}. Shorten it, or take a model with a longer context."
    )


def _continued(tokenizer, prompt, continuations):
    """Return ids of the prompt with each continuation, and where that begins."""
    encode = functools.partial(tokenizer.encode, special=True)
    known = encode(prompt)
    rows = [encode(prompt + text) for text in continuations]
    begins = [common_length(known, ids[:-1]) for ids in rows]
    if not min(begins):  # something has to stand before the first token
        first = tokenizer.end_of_text_id
        if first is None:
            raise InputError(
                "Without a prompt of its own a choice expects an end-of-text token to "
                "follow. Received: a tokenizer without one. Write a prompt."
            )
        rows = [[first, *ids] for ids in rows]
        begins = [begin + 1 for begin in begins]
    return rows, begins


# Judging


class _Judged(NamedTuple):
    is_right: bool | None  # None: it took too long to tell
    by_sum: bool | None
    expected: str
    answered: str


def _judge_choice(model, row, prompt, kind, patterns):
    sums = [total for total, _ in log_likelihoods(model, prompt, row.choices)]
    sizes = [len(text.encode("utf-8", "replace")) for text in row.choices]
    best = int(np.argmax(np.divide(sums, sizes)))
    by_sum = int(np.argmax(sums)) == row.right
    expected, answered = row.choices[row.right], row.choices[best]
    return _Judged(best == row.right, by_sum, expected, answered)


def _judge_answer(model, row, prompt, kind, patterns):
    given = answer(model, prompt, row.max_new_tokens, row.stop)
    if kind == "regex":
        is_right = patterns.find(row.right, given, row.ignore_case)
    else:
        texts = given.strip(), row.right.strip()
        if row.ignore_case:
            texts = tuple(text.casefold() for text in texts)
        is_right = texts[0] == texts[1]
    return _Judged(is_right, None, row.right, given)


def _summary(task, judged, others, is_reference):
    right = np.array([bool(one.is_right) for one in judged])
    found = dict.fromkeys(TaskScore.model_fields) | {
        "rows": len(right),
        "score": wilson_interval(int(right.sum()), len(right)),
    }
    if task.kind == "choice":
        found["by_sum"] = float(np.mean([one.by_sum for one in judged]))
    if others is not None:
        before = np.array([bool(one.is_right) for one in others])
        counts = [
            int((a & b).sum())
            for a, b in (
                *((right, before), (right, ~before)),
                *((~right, before), (~right, ~before)),
            )
        ]
        found["gained"], found["lost"] = counts[1:3]
        found["difference"] = newcombe_interval(*counts)
        if is_reference:
            found["difference"] = dict.fromkeys(("value", "low", "high"), 0.0)
    for row, one in zip(task.rows, judged, strict=True):
        if not one.is_right:
            found["wrong"] = {
                "line": row.line,
                "expected": one.expected[:_SHOWN_CHARACTERS],
                "answered": one.answered[:_SHOWN_CHARACTERS],
            }
            break
    return found
