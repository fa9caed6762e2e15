"""One signature's graph, operation by operation, for every mode.

The graph is written once, in real numbers. Where the mode has static parameters for an
activation, `_Graph.at` quantises the tensor; an operation whose inputs and output are
all quantised is then an integer operation, and any other one gets its inputs
dequantised. So a mode is the set of activations that it quantises.

Everything follows the caches' capacity, the mask and nothing else, so a runtime may
resize them.
"""

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from gpt_tf.export import signatures
from gpt_tf.export.constants import Constants, Matrix, per_tensor
from gpt_tf.export.tflite_writer import Model, Op, Tensor, Type

# The operations on real numbers that are left in the mode `int8_full`: the embedding's
# rows and the normalisations, which need more than 8 bits, mask and softmax, and the
# conversions around them.
FLOAT_ISLANDS = (
    "ADD",
    "DEQUANTIZE",
    "EMBEDDING_LOOKUP",
    "MEAN",
    "MUL",
    "RESHAPE",
    "RSQRT",
    "SOFTMAX",
    "SUB",
)

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
    "scores_activation",
    "probabilities_activation",
    "attention_residual_activation",
    "feedforward_residual_activation",
    "norm_activation",
    "logits_activation",
}


def build_all(model: Model, constants, capacity, prefill_lengths, score_lengths):
    """Add all signatures of a file to a model, in the order that files have.

    Args:
        model: The `flatbuffer.Model`.
        constants: The weights.
        capacity: `S`, rows of the caches.
        prefill_lengths: Tokens per call of each prefill.
        score_lengths: The same of each score.
    """
    build(model, constants, "decode", 1, capacity)
    for length in prefill_lengths:
        build(model, constants, "prefill", length, capacity)
    for length in score_lengths:
        build(model, constants, "score", length, capacity)


def build(model: Model, constants: Constants, kind: str, length: int, capacity: int):
    """Add a signature to a model.

    Args:
        model: The `flatbuffer.Model`.
        constants: The weights.
        kind: `"decode"`, `"prefill"` or `"score"`.
        length: `T`, tokens per call; 1 for `decode`.
        capacity: `S`, rows of the caches.
    """
    names = {
        "decode": signatures.DECODE,
        "prefill": signatures.prefill(length),
        "score": signatures.score(length),
    }
    graph = _Graph(model.subgraph(names[kind]), constants, length, capacity)
    graph.build(wants_logits=kind != "prefill")


class _Graph:
    """Builds one signature; the methods follow the layers of `gpt_tf.models`."""

    def __init__(self, subgraph, constants, length, capacity):
        self.graph = subgraph
        self.constants = constants
        self.length = length
        self.capacity = capacity
        sizes = constants.sizes
        self.heads, self.head_dim = sizes["num_heads"], sizes["head_dim"]
        self.epsilon = np.array([sizes["layer_norm_epsilon"]], np.float32)
        mode = constants.mode
        self.fixed = set()
        if mode.activations is not None:
            self.fixed = _EVERYTHING if mode.full else _PRODUCTS

    def build(self, wants_logits):
        length, capacity = self.length, self.capacity
        num_layers = self.constants.sizes["num_layers"]
        tokens = self.graph.input(signatures.TOKENS, (1, length), Type.INT32)
        self.positions = self.graph.input(signatures.POSITIONS, (length,), Type.INT32)
        self.mask = self.graph.input(signatures.MASK, (1, 1, length, capacity))
        shape = (1, self.heads, capacity, self.head_dim)
        self.caches = {
            name: self.graph.input(name, shape, *self._cache_kind(index))
            for index in range(num_layers)
            for name in (signatures.key_cache(index), signatures.value_cache(index))
        }
        self.start = self._first_row()
        x = self._embed(tokens)
        for index in range(num_layers):
            # The caches of the last block are written before its attention, which
            # a prefill therefore does without.
            x = self._block(index, x, wants_logits or index < num_layers - 1)
        if wants_logits:
            self.graph.output(signatures.LOGITS, self._head(x))

    # Layers

    def _embed(self, tokens):
        width = self.constants.sizes["embedding_dim"]
        tokens = self._reshape(tokens, (self.length,))
        rows = self._lookup("embedding/token_table", tokens, width)
        places = self._lookup("embedding/position_table", self.positions, width)
        x = self._reshape(self._add(rows, places), (1, self.length, width))
        return self.at("embedding/embedding_activation", x)

    def _block(self, index, x, goes_on):
        block = f"block_{index}"
        normal = self.at(
            f"{block}/attention_norm_activation",
            self._norm(x, f"{block}/attention_norm_"),
        )
        query, key, value = self._query_key_value(block, normal, goes_on)
        names = signatures.key_cache(index), signatures.value_cache(index)
        keys = self._write_rows(self.caches[names[0]], key)
        values = self._write_rows(self.caches[names[1]], value)
        self.graph.output(names[0], keys)
        self.graph.output(names[1], values)
        if not goes_on:
            return None
        context = self._attend(block, query, keys, values)
        attended = self._product(
            f"{block}/output", context, *self._fixed(f"{block}/attended_activation")
        )
        x = self._add(x, attended, f"{block}/attention_residual_activation")
        normal = self.at(
            f"{block}/feedforward_norm_activation",
            self._norm(x, f"{block}/feedforward_norm_"),
        )
        up = self._product(
            f"{block}/up", normal, *self._fixed(f"{block}/up_activation")
        )
        hidden = self._gelu(up, f"{block}/hidden_activation")
        down = self._product(
            f"{block}/down", hidden, *self._fixed(f"{block}/down_activation")
        )
        return self._add(x, down, f"{block}/feedforward_residual_activation")

    def _query_key_value(self, block, normal, wants_query):
        """Return query, key and value, each `(1, H, T, D)`."""
        if f"{block}/qkv_kernel" in self.constants.matrices:
            qkv = self._split_heads(self._product(f"{block}/qkv", normal), 3)
            options = schema.SplitOptionsT()
            options.numSplits = 3
            shape = (1, self.heads, self.length, self.head_dim)
            axis = self.graph.constant(np.array(1, np.int32))
            return self.graph.ops(
                Op.SPLIT, [axis, qkv], [shape] * 3, qkv.type, None, options
            )
        return [
            self._split_heads(self._piece(block, name, normal), 1)
            if wants_query or name != "query"
            else None
            for name in ("query", "key", "value")
        ]

    def _piece(self, block, name, normal):
        kind, quant = self._fixed(f"{block}/qkv_activation")
        if name == "query" and quant is not None:
            # Divided by the root of the head width, as its kernel is.
            quant = per_tensor(quant.scale / self.head_dim**0.5, quant.zero_point)
        return self._product(f"{block}/{name}", normal, kind, quant)

    def _attend(self, block, query, keys, values):
        """`(1, H, T, D)` and caches `(1, H, S, D)` -> context `(1, T, H * D)`."""
        shape = (1, self.heads, self.length, self.capacity)
        scores = self._matmul(
            query, keys, shape, f"{block}/scores_activation", adjoint=True
        )
        scores = self._add(self._real(scores), self.mask)
        options = schema.SoftmaxOptionsT()
        options.beta = 1.0
        shares = self.graph.op(Op.SOFTMAX, [scores], shape, options=options)
        shares = self.at(f"{block}/probabilities_activation", shares)
        shape = (1, self.heads, self.length, self.head_dim)
        context = self._matmul(shares, values, shape, f"{block}/context_activation")
        return self.at(f"{block}/context_activation", self._join_heads(context))

    def _head(self, x):
        normal = self.at("final_norm/norm_activation", self._norm(x, "final_norm/"))
        name = "head/kernel"
        if name not in self.constants.matrices:
            name = "embedding/token_table"
        matrix = self.constants.matrices[name]
        kind, quant = self._fixed("head/logits_activation")
        logits = self._real(self._dense(normal, matrix, None, kind, quant))
        if "head/mask" not in self.constants.vectors:
            return logits
        # Added to real numbers: no range has to reach that far.
        mask = self.graph.constant(self.constants.vectors["head/mask"])
        return self._add(logits, mask)

    # Quantisation

    def at(self, name, tensor):
        """Quantise a tensor as the mode has it, if it has."""
        kind, quant = self._fixed(name)
        if quant is None or tensor.quant is quant:
            return tensor
        return self._quantize(tensor, kind, quant)

    def _fixed(self, name):
        activation = name.rpartition("/")[2]
        if activation not in self.fixed:
            return Type.FLOAT32, None
        if activation == "probabilities_activation":
            return Type.INT8, _PROBABILITIES
        return (
            self.constants.integer_of(name),
            self.constants.activation_params(name),
        )

    def _quantize(self, tensor, kind, quant):
        version = 1 if kind == Type.INT8 else 2
        return self.graph.op(
            Op.QUANTIZE,
            [tensor],
            tensor.shape,
            kind,
            quant,
            schema.QuantizeOptionsT(),
            version,
        )

    def _real(self, tensor):
        if tensor.type == Type.FLOAT32:
            return tensor
        options = schema.DequantizeOptionsT()
        version = {Type.INT8: 2, Type.INT16: 3, Type.FLOAT16: 3}[tensor.type]
        return self.graph.op(
            Op.DEQUANTIZE, [tensor], tensor.shape, Type.FLOAT32, None, options, version
        )

    # Operations

    def _product(self, name, x, kind=Type.FLOAT32, quant=None):
        matrix = self.constants.matrices[f"{name}_kernel"]
        bias = self.constants.vectors[f"{name}_bias"]
        return self._dense(x, matrix, bias, kind, quant)

    def _dense(self, x, matrix, bias, kind, quant):
        """Multiply by a matrix: in integers where both sides are quantised."""
        if x.quant is not None and quant is not None:
            return self._integer_dense(x, matrix, bias, kind, quant)
        options = _dense_options()
        options.asymmetricQuantizeInputs = matrix.kind in (Type.INT8, Type.INT4)
        version = 5
        if matrix.kind == Type.INT8:
            version = 12 if len(matrix.quant.scales) > 1 else 9
        elif matrix.kind == Type.INT4:
            version = 13  # older runtimes would take the blocks for something else
        inputs = [
            self._real(x),
            self._matrix(matrix),
            None if bias is None else self.graph.constant(bias),
        ]
        shape = (*x.shape[:-1], matrix.shape[0])
        y = self.graph.op(
            Op.FULLY_CONNECTED, inputs, shape, options=options, version=version
        )
        return y if quant is None else self._quantize(y, kind, quant)

    def _integer_dense(self, x, matrix, bias, kind, quant):
        options = _dense_options()
        options.quantizedBiasType = Type.INT32
        version = 5 if kind == Type.INT8 else 11
        if bias is not None:
            bias = self.graph.constant(
                *self.constants.integer_bias(bias, x.quant, matrix.quant)
            )
        shape = (*x.shape[:-1], matrix.shape[0])
        inputs = [x, self._matrix(matrix), bias]
        return self.graph.op(
            Op.FULLY_CONNECTED, inputs, shape, kind, quant, options, version
        )

    def _matrix(self, matrix: Matrix) -> Tensor:
        tensor = self.graph.constant(
            matrix.values, matrix.quant, matrix.kind, matrix.shape
        )
        return self._real(tensor) if matrix.kind == Type.FLOAT16 else tensor

    def _lookup(self, name, indices, width):
        matrix = self.constants.matrices[name]
        shape = (self.length, width)
        if matrix.kind == Type.FLOAT16:
            table = self.graph.constant(matrix.values)
            options = schema.GatherOptionsT()
            rows = self.graph.op(Op.GATHER, [table, indices], shape, options=options)
            return self._real(rows)
        per_row = matrix.quant is not None and len(matrix.quant.scales) > 1
        return self.graph.op(
            Op.EMBEDDING_LOOKUP,
            [indices, self._matrix(matrix)],
            shape,
            Type.FLOAT32,
            version=4 if per_row else 1,
        )

    def _norm(self, x, prefix):
        x = self._real(x)
        centred = self._binary(Op.SUB, schema.SubOptionsT(), x, self._mean(x))
        variance = self._mean(self._multiply(centred, centred))
        epsilon = self.graph.constant(self.epsilon)
        spread = self._add(variance, epsilon)
        inverse = self.graph.op(Op.RSQRT, [spread], spread.shape)
        normal = self._multiply(centred, inverse)
        gamma, beta = (
            self.graph.constant(self.constants.vectors[f"{prefix}{part}"])
            for part in ("gamma", "beta")
        )
        return self._add(self._multiply(normal, gamma), beta)

    def _mean(self, x):
        options = schema.ReducerOptionsT()
        options.keepDims = True
        axis = self._integers([len(x.shape) - 1])
        return self.graph.op(Op.MEAN, [x, axis], (*x.shape[:-1], 1), options=options)

    def _multiply(self, a, b):
        return self._binary(Op.MUL, schema.MulOptionsT(), a, b)

    def _add(self, a, b, activation=None):
        """Add; where the sum is quantised, in integers."""
        kind, quant = self._fixed(activation or "")
        if quant is None:
            return self._binary(
                Op.ADD, schema.AddOptionsT(), self._real(a), self._real(b)
            )
        a, b = (self._as(tensor, kind, quant) for tensor in (a, b))
        options = schema.AddOptionsT()
        # The sum of int16 with scales that are no powers of two.
        options.potScaleInt16 = False
        version = 2 if kind == Type.INT8 else 3
        return self.graph.op(Op.ADD, [a, b], a.shape, kind, quant, options, version)

    def _as(self, tensor, kind, quant):
        """Return a tensor as integers of a type, by `quant` if it was real."""
        if tensor.type == kind:
            return tensor
        if tensor.quant is not None:
            # From 8 to 16 bits: the same scale, finer by as many bits, is exact.
            quant = per_tensor(tensor.quant.scale / 128, 0)
        return self._quantize(tensor, kind, quant)

    def _binary(self, operator, options, a, b):
        return self.graph.op(operator, [a, b], a.shape, options=options)

    def _gelu(self, x, activation):
        kind, quant = self._fixed(activation)
        options = schema.GeluOptionsT()
        options.approximate = True
        if quant is not None and self.constants.mode.full:
            return self.graph.op(Op.GELU, [x], x.shape, kind, quant, options, version=2)
        x = self._real(x)
        return self.at(
            activation, self.graph.op(Op.GELU, [x], x.shape, options=options)
        )

    def _matmul(self, a, b, shape, activation, adjoint=False):
        options = schema.BatchMatMulOptionsT()
        options.adjY = adjoint
        kind, quant = self._fixed(activation)
        if a.quant is not None and b.quant is not None and quant is not None:
            return self.graph.op(
                Op.BATCH_MATMUL, [a, b], shape, kind, quant, options, version=2
            )
        a, b = self._real(a), self._real(b)
        return self.graph.op(Op.BATCH_MATMUL, [a, b], shape, options=options)

    # Shapes and rows

    def _split_heads(self, x, parts):
        """`(1, T, parts * H * D)` -> `(1, parts * H, T, D)`."""
        heads = parts * self.heads
        if self.length == 1:
            return self._reshape(x, (1, heads, 1, self.head_dim))
        x = self._reshape(x, (1, self.length, heads, self.head_dim))
        return self._swap_middle(x)

    def _join_heads(self, x):
        """`(1, H, T, D)` -> `(1, T, H * D)`."""
        if self.length > 1:
            x = self._swap_middle(x)
        return self._reshape(x, (1, self.length, self.heads * self.head_dim))

    def _swap_middle(self, x):
        order = self._integers([0, 2, 1, 3])
        shape = (x.shape[0], x.shape[2], x.shape[1], x.shape[3])
        options = schema.TransposeOptionsT()
        version = {Type.INT8: 2, Type.INT16: 5}.get(x.type, 1)
        return self.graph.op(
            Op.TRANSPOSE, [x, order], shape, x.type, x.quant, options, version
        )

    def _reshape(self, x, shape):
        options = schema.ReshapeOptionsT()
        options.newShape = list(shape)
        return self.graph.op(
            Op.RESHAPE, [x, self._integers(shape)], shape, x.type, x.quant, options
        )

    def _first_row(self):
        """The place in a cache that takes the first token's row: `(0, 0, row, 0)`."""
        row = self.positions
        if self.length > 1:
            begin, size = self._integers([0]), self._integers([1])
            options = schema.SliceOptionsT()
            row = self.graph.op(Op.SLICE, [row, begin, size], (1,), options=options)
        options = schema.ConcatenationOptionsT()
        pieces = [self._integers([0, 0]), row, self._integers([0])]
        return self.graph.op(Op.CONCATENATION, pieces, (4,), options=options)

    def _write_rows(self, cache, rows):
        if cache.quant is None:
            rows = self._real(rows)
        return self.graph.op(
            Op.DYNAMIC_UPDATE_SLICE,
            [cache, rows, self.start],
            cache.shape,
            cache.type,
            cache.quant,
        )

    def _cache_kind(self, index):
        if not self.constants.mode.full:
            return Type.FLOAT32, None
        name = f"block_{index}/qkv_activation"
        return self.constants.integer_of(name), self.constants.activation_params(name)

    def _integers(self, values):
        return self.graph.constant(np.array(values, np.int32))


def _dense_options():
    options = schema.FullyConnectedOptionsT()
    options.keepNumDims = True
    return options
