"""The training step: Keras's own, with what it lacks.

The loss and the metrics are ordinary Keras objects, computed by `compute_loss` and
`compute_metrics`. What is added here: checks of the token ids, XLA around the forward
and the backward pass, gradient accumulation, and sums over replicas.
"""

import contextlib
import warnings

import tensorflow as tf
import tf_keras as keras

from gpt_tf.errors import InputError
from gpt_tf.models import checks, ops, xla
from gpt_tf.models.cached_forward import logits_at
from gpt_tf.models.next_token import (
    NextTokenLoss,
    Perplexity,
    TokenAccuracy,
    counted,
    share_that_counts,
    token_weights,
)

OWN_METRICS = (Perplexity, TokenAccuracy)


class TokenStep:
    """Trains and tests a Keras model, which `compile` has prepared, on one batch.

    A part of `TokenTraining`. A model that wants to observe its activations while it
    trains, as quantisation does, overrides `observing` and `update_observers`.
    """

    observed_shape = (0,)

    def train_step(self, data):
        x, y, sample_weight = self.unpack(data)
        differentiate = self._compiled(self.differentiate)
        gradients, observed, y_pred = differentiate(
            x, y, sample_weight, self._share_of_replica(y)
        )
        self.update_observers(observed)
        pairs = zip(gradients, self.trainable_variables, strict=True)
        with ops.graph_owns_gradients():
            self.optimizer.apply_gradients(list(pairs))
        return self._report(x, y, y_pred, sample_weight)

    def test_step(self, data):
        x, y, sample_weight = self.unpack(data)
        y_pred = self._compiled(self.measure)(x, y, sample_weight)
        return self._report(x, y, y_pred, sample_weight)

    def unpack(self, data):
        """Return inputs, labels and weights once their ids are known to be good."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        checks.check_there_are_labels("fit", y)
        tokens = self.tokens_of(x)
        checks.check_shape_of_ids(tokens, "inputs")
        good = [checks.check_range(tokens, self.vocab_size, "inputs")]
        if self._label_check:
            (labels,) = tf.nest.flatten(y)
            good.append(self._label_check(labels, self.vocab_size))
        if self._averages_tokens:
            y = tf.nest.map_structure(lambda labels: tf.cast(labels, tf.int32), y)
        with tf.control_dependencies(good):
            x, y = tf.nest.map_structure(tf.identity, (x, y))
        return x, y, checks.weights_by_row(sample_weight)

    def differentiate(self, x, y, sample_weight, share=None):
        """Compute a training step on a batch, all but the update.

        Args:
            x: Inputs, as the model takes them.
            y: Labels, as the loss takes them.
            sample_weight: As for `keras.Model.fit`, or None.
            share: What the loss is multiplied by, `()` float32, or None for 1.

        Returns:
            Gradients in the order of the trainable variables, None or 0 where there
            is none; what is for `update_observers`; and the model's outputs for
            `compute_metrics`, or None where the metrics have seen them.
        """
        whole = self.gradient_accumulation_steps == 1
        compute = self._differentiate if whole else self._accumulate
        gradients, observed, y_pred = compute(x, y, sample_weight, share)
        if isinstance(self.optimizer, keras.mixed_precision.LossScaleOptimizer):
            gradients = self.optimizer.get_unscaled_gradients(gradients)
        return gradients, observed, y_pred

    def _differentiate(self, x, y, sample_weight, share):
        with self.observing(self._rows_that_count(y, sample_weight)) as observed:
            with tf.GradientTape() as tape:
                loss, y_pred = self.loss_of(x, y, sample_weight, training=True)
                self._validate_target_and_loss(y, loss)
                if share is not None:
                    loss *= tf.cast(share, loss.dtype)
                if isinstance(self.optimizer, keras.mixed_precision.LossScaleOptimizer):
                    loss = self.optimizer.get_scaled_loss(loss)
            gradients = tape.gradient(loss, self.trainable_variables)
        gradients = [g if g is None else tf.convert_to_tensor(g) for g in gradients]
        return gradients, observed(), self._measured(y, y_pred, sample_weight)

    def _accumulate(self, x, y, sample_weight, share):
        """Do as `_differentiate`, with one part's activations in memory at a time."""
        batch, parts = parts_of_batch(
            (x, y, sample_weight), self.gradient_accumulation_steps
        )
        share = 1.0 if share is None else share
        of_all = self.weight_of(y)

        def more(index, gradients, observed, outputs):
            x, y, sample_weight = tf.nest.map_structure(
                lambda part: None if part is None else part[index], batch
            )
            own = share * tf.math.divide_no_nan(self.weight_of(y), of_all)
            new, new_observed, y_pred = self._differentiate(x, y, sample_weight, own)
            gradients = [
                total if gradient is None else total + gradient
                for total, gradient in zip(gradients, new, strict=True)
            ]
            observed = tf.maximum(observed, new_observed)
            outputs = [array.write(index, y_pred) for array in outputs]
            return index + 1, gradients, observed, outputs

        _, gradients, observed, outputs = tf.while_loop(
            lambda index, *_: index < parts,
            more,
            (
                tf.constant(0),
                [tf.zeros(v.shape, v.dtype) for v in self.trainable_variables],
                tf.fill(self.observed_shape, -float("inf")),
                [tf.TensorArray(tf.float32, parts)] if self.wants_outputs else [],
            ),
        )
        return gradients, observed, outputs[0].concat() if outputs else None

    def measure(self, x, y, sample_weight):
        """Compute the loss of a batch without training; return as `differentiate`."""
        _, y_pred = self.loss_of(x, y, sample_weight, training=False)
        return self._measured(y, y_pred, sample_weight)

    def loss_of(self, x, y, sample_weight, training):
        """Return the loss of a batch, as of `compute_loss`, and the outputs.

        Inputs may be `(ids (B, T), places (B, K))`: labels and outputs are then those
        of the places alone.
        """
        if isinstance(x, (list, tuple)) and len(x) == 2:
            y_pred = logits_at(self, *x, training)
        else:
            y_pred = self(x, training=training)
        return self.compute_loss(x, y, y_pred, sample_weight), y_pred

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        """Compute the loss of a batch, as `keras.Model.compute_loss`."""
        loss = super().compute_loss(x, y, y_pred, sample_weight)
        if self._averages_tokens:
            # Keras's mean over batches weighs them by their rows; here a row counts by
            # the share of its labels that do.
            (labels,) = tf.nest.flatten(y)
            rows = tf.cast(tf.shape(labels)[0], tf.float32)
            self.compiled_loss.metrics[0].update_state(
                loss * self.distribute_strategy.num_replicas_in_sync,
                sample_weight=rows * (share_that_counts(labels) - 1.0),
            )
        return loss

    @property
    def wants_outputs(self):
        """Whether the metrics want a batch's outputs, which then have to be kept.

        Ours are updated where the outputs are; others may not be what XLA compiles.
        """
        given = self.compiled_metrics
        theirs = [given._user_metrics or (), given._user_weighted_metrics or ()]
        return type(self).compute_metrics is not keras.Model.compute_metrics or any(
            not isinstance(metric, OWN_METRICS) for metric in tf.nest.flatten(theirs)
        )

    def _measured(self, y, y_pred, sample_weight):
        """Update the metrics, or return the outputs that they want."""
        if self.wants_outputs:
            return y_pred
        self.compiled_metrics.update_state(y, y_pred, sample_weight)
        return None

    def report_sums(self, sums, x, y, y_pred, sample_weight):
        """Update the metrics from the sums of `ops.token_sums`; return them.

        For the default loss, computed elsewhere than by Keras.
        """
        loss, correct, weight = sums
        if not self.compiled_loss.built:
            self.compiled_loss.build(self.output)
        count = self.weight_of(y)
        self.compiled_loss.metrics[0].update_state(
            tf.math.divide_no_nan(loss, count), sample_weight=count
        )
        if self.wants_outputs:
            return self.compute_metrics(x, y, y_pred, sample_weight)
        if not self.compiled_metrics.built:
            self.compiled_metrics.build(self.output, y)
        for metric in self.compiled_metrics.metrics:
            total = loss if isinstance(metric, Perplexity) else correct
            metric.add(total, weight)
        return self.get_metrics_result()

    def check_default_loss(self, who):
        """Refuse what a step that adds up sums over tokens does not know.

        Raises:
            InputError: Another loss than the default one, weights of it, or losses
                that layers add.
        """
        is_plain = type(self.loss) is NextTokenLoss and not self.losses
        if is_plain and self.compiled_loss._user_loss_weights is None:
            return
        raise InputError(
            f"{who} expects the loss NextTokenLoss alone, which can be added up over "
            "parts. Received: another loss, `loss_weights`, or losses that layers add. "
            "Train the model as a whole with these."
        )

    def _report(self, x, y, y_pred, sample_weight):
        if y_pred is None:
            return self.get_metrics_result()
        return self.compute_metrics(x, y, y_pred, sample_weight)

    def weight_of(self, y):
        """Return over how many tokens, or rows, the loss is a mean, `()` float32."""
        labels = tf.nest.flatten(y)[0]
        if self._averages_tokens:
            return tf.reduce_sum(tf.cast(counted(labels), tf.float32))
        return tf.cast(tf.shape(labels)[0], tf.float32)

    def _share_of_replica(self, y):
        """Return what makes the mean of the replicas' means one over all tokens."""
        context = tf.distribute.get_replica_context()
        replicas = context.num_replicas_in_sync if context else 1
        if replicas == 1 or not self._averages_tokens:
            return None
        own = self.weight_of(y)
        return tf.math.divide_no_nan(own * replicas, add_over_replicas(own))

    def _rows_that_count(self, y, sample_weight):
        """Return which rows of a batch have a label that counts, `(B,)` bool."""
        labels = tf.nest.flatten(y)[0]
        if not self._averages_tokens:
            return tf.fill(tf.shape(labels)[:1], True)
        labels = tf.reshape(labels, tf.shape(labels)[:2])
        return tf.reduce_any(token_weights(labels, sample_weight) > 0.0, axis=1)

    @contextlib.contextmanager
    def observing(self, rows):
        """Call this model for training, and find what it wants to know of the batch.

        For a training step that XLA compiles, or that cuts its batch in parts: the
        call itself then changes no state. A call outside does so where it must.

        Args:
            rows: `(B,)` bool, which rows of the batch count.

        Yields:
            A function of nothing, to be called after the model: what it has observed,
            float32 in `observed_shape`. The largest values over the parts of the batch
            are for `update_observers`.
        """
        yield lambda: tf.zeros(self.observed_shape)

    def update_observers(self, observed):
        """Take what was observed, once a step and before the update."""

    def _compiled(self, function):
        """Return `function`, compiled by XLA if so asked, one trace per replica.

        The replicas' communication and the update stay outside: XLA would have one
        replica's computation read another one's variables.
        """

        def run(*args):
            with self.on_the_weights_device():
                if self.uses_xla and self._can_compile(function, args):
                    return self._for_xla(function)(*args)
                return function(*args)

        return run

    def _for_xla(self, function):
        context = tf.distribute.get_replica_context()
        replica = 0
        if context is not None and context.num_replicas_in_sync > 1:
            # Workers of a cluster know their number only when they run; each has
            # a process, and so a cache, of its own.
            known = tf.get_static_value(context.replica_id_in_sync_group)
            replica = 0 if known is None else int(known)
        key = (function.__name__, replica)
        if key not in self._step_functions:
            self._step_functions[key] = xla.compiled(function, True)
        return self._step_functions[key]

    def _can_compile(self, function, args):
        """Return whether XLA knows all operations of a function; if not, give it up."""
        graph = self._for_xla(function).get_concrete_function(*args).graph
        unknown = xla.unknown_operations(graph)
        if unknown:
            self._use_xla = False
            warnings.warn(
                f"XLA cannot compile {', '.join(sorted(unknown))}, which the loss or "
                "the model uses: training goes on without XLA. Say so without this "
                "notice: `compile(jit_compile=False)`.",
                xla.XlaNotice,
                stacklevel=2,
            )
        return not unknown


def parts_of_batch(batch, least):
    """Cut a structure of tensors `(B, ...)` and None into equal parts.

    Args:
        batch: The structure.
        least: Number of parts, at least 1; where it does not divide `B`, as in the
            last batch of an epoch, the next larger number that does.

    Returns:
        The structure of tensors `(parts, B / parts, ...)`, and `parts`, `()` int32.
    """
    first = next(x for x in tf.nest.flatten(batch) if x is not None)
    rows = tf.shape(first)[0]
    numbers = tf.range(1, rows + 1)
    fits = (rows % numbers == 0) & (numbers >= tf.minimum(least, rows))
    parts = tf.reduce_min(tf.where(fits, numbers, rows))

    def cut(x):
        if x is None:
            return None
        shape = tf.concat([[parts, rows // parts], tf.shape(x)[1:]], 0)
        return tf.ensure_shape(tf.reshape(x, shape), [None, None, *x.shape[1:]])

    return tf.nest.map_structure(cut, batch), parts


def add_over_replicas(tensors):
    """Add up a structure of tensors over all replicas, inside a replica."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return tensors
    with ops.graph_owns_gradients():
        return context.all_reduce(tf.distribute.ReduceOp.SUM, tensors)


def max_over_replicas(tensor):
    """Return the largest values of a float tensor over all replicas, inside one.

    TensorFlow's replicas can add but not compare: each adds its values at an index
    of its own.
    """
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return tensor
    indices = tf.range(context.num_replicas_in_sync)
    shape = tf.concat([tf.shape(indices), tf.ones([tf.rank(tensor)], tf.int32)], 0)
    own = tf.reshape(indices == context.replica_id_in_sync_group, shape)
    spread = tf.where(own, tensor[tf.newaxis], tf.zeros([], tensor.dtype))
    return tf.reduce_max(add_over_replicas(spread), axis=0)
