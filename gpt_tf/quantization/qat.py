"""Quantisation-aware training: a GPT that learns to live with integers.

    quantize_aware(model) -> fit -> activation_ranges, to_float -> export

The model that `quantize_aware` returns is TF-MOT's: every layer in a wrapper that
rounds weights and activations to what integers can stand for. It is trained, saved
and loaded like the float one, on any number of replicas.

Whether it pays was measured on `saved_models/python-small`: 300 steps more, at a
twentieth of its learning rate, once in float32 and quantised after, once aware of it;
perplexity on 32,768 tokens it was not trained on, 16.30 in float32 after as many steps.

| | quantised after | trained aware of it |
|---|---|---|
| `QuantizationConfig()` | 16.35 | 16.36 |
| `QuantizationConfig.full()` | 16.42 | 16.41 |
| `QuantizationConfig(weight_bits=4)` | 18.14 | 17.02 |

At 8 bits calibration alone is as good here; at 4 bits training wins most of it back.
"""

import contextlib
import inspect

import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras as keras

from gpt_tf.models import train_step
from gpt_tf.models.gpt import CUSTOM_OBJECTS, GPTModel
from gpt_tf.models.language_model import LanguageModel, strategy_scope
from gpt_tf.models.optimizer import AdamW
from gpt_tf.models.precision import precision
from gpt_tf.quantization import calibration, quantizers
from gpt_tf.quantization.config import QuantizationConfig
from gpt_tf.settings import arguments

_NEVER = tf.int64.max


@keras.saving.register_keras_serializable(package="gpt_tf")
class QuantizationAwareGPT(LanguageModel):
    """A GPT in TF-MOT's wrappers, trained as a `GPTModel` is.

    Made by `quantize_aware`. A range moves with the extremes of every training
    batch, whatever calls the model with `training=True`: its own `fit`, or a custom
    `train_step` in which it is the student. It computes in float32 under any global
    policy: integers have finer steps than 16-bit floats.

    Args:
        gpt: Configuration of the `GPTModel`, as from its `get_config`.
        quantization: `QuantizationConfig`, or a dict of its fields.

    Call arguments:
        inputs: Token ids `(B, T)`, int32.

    Returns:
        Logits `(B, T, V)`, float32.
    """

    def __init__(self, gpt, quantization=None, name="quantized_gpt", **kwargs):
        quantization = QuantizationConfig.of(quantization)
        gpt = keras.saving.deserialize_keras_object(gpt)
        with precision("float32"):
            wrapped = _wrap(GPTModel.from_config(gpt), quantization)
            super().__init__(
                inputs=wrapped.inputs[0],
                outputs=wrapped.outputs[0],
                name=name,
                **kwargs,
            )
        self.__dict__["gpt"] = dict(gpt)  # which Keras would make unhashable
        self.quantization = quantization
        self.vocab_size = gpt["vocab_size"]
        self.context_length = gpt["context_length"]
        self._freeze_step = tf.Variable(
            _NEVER, trainable=False, dtype=tf.int64, name="freeze_step"
        )
        self._freeze_is_set = False
        self.__dict__["_ranges"] = {}  # in a plain dict, which Keras does not save
        for wrapper in self.layers[1:]:
            for activation in wrapper._quantize_activations:
                quantizer = activation.quantizer
                quantizer.may_move = self._ranges_may_move
                name = f"{wrapper.layer.name}/{quantizer.name}"
                variable = activation._post_activation_vars.get("range")
                self._ranges[name] = (quantizer, variable)

    def get_config(self):
        return {
            "gpt": dict(self.gpt),
            "quantization": self.quantization.get_config(),
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return cls(**config)

    # Training

    def compile(self, optimizer=None, *args, **kwargs):
        """Choose optimiser, loss and metrics, as `GPTModel.compile`.

        The default optimiser is AdamW at 3e-5, a tenth of what a new model is trained
        with, and without weight decay.
        """
        if optimizer is None:
            optimizer = AdamW(3e-5, weight_decay=0.0)
        super().compile(optimizer, *args, **kwargs)

    compile.__signature__ = inspect.signature(LanguageModel.compile)

    def prepare_fit(self, x, batch_size):
        """Measure the ranges where there are none, before weights move.

        They are calibrated on the first `calibration_batches` of the data. After the
        share `freeze_ranges_at` of the steps of this `fit` the ranges stay as they
        are, unless `freeze_ranges` has said when.
        """
        batches = self.quantization.calibration_batches
        can_be_read_twice = isinstance(x, (list, tuple, dict, tf.data.Dataset)) or (
            hasattr(x, "shape")
        )
        if isinstance(x, tf.data.Dataset):
            x = x.map(lambda inputs, *others: self.tokens_of(inputs))
        else:
            x = self.tokens_of(x)
        if batches and can_be_read_twice and not self.is_calibrated:
            self.calibrate(x, batch_size=batch_size, num_batches=batches)
        return [_FreezeRanges(self)]

    def calibrate(self, inputs, *, batch_size=8, num_batches=None):
        """Measure all ranges anew, as `gpt_tf.calibrate`, by the float weights."""
        ranges = calibration.calibrate(
            to_float(self),
            inputs,
            batch_size=batch_size,
            num_batches=num_batches,
            method=self.quantization.calibration_method,
            dtype=self.quantization.dtype_of,
        )
        set_activation_ranges(self, ranges)

    @property
    def is_calibrated(self):
        """Whether every range has been measured."""
        return all(low < high for low, high in activation_ranges(self).values())

    def freeze_ranges(self, step=0):
        """Let ranges move until a step of the optimiser; None: for ever."""
        self._freeze_step.assign(_NEVER if step is None else step)
        self._freeze_is_set = True

    def count_steps_of(self, optimizer):
        """Take the steps of another optimiser for one's own, as a student does."""
        self.__dict__["_counted"] = optimizer

    def _ranges_may_move(self):
        optimizer = getattr(self, "_counted", None) or getattr(self, "optimizer", None)
        done = tf.constant(0, tf.int64) if optimizer is None else optimizer.iterations
        return done < self._freeze_step

    @property
    def observed_shape(self):
        return (len(self._moving()), 2)

    @contextlib.contextmanager
    def observing(self, rows):
        with quantizers.collecting(rows) as found:
            yield lambda: tf.stack([found[q] for q, _ in self._moving()])

    def update_observers(self, observed):
        may_move = self._ranges_may_move()
        extremes = train_step.max_over_replicas(observed)
        for (quantizer, variable), extreme in zip(
            self._moving(), tf.unstack(extremes), strict=True
        ):
            quantizer.take(variable, extreme, may_move)

    def _moving(self):
        return [(q, v) for q, v in self._ranges.values() if v is not None]


class _FreezeRanges(keras.callbacks.Callback):
    """Tell the model when to freeze, once the number of steps is known."""

    def __init__(self, quantized):
        super().__init__()
        self.quantized = quantized

    def on_train_begin(self, logs=None):
        model, params = self.quantized, self.params
        if model._freeze_is_set or not params.get("steps"):
            return
        share = model.quantization.freeze_ranges_at
        steps = int(share * params["epochs"] * params["steps"])
        begun = int(self.model.optimizer.iterations.numpy())
        model._freeze_step.assign(_NEVER if share == 1 else begun + steps)


@tf.autograph.experimental.do_not_convert  # a third of its time, and for nothing
def _wrap(gpt, quantization):
    """Let TF-MOT wrap the layers of a GPT; they keep their weights."""

    def annotate(layer):
        return tfmot.quantization.keras.quantize_annotate_layer(
            layer, quantizers.GPTQuantizeConfig(quantization)
        )

    scope = {**CUSTOM_OBJECTS, "GPTQuantizeConfig": quantizers.GPTQuantizeConfig}
    with tfmot.quantization.keras.quantize_scope(scope):
        # Its own class is not needed further, and TF-MOT would not keep it.
        annotated = keras.models.clone_model(
            keras.Model(gpt.inputs, gpt.outputs), clone_function=annotate
        )
        return tfmot.quantization.keras.quantize_apply(
            annotated, scheme=quantizers.Scheme()
        )


# HDF5 files and `to_json` name a model by its plain class.
keras.saving.get_custom_objects()["QuantizationAwareGPT"] = QuantizationAwareGPT


def quantize_aware(model, config=None):
    """Make of a float GPT one that expects to be quantised, to be trained further.

    Args:
        model: A `GPTModel`, trained as a rule and in any precision; it is not changed.
        config: `QuantizationConfig`, a dict of its fields, or None for the default.

    Returns:
        A `QuantizationAwareGPT` with a copy of the weights, in float32. Its ranges
        are not known yet: `fit` calibrates them first. It is not compiled; a twentieth
        of the float training's learning rate, falling to 0, is a good start, and what
        `gpt_tf.training.loop.quantize` takes.

    Raises:
        InputError: The model is no float GPTModel, or the configuration is none.

    Example:
        >>> aware = quantize_aware(model)
        >>> aware.fit(inputs, labels, epochs=2)
        >>> ranges = activation_ranges(aware)

    Reference: Jacob et al., arXiv:1712.05877; article 3.2.
    """
    calibration.check_float(model, "quantize_aware")
    with strategy_scope(model):
        aware = QuantizationAwareGPT(model.get_config(), config)
        for ours, theirs in _pairs(aware, model):
            ours.assign(tf.cast(theirs, ours.dtype))
    return aware


def quantize_gpt_model(gpt_model, inputs, config=None):
    """Quantise a GPT: fake-quantised weights, and ranges measured on data.

    What comes back computes with the numbers that integers stand for, so `evaluate`
    tells what quantisation costs, `fit` wins some of it back, and it can be exported.

    Args:
        gpt_model: A `GPTModel`, trained; it is not changed.
        inputs: Data like that which the model will meet, as for `calibrate`: token
            ids `(N, T)` or batches of them.
        config: As for `quantize_aware`.

    Returns:
        A `QuantizationAwareGPT` that is calibrated.

    Raises:
        InputError: There is no data, or as for `quantize_aware`.

    Example:
        >>> quantized = quantize_gpt_model(gpt_model, inputs)
        >>> quantized.is_calibrated
        True

    Reference: article 3.2, the snippet of this name.
    """
    aware = quantize_aware(gpt_model, config)
    aware.calibrate(inputs)
    return aware


def activation_ranges(model):
    """Return the ranges of all quantised activations.

    Args:
        model: A `QuantizationAwareGPT`.

    Returns:
        A dict as from `calibrate`; both ends are 0.0 where nothing was measured yet.
    """
    _check_aware(model)
    return {
        name: quantizer.fixed or tuple(float(v) for v in variable.numpy())
        for name, (quantizer, variable) in model._ranges.items()
    }


def set_activation_ranges(model, ranges):
    """Give a quantisation-aware model ranges that were measured, as by `calibrate`."""
    for name, (_, variable) in model._ranges.items():
        if variable is not None:
            variable.assign(ranges[name])


def to_float(model):
    """Return the float model inside a quantisation-aware one.

    Args:
        model: A `QuantizationAwareGPT`; it is not changed.

    Returns:
        A `GPTModel` with a copy of the trained weights, not quantised, in float32.
    """
    _check_aware(model)
    with strategy_scope(model), precision("float32"):
        gpt = GPTModel.from_config(model.gpt)
        for theirs, ours in _pairs(model, gpt):
            ours.assign(theirs)
    return gpt


def to_rounded(model):
    """Return the float model inside a quantisation-aware one, its weights rounded.

    Args:
        model: A `QuantizationAwareGPT`; it is not changed.

    Returns:
        A `GPTModel` in float32, whose weights are what integers stand for.
    """
    gpt = to_float(model)
    config = quantizers.GPTQuantizeConfig(model.quantization)
    for layer in gpt.layers[1:]:
        for weight, quantizer in config.get_weights_and_quantizers(layer):
            weight.assign(quantizer(weight, False, {}))
    return gpt


def _pairs(aware, gpt):
    """Yield each float variable of a quantisation-aware model and its twin in a GPT."""
    for wrapper in aware.layers[1:]:
        # The layer's own attributes are quantised tensors once TF-MOT has called it.
        # The wrapper took the layer's trainable weights first, in their order.
        trainable = {id(v): v for v in wrapper._trainable_weights}.values()
        variables = [*trainable, *wrapper.layer.non_trainable_weights]
        twins = gpt.get_layer(wrapper.layer.name).weights
        yield from zip(variables, twins, strict=True)


def _check_aware(model):
    expected = "a model that `quantize_aware` made"
    arguments.instance("model", model, QuantizationAwareGPT, expected)
