"""One signature's graph, layer by layer, for every mode.

Everything follows the caches' capacity, the mask and nothing else, so a runtime may
resize them.
"""

import itertools

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from gpt_tf.export import signatures
from gpt_tf.export.constants import Constants, per_tensor
from gpt_tf.export.operations import Operations
from gpt_tf.export.tflite_writer import Model, Op, Type
from gpt_tf.models.sizes import block_of, checked_form, rotary_frequencies, turns_heads
from gpt_tf.quantization.modes import Mode


def may_attend_by_row(sizes: dict, mode: Mode) -> bool:
    """Whether a model's caches are real, and each key is one query's.

    The queries that share a key fill a matrix product better than a single one.
    """
    heads = sizes["num_heads"]
    return not mode.full and checked_form(sizes, sizes)["num_kv_heads"] == heads


def build_all(model: Model, constants: Constants, facts: dict):
    """Add all signatures of a file to a model, in the order that files have.

    Args:
        model: The `tflite_writer.Model`.
        constants: The weights.
        facts: Those of the file: `capacity`, `prefill_lengths`, `score_lengths`, and
            `batch_sizes` and `attends_by_row`, which files of older versions do not
            have.
    """
    capacity, by_row = facts["capacity"], facts.get("attends_by_row", False)

    def add(name, length, by_row, wants_logits=True, kind=_Graph, rows=capacity):
        ops = Operations(model.subgraph(name), constants)
        kind(ops, length, rows, by_row).build(wants_logits)

    add(signatures.DECODE, 1, by_row)
    for length in facts["prefill_lengths"]:
        add(signatures.prefill(length), length, False, wants_logits=False)
    for length in facts["score_lengths"]:
        # Proposals are verified in the same arithmetic as tokens are decoded.
        is_short = length <= signatures.LONGEST_VERIFIED
        add(signatures.score(length), length, by_row and is_short)
    for size in facts.get("batch_sizes", ()):
        rows = min(capacity, signatures.BATCH_CAPACITY)
        add(signatures.decode_batch(size), size, by_row, kind=_BatchGraph, rows=rows)


class _Graph:
    """Builds one signature; the methods follow the layers of `gpt_tf.models`."""

    def __init__(self, ops, length, capacity, by_row):
        self.ops = ops
        self.graph, self.constants = ops.graph, ops.constants
        self.length = length
        self.capacity = capacity
        self.by_row = by_row
        sizes = self.constants.sizes
        self.form = sizes | block_of(sizes) | checked_form(sizes, sizes)
        self.heads, self.head_dim = sizes["num_heads"], sizes["head_dim"]
        self.kv_heads = self.form["num_kv_heads"]

    def build(self, wants_logits):
        num_layers = self.constants.sizes["num_layers"]
        tokens = self.graph.input(signatures.TOKENS, (1, self.length), Type.INT32)
        self.positions = self.graph.input(
            signatures.POSITIONS, (self.length,), Type.INT32
        )
        self._take_caches()
        x = self._embed(tokens)
        for index in range(num_layers):
            # The caches of the last block are written before its attention, which
            # a prefill therefore does without.
            x = self._block(index, x, wants_logits or index < num_layers - 1)
        if wants_logits:
            self.graph.output(signatures.LOGITS, self._head(x))

    def _take_caches(self, row=None):
        """Add mask and caches to the inputs, and what follows from the positions."""
        self.row = row
        name = signatures.of_row(signatures.MASK, row)
        self.mask = self.graph.input(name, (1, 1, self.length, self.capacity))
        if self.by_row:
            shape = (self.length, 1, self.capacity)
            self.masks = self.ops.rows(self.ops.reshape(self.mask, shape, free=2))
        shape = (1, self.kv_heads, self.capacity, self.head_dim)
        self.caches = {
            name: self.graph.input(
                signatures.of_row(name, row),
                shape,
                *self._cache_form(index, activation),
            )
            for index in range(self.constants.sizes["num_layers"])
            for name, activation in (
                (signatures.key_cache(index), self._key_activation),
                (signatures.value_cache(index), "qkv_activation"),
            )
        }
        self.start = self._first_row()
        if self.form["positions"] == "rotary":
            self.cos, self.sin = self._angles()

    def _embed(self, tokens):
        ops, width = self.ops, self.constants.sizes["embedding_dim"]
        tokens = ops.reshape(tokens, (self.length,))
        rows = ops.lookup("embedding/token_table", tokens)
        if self.form["positions"] == "learned":
            rows = ops.add(rows, ops.lookup("embedding/position_table", self.positions))
        x = ops.reshape(rows, (1, self.length, width))
        return ops.at("embedding/embedding_activation", x)

    def _block(self, index, x, goes_on):
        ops, block, source = self.ops, f"block_{index}", x
        normed = ops.norm(x, f"{block}/attention_norm_")
        normed = ops.at(f"{block}/attention_norm_activation", normed)
        context = self._context(index, self._projected(block, normed, goes_on), goes_on)
        if not goes_on:
            return None
        attended = self._product(f"{block}/output", context, "attended")
        x = ops.add(x, attended, f"{block}/attention_residual_activation")
        read = source if self.form["parallel_residual"] else x
        normed = ops.norm(read, f"{block}/feedforward_norm_")
        normed = ops.at(f"{block}/feedforward_norm_activation", normed)
        up = self._product(f"{block}/up", normed, "up")
        hidden = ops.activate(up, self.form["activation"], f"{block}/hidden_activation")
        down = self._product(f"{block}/down", hidden, "down")
        return ops.add(x, down, f"{block}/feedforward_residual_activation")

    def _product(self, name, x, activation):
        block = name.partition("/")[0]
        form = self.ops.form_of(f"{block}/{activation}_activation")
        return self.ops.product(name, x, *form)

    def _projected(self, block, normed, wants_query):
        """Yield query, key and value `(1, T, heads * D)`; in one tensor if stored so.

        A query that is not wanted is None.
        """
        if self._is_fused(block):
            yield self.ops.product(f"{block}/qkv", normed)
            return
        yield self._piece(block, "query", normed) if wants_query else None
        yield self._piece(block, "key", normed)
        yield self._piece(block, "value", normed)

    def _is_fused(self, block):
        return f"{block}/qkv_kernel" in self.constants.matrices

    def _context(self, index, projected, goes_on):
        """Write keys and values, and attend: context `(1, T, H * D)`, or None."""
        block = f"block_{index}"
        query, key, value = self._query_key_value(block, projected)
        query = self._turned(block, "query", query) if goes_on else None
        key = self._turned(block, "key", key)
        keys = self._write_rows(signatures.key_cache(index), key)
        values = self._write_rows(signatures.value_cache(index), value)
        return self._attend(block, query, keys, values) if goes_on else None

    def _query_key_value(self, block, projected):
        """Return query, key and value, each `(1, heads, T, D)`."""
        if self._is_fused(block):
            qkv = self._split_heads(*projected, 3 * self.heads)
            return self.ops.split(qkv, 3, axis=1)
        heads = self.heads, self.kv_heads, self.kv_heads
        return [
            None if one is None else self._split_heads(one, count)
            for one, count in zip(projected, heads, strict=True)
        ]

    def _piece(self, block, name, normed):
        kind, quant = self.ops.form_of(f"{block}/qkv_activation")
        if name == "query" and not self.form["query_key_norm"]:
            quant = self._divided(quant)
        return self.ops.product(f"{block}/{name}", normed, kind, quant)

    def _divided(self, quant):
        """Return a query's parameters by the root of the head width, as its weights."""
        if quant is None:
            return None
        return per_tensor(quant.scale / self.head_dim**0.5, quant.zero_point)

    @property
    def _key_activation(self):
        return "key_activation" if turns_heads(self.form) else "qkv_activation"

    def _angles(self):
        """Return cosines and signed sines of the positions, each `(1, 1, T, D)`."""
        ops, form = self.ops, self.form
        count, rest = form["rotary_dim"], self.head_dim - form["rotary_dim"]
        frequencies = rotary_frequencies(form)
        cosines = np.concatenate([frequencies, frequencies, np.zeros(rest)])
        sines = np.concatenate([-frequencies, frequencies, np.zeros(rest)])
        positions = ops.cast(ops.reshape(self.positions, (1, 1, self.length, 1)))
        shape = (1, 1, self.length, count + rest)
        return (
            ops.wave(Op.COS, positions, cosines, shape),
            ops.wave(Op.SIN, positions, sines, shape),
        )

    def _turned(self, block, name, x):
        """Normalise heads `(1, H, T, D)` and turn them by their positions."""
        ops = self.ops
        if not turns_heads(self.form):
            return x
        if self.form["query_key_norm"]:
            x = ops.norm(x, f"{block}/{name}_norm_", "rms")
        if self.form["positions"] == "rotary":
            x = ops.real(x)
            half = self.form["rotary_dim"] // 2
            ends = (0, half, 2 * half, self.head_dim)
            one, other, *rest = (
                ops.columns(x, begin, end)
                for begin, end in itertools.pairwise(ends)
                if begin < end
            )
            swapped = ops.join([other, one, *rest], x.shape)
            x = ops.add(
                ops.multiply(x, self.cos),
                ops.multiply(swapped, self.sin),
            )
        kind, quant = ops.form_of(f"{block}/{name}_activation")
        if quant is None:
            return x
        quant = self._divided(quant) if name == "query" else quant
        return ops.quantize(ops.real(x), kind, quant)

    def _attend(self, block, query, keys, values):
        """`(1, H, T, D)` and caches `(1, G, S, D)` -> context `(1, T, H * D)`."""
        attend = self._attend_by_row if self.by_row else self._attend_at_once
        context = attend(block, query, keys, values)
        return self.ops.at(f"{block}/context_activation", context)

    def _attend_by_row(self, block, query, keys, values):
        """Attend from each position by itself.

        A matrix product of LiteRT's packs all keys and values anew in each call. That
        takes longer than to multiply them by a single row, element by element.
        """
        ops, query = self.ops, self.ops.real(query)
        if self.length > 1:
            query = ops.swap_middle(query)
        query = ops.reshape(query, (self.length, self.heads, 1, self.head_dim))
        rows = zip(ops.rows(query), self.masks, strict=True)
        contexts = [self._attend_row(block, *row, keys, values) for row in rows]
        return ops.join(contexts, (1, self.length, self.heads * self.head_dim), axis=1)

    def _attend_row(self, block, query, mask, keys, values):
        """Attend from one position, `(1, H, 1, D)`: context `(1, 1, H * D)`."""
        ops = self.ops
        scores = ops.sum(ops.multiply(keys, query), 3)
        shares = ops.softmax(ops.add(scores, mask))
        shares = ops.at(f"{block}/probabilities_activation", shares)
        shares = ops.real(ops.reshape(shares, (*shares.shape, 1), free=2))
        context = ops.sum(ops.multiply(values, shares), 2)
        return ops.reshape(context, (1, 1, self.heads * self.head_dim))

    def _attend_at_once(self, block, query, keys, values):
        """Attend from all positions by matrix products."""
        ops, length = self.ops, self.length
        shared = self.heads // self.kv_heads
        rows = (1, self.kv_heads, shared * length)
        is_grouped = shared > 1
        if is_grouped:  # the queries that share a key are rows of one matrix
            query = ops.reshape(query, (*rows, self.head_dim))
        shape = (*rows, self.capacity)
        scores = ops.matmul(
            query, keys, shape, f"{block}/scores_activation", adjoint=True
        )
        scores = ops.real(scores)
        if is_grouped and length > 1:
            scores = ops.reshape(scores, (1, self.heads, length, self.capacity), free=3)
        shares = ops.softmax(ops.add(scores, self.mask))
        if is_grouped and length > 1:
            shares = ops.reshape(shares, shape, free=3)
        shares = ops.at(f"{block}/probabilities_activation", shares)
        shape = (*rows, self.head_dim)
        context = ops.matmul(shares, values, shape, f"{block}/context_activation")
        if is_grouped:
            context = ops.reshape(context, (1, self.heads, length, self.head_dim))
        return self._join_heads(context)

    def _head(self, x):
        ops = self.ops
        normed = ops.at("final_norm/norm_activation", ops.norm(x, "final_norm/"))
        name = "head/kernel"
        if name not in self.constants.matrices:
            name = "embedding/token_table"
        form = ops.form_of("head/logits_activation")
        outliers = self.constants.vectors.get("head/outliers")
        if outliers is not None:
            normed = ops.apart(normed, np.stack([outliers, 1 - outliers]))
        logits = ops.dense(normed, self.constants.matrices[name], None, *form)
        logits = ops.real(logits if outliers is None else ops.sum(logits, 2))
        if "head/mask" not in self.constants.vectors:
            return logits
        # Added to real numbers: no range has to reach that far.
        mask = self.graph.constant(self.constants.vectors["head/mask"])
        return ops.add(logits, mask)

    def _split_heads(self, x, heads):
        """`(1, T, heads * D)` -> `(1, heads, T, D)`."""
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
            row = self.ops.slice(row, [0], [1], (1,))
        pieces = [integers([0, 0]), row, integers([0])]
        options = schema.ConcatenationOptionsT()
        return self.graph.op(Op.CONCATENATION, pieces, (4,), options=options)

    def _write_rows(self, name, rows):
        """Write rows into a cache; return it, the output of its name."""
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
        self.graph.output(signatures.of_row(name, self.row), written)
        return written

    def _cache_form(self, index, activation):
        if not self.constants.mode.full:
            return Type.FLOAT32, None
        return self.ops.form_of(f"block_{index}/{activation}")


class _BatchGraph(_Graph):
    """Builds `decode_batch`: a token of each of several texts, with a cache a text.

    The texts are positions of one call for all products with weights, which are so
    read once. Each attends by itself.
    """

    def _take_caches(self, row=None):
        self.texts = []
        for row in range(self.length):
            text = _Graph(self.ops, 1, self.capacity, self.by_row)
            text.positions = self.ops.slice(self.positions, [row], [1], (1,))
            text._take_caches(row)
            self.texts.append(text)

    def _context(self, index, projected, goes_on):
        projected = list(projected)
        contexts = [
            text._context(index, [self.ops.row(x, row) for x in projected], goes_on)
            for row, text in enumerate(self.texts)
        ]
        shape = (1, self.length, self.heads * self.head_dim)
        return self.ops.join(contexts, shape, axis=1)
