import dataclasses
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_tf import files
from gpt_tf.errors import InputError
from gpt_tf.export import graph, signatures, stages, verify
from gpt_tf.export.constants import constants_of
from gpt_tf.export.seal import read_seal
from gpt_tf.export.stages import Costs, export_stages, share_out
from gpt_tf.export.verify import VerificationError
from tests.export.conftest import FIXED_MODES, PREFILL_LENGTHS


@pytest.fixture
def write(model, representative, tmp_path):
    """Export the small model in stages."""

    def write(mode="float32", num_stages=2, model=model, name="stages", **options):
        if mode in FIXED_MODES:
            options["representative"] = representative
        options.setdefault("prefill_lengths", PREFILL_LENGTHS)
        return export_stages(model, tmp_path / name, mode, num_stages, **options)

    return write


def facts_of(folder, index):
    return read_seal((folder / signatures.stage_file(index)).read_bytes())


@pytest.mark.parametrize("mode", signatures.MODES)
def test_stages_give_the_logits_of_the_undivided_file_bit_for_bit(write, mode):
    measured = write(mode)["verification"]
    assert measured["largest_stage_difference"] == 0.0
    # By decode alone, and after each of the prefills.
    assert measured["stage_positions"] > 3 * 8


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_any_number_of_stages_makes_the_whole(
    write, build_model, num_stages, tie_embeddings
):
    deep = build_model(num_layers=4, tie_embeddings=tie_embeddings)
    manifest = write(num_stages=num_stages, model=deep)
    assert manifest["verification"]["largest_stage_difference"] == 0.0
    blocks = [range(*stage["blocks"]) for stage in manifest["stages"]]
    assert [block for own in blocks for block in own] == [0, 1, 2, 3]


def test_one_bit_of_a_later_stage_changes_the_logits(write, model, monkeypatch):
    """What is found equal is what was computed, and by all stages."""
    original = graph._Graph._head

    def shifted(self, x):
        logits = original(self, x)
        if signatures.HIDDEN not in self.graph.inputs:
            return logits
        return self._add(logits, self.graph.constant(np.full((1,), 2e-3, np.float32)))

    monkeypatch.setattr(graph._Graph, "_head", shifted)
    with pytest.raises(VerificationError, match=r"stages whose logits differ .* 0\.00"):
        write()


def test_what_is_handed_on_is_not_forgotten_between_stages(
    write, tmp_path, monkeypatch
):
    original = verify._Chain.call

    def call(self, name, values, start, caches):
        logits, written = original(self, name, values, start, caches)
        return logits, [written[0], caches[1]]

    monkeypatch.setattr(verify._Chain, "call", call)
    with pytest.raises(VerificationError):
        write()
    assert not list(tmp_path.iterdir())


def test_a_folder_has_its_stages_and_says_what_they_are(
    write, model, tokenizer, tmp_path
):
    manifest = write("dynamic_int8", tokenizer=tokenizer)
    folder = tmp_path / "stages"
    names = ["stage-0.tflite", "stage-1.tflite", "tokenizer.json"]
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", *names]
    assert files.check_manifest(folder, stages.KIND) == manifest
    first, last = facts_of(folder, 0), facts_of(folder, 1)
    assert first["stage"]["blocks"] == [0, 1] and last["stage"]["blocks"] == [1, 2]
    assert first["stage"]["whole_sha256"] == last["stage"]["whole_sha256"]
    assert first["tokenizer_fingerprint"] == tokenizer.fingerprint()
    # The tied table stands in both, every other parameter in one.
    constants = constants_of(model, "dynamic_int8")
    table = constants.matrices["embedding/token_table"].size_bytes
    parameters = constants.size_bytes + table
    assert parameters < manifest["size_bytes"] < parameters + 2 * verify.GRAPH_BYTES


def test_the_same_model_has_the_same_fingerprint_and_another_has_another(
    write, build_model
):
    first, again, other = (
        write(name=name, model=build_model(num_layers=2, num_heads=heads))
        for name, heads in (("a", 4), ("b", 4), ("c", 2))
    )
    marks = [m["stages"][0]["whole_sha256"] for m in (first, again, other)]
    assert marks[0] == marks[1] != marks[2]


@given(
    num_layers=st.integers(2, 14),
    num_stages=st.integers(2, 6),
    block=st.integers(1, 9),
    head=st.integers(0, 60),
)
def test_blocks_are_shared_out_at_the_least_cost(num_layers, num_stages, block, head):
    num_stages = min(num_stages, num_layers)

    def costliest(lengths):
        costs = [length * block for length in lengths]
        return max(*costs[:-1], costs[-1] + head)

    blocks = share_out(num_layers, num_stages, Costs(block, head))
    assert [b for own in blocks for b in own] == list(range(num_layers))
    assert len(blocks) == num_stages and all(blocks)
    # No other number of blocks in the last stage is better.
    others = num_stages - 1
    for last in range(1, num_layers - others + 1):
        left = num_layers - last
        even = [left // others + (index < left % others) for index in range(others)]
        assert costliest(list(map(len, blocks))) <= costliest([*even, last])


def test_the_head_counts(model):
    constants = constants_of(model, "float32")
    costs = stages.costs_of(constants, 40)
    width = model.embedding_dim
    assert costs.head == 2 * model.vocab_size * width
    assert costs.block == 2 * (12 * width**2 + 2 * 20 * width)
    large = dataclasses.replace(
        constants, sizes={**constants.sizes, "vocab_size": 9**6}
    )
    assert stages.costs_of(large, 40).head > costs.head


@pytest.mark.parametrize("num_stages", [3, 1, 0, -1, 2.0, True, None])
def test_a_number_of_stages_that_cannot_be_is_refused(write, tmp_path, num_stages):
    message = rf"`num_stages` expects 2 to 2.*Received: {re.escape(repr(num_stages))}\."
    with pytest.raises(InputError, match=message):
        write(num_stages=num_stages)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_stages_gives_way_and_another_does_not(write, tmp_path):
    write(name="stages")
    write("dynamic_int8", name="stages")
    assert facts_of(tmp_path / "stages", 0)["mode"] == "dynamic_int8"
    for name, content in (("notes", None), ("run", {"kind": "run"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine", "utf-8")
        if content:
            (tmp_path / name / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match="something stands there"):
            write(name=name)
        assert (tmp_path / name / "notes.txt").read_text("utf-8") == "mine"


def test_what_export_tflite_refuses_is_refused(write):
    with pytest.raises(InputError, match="`mode` expects"):
        write("int2")
    with pytest.raises(InputError, match="`prefill_lengths`"):
        write(prefill_lengths=())
