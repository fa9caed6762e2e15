"""Write a TFLite model as the flatbuffer that it is.

A subgraph is put together operation by operation, and what is written is what was
meant: one copy of the weights for all signatures, the token table shared by embedding
and head, scales per row. Constants with the same bytes share one buffer, and
quantisation parameters are stored once, over all subgraphs.

Reference: TensorFlow Lite's `schema.fbs`, version 3.
"""

import collections
import dataclasses
import hashlib

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from gpt_tf.export.types import QuantParams, Type, refuse_large

Op = schema.BuiltinOperator
_ALIGNMENT = 64


_NAMES = {v: k for k, v in vars(Op).items() if not k.startswith("_")}
_TYPES = {
    np.dtype(np.float32): Type.FLOAT32,
    np.dtype(np.float16): Type.FLOAT16,
    np.dtype(np.int8): Type.INT8,
    np.dtype(np.int32): Type.INT32,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of a subgraph: its place there, and what it holds."""

    index: int
    shape: tuple
    type: int  # a `TensorType`
    quant: QuantParams | None  # None for real numbers


class Model:
    """A model in the making: buffers, operator codes, subgraphs and signatures."""

    def __init__(self):
        self.subgraphs = []
        self.buffers = [np.empty(0, np.uint8)]
        self._buffer_of = {}
        self._known = {}  # by identity, with the array, so that no other takes its id
        self.codes = {}
        self.metadata = []

    def subgraph(self, signature: str) -> "Subgraph":
        """Begin the subgraph of a signature."""
        self.subgraphs.append(Subgraph(self, signature))
        return self.subgraphs[-1]

    def add_metadata(self, name: str, content: bytes) -> None:
        """Add a metadata entry; its bytes are stored as they are."""
        self.buffers.append(np.frombuffer(content, np.uint8))
        self.metadata.append((name, len(self.buffers) - 1))

    def operators(self) -> dict[str, int]:
        """Return how often each operator occurs, by name."""
        counts = collections.Counter(
            name for subgraph in self.subgraphs for name, _ in subgraph.results()
        )
        return dict(sorted(counts.items()))

    def buffer(self, array: np.ndarray) -> int:
        """Return the index of the buffer with these bytes."""
        # Every signature asks for the same weights; they are hashed once.
        if id(array) not in self._known:
            self._known[id(array)] = (array, self._buffer_with(array))
        return self._known[id(array)][1]

    def _buffer_with(self, array):
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        key = (data.nbytes, hashlib.sha256(data).digest())
        if key not in self._buffer_of:
            self._buffer_of[key] = len(self.buffers)
            self.buffers.append(data)
        return self._buffer_of[key]

    def code(self, operator: int, version: int) -> int:
        """Return the index of an operator code."""
        return self.codes.setdefault((operator, version), len(self.codes))

    def to_bytes(self) -> bytearray:
        """Return the file's content.

        Raises:
            InputError: It would be larger than a flatbuffer may be, 2 GB.
        """
        size = sum(len(data) + _ALIGNMENT for data in self.buffers)
        refuse_large(size)
        return _Packer(size + (8 << 20)).pack(self)


class Subgraph:
    """The graph of one signature."""

    def __init__(self, model: Model, signature: str):
        self.model = model
        self.signature = signature
        self.tensors = []
        self.operations = []
        self.inputs = {}
        self.outputs = {}
        self._constants = {}

    def input(self, name, shape, kind=Type.FLOAT32, quant=None) -> Tensor:
        """Add an input of the signature."""
        self.inputs[name] = self._tensor(shape, kind, quant, name=name)
        return self.inputs[name]

    def output(self, name, tensor: Tensor) -> None:
        """Make a tensor an output of the signature."""
        self.outputs[name] = tensor

    def constant(self, array, quant=None, kind=None, shape=None) -> Tensor:
        """Return the constant tensor of these values.

        Type and shape are those of the array unless given: int4 values come packed,
        two to a byte.
        """
        array = np.asarray(array)
        kind = _TYPES[array.dtype] if kind is None else kind
        shape = array.shape if shape is None else tuple(shape)
        buffer = self.model.buffer(array)
        key = (buffer, kind, shape, id(quant))
        if key not in self._constants:
            self._constants[key] = self._tensor(shape, kind, quant, buffer)
        return self._constants[key]

    def op(
        self, operator, inputs, shape, kind=None, quant=None, options=None, version=1
    ):
        """Add an operation with one output and return that.

        Args:
            operator: A `BuiltinOperator`.
            inputs: Tensors, or None for one that is left out.
            shape: The output's shape.
            kind: Its type; that of the first input unless given.
            quant: Its `QuantParams`, or None.
            options: The operator's options, an object of the schema, or None.
            version: The operator's.
        """
        return self.ops(operator, inputs, [shape], kind, quant, options, version)[0]

    def ops(
        self, operator, inputs, shapes, kind=None, quant=None, options=None, version=1
    ):
        """Add an operation with several outputs and return them."""
        kind = inputs[0].type if kind is None else kind
        outputs = [self._tensor(shape, kind, quant) for shape in shapes]
        code = self.model.code(operator, version)
        self.operations.append((code, inputs, outputs, options))
        return outputs

    def results(self):
        """Yield the name of each operation's operator, and its outputs."""
        codes = list(self.model.codes)
        for code, _, outputs, _ in self.operations:
            yield _NAMES[codes[code][0]], outputs

    def _tensor(self, shape, kind, quant, buffer=0, name=None):
        scales = None
        if quant is not None and quant.block_size is not None:
            scales = self.constant(quant.scales).index
        tensor = Tensor(len(self.tensors), tuple(map(int, shape)), kind, quant)
        self.tensors.append((tensor, buffer, name, scales))
        return tensor


class _Packer:
    """Turns a `Model` into bytes.

    What is equal is written once and pointed to: scales, tensors, options and whole
    operations. Signatures differ in few of them, so each costs little.
    """

    def __init__(self, initial_bytes):
        self.builder = flatbuffers.Builder(initial_bytes)
        self.written = {}

    def _once(self, key, write):
        """Return what was written under this key, and write it the first time."""
        if key not in self.written:
            self.written[key] = write()
        return self.written[key]

    def pack(self, model):
        metadata = [self._metadata(*entry) for entry in model.metadata]
        packed = {
            "Buffers": [self._buffer(data) for data in model.buffers],
            "OperatorCodes": [self._code(*code) for code in model.codes],
            "Subgraphs": [self._subgraph(graph) for graph in model.subgraphs],
            "SignatureDefs": [
                self._signature(index, graph)
                for index, graph in enumerate(model.subgraphs)
            ],
            "Metadata": metadata,
        }
        vectors = {
            name: self._offsets(getattr(schema, f"ModelStart{name}Vector"), offsets)
            for name, offsets in packed.items()
        }
        description = self._string("gpt_tf")
        builder = self.builder
        schema.ModelStart(builder)
        schema.ModelAddVersion(builder, 3)
        schema.ModelAddDescription(builder, description)
        for name, offset in vectors.items():
            getattr(schema, f"ModelAdd{name}")(builder, offset)
        builder.Finish(schema.ModelEnd(builder), file_identifier=b"TFL3")
        return bytearray(memoryview(builder.Bytes)[builder.head :])

    def _buffer(self, data):
        builder = self.builder
        vector = None
        if len(data):
            builder.StartVector(1, len(data), _ALIGNMENT)
            builder.head -= len(data)
            builder.Bytes[builder.head : builder.head + len(data)] = data.tobytes()
            vector = builder.EndVector()
        schema.BufferStart(builder)
        if vector is not None:
            schema.BufferAddData(builder, vector)
        return schema.BufferEnd(builder)

    def _code(self, operator, version):
        # Where old runtimes look for it, an operator has to fit into 7 bits.
        old = min(operator, Op.PLACEHOLDER_FOR_GREATER_OP_CODES)
        return schema.OperatorCodeT(
            deprecatedBuiltinCode=old, builtinCode=operator, version=version
        ).Pack(self.builder)

    def _metadata(self, name, buffer):
        text = self._string(name)
        schema.MetadataStart(self.builder)
        schema.MetadataAddName(self.builder, text)
        schema.MetadataAddBuffer(self.builder, buffer)
        return schema.MetadataEnd(self.builder)

    def _subgraph(self, graph):
        tensors = self._offsets(
            schema.SubGraphStartTensorsVector,
            [self._tensor(*entry) for entry in graph.tensors],
        )
        operations = self._offsets(
            schema.SubGraphStartOperatorsVector,
            [self._operation(*entry) for entry in graph.operations],
        )
        inputs = self._indices(graph.inputs)
        outputs = self._indices(graph.outputs)
        name = self._string(graph.signature)
        schema.SubGraphStart(self.builder)
        schema.SubGraphAddTensors(self.builder, tensors)
        schema.SubGraphAddInputs(self.builder, inputs)
        schema.SubGraphAddOutputs(self.builder, outputs)
        schema.SubGraphAddOperators(self.builder, operations)
        schema.SubGraphAddName(self.builder, name)
        return schema.SubGraphEnd(self.builder)

    def _tensor(self, tensor, buffer, name, scales_index):
        key = (tensor.shape, tensor.type, id(tensor.quant), buffer, name, scales_index)
        return self._once(
            key, lambda: self._new_tensor(tensor, buffer, name, scales_index)
        )

    def _new_tensor(self, tensor, buffer, name, scales_index):
        quant = tensor.quant
        if quant is not None:
            pack = self._affine if scales_index is None else self._blockwise
            key = (id(quant), scales_index)
            quant = self._once(key, lambda: pack(tensor.quant, scales_index))
        shape = self._vector(np.array(tensor.shape, np.int32))
        name = self._string(name or "")
        schema.TensorStart(self.builder)
        schema.TensorAddShape(self.builder, shape)
        schema.TensorAddType(self.builder, tensor.type)
        schema.TensorAddBuffer(self.builder, buffer)
        schema.TensorAddName(self.builder, name)
        if quant is not None:
            schema.TensorAddQuantization(self.builder, quant)
        schema.TensorAddHasRank(self.builder, True)
        return schema.TensorEnd(self.builder)

    def _affine(self, quant, _):
        scales = self._vector(quant.scales.astype(np.float32))
        zero_points = self._vector(quant.zero_points.astype(np.int64))
        schema.QuantizationParametersStart(self.builder)
        schema.QuantizationParametersAddScale(self.builder, scales)
        schema.QuantizationParametersAddZeroPoint(self.builder, zero_points)
        schema.QuantizationParametersAddQuantizedDimension(self.builder, quant.axis)
        return schema.QuantizationParametersEnd(self.builder)

    def _blockwise(self, quant, scales_index):
        details = schema.BlockwiseQuantizationT(scales_index, -1, quant.block_size)
        return schema.QuantizationParametersT(
            detailsType=schema.QuantizationDetails.BlockwiseQuantization,
            details=details,
            quantizedDimension=quant.axis,
        ).Pack(self.builder)

    def _operation(self, code, inputs, outputs, options):
        inputs = tuple(-1 if t is None else t.index for t in inputs)
        outputs = tuple(tensor.index for tensor in outputs)
        kind, options, content = self._options(options)

        def write():
            operands = [
                self._vector(np.array(indices, np.int32))
                for indices in (inputs, outputs)
            ]
            schema.OperatorStart(self.builder)
            schema.OperatorAddOpcodeIndex(self.builder, code)
            schema.OperatorAddInputs(self.builder, operands[0])
            schema.OperatorAddOutputs(self.builder, operands[1])
            if options is not None:
                schema.OperatorAddBuiltinOptionsType(self.builder, kind)
                schema.OperatorAddBuiltinOptions(self.builder, options)
            return schema.OperatorEnd(self.builder)

        return self._once((code, inputs, outputs, content), write)

    def _options(self, options):
        """Return kind, offset and content of an operation's options."""
        if options is None:
            return None, None, None
        # The object is called AddOptionsT, its kind in the union AddOptions.
        name = type(options).__name__[:-1]
        content = (name, repr(sorted(vars(options).items())))
        offset = self._once(content, lambda: options.Pack(self.builder))
        return getattr(schema.BuiltinOptions, name), offset, content

    def _signature(self, index, graph):
        inputs, outputs = (
            [schema.TensorMapT(name, tensor.index) for name, tensor in side.items()]
            for side in (graph.inputs, graph.outputs)
        )
        return schema.SignatureDefT(inputs, outputs, graph.signature, index).Pack(
            self.builder
        )

    def _vector(self, values):
        """Write a vector of numbers, once for all that ask for the same one."""
        key = (values.dtype.str, values.tobytes())
        return self._once(key, lambda: self.builder.CreateNumpyVector(values))

    def _indices(self, tensors):
        return self._vector(np.array([t.index for t in tensors.values()], np.int32))

    def _string(self, text):
        return self._once(text, lambda: self.builder.CreateString(text))

    def _offsets(self, start, offsets):
        start(self.builder, len(offsets))
        for offset in reversed(offsets):
            self.builder.PrependUOffsetTRelative(offset)
        return self.builder.EndVector()
