"""What TF-MOT is told about our layers: quantisers, one config for all, a scheme.

A range follows the extremes of the whole batch, as an exponential moving average.
TF-MOT's own quantisers average what each replica saw of it, so that ranges depend on
the number of replicas (its issue 1068); and they assign in the middle of the call,
where replicas take turns. Ours change nothing in a call that is made inside
`collecting()`: they hand over the extremes, to be compared over micro-batches and
replicas and taken once a step. In any other call for training they compare over the
replicas and assign at once, with the same result.
"""

import contextlib
import contextvars

import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras as keras
from tensorflow_model_optimization.python.core.quantization.keras import (
    quantize_registry,
    quantize_scheme,
)

from gpt_tf.errors import InputError
from gpt_tf.models import train_step
from gpt_tf.quantization.calibration import FIXED_RANGES, NARROWEST
from gpt_tf.quantization.config import QuantizationConfig
from gpt_tf.quantization.fake import fake_quantize, fake_quantize_weights
from gpt_tf.quantization.weights import channel_axis

_COLLECTOR = contextvars.ContextVar("collector", default=None)

_MATRICES = (
    *("token_table", "position_table", "kernel"),
    *("qkv_kernel", "output_kernel", "up_kernel", "down_kernel"),
)


@contextlib.contextmanager
def collecting(rows):
    """Collect the extremes of all activations that are quantised in this block.

    Args:
        rows: `(B,)` bool, which rows of the batch count.

    Yields:
        A dict, filled meanwhile, from quantiser to what `extremes_of` returns.
    """
    found = {}
    token = _COLLECTOR.set((rows, found))
    try:
        yield found
    finally:
        _COLLECTOR.reset(token)


def extremes_of(x, rows=None):
    """Return the negative minimum and the maximum of an activation.

    Args:
        x: Any shape whose first axis is `B` or `B * T`, in the order of the batch.
        rows: `(B,)` bool, which rows count; None counts all.

    Returns:
        `(2,)` float32, -infinity where no row counts.
    """
    x = tf.cast(tf.stop_gradient(x), tf.float32)
    if rows is None:
        return tf.stack([tf.reduce_max(-x), tf.reduce_max(x)])
    count = tf.size(rows)
    x = tf.reshape(x, [count, tf.size(x) // tf.maximum(count, 1)])
    low = tf.where(rows, tf.reduce_max(-x, axis=1), -float("inf"))
    high = tf.where(rows, tf.reduce_max(x, axis=1), -float("inf"))
    return tf.stack([tf.reduce_max(low), tf.reduce_max(high)])


def moved(old, extremes, decay, may_move):
    """Return a range after a batch.

    Args:
        old: `(2,)`, minimum and maximum; the narrowest, or both 0, before the first
            batch that is not 0 throughout, which then decides alone.
        extremes: `(2,)`, as from `extremes_of`, of the whole batch.
        decay: Share that the old range keeps.
        may_move: `()` bool.
    """
    seen = tf.reduce_all(tf.math.is_finite(extremes))
    new = tf.maximum(extremes, [0.0, NARROWEST]) * [-1.0, 1.0]
    known = old[1] - old[0] > NARROWEST
    averaged = tf.where(known, old + (1.0 - decay) * (new - old), new)
    return tf.where(tf.logical_and(seen, may_move), averaged, old)


class WeightQuantizer(tfmot.quantization.keras.quantizers.Quantizer):
    """Rounds a matrix to symmetric integers, per output channel or as a whole.

    Args:
        bits: 2 to 8.
        axis: Axis of the output channels, or None.
        block_size: As for `fake_quantize_weights`.
    """

    def __init__(self, bits, axis, block_size=None):
        self.bits = bits
        self.axis = axis
        self.block_size = block_size

    def build(self, tensor_shape, name, layer):
        return {}

    def __call__(self, inputs, training, weights, **kwargs):
        return fake_quantize_weights(inputs, self.bits, self.axis, self.block_size)

    def get_config(self):
        return {"bits": self.bits, "axis": self.axis, "block_size": self.block_size}


class ActivationQuantizer(tfmot.quantization.keras.quantizers.Quantizer):
    """Rounds an activation to integers of a range that it learns or that is fixed.

    Args:
        name: The activation's name in its layer.
        dtype: `"int8"` or `"int16"`.
        decay: Share that the range keeps when a batch has other extremes.
    """

    def __init__(self, name, dtype, decay):
        self.name = name
        self.dtype = dtype
        self.decay = decay
        self.fixed = FIXED_RANGES.get(name)
        if self.fixed and dtype == "int16":
            self.fixed = (0.0, 32767.0 / 32768.0)
        self.may_move = None  # set by the model: a function of nothing

    def build(self, tensor_shape, name, layer):
        if self.fixed:
            return {}
        range_ = layer.add_weight(
            f"{self.name}_range",
            shape=(2,),
            initializer="zeros",
            trainable=False,
            dtype=tf.float32,
            # Every replica keeps a copy and gives it the same values.
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )
        return {"range": range_}

    def __call__(self, inputs, training, weights, **kwargs):
        if self.fixed:
            low, high = map(tf.constant, self.fixed)
            return fake_quantize(inputs, low, high, self.dtype)
        low, high = tf.unstack(tf.convert_to_tensor(weights["range"]))
        if training:
            self._observe(inputs, weights["range"])
        return fake_quantize(inputs, low, high, self.dtype)

    def _observe(self, inputs, variable):
        collector = _COLLECTOR.get()
        if collector is not None:
            rows, found = collector
            found[self] = extremes_of(inputs, rows)
        elif tf.distribute.get_replica_context() is not None:
            may_move = True if self.may_move is None else self.may_move()
            extremes = train_step.max_over_replicas(extremes_of(inputs))
            self.take(variable, extremes, may_move)

    def take(self, variable, extremes, may_move):
        """Move the range after a batch of these extremes, inside a replica."""
        variable.assign(
            moved(tf.convert_to_tensor(variable), extremes, self.decay, may_move)
        )

    def get_config(self):
        return {"name": self.name, "dtype": self.dtype, "decay": self.decay}


class GPTQuantizeConfig(tfmot.quantization.keras.QuantizeConfig):
    """Tells TF-MOT what to quantise in any of a GPT's layers.

    Args:
        quantization: `QuantizationConfig` or a dict of its fields.
    """

    def __init__(self, quantization):
        self.quantization = QuantizationConfig.of(quantization)

    def _matrices(self, layer):
        return [name for name in _MATRICES if getattr(layer, name, None) is not None]

    def _activations(self, layer):
        dtype_of = self.quantization.dtype_of
        return [name for name in layer.ACTIVATIONS if dtype_of(name) != "float32"]

    def get_weights_and_quantizers(self, layer):
        found, wanted = [], self.quantization
        for name in self._matrices(layer):
            bits, block_size = wanted.weight_bits, wanted.block_size
            axis = channel_axis(f"{layer.name}/{name}")
            if block_size is not None and axis == 0:
                bits, block_size = 8, None  # a table, as in a file of mode int4
            axis = axis if wanted.per_channel else None
            weight = getattr(layer, name)
            if block_size is not None and weight.shape[0] % block_size:
                raise InputError(
                    f"`block_size` expects a divisor of {weight.shape[0]}, the inputs "
                    f"of {layer.name}/{name}. Received: {block_size}. Use another, or "
                    "None."
                )
            found.append((weight, WeightQuantizer(bits, axis, block_size)))
        return found

    def get_activations_and_quantizers(self, layer):
        found = []
        for name in self._activations(layer):
            dtype = self.quantization.dtype_of(name)
            quantizer = ActivationQuantizer(name, dtype, self.quantization.ema_decay)
            found.append((keras.activations.linear, quantizer))
        return found

    def set_quantize_weights(self, layer, quantize_weights):
        for name, weight in zip(self._matrices(layer), quantize_weights, strict=True):
            setattr(layer, name, weight)

    def set_quantize_activations(self, layer, quantize_activations):
        names = self._activations(layer)
        for name, activation in zip(names, quantize_activations, strict=True):
            setattr(layer, name, activation)

    def get_output_quantizers(self, layer):
        return []

    def get_config(self):
        return {"quantization": self.quantization.get_config()}


class Scheme(quantize_scheme.QuantizeScheme, quantize_registry.QuantizeRegistry):
    """A TF-MOT scheme that adds nothing to the layers' own configs.

    It is its own layout transform, which changes nothing where TF-MOT's puts a fake
    quantiser behind the token ids, and its own registry, which knows no layer.
    """

    def get_layout_transformer(self):
        return self

    def get_quantize_registry(self):
        return self

    def apply(self, model, layer_quantize_map):
        return model, layer_quantize_map

    def supports(self, layer):
        return False

    def get_quantize_config(self, layer):
        raise NotImplementedError(type(layer).__name__)
