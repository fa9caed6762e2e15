import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from gpt_tf.errors import InputError
from gpt_tf.export import graph, signatures, tflite_writer
from gpt_tf.export.tflite_writer import Model, Op, QuantParams, Type
from gpt_tf.export.weights import constants_of
from tests.export.runner import OPERATORS, content_of

DTYPES = {
    np.dtype("float32"): Type.FLOAT32,
    np.dtype("float16"): Type.FLOAT16,
    np.dtype("int8"): Type.INT8,
    np.dtype("int16"): Type.INT16,
    np.dtype("int32"): Type.INT32,
    np.dtype("int64"): Type.INT64,
    np.dtype("bool"): Type.BOOL,
}


def params_of(*scales, zero_point=0, axis=0):
    count = len(scales)
    return QuantParams(
        np.array(scales, "float32"), np.full(count, zero_point, "int64"), axis
    )


def add(subgraph, a, b):
    return subgraph.op(Op.ADD, [a, b], a.shape, options=schema.AddOptionsT())


def adder(model, name, constant):
    """A signature that adds a constant."""
    subgraph = model.subgraph(name)
    x = subgraph.input("x", np.shape(constant))
    subgraph.output("y", add(subgraph, x, subgraph.constant(constant)))
    return subgraph


def raw(data):
    return schema.Model.GetRootAs(data, 0)


def buffer_bytes(content, tensor):
    return bytes(content.buffers[tensor.buffer].data)


def test_litert_runs_what_was_written():
    model = Model()
    adder(model, "one", np.array([1.0, 2.0], np.float32))
    adder(model, "two", np.array([[3.0]], np.float32))
    interpreter = Interpreter(model_content=bytes(model.to_bytes()))
    one, two = (interpreter.get_signature_runner(name) for name in ("one", "two"))
    assert one(x=np.array([10, 20], np.float32))["y"].tolist() == [11, 22]
    assert two(x=np.array([[10]], np.float32))["y"].tolist() == [[13]]


def test_signatures_inputs_and_outputs_are_read_back():
    model = Model()
    subgraph = model.subgraph("decode")
    tokens = subgraph.input("tokens", (1, 3), Type.INT32)
    cache = subgraph.input("cache", (1, 2, 5, 4), Type.INT8, params_of(0.5))
    subgraph.output("cache", cache)
    subgraph.output("ids", tokens)
    adder(model, "other", np.zeros(2, np.float32))
    content = content_of(model.to_bytes())
    assert content.version == 3
    first, second = content.signatureDefs
    assert (first.signatureKey, second.signatureKey) == (b"decode", b"other")
    assert (first.subgraphIndex, second.subgraphIndex) == (0, 1)
    tensors = content.subgraphs[0].tensors
    found = {
        entry.name: (
            tensors[entry.tensorIndex].type,
            [*tensors[entry.tensorIndex].shape],
        )
        for entry in first.inputs
    }
    assert found == {
        b"tokens": (Type.INT32, [1, 3]),
        b"cache": (Type.INT8, [1, 2, 5, 4]),
    }
    assert [entry.name for entry in first.outputs] == [b"cache", b"ids"]
    assert [*content.subgraphs[0].inputs] == [tokens.index, cache.index]
    assert [*content.subgraphs[0].outputs] == [cache.index, tokens.index]


def test_the_file_says_what_it_is():
    data = Model().to_bytes()
    assert schema.Model.ModelBufferHasIdentifier(data, 0)
    assert raw(data).Description() == b"gpt_tf"


@given(
    st.sampled_from(sorted(DTYPES, key=str)).flatmap(
        lambda dtype: nps.arrays(
            dtype, nps.array_shapes(min_dims=0, max_dims=4, min_side=1, max_side=5)
        )
    )
)
def test_every_constant_is_read_back_bit_by_bit(array):
    model = Model()
    subgraph = model.subgraph("main")
    subgraph.output("y", subgraph.constant(array))
    content = content_of(model.to_bytes())
    (tensor,) = content.subgraphs[0].tensors
    assert tensor.type == DTYPES[array.dtype]
    assert tuple([] if tensor.shape is None else tensor.shape) == array.shape
    assert buffer_bytes(content, tensor) == array.tobytes()


def test_what_is_not_contiguous_is_stored_in_the_order_of_its_indices():
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    model = Model()
    subgraph = model.subgraph("main")
    subgraph.output("y", subgraph.constant(array.T))
    content = content_of(model.to_bytes())
    (tensor,) = content.subgraphs[0].tensors
    stored = np.frombuffer(buffer_bytes(content, tensor), np.int32)
    assert stored.reshape(tensor.shape).tolist() == array.T.tolist()


def test_scales_are_read_back():
    model = Model()
    subgraph = model.subgraph("main")
    values = np.arange(6, dtype=np.int8).reshape(2, 3)
    subgraph.constant(values, params_of(0.5, 0.25, zero_point=3))
    subgraph.constant(values, params_of(0.5, 0.25, 0.125, axis=1))
    subgraph.input("x", (4,), Type.INT16, params_of(0.1, zero_point=-7))
    subgraph.input("plain", (4,))
    rows, columns, one, plain = content_of(model.to_bytes()).subgraphs[0].tensors
    assert rows.quantization.scale.tolist() == [0.5, 0.25]
    assert rows.quantization.zeroPoint.tolist() == [3, 3]
    assert rows.quantization.quantizedDimension == 0
    assert columns.quantization.scale.tolist() == [0.5, 0.25, 0.125]
    assert columns.quantization.quantizedDimension == 1
    assert one.quantization.scale.tolist() == [np.float32(0.1)]
    assert one.quantization.zeroPoint.tolist() == [-7]
    assert plain.quantization is None


def test_blocks_of_int4_are_read_back_with_their_scales():
    model = Model()
    subgraph = model.subgraph("main")
    scales = np.array([[0.5, 1.0], [2.0, 4.0]], np.float16)
    packed = np.arange(64, dtype=np.uint8)
    quant = QuantParams(scales, np.zeros(1, np.int64), 0, block_size=32)
    subgraph.constant(packed, quant, Type.INT4, (2, 64))
    content = content_of(model.to_bytes())
    (weights,) = (t for t in content.subgraphs[0].tensors if t.type == Type.INT4)
    assert weights.shape.tolist() == [2, 64]
    assert buffer_bytes(content, weights) == packed.tobytes()
    details = weights.quantization.details
    assert weights.quantization.detailsType == (
        schema.QuantizationDetails.BlockwiseQuantization
    )
    assert details.blockSize == 32
    stored = content.subgraphs[0].tensors[details.scales]
    assert stored.type == Type.FLOAT16
    assert stored.shape.tolist() == [2, 2]
    assert buffer_bytes(content, stored) == scales.tobytes()


def test_operations_keep_operands_options_and_versions():
    model = Model()
    subgraph = model.subgraph("main")
    x = subgraph.input("x", (1, 4))
    weights = subgraph.constant(np.eye(4, dtype=np.float32))
    options = schema.FullyConnectedOptionsT()
    options.keepNumDims = True
    y = subgraph.op(
        Op.FULLY_CONNECTED, [x, weights, None], (1, 4), options=options, version=5
    )
    axis = subgraph.constant(np.array(1, np.int32))
    split = schema.SplitOptionsT()
    split.numSplits = 2
    parts = subgraph.ops(Op.SPLIT, [axis, y], [(1, 2)] * 2, y.type, options=split)
    subgraph.output("y", parts[1])
    content = content_of(model.to_bytes())
    first, second = content.subgraphs[0].operators
    codes = [content.operatorCodes[op.opcodeIndex] for op in (first, second)]
    assert [OPERATORS[code.builtinCode] for code in codes] == [
        "FULLY_CONNECTED",
        "SPLIT",
    ]
    assert [code.version for code in codes] == [5, 1]
    assert [*first.inputs] == [x.index, weights.index, -1]
    assert [*first.outputs] == [y.index]
    assert first.builtinOptions.keepNumDims
    assert not first.builtinOptions.asymmetricQuantizeInputs
    assert [*second.inputs] == [axis.index, y.index]
    assert [*second.outputs] == [part.index for part in parts]
    assert second.builtinOptions.numSplits == 2
    assert parts[1].type == Type.FLOAT32


def test_an_operators_code_is_where_old_runtimes_look_for_it_too():
    model = Model()
    subgraph = model.subgraph("main")
    x = subgraph.input("x", (2,))
    for operator in (Op.ADD, Op.GELU, Op.DYNAMIC_UPDATE_SLICE):
        subgraph.op(operator, [x], (2,))
    found = [
        (code.deprecatedBuiltinCode, code.builtinCode)
        for code in content_of(model.to_bytes()).operatorCodes
    ]
    placeholder = Op.PLACEHOLDER_FOR_GREATER_OP_CODES
    assert found == [
        (Op.ADD, Op.ADD),
        (placeholder, Op.GELU),
        (placeholder, Op.DYNAMIC_UPDATE_SLICE),
    ]


def test_options_that_read_alike_are_not_confused():
    model = Model()
    subgraph = model.subgraph("main")
    x = subgraph.input("x", (2,))
    kinds = ("Add", "Sub", "Mul", "Add", "Gelu", "Quantize", "Dequantize")
    for kind in kinds:
        options = getattr(schema, f"{kind}OptionsT")()
        subgraph.op(getattr(Op, kind.upper()), [x, x], (2,), options=options)
    approximate = schema.GeluOptionsT()
    approximate.approximate = True
    subgraph.op(Op.GELU, [x, x], (2,), options=approximate)
    *plain, last = content_of(model.to_bytes()).subgraphs[0].operators
    for kind, operation in zip(kinds, plain, strict=True):
        expected = getattr(schema.BuiltinOptions, f"{kind}Options")
        assert operation.builtinOptionsType == expected
        assert type(operation.builtinOptions).__name__ == f"{kind}OptionsT"
    assert last.builtinOptions.approximate
    assert not plain[4].builtinOptions.approximate


def test_operators_are_counted_over_all_signatures():
    model = Model()
    adder(model, "one", np.zeros(1, np.float32))
    two = adder(model, "two", np.zeros(1, np.float32))
    two.op(Op.RSQRT, [two.inputs["x"]], (1,))
    two.op(Op.ADD, [two.inputs["x"]] * 2, (1,), version=2)
    assert model.operators() == {"ADD": 3, "RSQRT": 1}


def test_equal_constants_share_one_buffer_over_all_signatures():
    model = Model()
    weights = np.arange(12, dtype=np.float32)
    adder(model, "one", weights)
    adder(model, "two", weights.copy())
    adder(model, "three", weights.reshape(3, 4))
    adder(model, "four", weights + 1)
    content = content_of(model.to_bytes())
    buffers = [
        next(t.buffer for t in graph.tensors if t.buffer) for graph in content.subgraphs
    ]
    assert buffers[0] == buffers[1] == buffers[2] != buffers[3]
    assert [tuple(graph.tensors[1].shape) for graph in content.subgraphs] == [
        (12,),
        (12,),
        (3, 4),
        (12,),
    ]
    data = bytes(model.to_bytes())
    assert data.count(weights.tobytes()) == 1
    assert len(content.buffers) == 3  # buffer 0 is empty, as the format wants it
    assert content.buffers[0].data is None


def test_equal_bytes_of_another_type_or_quantisation_are_another_tensor():
    model = Model()
    subgraph = model.subgraph("main")
    zeros = np.zeros(4, np.float32)
    quant = params_of(0.5)
    integers = np.zeros(16, np.int8)
    tensors = [
        subgraph.constant(zeros),
        subgraph.constant(zeros.view(np.int32)),
        subgraph.constant(integers),
        subgraph.constant(integers, quant),
        subgraph.constant(integers, params_of(0.25)),
    ]
    assert len({tensor.index for tensor in tensors}) == 5
    assert subgraph.constant(integers, quant) is tensors[3]
    content = content_of(model.to_bytes())
    assert len({tensor.buffer for tensor in content.subgraphs[0].tensors}) == 1


def test_a_quantisation_is_stored_once():
    model = Model()
    quant = QuantParams(
        np.linspace(1, 2, 500, dtype=np.float32), np.zeros(500, np.int64)
    )
    weights = np.zeros((500, 4), np.int8)
    for name in ("one", "two"):
        subgraph = model.subgraph(name)
        subgraph.constant(weights, quant)
        subgraph.input("x", (500, 1), Type.INT8, quant)
    data = bytes(model.to_bytes())
    assert data.count(quant.scales.tobytes()) == 1
    places = set()
    for index in range(2):
        subgraph = raw(data).Subgraphs(index)
        for number in range(subgraph.TensorsLength()):
            places.add(subgraph.Tensors(number).Quantization()._tab.Pos)
    assert len(places) == 1


@pytest.mark.parametrize("lengths", [(1, 3, 5, 7, 11), (64, 1, 63), (4096, 17)])
def test_buffers_are_aligned(lengths):
    model = Model()
    generator = np.random.default_rng(0)
    subgraph = model.subgraph("main")
    for length in lengths:
        subgraph.constant(generator.integers(0, 100, length).astype(np.int8))
    model.add_metadata("note", b"abc")
    data = bytes(model.to_bytes())
    found = 0
    for index in range(raw(data).BuffersLength()):
        table = raw(data).Buffers(index)._tab
        place = table.Offset(4)
        if place:
            assert table.Vector(place) % tflite_writer._ALIGNMENT == 0
            found += 1
    assert found == len(lengths) + 1
    assert tflite_writer._ALIGNMENT % 16 == 0


def test_metadata_is_stored_as_it_is():
    model = Model()
    model.add_metadata("one", b"first")
    model.add_metadata("two", b"first")
    content = content_of(model.to_bytes())
    assert [entry.name for entry in content.metadata] == [b"one", b"two"]
    for entry in content.metadata:
        assert bytes(content.buffers[entry.buffer].data) == b"first"


def test_more_than_two_gigabytes_are_refused(monkeypatch):
    model = Model()
    adder(model, "main", np.zeros(1000, np.float32))
    assert len(model.to_bytes()) > 4000
    monkeypatch.setattr(tflite_writer, "_LARGEST_BYTES", 4000)
    with pytest.raises(InputError, match=r"at most 2 GB\. Received: .* dynamic_int8"):
        model.to_bytes()


def test_the_same_calls_write_the_same_bytes():
    def write():
        model = Model()
        adder(model, "main", np.arange(9, dtype=np.float32))
        return model.to_bytes()

    assert write() == write()


# Measured: 1.0 KB per block and signature in real numbers, 1.6 KB in integers.
@pytest.mark.parametrize(("mode", "most_bytes"), [("float32", 1100), ("int8", 1700)])
def test_another_signature_costs_few_bytes(model, representative, mode, most_bytes):
    from gpt_tf.quantization.calibration import calibrate

    constants = constants_of(model, mode, calibrate(model, representative))

    def size(lengths):
        written = Model()
        for length in lengths:
            graph.build(written, constants, "prefill", length, 40)
        return len(written.to_bytes())

    few, many = size(range(2, 4)), size(range(2, 24))
    assert (many - few) / 20 <= most_bytes * model.num_layers
    assert many - few > 0


def test_every_signature_of_the_contract_has_its_own_subgraph(model):
    constants = constants_of(model, "float32")
    written = Model()
    graph.build(written, constants, "decode", 1, 40)
    graph.build(written, constants, "prefill", 8, 40)
    graph.build(written, constants, "score", 8, 40)
    names = [subgraph.signature for subgraph in written.subgraphs]
    assert names == [signatures.DECODE, "prefill_8", "score_8"]
    content = content_of(written.to_bytes())
    assert [g.name.decode() for g in content.subgraphs] == names
