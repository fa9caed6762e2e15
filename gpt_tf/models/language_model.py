"""How a language model is compiled, trained and measured, whatever it is made of.

`GPTModel` and the model that quantisation makes of it have these steps in common:
the loss and the metrics are sums over tokens, added up over micro-batches and
replicas, and XLA compiles the forward and the backward pass.
"""

import contextlib

import numpy as np
import tensorflow as tf
import tf_keras as keras

from gpt_tf.errors import InputError, InputTypeError
from gpt_tf.models import operations, step
from gpt_tf.models.optimizer import AdamW


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


class TokenTraining:
    """What a Keras model from token ids `(B, T)` to logits `(B, T, V)` trains with.

    Stands before `keras.Model` among the bases of a class. `fit` works without a
    `compile` before it. The model has the attribute `vocab_size`. One that wants to
    observe its activations while it trains, as quantisation does, overrides
    `call_and_observe` and `take_maxima`; one that learns from more than the labels,
    `sums_of` and `new_token_metrics`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._step_functions = {}

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
        self._token_metrics = self.new_token_metrics() if self._sums_tokens else None
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
        self._check_labels(x, y)
        self._prepare(x, y, kwargs.get("callbacks"))
        callbacks = self.prepare_fit(x, kwargs.get("batch_size") or 32)
        if callbacks:
            given = tf.nest.flatten(kwargs.pop("callbacks", None) or [])
            kwargs["callbacks"] = [*given, *callbacks]
        return super().fit(x, y, **kwargs)

    def prepare_fit(self, x, batch_size):
        """Do what has to be done before weights move; return callbacks to add."""
        return []

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

    @staticmethod
    def _check_labels(x, y):
        if y is None and isinstance(x, (list, np.ndarray, tf.Tensor)):
            raise InputError(
                "`fit` expects labels, the next tokens (B, T). Received: inputs only. "
                "Pass `fit(inputs, labels)` or a dataset of (inputs, labels)."
            )

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
    def uses_xla(self):
        """Whether XLA compiles the steps; known after `compile`."""
        return self._use_xla

    @property
    def sums_tokens(self):
        """Whether the loss is a sum over tokens; known after `compile`."""
        return self._sums_tokens

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
        sums, gradients, maxima, logits = self.differentiate(batch, scale)
        sums, gradients = step.add_over_replicas((sums, gradients))
        self.take_maxima(maxima)
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
        sums, logits = self.measure(batch)
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
            self.cast_inputs(x),
            tf.cast(y, tf.int32),
            token_weights(y, sample_weight),
        )

    def cast_inputs(self, x):
        """Return the inputs of a batch as the model wants them."""
        return tf.cast(x, tf.int32)

    def call_and_observe(self, tokens, weights, forward=None):
        """Call the model for training, and say what it wants to know of the batch.

        For a training step that XLA compiles, or that cuts its batch in parts: the
        call itself then changes no state. A plain call does so where it must.

        Args:
            tokens: `(B, T)` int32.
            weights: `(B, T)` float32; rows of nothing but zeros do not count.
            forward: Function of the tokens that calls this model's layers, for one
                who wants to see more than the logits; the model itself unless given.

        Returns:
            Logits `(B, T, V)`, or what `forward` returns, and a tuple of tensors whose
            largest values over the parts of the batch are for `take_maxima`.
        """
        return self._forward(tokens, forward), ()

    def _forward(self, tokens, forward):
        return self(tokens, training=True) if forward is None else forward(tokens)

    def take_maxima(self, maxima):
        """Take what `call_and_observe` returned, once a step and before the update."""

    def sums_of(self, part, training):
        """Compute the loss of a batch or of a part of it.

        Args:
            part: Inputs, labels `(B, T)` int32 and weights `(B, T)` float32.
            training: Whether the result will be differentiated.

        Returns:
            Sums over tokens, float32 scalars for `new_token_metrics().update`, the
            first of which is trained on; what `call_and_observe` says of maxima; and
            the logits.
        """
        tokens, labels, weights = part
        if training:
            logits, maxima = self.call_and_observe(tokens, weights)
        else:
            logits, maxima = self(tokens, training=False), ()
        return operations.token_sums(logits, labels, weights), maxima, logits

    def new_token_metrics(self):
        """Return metrics that are updated from the sums of `sums_of`."""
        return TokenMetrics()

    def differentiate(self, batch, scale):
        """Compute a training step on a batch, all but the update.

        Args:
            batch: Inputs, labels `(B, T)` int32 and weights `(B, T)` float32.
            scale: Float32 scalar, by which the summed loss is multiplied.

        Returns:
            Sums as of `sums_of`; the gradients of the first one, scaled, in the order
            of the trainable variables; what is for `take_maxima`; and the logits, or
            None where no metric wants them.
        """
        return self._compiled(self._differentiate)(batch, scale)

    def measure(self, batch):
        """Compute the sums of a batch, and its logits or None, without training."""
        return self._compiled(self._measure)(batch)

    def _differentiate(self, batch, scale):
        """Return sums, gradients of the scaled loss sum, maxima, and logits if asked.

        All but the logits are those of the whole batch, whatever its parts.
        """
        kept = []

        def values(part):
            sums, maxima, logits = self.sums_of(part, training=True)
            if self.wants_logits():
                kept.append(logits)
            return (sums[0] * scale, *sums), maxima

        sums, gradients, maxima = step.sums_and_gradients(
            values,
            self.trainable_variables,
            batch,
            self.gradient_accumulation_steps,
        )
        logits = kept[0] if kept and self.gradient_accumulation_steps == 1 else None
        return sums[1:], gradients, maxima, logits

    def _measure(self, batch):
        sums, _, logits = self.sums_of(batch, training=False)
        return sums, logits if self.wants_logits() else None

    def wants_logits(self):
        """Whether a metric of the user's is to be computed from the logits."""
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
        key = f"{function.__name__}/{replica}"  # Keras saves string keys only
        if key not in self._step_functions:

            def traced(*args):
                with operations.inside_xla():
                    return function(*args)

            self._step_functions[key] = tf.function(
                traced, jit_compile=True, autograph=False
            )
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


class LanguageModel(TokenTraining, keras.Model):
    """A Functional model from token ids `(B, T)` to logits `(B, T, V)` that trains.

    A subclass builds the graph of this package's layers.
    """


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


def check_language_model(model, role):
    """Refuse what is no GPT of this package.

    Raises:
        InputTypeError: It is none.
    """
    refuse_keras_3(model, role)
    if not isinstance(model, LanguageModel):
        raise InputTypeError(
            f"`{role}` expects a GPTModel, or one that `quantize_aware` made. "
            f"Received: {type(model).__module__}.{type(model).__name__}."
        )


def beside(model):
    """Return a scope in which what is built goes together with a model.

    It is that of the model's own strategy, unless the caller has opened one already.
    """
    if tf.distribute.has_strategy():
        return contextlib.nullcontext()
    return model.distribute_strategy.scope()


def refuse_keras_3(value, role):
    """Raise an error that teaches where a Keras 3 object was handed in."""
    for kind in type(value).__mro__:
        module = kind.__module__.split(".")
        if module[0] in ("keras", "keras_hub", "keras_nlp"):
            raise InputTypeError(
                f"`{role}` expects an object of tf_keras (Keras 2), which TF-MOT "
                f"works on. Received: {type(value).__module__}."
                f"{type(value).__name__}, of Keras 3. {_mend(value, role)}"
            )


def _mend(value, role):
    """Say what to write instead of an object of Keras 3."""
    homes = {
        "optimizer": "optimizers",
        "loss": "losses",
        "student_loss": "losses",
        "metrics": "metrics",
        "callbacks": "callbacks",
    }
    if role not in homes:
        return (
            "Build it after `import tf_keras as keras`; a GPT is a `gpt_tf.GPTModel`, "
            "whose `from_preset` takes KerasHub's weights."
        )
    name = f"keras.{homes[role]}.{type(value).__name__}(...)"
    return f"Write `import tf_keras as keras` and `{name}`."
