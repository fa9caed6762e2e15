import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_tf.edge.session import plan


@given(
    count=st.integers(0, 300),
    spare=st.integers(0, 80),
    lengths=st.sets(st.integers(1, 70), max_size=4),
)
def test_a_plan_covers_all_tokens_and_stays_inside(count, spare, lengths):
    calls = plan(count, count + spare, tuple(lengths))
    assert set(calls) <= lengths | {1}
    assert count <= sum(calls) <= count + spare
    # Only the last may be longer than what is left.
    assert sum(calls[:-1]) < max(1, count)
    assert list(calls) == sorted(calls, reverse=True)


def test_a_plan_has_the_least_cost():
    def cost(calls):
        return sum(1 + length / 16 for length in calls)

    lengths = (1, 3, 8)
    for count in range(1, 14):
        best = min(
            cost(calls)
            for size in range(1, count + 1)
            for calls in itertools.combinations_with_replacement(lengths, size)
            if count <= sum(calls) <= count + 2
        )
        assert cost(plan(count, count + 2, lengths)) == pytest.approx(best)
