"""The arithmetic of the model as plain functions of tensors.

Every function works eagerly, in a graph and under XLA, in float32 and in the
16-bit types: normalisation, softmax and the loss are always computed in float32.
"""

import contextlib
import contextvars
import functools
import math
import weakref

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from tensorflow.python.framework import ops

from gpt_tf.models.sizes import rotary_frequencies

MASKED = -1e9

_INSIDE_XLA = contextvars.ContextVar("inside_xla", default=False)


@contextlib.contextmanager
def inside_xla():
    """Say that what is traced in this block will be compiled by XLA."""
    token = _INSIDE_XLA.set(True)
    try:
        yield
    finally:
        _INSIDE_XLA.reset(token)


def keep(x):
    """Make XLA compute `x` once and store it.

    Left alone, XLA computes cheap values anew wherever they are used, and on a CPU
    that means reading whole chains of activations again. No effect outside XLA.
    """
    if _INSIDE_XLA.get():
        return gen_xla_ops.xla_optimization_barrier([x])[0]
    return x


def again(x, dy):
    """Return `x` so that XLA computes what follows from it anew, once it has `dy`.

    For gradients: what is cheap is then not stored between the forward and the backward
    pass. XLA cannot know that nothing is added to `x`, and ignores a barrier when it
    orders its work. No effect outside XLA.
    """
    if not _INSIDE_XLA.get():
        return x
    is_more = tf.reshape(dy, [-1])[0] > float("inf")  # which nothing is
    return x + tf.cast(is_more, x.dtype)


def custom_gradient(function):
    """`tf.custom_gradient`, but a graph can be freed that a call was traced in."""
    differentiable = tf.custom_gradient(function)

    @functools.wraps(function)
    def call(*args):
        with graph_owns_gradients():
            return differentiable(*args)

    return call


@contextlib.contextmanager
def graph_owns_gradients():
    """Let the gradients that are registered in the block be freed with their graph.

    TensorFlow registers the gradient of each traced call by name and for ever, that of
    a sum over replicas too, and the gradient refers to the graph: what was traced would
    stay in memory. Here the graph owns its gradients, and the registry forgets them
    with it.
    """
    if tf.executing_eagerly():
        yield
        return
    registry = ops._gradient_registry._registry
    before = set(registry)
    yield
    graph = tf.compat.v1.get_default_graph()
    for name in set(registry) - before:
        gradient = registry[name]["type"]
        if isinstance(gradient, _OwnedGradient):
            continue
        graph._owned_gradients = (*getattr(graph, "_owned_gradients", ()), gradient)
        registry[name]["type"] = _OwnedGradient(gradient, registry, name)


class _OwnedGradient:
    """A registered gradient that a graph owns; the registry only refers to it."""

    def __init__(self, gradient, registry, name):
        self._reference = weakref.ref(gradient, lambda _: registry.pop(name))

    def __call__(self, *args):
        return self._reference()(*args)


def layer_norm(x, gamma, beta, epsilon):
    """Normalise the last axis to mean 0 and variance 1, then scale and shift.

    Args:
        x: `(..., C)`, any float type.
        gamma: `(C,)`, scale.
        beta: `(C,)`, shift, or None for none.
        epsilon: Added to the variance, above 0.

    Returns:
        `(..., C)` in the type of `x`.

    Reference: Ba, Kiros and Hinton, "Layer Normalization", arXiv:1607.06450.
    """
    beta = tf.zeros_like(gamma) if beta is None else beta

    @custom_gradient
    def normalise(x, gamma, beta):
        centred = x - tf.reduce_mean(x, axis=-1, keepdims=True)
        variance = tf.reduce_mean(centred * centred, axis=-1, keepdims=True)
        scale = tf.math.rsqrt(variance + epsilon)
        normed = keep(centred * scale)

        def gradient(dy):
            dnormed = keep(dy * gamma)
            mean = tf.reduce_mean(dnormed, axis=-1, keepdims=True)
            slope = tf.reduce_mean(dnormed * normed, axis=-1, keepdims=True)
            dx = (dnormed - mean - normed * slope) * scale
            others = list(range(x.shape.rank - 1))
            dgamma = tf.reduce_sum(dy * normed, axis=others)
            return dx, dgamma, tf.reduce_sum(dy, axis=others)

        return normed * gamma + beta, gradient

    y = normalise(*(tf.cast(value, tf.float32) for value in (x, gamma, beta)))
    return tf.cast(y, x.dtype)


def rms_norm(x, gamma, epsilon):
    """Divide the last axis by its root mean square, then scale.

    Args:
        x: `(..., C)`, any float type.
        gamma: `(C,)`, scale.
        epsilon: Added to the mean square, above 0.

    Returns:
        `(..., C)` in the type of `x`.

    Reference: Zhang and Sennrich, "Root Mean Square Layer Normalization",
    arXiv:1910.07467.
    """

    @custom_gradient
    def normalise(x, gamma):
        scale = tf.math.rsqrt(tf.reduce_mean(x * x, axis=-1, keepdims=True) + epsilon)
        normed = keep(x * scale)

        def gradient(dy):
            dnormed = keep(dy * gamma)
            slope = tf.reduce_mean(dnormed * normed, axis=-1, keepdims=True)
            dgamma = tf.reduce_sum(dy * normed, axis=list(range(x.shape.rank - 1)))
            return (dnormed - normed * slope) * scale, dgamma

        return normed * gamma, gradient

    y = normalise(tf.cast(x, tf.float32), tf.cast(gamma, tf.float32))
    return tf.cast(y, x.dtype)


def rotary(positions, form):
    """Return a function that turns heads by their positions.

    The first half of a head's `rotary_dim` numbers are turned with the second half, as
    pairs, each pair by its frequency times the position; what is left stays.

    Args:
        positions: `(T,)` or `(B, T)` int32.
        form: What `gpt_tf.models.sizes.rotary_frequencies` needs.

    Returns:
        A function of `(B, H, T, D)` in any float type, which returns the same.

    Reference: Su et al., "RoFormer", arXiv:2104.09864; halves as in GPT-NeoX.
    """
    frequencies = tf.constant(rotary_frequencies(form), tf.float32)  # (R / 2,)
    angles = tf.cast(positions, tf.float32)[..., tf.newaxis] * frequencies
    if positions.shape.rank == 2:
        angles = angles[:, tf.newaxis]  # (B, 1, T, R / 2)
    half = form["rotary_dim"] // 2

    def turn(x):
        cos, sin = tf.cast(tf.cos(angles), x.dtype), tf.cast(tf.sin(angles), x.dtype)
        one, other, rest = tf.split(x, [half, half, x.shape[-1] - 2 * half], axis=-1)
        return tf.concat([one * cos - other * sin, other * cos + one * sin, rest], -1)

    return turn


def gelu(x):
    """GELU in GPT-2's tanh form.

    Reference: Hendrycks and Gimpel, "Gaussian Error Linear Units",
    arXiv:1606.08415.
    """
    slope = math.sqrt(2.0 / math.pi)

    @custom_gradient
    def activate(x):
        t = tf.tanh(slope * (x + 0.044715 * x * x * x))

        def gradient(dy):
            dt = (1.0 - t * t) * slope * (1.0 + 3 * 0.044715 * x * x)
            return dy * 0.5 * (1.0 + t + x * dt)

        return keep(0.5 * x * (1.0 + t)), gradient

    return activate(x)


def swiglu(x):
    """Let the first half of the last axis, through SiLU, gate the second.

    Only `x` is stored for the gradient, which computes the gate again.

    Reference: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.
    """

    @custom_gradient
    def activate(x):
        gate, up = tf.split(x, 2, axis=-1)

        def gradient(dy):
            gate, up = tf.split(again(x, dy), 2, axis=-1)
            share = tf.sigmoid(gate)
            dgate = dy * up * share * (1.0 + gate * (1.0 - share))
            return keep(tf.concat([dgate, dy * gate * share], axis=-1))

        return keep(gate * tf.sigmoid(gate) * up), gradient

    return activate(x)


def _exact_gelu(x):
    return tf.nn.gelu(x, approximate=False)


ACTIVATIONS = {
    "gelu_tanh": gelu,
    "gelu": _exact_gelu,
    "relu": tf.nn.relu,
    "swiglu": swiglu,
}


def project(x, kernel):
    """Multiply `(N, F)` by a kernel `(F, C)` that has more rows than columns.

    The same as `tf.matmul(x, kernel)`. XLA's CPU product is slow where the kernel's
    gradient is tall, so that is computed lying down and then turned.
    """

    @custom_gradient
    def multiply(x, kernel):
        def gradient(dy):
            dkernel = keep(tf.matmul(dy, x, transpose_a=True))  # (C, F)
            return tf.matmul(dy, kernel, transpose_b=True), tf.transpose(dkernel)

        return tf.matmul(x, kernel), gradient

    return multiply(x, kernel)


def dropout(x, rate, seed, calls):
    """Drop values by a mask that follows from a seed and a counter of calls.

    Args:
        x: Any shape; what is left of it is scaled, so that the mean stays.
        rate: Share of values that become 0, above 0 and below 1.
        seed: `()` int32.
        calls: Variable `()` int32, which is increased by 1.
    """
    seed = tf.stack([seed, calls.assign_add(1)])
    return tf.nn.experimental.stateless_dropout(x, rate, seed, rng_alg="philox")


def causal_mask(num_positions):
    """Return the additive mask that hides the future, `(T, T)` float32.

    It has rank 2 on purpose. A constant of rank 4 lets TensorFlow's graph optimiser
    fuse product and mask into one oneDNN kernel, which is 300 times slower here.
    """
    visible = tf.linalg.band_part(tf.ones([num_positions, num_positions]), -1, 0)
    return (1.0 - visible) * MASKED


def attention(query, key, value, mask, on_scores=None, on_probabilities=None):
    """Scaled dot-product attention.

    Args:
        query: `(B, H, T, D)`.
        key: `(B, G, S, D)`, where `G` divides `H`: as many queries in turn share one.
        value: `(B, G, S, D)`.
        mask: Additive, float32, broadcastable to `(B, H, T, S)`: 0 where a
            position may be seen and a large negative number where not. It has no
            gradient.
        on_scores: Function applied to the scaled scores `(B, H, T, S)` before the
            mask is added, or None.
        on_probabilities: Function applied to the probabilities `(B, H, T, S)`
            before they weigh the values, or None.

    Returns:
        `(B, H, T, D)` in the type of `query`.

    Reference: Vaswani et al., "Attention Is All You Need", arXiv:1706.03762.
    """
    scale = 1.0 / math.sqrt(query.shape[-1])
    heads, groups = query.shape[1], key.shape[1]

    def grouped(x):
        """`(B, H, T, n)` -> `(B, G, H / G * T, n)`: the queries that share a key."""
        if heads == groups:
            return x
        return tf.reshape(
            x, [tf.shape(x)[0], groups, -1, x.shape[-1] or tf.shape(x)[3]]
        )

    def apart(x, like):
        """The way back, to the rows of another tensor."""
        if heads == groups:
            return x
        batch, _, length, _ = tf.unstack(tf.shape(like))
        return tf.reshape(x, [batch, heads, length, x.shape[-1] or tf.shape(x)[3]])

    def probabilities_of(query, key):
        scores = apart(tf.matmul(grouped(query), key, transpose_b=True), query)
        scores = tf.cast(scores, tf.float32) * scale  # (B, H, T, S)
        if on_scores is not None:
            scores = on_scores(scores)
        return tf.cast(tf.nn.softmax(scores + mask), query.dtype)

    if on_scores is not None or on_probabilities is not None:
        probabilities = probabilities_of(query, key)
        if on_probabilities is not None:
            probabilities = on_probabilities(probabilities)
        return apart(tf.matmul(grouped(probabilities), value), query)

    @custom_gradient
    def attend(query, key, value):
        probabilities = probabilities_of(query, key)
        outputs = apart(tf.matmul(grouped(probabilities), value), query)

        def gradient(dy):
            # The sum over S of p * dp is the sum over D of y * dy, which is shorter
            # (Dao et al., "FlashAttention", arXiv:2205.14135, section 3.1).
            shared = grouped(dy)
            dvalue = tf.matmul(grouped(probabilities), shared, transpose_a=True)
            dprobabilities = apart(tf.matmul(shared, value, transpose_b=True), dy)
            inner = tf.reduce_sum(dy * outputs, axis=-1, keepdims=True)
            dscores = grouped(probabilities * (dprobabilities - inner) * scale)
            dquery = apart(tf.matmul(dscores, key), dy)
            dkey = tf.matmul(dscores, grouped(query), transpose_a=True)
            return dquery, dkey, dvalue

        return outputs, gradient

    return attend(query, key, value)


def causal_attention(
    query, key, value, on_scores=None, on_probabilities=None, piece=256
):
    """Attention of each position to itself and those before it.

    As `attention` with a `causal_mask`. Many queries attend in pieces, each to the keys
    that it may see: the others are up to half of the work. Pieces of 256 are faster in
    training than whole or halved ones.

    Args:
        query: `(B, H, T, D)`.
        key: `(B, G, T, D)`.
        value: `(B, G, T, D)`.
        on_scores: As for `attention`; with a function the queries are one piece.
        on_probabilities: Likewise.
        piece: Queries in a piece.

    Returns:
        `(B, H, T, D)` in the type of `query`.
    """
    length, hooks = query.shape[2], (on_scores, on_probabilities)
    mask = causal_mask(length or tf.shape(query)[2])
    if any(hooks) or length is None or length < 2 * piece:
        return attention(query, key, value, mask, *hooks)
    contexts = []
    for begin in range(0, length, piece):
        rows, seen = slice(begin, begin + piece), slice(begin + piece)
        seen_by = query[:, :, rows], key[:, :, seen], value[:, :, seen]
        contexts.append(attention(*seen_by, mask[rows, seen]))
    return tf.concat(contexts, axis=2)


def token_sums(logits, labels, weights):
    """Sum loss, correct predictions and weights over all tokens.

    Sums rather than means, so that replicas and micro-batches add up to exactly
    the mean over the whole batch, and so that a token of weight 0 counts nowhere.

    Args:
        logits: `(..., V)`, any float type.
        labels: `(...)`, integers from 0 to V - 1.
        weights: `(...)`, float32, at least 0.

    Returns:
        `(loss_sum, correct_sum, weight_sum)`, float32 scalars: the weighted
        cross-entropy in nats, the weight of the tokens whose label is the most
        likely token, and the weight of all tokens.
    """
    width = logits.shape[-1]
    logits = tf.cast(tf.reshape(logits, [-1, width]), tf.float32)
    labels = tf.reshape(labels, [-1])
    weights = tf.reshape(weights, [-1])
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    correct = tf.cast(is_top_1(labels, logits), tf.float32)
    # A masked token may hold anything, infinities included.
    losses = tf.where(weights > 0.0, losses * weights, tf.zeros_like(losses))
    return (
        tf.reduce_sum(losses),
        tf.reduce_sum(correct * weights),
        tf.reduce_sum(weights),
    )


def is_top_1(labels, logits):
    """Return whether labels `(...)` are the most likely tokens by logits `(..., V)`.

    Of equal logits the first counts as the most likely, as `argmax` has it: so a model
    that knows nothing is not right everywhere.
    """
    return tf.argmax(logits, axis=-1, output_type=tf.int32) == tf.cast(labels, tf.int32)


def write_rows(cache, rows, position):
    """Put new keys or values into a cache.

    Args:
        cache: `(B, G, S, D)`.
        rows: `(B, G, T, D)`, with `position + T` at most `S`.
        position: `()` int32, the cache row that takes the first new one.

    Returns:
        `(B, G, S, D)`. Inside `inside_xla()` the rows are written in place, by
        DYNAMIC_UPDATE_SLICE, which TensorFlow has no kernel for outside XLA.
    """
    rows = tf.cast(rows, cache.dtype)
    if _INSIDE_XLA.get():
        start = tf.stack([0, 0, position, 0])
        return gen_xla_ops.xla_dynamic_update_slice(cache, rows, start)
    after = position + tf.shape(rows)[2]
    return tf.concat([cache[:, :, :position], rows, cache[:, :, after:]], axis=2)
