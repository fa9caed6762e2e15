"""What counts as a completion that parses, and what does not."""

import ast
import string
import types

import pytest

from gpt_tf.errors import InputError
from gpt_tf.evaluation.code_validity import (
    Prompt,
    find_prompts,
    is_accepted,
    measure_code_validity,
    wilson_interval,
)
from gpt_tf.evaluation.text import held_out_text
from gpt_tf.text.tokenizer import CharacterTokenizer

CHARACTERS = CharacterTokenizer.train([string.printable])
PROMPT = 'def f(x):\n    """Add."""'
FILE = '''
import os

class A:
    def long(self, x):
        """Add one.

        Twice.
        """
        x += 1
        return x + 1

    async def short(self):
        first = 1
        if first:
            return first

def alone():
    """A docstring, and no more."""

def opening(x):
    if x:
        return x
    return 0

def one(x): return x

def margin():
    a = '\\d'
    b = """
at the margin"""
    return a, b
'''


class Writer:
    """A model that answers as it is told."""

    def __init__(self, answer, tokenizer=CHARACTERS):
        self.answer = answer
        self.tokenizer = tokenizer
        self.asked = []
        self.written = 0

    def generate(self, ids, *, max_new_tokens, temperature, seed, stream):
        prompt = self.tokenizer.decode(ids)
        self.asked.append((prompt, temperature, seed))
        answer = self.answer(prompt) if callable(self.answer) else self.answer
        # As that of an `EdgeGPT`, it has no `close`.
        return map(self._write, self.tokenizer.encode(answer)[:max_new_tokens])

    def _write(self, token):
        self.written += 1
        return token


@pytest.mark.parametrize(
    ("written", "is_whole", "accepted"),
    [
        ("\n    return x\n", False, True),
        ("\n    return x\n    ret", False, True),  # the last line is not complete
        ("\n    return x", False, False),  # and if it is the only one, there is none
        ("\n    return x", True, True),
        ("\n    return x\n\nreturn ((\n", False, True),  # the block has ended
        ("\n    return (x\n", False, False),
        ("\n    if x:\n", False, False),
        ("\n  return x\n", False, False),
        ("\n    '''open\n    y = 1\n", False, False),
        (" # said\n    return x\n", False, True),
        # Nothing was written for which the prompt alone would be accepted.
        ("", True, False),
        ("\n\n    \n\n", True, False),
        ("\n    # a comment\n", True, False),
        ("\n\ndef g():\n    return 1\n", True, False),
        ("\n    return x\0\n", True, False),
        ("\n    return " + "(" * 9000 + "\n", True, False),
        # Warnings, which are errors here, do not escape.
        ("\n    return '\\d' is 1\n", False, True),
        ("\n    return " + "-" * 90_000 + "1\n", True, False),
    ],
)
def test_a_completion_is_accepted_if_it_goes_on_and_parses(written, is_whole, accepted):
    assert is_accepted(PROMPT, written, is_whole) is accepted


def test_prompts_are_beginnings_that_parse_of_functions_that_go_on():
    found = {prompt.text: prompt.rest for prompt in find_prompts(FILE)}
    assert found == {
        'def long(self, x):\n    """Add one.\n\n    Twice.\n    """': (
            "\n    x += 1\n    return x + 1"
        ),
        "async def short(self):\n    first = 1": (
            "\n    if first:\n        return first"
        ),
    }


def test_prompts_of_the_standard_library_are_of_many_files():
    text = held_out_text("python-stdlib")
    found = find_prompts(text, 64)
    assert len(set(found)) == 64
    for prompt in found:
        ast.parse(prompt.text)
        assert is_accepted(prompt.text, prompt.rest, is_whole=True)
    # At most three of a file.
    begins = [prompt.text.splitlines()[0] for prompt in found]
    files = [one for one in text.documents if any(map(one.text.__contains__, begins))]
    assert len(files) > 15
    assert find_prompts(text, 64) == found != find_prompts(text, 64, seed=1)


def prompts(count):
    return [
        Prompt(f"def f{index}(x):\n    y = {index}", "\n    y += x\n    return y")
        for index in range(count)
    ]


def test_the_true_text_reaches_its_share_and_others_theirs():
    rest = {prompt.text: prompt.rest for prompt in prompts(4)}
    for tokens, share in ((100, 1.0), (12, 1.0), (11, 0.0)):
        found = measure_code_validity(
            Writer(rest.__getitem__), prompts(4), max_new_tokens=tokens
        )
        assert found["share"]["value"] == found["of_true_text"] == share
        assert found["count"] == 4

    def answer(prompt):
        return "\n    return x\n" if prompt.endswith(("1", "2")) else "\n\n\n"

    found = measure_code_validity(Writer(answer), prompts(8))
    assert found["share"] == wilson_interval(2, 8)


def test_a_model_stops_writing_where_the_block_ends():
    writer = Writer("\n    return x\n\nprint(1)\n" * 3)
    found = measure_code_validity(writer, prompts(1), max_new_tokens=60)
    assert found["share"]["value"] == 1
    assert writer.written == len("\n    return x\n\np")


def test_choices_differ_by_prompt_and_are_the_same_by_seed():
    asked, calls = [], []
    for seed in (0, 0, 1):
        writer = Writer("\n    return x\n")
        measure_code_validity(
            *(writer, prompts(5)),
            seed=seed,
            temperature=0.5,
            on_progress=lambda *done: calls.append(done),
        )
        asked.append(writer.asked)
    assert asked[0] == asked[1] != asked[2]
    assert len({seed for _, _, seed in asked[0] + asked[2]}) == 10
    assert {temperature for _, temperature, _ in asked[0]} == {0.5}
    assert calls == 3 * [(done, 5) for done in range(1, 6)]


def test_wilsons_interval_is_that_of_the_score_test():
    # Its ends are the shares p at which |found - p| is 1.96 standard errors of p.
    for successes, count in ((3, 20), (64, 90), (1, 2)):
        found = wilson_interval(successes, count)
        for end in (found["low"], found["high"]):
            error = (end * (1 - end) / count) ** 0.5
            assert abs(successes / count - end) / error == pytest.approx(1.96, abs=1e-3)
    assert wilson_interval(0, 5)["low"] == 0 and wilson_interval(5, 5)["high"] == 1


def test_what_cannot_be_measured_is_said():
    for text in ("to be or not to be", "x = 1\n", "def f():\r\n    a = 1\r\n    b = 2"):
        assert find_prompts(text) == []
    with pytest.raises(InputError, match="Python functions"):
        measure_code_validity(Writer(""), [])
    with pytest.raises(InputError, match="its tokenizer"):
        measure_code_validity(types.SimpleNamespace(tokenizer=None), prompts(1))
