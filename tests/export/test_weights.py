import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from gpt_tf.errors import InputError
from gpt_tf.export.constants import MODES
from gpt_tf.export.tflite_writer import Type
from gpt_tf.export.weights import constants_of, store
from gpt_tf.quantization import qat
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
    if matrix.kind == Type.INT4:
        scales = matrix.quant.scales.astype(np.float32)
        return unpacked(matrix) * np.repeat(scales, matrix.quant.block_size, axis=1)
    return matrix.values.astype(np.float32)


# Matrices


def test_int4_keeps_the_weights_that_a_model_was_trained_with_in_blocks(make_model):
    config = {"weight_bits": 4, "block_size": 32, "inputs": "float32"}
    model = make_model(num_layers=1, embedding_dim=64, num_heads=4)
    aware = qat.quantize_aware(model, {**config, "outputs": "float32"})
    rounded = qat.to_rounded(aware)
    x = np.arange(12).reshape(2, 6)
    np.testing.assert_allclose(aware(x), rounded(x), atol=1e-5)
    for gpt, is_kept in ((rounded, True), (qat.to_float(aware), False)):
        values = gpt.get_layer("block_0").up_kernel.numpy().T
        stored = real_numbers(store(values, "int4", "w"))
        trained = rounded.get_layer("block_0").up_kernel.numpy().T
        assert np.allclose(stored, trained, rtol=1e-3) == is_kept
    with pytest.raises(InputError, match="`block_size` expects a divisor of 64"):
        qat.quantize_aware(model, {**config, "block_size": 48})


@given(MATRICES)
def test_float_weights_are_stored_as_they_are_or_rounded_to_the_nearest(values):
    matrix = store(values, "float32", "w")
    assert (matrix.kind, matrix.quant) == (Type.FLOAT32, None)
    np.testing.assert_array_equal(matrix.values, values)
    matrix = store(values, "float16", "w")
    assert (matrix.kind, matrix.quant) == (Type.FLOAT16, None)
    error = np.abs(real_numbers(matrix) - values)
    assert (error <= np.maximum(np.abs(values) * 2**-11, 2**-25)).all()


@example(np.full((3, 64), 2**-23, np.float32))  # its scale rounds to 0
@example(np.zeros((3, 64), np.float32))
@given(MATRICES)
def test_int4_is_at_least_as_near_as_with_the_whole_range(values):
    matrix = store(values, "int4", "w")
    assert (matrix.kind, matrix.shape) == (Type.INT4, (3, 64))
    assert (matrix.values.dtype, matrix.values.size) == (np.uint8, 3 * 32)
    assert (matrix.quant.block_size, matrix.quant.scales.shape) == (32, (3, 2))
    assert matrix.quant.scales.dtype == np.float16
    assert np.abs(unpacked(matrix)).max() <= 7
    assert (matrix.quant.scales > 0).all()  # LiteRT refuses a scale of 0
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


@pytest.mark.parametrize("form", ["float16", "int4"])
def test_weights_beyond_float16_are_refused(form):
    store(np.full((1, 32), 65504, np.float32), form, "w")
    with pytest.raises(InputError, match=r"up to 65504.*7e\+04 in block_0/up_kernel"):
        store(np.full((1, 32), 70000, np.float32), form, "block_0/up_kernel")


def test_int4_refuses_widths_that_are_no_multiple_of_its_block():
    with pytest.raises(InputError, match=r"blocks of 32 .* 48 inputs"):
        store(np.ones((64, 48), np.float32), "int4", "block_0/up_kernel")


# A model's weights


@pytest.fixture(scope="module")
def untied(build_model):
    return build_model(num_layers=1, tie_embeddings=False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_of_the_model_is_stored_once_and_in_the_form_that_is_said(
    model, untied, mode, tied
):
    model = model if tied else untied
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


def test_a_broken_weight_is_named(build_model):
    model = build_model()
    for layer, name, value in (
        ("block_1", "up_kernel", np.nan),
        ("block_1", "up_kernel", -np.inf),
        ("final_norm", "gamma", np.inf),
    ):
        weight = getattr(model.get_layer(layer), name)
        kept = weight.numpy()
        weight.assign(np.where(np.arange(kept.shape[-1]) == 5, value, kept))
        with pytest.raises(InputError, match=f"NaN or infinity in {layer}/{name}"):
            constants_of(model, "dynamic_int8")
        weight.assign(kept)
