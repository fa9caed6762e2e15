import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from gpt_tf.errors import InputError
from gpt_tf.models import ops
from gpt_tf.models.layers import (
    Dropout,
    LanguageModelHead,
    TokenAndPositionEmbedding,
    TransformerBlock,
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def block_of(num_heads=3, width=12, **arguments):
    """A block whose every weight has a value of its own."""
    block = TransformerBlock(num_heads, 4 * width, **arguments)
    block.build(tf.TensorShape([None, None, width]))
    for index, weight in enumerate(block.trainable_weights):
        weight.assign_add(0.2 * normal(*weight.shape, seed=index))
    return block


def call_in_pieces(block, x, pieces, compiled):
    """Call the block with a cache of 10 rows, `pieces` positions at a time."""

    def once(x, keys, values, position):
        rows = tf.range(10)[tf.newaxis]
        last = position + tf.range(x.shape[1])[:, tf.newaxis]
        mask = rows <= last  # (T, S)
        return block([x, keys, values, position, mask])

    def inside(*arguments):
        with ops.inside_xla():
            return once(*arguments)

    call = tf.function(inside, jit_compile=True) if compiled else once
    shape = (x.shape[0], block.num_heads, 10, block.head_dim)
    # Rows not written yet hold numbers: the mask alone must hide them.
    keys, values = tf.constant(normal(*shape)), tf.constant(normal(*shape, seed=1))
    outputs, start = [], 0
    for length in pieces:
        piece = tf.constant(x[:, start : start + length])
        y, keys, values = call(piece, keys, values, tf.constant(start))
        outputs.append(y)
        start += length
    return np.concatenate(outputs, axis=1)


@pytest.mark.parametrize(
    ("num_heads", "pieces", "compiled"),
    [(3, (8,), True), (3, (3, 5), False), (5, (5, 1, 1, 1), True), (5, (8,), False)],
)
def test_a_cached_call_equals_the_uncached_one(num_heads, pieces, compiled):
    block, x = block_of(num_heads), normal(2, 8, 12, seed=3)
    cached = call_in_pieces(block, x, pieces, compiled)
    np.testing.assert_allclose(cached, block(x), atol=1e-5)


def test_the_cached_comparison_notices_a_change_of_any_weight():
    block, x = block_of(), normal(2, 8, 12, seed=3)
    expected = block(x).numpy()
    assert len(block.trainable_weights) == 12
    for weight in block.trainable_weights:
        before = weight.numpy()
        weight.assign_add(0.02 * normal(*weight.shape, seed=9))
        cached = call_in_pieces(block, x, (3, 5), compiled=False)
        assert np.abs(cached - expected).max() > 1e-4, weight.name
        weight.assign(before)


def test_every_hook_of_a_block_is_called_once_with_its_tensor():
    block, seen = block_of(), {}

    def record(name):
        def hook(x):
            assert name not in seen
            seen[name] = tuple(x.shape)
            return x

        return hook

    x = normal(2, 8, 12)
    expected = block(x)
    for name in TransformerBlock.ACTIVATIONS:
        setattr(block, name, record(name))
    np.testing.assert_allclose(block(x), expected, atol=1e-6)
    assert list(seen) == list(TransformerBlock.ACTIVATIONS)
    assert seen["scores_activation"] == (2, 3, 8, 8)
    assert seen["probabilities_activation"] == (2, 3, 8, 8)
    assert seen["attended_activation"] == (16, 12)
    assert seen["up_activation"] == (16, 48)
    assert seen["qkv_activation"] == (16, 36)
    assert seen["hidden_activation"] == (16, 48)


def test_what_a_hook_returns_is_what_is_used():
    block, x = block_of(), normal(1, 4, 12)
    expected = block(x).numpy()
    for name in TransformerBlock.ACTIVATIONS:
        before = getattr(block, name)
        setattr(block, name, lambda x: x * 1.1)
        assert np.abs(block(x) - expected).max() > 1e-3, name
        setattr(block, name, before)


def test_positions_given_equal_positions_counted():
    layer = TokenAndPositionEmbedding(20, 6, 9, share_table=False)
    tokens = np.array([[3, 1, 4, 1, 5]])
    whole = layer(tokens).numpy()
    np.testing.assert_array_equal(layer([tokens, np.arange(5)]), whole)
    later = layer([tokens[:, 2:], np.array([2, 3, 4])]).numpy()
    np.testing.assert_array_equal(later, whole[:, 2:])
    per_row = layer([np.array([[3], [4]]), np.array([[0], [2]])]).numpy()
    np.testing.assert_array_equal(per_row[:, 0], whole[0, [0, 2]])
    assert np.abs(whole[0, 1] - whole[0, 3]).max() > 1e-4  # one token, two places


def test_more_positions_than_there_are_vectors_is_refused():
    layer = TokenAndPositionEmbedding(20, 6, 9)
    with pytest.raises(InputError, match="at most 9 positions"):
        layer(np.zeros((1, 10), "int32"))


def test_a_tied_head_scores_with_the_table_and_an_untied_one_with_its_own():
    x, table = normal(2, 3, 6), normal(20, 6, seed=1)
    tied = LanguageModelHead(20)
    np.testing.assert_allclose(tied([x, table]), x @ table.T, atol=1e-5)
    assert not tied.weights
    untied = LanguageModelHead(20)
    logits = untied(x)
    np.testing.assert_allclose(logits, x @ untied.kernel.numpy().T, atol=1e-5)
    assert untied.kernel.shape == (20, 6)


def test_dropout_masks_follow_from_seed_and_counter():
    x = tf.ones([8, 8])
    first, second, other = Dropout(0.5, 1), Dropout(0.5, 1), Dropout(0.5, 2)
    masks = [first(x, training=True).numpy() for _ in range(3)]
    assert not np.array_equal(masks[0], masks[1])
    for mask in masks:
        np.testing.assert_array_equal(second(x, training=True), mask)
    assert not np.array_equal(other(x, training=True), masks[0])
    first.calls.assign(1)
    np.testing.assert_array_equal(first(x, training=True), masks[1])


def test_dropout_in_evaluation_changes_neither_values_nor_counter():
    layer, x = Dropout(0.5), tf.ones([8, 8])
    np.testing.assert_array_equal(layer(x, training=False), x)
    assert layer.calls.numpy() == 0


def test_a_checkpoint_of_the_counter_brings_the_masks_back(make_model, tmp_path):
    options = {"dropout": 0.5, "num_layers": 1}
    model, x = make_model(**options), np.ones((2, 8), "int32")
    model(x, training=True)
    np.testing.assert_array_equal(model(x), model(x))  # in training only
    model.save_weights(tmp_path / "weights" / "at_one")
    later = [model(x, training=True).numpy() for _ in range(2)]
    assert not np.array_equal(*later)
    again = make_model(**options, seed=4)
    again.load_weights(tmp_path / "weights" / "at_one").assert_consumed()
    for expected in later:
        np.testing.assert_array_equal(again(x, training=True), expected)


def test_blocks_of_one_model_draw_different_masks(make_model):
    seeds = [
        layer.seed
        for layer in make_model(dropout=0.5)._flatten_layers()
        if isinstance(layer, Dropout)
    ]
    assert len(seeds) == 5
    assert len(set(seeds)) == 5


def test_replicas_draw_different_masks():
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        layer = Dropout(0.5)
        layer.build(tf.TensorShape([8, 8]))

    @tf.function
    def masks():
        return strategy.run(lambda: layer(tf.ones([8, 8]), training=True))

    one, other = (mask.numpy() for mask in strategy.experimental_local_results(masks()))
    assert {0.0, 2.0} == set(np.unique(one)) == set(np.unique(other))
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_keeps_float32_weights_and_logits(policy):
    block = TransformerBlock(3, 20, dtype=keras.mixed_precision.Policy(policy))
    y = block(normal(1, 4, 12))
    assert y.dtype == policy[6:]
    assert {weight.dtype for weight in block.weights} == {tf.float32}
    head = LanguageModelHead(20, dtype=keras.mixed_precision.Policy(policy))
    assert head(y).dtype == tf.float32
