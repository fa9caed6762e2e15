import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_tf.export import constants, signatures, verify

ROOT = Path(__file__).parents[2]
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
        "decode",
        "prefill",
        "prefill_",
        "prefill_0",
        "prefill_08",
        "prefill_-8",
        "prefill_8 ",
        "prefill_8_1",
        "my_prefill_8",
        "prefill_8\n",
        "PREFILL_8",
        "prefill_\u0668",
        "prefill_1\u0668",
        "score_8",
    ],
)
def test_other_names_have_no_length(name):
    assert signatures.lengths_of([name]) == ()


def test_caches_are_named_as_litert_lm_names_them():
    assert signatures.caches(2) == [
        "kv_cache_k_0",
        "kv_cache_v_0",
        "kv_cache_k_1",
        "kv_cache_v_1",
    ]
    assert signatures.caches(0) == []


@given(st.integers(0, 30), st.integers(1, 12), st.integers(1, 40))
def test_each_token_sees_the_rows_up_to_its_own(start, length, capacity):
    mask = signatures.mask(np.arange(start, start + length), capacity)
    assert mask.shape == (1, 1, length, capacity)
    assert mask.dtype == np.float32
    for row in range(length):
        for column in range(capacity):
            expected = 0 if column <= start + row else signatures.MASKED
            assert mask[0, 0, row, column] == np.float32(expected)


def test_the_mask_takes_any_positions():
    expected = signatures.mask(np.array([4, 0]), 6)
    np.testing.assert_array_equal(signatures.mask([4, 0], 6), expected)
    assert (expected[0, 0] == 0).sum(axis=1).tolist() == [5, 1]


def test_a_hidden_row_has_no_share_in_the_softmax():
    scores = np.float32(1e4) + np.float32(signatures.MASKED)
    assert np.exp(scores - np.float32(-1e4)) == 0


def test_the_modes_of_the_contract_are_those_that_can_be_written():
    assert tuple(constants.MODES) == signatures.MODES
    assert set(signatures.MODES) == set(verify.LARGEST_DIVERGENCE)


def test_the_contract_is_read_without_tensorflow_and_without_litert():
    code = (
        "import json, sys, gpt_tf.export.signatures\n"
        "heavy = ('tensorflow', 'keras', 'tf_keras', 'ai_edge_litert', 'flatbuffers')\n"
        "print(json.dumps([name for name in heavy if name in sys.modules]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == []
