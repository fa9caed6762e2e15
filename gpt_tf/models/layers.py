"""The four layers that a GPT is built of.

They are few and composite, because TF-MOT wraps layers one by one and traces
many small ones slowly. Three customs keep them fit for quantisation and caching:

- A layer reads each of its kernels once, into a local variable, before anything
  else. TF-MOT puts the quantised kernels on the layer and then calls it; under
  `MirroredStrategy` another replica may do the same in between.
- Every tensor that a quantiser may want to see passes through a hook named in
  `ACTIVATIONS`, an attribute of the layer that is the identity until replaced.
- `call` takes one argument, a tensor or a list of tensors, so that a wrapper can
  pass it on. With a cache the list is longer and the result holds the new cache.
"""

import contextlib

import tensorflow as tf
import tf_keras as keras

from gpt_tf.errors import InputError
from gpt_tf.models import ops
from gpt_tf.settings import arguments


def _identity(x):
    return x


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
        calls = self.calls.assign_add(1)
        seed = tf.stack([self.seed * 65536 + tf.cast(replica, tf.int32), calls])
        return tf.nn.experimental.stateless_dropout(
            inputs, self.rate, seed=seed, rng_alg="philox"
        )

    def get_config(self):
        return {**super().get_config(), "rate": self.rate, "seed": self.seed}


@keras.saving.register_keras_serializable(package="gpt_tf")
class TokenAndPositionEmbedding(keras.layers.Layer):
    """Turn token ids into vectors that also know their position.

    Args:
        vocab_size: `V`, number of tokens.
        embedding_dim: `C`, width of the vectors.
        context_length: Number of positions there are vectors for.
        dropout: Rate in training, in [0, 1).
        share_table: Whether the token table is an output too, for a tied head.

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
        **kwargs,
    ):
        super().__init__(**kwargs)
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
        normal = keras.initializers.RandomNormal(stddev=0.02)
        self.token_table = self.add_weight(
            "token_table", (self.vocab_size, self.embedding_dim), initializer=normal
        )
        self.position_table = self.add_weight(
            "position_table",
            (self.context_length, self.embedding_dim),
            initializer=keras.initializers.RandomNormal(stddev=0.02),
        )
        super().build(input_shape)

    def call(self, inputs, training=None):
        token_table = tf.convert_to_tensor(self.token_table)
        position_table = tf.convert_to_tensor(self.position_table)
        if isinstance(inputs, (list, tuple)):
            tokens, positions = inputs
            places = tf.gather(position_table, positions)  # (T, C) or (B, T, C)
        else:
            tokens = inputs
            length = tokens.shape[1]
            if length is not None and length > self.context_length:
                raise InputError(
                    f"The model sees at most {self.context_length} positions. "
                    f"Received: {length}. Cut the sequences, or build the model "
                    f"with `context_length={length}`."
                )
            length = tf.shape(tokens)[1] if length is None else length
            places = position_table[:length]  # (T, C)
        x = tf.gather(token_table, tokens) + places  # (B, T, C)
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
        epsilon: Added to the variance in layer normalisation.
        seed: Makes the dropout masks differ from those of other blocks.

    Call arguments:
        inputs: `x (B, T, C)`, or for cached decoding a list of
            `x (B, T, C)`, `key_cache (B, H, S, D)`, `value_cache (B, H, S, D)`,
            `position ()` int32, the first cache row that this call writes, and
            `mask` bool, broadcastable to `(B, 1, T, S)`: where a position may be
            seen. A mask of numbers would be cast to 16 bits, as all inputs are.

    Returns:
        `(B, T, C)`, or with a cache a list of it and the two caches, updated.

    Reference: GPT-2's block, as in Radford et al. (2019), section 2.3.
    """

    # In the order of the data.
    ACTIVATIONS = (
        "attention_norm_activation",  # what the QKV product reads
        "qkv_activation",  # what it writes; the cache holds a part of it
        "scores_activation",  # scaled, before mask and softmax
        "probabilities_activation",  # after softmax
        "context_activation",  # what the output product reads
        "attended_activation",  # what it writes, before the residual
        "attention_residual_activation",
        "feedforward_norm_activation",  # what the up product reads
        "up_activation",  # what it writes, before GELU
        "hidden_activation",  # after GELU, what the down product reads
        "down_activation",  # what it writes, before the residual
        "feedforward_residual_activation",
    )

    def __init__(
        self,
        num_heads,
        feedforward_dim,
        dropout=0.0,
        residual_stddev=0.02,
        epsilon=1e-5,
        seed=0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.feedforward_dim = feedforward_dim
        self.dropout = dropout
        self.residual_stddev = residual_stddev
        self.epsilon = epsilon
        self.seed = seed
        policy = self.dtype_policy
        self.attention_dropout = Dropout(
            dropout, seed * 2 + 2, name="dropout_1", dtype=policy
        )
        self.feedforward_dropout = Dropout(
            dropout, seed * 2 + 3, name="dropout_2", dtype=policy
        )
        for name in self.ACTIVATIONS:
            setattr(self, name, _identity)

    def build(self, input_shape):
        if isinstance(input_shape, list):
            input_shape = input_shape[0]
        self.embedding_dim = width = int(input_shape[-1])
        self.head_dim = width // self.num_heads
        inner = self.num_heads * self.head_dim
        normal = keras.initializers.RandomNormal

        def add(name, shape, initializer):
            setattr(self, name, self.add_weight(name, shape, initializer=initializer))

        add("attention_norm_gamma", (width,), "ones")
        add("attention_norm_beta", (width,), "zeros")
        add("qkv_kernel", (width, 3 * inner), normal(stddev=0.02))
        add("qkv_bias", (3 * inner,), "zeros")
        add("output_kernel", (inner, width), normal(stddev=self.residual_stddev))
        add("output_bias", (width,), "zeros")
        add("feedforward_norm_gamma", (width,), "ones")
        add("feedforward_norm_beta", (width,), "zeros")
        add("up_kernel", (width, self.feedforward_dim), normal(stddev=0.02))
        add("up_bias", (self.feedforward_dim,), "zeros")
        add(
            "down_kernel",
            (self.feedforward_dim, width),
            normal(stddev=self.residual_stddev),
        )
        add("down_bias", (width,), "zeros")
        super().build(input_shape)

    def call(self, inputs, training=None):
        qkv_kernel = tf.convert_to_tensor(self.qkv_kernel)
        output_kernel = tf.convert_to_tensor(self.output_kernel)
        up_kernel = tf.convert_to_tensor(self.up_kernel)
        down_kernel = tf.convert_to_tensor(self.down_kernel)
        cached = isinstance(inputs, (list, tuple))
        if cached:
            x, key_cache, value_cache, position, mask = inputs
        else:
            x = inputs
        shape = tf.shape(x)
        batch = shape[0] if x.shape[0] is None else x.shape[0]
        length = shape[1] if x.shape[1] is None else x.shape[1]

        x = tf.reshape(x, [batch * length, self.embedding_dim])  # (B * T, C)
        normal = self.attention_norm_activation(
            ops.layer_norm(
                x, self.attention_norm_gamma, self.attention_norm_beta, self.epsilon
            )
        )
        qkv = self.qkv_activation(tf.matmul(normal, qkv_kernel) + self.qkv_bias)
        query, key, value = self._split_heads(qkv, batch, length)
        if cached:
            key_cache = ops.write_rows(key_cache, key, position)
            value_cache = ops.write_rows(value_cache, value, position)
            key, value = key_cache, value_cache  # (B, H, S, D)
            mask = tf.where(mask, 0.0, ops.MASKED)
        else:
            mask = ops.causal_mask(length)
        hooks = (self.scores_activation, self.probabilities_activation)
        context = ops.attention(
            query,
            key,
            value,
            mask,
            *(None if hook is _identity else hook for hook in hooks),
        )
        context = self.context_activation(self._join_heads(context, batch, length))
        attended = self.attended_activation(
            tf.matmul(context, output_kernel) + self.output_bias
        )
        attended = self.attention_dropout(attended, training=training)
        x = self.attention_residual_activation(x + attended)

        normal = self.feedforward_norm_activation(
            ops.layer_norm(
                x, self.feedforward_norm_gamma, self.feedforward_norm_beta, self.epsilon
            )
        )
        up = self.up_activation(tf.matmul(normal, up_kernel) + self.up_bias)
        hidden = self.hidden_activation(ops.gelu(up))  # (B * T, F)
        output = self.down_activation(ops.project(hidden, down_kernel) + self.down_bias)
        output = self.feedforward_dropout(output, training=training)
        x = self.feedforward_residual_activation(x + output)
        x = tf.reshape(x, [batch, length, self.embedding_dim])  # (B, T, C)
        return [x, key_cache, value_cache] if cached else x

    def _split_heads(self, qkv, batch, length):
        """`(B * T, 3 * H * D)` -> query, key and value, each `(B, H, T, D)`."""
        qkv = tf.reshape(qkv, [batch, length, 3, self.num_heads, self.head_dim])
        qkv = tf.transpose(qkv, [2, 0, 3, 1, 4])  # -> (3, B, H, T, D)
        return qkv[0], qkv[1], qkv[2]

    def _join_heads(self, context, batch, length):
        """`(B, H, T, D)` -> `(B * T, H * D)`."""
        context = tf.transpose(context, [0, 2, 1, 3])  # -> (B, T, H, D)
        return tf.reshape(context, [batch * length, self.num_heads * self.head_dim])

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
            "epsilon": self.epsilon,
            "seed": self.seed,
        }


@keras.saving.register_keras_serializable(package="gpt_tf")
class LayerNormalization(keras.layers.Layer):
    """Layer normalisation over the last axis, computed in float32.

    Args:
        epsilon: Added to the variance, above 0.

    Call arguments:
        inputs: `(..., C)`.

    Returns:
        `(..., C)`.
    """

    ACTIVATIONS = ("norm_activation",)

    def __init__(self, epsilon=1e-5, **kwargs):
        super().__init__(**kwargs)
        self.epsilon = epsilon
        self.norm_activation = _identity

    def build(self, input_shape):
        width = int(input_shape[-1])
        self.gamma = self.add_weight("gamma", (width,), initializer="ones")
        self.beta = self.add_weight("beta", (width,), initializer="zeros")
        super().build(input_shape)

    def call(self, inputs):
        width = inputs.shape[-1]
        x = tf.reshape(inputs, [-1, width])  # (B * T, C)
        x = ops.layer_norm(x, self.gamma, self.beta, self.epsilon)
        return self.norm_activation(tf.reshape(x, tf.shape(inputs)))

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "epsilon": self.epsilon}


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
        shape = tf.shape(x)
        batch = shape[0] if x.shape[0] is None else x.shape[0]
        length = shape[1] if x.shape[1] is None else x.shape[1]
        x = tf.reshape(x, [batch * length, x.shape[-1]])  # (B * T, C)
        logits = tf.matmul(x, table, transpose_b=True)  # (B * T, V)
        logits = tf.reshape(logits, [batch, length, self.vocab_size])  # (B, T, V)
        return self.logits_activation(tf.cast(logits, tf.float32))

    def compute_output_shape(self, input_shape):
        if isinstance(input_shape, list):
            input_shape = input_shape[0]
        return tf.TensorShape([*input_shape[:-1], self.vocab_size])

    def get_config(self):
        return {**super().get_config(), "vocab_size": self.vocab_size}
