"""One signature's graph, layer by layer, for every mode.

Everything follows the caches' capacity, the mask and nothing else, so a runtime may
resize them.
"""

from ai_edge_litert import schema_py_generated as schema

from gpt_tf.export import signatures
from gpt_tf.export.constants import Constants, per_tensor
from gpt_tf.export.operations import Operations
from gpt_tf.export.tflite_writer import Model, Op, Type

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


def build_all(model: Model, constants, capacity, prefill_lengths, score_lengths):
    """Add all signatures of a file to a model, in the order that files have.

    Args:
        model: The `tflite_writer.Model`.
        constants: The weights.
        capacity: `S`, rows of the caches.
        prefill_lengths: Tokens per call of each prefill.
        score_lengths: The same of each score.
    """
    build(model, constants, signatures.DECODE, 1, capacity)
    for length in prefill_lengths:
        build(model, constants, signatures.prefill(length), length, capacity)
    for length in score_lengths:
        build(model, constants, signatures.score(length), length, capacity)


def build(model: Model, constants: Constants, name: str, length: int, capacity: int):
    """Add the signature of a name to a model; `length` is `T`, `capacity` is `S`."""
    graph = _Graph(Operations(model.subgraph(name), constants), length, capacity)
    graph.build(wants_logits=not name.startswith("prefill"))


class _Graph:
    """Builds one signature; the methods follow the layers of `gpt_tf.models`."""

    def __init__(self, ops, length, capacity):
        self.ops = ops
        self.graph, self.constants = ops.graph, ops.constants
        self.length = length
        self.capacity = capacity
        sizes = self.constants.sizes
        self.heads, self.head_dim = sizes["num_heads"], sizes["head_dim"]

    def build(self, wants_logits):
        length, capacity = self.length, self.capacity
        num_layers = self.constants.sizes["num_layers"]
        tokens = self.graph.input(signatures.TOKENS, (1, length), Type.INT32)
        self.positions = self.graph.input(signatures.POSITIONS, (length,), Type.INT32)
        self.mask = self.graph.input(signatures.MASK, (1, 1, length, capacity))
        shape = (1, self.heads, capacity, self.head_dim)
        self.caches = {
            name: self.graph.input(name, shape, *self._cache_form(index))
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

    def _embed(self, tokens):
        ops, width = self.ops, self.constants.sizes["embedding_dim"]
        tokens = ops.reshape(tokens, (self.length,))
        rows = ops.lookup("embedding/token_table", tokens)
        rows = ops.add(rows, ops.lookup("embedding/position_table", self.positions))
        x = ops.reshape(rows, (1, self.length, width))
        return ops.at("embedding/embedding_activation", x)

    def _block(self, index, x, goes_on):
        ops, block = self.ops, f"block_{index}"
        normed = ops.norm(x, f"{block}/attention_norm_")
        normed = ops.at(f"{block}/attention_norm_activation", normed)
        query, key, value = self._query_key_value(block, normed, goes_on)
        keys = self._write_rows(signatures.key_cache(index), key)
        values = self._write_rows(signatures.value_cache(index), value)
        if not goes_on:
            return None
        context = self._attend(block, query, keys, values)
        attended = self._product(f"{block}/output", context, "attended")
        x = ops.add(x, attended, f"{block}/attention_residual_activation")
        normed = ops.norm(x, f"{block}/feedforward_norm_")
        normed = ops.at(f"{block}/feedforward_norm_activation", normed)
        up = self._product(f"{block}/up", normed, "up")
        hidden = ops.gelu(up, f"{block}/hidden_activation")
        down = self._product(f"{block}/down", hidden, "down")
        return ops.add(x, down, f"{block}/feedforward_residual_activation")

    def _product(self, name, x, activation):
        block = name.partition("/")[0]
        form = self.ops.form_of(f"{block}/{activation}_activation")
        return self.ops.product(name, x, *form)

    def _query_key_value(self, block, normed, wants_query):
        """Return query, key and value, each `(1, H, T, D)`."""
        if f"{block}/qkv_kernel" in self.constants.matrices:
            qkv = self._split_heads(self.ops.product(f"{block}/qkv", normed), 3)
            shape = (1, self.heads, self.length, self.head_dim)
            return self.graph.ops(
                Op.SPLIT,
                [self.ops.integers(1), qkv],
                [shape] * 3,
                qkv.type,
                options=schema.SplitOptionsT(numSplits=3),
            )
        return [
            self._split_heads(self._piece(block, name, normed), 1)
            if wants_query or name != "query"
            else None
            for name in ("query", "key", "value")
        ]

    def _piece(self, block, name, normed):
        kind, quant = self.ops.form_of(f"{block}/qkv_activation")
        if name == "query" and quant is not None:
            # Divided by the root of the head width, as its kernel is.
            quant = per_tensor(quant.scale / self.head_dim**0.5, quant.zero_point)
        return self.ops.product(f"{block}/{name}", normed, kind, quant)

    def _attend(self, block, query, keys, values):
        """`(1, H, T, D)` and caches `(1, H, S, D)` -> context `(1, T, H * D)`."""
        ops = self.ops
        shape = (1, self.heads, self.length, self.capacity)
        scores = ops.matmul(
            query, keys, shape, f"{block}/scores_activation", adjoint=True
        )
        shares = ops.softmax(ops.add(ops.real(scores), self.mask))
        shares = ops.at(f"{block}/probabilities_activation", shares)
        shape = (1, self.heads, self.length, self.head_dim)
        context = ops.matmul(shares, values, shape, f"{block}/context_activation")
        return ops.at(f"{block}/context_activation", self._join_heads(context))

    def _head(self, x):
        ops = self.ops
        normed = ops.at("final_norm/norm_activation", ops.norm(x, "final_norm/"))
        name = "head/kernel"
        if name not in self.constants.matrices:
            name = "embedding/token_table"
        form = ops.form_of("head/logits_activation")
        logits = ops.dense(normed, self.constants.matrices[name], None, *form)
        logits = ops.real(logits)
        if "head/mask" not in self.constants.vectors:
            return logits
        # Added to real numbers: no range has to reach that far.
        mask = self.graph.constant(self.constants.vectors["head/mask"])
        return ops.add(logits, mask)

    def _split_heads(self, x, parts):
        """`(1, T, parts * H * D)` -> `(1, parts * H, T, D)`."""
        heads = parts * self.heads
        if self.length == 1:
            return self.ops.reshape(x, (1, heads, 1, self.head_dim))
        x = self.ops.reshape(x, (1, self.length, heads, self.head_dim))
        return self.ops.swap_middle(x)

    def _join_heads(self, x):
        """`(1, H, T, D)` -> `(1, T, H * D)`."""
        if self.length > 1:
            x = self.ops.swap_middle(x)
        return self.ops.reshape(x, (1, self.length, self.heads * self.head_dim))

    def _first_row(self):
        """Return the place of the first token's row in a cache: `(0, 0, row, 0)`."""
        row, integers = self.positions, self.ops.integers
        if self.length > 1:
            inputs = [row, integers([0]), integers([1])]
            row = self.graph.op(Op.SLICE, inputs, (1,), options=schema.SliceOptionsT())
        pieces = [integers([0, 0]), row, integers([0])]
        options = schema.ConcatenationOptionsT()
        return self.graph.op(Op.CONCATENATION, pieces, (4,), options=options)

    def _write_rows(self, name, rows):
        """Write rows into a cache; return it, the output of that name."""
        cache = self.caches[name]
        if cache.quant is None:
            rows = self.ops.real(rows)
        written = self.graph.op(
            Op.DYNAMIC_UPDATE_SLICE,
            [cache, rows, self.start],
            cache.shape,
            cache.type,
            cache.quant,
        )
        self.graph.output(name, written)
        return written

    def _cache_form(self, index):
        if not self.constants.mode.full:
            return Type.FLOAT32, None
        return self.ops.form_of(f"block_{index}/qkv_activation")
