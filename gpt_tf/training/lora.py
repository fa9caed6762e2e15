"""LoRA: a GPT whose weights stay, and small matrices beside them that learn.

Beside the kernel `W (inputs, outputs)` of every product of a block stand
`A (inputs, r)` and `B (r, outputs)`: the product with `W + alpha / r * A B` is computed
without that sum. `B` is 0 at first, so training starts at the model as it is. `merged`
returns a plain `GPTModel` with the sums.

`W` has no gradient, so it may be kept in int8, a scale per output: a quarter of the
memory. Training then starts at the model with its kernels rounded.
"""

import functools

import tensorflow as tf
import tf_keras as keras

from gpt_tf.models import ops
from gpt_tf.models.block import Products
from gpt_tf.models.cached_forward import parts_of
from gpt_tf.models.gpt import GPTModel
from gpt_tf.models.language_model import LanguageModel, strategy_scope
from gpt_tf.models.layers import Dropout
from gpt_tf.pretrained.adapter import fingerprint_of
from gpt_tf.pretrained.build import variables_of
from gpt_tf.quantization.weights import quantize_array
from gpt_tf.settings import arguments
from gpt_tf.training.config import LoraConfig

KERNELS = ("qkv_kernel", "output_kernel", "up_kernel", "down_kernel")


class LoraGPT(LanguageModel):
    """A GPT that is trained by adapters of its products alone.

    Its weights are those of the adapters and the random state of dropout; the model
    it was made of keeps its own, and is not to be used beside it. It is saved as what
    `merged` returns.

    Args:
        gpt: The `GPTModel` to adapt.
        lora: `LoraConfig`, or a dict of its fields.

    Attributes:
        adapters: `(A, B)` by the names of kernels, `"block_0/qkv_kernel"` for example.
        scales: Those of kernels that are kept in int8, `(1, outputs)`, by their names.
        base_fingerprint: A hash of the model's weights before any was rounded.

    Call arguments:
        inputs: Token ids `(B, T)`, int32.

    Returns:
        Logits `(B, T, V)`, float32.

    Example:
        >>> lora = LoraGPT(model, {"rank": 8})
        >>> lora.fit(inputs, labels)
        >>> lora.merged().save("fitted.keras")

    Reference: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models",
    arXiv:2106.09685.
    """

    def __init__(self, gpt, lora=None, name="lora_gpt"):
        check_adaptable(gpt)
        super().__init__(inputs=gpt.inputs[0], outputs=gpt.outputs[0], name=name)
        self.lora = LoraConfig.of(lora)
        self.vocab_size, self.context_length = gpt.vocab_size, gpt.context_length
        self.__dict__["gpt"] = gpt  # Keras would track it, and so the frozen weights
        self.__dict__["base_fingerprint"] = fingerprint_of(gpt)
        self.__dict__["adapters"] = {}
        self.__dict__["scales"] = {}
        for block in parts_of(self).blocks:
            own = {kernel: self._adapter(block, kernel) for kernel in KERNELS}
            scales = {}
            if self.lora.base == "int8":
                scales = {kernel: _round(block, kernel) for kernel in KERNELS}
            block.products = functools.partial(
                _AdaptedProducts, own, scales, self.lora.scale
            )
            self.adapters.update({f"{block.name}/{k}": pair for k, pair in own.items()})
            self.scales.update({f"{block.name}/{k}": s for k, s in scales.items()})

    def _adapter(self, block, kernel):
        rows, columns = getattr(block, kernel).shape
        name, rank = f"{block.name}_{kernel}", self.lora.rank
        limit = rows**-0.5  # PEFT's, of Kaiming's with a slope of sqrt(5)
        init = keras.initializers.RandomUniform(-limit, limit)
        return (
            self.add_weight(f"{name}_a", (rows, rank), initializer=init),
            self.add_weight(f"{name}_b", (rank, columns), initializer="zeros"),
        )

    @property
    def trainable_weights(self):
        return [matrix for pair in self.adapters.values() for matrix in pair]

    @property
    def non_trainable_weights(self):
        layers = self._flatten_layers()
        return [w for x in layers if isinstance(x, Dropout) for w in x.weights]

    @property
    def weights(self):
        return self.trainable_weights + self.non_trainable_weights

    def get_config(self):
        return {"gpt": self.gpt.get_config(), "lora": self.lora.get_config()}

    def merged(self) -> GPTModel:
        """Return a `GPTModel` that computes the same, with the adapters added in."""
        with strategy_scope(self):
            merged = GPTModel.from_config(self.gpt.get_config())
        own = variables_of(self.gpt)
        for name, variable in variables_of(merged).items():
            value = _floats(tf.convert_to_tensor(own[name]), self.scales.get(name))
            if name in self.adapters:
                a, b = self.adapters[name]
                value += self.lora.scale * tf.matmul(a, b)
            variable.assign(value)
        return merged


def check_adaptable(model):
    """Refuse a model that adapters cannot stand beside.

    Raises:
        InputError: It is no float GPTModel.
    """
    expected = "a float GPTModel; quantise it after it was fine-tuned"
    arguments.instance("lora", model, GPTModel, expected)


def _round(block, name):
    """Put integers in place of a block's kernel; return their scales."""
    integers, scales = quantize_array(getattr(block, name), axis=1, name=name)
    delattr(block, name)  # and its memory
    kernel = block.add_weight(name, integers.shape, "int8", "zeros", trainable=False)
    kernel.assign(integers)
    setattr(block, name, kernel)
    return scales


def _floats(kernel, scales):
    return kernel if scales is None else tf.cast(kernel, tf.float32) * scales


class _AdaptedProducts(Products):
    """The products of a block whose kernels stay, with what its adapters add."""

    def __init__(self, adapters, scales, factor, *block):
        super().__init__(*block)
        self.adapters, self.scales, self.factor = adapters, scales, factor

    def product(self, name, x):
        a, b = map(tf.convert_to_tensor, self.adapters[name])
        low = tf.matmul(x, self.factor * a)
        return _adapted(x, low, b, self.weights[name], self.scales.get(name))


def _adapted(x, low, b, kernel, scales):
    """Return `x W + low B` as one product of what stands side by side.

    Of a sum XLA would store both summands for the gradient. `W` has no gradient, and
    where it is integers, its floats are made again for that of `x`.

    Args:
        x: `(N, F)`.
        low: `(N, r)`.
        b: `(r, C)`.
        kernel: `W (F, C)`, floats or int8.
        scales: `(1, C)` of integers, None for floats.
    """

    def floats_for(y):
        integers = kernel if scales is None else ops.again(kernel, y)
        return tf.cast(_floats(integers, scales), y.dtype)

    @ops.custom_gradient
    def multiply(x, low, b):
        def gradient(dy):
            return (
                tf.matmul(dy, floats_for(dy), transpose_b=True),
                tf.matmul(dy, b, transpose_b=True),
                tf.matmul(low, dy, transpose_a=True),
            )

        # After `x`: else XLA joins those of all blocks before a loop over parts.
        rows = tf.concat([floats_for(x), ops.again(b, x)], axis=0)
        return tf.matmul(tf.concat([x, low], axis=1), rows), gradient

    return multiply(x, low, b)
