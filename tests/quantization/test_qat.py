import itertools

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from gpt_tf.export.tflite import export_tflite
from gpt_tf.models import cached_forward
from gpt_tf.models.language_model import NextTokenLoss
from gpt_tf.models.layers import TransformerBlock
from gpt_tf.models.precision import precision
from gpt_tf.parallel import data as strategies
from gpt_tf.quantization.calibration import NARROWEST, calibrate
from gpt_tf.quantization.config import QuantizationConfig
from gpt_tf.quantization.qat import (
    QuantizationAwareGPT,
    activation_ranges,
    quantize_aware,
    quantize_gpt_model,
    set_activation_ranges,
    to_float,
)
from gpt_tf.quantization.quantizers import moved
from gpt_tf.quantization.weights import quantize_weights

pytestmark = pytest.mark.usefixtures("eagerly")

# Ranges from the first batch on, so that training itself has to find them.
UNCALIBRATED = {"calibration_batches": 0, "freeze_ranges_at": 1.0}


@pytest.fixture
def make_aware(make_model):
    def make(config=None, **changes):
        return quantize_aware(make_model(**{"num_layers": 1, **changes}), config)

    return make


def largest_difference(one, other):
    return max(np.abs(a - b).max() for a, b in zip(one, other, strict=True))


def ranges_of(model):
    return np.array(list(activation_ranges(model).values()))


def sgd(learning_rate=0.1):
    return keras.optimizers.SGD(learning_rate)


# What is quantised


@pytest.mark.parametrize(
    ("bits", "strategy", "tied"), [(4, "per_channel", True), (8, "per_tensor", False)]
)
def test_the_weights_seen_are_those_of_the_integers(
    make_model, windows_of, bits, strategy, tied
):
    x, _ = windows_of(2, 8)
    model = make_model(num_layers=1, tie_embeddings=tied)
    config = QuantizationConfig(
        weight_bits=bits,
        per_channel=strategy == "per_channel",
        inputs="float32",
        outputs="float32",
    )
    seen = quantize_aware(model, config)(x).numpy()
    expected = quantize_weights(model, strategy, bits).model(x).numpy()
    np.testing.assert_allclose(seen, expected, atol=1e-6)
    assert np.abs(seen - model(x).numpy()).max() > 1e-4


def test_every_activation_is_quantised_on_its_own(make_model, windows_of):
    x, _ = windows_of(2, 8)
    model = make_model(num_layers=1)
    for weight in model.weights:
        if weight.shape.rank == 2:  # as initialised, scores are nearly 0
            weight.assign(5 * weight)
    aware = quantize_aware(model, QuantizationConfig.full(residual="int8"))
    # Without any range nothing is, but the probabilities, whose range is fixed.
    seen = [quantize_weights(model).model(x).numpy(), aware(x).numpy()]
    measured = calibrate(model, x)
    unknown = dict.fromkeys(measured, (0.0, 0.0))
    for name in measured.keys() - {"block_0/probabilities_activation"}:
        set_activation_ranges(aware, {**unknown, name: measured[name]})
        seen.append(aware(x).numpy())
    for one, other in itertools.combinations(seen, 2):
        assert 1e-4 < np.abs(one - other).max() < 0.05


# Training


@pytest.mark.parametrize("make_config", [QuantizationConfig, QuantizationConfig.full])
def test_fit_measures_every_range_and_trains_a_copy(
    make_model, windows_of, make_config
):
    x, y = windows_of(8, 8)
    model = make_model(num_layers=1, dropout=0.1)
    before = model.get_weights()
    config = make_config(freeze_ranges_at=0.0)
    aware = quantize_aware(model, config)
    assert largest_difference(to_float(aware).get_weights(), before) == 0
    aware.compile()
    aware.fit(x, y, verbose=0)
    assert largest_difference(model.get_weights(), before) == 0
    trained = to_float(aware)
    assert largest_difference(trained.get_weights(), before) > 1e-5
    assert trained.get_config() == model.get_config()

    measured = calibrate(model, x, dtype=config.dtype_of)  # before weights moved
    dtypes = {name: config.dtype_of(name.split("/")[1]) for name in measured}
    ranges = activation_ranges(aware)
    assert list(ranges) == [name for name in measured if dtypes[name] != "float32"]
    for name, range_ in ranges.items():
        np.testing.assert_allclose(range_, measured[name], rtol=1e-6)


def test_it_trains(make_aware, windows_of, traced):
    x, y = windows_of(8, 8)
    config = QuantizationConfig.full(freeze_ranges_at=1.0, ema_decay=0.5)
    aware = make_aware(config, dropout=0.1)
    aware.compile(optimizer=keras.optimizers.Adam(1e-2))
    losses = aware.fit(x, y, epochs=20, verbose=0).history["loss"]
    assert losses[-1] < losses[0] - 0.5


@pytest.fixture
def train(make_aware, windows_of):
    """Train from unknown ranges; return ranges and weights."""

    def run(replicas=1, trainer=None, weights=None, **options):
        x, y = windows_of(8 * 3, 8)
        strategies._use_fresh_collective_keys()
        devices = [f"CPU:{index}" for index in range(replicas)]
        with tf.distribute.MirroredStrategy(devices).scope():
            aware = make_aware(UNCALIBRATED)
            fitted = trainer(aware) if trainer else aware
            fitted.compile(optimizer=sgd(), **options)
        fitted.fit(x, y, sample_weight=weights, batch_size=8, shuffle=False, verbose=0)
        return ranges_of(aware), to_float(aware).get_weights()

    return run


ONE_ROW_LESS = np.ones((24, 8), "float32")
ONE_ROW_LESS[5] = 0.0  # it counts neither in the loss nor in ranges


@pytest.fixture
def alone(train):
    return train(weights=ONE_ROW_LESS)


@pytest.mark.parametrize(
    ("replicas", "options"),
    [
        pytest.param(2, {"jit_compile": True}, marks=pytest.mark.slow),
        pytest.param(4, {}, marks=pytest.mark.slow),
        (2, {"gradient_accumulation_steps": 3}),
        pytest.param(
            1,
            {"jit_compile": True, "gradient_accumulation_steps": 4},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_ranges_and_weights_do_not_depend_on_replicas_and_parts(
    alone, traced, train, make_model, replicas, options
):
    ranges, weights = alone
    assert (ranges[:, 0] < ranges[:, 1]).all()
    assert largest_difference(weights, make_model(num_layers=1).get_weights()) > 1e-3
    again = train(replicas, weights=ONE_ROW_LESS, **options)
    np.testing.assert_allclose(again[0], ranges, atol=1e-4)
    assert largest_difference(again[1], weights) < 1e-4


def test_the_comparison_of_ranges_notices_averaged_replicas(make_model, windows_of):
    # What TF-MOT does (issue 1068): the mean of what two replicas saw of a batch.
    x, _ = windows_of(8, 8)
    model = make_model(num_layers=1)
    halves = [
        np.array(list(calibrate(model, half).values())) for half in (x[:4], x[4:])
    ]
    whole = np.array(list(calibrate(model, x).values()))
    assert np.abs(np.mean(halves, axis=0) - whole).max() > 1e-3


class Trainer(keras.Model):
    """A custom `train_step` around a student, as distillation's is."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            logits = self.student(x, training=True)
            losses = self.compiled_loss._user_losses.call(y, logits)
            loss = tf.reduce_sum(losses) / (8 * 8)  # of the global batch
        variables = self.student.trainable_variables
        self.optimizer.apply_gradients(
            zip(tape.gradient(loss, variables), variables, strict=True)
        )
        return {"loss": loss}


@pytest.fixture
def by_fit(train):
    return train()


@pytest.mark.parametrize("replicas", [pytest.param(2, marks=pytest.mark.slow), 1])
def test_a_custom_train_step_gives_the_same_as_fit(by_fit, traced, train, replicas):
    ranges, weights = train(replicas, Trainer, loss=NextTokenLoss())
    np.testing.assert_allclose(ranges, by_fit[0], atol=1e-4)
    assert largest_difference(weights, by_fit[1]) < 1e-4


@pytest.mark.parametrize("index", range(4))
def test_kernels_are_read_before_any_activation_is_quantised(windows_of, index):
    # Another replica may put its own on the layer while this one waits.
    block = TransformerBlock(3, 20)
    x = np.random.default_rng(0).normal(size=(2, 4, 12)).astype("float32")
    block.build(tf.TensorShape([None, None, 12]))
    expected = block(x).numpy()
    kernel = ("qkv_kernel", "output_kernel", "up_kernel", "down_kernel")[index]
    spoilt = tf.zeros_like(getattr(block, kernel))

    def spoil(value):
        setattr(block, kernel, spoilt)
        return value

    block.attention_norm_activation = spoil
    np.testing.assert_array_equal(block(x), expected)
    assert np.abs(block(x) - expected).max() > 1e-4  # now it was there at the start


# How ranges move


def test_ranges_stand_still_from_their_share_of_the_steps_on(make_aware, windows_of):
    x, y = windows_of(12, 8)
    aware = make_aware({"freeze_ranges_at": 0.5, "ema_decay": 0.5})
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    aware.compile(optimizer=sgd(), loss=loss)  # one that is not the model's own
    course = []

    class Record(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            course.append(ranges_of(aware))

    aware.fit(x, y, batch_size=2, verbose=0, callbacks=[Record()])
    moves = [np.abs(a - b).max() for a, b in itertools.pairwise(course)]
    assert len(moves) == 5
    assert all(move > 0 for move in moves[:2])
    assert all(move == 0 for move in moves[2:])


def test_a_range_is_a_moving_average(make_aware, windows_of):
    x, y = windows_of(8, 8)
    aware = make_aware({**UNCALIBRATED, "ema_decay": 0.75})
    aware.compile(optimizer=sgd(0.0))
    name = "block_0/attention_norm_activation"
    aware.fit(x[:4], y[:4], verbose=0)
    first = activation_ranges(aware)[name]
    aware.fit(x[4:], y[4:], verbose=0)
    both = activation_ranges(aware)[name]
    rounded = quantize_weights(to_float(aware)).model  # its weights are the rounded
    halves = [calibrate(rounded, part)[name] for part in (x[:4], x[4:])]
    np.testing.assert_allclose(first, halves[0], atol=1e-5)
    expected = 0.75 * np.array(halves[0]) + 0.25 * np.array(halves[1])
    np.testing.assert_allclose(both, expected, atol=1e-5)
    assert np.abs(np.subtract(*halves)).max() > 1e-3


@pytest.mark.parametrize("compiled", [True, False])
def test_the_first_batch_that_is_not_0_decides_a_range_alone(compiled, traced):
    move = tf.function(moved, jit_compile=True) if compiled else moved
    batch, zeros = tf.constant([1.0, 3.0]), tf.constant([0.0, 0.0])
    unknown, narrowest, known = map(
        tf.constant, ([0.0, 0.0], [0.0, NARROWEST], [-1.0, 1.0])
    )
    np.testing.assert_array_equal(move(unknown, zeros, 0.99, True), narrowest)
    np.testing.assert_array_equal(move(unknown, batch, 0.99, True), [-1.0, 3.0])
    np.testing.assert_array_equal(move(narrowest, batch, 0.99, True), [-1.0, 3.0])
    np.testing.assert_allclose(move(known, batch, 0.99, True), [-1.0, 1.02], rtol=1e-6)
    np.testing.assert_array_equal(move(known, batch, 0.99, False), known)


def test_measuring_does_not_move_ranges(make_model, windows_of):
    x, y = windows_of(8, 8)
    aware = quantize_gpt_model(make_model(num_layers=1), x[:2])
    before = ranges_of(aware)
    aware.compile()
    aware.evaluate(x, y, verbose=0)
    aware.predict(x, verbose=0)
    aware(x)
    np.testing.assert_array_equal(ranges_of(aware), before)
    aware(x, training=True)
    assert np.abs(ranges_of(aware) - before).max() > 0


# A block that adds nothing

DEAD = "block_0/down_activation"


@pytest.fixture
def dead(make_model):
    """A model whose feed-forward part writes 0 to the residual."""
    model = make_model(num_layers=1)
    model.get_layer("block_0").down_kernel.assign(tf.zeros([48, 12]))
    return model


def test_a_range_that_is_always_0_is_told_from_one_not_measured(
    dead, windows_of, tmp_path
):
    x, y = windows_of(8, 8)
    aware = quantize_aware(dead)
    assert not aware.is_calibrated
    assert activation_ranges(aware)[DEAD] == (0.0, 0.0)
    aware.compile(optimizer=sgd(0.0))
    aware.fit(x, y, verbose=0)
    assert aware.is_calibrated
    assert activation_ranges(aware)[DEAD] == (0.0, NARROWEST)
    aware.save_weights(tmp_path / "weights.h5")
    again = QuantizationAwareGPT.from_config(aware.get_config())
    again.load_weights(tmp_path / "weights.h5")
    assert again.is_calibrated


def test_a_block_that_was_always_0_learns_like_any_other(dead, windows_of):
    x, y = windows_of(8, 8)
    aware = quantize_gpt_model(dead, x, {"freeze_ranges_at": 1.0})
    aware.compile(optimizer=sgd())
    aware.fit(x, y, epochs=2, batch_size=8, shuffle=False, verbose=0)
    # The first batch after the kernel has moved decides alone, not one part in 100.
    dead.compile(optimizer=sgd())
    dead.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    expected = calibrate(dead, x, method="minmax")[DEAD]
    np.testing.assert_allclose(activation_ranges(aware)[DEAD], expected, rtol=0.2)
    assert np.abs(to_float(aware).get_layer("block_0").down_kernel).max() > 0


def test_a_block_that_is_always_0_is_exported(dead, windows_of, tmp_path):
    x, _ = windows_of(8, 8)
    aware = quantize_gpt_model(dead, x)
    options = {"prefill_lengths": (1,), "verify_on": x[0], "allow_untrained": True}
    manifest = export_tflite(aware, tmp_path / "aware.tflite", "int8", **options)
    assert manifest["verification"]["top1_agreement"] > 0.9


# Precision


@pytest.mark.parametrize(
    "name", ["mixed_float16", pytest.param("mixed_bfloat16", marks=pytest.mark.slow)]
)
def test_a_16_bit_model_is_quantised_and_trained_in_float32(
    make_model, windows_of, name
):
    x, y = windows_of(8, 8)
    results = []
    for policy in ("float32", name):
        with precision(policy):
            aware = quantize_gpt_model(make_model(num_layers=1), x)
            aware.compile()
            aware.fit(x, y, shuffle=False, verbose=0)
            again = QuantizationAwareGPT.from_config(aware.get_config())
            again.set_weights(aware.get_weights())
            results += [aware, again, to_float(aware)]
        assert keras.mixed_precision.global_policy().name == "float32"
    for one, other in zip(results[:3], results[3:], strict=True):
        assert {layer.compute_dtype for layer in other.layers[1:]} == {"float32"}
        assert largest_difference(one.get_weights(), other.get_weights()) == 0
        np.testing.assert_array_equal(one(x), other(x))


# Saving, generating


def test_saved_and_loaded_it_goes_on_the_same(make_aware, windows_of, tmp_path):
    x, y = windows_of(8, 8)
    aware = make_aware()
    aware.compile()
    aware.fit(x, y, verbose=0)
    aware.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(again, QuantizationAwareGPT)
    assert again.quantization == aware.quantization
    assert activation_ranges(again) == activation_ranges(aware)
    np.testing.assert_array_equal(again(x), aware(x))
    for each in (aware, again):
        each.fit(x, y, verbose=0, shuffle=False)
    assert largest_difference(aware.get_weights(), again.get_weights()) < 1e-6


def test_cached_decoding_equals_the_full_forward_pass(make_model, windows_of):
    x, _ = windows_of(2, 8)
    aware = quantize_gpt_model(make_model(), x, QuantizationConfig.full())
    expected = aware(x).numpy()
    starts, caches = tf.zeros([2], tf.int32), cached_forward.empty_cache(aware, 2, 8)
    pieces = []
    for first, last in ((0, 5), (5, 6), (6, 7), (7, 8)):
        logits, caches = cached_forward.forward_cached(
            aware, x[:, first:last], first, starts, caches
        )
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, atol=1e-5)
    text = cached_forward.generate(aware, [1, 2], max_new_tokens=3, temperature=0)
    assert len(text) == 3
