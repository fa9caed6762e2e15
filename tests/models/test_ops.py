import gc
import weakref

import numpy as np
import pytest
import tensorflow as tf

from gpt_tf.models import ops
from tests.oracles import numpy_gpt


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def run(function, *arrays, compiled):
    """Values and gradients of a random weighing of `function`'s result."""

    def differentiate(*tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            y = function(*tensors)
            weighing = tf.cast(
                tf.reshape(tf.range(tf.size(y)), tf.shape(y)), tf.float32
            )
            total = tf.reduce_sum(tf.cos(weighing) * tf.cast(y, tf.float32))
        return y, tape.gradient(total, tensors)

    def inside(*tensors):
        with ops.inside_xla():
            return differentiate(*tensors)

    tensors = tuple(map(tf.constant, arrays))
    if compiled:
        return tf.function(inside, jit_compile=True)(*tensors)
    return differentiate(*tensors)


def plain_layer_norm(x, gamma, beta):
    mean, variance = tf.nn.moments(x, axes=[-1], keepdims=True)
    return (x - mean) / tf.sqrt(variance + 1e-5) * gamma + beta


def plain_attention(query, key, value):
    scores = tf.einsum("bhtd,bhsd->bhts", query, key) / query.shape[-1] ** 0.5
    hidden = (
        tf.range(key.shape[2])[tf.newaxis] > tf.range(query.shape[2])[:, tf.newaxis]
    )
    scores = tf.where(hidden, tf.constant(-1e30), scores)
    return tf.einsum("bhts,bhsd->bhtd", tf.nn.softmax(scores), value)


OPERATIONS = {
    "layer_norm": (
        lambda x, gamma, beta: ops.layer_norm(x, gamma, beta, 1e-5),
        plain_layer_norm,
        [normal(6, 5), 1 + normal(5, seed=1), normal(5, seed=2)],
    ),
    "gelu": (
        ops.gelu,
        lambda x: tf.nn.gelu(x, approximate=True),
        [3 * normal(7, 5)],
    ),
    "swiglu": (
        ops.swiglu,
        lambda x: tf.nn.silu(x[:, :4]) * x[:, 4:],
        [3 * normal(7, 8)],
    ),
    "project": (ops.project, tf.matmul, [normal(6, 9), normal(9, 4, seed=1)]),
    "attention": (
        lambda q, k, v: ops.attention(q, k, v, ops.causal_mask(5)),
        plain_attention,
        [normal(2, 3, 5, 4, seed=s) for s in range(3)],
    ),
    "causal attention": (
        ops.causal_attention,
        plain_attention,
        [normal(2, 3, 5, 4, seed=s) for s in range(3)],
    ),
    "causal attention in pieces": (
        lambda q, k, v: ops.causal_attention(q, k, v, piece=2),
        plain_attention,
        [normal(2, 3, 5, 4, seed=s) for s in range(3)],
    ),
    "attention with a hook": (
        lambda q, k, v: ops.attention(q, k, v, ops.causal_mask(5), tf.identity),
        plain_attention,
        [normal(2, 3, 5, 4, seed=s) for s in range(3)],
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_value_and_hand_written_gradient_are_tensorflows(name):
    ours, plain, arrays = OPERATIONS[name]
    expected = run(plain, *arrays, compiled=False)

    def largest_difference(arrays, compiled=False):
        value, gradients = run(ours, *arrays, compiled=compiled)
        found = zip([value, *gradients], [expected[0], *expected[1]], strict=True)
        return [np.abs(one - other).max() for one, other in found]

    for compiled in (True, False):
        of_value, *of_gradients = largest_difference(arrays, compiled)
        assert of_value < 1e-5
        assert max(of_gradients) < 2e-5
    for index in range(len(arrays)):  # it notices a change of any input
        changed = [array.copy() for array in arrays]
        changed[index].flat[-1] += 0.05
        of_value, *of_gradients = largest_difference(changed)
        assert of_value > 1e-4
        # beta is in no gradient
        assert max(of_gradients) > 1e-4 or name == "layer_norm"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_inputs_keep_their_type_and_are_normalised_in_float32(dtype):
    x = 200 + 30 * normal(4, 64)  # squares that float16 cannot hold
    x = tf.cast(x, dtype)
    y = ops.layer_norm(x, tf.ones(64), tf.zeros(64), 1e-5)
    assert y.dtype == dtype
    expected = plain_layer_norm(tf.cast(x, tf.float32), 1.0, 0.0)
    np.testing.assert_allclose(tf.cast(y, tf.float32), expected, atol=0.02)
    heads = tf.cast(100 * normal(1, 1, 3, 4), dtype)
    context = ops.attention(heads, heads, heads, ops.causal_mask(3))
    assert context.dtype == dtype
    assert np.isfinite(tf.cast(context, tf.float32)).all()


def test_the_mask_hides_exactly_the_future():
    mask = ops.causal_mask(4).numpy()
    visible = np.tril(np.ones((4, 4), bool))
    assert mask.ndim == 2  # four axes would be slow, see its docstring
    np.testing.assert_array_equal(mask == 0, visible)
    assert mask[~visible].max() <= -1e9


def test_token_sums_are_the_oracles():
    logits, labels = normal(2, 3, 7), np.array([[1, 6, 0], [2, 2, 5]])
    labels[0, 1] = logits[0, 1].argmax()
    weights = np.array([[1.0, 2.0, 0.0], [0.5, 0.0, 1.0]], "float32")
    logits[weights == 0] = np.inf  # a token that does not count may hold anything
    loss, correct, weight = ops.token_sums(logits, labels, weights)
    expected = sum(
        weights[at] * numpy_gpt.mean_loss(logits[at][None].astype(float), [labels[at]])
        for at in zip(*np.nonzero(weights), strict=True)
    )
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    hits = (logits.argmax(-1) == labels) * weights
    assert hits.sum() >= 2
    assert float(correct) == hits.sum()
    assert float(weight) == 4.5


@pytest.mark.parametrize("compiled", [True, False])
def test_rows_are_written_at_the_position_and_nowhere_else(compiled):
    cache, rows = normal(2, 3, 7, 4), normal(2, 3, 2, 4, seed=1)

    def write(cache, rows, position):
        with ops.inside_xla():
            return ops.write_rows(cache, rows, position)

    function = tf.function(write, jit_compile=True) if compiled else ops.write_rows
    for position in (0, 2, 5):
        expected = cache.copy()
        expected[:, :, position : position + 2] = rows
        written = function(*map(tf.constant, (cache, rows, position)))
        np.testing.assert_array_equal(written, expected)


@pytest.mark.parametrize("dy", [1.0, np.inf, -np.inf, np.nan])
def test_what_is_computed_again_is_computed_of_the_same(dy):
    x = np.array([-3.5, 0.0, 1e30], "float32")

    def again(x, dy):
        with ops.inside_xla():
            return ops.again(x, dy)

    found = tf.function(again, jit_compile=True)(x, tf.fill([2, 3], -np.abs(dy)))
    np.testing.assert_array_equal(found, x)


def test_inside_xla_ends_with_its_block_even_after_an_error():
    assert not ops._INSIDE_XLA.get()
    with pytest.raises(RuntimeError), ops.inside_xla():
        assert ops._INSIDE_XLA.get()
        raise RuntimeError
    assert not ops._INSIDE_XLA.get()


@ops.custom_gradient
def twice(x):
    """The gradient is 5, which TensorFlow would not find."""
    return 2.0 * x, lambda dy: 5.0 * dy


@pytest.mark.parametrize(
    "function",
    [
        twice,
        lambda x: tf.cond(x > 0, lambda: twice(x), lambda: x),
        lambda x: tf.while_loop(lambda y: y < 6.0, lambda y: [twice(y)], [x])[0],
    ],
)
def test_a_custom_gradient_holds_eagerly_in_a_graph_and_around_one(function):
    def slope(function):
        x = tf.constant(3.0)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        return tape.gradient(y, x)

    assert slope(function).numpy() == 5.0
    assert slope(tf.function(function)).numpy() == 5.0
    assert tf.function(lambda: slope(function))().numpy() == 5.0
    assert tf.function(lambda: slope(tf.function(function)))().numpy() == 5.0


def test_a_graph_with_custom_gradients_is_freed():
    graphs = []

    @tf.function
    def slope(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = twice(twice(x))
        graphs.append(weakref.ref(y.graph))
        return tape.gradient(y, x)

    assert slope(tf.constant(3.0)).numpy() == 25.0
    assert graphs[0]() is not None
    del slope
    gc.collect()
    assert graphs[0]() is None
