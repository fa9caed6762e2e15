"""GPTModel: GPT-2's architecture as a Keras model that needs no preparation."""

import numbers

import numpy as np
import tensorflow as tf
import tf_keras as keras

from gpt_tf.errors import InputError, InputTypeError
from gpt_tf.models import operations, step
from gpt_tf.models.layers import (
    LanguageModelHead,
    LayerNormalization,
    TokenAndPositionEmbedding,
    TransformerBlock,
)
from gpt_tf.models.optimizer import AdamW

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
class NextTokenLoss(keras.losses.Loss):
    """Cross-entropy of the next token in nats, averaged over the tokens that count.

    `GPTModel` recognises this loss and computes it as a sum over the global batch
    divided by the sum of its weights. By itself it is the mean over the batch that
    it is given.

    Call arguments:
        y_true: Token ids `(B, T)`.
        y_pred: Logits `(B, T, V)`.
        sample_weight: `(B, T)` or `(B,)`, at least 0; None counts every token.
    """

    def __init__(self, name="next_token_loss", **kwargs):
        kwargs.pop("reduction", None)
        super().__init__(name=name, reduction=keras.losses.Reduction.NONE, **kwargs)

    def __call__(self, y_true, y_pred, sample_weight=None):
        weights = token_weights(y_true, sample_weight)
        total, _, weight = operations.token_sums(
            y_pred, tf.cast(y_true, tf.int32), weights
        )
        return step.mean_of(total, weight)

    def call(self, y_true, y_pred):
        return tf.nn.sparse_softmax_cross_entropy_with_logits(
            tf.cast(y_true, tf.int32), tf.cast(y_pred, tf.float32)
        )


def token_weights(labels, sample_weight=None):
    """Return a float32 weight per label, `(B, T)`, from `(B, T)`, `(B,)` or None."""
    if sample_weight is None:
        return tf.ones(tf.shape(labels), tf.float32)
    weights = tf.cast(sample_weight, tf.float32)
    if weights.shape.rank == 1:
        weights = weights[:, tf.newaxis]
    return tf.broadcast_to(weights, tf.shape(labels))


@keras.saving.register_keras_serializable(package="gpt_tf")
class GPTModel(keras.Model):
    """A GPT that is built, trained, saved and loaded like any Keras model.

    Learned positions, pre-norm blocks, tanh GELU, causal attention and a tied head,
    as in GPT-2. It is a flat Functional model of a few layers of our own. `fit`
    works without a `compile` before it: AdamW, next-token cross-entropy, perplexity
    and token accuracy are then chosen, and `compile` replaces any of them.

    Args:
        vocab_size: `V`, number of tokens, at least 1.
        embedding_dim: `C`, width of the model, at least 1.
        num_layers: `L`, number of blocks, at least 1.
        num_heads: `H`, from 1 to `embedding_dim`. It need not divide
            `embedding_dim`: the head width is `embedding_dim // num_heads`.
        context_length: Largest number of positions, at least 1.
        feedforward_dim: `F`, `4 * embedding_dim` unless given.
        dropout: Rate on the embedding and on both residuals of each block while
            training, in [0, 1).
        tie_embeddings: Whether the head scores with the token table.
        layer_norm_epsilon: Added to the variance in layer normalisation.

    Call arguments:
        inputs: Token ids `(B, T)`, int32, `T` at most `context_length`.

    Returns:
        Logits `(B, T, V)`, float32.

    Raises:
        InputError: A size is out of its range.

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
        name="gpt",
        **kwargs,
    ):
        if feedforward_dim is None:
            feedforward_dim = 4 * _positive("embedding_dim", embedding_dim)
        sizes = {
            "vocab_size": vocab_size,
            "embedding_dim": embedding_dim,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "context_length": context_length,
            "feedforward_dim": feedforward_dim,
        }
        sizes = {key: _positive(key, value) for key, value in sizes.items()}
        if sizes["num_heads"] > sizes["embedding_dim"]:
            raise InputError(
                "`num_heads` expects at most one head per unit of `embedding_dim`. "
                f"Received: num_heads={num_heads}, embedding_dim={embedding_dim}. "
                "Use fewer heads or a wider model."
            )
        if not layer_norm_epsilon > 0:
            raise InputError(
                "`layer_norm_epsilon` expects a number above 0. "
                f"Received: {layer_norm_epsilon}. GPT-2 uses 1e-5."
            )
        tokens = keras.Input(shape=(None,), dtype="int32", name="tokens")
        x = TokenAndPositionEmbedding(
            sizes["vocab_size"],
            sizes["embedding_dim"],
            sizes["context_length"],
            dropout=dropout,
            share_table=bool(tie_embeddings),
            name="embedding",
        )(tokens)
        table = None
        if tie_embeddings:
            x, table = x
        for index in range(sizes["num_layers"]):
            x = TransformerBlock(
                sizes["num_heads"],
                sizes["feedforward_dim"],
                dropout=dropout,
                residual_stddev=0.02 / (2 * sizes["num_layers"]) ** 0.5,
                epsilon=layer_norm_epsilon,
                seed=index,
                name=f"block_{index}",
            )(x)
        x = LayerNormalization(epsilon=layer_norm_epsilon, name="final_norm")(x)
        logits = LanguageModelHead(sizes["vocab_size"], name="head")(
            [x, table] if tie_embeddings else x
        )
        super().__init__(inputs=tokens, outputs=logits, name=name, **kwargs)
        self.vocab_size = sizes["vocab_size"]
        self.embedding_dim = sizes["embedding_dim"]
        self.num_layers = sizes["num_layers"]
        self.num_heads = sizes["num_heads"]
        self.context_length = sizes["context_length"]
        self.feedforward_dim = sizes["feedforward_dim"]
        self.dropout = dropout
        self.tie_embeddings = bool(tie_embeddings)
        self.layer_norm_epsilon = layer_norm_epsilon
        self._step_functions = {}

    # Configuration

    def get_config(self):
        return {
            "vocab_size": self.vocab_size,
            "embedding_dim": self.embedding_dim,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "context_length": self.context_length,
            "feedforward_dim": self.feedforward_dim,
            "dropout": self.dropout,
            "tie_embeddings": self.tie_embeddings,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return cls(**config)

    @classmethod
    def from_preset(cls, preset, **kwargs):
        """Build a GPT-2 from a KerasHub preset, weights included.

        See `gpt_tf.models.interop.from_preset`.
        """
        from gpt_tf.models import interop

        return interop.from_preset(preset, **kwargs)

    @classmethod
    def from_huggingface(cls, folder, **kwargs):
        """Build a GPT-2 from a folder with `config.json` and `model.safetensors`.

        See `gpt_tf.models.interop.from_huggingface`.
        """
        from gpt_tf.models import interop

        return interop.from_huggingface(folder, **kwargs)

    # Keras: compile and fit

    def compile(
        self,
        optimizer=None,
        loss=None,
        metrics=None,
        *,
        jit_compile="auto",
        gradient_accumulation_steps=1,
        **kwargs,
    ):
        """Choose optimiser, loss and metrics; each has a sensible default.

        Args:
            optimizer: A tf_keras optimiser or its name. Default: AdamW at 3e-4.
            loss: A tf_keras loss. Default: `NextTokenLoss`, averaged over the
                tokens of the global batch, with perplexity and token accuracy.
            metrics: More metrics, of labels `(B, T)` and logits `(B, T, V)`. With
                gradient accumulation they are reported for validation only: the
                logits of a whole training batch are never together in memory.
            jit_compile: Whether XLA compiles the forward and backward pass.
                `"auto"`: yes, except on TPUs, where it is always so.
            gradient_accumulation_steps: Number of equal parts in which a batch is
                computed, one after the other, before the one update.
            **kwargs: As for `keras.Model.compile`.

        Raises:
            InputTypeError: A Keras 3 object was handed in.
        """
        for role, value in (("optimizer", optimizer), ("loss", loss)):
            refuse_keras_3(value, role)
        for metric in tf.nest.flatten(metrics):
            refuse_keras_3(metric, "metrics")
        if gradient_accumulation_steps < 1:
            raise InputError(
                "`gradient_accumulation_steps` expects an integer of at least 1. "
                f"Received: {gradient_accumulation_steps}."
            )
        if jit_compile == "auto" or jit_compile is None:
            jit_compile = not tf.config.list_logical_devices("TPU")
        self._use_xla = bool(jit_compile)
        self.gradient_accumulation_steps = int(gradient_accumulation_steps)
        self._step_functions = {}
        loss = NextTokenLoss() if loss is None else loss
        self._sums_tokens = isinstance(loss, NextTokenLoss)
        # Keras would otherwise remark that the weights meet no weighted metric.
        kwargs.setdefault("weighted_metrics", [])
        super().compile(
            optimizer=AdamW() if optimizer is None else optimizer,
            loss=loss,
            metrics=metrics,
            jit_compile=False if self._sums_tokens else self._use_xla,
            **kwargs,
        )
        self._token_metrics = TokenMetrics() if self._sums_tokens else None
        # Every replica reports the whole batch: several workers' are not to be added.
        self.distribute_reduction_method = "first" if self._sums_tokens else "auto"

    def get_compile_config(self):
        if not self._is_compiled:
            return None
        config = super().get_compile_config() or {}
        kept = ("optimizer", "loss", "metrics", "weighted_metrics")
        return {
            **{key: config[key] for key in kept if key in config},
            "jit_compile": self._use_xla,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
        }

    def compile_from_config(self, config):
        config = keras.saving.deserialize_keras_object(config)
        self.compile(**config)
        self.optimizer.build(self.trainable_variables)

    def fit(self, x=None, y=None, **kwargs):
        """Train, as `keras.Model.fit`; compiles with the defaults where needed.

        Args:
            x: Token ids `(N, T)`, or a `tf.data.Dataset` of (inputs, labels) or
                (inputs, labels, sample_weight).
            y: The next tokens `(N, T)`; not with a dataset.
            **kwargs: As for `keras.Model.fit`.

        Raises:
            InputError: An id in an array is not below `vocab_size`.
            InputTypeError: A Keras 3 callback was handed in.
        """
        if y is None and isinstance(x, (list, np.ndarray, tf.Tensor)):
            raise InputError(
                "`fit` expects labels, the next tokens (B, T). Received: inputs only. "
                "Pass `fit(inputs, labels)` or a dataset of (inputs, labels)."
            )
        self._prepare(x, y, kwargs.get("callbacks"))
        return super().fit(x, y, **kwargs)

    def evaluate(self, x=None, y=None, **kwargs):
        """Measure, as `keras.Model.evaluate`; compiles with the defaults if needed."""
        self._prepare(x, y, kwargs.get("callbacks"))
        return super().evaluate(x, y, **kwargs)

    def _prepare(self, x, y, callbacks):
        for callback in tf.nest.flatten(callbacks):
            refuse_keras_3(callback, "callbacks")
        for role, ids in (("inputs", x), ("labels", y)):
            self._check_ids(ids, role)
        if not self._is_compiled:
            with self.distribute_strategy.scope():
                self.compile()

    def _check_ids(self, ids, role):
        if isinstance(ids, list) and ids and not hasattr(ids[0], "dtype"):
            ids = np.asarray(ids)
        if not isinstance(ids, (np.ndarray, tf.Tensor)) or not np.size(ids):
            return
        ids = np.asarray(ids)
        if ids.dtype.kind not in "iuf" or ids.ndim != 2:
            raise InputError(
                f"The {role} of a GPTModel are token ids (B, T). "
                f"Received: {ids.dtype} {ids.shape}. "
                "Encode text with a tokenizer and cut it into windows first."
            )
        low, high = ids.min(), ids.max()
        if low < 0 or high >= self.vocab_size:
            raise InputError(
                f"The {role} expect token ids from 0 to {self.vocab_size - 1}. "
                f"Received: ids from {low} to {high}. "
                "Use the tokenizer that the model was built for."
            )

    # Keras: the steps

    @property
    def metrics(self):
        if not self._is_compiled or not self._sums_tokens:
            return super().metrics
        added = [metric for metric in super().metrics if metric.name != "loss"]
        return [*self._token_metrics.all, *added]

    def train_step(self, data):
        if not self._sums_tokens:
            return super().train_step(data)
        batch = self._unpack(data)
        # The mean is over all tokens of the global batch; their weight is known
        # before the forward pass, so the gradients need no pass of their own.
        weight = step.add_over_replicas(tf.reduce_sum(batch[2]))
        scale = self._loss_scale() * tf.math.reciprocal_no_nan(weight)
        sums, gradients, logits = self._compiled(self._differentiate)(batch, scale)
        sums, gradients = step.add_over_replicas((sums, gradients))
        self.optimizer.apply_gradients(
            # A LossScaleOptimizer divides by its scale itself.
            list(zip(gradients, self.trainable_variables, strict=True)),
            skip_gradients_aggregation=True,
        )
        return self._report(sums, batch, logits)

    def test_step(self, data):
        if not self._sums_tokens:
            return super().test_step(data)
        batch = self._unpack(data)
        sums, logits = self._compiled(self._measure)(batch)
        return self._report(step.add_over_replicas(sums), batch, logits)

    def _unpack(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if y is None:
            raise InputError(
                "Training expects labels beside the inputs: the next tokens (B, T). "
                "Received: inputs only. Pass `fit(inputs, labels)` or a dataset of "
                "(inputs, labels)."
            )
        return (
            tf.cast(x, tf.int32),
            tf.cast(y, tf.int32),
            token_weights(y, sample_weight),
        )

    def _sums(self, batch, training):
        tokens, labels, weights = batch
        logits = self(tokens, training=training)
        sums = operations.token_sums(logits, labels, weights)
        return sums, logits

    def _differentiate(self, batch, scale):
        """Return sums, gradients of the scaled loss sum, and logits if asked for."""
        kept = []

        def sums(part):
            (loss, correct, weight), logits = self._sums(part, training=True)
            if self._wants_logits():
                kept.append(logits)
            return loss * scale, loss, correct, weight

        values, gradients = step.sums_and_gradients(
            sums,
            self.trainable_variables,
            batch,
            self.gradient_accumulation_steps,
        )
        logits = kept[0] if kept and self.gradient_accumulation_steps == 1 else None
        return values[1:], gradients, logits

    def _measure(self, batch):
        sums, logits = self._sums(batch, training=False)
        return sums, logits if self._wants_logits() else None

    def _wants_logits(self):
        return bool(
            self.compiled_metrics is not None and self.compiled_metrics._user_metrics
        ) or bool(
            self.compiled_metrics is not None
            and self.compiled_metrics._user_weighted_metrics
        )

    def _compiled(self, function):
        """Return `function`, compiled by XLA if so asked, one trace per replica."""
        if not self._use_xla:
            return function
        context = tf.distribute.get_replica_context()
        replica = 0
        if context is not None and context.num_replicas_in_sync > 1:
            # Workers of a cluster know their number only when they run; each has
            # a process, and so a cache, of its own.
            known = tf.get_static_value(context.replica_id_in_sync_group)
            replica = 0 if known is None else int(known)
        key = (function.__name__, replica)
        if key not in self._step_functions:

            def traced(*args):
                with operations.inside_xla():
                    return function(*args)

            self._step_functions[key] = tf.function(traced, jit_compile=True)
        return self._step_functions[key]

    def _loss_scale(self):
        """What a LossScaleOptimizer wants the loss multiplied by, else 1."""
        if isinstance(self.optimizer, keras.mixed_precision.LossScaleOptimizer):
            return tf.cast(self.optimizer.loss_scale, tf.float32)
        return tf.constant(1.0)

    def _report(self, sums, batch, logits):
        self._token_metrics.update(*sums)
        metrics = self._token_metrics.all
        if logits is not None:
            _, labels, weights = batch
            self.compiled_metrics.update_state(labels, logits, weights)
            metrics = self.metrics
        return {metric.name: metric.result() for metric in metrics}


@keras.saving.register_keras_serializable(package="gpt_tf")
class Perplexity(keras.metrics.Mean):
    """Exponential of the mean loss in nats; `update_state` takes losses."""

    def result(self):
        return tf.exp(super().result())


class TokenMetrics:
    """Loss, perplexity and accuracy per token, from sums over tokens.

    It is no Keras object, so that a model does not count the metrics' variables
    among its weights.
    """

    def __init__(self):
        self.loss = keras.metrics.Mean(name="loss")
        self.perplexity = Perplexity(name="perplexity")
        self.accuracy = keras.metrics.Mean(name="token_accuracy")
        self.all = (self.loss, self.perplexity, self.accuracy)

    def update(self, loss_sum, correct_sum, weight_sum):
        """Take the sums of a batch, over all replicas."""
        mean = step.mean_of(loss_sum, weight_sum)
        share = step.mean_of(correct_sum, weight_sum)
        self.loss.update_state(mean, sample_weight=weight_sum)
        self.perplexity.update_state(mean, sample_weight=weight_sum)
        self.accuracy.update_state(share, sample_weight=weight_sum)


def refuse_keras_3(value, role):
    """Raise an error that teaches where a Keras 3 object was handed in."""
    for kind in type(value).__mro__:
        module = kind.__module__.split(".")
        if module[0] in ("keras", "keras_hub", "keras_nlp"):
            raise InputTypeError(
                f"`{role}` expects an object of tf_keras (Keras 2), which TF-MOT "
                f"works on. Received: {type(value).__module__}."
                f"{type(value).__name__}, of Keras 3. Write `import tf_keras as "
                f"keras` and `keras.{_keras_2_home(role)}.{type(value).__name__}(...)`."
            )


def _keras_2_home(role):
    homes = {"optimizer": "optimizers", "loss": "losses"}
    return homes.get(role, role)


def _positive(name, value):
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not value >= 1 or value % 1:
        raise InputError(
            f"`{name}` expects an integer of at least 1. Received: {value!r}."
        )
    return int(value)
