import functools

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

from gpt_tf.export import signatures
from tests.export.runner import TYPES, content_of, operations_of

pytestmark = pytest.mark.usefixtures("eagerly")  # models are only calibrated here
MODES = signatures.MODES
# The operations on real numbers that are left of GPT-2's form in the mode `int8_full`:
# the embedding's rows and the normalisations, which need more than 8 bits, mask and
# softmax, and the conversions around them.
FLOAT_ISLANDS = {
    "ADD",
    "DEQUANTIZE",
    "EMBEDDING_LOOKUP",
    "MEAN",
    "MUL",
    "RESHAPE",
    "RSQRT",
    "SOFTMAX",
    "SUB",
}


@pytest.fixture(scope="module")
def content(exported):
    """A mode's file, parsed once."""
    return functools.cache(lambda mode: content_of(exported(mode).path))


@pytest.fixture(scope="module")
def operations(content):
    """All operations of a mode's file."""
    return lambda mode: list(operations_of(content(mode)))


def kinds_of(tensors):
    return [TYPES[tensor.type] for tensor in tensors if tensor is not None]


# What the signatures hold


@pytest.mark.parametrize("mode", MODES)
def test_a_single_token_needs_no_transposition_and_a_prefill_ends_with_its_caches(
    operations, mode
):
    counts = {}
    for signature, operator, *_ in operations(mode):
        counts.setdefault(signature, []).append(operator)
    for signature in ("decode", "prefill_1"):
        assert not {"TRANSPOSE", "SLICE"} & set(counts[signature])
    prefill, score = counts["prefill_16"], counts["score_40"]
    assert "TRANSPOSE" in prefill
    assert (prefill.count("SOFTMAX"), score.count("SOFTMAX")) == (1, 2)
    for signature in (prefill, score):
        assert signature.count("DYNAMIC_UPDATE_SLICE") == 4


@pytest.mark.parametrize("mode", MODES)
def test_the_shapes_written_are_those_that_litert_computes_and_all_are_used(
    exported, content, mode
):
    interpreter = Interpreter(model_path=str(exported(mode).path))
    for index, graph in enumerate(content(mode).subgraphs):
        runner = interpreter.get_signature_runner(graph.name.decode())
        runner._interpreter_wrapper.AllocateTensors(index)
        used = {*graph.outputs}.union(*(one.inputs for one in graph.operators))
        for operation in graph.operators:
            assert used & {*operation.outputs}
            for number in operation.outputs:
                tensor = graph.tensors[number]
                found = interpreter._get_tensor_details(int(number), index)
                assert found["shape"].tolist() == tensor.shape.tolist()


# Weights


@pytest.mark.parametrize("mode", [mode for mode in MODES if "float" not in mode])
def test_every_quantised_weight_has_a_scale_per_output_channel(operations, mode):
    checked = 0
    for _, operator, _, inputs, outputs, _ in operations(mode):
        if operator not in ("FULLY_CONNECTED", "EMBEDDING_LOOKUP"):
            continue
        weights = inputs[1]
        assert TYPES[weights.type] in ("INT8", "INT4")
        quant = weights.quantization
        assert quant.quantizedDimension == 0
        if TYPES[weights.type] == "INT4":
            assert quant.details.blockSize == 32
        else:
            assert len(quant.scale) == len(quant.zeroPoint) == weights.shape[0]
            assert not quant.zeroPoint.any()
        if operator == "FULLY_CONNECTED":
            assert weights.shape[0] == outputs[0].shape[-1]
        checked += 1
    assert checked > 40


@pytest.mark.parametrize("mode", ["int8", "int8_full", "int16x8"])
def test_biases_are_on_the_quantisation_of_the_product(operations, mode):
    checked = 0
    for _, operator, _, inputs, _, _ in operations(mode):
        if operator != "FULLY_CONNECTED" or TYPES[inputs[0].type] == "FLOAT32":
            continue
        x, weights, bias = inputs
        if bias is None:  # the head's
            continue
        assert TYPES[bias.type] == "INT32"
        scales = x.quantization.scale[0] * weights.quantization.scale
        np.testing.assert_allclose(bias.quantization.scale, scales, rtol=1e-6)
        checked += 1
    assert checked > 20


# Which modes compute what in integers


@pytest.mark.parametrize("mode", ["float32", "float16", "dynamic_int8", "int4"])
def test_modes_without_ranges_compute_in_real_numbers(operations, mode):
    for _, operator, _, _, outputs, _ in operations(mode):
        assert TYPES[outputs[0].type] in ("FLOAT32", "INT32", "FLOAT16"), operator


@pytest.mark.parametrize(("mode", "kind"), [("int8", "INT8"), ("int16x8", "INT16")])
def test_the_products_of_the_blocks_are_integer_ones(operations, mode, kind):
    for signature in ("decode", "prefill_16", "score_40"):
        products = [
            (TYPES[inputs[0].type], TYPES[outputs[0].type])
            for name, operator, _, inputs, outputs, _ in operations(mode)
            if name == signature and operator == "FULLY_CONNECTED"
        ]
        head = [("FLOAT32", "FLOAT32")]
        blocks = [(kind, kind)] * (8 if signature == "prefill_16" else 12)
        assert products == blocks + head * (signature != "prefill_16")


def test_int8_full_computes_in_integers_but_for_the_documented_islands(operations):
    floats = set()
    for _, operator, _, inputs, outputs, _ in operations("int8_full"):
        kinds = set(kinds_of([*inputs, *outputs]))
        if TYPES[outputs[0].type] == "FLOAT32":
            floats.add(operator)
        if operator in ("FULLY_CONNECTED", "BATCH_MATMUL", "GELU"):
            assert kinds <= {"INT8", "INT32"}, operator
        if operator == "DYNAMIC_UPDATE_SLICE":
            assert kinds == {"INT8", "INT32"}
    assert floats == FLOAT_ISLANDS


def test_gelu_is_the_tanh_form_in_every_mode(operations):
    for mode in MODES:
        found = [options for _, op, *_, options in operations(mode) if op == "GELU"]
        assert found and all(options.approximate for options in found)
