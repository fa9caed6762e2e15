import pytest

from gpt_tf import generation
from gpt_tf.errors import InputError
from gpt_tf.text.tokenizer import BPETokenizer, CharacterTokenizer

LETTERS = CharacterTokenizer.train(["abc"])
BYTES = BPETokenizer.train(["low lower lowest " * 9], vocab_size=260)


def answer(prompt, tokens, tokenizer=LETTERS, stop=(), stream=False, asked=None):
    """Answer with the same tokens for every row, row after row."""

    def steps_of(rows, end, done):
        if asked is not None:
            asked.append((rows, end))
        for row in range(len(rows)):
            for token in tokens:
                yield {row: token}
                if row in done:
                    break

    return generation.answer(
        prompt,
        steps_of,
        vocab_size=tokenizer.vocab_size if tokenizer else 9,
        context_length=5,
        tokenizer=tokenizer,
        max_new_tokens=len(tokens),
        stop=stop,
        stream=stream,
    )


def test_the_answer_has_the_shape_of_the_prompt():
    assert answer("a", [1, 2]) == "bc"
    assert answer(["a", "b"], [1, 2]) == ["bc", "bc"]
    assert answer([0], [1, 2]) == [1, 2]
    assert answer([[0], [1]], [1, 2]) == [[1, 2], [1, 2]]
    assert list(answer("a", [1, 2], stream=True)) == ["b", "c"]
    assert list(answer([0], [1, 2], stream=True)) == [1, 2]


def test_the_engine_is_asked_with_ids_and_the_id_that_ends():
    asked = []
    answer(["ab", "c"], [0], asked=asked)
    answer([1, 2], [0], tokenizer=None, asked=asked)
    assert asked == [([[0, 1], [2]], 3), ([[1, 2]], None)]


@pytest.mark.parametrize("stop", ["bc", ["bc"], ["x", "bc", "c"]])
def test_a_stop_text_cuts_the_answer_and_ends_its_row(stop):
    assert answer("a", [0, 1, 2, 0], stop=stop) == "a"
    assert answer(["a", "b"], [0, 1, 2, 0], stop=stop) == ["a", "a"]
    assert "".join(answer("a", [0, 1, 2, 0], stop=stop, stream=True)) == "a"


def test_bytes_that_are_not_utf_8_are_a_prompt_for_bytes_only():
    asked = []
    answer(b"low\xff", [1], BYTES, asked=asked)
    (ids,), _ = asked[0]
    assert BYTES.decode_bytes(ids) == b"low\xff"
    with pytest.raises(InputError, match="expects UTF-8"):
        answer(b"a\xff", [1])


@pytest.mark.parametrize("tokenizer", [LETTERS, BYTES], ids=["letters", "bytes"])
def test_special_tokens_in_a_text_are_one_id_each(tokenizer):
    asked = []
    letter, end = tokenizer.encode("c")[0], tokenizer.end_of_text_id
    for prompt in ("c<|endoftext|>c", ["c<|endoftext|>c"]):
        answer(prompt, [1], tokenizer, asked=asked)
    assert asked == [([[letter, end, letter]], end)] * 2


def test_special_tokens_in_bytes_are_literal():
    (ids,), is_text, _ = generation.rows_of(b"<|endoftext|>", BYTES)
    assert is_text
    assert BYTES.end_of_text_id not in ids and BYTES.decode(ids) == "<|endoftext|>"


def test_half_a_character_is_held_back():
    first, second = (BYTES.encode_bytes(bytes([byte]))[0] for byte in b"\xc3\xa9")
    assert list(answer("low", [first, second], BYTES, stream=True)) == ["\u00e9"]
    assert answer("low", [first], BYTES) == "\ufffd"


def test_a_prompt_longer_than_the_context_gives_a_notice_at_once():
    with pytest.warns(generation.GenerationNotice, match="of 6 tokens .* 5; its"):
        answer("abcabc", [1], stream=True)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "Prompt 0 is empty"),
        ([0, 4], {}, "0 to 3. Received: 0 to 4"),
        ("a", {"tokenizer": None}, "expects `tokenizer`"),
        ([1], {"tokenizer": None, "stop": "a"}, "`stop` expects a tokenizer"),
        (["a", 1], {}, "of one kind"),
        (["a"], {"stream": True}, "one prompt"),
    ],
)
def test_bad_prompts_are_refused(prompt, options, message):
    with pytest.raises(InputError, match=message):
        answer(prompt, [1], **options)
