import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gpt_tf.errors import InputError
from gpt_tf.generation.sampler import Sampler, log_softmax

# Few different values, so that ties are common.
LOGITS = st.one_of(
    arrays.arrays(np.float32, st.integers(1, 40), elements=st.integers(-3, 3)),
    arrays.arrays(
        np.float32, st.integers(1, 40), elements=st.floats(-80, 80, width=32)
    ),
)
SEEDS = st.integers(0, 2**64)


class _Always:
    """A generator that gives one number only."""

    def __init__(self, number):
        self.number = number

    def random(self):
        return self.number


LARGEST = np.nextafter(1.0, 0.0)


def softmax(logits):
    powers = np.exp(np.float64(logits) - np.max(logits))
    return powers / powers.sum()


def draws(sampler, logits, count=60, seed=0):
    generator = np.random.default_rng(seed)
    return [sampler.choose(logits, [], generator) for _ in range(count)]


def likeliest_first(values):
    return np.argsort(-np.float64(values), kind="stable")


@given(LOGITS, st.integers(1, 45), SEEDS)
def test_top_k_takes_the_k_likeliest_ties_in_their_order(logits, k, seed):
    allowed = set(likeliest_first(logits)[:k].tolist())
    assert set(draws(Sampler(top_k=k), logits, seed=seed)) <= allowed


@given(LOGITS, SEEDS)
def test_top_k_one_equals_temperature_zero_equals_argmax(logits, seed):
    greedy = draws(Sampler(temperature=0), logits, 3, seed)
    assert greedy == draws(Sampler(top_k=1), logits, 3, seed)
    assert greedy == [int(np.argmax(logits))] * 3


@given(LOGITS)
def test_log_softmax_is_the_logarithm_of_the_shares_of_every_row(logits):
    rows = np.stack([logits, logits[::-1]])
    expected = [np.log(softmax(row)) for row in rows]
    np.testing.assert_allclose(log_softmax(rows), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "reached"),
    [
        ({"top_k": 3}, {0, 2, 3}),
        ({"top_k": 4}, {0, 2, 3, 4}),
        ({"top_p": 0.69}, {0, 2}),
        ({"top_p": 0.71}, {0, 2, 3}),
        ({"top_p": 1e-9}, {0}),
        ({"temperature": 5e-324}, {0}),
    ],
)
def test_every_token_of_the_set_is_reached_and_no_other(options, reached):
    with np.errstate(divide="ignore"):
        logits = np.log([0.4, 0.0, 0.3, 0.2, 0.1])
    assert set(draws(Sampler(**options), logits, 300)) == reached
    ties = np.zeros(9)
    assert set(draws(Sampler(top_k=3), ties, 200)) == {0, 1, 2}


@given(LOGITS, st.floats(1e-6, 1))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, p):
    shares = softmax(logits)
    kept = np.flatnonzero(Sampler(top_p=p)._probabilities(np.float64(logits)))
    likeliest = likeliest_first(shares)[: len(kept)]
    assert set(kept) == set(likeliest)
    assert shares[kept].sum() > p - 1e-9
    assert len(kept) == 1 or shares[likeliest[:-1]].sum() < p + 1e-9


@given(
    LOGITS,
    st.floats(0, 1e3),
    st.none() | st.integers(1, 50),
    st.none() | st.floats(1e-9, 1),
    st.floats(1e-3, 1e3),
    st.sampled_from([0.0, 0.5, LARGEST]),
)
def test_the_choice_is_always_an_id(logits, temperature, k, p, penalty, number):
    sampler = Sampler(temperature, k, p, penalty)
    token = sampler.choose(logits, [0, len(logits) - 1], _Always(number))
    assert isinstance(token, int)
    assert 0 <= token < len(logits)


def test_rounding_never_leads_beyond_the_last_token():
    # The total by pairwise addition exceeds the last running sum for many of these.
    exceeding = 0
    for size in range(2, 400):
        logits = np.random.default_rng(size).normal(size=size)
        probabilities = softmax(logits)
        exceeding += LARGEST * probabilities.sum() > np.cumsum(probabilities)[-1]
        assert Sampler().choose(logits, [], _Always(LARGEST)) == size - 1
    assert exceeding > 50


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_many_draws_are_distributed_as_the_softmax(temperature):
    logits = np.array([1.5, -0.5, 0.0, 2.0, -3.0])
    count = 20_000
    found = np.bincount(draws(Sampler(temperature), logits, count), minlength=5)
    expected = softmax(logits / temperature)
    # Five standard deviations of a binomial share, and one draw.
    bound = 5 * np.sqrt(expected * (1 - expected) / count) + 1 / count
    assert (np.abs(found / count - expected) < bound).all()
    other = softmax(logits / (temperature * 1.2))
    assert (np.abs(found / count - other) > bound).any()


@given(LOGITS, st.floats(1.01, 50), st.data())
def test_a_penalty_above_one_never_makes_a_seen_token_likelier(logits, penalty, data):
    seen = data.draw(st.lists(st.integers(0, len(logits) - 1), min_size=1))
    token = Sampler(0, repetition_penalty=penalty).choose(logits, seen, None)
    before = int(np.argmax(logits))
    assert token == before or before in seen
    encouraged = Sampler(0, repetition_penalty=1 / penalty)
    token = encouraged.choose(logits, seen, None)
    assert token == before or token in seen


def test_the_penalty_counts_a_repeated_token_once_and_spares_the_callers_logits():
    logits = np.array([2.0, 1.5, -1.0])
    sampler = Sampler(temperature=0, repetition_penalty=1.2)
    assert sampler.choose(logits, [0] * 9, None) == 0
    assert Sampler(0, repetition_penalty=1.4).choose(logits, [0], None) == 1
    assert logits.tolist() == [2.0, 1.5, -1.0]


@given(SEEDS, st.integers(1, 5), st.integers(1, 5))
def test_a_row_does_not_depend_on_the_number_of_rows(seed, few, more):
    sampler = Sampler(seed=seed)
    numbers = [
        [generator.random() for generator in sampler.generators(rows)]
        for rows in (few, few + more)
    ]
    assert numbers[0] == numbers[1][:few]
    assert len(set(numbers[1])) == few + more
    one, other = (Sampler().generators(1)[0].random() for _ in range(2))
    assert one != other


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize(
    "logits", [[0, np.nan, 1], [0, np.inf, 1], [-np.inf, -np.inf], [np.nan]]
)
def test_spoilt_logits_are_refused(logits, temperature):
    with pytest.raises(InputError, match="finite logits"):
        Sampler(temperature).choose(logits, [], np.random.default_rng(0))
