"""GPTModel: a decoder as a Keras model that needs no preparation, GPT-2 as a rule."""

import inspect

import tensorflow as tf
import tf_keras as keras

from gpt_tf.models import placement
from gpt_tf.models.language_model import LanguageModel
from gpt_tf.models.layers import (
    LanguageModelHead,
    LayerNormalization,
    TokenAndPositionEmbedding,
    TransformerBlock,
)
from gpt_tf.models.sizes import (
    BLOCK,
    FORM,
    check_memory,
    checked_config,
    norm_of,
    stated_form,
)

CUSTOM_OBJECTS = {
    layer.__name__: layer
    for layer in (
        TokenAndPositionEmbedding,
        TransformerBlock,
        LayerNormalization,
        LanguageModelHead,
    )
}


@keras.saving.register_keras_serializable(package="gpt_tf")
class GPTModel(LanguageModel):
    """A GPT that is built, trained, saved and loaded like any Keras model.

    Pre-norm blocks and causal attention; learned positions, layer normalisation, tanh
    GELU and a tied head, as in GPT-2, unless the arguments say otherwise: OPT,
    GPT-NeoX, Llama and Qwen are of this kind, too. It is a flat Functional model of a
    few layers of our own. `fit` works without a `compile` before it: AdamW, next-token
    cross-entropy, perplexity and token accuracy are then chosen, and `compile`
    replaces any of them.

    Args:
        vocab_size: `V`, number of tokens, at least 1.
        embedding_dim: `C`, width of the model, at least 1.
        num_layers: `L`, number of blocks, from 1 to 1024.
        num_heads: `H`, from 1 to `embedding_dim`. It need not divide
            `embedding_dim`: the head width is `embedding_dim // num_heads`.
        context_length: Largest number of positions, at least 1.
        feedforward_dim: `F`, `4 * embedding_dim` unless given.
        dropout: Rate on the embedding and on both residuals of each block while
            training, in [0, 1).
        tie_embeddings: Whether the head scores with the token table.
        layer_norm_epsilon: Added to the variance in layer normalisation, or to the
            mean square in RMS normalisation.
        num_kv_heads: `G`, heads of keys and values, a divisor of `num_heads`; as many
            queries in turn share each.
        head_dim: `D`, `embedding_dim // num_heads` unless given.
        positions: `"learned"`, or `"rotary"`: queries and keys are turned by theirs.
        rotary_base: Base of the frequencies.
        rotary_dim: Numbers of each head that are turned, even; all unless given.
        rotary_scaling: None, or Llama 3's as a dict of `factor`,
            `low_frequency_factor`, `high_frequency_factor`, `original_context_length`.
        norm: `"layer"` or `"rms"`.
        norm_bias: Whether layer normalisation shifts.
        activation: `"gelu_tanh"`, `"gelu"`, `"relu"` or `"swiglu"`.
        biases: Which products have one: `"all"`, `"qkv"` or `"none"`.
        query_key_norm: Whether each head's query and key is RMS-normalised.
        parallel_residual: Whether both halves of a block read its input.

    Call arguments:
        inputs: Token ids `(B, T)`, int32, `T` at most `context_length`.

    Returns:
        Logits `(B, T, V)`, float32.

    Raises:
        InputError: A size is out of its range, or memory cannot hold the model.

    Example:
        >>> model = GPTModel(vocab_size=100, embedding_dim=16, num_layers=2,
        ...                  num_heads=2, context_length=8)
        >>> model(np.zeros((1, 8), "int32")).shape
        TensorShape([1, 8, 100])

    Reference: Radford et al., "Language Models are Unsupervised Multitask Learners",
    2019; the article's `GPTModel`.
    """

    def __init__(
        self,
        vocab_size,
        embedding_dim,
        num_layers,
        num_heads,
        context_length=1024,
        feedforward_dim=None,
        dropout=0.0,
        tie_embeddings=True,
        layer_norm_epsilon=1e-5,
        num_kv_heads=None,
        head_dim=None,
        positions="learned",
        rotary_base=10000.0,
        rotary_dim=None,
        rotary_scaling=None,
        norm="layer",
        norm_bias=True,
        activation="gelu_tanh",
        biases="all",
        query_key_norm=False,
        parallel_residual=False,
        name="gpt",
        **kwargs,
    ):
        config = checked_config(
            {
                "vocab_size": vocab_size,
                "embedding_dim": embedding_dim,
                "num_layers": num_layers,
                "num_heads": num_heads,
                "context_length": context_length,
                "feedforward_dim": feedforward_dim,
                "dropout": dropout,
                "tie_embeddings": tie_embeddings,
                "layer_norm_epsilon": layer_norm_epsilon,
                "num_kv_heads": num_kv_heads,
                "head_dim": head_dim,
                "positions": positions,
                "rotary_base": rotary_base,
                "rotary_dim": rotary_dim,
                "rotary_scaling": rotary_scaling,
                "norm": norm,
                "norm_bias": norm_bias,
                "activation": activation,
                "biases": biases,
                "query_key_norm": query_key_norm,
                "parallel_residual": parallel_residual,
            }
        )
        check_memory(config, accelerators=len(tf.config.list_physical_devices("GPU")))
        plan, stated = placement.plan_for(config), stated_form(config)
        norm = norm_of(config)
        block = {**{n: v for n, v in stated.items() if n in BLOCK}, **norm}
        tokens = keras.Input(shape=(None,), dtype="int32", name="tokens")
        with plan.at("embedding"):
            x = TokenAndPositionEmbedding(
                config["vocab_size"],
                config["embedding_dim"],
                config["context_length"],
                dropout=config["dropout"],
                share_table=config["tie_embeddings"],
                positions=config["positions"],
                name="embedding",
            )(tokens)
        if config["tie_embeddings"]:
            x, table = x
        for index in range(config["num_layers"]):
            with plan.at(f"block_{index}"):
                x = TransformerBlock(
                    config["num_heads"],
                    config["feedforward_dim"],
                    dropout=config["dropout"],
                    residual_stddev=0.02 / (2 * config["num_layers"]) ** 0.5,
                    seed=index,
                    name=f"block_{index}",
                    **block,
                )(x)
        with plan.at("final_norm"):
            x = LayerNormalization(name="final_norm", **norm)(x)
        with plan.at("head"):
            logits = LanguageModelHead(config["vocab_size"], name="head")(
                [x, table] if config["tie_embeddings"] else x
            )
        super().__init__(inputs=tokens, outputs=logits, name=name, **kwargs)
        self.plan = plan
        # Every argument is an attribute.
        self.__dict__["_config"] = config
        self.__dict__["stated_form"] = stated  # what is not GPT-2's
        for argument, value in config.items():
            setattr(self, argument, value)

    # A model whose layers are on several devices

    def compile(self, *args, **kwargs):
        super().compile(*args, **kwargs)
        if self.plan.is_divided:
            self.plan.compile(self)

    compile.__signature__ = inspect.signature(LanguageModel.compile)

    def train_step(self, data):
        if self.plan.is_divided:
            return self.plan.train_step(self, *self.unpack(data))
        return super().train_step(data)

    def test_step(self, data):
        if self.plan.is_divided:
            return self.plan.test_step(self, *self.unpack(data))
        return super().test_step(data)

    def predict_step(self, data):
        if self.plan.is_divided:
            tokens, _, _ = keras.utils.unpack_x_y_sample_weight(data)
            return self.plan.logits(self, tf.cast(self.tokens_of(tokens), tf.int32))
        return super().predict_step(data)

    # Configuration

    def get_config(self):
        sizes = {name: v for name, v in self._config.items() if name not in FORM}
        return {**sizes, **self.stated_form, "name": self.name}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return cls(**config)

    @classmethod
    def from_preset(cls, preset, **kwargs):
        """Build a GPT from a KerasHub preset, a folder or a name, weights included.

        As `gpt_tf.open_model`, which returns the tokenizer too.
        """
        from gpt_tf.pretrained.source import describe

        return describe(preset)[1].open(kwargs)

    @classmethod
    def from_huggingface(cls, folder, **kwargs):
        """Build a GPT from a folder in Hugging Face's form, with its weights.

        As `gpt_tf.open_model`, which returns the tokenizer too.

        Example:
            >>> model = GPTModel.from_huggingface("gpt2/", dropout=0.1)
        """
        return cls.from_preset(folder, **kwargs)


# HDF5 files and `to_json` name a model by its plain class.
keras.saving.get_custom_objects()["GPTModel"] = GPTModel
