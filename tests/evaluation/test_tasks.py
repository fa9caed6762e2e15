"""A score of a task is what log-probabilities and answers say, and how sure it is."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats

from gpt_tf.edge import EdgeGPT
from gpt_tf.errors import InputError
from gpt_tf.evaluation import patterns
from gpt_tf.evaluation.code_validity import wilson_interval
from gpt_tf.evaluation.models import KerasGPT
from gpt_tf.evaluation.tasks import (
    answer,
    log_likelihoods,
    measure_tasks,
    newcombe_interval,
    open_task,
)
from gpt_tf.text.tokenizer import BPETokenizer, CharacterTokenizer

FILE = Path(__file__).parents[2] / "saved_models" / "python-small.litertlm"


class Bigrams:
    """A model whose logits are a table's row, and whose answers are those it is told.

    It keeps what it was asked for.
    """

    def __init__(self, answers=(), seed=0, context_length=16):
        self.tokenizer = CharacterTokenizer.train(["abcdefghij .\n"])
        size = self.tokenizer.vocab_size
        self.table = np.random.default_rng(seed).normal(0, 2, (size, size))
        self.config = {"vocab_size": size}
        self.context_length = context_length
        self.answers, self.asked = dict(answers), []
        self.position = 0

    def reset(self):
        self.position = 0

    def rewind(self, position):
        assert position <= self.position
        self.position = position

    def prefill(self, ids):
        self.position += len(ids)
        assert self.position <= self.context_length

    def logits(self, ids):
        self.prefill(ids)
        return self.table[ids]

    def generate(self, prompt, **options):
        self.asked.append((prompt, options))
        return self.answers[prompt]

    def nats(self, text):
        """The log-probability of each token but the first, from the table."""
        rows = self.table - np.log(np.exp(self.table).sum(axis=1, keepdims=True))
        ids = self.tokenizer.encode(text)
        return rows[ids[:-1], ids[1:]]


@pytest.fixture
def task_of(tmp_path):
    """Write rows into a file and open it."""

    def make(*rows, **options):
        path = tmp_path / "tasks.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return open_task(path, **options)

    return make


@pytest.fixture(scope="module")
def gpt():
    with EdgeGPT(FILE) as opened:
        yield opened


def exact(prompt="ab", right="c", **fields):
    return {"prompt": prompt, "answer": right, **fields}


# Rows


def test_a_task_says_its_kind_and_what_rows_do_not_say(task_of):
    task = task_of(exact(), exact(right="c\nd"), exact(stop=["."], max_new_tokens=3))
    assert task.kind == "exact" and task.describe()["rows"] == 3
    assert [row.stop for row in task.rows] == [("\n",), (), (".",)]
    assert [row.max_new_tokens for row in task.rows] == [64, 64, 3]
    task = task_of({"prompt": "a", "regex": "b+"}, max_new_tokens=5)
    assert (task.kind, task.rows[0].stop, task.rows[0].max_new_tokens) == (
        "regex",
        (),
        5,
    )
    task = task_of(exact(), exact(ignore_case=False), stop=["b", "c"], ignore_case=True)
    assert [row.ignore_case for row in task.rows] == [True, False]
    assert task.rows[0].stop == ("b", "c")
    task = task_of({"prompt": "", "choices": ["a", "b"], "answer": 1})
    assert (task.kind, task.rows[0].right) == ("choice", 1)


@pytest.mark.parametrize(
    ("lines", "messages"),
    [
        ("", ["a JSON object in every line", "none"]),
        ("\n \n", ["a JSON object in every line", "none"]),
        ('{"prompt": "a", "answer": "b"}\n{"prompt": ', ["line 2"]),
        ('{"prompt": "a", "answer": "b"}\n[1]', ["line 2", "[1]"]),
        ('\n{"prompt": "a", "answer": NaN}', ["line 2", "NaN"]),
        ('{"prompt": "a"}', ["line 1", "an answer that is a text"]),
        ('{"prompt": "a", "answer": " "}', ["line 1", "not empty"]),
        ('{"prompt": "a", "answer": 3}', ["line 1", "a text", "3"]),
        ('{"prompt": "", "answer": "b"}', ["line 1", "prompt", "not empty"]),
        ('{"answer": "b"}', ["line 1", "`prompt` or `messages`", "none"]),
        ('{"prompt": "a", "messages": [], "answer": "b"}', ["line 1", "both"]),
        ('{"messages": "hello", "answer": "b"}', ["a list of messages"]),
        ('{"prompt": "a", "reply": "b"}', ["line 1", "'reply'"]),
        ('{"prompt": "a", "regex": "b", "answer": "b"}', ["line 1", "regex"]),
        ('{"prompt": "a", "regex": "(b"}', ["line 1", "unterminated"]),
        ('{"prompt": "a", "regex": 4}', ["line 1", "a text"]),
        ('{"prompt": "a", "choices": ["b", "c"]}', ["line 1", "the place"]),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', ["from 0 to 1", "2"]),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": "b"}', ["an integer"]),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', ["at least two"]),
        ('{"prompt": "a", "choices": ["b", ""], "answer": 0}', ["none of them empty"]),
        (
            '{"prompt": "a", "answer": "b"}\n{"prompt": "a", "regex": "b"}',
            ["line 2", "one kind", "a regular expression"],
        ),
        ('{"prompt": "a", "answer": "b", "max_new_tokens": 0}', ["max_new_tokens"]),
        ('{"prompt": "a", "answer": "b", "stop": 4}', ["stop"]),
        ('{"prompt": "a", "answer": "b", "ignore_case": "x"}', ["ignore_case"]),
    ],
)
def test_rows_that_cannot_be_judged_are_refused_by_their_line(
    tmp_path, lines, messages
):
    path = tmp_path / "tasks.jsonl"
    path.write_text(lines)
    with pytest.raises(InputError) as refused:
        open_task(path)
    assert all(message in str(refused.value) for message in messages), refused.value
    assert "\n" not in str(refused.value)


def test_what_is_no_file_of_lines_is_refused(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe4", "answer": "b"}')
    for name in ("nowhere.jsonl", "", "latin.jsonl"):
        with pytest.raises(InputError):
            open_task(tmp_path / name)


# Choices


def test_choices_are_weighed_by_their_log_probability_per_byte(task_of):
    model = Bigrams()
    prompt, choices = "abc", ["d", "ef ghi", "jj"]
    by_hand = [model.nats(prompt + text)[2:].sum() for text in choices]
    found = log_likelihoods(model, prompt, choices)
    assert [total for total, _ in found] == pytest.approx(by_hand, abs=1e-12)
    per_byte = [nats / len(text) for nats, text in zip(by_hand, choices, strict=True)]
    best, by_sum = int(np.argmax(per_byte)), int(np.argmax(by_hand))
    assert best != by_sum  # so that the test can tell them apart
    row = {"prompt": prompt, "choices": choices}
    task = task_of({**row, "answer": best}, {**row, "answer": by_sum})
    score = measure_tasks({"m": model}, None, task)["m"]
    assert (score["score"]["value"], score["by_sum"]) == (0.5, 0.5)
    assert score["wrong"] == {
        "line": 2,
        "expected": choices[by_sum],
        "answered": choices[best],
    }


def test_the_most_likely_continuation_is_told(gpt):
    prompt = "def __init__("
    greedy = answer(gpt, prompt, 3, ())
    (_, yes), (_, no) = log_likelihoods(gpt, prompt, [greedy, greedy + "\0"])
    assert yes and not no


def test_log_likelihoods_are_those_of_score(gpt):
    for prompt, text in (("import", " os"), ("x = ", "1 + y\n"), ("a", "b")):
        known = gpt.tokenizer.encode(prompt)
        ids = gpt.tokenizer.encode(prompt + text)
        same = [a == b for a, b in zip(known, ids, strict=False)]
        begin = max(1, (same + [False]).index(False))
        ((found, _),) = log_likelihoods(gpt, prompt, [text])
        if same[0]:
            assert found == pytest.approx(gpt.score(ids)[begin - 1 :].sum(), abs=1e-4)
        else:  # the prompt's only token went into another one
            ids = [gpt.tokenizer.end_of_text_id, *ids]
            assert found == pytest.approx(gpt.score(ids).sum(), abs=1e-4)


def test_without_a_prompt_the_end_of_text_stands_before(gpt):
    ids = [gpt.tokenizer.end_of_text_id, *gpt.tokenizer.encode("import")]
    ((found, _),) = log_likelihoods(gpt, "", ["import"])
    assert found == pytest.approx(gpt.score(ids).sum(), abs=1e-4)


def test_a_rewound_cache_goes_on_as_a_fresh_one(gpt, make_model, eagerly):
    for model in (gpt, KerasGPT(make_model(), None)):
        first, second, other = [5, 6, 7, 8], [9, 10], [11, 12]
        model.reset()
        model.prefill(first)
        model.logits(other)
        model.rewind(len(first))
        again = model.logits(second)
        model.reset()
        model.prefill(first)
        assert np.allclose(again, model.logits(second), atol=1e-5)
        assert model.position == 6
        assert not np.allclose(again, model.logits(second), atol=1e-3)


def test_a_space_that_may_be_missing_is_told(task_of, notices):
    row = {"choices": ["a", "b"], "answer": 0}
    for prompt, told in (("cd", 1), ("cd ", 0), ("cd.", 0)):
        notes = []
        models = {"m": Bigrams()}
        measure_tasks(models, None, task_of({"prompt": prompt, **row}), notes=notes)
        assert len(notes) == told


# Answers


def test_an_answer_is_right_but_for_spaces_around_it(task_of):
    rows = [("a", "c"), ("b", " c d "), ("d", "C"), ("e", "c d")]
    answers = {"a": " c\n", "b": "c d", "d": "c", "e": "c  d"}
    rows = [exact(*row) for row in rows]
    model = Bigrams(answers)
    found = measure_tasks({"m": model}, None, task_of(*rows))["m"]
    assert found["score"]["value"] == 2 / 4
    assert found["wrong"] == {"line": 3, "expected": "C", "answered": "c"}
    prompt, options = model.asked[0]
    assert (prompt, options["temperature"], options["stop"]) == ("a", 0, ("\n",))
    found = measure_tasks({"m": model}, None, task_of(*rows, ignore_case=True))["m"]
    assert found["score"]["value"] == 3 / 4


def test_an_answer_ends_at_a_stop_text_and_where_the_context_is_full(gpt, task_of):
    text = answer(gpt, "def __init__(", 40, ())
    assert answer(gpt, "def __init__(", 40, (text[5],)) == text[: text.index(text[5])]
    model = Bigrams({"a" * 10: "c"}, context_length=16)
    measure_tasks({"m": model}, None, task_of(exact("a" * 10)))
    # Of the last one nothing has to follow.
    assert model.asked[0][1]["max_new_tokens"] == 16 - 10 + 1


def test_a_regular_expression_is_found_anywhere(task_of):
    answers = {"a": "x 12 y", "b": "twelve", "c": "TWELVE"}
    rows = [{"prompt": p, "regex": r"\b12\b|twelve"} for p in answers]
    rows[2]["ignore_case"] = True
    model = Bigrams(answers)
    assert measure_tasks({"m": model}, None, task_of(*rows))["m"]["wrong"] is None
    del rows[2]["ignore_case"]
    found = measure_tasks({"m": model}, None, task_of(*rows))["m"]
    assert found["wrong"]["line"] == 3


def test_a_regular_expression_without_end_is_ended(task_of, monkeypatch, notices):
    monkeypatch.setattr(patterns, "SECONDS", 0.3)
    rows = [{"prompt": p, "regex": r"^(c+)+$"} for p in "ab"]
    task = task_of(*rows)
    model = Bigrams({"a": "c" * 60 + "d", "b": "ccc"})
    notes = []
    found = measure_tasks({"m": model}, None, task, notes=notes)["m"]
    # The process that was killed is replaced: the second row is right.
    assert found["score"]["value"] == 0.5 and found["wrong"]["line"] == 1
    assert notes == notices and "too long" in notes[0]


def test_messages_are_rendered_by_the_template(task_of):
    messages = [{"role": "user", "content": "cd"}]
    task = task_of({"messages": messages, "answer": "e"})
    model = Bigrams({"ab cd.": "e"})
    with pytest.raises(InputError, match=r"line 1.*chat template"):
        measure_tasks({"m": model}, None, task)
    model.tokenizer.chat_template = SimpleNamespace(
        render=lambda messages, add_generation_prompt: (
            f"ab {messages[0]['content']}" + "." * add_generation_prompt
        )
    )
    assert measure_tasks({"m": model}, None, task)["m"]["score"]["value"] == 1


def test_what_does_not_fit_is_refused_before_anything_is_answered(task_of):
    model = Bigrams({"a": "c"})
    for row, count in (
        (exact("a" * 17), 17),
        ({"prompt": "a" * 8, "choices": ["b" * 9, "b" * 10], "answer": 0}, 17),
    ):
        rows = [{**row, "prompt": "a"}, row]
        with pytest.raises(InputError, match=f"big, at line 2 .* 16 .* {count}"):
            measure_tasks(
                {"other": Bigrams(context_length=99), "big": model},
                None,
                task_of(*rows),
            )
    assert model.asked == []
    model.tokenizer = None
    with pytest.raises(InputError, match="its tokenizer"):
        measure_tasks({"m": model}, None, task_of(exact()))


def test_a_character_without_a_token_is_refused_by_its_line(task_of):
    with pytest.raises(InputError, match=r"m, at line 1 of tasks\.jsonl"):
        measure_tasks({"m": Bigrams()}, None, task_of(exact("\u20ac")))


def test_logits_that_are_not_finite_are_refused(task_of):
    model = Bigrams()
    model.table[:] = np.nan
    task = task_of({"prompt": "a", "choices": ["b", "c"], "answer": 0})
    with pytest.raises(InputError, match=r"m, at line 1 .* finite"):
        measure_tasks({"m": model}, None, task)


# Intervals


def test_files_are_compared_on_the_same_rows(task_of):
    rows = [exact(letter) for letter in "abcdefgh"]
    right = {"before": "abcdef", "after": "abcg"}
    models = {
        name: Bigrams({row: "c" if row in letters else "d" for row in "abcdefgh"})
        for name, letters in right.items()
    }
    calls = []
    found = measure_tasks(
        models, "before", task_of(*rows), on_progress=lambda *call: calls.append(call)
    )
    before, after = found["before"], found["after"]
    assert before["score"] == wilson_interval(6, 8)
    assert before["difference"] == {"value": 0, "low": 0, "high": 0}
    assert (before["gained"], before["lost"]) == (0, 0)
    # a, b, c in both; g in the new one alone; d, e, f in the old one alone; h in none.
    assert (after["gained"], after["lost"]) == (1, 3)
    assert after["difference"] == newcombe_interval(3, 1, 3, 1)
    assert after["difference"]["value"] == -2 / 8
    assert calls[-1] == ("rows of after", 8, 8) and len(calls) == 16
    with pytest.raises(InputError, match="reference"):
        measure_tasks(models, "nobody", task_of(*rows))


@pytest.mark.parametrize(("right", "count"), [(0, 4), (3, 20), (64, 90), (7, 7)])
def test_a_scores_interval_is_scipys(right, count):
    expected = scipy.stats.binomtest(right, count).proportion_ci(method="wilson")
    found = wilson_interval(right, count)
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected), abs=1e-6)


@pytest.mark.parametrize(
    ("table", "value", "low", "high"),
    [
        # Newcombe 1998, table II; Altman and others, "Statistics with Confidence",
        # table 6.2; Fagerland and others, Statistics in Medicine 33 (2014), table IV.
        ((36, 12, 2, 0), 0.2, 0.0569, 0.3404),
        ((14, 5, 0, 22), 0.122, 0.011, 0.226),
        ((1, 1, 7, 12), -0.286, -0.507, -0.026),
    ],
)
def test_the_interval_of_a_difference_is_the_published_one(table, value, low, high):
    found = newcombe_interval(*table)
    assert found["value"] == pytest.approx(value, abs=5e-4)
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=6e-4)
    both, first, second, none = table
    mirrored = newcombe_interval(both, second, first, none)
    assert mirrored["low"] == pytest.approx(-found["high"])


def test_an_interval_contains_the_true_difference_as_often_as_it_says():
    generator = np.random.default_rng(7)
    shares = (0.6, 0.1, 0.05, 0.25)
    tables = generator.multinomial(60, shares, size=2000)
    found = [newcombe_interval(*map(int, table)) for table in tables]
    covered = np.mean([one["low"] <= 0.05 <= one["high"] for one in found])
    assert 0.935 <= covered <= 0.98
    # Where all rows agree, a few rows are no proof that all others would.
    few, many = newcombe_interval(9, 0, 0, 3), newcombe_interval(900, 0, 0, 300)
    assert few["high"] > 0.1 > 0.01 > many["high"] > 0


def test_tokens_of_prompt_and_choice_may_be_joined():
    tokenizer = BPETokenizer.train(["abab abab ab"], 300)
    model = Bigrams()
    model.tokenizer, size = tokenizer, tokenizer.vocab_size
    model.table = np.random.default_rng(1).normal(0, 1, (size, size))
    assert len(tokenizer.encode("ab")) == 1
    # "a" and "b" are one token, behind the end-of-text token.
    ((found, _),) = log_likelihoods(model, "a", ["b"])
    ids = [tokenizer.end_of_text_id, *tokenizer.encode("ab")]
    row = model.table[ids[0]]
    assert found == pytest.approx(row[ids[1]] - np.log(np.exp(row).sum()))
