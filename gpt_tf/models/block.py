"""The transformer block, once: a pure function of weights, inputs, a cache and hooks.

The block layer calls it for training and for cached decoding, a pipeline runs those
layers, and a mesh calls it with products of its own. Export describes the same block in
another language, in `gpt_tf.export.graph`.
The names and shapes of the weights are those of `gpt_tf.models.sizes.block_shapes`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import tensorflow as tf

from gpt_tf.models import ops
from gpt_tf.models.sizes import turns_heads

# Tensors that may be quantised, calibrated and observed, in the order of the data.
ACTIVATIONS = (
    "attention_norm_activation",  # what the QKV product reads
    "qkv_activation",  # what it writes; the cache holds a part of it
    "query_activation",  # normalised and turned, if a form does that
    "key_activation",  # likewise; the cache holds these
    "scores_activation",  # scaled, before mask and softmax
    "probabilities_activation",  # after softmax
    "context_activation",  # what the output product reads
    "attended_activation",  # what it writes, before the residual
    "attention_residual_activation",
    "feedforward_norm_activation",  # what the up product reads
    "up_activation",  # what it writes, before GELU or the like
    "hidden_activation",  # after it, what the down product reads
    "down_activation",  # what it writes, before the residual
    "feedforward_residual_activation",
)
_OF_TURNED_HEADS = ("query_activation", "key_activation")


def activations_of(form: Mapping) -> tuple[str, ...]:
    """Return those of `ACTIVATIONS` that a block of a form has."""
    if turns_heads(form):
        return ACTIVATIONS
    return tuple(name for name in ACTIVATIONS if name not in _OF_TURNED_HEADS)


class Cache(NamedTuple):
    """Keys and values of earlier positions, and where the new ones go.

    Attributes:
        keys: `(B, G, S, D)`.
        values: `(B, G, S, D)`.
        position: `()` int32, the first cache row that is written.
        mask: bool, broadcastable to `(B, 1, T, S)`: where a position may be seen.
        positions: `(B, T)` int32, of the tokens in their text; rotary ones need them.
    """

    keys: tf.Tensor
    values: tf.Tensor
    position: tf.Tensor
    mask: tf.Tensor
    positions: tf.Tensor | None = None


@tf.autograph.experimental.do_not_convert  # nothing in it depends on a tensor's value
def transformer_block(
    x: tf.Tensor,
    weights: Mapping[str, tf.Tensor],
    *,
    num_heads: int,
    form: Mapping,
    hooks: Mapping[str, Callable],
    cache: Cache | None = None,
    products: Callable | None = None,
):
    """Compute causal self-attention and the feed-forward part, each with a residual.

    GPT-2's block, or what a form makes of it.

    Args:
        x: `(B, T, C)`.
        weights: By their names.
        num_heads: `H`.
        form: What `gpt_tf.models.sizes.NORM` and `BLOCK` name.
        hooks: Functions of a tensor by the name of what they are applied to; a tensor
            without a hook stays as it is. The names are `ACTIVATIONS`, and
            `"attention_dropout"` and `"feedforward_dropout"`, on what is added to the
            residual.
        cache: What attention sees besides; None: the positions of `x` alone.
        products: Makes what computes the products; `Products` unless given.

    Returns:
        `(B, T, C)`, or with a cache a list of it and of the updated keys and values.

    Reference: GPT-2's block, as in Radford et al. (2019), section 2.3. Rotary
    positions: Su et al., "RoFormer", arXiv:2104.09864; grouped queries: Ainslie et al.,
    arXiv:2305.13245; SwiGLU: Shazeer, arXiv:2002.05202; the parallel residual: Wang and
    Komatsuzaki, GPT-J.
    """

    def hooked(name, tensor):
        return hooks[name](tensor) if name in hooks else tensor

    axes = known_shape(x)
    products = (products or Products)(weights, num_heads, axes)
    dense = products.dense
    x = source = products.begin(x)  # (B * T, C)

    normed = normalize(x, weights, "attention_norm_", form)
    qkv = dense("qkv", hooked("attention_norm_activation", normed))
    qkv = hooked("qkv_activation", qkv)
    query, key, value = products.split_heads(qkv)  # (B, H, T, D), twice (B, G, T, D)
    if form["query_key_norm"]:
        query = normalize(query, weights, "query_norm_", {**form, "norm": "rms"})
        key = normalize(key, weights, "key_norm_", {**form, "norm": "rms"})
    if form["positions"] == "rotary":
        positions = tf.range(axes[1]) if cache is None else cache.positions
        turn = ops.rotary(positions, form)
        query, key = turn(query), turn(key)
    query = hooked("query_activation", query)
    key = hooked("key_activation", key)
    observed = [
        hooks.get(name) for name in ("scores_activation", "probabilities_activation")
    ]
    if cache is None:
        context = ops.causal_attention(query, key, value, *observed)
    else:
        key = ops.write_rows(cache.keys, key, cache.position)  # (B, G, S, D)
        value = ops.write_rows(cache.values, value, cache.position)
        mask = tf.where(cache.mask, 0.0, ops.MASKED)
        context = ops.attention(query, key, value, mask, *observed)
    context = products.merge_heads(context)  # (B * T, H * D)
    attended = dense("output", hooked("context_activation", context))
    attended = hooked("attended_activation", attended)
    x += hooked("attention_dropout", attended)
    x = hooked("attention_residual_activation", x)

    read = source if form["parallel_residual"] else x
    normed = normalize(read, weights, "feedforward_norm_", form)
    up = dense("up", hooked("feedforward_norm_activation", normed))
    hidden = ops.ACTIVATIONS[form["activation"]](hooked("up_activation", up))
    output = dense("down", hooked("hidden_activation", hidden))
    output = hooked("down_activation", output)
    x += hooked("feedforward_dropout", output)
    x = hooked("feedforward_residual_activation", x)
    x = products.end(x)  # (B, T, C)
    return x if cache is None else [x, key, value]


class Products:
    """The block's products with weights, on one device: positions are rows.

    A mesh has others, which keep the axes that it divides apart.
    """

    def __init__(self, weights, num_heads, axes):
        self.weights, self.num_heads = weights, num_heads
        self.batch, self.length, self.width = axes

    def begin(self, x):
        return tf.reshape(x, [self.batch * self.length, self.width])

    def end(self, x):
        return tf.reshape(x, [self.batch, self.length, self.width])

    def dense(self, name, x):
        y = self.product(f"{name}_kernel", x)
        bias = self.weights.get(f"{name}_bias")
        return y if bias is None else y + bias

    def product(self, name, x):
        kernel = self.weights[name]
        rows, columns = kernel.shape
        return ops.project(x, kernel) if rows > columns else tf.matmul(x, kernel)

    def split_heads(self, qkv):
        inner = self.weights["output_kernel"].shape[0]
        head_dim = inner // self.num_heads
        if qkv.shape[-1] == 3 * inner:
            shape = [self.batch, self.length, 3, self.num_heads, head_dim]
            # (B, T, 3, H, D) -> each (B, H, T, D)
            return tf.unstack(tf.transpose(tf.reshape(qkv, shape), [2, 0, 3, 1, 4]))
        shared = (qkv.shape[-1] - inner) // 2
        pieces = tf.split(qkv, [inner, shared, shared], axis=-1)
        shape = [self.batch, self.length, -1, head_dim]
        return [tf.transpose(tf.reshape(x, shape), [0, 2, 1, 3]) for x in pieces]

    def merge_heads(self, context):
        width = self.num_heads * context.shape[-1]
        context = tf.transpose(context, [0, 2, 1, 3])  # -> (B, T, H, D)
        return tf.reshape(context, [self.batch * self.length, width])


def normalize(x, weights, prefix, form):
    """Normalise the last axis by the weights whose names begin with a prefix."""
    gamma = weights[f"{prefix}gamma"]
    if form["norm"] == "rms":
        return ops.rms_norm(x, gamma, form["epsilon"])
    return ops.layer_norm(x, gamma, weights.get(f"{prefix}beta"), form["epsilon"])


def known_shape(x):
    """Return the axes of a tensor, as integers where they are known."""
    if x.shape.is_fully_defined():
        return list(x.shape)
    axes = zip(x.shape, tf.unstack(tf.shape(x)), strict=True)
    return [axis if known is None else known for known, axis in axes]
