"""LoRA: a GPT whose weights stay, and small matrices beside them that learn.

Beside the kernel `W (inputs, outputs)` of every product of a block stand
`A (inputs, r)` and `B (r, outputs)`: the product with `W + alpha / r * A B` is computed
without that sum. `B` is 0 at first, so training starts at the model as it is. `merged`
returns a plain `GPTModel` with the sums.
"""

import functools

import tensorflow as tf
import tf_keras as keras

from gpt_tf.models.block import Products
from gpt_tf.models.cached_forward import parts_of
from gpt_tf.models.gpt import GPTModel
from gpt_tf.models.language_model import LanguageModel, strategy_scope
from gpt_tf.models.layers import Dropout
from gpt_tf.pretrained.build import variables_of
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
        self.__dict__["adapters"] = {}
        for block in parts_of(self).blocks:
            own = {kernel: self._adapter(block, kernel) for kernel in KERNELS}
            block.products = functools.partial(_AdaptedProducts, own, self.lora.scale)
            self.adapters.update({f"{block.name}/{k}": pair for k, pair in own.items()})

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
            value = tf.convert_to_tensor(own[name])
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


class _AdaptedProducts(Products):
    """The products of a block with what its adapters add."""

    def __init__(self, adapters, scale, *block):
        super().__init__(*block)
        self.adapters, self.scale = adapters, scale

    def dense(self, name, x):
        a, b = map(tf.convert_to_tensor, self.adapters[f"{name}_kernel"])
        return super().dense(name, x) + tf.matmul(tf.matmul(x, self.scale * a), b)
