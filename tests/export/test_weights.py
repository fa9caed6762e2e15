import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from gpt_tf.errors import InputError
from gpt_tf.export.constants import MODES
from gpt_tf.export.tflite_writer import Type
from gpt_tf.export.weights import constants_of, store
from gpt_tf.quantization.weights import quantize_array

FINITE = st.floats(-1e3, 1e3, width=32)
MATRICES = nps.arrays(np.float32, (3, 64), elements=FINITE)


def unpacked(matrix):
    """int4 integers `(rows, width)`, read as the format has them: low half first."""
    values = np.stack([matrix.values & 15, matrix.values >> 4], axis=1).reshape(-1)
    signed = values.astype(np.int8)
    signed[signed > 7] -= 16
    return signed.reshape(matrix.shape)


def real_numbers(matrix):
    if matrix.kind == Type.INT8:
        return matrix.values * matrix.quant.scales[:, None]
    if matrix.kind == Type.INT4:
        scales = matrix.quant.scales.astype(np.float32)
        return unpacked(matrix) * np.repeat(scales, matrix.quant.block_size, axis=1)
    return matrix.values.astype(np.float32)


# Matrices


@given(MATRICES)
def test_float_weights_are_stored_as_they_are_or_rounded_to_the_nearest(values):
    matrix = store(values, "float32", "w")
    assert (matrix.kind, matrix.quant) == (Type.FLOAT32, None)
    np.testing.assert_array_equal(matrix.values, values)
    matrix = store(values, "float16", "w")
    assert (matrix.kind, matrix.quant) == (Type.FLOAT16, None)
    error = np.abs(real_numbers(matrix) - values)
    assert (error <= np.maximum(np.abs(values) * 2**-11, 2**-25)).all()


@given(MATRICES)
def test_int8_is_that_of_quantize_array_exactly(values):
    matrix = store(values, "int8", "w")
    integers, scales = quantize_array(values, 8, axis=0)
    assert (matrix.kind, matrix.quant.axis) == (Type.INT8, 0)
    np.testing.assert_array_equal(matrix.values, integers)
    np.testing.assert_array_equal(matrix.quant.scales, scales[:, 0])
    assert not matrix.quant.zero_points.any()


@example(np.full((3, 64), 2**-23, np.float32))  # its scale rounds to 0
@given(MATRICES)
def test_int4_is_at_least_as_near_as_with_the_whole_range(values):
    matrix = store(values, "int4", "w")
    assert (matrix.kind, matrix.shape) == (Type.INT4, (3, 64))
    assert (matrix.values.dtype, matrix.values.size) == (np.uint8, 3 * 32)
    assert (matrix.quant.block_size, matrix.quant.scales.shape) == (32, (3, 2))
    assert matrix.quant.scales.dtype == np.float16
    assert np.abs(unpacked(matrix)).max() <= 7
    largest = np.repeat(np.abs(values.reshape(3, 2, 32)).max(axis=2), 32, axis=1)
    plain = np.clip(np.rint(values * 7 / np.where(largest == 0, 1, largest)), -7, 7)
    errors = [
        ((approximation - values) ** 2).reshape(3, 2, 32).sum(axis=2)
        for approximation in (real_numbers(matrix), plain * largest / 7)
    ]
    # The scale itself is rounded to float16, whose smallest step is 2**-24: seven
    # steps, rounded by so much, add to each of a block's 32 errors.
    rounding = 7 * 2**-25 + largest[:, ::32] * (2**-11 + 2**-20)
    bound = np.sqrt(errors[1]) + np.sqrt(32) * rounding
    assert (np.sqrt(errors[0]) <= bound).all()


def test_int4_errs_by_at_most_half_a_step_where_nothing_is_cut_off():
    values = np.random.default_rng(2).uniform(-1, 1, (8, 320)).astype(np.float32)
    values[:, ::5] = np.sign(values[:, ::5])  # so that cutting off does not pay
    matrix = store(values, "int4", "w")
    steps = np.repeat(matrix.quant.scales.astype(np.float32), 32, axis=1)
    kept = np.abs(values) <= 7 * steps
    assert kept.mean() > 0.7
    errors = np.abs(real_numbers(matrix) - values)
    assert (errors[kept] <= steps[kept] * 0.5001).all()


def test_the_first_of_two_int4_lies_in_the_low_half():
    values = np.zeros((1, 32), np.float32)
    values[0, :4] = [7, -7, 1, 2]
    matrix = store(values, "int4", "w")
    assert matrix.values[:2].tolist() == [0x97, 0x21]
    np.testing.assert_array_equal(real_numbers(matrix), values)


def test_a_block_of_zeros_stays_zero():
    values = np.zeros((2, 64), np.float32)
    values[0, 0] = 3
    for form in ("int8", "int4"):
        np.testing.assert_allclose(
            real_numbers(store(values, form, "w")), values, rtol=1e-3
        )
    # LiteRT refuses a scale of 0.
    assert (store(values, "int4", "w").quant.scales > 0).all()


@pytest.mark.parametrize(
    ("form", "size"),
    [
        ("float32", 3 * 64 * 4),
        ("float16", 3 * 64 * 2),
        ("int8", 3 * 64 + 3 * 4),
        ("int4", 3 * 32 + 3 * 2 * 2),
    ],
)
def test_the_size_counts_numbers_and_scales_and_what_is_not_finite_is_refused(
    form, size
):
    values = np.ones((3, 64), np.float32)
    assert store(values, form, "w").size_bytes == size
    for value in (np.nan, np.inf, -np.inf):
        values[1, 3] = value
        with pytest.raises(InputError, match=r"NaN or infinity in block_7/up_kernel"):
            store(values, form, "block_7/up_kernel")


@pytest.mark.parametrize("form", ["float16", "int4"])
def test_weights_beyond_float16_are_refused(form):
    store(np.full((1, 32), 65504, np.float32), form, "w")
    with pytest.raises(InputError, match=r"up to 65504.*7e\+04 in block_0/up_kernel"):
        store(np.full((1, 32), 70000, np.float32), form, "block_0/up_kernel")


def test_int4_refuses_widths_that_are_no_multiple_of_its_block():
    with pytest.raises(InputError, match=r"blocks of 32 .* 48 inputs"):
        store(np.ones((64, 48), np.float32), "int4", "block_0/up_kernel")


# A model's weights


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_of_the_model_is_stored_once_and_in_the_form_that_is_said(
    build_model, mode, tied
):
    model = build_model(tie_embeddings=tied)
    constants = constants_of(model, mode, {})
    count = sum(np.prod(m.shape, dtype=int) for m in constants.matrices.values())
    count += sum(vector.size for vector in constants.vectors.values())
    assert count == model.count_params()
    assert ("head/kernel" in constants.matrices) == (not tied)
    kinds = {"float32": Type.FLOAT32, "float16": Type.FLOAT16, "int4": Type.INT4}
    for name, matrix in constants.matrices.items():
        is_table = name.startswith(("embedding", "head"))
        is_int8 = is_table and mode == "int4"
        assert matrix.kind == (Type.INT8 if is_int8 else kinds.get(mode, Type.INT8))


def whole(constants, name):
    """A kernel and its bias, of which the QKV product's may be stored in three."""
    pieces = [name]
    if f"{name}_kernel" not in constants.matrices:
        block = name.rpartition("/")[0]
        pieces = [f"{block}/{piece}" for piece in ("query", "key", "value")]
    return [
        np.concatenate(parts)
        for parts in (
            [real_numbers(constants.matrices[f"{piece}_kernel"]) for piece in pieces],
            [constants.vectors[f"{piece}_bias"] for piece in pieces],
        )
    ]


@pytest.mark.parametrize(
    ("mode", "most"), [("float32", 1e-7), ("dynamic_int8", 2e-3), ("int8", 2e-3)]
)
def test_kernels_lie_as_outputs_by_inputs_and_the_queries_are_scaled(model, mode, most):
    constants = constants_of(model, mode, {})
    block = model.get_layer("block_1")
    factors = np.ones((96, 1), np.float32)
    factors[:32] = 8**-0.5  # the head width is 32 / 4
    for name in ("qkv", "output", "up", "down"):
        kernel, bias = whole(constants, f"block_1/{name}")
        factor = factors if name == "qkv" else np.ones((len(bias), 1), np.float32)
        expected = getattr(block, f"{name}_kernel").numpy().T * factor
        assert np.abs(kernel - expected).max() <= most
        assert np.abs(kernel - 1.1 * expected).max() > most
        expected = getattr(block, f"{name}_bias").numpy() * factor[:, 0]
        np.testing.assert_allclose(bias, expected, rtol=1e-6)


@pytest.mark.parametrize("mode", ["dynamic_int8", "int8", "int16x8"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_the_integers_are_those_of_the_models_own_kernel(model, mode, per_channel):
    constants = constants_of(model, mode, {}, per_channel)
    kernel = model.get_layer("block_0").qkv_kernel.numpy().T
    integers, scales = quantize_array(kernel, 8, axis=0 if per_channel else None)
    scales = np.broadcast_to(scales.reshape(-1), (96,))
    factors = np.ones(96, np.float32)
    factors[:32] /= np.sqrt(8)
    pieces = ("query", "key", "value")
    if mode == "dynamic_int8" and per_channel:
        pieces = ("qkv",)
    found = [constants.matrices[f"block_0/{piece}_kernel"] for piece in pieces]
    np.testing.assert_array_equal(np.concatenate([m.values for m in found]), integers)
    kept = [np.broadcast_to(m.quant.scales, len(m.values)) for m in found]
    np.testing.assert_allclose(np.concatenate(kept), scales * factors, rtol=1e-6)


def test_one_scale_per_matrix_where_channels_are_not_told_apart(model):
    constants = constants_of(model, "dynamic_int8", per_channel=False)
    for matrix in constants.matrices.values():
        assert len(matrix.quant.scales) == 1
    table = model.get_layer("embedding").token_table.numpy()
    integers, scales = quantize_array(table)
    found = constants.matrices["embedding/token_table"]
    np.testing.assert_array_equal(found.values, integers)
    assert found.quant.scales.tolist() == scales.reshape(-1).tolist()


def test_a_broken_weight_is_named(build_model):
    model = build_model()
    for layer, name in (("block_1", "up_kernel"), ("final_norm", "gamma")):
        weight = getattr(model.get_layer(layer), name)
        kept = weight.numpy()
        weight.assign(np.where(np.arange(kept.shape[-1]) == 5, np.nan, kept))
        with pytest.raises(InputError, match=f"NaN or infinity in {layer}/{name}"):
            constants_of(model, "dynamic_int8")
        weight.assign(kept)
