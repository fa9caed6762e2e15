"""The four layers that a GPT is built of.

They are few and composite, because TF-MOT wraps layers one by one and traces
many small ones slowly. Three customs keep them fit for quantisation and caching:

- A layer reads each of its weights once, into a local variable, before anything
  else. TF-MOT puts the quantised kernels on the layer and then calls it; under
  `MirroredStrategy` another replica may do the same in between.
- Every tensor that a quantiser may want to see passes through a hook named in
  `ACTIVATIONS`, an attribute of the layer that is the identity until replaced.
  Calibration, quantisation-aware training and `observed` share these hooks.
- `call` takes one argument, a tensor or a list of tensors, so that a wrapper can
  pass it on. With a cache the list is longer and the result holds the new cache.
"""

import contextlib
import functools

import tensorflow as tf
import tf_keras as keras

from gpt_tf.errors import InputError
from gpt_tf.models import ops
from gpt_tf.models.block import (
    Cache,
    activations_of,
    known_shape,
    normalize,
    transformer_block,
)
from gpt_tf.models.sizes import BLOCK, NORM, block_shapes, checked_form, norm_shapes
from gpt_tf.settings import arguments


def _identity(x):
    return x


def _form_among(arguments, form):
    """Take what describes a normalisation or a block out of a layer's arguments."""
    return {name: arguments.pop(name, default) for name, default in form.items()}


def _stated(form, usual):
    """Return what is not GPT-2's, and the epsilon: what a file has always had."""
    return {n: v for n, v in form.items() if v != usual[n] or n == "epsilon"}


@contextlib.contextmanager
def observed(layers, observe, names=None):
    """Show activations to `observe(layer, name, x)` while the block runs.

    Args:
        layers: Layers, wrapped by TF-MOT or not; those without activations are passed
            over.
        observe: Called in the order of the data, also while a graph is traced.
        names: Names of activations; None takes all.
    """
    before = []

    def shown(layer, name, activation):
        def call(x):
            x = activation(x)
            observe(layer, name, x)
            return x

        return call

    try:
        for layer in layers:
            layer = getattr(layer, "layer", layer)
            for name in getattr(layer, "ACTIVATIONS", ()):
                if names is None or name in names:
                    activation = getattr(layer, name)
                    before.append((layer, name, activation))
                    setattr(layer, name, shown(layer, name, activation))
        yield
    finally:
        for layer, name, activation in before:
            setattr(layer, name, activation)


@keras.saving.register_keras_serializable(package="gpt_tf")
class Dropout(keras.layers.Layer):
    """Inverted dropout whose masks are a function of a seed and a call counter.

    The counter is a weight, so a checkpoint holds the random state of training
    and a resumed run draws the masks that the uninterrupted one would have drawn.
    Each replica draws masks of its own.

    Args:
        rate: Share of values that become 0, in [0, 1).
        seed: Any integer; layers with different seeds draw different masks.
    """

    def __init__(self, rate, seed=0, **kwargs):
        super().__init__(**kwargs)
        self.rate = arguments.number("dropout", rate, least=0, below=1)
        self.seed = seed

    def build(self, input_shape):
        if self.rate:
            self.calls = self.add_weight(
                "calls",
                shape=(),
                dtype="int32",
                initializer="zeros",
                trainable=False,
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
            )
        super().build(input_shape)

    def call(self, inputs, training=None):
        if training is None:
            training = keras.backend.learning_phase()
        if not self.rate or training is False or training == 0:
            return inputs
        context = tf.distribute.get_replica_context()
        replica = context.replica_id_in_sync_group if context else 0
        seed = self.seed * 65536 + tf.cast(replica, tf.int32)
        return ops.dropout(inputs, self.rate, seed, self.calls)

    def get_config(self):
        return {**super().get_config(), "rate": self.rate, "seed": self.seed}


@keras.saving.register_keras_serializable(package="gpt_tf")
class TokenAndPositionEmbedding(keras.layers.Layer):
    """Turn token ids into vectors that, where positions are learned, know theirs.

    Args:
        vocab_size: `V`, number of tokens.
        embedding_dim: `C`, width of the vectors.
        context_length: Number of positions there are vectors for.
        dropout: Rate in training, in [0, 1).
        share_table: Whether the token table is an output too, for a tied head.
        positions: `"learned"`, or `"rotary"` where the blocks see to positions.

    Call arguments:
        inputs: Token ids `(B, T)`, or a list of token ids `(B, T)` and positions,
            `(T,)` or `(B, T)`, for calls that do not start at position 0.

    Returns:
        Vectors `(B, T, C)`, or with `share_table` a list of them and of the token
        table `(V, C)`. Passing the table along, rather than keeping it in a layer
        used twice, lets TF-MOT rebuild the graph with one quantised table.

    Reference: Radford et al., "Language Models are Unsupervised Multitask
    Learners" (GPT-2), section 2.3.
    """

    ACTIVATIONS = ("embedding_activation",)

    def __init__(
        self,
        vocab_size,
        embedding_dim,
        context_length,
        dropout=0.0,
        share_table=True,
        positions="learned",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.positions = positions
        self.vocab_size = vocab_size
        self.embedding_dim = embedding_dim
        self.context_length = context_length
        self.dropout = dropout
        self.share_table = share_table
        self.embedding_dropout = Dropout(
            dropout, seed=1, name="dropout", dtype=self.dtype_policy
        )
        self.embedding_activation = _identity

    def build(self, input_shape):
        tables = {"token_table": self.vocab_size}
        self.position_table = None
        if self.positions == "learned":
            tables["position_table"] = self.context_length
        for name, rows in tables.items():
            init = keras.initializers.RandomNormal(stddev=0.02)
            shape = (rows, self.embedding_dim)
            setattr(self, name, self.add_weight(name, shape, initializer=init))
        super().build(input_shape)

    def call(self, inputs, training=None):
        token_table = tf.convert_to_tensor(self.token_table)
        position_table = self.position_table
        if position_table is not None:
            position_table = tf.convert_to_tensor(position_table)
        tokens, positions = inputs, None
        if isinstance(inputs, (list, tuple)):
            tokens, positions = inputs
        length = tokens.shape[1]
        if positions is None and length is not None and length > self.context_length:
            raise InputError(
                f"The model sees at most {self.context_length} positions. "
                f"Received: {length}. Cut the sequences, or build the model "
                f"with `context_length={length}`."
            )
        x = tf.gather(token_table, tokens)  # (B, T, C)
        if position_table is not None and positions is not None:
            # (T, C), or (B, T, C) where each row has positions of its own.
            x += tf.gather(position_table, positions)
        elif position_table is not None:
            x += position_table[: tf.shape(tokens)[1] if length is None else length]
        x = self.embedding_dropout(self.embedding_activation(x), training=training)
        return [x, token_table] if self.share_table else x

    def compute_output_shape(self, input_shape):
        if isinstance(input_shape, list):
            input_shape = input_shape[0]
        vectors = tf.TensorShape([*input_shape, self.embedding_dim])
        if self.share_table:
            return [vectors, tf.TensorShape([self.vocab_size, self.embedding_dim])]
        return vectors

    def get_config(self):
        return {
            **super().get_config(),
            "vocab_size": self.vocab_size,
            "embedding_dim": self.embedding_dim,
            "context_length": self.context_length,
            "dropout": self.dropout,
            "share_table": self.share_table,
            "positions": self.positions,
        }


@keras.saving.register_keras_serializable(package="gpt_tf")
class TransformerBlock(keras.layers.Layer):
    """Causal self-attention and a feed-forward part, pre-norm, each with a residual.

    The head width is `embedding_dim // num_heads`; where that leaves a remainder
    the heads together are narrower than `embedding_dim` and the output projection
    maps back.

    Args:
        num_heads: `H`, from 1 to `embedding_dim`.
        feedforward_dim: `F`, width between the two feed-forward products.
        dropout: Rate on both residuals in training, in [0, 1).
        residual_stddev: Spread of the initial weights of the two projections that
            feed a residual.
        **kwargs: What `gpt_tf.models.sizes.NORM` and `BLOCK` name, and
            `keras.layers.Layer`'s.
        seed: Makes the dropout masks differ from those of other blocks.

    Call arguments:
        inputs: `x (B, T, C)`, or for cached decoding a list of it and of the fields of
            `gpt_tf.models.block.Cache`. Its mask is bool: one of numbers would be cast
            to 16 bits, as all inputs are.

    Returns:
        `(B, T, C)`, or with a cache a list of it and the two caches, updated.
    """

    ACTIVATIONS = activations_of(BLOCK)

    def __init__(
        self,
        num_heads,
        feedforward_dim,
        dropout=0.0,
        residual_stddev=0.02,
        seed=0,
        **kwargs,
    ):
        usual = {**BLOCK, **NORM}
        form = _form_among(kwargs, usual)
        self.__dict__["form"] = form  # Keras would track a dict
        self.__dict__["_given_form"] = _stated(form, usual)
        self.__dict__["ACTIVATIONS"] = activations_of(form)
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.feedforward_dim = feedforward_dim
        self.dropout = dropout
        self.residual_stddev = residual_stddev
        self.seed = seed
        policy = self.dtype_policy
        self.attention_dropout = Dropout(
            dropout, seed * 2 + 2, name="dropout_1", dtype=policy
        )
        self.feedforward_dropout = Dropout(
            dropout, seed * 2 + 3, name="dropout_2", dtype=policy
        )
        self.products = None  # if not `gpt_tf.models.block.Products`
        for name in self.ACTIVATIONS:
            setattr(self, name, _identity)

    def build(self, input_shape):
        if isinstance(input_shape, list):
            input_shape = input_shape[0]
        self.embedding_dim = int(input_shape[-1])
        sizes = {**self.get_config(), "embedding_dim": self.embedding_dim}
        self.__dict__["form"] = {**self.form, **checked_form(sizes, sizes)}
        self.head_dim, self.num_kv_heads = (
            self.form[name] for name in ("head_dim", "num_kv_heads")
        )
        shapes = block_shapes(sizes)
        for name, shape in shapes.items():
            setattr(self, name, self._add(name, shape))
        self.__dict__["weight_names"] = list(shapes)  # Keras would track a list
        super().build(input_shape)

    def _add(self, name, shape):
        if name.endswith("_kernel"):
            feeds_residual = name in ("output_kernel", "down_kernel")
            stddev = self.residual_stddev if feeds_residual else 0.02
            initializer = keras.initializers.RandomNormal(stddev=stddev)
        else:
            initializer = "ones" if name.endswith("_gamma") else "zeros"
        return self.add_weight(name, shape, initializer=initializer)

    def call(self, inputs, training=None):
        weights = {n: tf.convert_to_tensor(getattr(self, n)) for n in self.weight_names}
        hooks = {name: getattr(self, name) for name in self.ACTIVATIONS}
        hooks = {name: hook for name, hook in hooks.items() if hook is not _identity}
        hooks["attention_dropout"] = functools.partial(
            self.attention_dropout, training=training
        )
        hooks["feedforward_dropout"] = functools.partial(
            self.feedforward_dropout, training=training
        )
        x, cache = inputs, None
        if isinstance(inputs, (list, tuple)):
            x, cache = inputs[0], Cache(*inputs[1:])
        return transformer_block(
            x,
            weights,
            num_heads=self.num_heads,
            form=self.form,
            hooks=hooks,
            cache=cache,
            products=self.products,
        )

    def compute_output_shape(self, input_shape):
        if isinstance(input_shape, list):
            return input_shape[:3]
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "feedforward_dim": self.feedforward_dim,
            "dropout": self.dropout,
            "residual_stddev": self.residual_stddev,
            **self._given_form,
            "seed": self.seed,
        }


@keras.saving.register_keras_serializable(package="gpt_tf")
class LayerNormalization(keras.layers.Layer):
    """Layer or RMS normalisation over the last axis, computed in float32.

    Args:
        **kwargs: What `gpt_tf.models.sizes.NORM` names, and `keras.layers.Layer`'s.

    Call arguments:
        inputs: `(..., C)`.

    Returns:
        `(..., C)`.
    """

    ACTIVATIONS = ("norm_activation",)

    def __init__(self, **kwargs):
        self.__dict__["form"] = _form_among(kwargs, NORM)
        super().__init__(**kwargs)
        self.norm_activation = _identity

    def build(self, input_shape):
        shapes = norm_shapes(self.form, int(input_shape[-1]))
        for name, shape in shapes.items():
            initializer = "ones" if name == "gamma" else "zeros"
            setattr(self, name, self.add_weight(name, shape, initializer=initializer))
        self.__dict__["weight_names"] = list(shapes)  # Keras would track a list
        super().build(input_shape)

    def call(self, inputs):
        weights = {n: getattr(self, n) for n in self.weight_names}
        x = tf.reshape(inputs, [-1, inputs.shape[-1]])  # (B * T, C)
        x = normalize(x, weights, "", self.form)
        return self.norm_activation(tf.reshape(x, tf.shape(inputs)))

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), **_stated(self.form, NORM)}


@keras.saving.register_keras_serializable(package="gpt_tf")
class LanguageModelHead(keras.layers.Layer):
    """Score every token of the vocabulary as the next one.

    Args:
        vocab_size: `V`.

    Call arguments:
        inputs: A list of `x (B, T, C)` and the token table `(V, C)` for a tied
            head, or `x` alone for a head with a kernel of its own.

    Returns:
        Logits `(B, T, V)`, float32 whatever the type of `x`.

    Reference: Press and Wolf, "Using the Output Embedding to Improve Language
    Models", arXiv:1608.05859.
    """

    ACTIVATIONS = ("logits_activation",)

    def __init__(self, vocab_size, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.kernel = None
        self.logits_activation = _identity

    def build(self, input_shape):
        if not isinstance(input_shape, (list, tuple)) or not isinstance(
            input_shape[0], (list, tuple, tf.TensorShape)
        ):
            self.kernel = self.add_weight(
                "kernel",
                (self.vocab_size, int(input_shape[-1])),
                initializer=keras.initializers.RandomNormal(stddev=0.02),
            )
        super().build(input_shape)

    def call(self, inputs):
        if isinstance(inputs, (list, tuple)):
            x, table = inputs
        else:
            x, table = inputs, tf.convert_to_tensor(self.kernel)
        batch, length, width = known_shape(x)
        x = tf.reshape(x, [batch * length, width])  # (B * T, C)
        logits = tf.matmul(x, table, transpose_b=True)  # (B * T, V)
        logits = tf.reshape(logits, [batch, length, self.vocab_size])  # (B, T, V)
        return self.logits_activation(tf.cast(logits, tf.float32))

    def compute_output_shape(self, input_shape):
        if isinstance(input_shape, list):
            input_shape = input_shape[0]
        return tf.TensorShape([*input_shape[:-1], self.vocab_size])

    def get_config(self):
        return {**super().get_config(), "vocab_size": self.vocab_size}
