"""Claims about weights as integers: what the strategies do, and what they cost."""

import subprocess
import sys

import numpy as np
import pytest
import tf_keras as keras
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import gpt_tf
from gpt_tf.errors import InputError, InputTypeError
from gpt_tf.quantization.weights import (
    STRATEGIES,
    channel_axis,
    dequantize,
    quantize_array,
    quantize_weights,
    snr_db,
)

quick = settings(deadline=None, max_examples=100)
any_bits = st.integers(2, 8)
# Subnormal numbers too, whose scales could not be told apart from 0.
numbers = st.floats(-(2.0**100), 2.0**100, width=32)
matrices = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.one_of(numbers, st.floats(-1, 1, width=32), st.just(0.0)),
)
# How an array is cut into groups that share a scale: axis and block size.
groupings = st.sampled_from([(None, None), (0, None), (1, None), (0, 4), (1, 4)])

MATRICES = {
    "embedding/token_table": (31, 12),
    "embedding/position_table": (16, 12),
    **{
        f"block_{index}/{kernel}": shape
        for index in range(2)
        for kernel, shape in (
            ("qkv_kernel", (12, 36)),
            ("output_kernel", (12, 12)),
            ("up_kernel", (12, 48)),
            ("down_kernel", (48, 12)),
        )
    },
}


def step_of(scales, shape, block_size):
    """The scale of every value: the dequantised value of the integer 1."""
    return dequantize(np.ones(shape, np.int8), scales, block_size=block_size)


def matrices_of(model):
    return {w.name.split(":")[0]: w.numpy() for w in model.weights if w.shape.rank == 2}


@pytest.fixture
def spread_model(make_model):
    """Make a model whose weights have means, and channels of unequal size."""

    def make(**changes):
        model = make_model(**changes)
        generator = np.random.default_rng(7)
        for weight in model.weights:
            gains = np.exp(generator.normal(0, 1.0, weight.shape[-1:]))
            values = generator.normal(0.02, 0.1, weight.shape) * gains
            weight.assign(values)
        return model

    return make


# Arrays


@given(matrices, any_bits, groupings)
@example(np.full((1, 2), 1e-44, np.float32), 8, (None, None))
@example(np.array([[2e-43, 1e-45]], np.float32), 8, (0, None))
@quick
def test_the_error_is_at_most_half_a_step(values, bits, grouping):
    axis, block_size = grouping
    integers, scales = quantize_array(values, bits, axis, block_size)
    assert integers.dtype == np.int8 and scales.dtype == np.float32
    assert np.abs(integers.astype(int)).max() <= 2 ** (bits - 1) - 1
    assert np.isfinite(scales).all() and (scales > 0).all()
    back = dequantize(integers, scales, block_size=block_size)
    error = np.abs(back.astype(np.float64) - values)
    assert (error <= 0.5001 * step_of(scales, values.shape, block_size)).all()


def test_half_a_step_is_reached_and_an_integer_further_breaks_it():
    values = np.random.default_rng(1).normal(0, 1, (64, 64)).astype(np.float32)
    integers, scales = quantize_array(values, 8)
    error = np.abs(dequantize(integers, scales) - values) / scales
    assert error.max() > 0.49
    integers[5, 6] += 1
    error = np.abs(dequantize(integers, scales) - values) / scales
    assert error.max() > 0.5001


@given(matrices, any_bits, groupings)
@example(np.full((1, 2), 1e-44, np.float32), 8, (None, None))
@quick
def test_quantising_the_dequantised_gives_the_same_integers(values, bits, grouping):
    axis, block_size = grouping
    integers, scales = quantize_array(values, bits, axis, block_size)
    back = dequantize(integers, scales, block_size=block_size)
    again, _ = quantize_array(back, bits, axis, block_size)
    np.testing.assert_array_equal(again, integers)


@given(matrices, any_bits, groupings)
@quick
def test_zeros_stay_exact(values, bits, grouping):
    axis, block_size = grouping
    integers, scales = quantize_array(values, bits, axis, block_size)
    back = dequantize(integers, scales, block_size=block_size)
    assert (back[values == 0] == 0).all()


def test_a_channel_of_zeros_has_the_scale_1():
    integers, scales = quantize_array([[0.0, 3.0], [0.0, -1.0]], axis=1)
    assert scales[0, 0] == 1.0 and scales[0, 1] == np.float32(3.0) / np.float32(127)
    assert integers.tolist() == [[0, 127], [0, -42]]


@pytest.mark.parametrize("grouping", [(None, None), (0, None), (1, None), (1, 2)])
def test_nothing_but_zeros_is_quantised_without_a_division_by_zero(grouping):
    integers, scales = quantize_array(np.zeros((3, 5)), 8, *grouping)
    assert not integers.any() and (scales == 1).all()


@given(matrices, any_bits)
@quick
def test_no_channel_has_a_larger_step_than_the_tensor(values, bits):
    _, whole = quantize_array(values, bits)
    for axis in (0, 1):
        _, channels = quantize_array(values, bits, axis)
        used = np.abs(values).max(axis=1 - axis, keepdims=True) > 0
        assert (channels[used] <= whole).all()
        _, blocks = quantize_array(values, bits, axis, 4)
        used = step_of(blocks, values.shape, 4) != 1
        wide = np.broadcast_to(channels, values.shape)
        assert (step_of(blocks, values.shape, 4)[used] <= wide[used]).all()


@given(st.integers(0, 10**6), any_bits, st.floats(0, 2), st.sampled_from([0, 1]))
@quick
def test_a_scale_per_channel_lowers_the_noise_of_random_weights(
    seed, bits, spread, axis
):
    generator = np.random.default_rng(seed)
    values = generator.normal(0, 1, (64, 64))
    gains = np.exp(generator.normal(0, spread, 64))
    values *= gains if axis == 1 else gains[:, None]
    decibels = [
        snr_db(values.astype(np.float32), dequantize(*quantize_array(values, bits, a)))
        for a in (None, axis)
    ]
    assert decibels[1] > decibels[0]


def test_a_scale_per_channel_raises_the_noise_where_weights_lie_on_a_common_grid():
    values = np.array([[127.0, 100.0], [1.0, 1.0]])
    assert snr_db(values, dequantize(*quantize_array(values))) == np.inf
    assert snr_db(values, dequantize(*quantize_array(values, axis=1))) < 60


def test_halves_are_rounded_to_the_even_neighbour():
    values = np.array([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    integers, scales = quantize_array(values)
    assert scales == 1.0
    assert integers.tolist() == [127, 0, 2, 2, 0, -2, -2]


def test_rounding_is_that_of_tensorflow():
    import tensorflow as tf

    values = np.random.default_rng(2).normal(0, 1, (50, 40)).astype(np.float32)
    integers, scales = quantize_array(values, axis=1)
    expected = tf.round(tf.constant(values) / scales).numpy()
    np.testing.assert_array_equal(integers, expected)
    other_way = np.trunc(values / scales)
    assert (integers != other_way).mean() > 0.4


@pytest.mark.parametrize(
    ("axis", "block_size", "shape"),
    [
        (None, None, (1, 1)),
        (0, None, (70, 1)),
        (-1, None, (1, 40)),
        (1, 32, (3, 40)),
        (0, 32, (70, 2)),
    ],
)
def test_scales_have_a_length_per_group(axis, block_size, shape):
    values = np.random.default_rng(3).normal(0, 1, (70, 40)).astype(np.float32)
    integers, scales = quantize_array(values, 4, axis, block_size)
    assert integers.shape == values.shape and scales.shape == shape


def test_a_block_is_quantised_as_an_array_of_its_own():
    values = np.random.default_rng(3).normal(0, 1, (70, 40)).astype(np.float32)
    integers, scales = quantize_array(values, 4, axis=1, block_size=32)
    back = dequantize(integers, scales, block_size=32)
    for rows in (slice(0, 32), slice(32, 64), slice(64, 70)):
        alone = quantize_array(values[rows], 4, axis=1)
        np.testing.assert_array_equal(integers[rows], alone[0])
        np.testing.assert_array_equal(back[rows], dequantize(*alone))


def test_decibels_are_ten_times_the_logarithm_of_the_power_ratio():
    assert snr_db([3.0, 4.0], [3.0, 4.5]) == pytest.approx(20.0)
    assert snr_db([1.0], [1.0]) == np.inf
    assert snr_db([0.0], [1.0]) == -np.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 9}, "from 2 to 8. Received: 9"),
        ({"bits": 1}, "from 2 to 8. Received: 1"),
        ({"bits": True}, "from 2 to 8. Received: True"),
        ({"bits": 4.0}, "from 2 to 8. Received: 4.0"),
        ({"axis": 2}, "`axis` expects an integer from -2 to 1. Received: 2"),
        ({"block_size": 4}, "Blocks expect a matrix"),
        ({"axis": 0, "block_size": 0}, "at least 1"),
        ({"values": np.zeros((0, 3))}, "at least one value"),
        ({"values": [[1.0, np.nan]]}, "1 of 2 values of the array are NaN"),
        ({"values": [[-np.inf, np.inf]], "name": "qkv"}, "2 of 2 values of qkv are"),
    ],
)
def test_what_cannot_be_quantised_is_refused_with_the_repair(arguments, message):
    with pytest.raises(InputError, match=message):
        quantize_array(**{"values": np.ones((2, 3)), **arguments})


@pytest.mark.parametrize("block_size", [None, 32])
def test_scales_of_another_array_are_refused(block_size):
    for shape in ((1, 5), (7,), (3, 4)):
        with pytest.raises(InputError, match="`scales` expects"):
            dequantize(np.ones((7, 4), np.int8), np.ones(shape), block_size=block_size)


def test_arrays_are_quantised_without_tensorflow():
    code = (
        "import sys\n"
        "from gpt_tf.quantization.weights import dequantize, quantize_array\n"
        "dequantize(*quantize_array([1.0, 2.0]))\n"
        "sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# The strategies, each against a statement of its own in plain NumPy


def expected_weights(weights, strategy, bits):
    """Dequantised matrices in float64, from the definitions of the strategies."""
    top = 2 ** (bits - 1) - 1

    def around(values, mean, largest):
        step = largest / top
        return np.round((values - mean) / step) * step + mean

    def per_row(rows):
        return np.stack([around(row, 0.0, np.abs(row).max()) for row in rows])

    def of_blocks(rows):
        parts = [rows[:, i : i + 32] for i in range(0, rows.shape[1], 32)]
        return np.concatenate([per_row(part) for part in parts], axis=1)

    def by_output(values, name, quantize_rows):
        is_table = name.startswith(("embedding/", "head/"))
        return quantize_rows(values) if is_table else quantize_rows(values.T).T

    def together(names):
        everything = np.concatenate([weights[name].ravel() for name in names])
        mean = everything.mean()
        largest = np.abs(everything - mean).max()
        return {name: around(weights[name], mean, largest) for name in names}

    weights = {name: values.astype(np.float64) for name, values in weights.items()}
    if strategy == "global_mean":
        return together(weights)
    if strategy == "layer_mean":
        layers = {name.split("/")[0] for name in weights}
        found = {}
        for layer in layers:
            found.update(together([n for n in weights if n.startswith(f"{layer}/")]))
        return found
    if strategy == "per_tensor":
        return {n: around(w, 0.0, np.abs(w).max()) for n, w in weights.items()}
    rows = {"per_channel": per_row, "blockwise": of_blocks}[strategy]
    return {n: by_output(w, n, rows) for n, w in weights.items()}


def furthest(found, expected):
    """The largest share of values that differ by more than rounding of float32."""
    shares = []
    for name, values in expected.items():
        scale = np.abs(values).max()
        shares.append(np.mean(np.abs(found[name] - values) > 1e-5 * scale))
    return max(shares)


@pytest.mark.parametrize(("bits", "tied"), [(8, True), (4, False)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_does_what_its_definition_says(spread_model, strategy, bits, tied):
    # 40 wide, so that blocks of 32 are not the whole of a channel.
    model = spread_model(tie_embeddings=tied, embedding_dim=40, num_heads=4)
    weights = matrices_of(model)
    assert len(weights) == 10 + (not tied)
    quantized = quantize_weights(model, strategy, bits)
    found = matrices_of(quantized.model)
    # A value may lie on a border between two integers.
    assert furthest(found, expected_weights(weights, strategy, bits)) < 0.002
    for other in set(STRATEGIES) - {strategy}:
        assert furthest(found, expected_weights(weights, other, bits)) > 0.2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_integers_scales_and_offsets_are_the_models_weights(spread_model, strategy):
    quantized = quantize_weights(spread_model(), strategy, 8)
    found = matrices_of(quantized.model)
    assert {n: q.shape for n, q in quantized.integers.items()} == MATRICES
    for name, integers in quantized.integers.items():
        assert integers.dtype == np.int8
        scales, offset = quantized.scales[name], quantized.offsets[name]
        back = dequantize(integers, scales, offset, quantized.block_size)
        np.testing.assert_array_equal(back, found[name])
        assert bool(offset.any()) == (strategy in ("global_mean", "layer_mean"))


def test_a_mean_is_shared_by_the_model_or_by_a_layer(spread_model):
    model = spread_model()
    for strategy, count in (("global_mean", 1), ("layer_mean", 3)):
        quantized = quantize_weights(model, strategy)
        assert len({x.item() for x in quantized.offsets.values()}) == count
        assert len({x.item() for x in quantized.scales.values()}) == count


def test_a_table_has_a_scale_per_row_and_a_kernel_per_column(spread_model):
    model = spread_model(tie_embeddings=False)
    scales = quantize_weights(model, "per_channel").scales
    assert scales["embedding/token_table"].shape == (31, 1)
    assert scales["embedding/position_table"].shape == (16, 1)
    assert scales["head/kernel"].shape == (31, 1)
    assert scales["block_1/up_kernel"].shape == (1, 48)
    assert [channel_axis(name) for name in ("head/kernel", "block_1/up_kernel")] == [
        0,
        1,
    ]


# Models


def test_the_given_model_is_untouched(spread_model, windows_of):
    model = spread_model(dropout=0.1)
    tokens, _ = windows_of(2, 9)
    weights, logits = model.get_weights(), model(tokens).numpy()
    for strategy in STRATEGIES:
        quantized = quantize_weights(model, strategy, 4)
        for weight in quantized.model.weights:
            weight.assign(np.zeros(weight.shape, weight.dtype.as_numpy_dtype))
        for array in (*quantized.kept.values(), *quantized.scales.values()):
            array[...] = 0
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(model(tokens).numpy(), logits)


def test_vectors_are_kept_as_they_are(spread_model):
    model = spread_model(dropout=0.1)
    quantized = quantize_weights(model, bits=4)
    assert not set(quantized.kept) & set(quantized.integers)
    floats = [w for w in model.weights if w.dtype.is_floating]
    assert len(quantized.kept) + len(quantized.integers) == len(floats)
    for ours, theirs in zip(quantized.model.weights, model.weights, strict=True):
        if theirs.shape.rank != 2:
            np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    for name, values in quantized.kept.items():
        assert values.ndim == 1 and values.dtype == np.float32, name


def test_8_bits_change_the_logits_little_and_3_bits_much(spread_model, windows_of):
    model = spread_model()
    tokens, _ = windows_of(2, 9)
    logits = model(tokens).numpy()

    def change(bits):
        found = quantize_weights(model, bits=bits).model(tokens).numpy()
        return np.abs(found - logits).max() / np.abs(logits).max()

    assert 0 < change(8) < 0.03 < 0.1 < change(3)


def test_decibels_are_those_of_the_weights(spread_model):
    model = spread_model()
    quantized = quantize_weights(model, "layer_mean", 6)
    before, after = matrices_of(model), matrices_of(quantized.model)
    assert set(quantized.snr_db) == set(MATRICES)
    for name, decibels in quantized.snr_db.items():
        assert decibels == pytest.approx(snr_db(before[name], after[name]))
    whole = [np.concatenate([m[n].ravel() for n in MATRICES]) for m in (before, after)]
    assert quantized.overall_snr_db == pytest.approx(snr_db(*whole))


def test_a_bit_more_is_six_decibels_more(spread_model):
    model = spread_model()
    decibels = [quantize_weights(model, bits=b).overall_snr_db for b in (5, 6, 7, 8)]
    assert np.all(np.abs(np.diff(decibels) - 6.02) < 0.7)


@pytest.mark.parametrize(
    ("strategy", "bits", "constants"),
    [
        ("global_mean", 8, 2),
        ("layer_mean", 4, 6),
        ("per_tensor", 6, 10),
        ("per_channel", 8, 31 + 16 + 2 * (36 + 12 + 48 + 12)),
        ("blockwise", 4, 31 + 16 + 2 * (36 + 12 + 48 + 2 * 12)),
    ],
)
def test_bytes_count_packed_integers_and_shared_constants_once(
    spread_model, strategy, bits, constants
):
    quantized = quantize_weights(spread_model(), strategy, bits)
    matrices = sum(rows * columns for rows, columns in MATRICES.values())
    vectors = 2 * (4 * 12 + 36 + 12 + 48 + 12) + 2 * 12
    assert quantized.size_bytes == matrices * bits // 8 + 4 * (constants + vectors)


def test_weights_on_the_grid_are_exact_and_a_mean_of_zero_needs_no_byte(make_model):
    model = make_model()
    for weight in model.weights:
        if weight.shape.rank == 2:
            # Half of them 1, half of them -1: every matrix has an even number.
            weight.assign(np.resize([1.0, -1.0], weight.shape))
    quantized = quantize_weights(model, "global_mean", 2)
    assert not any(offset.any() for offset in quantized.offsets.values())
    assert quantized.overall_snr_db == np.inf
    vectors = 2 * (4 * 12 + 36 + 12 + 48 + 12) + 2 * 12
    matrices = sum(rows * columns for rows, columns in MATRICES.values())
    assert quantized.size_bytes == matrices * 2 // 8 + 4 * (1 + vectors)


def test_it_is_a_public_name():
    assert gpt_tf.quantize_weights is quantize_weights


@pytest.mark.parametrize(
    ("name", "value"),
    [("up_kernel", np.nan), ("down_kernel", np.inf), ("up_bias", -np.inf)],
)
def test_spoilt_weights_are_named(make_model, name, value):
    model = make_model()
    variable = getattr(model.get_layer("block_1"), name)
    values = variable.numpy()
    values.flat[3] = value
    variable.assign(values)
    with pytest.raises(
        InputError, match=f"1 of {values.size} values of block_1/{name}"
    ):
        quantize_weights(model)


def test_an_unknown_strategy_is_refused_with_the_known_ones(make_model):
    with pytest.raises(InputError, match=r"per_channel.*Received: 'per_row'"):
        quantize_weights(make_model(), "per_row")


def test_bits_out_of_range_are_refused_by_every_strategy(make_model):
    model = make_model()
    for strategy in STRATEGIES:
        with pytest.raises(InputError, match="from 2 to 8"):
            quantize_weights(model, strategy, 16)


def test_another_model_is_refused():
    with pytest.raises(
        InputTypeError, match=r"expects a GPTModel. Received: .*Sequent"
    ):
        quantize_weights(keras.Sequential())
