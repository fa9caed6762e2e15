"""The operations of a graph, in integers where the mode quantises their tensors.

Each is written once, in real numbers. Where its inputs and its output are all
quantised it is an integer operation; any other one gets its inputs dequantised. So a
mode is the set of activations that it quantises.
"""

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from gpt_tf.export.constants import INT4_BLOCK, offsets_of, per_tensor
from gpt_tf.export.tflite_writer import Op, Type

_PROBABILITIES = per_tensor(1 / 256, -128)

# Which activations a mode with static ranges quantises. The other modes, none.
_PRODUCTS = {
    "attention_norm_activation",
    "qkv_activation",
    "context_activation",
    "attended_activation",
    "feedforward_norm_activation",
    "up_activation",
    "hidden_activation",
    "down_activation",
}
_EVERYTHING = _PRODUCTS | {
    "embedding_activation",
    "query_activation",
    "key_activation",
    "scores_activation",
    "probabilities_activation",
    "attention_residual_activation",
    "feedforward_residual_activation",
    "norm_activation",
    "logits_activation",
}


class Operations:
    """Adds operations to the subgraph of one signature.

    Where an operation takes the name of an activation, that is its result's.

    Args:
        subgraph: A `tflite_writer.Subgraph`.
        constants: The weights, and how activations are quantised.
    """

    def __init__(self, subgraph, constants):
        self.graph, self.constants = subgraph, constants
        self._quantised = set()
        self._summed = None  # what `_block_sums` was last asked for, and its sums
        if constants.mode.activations is not None:
            self._quantised = _EVERYTHING if constants.mode.full else _PRODUCTS

    # Quantisation

    def form_of(self, activation):
        """Return an activation's type and `QuantParams`: float32 and None if real."""
        name = activation.rpartition("/")[2]
        if name not in self._quantised:
            return Type.FLOAT32, None
        if name == "probabilities_activation":
            return Type.INT8, _PROBABILITIES
        constants = self.constants
        return constants.integer_of(activation), constants.activation_params(activation)

    def at(self, activation, x):
        """Quantise a tensor as the mode has it, if it has."""
        kind, quant = self.form_of(activation)
        if quant is None or x.quant is quant:
            return x
        return self.quantize(x, kind, quant)

    def quantize(self, x, kind, quant):
        """Return a tensor as integers of a type."""
        version = 1 if kind == Type.INT8 else 2
        options = schema.QuantizeOptionsT()
        return self.graph.op(Op.QUANTIZE, [x], x.shape, kind, quant, options, version)

    def real(self, x):
        """Return a tensor as float32."""
        if x.type == Type.FLOAT32:
            return x
        options = schema.DequantizeOptionsT()
        version = {Type.INT8: 2, Type.INT16: 3, Type.FLOAT16: 3}[x.type]
        return self.graph.op(
            Op.DEQUANTIZE, [x], x.shape, Type.FLOAT32, None, options, version
        )

    def _widened(self, x, kind, quant):
        """Return a tensor as integers of a type, by `quant` if it was real."""
        if x.type == kind:
            return x
        if x.quant is not None:
            # From 8 to 16 bits: the same scale, finer by as many bits, is exact.
            quant = per_tensor(x.quant.scale / 128, 0)
        return self.quantize(x, kind, quant)

    # Products with weights

    def product(self, name, x, kind=Type.FLOAT32, quant=None):
        """Multiply by a kernel, and add its bias."""
        kernel, matrices = f"{name}_kernel", self.constants.matrices
        bias = self.constants.vectors.get(f"{name}_bias")
        y = self.dense(x, matrices[kernel], bias, kind, quant)
        if offsets_of(kernel) not in matrices:
            return y
        # A block's offset counts once for each of its inputs.
        offsets = self.dense(
            self._block_sums(x), matrices[offsets_of(kernel)], None, kind, quant
        )
        return self.add(y, offsets)

    def _block_sums(self, x):
        """`(1, T, C)` -> `(1, T, C / 32)`; what several products read, once."""
        if self._summed is None or self._summed[0] is not x:
            shape = (*x.shape[:-1], x.shape[-1] // INT4_BLOCK, INT4_BLOCK)
            self._summed = x, self.sum(self.reshape(x, shape), len(shape) - 1)
        return self._summed[1]

    def dense(self, x, matrix, bias, kind, quant):
        """Multiply by a matrix: in integers where both sides are quantised."""
        options = schema.FullyConnectedOptionsT(keepNumDims=True)
        shape = (*x.shape[:-1], matrix.shape[0])
        if x.quant is not None and quant is not None:
            options.quantizedBiasType = Type.INT32
            if bias is not None:
                bias = self.graph.constant(
                    *self.constants.integer_bias(bias, x.quant, matrix.quant)
                )
            inputs = [x, self._weights(matrix), bias]
            version = 5 if kind == Type.INT8 else 11
            return self.graph.op(
                Op.FULLY_CONNECTED, inputs, shape, kind, quant, options, version
            )
        options.asymmetricQuantizeInputs = matrix.kind in (Type.INT8, Type.INT4)
        version = 5
        if matrix.kind == Type.INT8:
            version = 12 if len(matrix.quant.scales) > 1 else 9
        elif matrix.kind == Type.INT4:
            version = 13  # older runtimes would take the blocks for something else
        inputs = [
            self.real(x),
            self._weights(matrix),
            None if bias is None else self.graph.constant(bias),
        ]
        y = self.graph.op(
            Op.FULLY_CONNECTED, inputs, shape, options=options, version=version
        )
        return y if quant is None else self.quantize(y, kind, quant)

    def _weights(self, matrix):
        tensor = self.graph.constant(
            matrix.values, matrix.quant, matrix.kind, matrix.shape
        )
        return self.real(tensor) if matrix.kind == Type.FLOAT16 else tensor

    def lookup(self, name, indices):
        """Return the rows of a table, `(T, C)` float32."""
        matrix = self.constants.matrices[name]
        shape = (*indices.shape, matrix.shape[1])
        if matrix.kind == Type.FLOAT16:
            inputs = [self.graph.constant(matrix.values), indices]
            options = schema.GatherOptionsT()
            return self.real(self.graph.op(Op.GATHER, inputs, shape, options=options))
        per_row = matrix.quant is not None and len(matrix.quant.scales) > 1
        inputs = [indices, self._weights(matrix)]
        version = 4 if per_row else 1
        return self.graph.op(
            Op.EMBEDDING_LOOKUP, inputs, shape, Type.FLOAT32, version=version
        )

    # Activations

    def add(self, a, b, activation=""):
        """Add; where the sum is quantised, in integers."""
        kind, quant = self.form_of(activation)
        if quant is None:
            inputs = [self.real(a), self.real(b)]
            return self.graph.op(Op.ADD, inputs, a.shape, options=schema.AddOptionsT())
        inputs = [self._widened(x, kind, quant) for x in (a, b)]
        # The sum of int16 with scales that are no powers of two.
        options = schema.AddOptionsT(potScaleInt16=False)
        version = 2 if kind == Type.INT8 else 3
        return self.graph.op(Op.ADD, inputs, a.shape, kind, quant, options, version)

    def multiply(self, a, b, shape=None):
        """Multiply real numbers; the result has the first one's shape unless given."""
        options = schema.MulOptionsT()
        return self.graph.op(Op.MUL, [a, b], shape or a.shape, options=options)

    def apart(self, x, shares):
        """`(1, T, C)` -> `(1, T, n, C)`, each row times all of `(n, C)` shares."""
        batch, length, width = x.shape
        shape = (batch, length, len(shares), width)
        x = self.reshape(x, (batch, length, 1, width))
        return self.multiply(x, self.graph.constant(shares), shape)

    def sum(self, x, axis):
        """Return real numbers added up over an axis, which goes."""
        shape = (*x.shape[:axis], *x.shape[axis + 1 :])
        inputs = [x, self.integers([axis])]
        options = schema.ReducerOptionsT(keepDims=False)
        return self.graph.op(Op.SUM, inputs, shape, options=options)

    def cast(self, x):
        """Return integers as real numbers."""
        options = schema.CastOptionsT(Type.INT32, Type.FLOAT32)
        return self.graph.op(Op.CAST, [x], x.shape, Type.FLOAT32, options=options)

    def wave(self, operator, positions, frequencies, shape):
        """Return the sine or cosine of positions times frequencies."""
        frequencies = self.graph.constant(np.asarray(frequencies, np.float32))
        angles = self.multiply(positions, frequencies, shape)
        return self.graph.op(operator, [angles], shape)

    def matmul(self, a, b, shape, activation, adjoint=False):
        """Multiply matrices, the second one transposed where `adjoint` says so."""
        options = schema.BatchMatMulOptionsT(adjY=adjoint)
        kind, quant = self.form_of(activation)
        if a.quant is not None and b.quant is not None and quant is not None:
            return self.graph.op(
                Op.BATCH_MATMUL, [a, b], shape, kind, quant, options, version=2
            )
        inputs = [self.real(a), self.real(b)]
        return self.graph.op(Op.BATCH_MATMUL, inputs, shape, options=options)

    def softmax(self, x):
        """Return the softmax over the last axis."""
        options = schema.SoftmaxOptionsT(beta=1.0)
        return self.graph.op(Op.SOFTMAX, [x], x.shape, options=options)

    def activate(self, x, function, activation):
        """Apply a feed-forward activation, one of `gpt_tf.models.ops.ACTIVATIONS`."""
        kind, quant = self.form_of(activation)
        options = schema.GeluOptionsT(approximate=function == "gelu_tanh")
        if function == "gelu_tanh" and quant is not None and self.constants.mode.full:
            return self.graph.op(Op.GELU, [x], x.shape, kind, quant, options, version=2)
        x = self.real(x)
        if function == "swiglu":
            width = x.shape[-1] // 2
            gate, up = self.columns(x, 0, width), self.columns(x, width, 2 * width)
            share = self.graph.op(Op.LOGISTIC, [gate], gate.shape)
            y = self.multiply(self.multiply(gate, share), up)
        elif function == "relu":
            y = self.graph.op(Op.RELU, [x], x.shape)
        else:
            y = self.graph.op(Op.GELU, [x], x.shape, options=options)
        return self.at(activation, y)

    def norm(self, x, prefix, kind=None):
        """Return the normalisation by weights of a prefix, `"rms"` or the model's."""
        x = self.real(x)
        sizes, vectors = self.constants.sizes, self.constants.vectors
        if (kind or sizes.get("norm")) != "rms":
            inputs, options = [x, self._mean(x)], schema.SubOptionsT()
            x = self.graph.op(Op.SUB, inputs, x.shape, options=options)
        variance = self._mean(self.multiply(x, x))
        epsilon = np.array([sizes["layer_norm_epsilon"]], np.float32)
        spread = self.add(variance, self.graph.constant(epsilon))
        inverse = self.graph.op(Op.RSQRT, [spread], spread.shape)
        normed = self.multiply(x, inverse)
        gamma, *beta = [
            self.graph.constant(vectors[f"{prefix}{part}"])
            for part in ("gamma", "beta")
            if f"{prefix}{part}" in vectors
        ]
        scaled = self.multiply(normed, gamma)
        return self.add(scaled, *beta) if beta else scaled

    def _mean(self, x):
        inputs = [x, self.integers([len(x.shape) - 1])]
        options = schema.ReducerOptionsT(keepDims=True)
        return self.graph.op(Op.MEAN, inputs, (*x.shape[:-1], 1), options=options)

    # Shapes

    def reshape(self, x, shape, free=None):
        """Return a tensor in another shape; axis `free` follows the caches'."""
        stated = [-1 if axis == free else size for axis, size in enumerate(shape)]
        options = schema.ReshapeOptionsT(newShape=stated)
        inputs = [x, self.integers(stated)]
        return self.graph.op(Op.RESHAPE, inputs, shape, x.type, x.quant, options)

    def columns(self, x, begin, end):
        """Return a part of the last axis."""
        others, count = len(x.shape) - 1, end - begin
        shape = (*x.shape[:-1], count)
        return self.slice(x, [0] * others + [begin], [-1] * others + [count], shape)

    def row(self, x, index):
        """`(1, T, C)` -> `(1, 1, C)`, the row of an index."""
        shape = (1, 1, x.shape[2])
        return self.slice(x, [0, index, 0], shape, shape)

    def slice(self, x, begin, size, shape):
        """Return a part of a tensor; a size of -1 is all that there is."""
        inputs = [x, self.integers(begin), self.integers(size)]
        options = schema.SliceOptionsT()
        return self.graph.op(Op.SLICE, inputs, shape, x.type, x.quant, options)

    def split(self, x, count, axis):
        """Return so many equal parts of a tensor along an axis."""
        shape = [*x.shape]
        shape[axis] //= count
        options = schema.SplitOptionsT(numSplits=count)
        inputs, shapes = [self.integers(axis), x], [tuple(shape)] * count
        return self.graph.ops(Op.SPLIT, inputs, shapes, x.type, options=options)

    def rows(self, x):
        """Return the parts of a tensor along its first axis, each of size 1."""
        count = x.shape[0]
        if count == 1:
            return [x]
        # XNNPACK splits into four at most.
        parts = 2 if count > 4 and count % 2 == 0 else count
        return [row for part in self.split(x, parts, 0) for row in self.rows(part)]

    def join(self, pieces, shape, axis=None):
        """Return pieces of one form side by side on an axis, the last unless given."""
        if len(pieces) == 1:
            return pieces[0]
        axis = len(shape) - 1 if axis is None else axis
        options = schema.ConcatenationOptionsT(axis=axis)
        kind, quant = pieces[0].type, pieces[0].quant
        return self.graph.op(Op.CONCATENATION, pieces, shape, kind, quant, options)

    def swap_middle(self, x):
        """`(a, b, c, d)` -> `(a, c, b, d)`."""
        inputs = [x, self.integers([0, 2, 1, 3])]
        shape = (x.shape[0], x.shape[2], x.shape[1], x.shape[3])
        options = schema.TransposeOptionsT()
        version = {Type.INT8: 2, Type.INT16: 5}.get(x.type, 1)
        return self.graph.op(
            Op.TRANSPOSE, inputs, shape, x.type, x.quant, options, version
        )

    def integers(self, values):
        """Return a constant of int32."""
        return self.graph.constant(np.array(values, np.int32))
