import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from gpt_tf.errors import InputError
from gpt_tf.export import types
from gpt_tf.export.tflite_writer import Model, Op, QuantParams, Type
from tests.export.runner import content_of

DTYPES = {
    np.dtype("float32"): Type.FLOAT32,
    np.dtype("float16"): Type.FLOAT16,
    np.dtype("int8"): Type.INT8,
    np.dtype("int32"): Type.INT32,
}


def test_types_are_numbered_as_in_the_schema():
    numbers = {name: n for name, n in vars(Type).items() if name.isupper()}
    assert numbers.items() <= vars(schema.TensorType).items()
    assert {DTYPES[np.dtype("int8")], numbers["INT4"]} == {9, 17}


def params_of(scale):
    return QuantParams(np.array([scale], "float32"), np.zeros(1, "int64"))


def adder(model, name, constant):
    """A signature that adds a constant."""
    subgraph = model.subgraph(name)
    x = subgraph.input("x", np.shape(constant))
    inputs = [x, subgraph.constant(constant)]
    y = subgraph.op(Op.ADD, inputs, x.shape, options=schema.AddOptionsT())
    subgraph.output("y", y)
    return subgraph


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def subgraph(model):
    return model.subgraph("main")


def buffer_bytes(content, tensor):
    return bytes(content.buffers[tensor.buffer].data)


def test_litert_runs_what_was_written(model):
    adder(model, "one", np.array([1.0, 2.0], np.float32))
    adder(model, "two", np.array([[3.0]], np.float32))
    data = bytes(model.to_bytes())
    assert data == bytes(model.to_bytes())
    interpreter = Interpreter(model_content=data)
    one, two = (interpreter.get_signature_runner(name) for name in ("one", "two"))
    assert one(x=np.array([10, 20], np.float32))["y"].tolist() == [11, 22]
    assert two(x=np.array([[10]], np.float32))["y"].tolist() == [[13]]


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
    subgraph.output("y", subgraph.constant(array.T))  # not contiguous
    content = content_of(model.to_bytes())
    (tensor,) = content.subgraphs[0].tensors
    assert tensor.type == DTYPES[array.dtype]
    assert tuple([] if tensor.shape is None else tensor.shape) == array.T.shape
    assert buffer_bytes(content, tensor) == array.T.tobytes()


def test_equal_constants_share_one_buffer_over_all_signatures(model):
    weights = np.arange(12, dtype=np.float32)
    for index, constant in enumerate(
        (weights, weights.copy(), weights.reshape(3, 4), weights + 1)
    ):
        adder(model, str(index), constant)
    data = bytes(model.to_bytes())
    content = content_of(data)
    tensors = [graph.tensors[1] for graph in content.subgraphs]
    buffers = [tensor.buffer for tensor in tensors]
    assert buffers[0] == buffers[1] == buffers[2] != buffers[3]
    shapes = [tuple(tensor.shape) for tensor in tensors]
    assert shapes == [(12,), (12,), (3, 4), (12,)]
    assert data.count(weights.tobytes()) == 1
    assert len(content.buffers) == 3  # buffer 0 is empty, as the format wants it
    assert content.buffers[0].data is None


def test_equal_bytes_of_another_type_or_quantisation_are_another_tensor(
    model, subgraph
):
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


def test_buffers_are_aligned(model, subgraph):
    generator, lengths = np.random.default_rng(0), (1, 3, 7, 11, 64, 63, 4096, 17)
    for length in lengths:
        subgraph.constant(generator.integers(0, 100, length).astype(np.int8))
    model.add_metadata("note", b"abc")
    root = schema.Model.GetRootAs(bytes(model.to_bytes()), 0)
    tables = [root.Buffers(index)._tab for index in range(root.BuffersLength())]
    places = [table.Vector(table.Offset(4)) for table in tables if table.Offset(4)]
    assert len(places) == len(lengths) + 1
    assert not any(place % 64 for place in places)


def test_more_than_two_gigabytes_are_refused(model, monkeypatch):
    adder(model, "main", np.zeros(1000, np.float32))
    assert len(model.to_bytes()) > 4000
    monkeypatch.setattr(types, "_LARGEST_BYTES", 4000)
    with pytest.raises(InputError, match="at most 2 GB"):
        model.to_bytes()
