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


def test_other_names_have_no_length():
    names = ["prefill_", "prefill_08", "prefill_8 ", "my_prefill_8", "prefill_\u0668"]
    assert signatures.lengths_of([*names, "score_8"]) == ()


def test_the_modes_of_the_contract_are_those_that_can_be_written():
    assert tuple(constants.MODES) == signatures.MODES
    assert set(signatures.MODES) == set(verify.LARGEST_DIVERGENCE)
