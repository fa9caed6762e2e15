"""Rows to fine-tune on: what is learnt of them, and what is refused."""

import itertools
import json

import numpy as np
import pytest

from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.text.chat import ChatTemplate
from gpt_tf.text.dataset import RowWindows, TokenFile, write_rows
from gpt_tf.text.examples import Examples, read_examples
from gpt_tf.text.tokenizer import CharacterTokenizer

TOKENIZER = CharacterTokenizer.train(["ab?cd!<|[]>\n useraitn"], end_of_text=True)
END = TOKENIZER.end_of_text_id
# Of all turns; an answer is asked for by its bracket.
TEMPLATE = ChatTemplate(
    "{% for m in messages %}[{{ m.role[0] }}{{ m.content }}]{% endfor %}"
    "{% if add_generation_prompt %}[a{% endif %}"
)


@pytest.fixture
def file_of(tmp_path):
    """Write lines to a file."""

    def write(*rows, name="rows.jsonl"):
        lines = [row if isinstance(row, bytes) else json.dumps(row) for row in rows]
        lines = [x if isinstance(x, bytes) else x.encode() for x in lines]
        (tmp_path / name).write_bytes(b"\n".join(lines))
        return tmp_path / name

    return write


def said(user, assistant):
    return [
        {"role": "user", "content": user},
        {"role": "assistant", "content": assistant},
    ]


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"text": "ab"}, ["", "ab"]),
        ({"prompt": "ab?", "completion": " cd"}, ["ab?", " cd"]),
        ({"prompt": "", "completion": "cd"}, ["", "cd"]),
        (
            {"messages": [*said("b", "c"), *said("d", "a"), *said("no", "n")[:1]]},
            ["[ub][a", "c]", "[ud][a", "a]"],
        ),
    ],
)
def test_answers_are_parted_from_what_is_read(file_of, row, parts):
    tokenizer = CharacterTokenizer(TOKENIZER.backend)
    tokenizer.chat_template = TEMPLATE
    (example,) = read_examples(file_of(row))
    found = example.encode(tokenizer, 30)
    if "messages" not in row:
        assert found[-1].pop() == END
    assert [TOKENIZER.decode(part) for part in found] == parts


def test_a_window_is_a_row_and_only_answers_have_labels(tmp_path):
    rows = [[[1, 2], [3, 4]], [[5], [6], [7, 8], [9]], [[], [2, 3, 4]]]
    file = write_rows(tmp_path / "train.tokens", rows, TOKENIZER)
    windows = RowWindows(file, 2, shuffle=False)
    x, y, weights = map(
        np.concatenate, zip(*(windows.batch(i) for i in range(2)), strict=True)
    )
    none = -100
    np.testing.assert_array_equal(
        x, [[1, 2, 3, 4], [5, 6, 7, 8], [2, 3, 4, 0], [0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        y,
        [[none, 3, 4, none], [6, none, none, 9], [3, 4, none, none], [none] * 4],
    )
    np.testing.assert_array_equal(weights, y != none)
    assert windows.longest_row.tolist() == [5, 6, 7, 8, 9]


def test_the_places_of_answers_are_in_front(tmp_path):
    rows = [[[1, 2], [3, 4]], [[5], [6], [7, 8], [9]], [[], [2, 3, 4]]]
    file = write_rows(tmp_path / "train.tokens", rows, TOKENIZER)
    whole, windows = (
        RowWindows(file, 3, shuffle=False, answers_only=only) for only in (False, True)
    )
    (x, places), y, weights = windows.batch(0)
    ids, labels, _ = whole.batch(0)
    np.testing.assert_array_equal(x, ids)
    np.testing.assert_array_equal(places, [[1, 2], [0, 3], [0, 1]])
    np.testing.assert_array_equal(y, np.take_along_axis(labels, places, 1))
    assert weights.sum() == (labels >= 0).sum() == weights.size
    ((x, places), y, _), *_ = windows.dataset(repeat=False)
    np.testing.assert_array_equal(places, [[1, 2], [0, 3], [0, 1]])


def test_an_epoch_visits_every_row_once_in_an_order_of_its_own(tmp_path):
    rows = [[[1], [2 + index % 8] * (1 + index)] for index in range(12)]
    file = write_rows(tmp_path / "train.tokens", rows, TOKENIZER)
    windows = RowWindows(file, 4, seed=3)
    epochs = [
        np.concatenate([windows.batch(3 * epoch + i)[2].sum(1) for i in range(3)])
        for epoch in range(2)
    ]
    for lengths in epochs:
        assert sorted(lengths) == list(range(1, 13))
    assert list(epochs[0]) != list(epochs[1])
    (x, *_), *_ = windows.dataset(start_step=4, num_steps=1)
    np.testing.assert_array_equal(x, windows.batch(4)[0])


def test_rows_that_the_tokens_do_not_have_are_refused(tmp_path):
    path = write_rows(tmp_path / "train.tokens", [[[1], [2]]], TOKENIZER).path
    manifest = json.loads((tmp_path / "train.tokens.json").read_text())
    for rows in ([[1, 2]], [[3, -1]], [], None, [["1"]], [[2**70]]):
        changed = json.dumps({**manifest, "rows": rows})
        (tmp_path / "train.tokens.json").write_text(changed)
        with pytest.raises(DamagedFileError):
            RowWindows(TokenFile.open(path), 1)


def test_a_share_of_the_rows_is_held_out(file_of):
    rows = [{"text": f"{index}"} for index in range(20)]
    examples = Examples(file_of(*rows), validation_fraction=0.2, seed=1)
    texts = {
        split: [row.fields["text"] for row in found]
        for split, found in examples.splits.items()
    }
    assert len(texts["validation"]) == 4
    assert sorted(map(int, itertools.chain(*texts.values()))) == list(range(20))
    documents = [document.text for document in examples.documents("validation")]
    assert documents == texts["validation"]
    other = Examples(file_of(*rows), validation_fraction=0.2, seed=2)
    assert other.splits["validation"] != examples.splits["validation"]
    given = Examples(file_of(*rows), file_of({"text": "z"}, name="other.jsonl"))
    assert [len(found) for found in given.splits.values()] == [20, 1]


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([GOOD, b'{"prompt": "a"'], "line 2"),
        ([GOOD, b'{"prompt": "\xff", "completion": "b"}'], "line 2"),
        ([GOOD, b'{"prompt": "a", "completion": "\\ud800"}'], "line 2"),
        ([{"messages": said("\ud800", "b")}], "line 1"),
        ([b"[" * 100_000], "line 1"),
        ([GOOD, ["a", "b"]], "line 2"),
        ([GOOD, b"", {"text": "a"}], "line 3"),
        ([{"prompt": "a", "text": "b", "completion": "c"}], "line 1"),
        ([{"other": 1}], "line 1"),
        ([GOOD, {"prompt": "a"}], "completion"),
        ([GOOD, {"prompt": "a", "completion": " \n"}], "line 2"),
        ([GOOD, {"prompt": 5, "completion": "b"}], "prompt"),
        ([{"text": ""}], "text"),
        ([{"messages": [{"content": "a"}]}], "role"),
        ([{"messages": []}], "messages"),
        ([{"messages": said("a", "b")[:1]}], "assistant"),
        ([{"messages": said("a", "")}], "line 1"),
        ([{"messages": said("a", None)}], "line 1"),
        ([], "none"),
        ([b"", b" "], "none"),
    ],
)
def test_what_is_no_row_is_refused_with_its_line(file_of, rows, named):
    with pytest.raises(InputError, match=named) as caught:
        read_examples(file_of(*rows))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "length", "named"),
    [
        ({"prompt": "abcd", "completion": "abcd"}, 7, "line 1.* 8 tokens.*: 9"),
        ({"messages": said("a", "b")}, 9, "line 1.*template"),
    ],
)
def test_what_cannot_be_encoded_is_refused_with_its_line(file_of, row, length, named):
    (example,) = read_examples(file_of(row))
    with pytest.raises(InputError, match=named):
        example.encode(TOKENIZER, length)
    if "prompt" in row:
        assert sum(map(len, example.encode(TOKENIZER, length + 1))) == 9


def test_without_an_end_of_text_an_answer_of_one_token_needs_a_prompt(file_of):
    tokenizer = CharacterTokenizer.train(["ab"], end_of_text=False)
    bare, asked = read_examples(
        file_of({"prompt": "", "completion": "a"}, {"prompt": "b", "completion": "a"})
    )
    with pytest.raises(InputError, match=r"line 1.*answer"):
        bare.encode(tokenizer, 9)
    assert list(map(len, asked.encode(tokenizer, 9))) == [1, 1]


def test_a_single_row_and_other_kinds_to_hold_out_are_refused(file_of):
    one = file_of(GOOD)
    with pytest.raises(InputError, match="two rows"):
        Examples(one)
    with pytest.raises(InputError, match="text"):
        Examples(one, file_of({"text": "a"}, name="other.jsonl"))
    with pytest.raises(InputError, match="No such file"):
        Examples(one.with_name("missing.jsonl"))


def test_a_template_that_rewrites_earlier_turns_is_refused(file_of):
    tokenizer = CharacterTokenizer(TOKENIZER.backend)
    tokenizer.chat_template = ChatTemplate("{{ messages | length }}")
    (example,) = read_examples(file_of({"messages": said("a", "b")}))
    with pytest.raises(InputError, match=r"line 1.*earlier turns"):
        example.encode(tokenizer, 30)
