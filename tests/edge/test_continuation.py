import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_tf.edge.continuation import Continuation, GrowingText, half_of
from gpt_tf.generation import answer
from gpt_tf.sampling import Sampler
from gpt_tf.text.tokenizer import CharacterTokenizer

TOKENIZER = CharacterTokenizer.train(["abc"])


@given(
    text=st.text("abc", max_size=20),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_a_growing_text_says_what_a_stream_says(text, stop):
    tokens = TOKENIZER.encode(text)
    wanted = answer(
        "a",
        lambda rows, end, done: iter([{0: token} for token in tokens]),
        vocab_size=10,
        context_length=100,
        tokenizer=TOKENIZER,
        max_new_tokens=100,
        stop=stop,
        stream=True,
    )
    growing, pieces = GrowingText(TOKENIZER, stop), []
    for token in tokens:
        pieces.append(growing.push(token))
        if growing.stopped:
            break
    pieces.append(growing.finish())
    assert [piece for piece in pieces if piece] == list(wanted)
    assert growing.text == "".join(pieces)


def begin(prompt, max_new_tokens=100, ahead=None, end=None):
    sampler = Sampler(temperature=0)
    (generator,) = sampler.generators(1)
    return Continuation(prompt, max_new_tokens, sampler, generator, end, 6, ahead)


def logits_of(token):
    return np.eye(9)[token]


def test_first_the_prompt_is_wanted_and_then_each_new_token():
    text = begin([1, 2, 3], max_new_tokens=2)
    assert text.begins and text.pending == [1, 2, 3] and text.count == 3
    assert text.push(logits_of(7)) == 7
    assert not text.begins and text.pending == [7] and text.count == 4
    assert text.push(logits_of(8)) == 8
    assert text.finished and text.new == [7, 8] and text.text == [1, 2, 3, 7, 8]


@pytest.mark.parametrize("ahead", [None, 4])
def test_a_full_context_ends_the_text_or_drops_its_oldest_half(ahead):
    text = begin([1, 2, 3, 4], ahead=ahead)
    for _ in range(3):
        assert not text.finished
        text.push(logits_of(7))
    assert text.finished == (ahead is None)
    if ahead is not None:
        assert text.begins and text.pending == [7, 7, 7] == text.text[-half_of(6) :]


def test_the_end_is_no_token_of_the_text():
    text = begin([1], end=5)
    assert text.push(logits_of(5)) is None
    assert text.finished and text.text == [1] and text.new == []


def test_what_another_text_has_driven_out_is_wanted_again():
    text = begin([1, 2])
    text.push(logits_of(7))
    text.restart()
    assert text.begins and text.pending == [1, 2, 7] and text.count == 3
