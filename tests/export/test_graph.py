import warnings

import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

from gpt_tf.export import signatures
from gpt_tf.export.graph import FLOAT_ISLANDS
from gpt_tf.models.ops import gelu
from tests.export.runner import TYPES, content_of, operations_of

MODES = signatures.MODES
INTEGERS = ("INT8", "INT16", "INT32", "INT4")

# TensorFlow Lite's rule (op_version.cc), for what our graphs hold: operator and types
# of its inputs to version. The rule knows no int4 beside float32; we write 13, so
# that no runtime that is older than blocks of int4 takes the file.
VERSIONS = {
    ("ADD", "FLOAT32"): 1,
    ("ADD", "INT16"): 3,
    ("BATCH_MATMUL", "FLOAT32"): 1,
    ("BATCH_MATMUL", "INT8"): 2,
    ("CONCATENATION", "INT32"): 1,
    ("DEQUANTIZE", "FLOAT16"): 3,
    ("DEQUANTIZE", "INT16"): 3,
    ("DEQUANTIZE", "INT8"): 2,
    ("DYNAMIC_UPDATE_SLICE", "FLOAT32"): 1,
    ("DYNAMIC_UPDATE_SLICE", "INT8"): 1,
    ("EMBEDDING_LOOKUP", "FLOAT32"): 1,
    ("EMBEDDING_LOOKUP", "INT8"): 4,
    ("FULLY_CONNECTED", "FLOAT32", "FLOAT32"): 5,
    ("FULLY_CONNECTED", "FLOAT32", "INT4"): 13,
    ("FULLY_CONNECTED", "FLOAT32", "INT8"): 12,
    ("FULLY_CONNECTED", "INT16", "INT8"): 11,
    ("FULLY_CONNECTED", "INT8", "INT8"): 5,
    ("GATHER", "FLOAT16"): 1,
    ("GELU", "FLOAT32"): 1,
    ("GELU", "INT8"): 2,
    ("MEAN", "FLOAT32"): 1,
    ("MUL", "FLOAT32"): 1,
    ("QUANTIZE", "FLOAT32", "to INT16"): 2,
    ("QUANTIZE", "FLOAT32", "to INT8"): 1,
    ("QUANTIZE", "INT8", "to INT16"): 2,
    ("RESHAPE", "FLOAT32"): 1,
    ("RESHAPE", "INT16"): 1,
    ("RESHAPE", "INT32"): 1,
    ("RESHAPE", "INT8"): 1,
    ("RSQRT", "FLOAT32"): 1,
    ("SLICE", "INT32"): 1,
    ("SOFTMAX", "FLOAT32"): 1,
    ("SPLIT", "FLOAT32"): 1,
    ("SUB", "FLOAT32"): 1,
    ("TRANSPOSE", "FLOAT32"): 1,
    ("TRANSPOSE", "INT16"): 5,
    ("TRANSPOSE", "INT8"): 2,
}


def key_of(operator, inputs, outputs):
    kinds = [TYPES[tensor.type] for tensor in inputs if tensor is not None]
    if operator == "FULLY_CONNECTED":
        return (operator, *kinds[:2])
    if operator == "QUANTIZE":
        return (operator, kinds[0], f"to {TYPES[outputs[0].type]}")
    place = 1 if operator in ("SPLIT", "EMBEDDING_LOOKUP") else 0
    return (operator, kinds[place])


def versions_of(content):
    return {
        key_of(operator, inputs, outputs): version
        for _, operator, version, inputs, outputs, _ in operations_of(content)
    }


@pytest.fixture(scope="module")
def content(exported):
    """A mode's file, parsed once."""
    parsed = {}

    def content(mode):
        if mode not in parsed:
            parsed[mode] = content_of(exported(mode).path)
        return parsed[mode]

    return content


# Operators


@pytest.mark.parametrize("mode", MODES)
def test_every_operator_has_the_version_of_tensorflow_lites_rule(content, mode):
    found = versions_of(content(mode))
    assert found == {key: VERSIONS[key] for key in found}


def test_the_table_of_versions_holds_nothing_that_no_mode_writes(content):
    written = set().union(*(versions_of(content(mode)) for mode in MODES))
    assert written == set(VERSIONS)


def test_one_scale_per_matrix_needs_no_later_version(export, model):
    path = export(model, "dynamic_int8", per_channel=False).path
    found = versions_of(content_of(path))
    assert found["FULLY_CONNECTED", "FLOAT32", "INT8"] == 9
    assert found["EMBEDDING_LOOKUP", "INT8"] == 1


def converted(function, *shapes, integers=False, dynamic=False):
    """Convert a function of float32 by TensorFlow's converter."""
    specs = [tf.TensorSpec(shape, tf.float32) for shape in shapes]
    concrete = tf.function(function, autograph=False).get_concrete_function(*specs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the converter about itself
        converter = tf.lite.TFLiteConverter.from_concrete_functions(
            [concrete], tf.Module()
        )
        converter.unfold_batchmatmul = False
        if integers or dynamic:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if integers:
            generator = np.random.default_rng(0)
            converter.representative_dataset = lambda: (
                [generator.normal(size=shape).astype("float32") for shape in shapes]
                for _ in range(3)
            )
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        return content_of(bytearray(converter.convert()))


KERNEL = np.random.default_rng(1).normal(size=(64, 48)).astype("float32")


@pytest.mark.parametrize("options", [{}, {"dynamic": True}, {"integers": True}])
def test_tensorflows_converter_writes_the_same_versions(options):
    def dense(x):
        return tf.tensordot(x, KERNEL, 1) + KERNEL[0]

    def attend(a, b):
        shares = tf.matmul(tf.transpose(a, [0, 2, 1, 3]), b, transpose_b=True)
        return tf.reshape(shares, [1, 5, 25])

    def norm(x):
        centred = x - tf.reduce_mean(x, -1, keepdims=True)
        variance = tf.reduce_mean(centred * centred, -1, keepdims=True)
        return centred * tf.math.rsqrt(variance + 1e-5)

    cases = [
        (dense, (1, 4, 64)),
        (attend, (1, 5, 5, 8), (1, 5, 5, 8)),
        (lambda x: tf.nn.gelu(x, approximate=True), (1, 4, 64)),
    ]
    if not options:
        cases += [(norm, (1, 4, 64)), (tf.nn.softmax, (1, 4, 64))]
        cases += [(lambda x: tf.split(x, 3, 1)[0], (1, 12, 5, 8))]
    found = {}
    for case in cases:
        found |= versions_of(converted(*case, **options))
    expected = {
        (): ("FULLY_CONNECTED", "FLOAT32", "FLOAT32"),
        ("dynamic",): ("FULLY_CONNECTED", "FLOAT32", "INT8"),
        ("integers",): ("FULLY_CONNECTED", "INT8", "INT8"),
    }[tuple(options)]
    assert expected in found
    assert len(found) >= 5
    assert found == {key: VERSIONS[key] for key in found}


@pytest.mark.parametrize("mode", MODES)
def test_no_operator_beyond_the_built_in_ones(content, mode):
    names = {operator for _, operator, *_ in operations_of(content(mode))}
    assert "CUSTOM" not in names
    assert not any(code.customCode for code in content(mode).operatorCodes)
    assert names <= {key[0] for key in VERSIONS}


# What the signatures hold


def counts_of(content, signature):
    counts = {}
    for name, operator, *_ in operations_of(content):
        if name == signature:
            counts[operator] = counts.get(operator, 0) + 1
    return counts


def test_a_single_token_needs_no_transposition(content):
    for mode in MODES:
        for signature in ("decode", "prefill_1"):
            counts = counts_of(content(mode), signature)
            assert not counts.keys() & {"TRANSPOSE", "SLICE"}, (mode, signature)
        assert "TRANSPOSE" in counts_of(content(mode), "prefill_16")


def test_a_prefill_ends_with_the_last_caches(content):
    for mode in MODES:
        prefill = counts_of(content(mode), "prefill_16")
        score = counts_of(content(mode), "score_40")
        assert prefill["SOFTMAX"] == 1
        assert score["SOFTMAX"] == 2
        assert prefill["DYNAMIC_UPDATE_SLICE"] == score["DYNAMIC_UPDATE_SLICE"] == 4


def test_every_operations_result_is_used(content):
    for mode in MODES:
        for graph in content(mode).subgraphs:
            used = {*graph.outputs}
            for operation in graph.operators:
                used.update(operation.inputs)
            for operation in graph.operators:
                assert used & {*operation.outputs}, (mode, graph.name)


@pytest.mark.parametrize("mode", MODES)
def test_the_shapes_written_are_those_that_litert_computes(exported, content, mode):
    interpreter = Interpreter(model_path=str(exported(mode).path))
    for index, graph in enumerate(content(mode).subgraphs):
        runner = interpreter.get_signature_runner(graph.name.decode())
        runner._interpreter_wrapper.AllocateTensors(index)
        for operation in graph.operators:
            for number in operation.outputs:
                tensor = graph.tensors[number]
                found = interpreter._get_tensor_details(int(number), index)
                assert found["shape"].tolist() == tensor.shape.tolist()


# Weights


@pytest.mark.parametrize("mode", [mode for mode in MODES if "float" not in mode])
def test_every_quantised_weight_has_a_scale_per_output_channel(content, mode):
    checked = 0
    for _, operator, _, inputs, outputs, _ in operations_of(content(mode)):
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


def test_biases_are_on_the_quantisation_of_the_product(content):
    for mode in ("int8", "int8_full", "int16x8"):
        checked = 0
        for _, operator, _, inputs, _, _ in operations_of(content(mode)):
            if operator != "FULLY_CONNECTED" or TYPES[inputs[0].type] == "FLOAT32":
                continue
            x, weights, bias = inputs
            if bias is None:  # the head's
                continue
            assert TYPES[bias.type] == "INT32"
            np.testing.assert_allclose(
                bias.quantization.scale,
                x.quantization.scale[0] * weights.quantization.scale,
                rtol=1e-6,
            )
            checked += 1
        assert checked > 20, mode


# Which modes compute what in integers


def test_modes_without_ranges_compute_in_real_numbers(content):
    for mode in ("float32", "float16", "dynamic_int8", "int4"):
        for _, operator, _, _, outputs, _ in operations_of(content(mode)):
            assert TYPES[outputs[0].type] in ("FLOAT32", "INT32", "FLOAT16"), operator


@pytest.mark.parametrize(("mode", "kind"), [("int8", "INT8"), ("int16x8", "INT16")])
def test_the_products_of_the_blocks_are_integer_ones(content, mode, kind):
    for signature in ("decode", "prefill_16", "score_40"):
        products = [
            (TYPES[inputs[0].type], TYPES[outputs[0].type])
            for name, operator, _, inputs, outputs, _ in operations_of(content(mode))
            if name == signature and operator == "FULLY_CONNECTED"
        ]
        head = [("FLOAT32", "FLOAT32")]
        blocks = [(kind, kind)] * (8 if signature == "prefill_16" else 12)
        assert products == blocks + head * (signature != "prefill_16")


def test_int8_full_computes_in_integers_but_for_the_documented_islands(content):
    names = set()
    for _, operator, _, inputs, outputs, _ in operations_of(content("int8_full")):
        kinds = {TYPES[t.type] for t in [*inputs, *outputs] if t is not None}
        if TYPES[outputs[0].type] == "FLOAT32":
            names.add(operator)
        if operator in ("FULLY_CONNECTED", "BATCH_MATMUL", "GELU"):
            assert kinds <= {"INT8", "INT32"}, operator
        if operator == "DYNAMIC_UPDATE_SLICE":
            assert kinds == {"INT8", "INT32"}
    assert names <= set(FLOAT_ISLANDS)


def test_every_documented_island_exists(content):
    floats = {
        operator
        for _, operator, _, _, outputs, _ in operations_of(content("int8_full"))
        if TYPES[outputs[0].type] == "FLOAT32"
    }
    assert set(FLOAT_ISLANDS) == floats


@pytest.mark.parametrize("mode", MODES)
def test_caches_are_int8_in_int8_full_only(content, mode):
    for graph in content(mode).subgraphs:
        for number in [*graph.inputs, *graph.outputs]:
            tensor = graph.tensors[number]
            if len(tensor.shape) == 4 and tensor.shape[1] == 4:
                expected = "INT8" if mode == "int8_full" else "FLOAT32"
                assert TYPES[tensor.type] == expected


def test_a_cache_has_one_quantisation_going_in_and_coming_out(content):
    for graph, definition in zip(
        content("int8_full").subgraphs, content("int8_full").signatureDefs, strict=True
    ):
        into_and_out = [
            {entry.name: graph.tensors[entry.tensorIndex] for entry in side}
            for side in (definition.inputs, definition.outputs)
        ]
        for name in signatures.caches(2):
            into, out = (tensors[name.encode()] for tensors in into_and_out)
            assert into.quantization.scale == out.quantization.scale
            assert into.quantization.zeroPoint == out.quantization.zeroPoint


def test_gelu_is_the_tanh_form_of_the_model(content):
    checked = 0
    for mode in MODES:
        for _, operator, _, _, _, options in operations_of(content(mode)):
            if operator == "GELU":
                assert options.approximate
                checked += 1
    assert checked
    x = np.linspace(-4, 4, 81, dtype=np.float32)
    tanh_form = tf.nn.gelu(x, approximate=True)
    np.testing.assert_allclose(gelu(tf.constant(x)), tanh_form, atol=1e-6)
    assert np.abs(tanh_form - tf.nn.gelu(x, approximate=False)).max() > 1e-4
