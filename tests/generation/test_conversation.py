from pathlib import Path

import pytest

from gpt_tf.errors import InputError
from gpt_tf.generation import conversation
from gpt_tf.generation.sequence import GenerationNotice
from gpt_tf.text.chat import ChatTemplate
from gpt_tf.text.tokenizer import CharacterTokenizer, load_tokenizer

SOURCE = (
    "{% for m in messages %}{{ m.role[0] }}{{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)


@pytest.fixture
def tokenizer():
    found = CharacterTokenizer.train(["abcdefghijklmnopqrstuvwxyz | An.AGT_"])
    found.chat_template = ChatTemplate(SOURCE)
    return found


def said(text):
    """Messages of `"s: ... u: ..."`: a letter of the role, and what was said."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    parts = [part.partition(" ") for part in text.split(", ")]
    return [{"role": roles[role], "content": content} for role, _, content in parts]


def begin(text, tokenizer, context_length, max_new_tokens=4, stop=()):
    return conversation.begin(
        said(text),
        tokenizer,
        context_length=context_length,
        max_new_tokens=max_new_tokens,
        stop=stop,
    )


LONG = "s be kind, u one, a two, u three, a four, u five"


def test_a_conversation_that_fits_is_whole(tokenizer):
    whole = "sbe kind|uone|atwo|uthree|afour|ufive|a"
    prompt, limits = begin(LONG, tokenizer, len(whole) + 4)
    assert prompt == whole
    assert limits == {"max_new_tokens": 4, "stop": []}


@pytest.mark.parametrize(
    ("context_length", "expected"),
    [
        (42, "sbe kind|uthree|afour|ufive|a"),
        (33, "sbe kind|uthree|afour|ufive|a"),
        (32, "sbe kind|ufive|a"),
        (20, "sbe kind|ufive|a"),
    ],
)
def test_the_oldest_turns_leave_first_and_the_system_prompt_stays(
    tokenizer, context_length, expected
):
    with pytest.warns(GenerationNotice, match=f"context of {context_length} tokens"):
        prompt, limits = begin(LONG, tokenizer, context_length)
    assert prompt == expected
    assert limits["max_new_tokens"] == 4


def test_the_last_turn_stays_and_may_leave_less_room(tokenizer):
    with pytest.warns(GenerationNotice):
        prompt, limits = begin(LONG, tokenizer, 19, max_new_tokens=100)
    assert (prompt, limits["max_new_tokens"]) == ("sbe kind|ufive|a", 3)


def test_an_answer_is_left_half_of_the_context_at_most(tokenizer):
    prompt, limits = begin("u one", tokenizer, 12, max_new_tokens=100)
    assert (prompt, limits["max_new_tokens"]) == ("uone|a", 6)


@pytest.mark.parametrize("context_length", [15, 16])
def test_a_last_turn_that_fills_the_context_is_refused(tokenizer, context_length):
    with pytest.raises(InputError, match=f"{context_length} tokens. Received: 16"):
        begin(LONG, tokenizer, context_length)


def test_without_a_template_there_is_no_chat(tokenizer):
    tokenizer.chat_template = None
    for given in (tokenizer, None):
        with pytest.raises(InputError, match="chat template"):
            begin("u one", given, 99)


def test_a_special_token_at_the_end_of_a_turn_ends_the_answer():
    tokenizer = load_tokenizer(Path(__file__).parents[1] / "text" / "chat")
    end = tokenizer.encode("<|eot_id|>", special=True)
    source = SOURCE.replace("|{%", "\n<|eot_id|>{%")
    for end_tokens, stop in ((), ["x", "<|eot_id|>"]), (("<|eot_id|>",), ["x"]):
        tokenizer.chat_template = ChatTemplate(source, {}, end_tokens)
        assert conversation.ids_that_end(tokenizer) == [tokenizer.end_of_text_id, *end]
        _, limits = begin("u one", tokenizer, 99, stop=["x"])
        assert limits["stop"] == stop
    tokenizer.chat_template = ChatTemplate(SOURCE)  # a turn ends in plain text
    assert conversation.ids_that_end(tokenizer) == [tokenizer.end_of_text_id]
