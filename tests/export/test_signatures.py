import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_tf.export import constants, signatures, verify

LENGTHS = st.sets(st.integers(1, 10**6), max_size=8)


@given(LENGTHS, LENGTHS, st.randoms())
def test_lengths_come_back_from_the_names(prefills, scores, random):
    names = [
        "decode",
        *map(signatures.prefill, prefills),
        *map(signatures.score, scores),
    ]
    random.shuffle(names)
    assert signatures.lengths_of(names) == tuple(sorted(prefills))
    assert signatures.lengths_of(names, "score") == tuple(sorted(scores))


@pytest.mark.parametrize(
    "name",
    [
        "prefill_",
        "prefill_08",
        "prefill_8 ",
        "my_prefill_8",
        "prefill_\u0668",
        "score_8",
    ],
)
def test_other_names_have_no_length(name):
    assert signatures.lengths_of([name]) == ()


def test_caches_are_named_as_litert_lm_names_them():
    names = ["kv_cache_k_0", "kv_cache_v_0", "kv_cache_k_1", "kv_cache_v_1"]
    assert signatures.caches(2) == names


@given(st.integers(0, 30), st.integers(1, 12), st.integers(1, 40))
def test_each_token_sees_the_rows_up_to_its_own(start, length, capacity):
    mask = signatures.mask(np.arange(start, start + length), capacity)
    assert mask.shape == (1, 1, length, capacity)
    assert mask.dtype == np.float32
    for row in range(length):
        for column in range(capacity):
            expected = 0 if column <= start + row else signatures.MASKED
            assert mask[0, 0, row, column] == np.float32(expected)


def test_the_modes_of_the_contract_are_those_that_can_be_written():
    assert tuple(constants.MODES) == signatures.MODES
    assert set(signatures.MODES) == set(verify.LARGEST_DIVERGENCE)
