import numpy as np
import pytest

from gpt_tf.errors import InputError
from gpt_tf.export.weights import constants_of
from gpt_tf.quantization import gptq
from gpt_tf.quantization.weights import dequantize, quantize_array

pytestmark = pytest.mark.usefixtures("eagerly")


def correlated(rows=2000, channels=160, seed=0):
    draw = np.random.default_rng(seed)
    mixed = draw.normal(size=(rows, channels)) @ draw.normal(size=(channels,) * 2)
    mixed[:, 3] *= 50
    mixed[:, 7] = 0
    return mixed.astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [None, 32])
def test_products_of_correlated_channels_err_less(bits, block_size):
    x = correlated()
    values = np.random.default_rng(1).normal(size=(48, 160)).astype(np.float32)
    nearest, scales = quantize_array(values, bits, 0, block_size)
    spread = np.repeat(scales, block_size or 1, axis=1)
    limit = 2 ** (bits - 1) - 1
    found = gptq.round_weights(values, spread, limit, x.T @ x)
    assert found.dtype == np.int8 and np.abs(found).max() <= limit

    def error(integers):
        kept = dequantize(integers, scales, block_size=block_size)
        return np.square(x @ (kept - values).T).mean()

    assert error(found) < 0.6 * error(nearest)
    # Text that it has not seen, of the same kind.
    x = correlated(seed=0)[:500]
    assert error(found) < 0.6 * error(nearest)


def test_channels_that_have_nothing_in_common_are_rounded_to_the_nearest():
    values = np.random.default_rng(1).normal(size=(8, 200)).astype(np.float32)
    nearest, scales = quantize_array(values, 8, axis=0)
    moments = np.diag(np.random.default_rng(2).uniform(0, 9, 200)).astype(np.float32)
    moments[5] = 0
    found = gptq.round_weights(values, scales, 127, moments)
    np.testing.assert_array_equal(found, nearest)


def test_moments_are_those_of_what_each_kernel_reads(make_model, windows_of):
    model, ids = make_model(), windows_of(5, 8)[0]
    moments = gptq.moments_of(model, ids, batch_size=2)
    x = model.get_layer("embedding")(ids)[0].numpy()  # (5, 8, C)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(
        x.var(-1, keepdims=True) + model.layer_norm_epsilon
    )
    normed = normed.reshape(40, -1)
    np.testing.assert_allclose(
        moments["block_0/qkv_kernel"], normed.T @ normed, rtol=1e-4, atol=1e-3
    )
    shapes = {name: found.shape[0] for name, found in moments.items()}
    kernels = {
        f"{layer.name}/{name}": getattr(layer, name).shape[0]
        for layer in model.layers
        for name in getattr(layer, "weight_names", ())
        if name.endswith("_kernel")
    }
    assert shapes == {**kernels, "head/kernel": 12}
    with pytest.raises(InputError, match="some text"):
        gptq.moments_of(model, ids[:0])


@pytest.mark.parametrize("mode", ["dynamic_int8", "int8", "int4"])
def test_an_export_holds_the_integers_that_gptq_chose(make_model, windows_of, mode):
    sizes = {"embedding_dim": 32, "num_heads": 4, "feedforward_dim": 64}
    model, ids = make_model(**sizes), windows_of(8, 16)[0]
    moments = gptq.moments_of(model, ids)
    plain, better = (
        constants_of(model, mode, moments=given).matrices for given in (None, moments)
    )
    for name, matrix in better.items():
        np.testing.assert_array_equal(matrix.quant.scales, plain[name].quant.scales)
        is_kernel = name.endswith("_kernel")
        assert np.any(matrix.values != plain[name].values) == is_kernel, name
    if mode == "int4":
        return
    values = model.get_layer("block_1").up_kernel.numpy().T
    scales = plain["block_1/up_kernel"].quant.scales[:, None]
    np.testing.assert_array_equal(
        better["block_1/up_kernel"].values,
        gptq.round_weights(values, scales, 127, moments["block_1/up_kernel"]),
    )
