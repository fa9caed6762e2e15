import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_tf.generation import sequence, speculation
from gpt_tf.generation.sampler import Sampler
from gpt_tf.generation.speculation import NGRAM, Pace, PromptLookup

# Probabilities of the next of four tokens after each.
CHAIN = np.array(
    [[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.25] * 4, [0.05, 0.05, 0.6, 0.3]]
)


def foreseen(ids, count):
    """What followed the last n-gram's last earlier occurrence, by plain search."""
    ids = list(ids)
    for place in range(len(ids) - 1, NGRAM - 1, -1):
        if ids[place - NGRAM : place] == ids[-NGRAM:]:
            for _ in range(count):
                ids.append(ids[place])
                place += 1
            return ids[-count:]
    return []


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 7))
def test_a_lookup_proposes_what_followed_the_last_occurrence(ids, count):
    growing = ids[:1]
    lookup = PromptLookup(growing)
    for token in ids[1:]:
        growing.append(token)
        found = lookup.propose(count) if lookup.ready() else []
        assert found == foreseen(growing, count)


def generate(propose, count, seed):
    """Draw from the chain, several tokens a call where they were proposed."""
    ((state,), _), calls = (
        sequence.begin(
            [0],
            Sampler(seed=seed),
            vocab_size=4,
            context_length=99,
            tokenizer=None,
            max_new_tokens=count,
            stop=(),
            stream=False,
        ),
        0,
    )
    while not state.finished:
        proposed = propose(state, 3)
        logits = np.log(CHAIN[[*state.pending, *proposed]])
        speculation.verify(state, logits, proposed)
        calls += 1
    return state.value, calls


def test_proposals_leave_the_distribution_of_a_text_as_it_is():
    generator = np.random.default_rng(0)

    def anything(state, count):
        return generator.integers(0, 4, count).tolist()

    drawn = [generate(anything, 3, seed) for seed in range(4000)]
    assert [text for text, _ in drawn[:50]] == [
        generate(lambda *_: [], 3, seed)[0] for seed in range(50)
    ]
    texts = np.array([text for text, _ in drawn])
    counts = np.bincount(texts @ [16, 4, 1], minlength=64)
    one, two, three = CHAIN[0][:, None, None], CHAIN[:, :, None], CHAIN[None]
    expected = (one * two * three).reshape(64) * len(texts)
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 103.4  # of 63 degrees of freedom, once in a thousand
    # What is chosen as it is proposed needs fewer calls, and is the same.
    assert sum(calls for _, calls in drawn) < 2.8 * len(drawn)


def test_a_rehearsal_chooses_what_will_be_chosen():
    def rehearsed(state, count):
        choose, token, proposed = state.rehearsal(), state.pending[-1], []
        for _ in range(count):
            token = choose(np.log(CHAIN[token]))
            proposed.append(token)
        return proposed

    for seed in range(20):
        text, calls = generate(rehearsed, 40, seed)
        assert (text, calls) == (generate(lambda *_: [], 40, seed)[0], 10)


class Device:
    """Steps whose time and acceptance are known."""

    def __init__(self, costs):
        self.costs, self.pace = costs, Pace(list(costs))
        self.generator = np.random.default_rng(1)
        self.pace.record(1, 0, 1.0)
        self.pace.record(1, 0, 1.0)

    def speed(self, acceptance, tokens):
        """Return tokens per ordinary step's time, and the last lengths."""
        made, seconds, lengths = 0, 0.0, []
        while made < tokens:
            length = self.pace.length(8)
            right = self.generator.random(length - 1) < acceptance
            accepted = int(np.cumprod(right).sum())
            took = self.costs.get(length, 1.0)
            self.pace.record(length, accepted, took)
            made, seconds = made + 1 + accepted, seconds + took
            lengths.append(length)
        return made / seconds, lengths[-20:]


CHEAP = {2: 1.05, 4: 1.2, 8: 1.5}


def test_what_is_accepted_is_proposed_in_long_pieces():
    speed, lengths = Device(CHEAP).speed(1.0, 400)
    assert speed > 4.5 and set(lengths) == {8}


@pytest.mark.parametrize("costs", [CHEAP, {2: 1.9, 4: 3.0, 8: 5.0}, {2: 4.0}])
def test_what_is_refused_costs_next_to_nothing(costs):
    speed, _ = Device(costs).speed(0.0, 1000)
    assert speed > 0.98


def test_what_is_too_slow_is_left_off_however_often_it_is_right():
    device = Device({2: 2.5, 4: 4.5})
    assert device.speed(1.0, 2000)[0] > 0.98


def test_it_begins_again_where_text_lets_itself_be_foreseen():
    device = Device(CHEAP)
    device.speed(0.0, 1000)
    assert device.speed(1.0, 400)[0] > 3
    assert device.speed(0.0, 1000)[0] > 0.97
