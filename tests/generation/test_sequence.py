import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from gpt_tf.errors import InputError
from gpt_tf.generation import sequence
from gpt_tf.generation.sampler import Sampler
from gpt_tf.generation.sequence import SequenceState, half_of, ids_without_token
from gpt_tf.text.tokenizer import BPETokenizer, CharacterTokenizer

LETTERS = CharacterTokenizer.train(["abc"])
BYTES = BPETokenizer.train(["low lower lowest " * 9], vocab_size=260)


class Recorded:
    """A sampler that chooses the same tokens for every row."""

    def __init__(self, tokens):
        self.tokens = tokens

    def generators(self, num_rows):
        return [iter(self.tokens) for _ in range(num_rows)]

    def choose(self, logits, seen, generator):
        return next(generator)


def answer(prompt, tokens, tokenizer=LETTERS, stop=(), stream=False, asked=None):
    """Answer with the same tokens for every row, row after row."""
    sequences, is_list = sequence.begin(
        prompt,
        Recorded(tokens),
        vocab_size=tokenizer.vocab_size if tokenizer else 9,
        context_length=5,
        tokenizer=tokenizer,
        max_new_tokens=len(tokens),
        stop=stop,
        stream=stream,
    )
    if asked is not None:
        asked.append([state.ids[:] for state in sequences])

    def pieces():
        for state in sequences:
            while not state.finished:
                yield from state.push(None)

    return sequence.results(sequences, is_list, pieces(), stream)


def test_the_answer_has_the_shape_of_the_prompt():
    assert answer("a", [1, 2]) == "bc"
    assert answer(["a", "b"], [1, 2]) == ["bc", "bc"]
    assert answer([0], [1, 2]) == [1, 2]
    assert answer([[0], [1]], [1, 2]) == [[1, 2], [1, 2]]
    assert list(answer("a", [1, 2], stream=True)) == ["b", "c"]
    assert list(answer([0], [1, 2], stream=True)) == [1, 2]


def test_sequences_begin_with_ids_and_end_at_the_end_of_text():
    asked = []
    assert answer(["ab", "c"], [0, 3, 0], asked=asked) == ["a", "a"]
    assert answer([1, 2], [0, 3, 0], tokenizer=None, asked=asked) == [0, 3, 0]
    assert asked == [[[0, 1], [2]], [[1, 2]]]


def test_a_stop_text_ends_its_row():
    for stop in ("bc", ["x", "bc", "c"]):
        assert answer(["a", "b"], [0, 1, 2, 0], stop=stop) == ["a", "a"]
        assert answer([[0], [1]], [0, 1, 2, 0], stop=stop) == [[0], [0]]
    assert answer("a", [0, 1, 2, 0], stop="") == "abca"


@given(
    ids=st.lists(st.integers(1, BYTES.vocab_size - 1), max_size=20),
    pick=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 4)), max_size=3),
)
def test_text_and_ids_end_where_the_first_stop_text_begins(ids, pick):
    # Any bytes, so many of them no UTF-8; the tokens of several bytes are cut, too.
    whole = BYTES.decode(ids)
    stop = [whole[first : first + length] for first, length in pick]
    stop = [text for text in stop if text and "\ufffd" not in text]
    # What an id at a time shows: the first stop text that is complete counts.
    text, wanted = whole, ids
    for count in range(1, len(ids) + 1):
        known = BYTES.decode_bytes(ids[:count])
        places = [known.find(item.encode()) for item in stop]
        if cuts := [place for place in places if place >= 0]:
            text = known[: min(cuts)].decode("utf-8", "replace")
            lengths = [len(BYTES.decode_bytes(ids[:n])) for n in range(1, count + 1)]
            wanted = ids[: sum(length <= min(cuts) for length in lengths)]
            break
    for prompt, expected in (("a", text), ([1], wanted)):
        assert answer(prompt, ids, BYTES, stop) == expected
        pieces = list(answer(prompt, ids, BYTES, stop, stream=True))
        assert "" not in pieces
        assert ("".join(pieces) if prompt == "a" else pieces) == expected


def test_what_may_begin_a_stop_text_is_not_shown_yet():
    output = sequence.Detokenizer(LETTERS, [b"bcb"], is_text=False)
    assert [output.push(token) for token in (0, 1, 2, 0)] == [[], [], [0], [1]]
    assert output.finish() == [2, 0] and output.value == [0, 1, 2, 0]


def test_ids_may_stand_in_arrays_and_tensors():
    import tensorflow as tf

    asked = []
    one, several = [1, 2], [[1, 2], [0, 1]]
    for make in (np.array, tf.constant, tuple):
        assert answer(make(one), [1]) == [1]
        answer(make(one), [1], asked=asked)
        answer(make(several), [1], asked=asked)
    answer([np.int64(1), np.uint8(2)], [1], asked=asked)
    answer([np.array(row) for row in several], [1], asked=asked)
    answer([tf.constant(row) for row in several], [1], asked=asked)
    assert asked == [[one], several] * 4 + [several]
    assert all(type(token) is int for rows in asked for row in rows for token in row)
    assert answer(tf.constant("a"), [1]) == "b"
    assert answer(np.array(["a", "b"]), [1]) == ["b", "b"]


def test_bytes_that_are_not_utf_8_are_a_prompt_for_bytes_only():
    asked = []
    answer(b"low\xff", [1], BYTES, asked=asked)
    assert BYTES.decode_bytes(asked[0][0]) == b"low\xff"
    (literal,), is_text, _ = sequence.rows_of(b"<|endoftext|>", BYTES)
    assert is_text and BYTES.decode(literal) == "<|endoftext|>"
    with pytest.raises(InputError, match="expects UTF-8"):
        answer(b"a\xff", [1])


@pytest.mark.parametrize("tokenizer", [LETTERS, BYTES], ids=["letters", "bytes"])
def test_special_tokens_in_a_text_are_one_id_each(tokenizer):
    letter, end = tokenizer.encode("c")[0], tokenizer.end_of_text_id
    rows, _, _ = sequence.rows_of(["c<|endoftext|>c"], tokenizer)
    assert rows == [[letter, end, letter]]


def test_half_a_character_is_held_back():
    first, second = (BYTES.encode_bytes(bytes([byte]))[0] for byte in b"\xc3\xa9")
    assert list(answer("low", [first, second], BYTES, stream=True)) == ["\u00e9"]
    assert answer("low", [first], BYTES) == "\ufffd"


def test_a_prompt_longer_than_the_context_gives_a_notice_at_once():
    with pytest.warns(sequence.GenerationNotice, match="of 6 tokens .* 5; its"):
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
        ([], {}, "Prompt 0 is empty"),
        ([[0], []], {}, "Prompt 1 is empty"),
        (np.array([0.0, 1.0]), {}, "of one kind"),
        (np.array(1), {}, "of one kind"),
        ([[[0]]], {}, "of one kind"),
        (None, {}, "of one kind"),
    ],
)
def test_bad_prompts_are_refused(prompt, options, message):
    with pytest.raises(InputError, match=message):
        answer(prompt, [1], **options)


# Ids without a token


def test_ids_without_a_token_are_the_rest_of_a_table_and_gaps():
    assert ids_without_token(None, 9).tolist() == []
    assert ids_without_token(LETTERS, LETTERS.vocab_size).tolist() == []
    assert ids_without_token(LETTERS, 7).tolist() == [4, 5, 6]
    content = json.loads(BYTES.to_json())
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 263  # before: 259
    foreign = BPETokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))
    assert foreign.vocab_size == 264
    assert ids_without_token(foreign, 266).tolist() == [259, 260, 261, 262, 264, 265]


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 3}])
def test_what_is_suppressed_is_never_chosen(options):
    sampler = Sampler(**options, seed=1, suppress_tokens=np.array([1, 4]))
    (source,) = sampler.generators(1)
    logits = np.array([0.0, 9.0, 1.0, 1.5, 9.0], np.float32)
    found = {sampler.choose(logits, {1, 2}, source) for _ in range(60)}
    assert found == ({3} if options == {"temperature": 0} else {0, 2, 3})
    assert logits[1] == 9.0  # what was handed in is left as it was


# One text's window


def begin(prompt, max_new_tokens=100, slides=False, end=None, **options):
    sampler = Sampler(temperature=0, **options)
    (source,) = sampler.generators(1)
    return SequenceState(
        prompt,
        sampler,
        source,
        sequence.Detokenizer(None, [], is_text=False),
        context_length=6,
        max_new_tokens=max_new_tokens,
        end_ids=[end],
        slides=slides,
    )


def logits_of(token):
    return np.eye(9)[token]


def test_first_the_prompt_is_wanted_and_then_each_new_token():
    state = begin([1, 2, 3], max_new_tokens=2)
    assert state.needs_prefill and state.pending == [1, 2, 3]
    assert state.window_length == 3
    assert state.push(logits_of(7)) == [7]
    assert not state.needs_prefill and state.pending == [7]
    assert state.window_length == 4
    state.invalidate_cache()  # another sequence was in it
    assert state.needs_prefill and state.pending == [1, 2, 3, 7]
    assert state.push(logits_of(8)) == [8]
    assert state.finished and state.new_ids == [7, 8] and state.ids == [1, 2, 3, 7, 8]


@pytest.mark.parametrize("slides", [False, True])
def test_a_full_context_ends_the_sequence_or_drops_its_oldest_half(slides):
    state = begin([1, 2, 3, 4], slides=slides)
    for _ in range(3):
        assert not state.finished
        state.push(logits_of(7))
    assert state.finished != slides
    if slides:
        assert state.needs_prefill
        assert state.pending == [7, 7, 7] == state.ids[-half_of(6) :]


def test_the_end_is_no_token_of_the_sequence():
    state = begin([1], end=5)
    assert state.push(logits_of(5)) == []
    assert state.finished and state.ids == [1] and state.new_ids == []


@given(prompt=st.lists(st.integers(0, 8), min_size=1, max_size=20))
def test_the_repetition_penalty_counts_what_the_window_has_lost(prompt):
    state = begin(prompt, max_new_tokens=15, slides=True, repetition_penalty=1e6)
    assert state.pending == prompt[-6:]
    seen = set(prompt)
    for _ in range(15):
        # Every logit is above 0: the largest of what did not occur, or of all.
        logits = 1.0 + np.arange(9) / 100
        new = set(range(9)) - seen
        assert state.push(logits) == [max(new or {8})]
        seen.add(state.new_ids[-1])
