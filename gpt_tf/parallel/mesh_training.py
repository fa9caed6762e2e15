"""`fit`, `evaluate` and `predict` of a GPT on a mesh of devices.

The three are Keras's own; what they call for each batch is here: batches of one shape
are put on the mesh, and a step is a graph that DTensor divides.
"""

import functools

import numpy as np
import tensorflow as tf
import tf_keras as keras
from tensorflow.experimental import dtensor

from gpt_tf.errors import InputError
from gpt_tf.models import ops
from gpt_tf.models.checks import check_range, check_there_are_labels
from gpt_tf.models.language_model import TokenTraining
from gpt_tf.models.next_token import (
    IGNORED,
    Perplexity,
    TokenAccuracy,
    TokenMean,
    counted,
)
from gpt_tf.models.optimizer import AdamW
from gpt_tf.parallel.mesh import ACTIVATIONS, check_divides, gather, layout, place


class MeshTraining(TokenTraining):
    """What a model with the attributes `mesh` and `context_length` trains with."""

    def compile(self, optimizer=None, loss=None, metrics=None, **kwargs):
        """Choose optimiser and options, as `GPTModel.compile`; XLA has no part in it.

        Raises:
            InputError: Another loss, other metrics or gradient accumulation are wanted,
                or an optimiser other than `gpt_tf.AdamW`.
        """
        if metrics or kwargs.get("weighted_metrics"):
            raise InputError(
                "A mesh computes loss, perplexity and token accuracy. Received: other "
                "metrics. Evaluate `to_model()` with them."
            )
        optimizer = AdamW() if optimizer is None else optimizer
        if type(optimizer) is not AdamW or optimizer.amsgrad or optimizer.use_ema:
            raise InputError(
                "A mesh expects `gpt_tf.AdamW` without `amsgrad` and `use_ema`: other "
                "optimisers read what they have just written, and DTensor gives them "
                f"the values of the step before. Received: {optimizer!r}."
            )
        if optimizer._mesh is None:
            optimizer = type(optimizer).from_config(
                {**optimizer.get_config(), "mesh": self.mesh}
            )
        super().compile(optimizer, loss, **{**kwargs, "jit_compile": False})
        self.check_default_loss("A mesh")
        if self.gradient_accumulation_steps > 1:
            raise InputError(
                "A mesh expects whole batches. Received: gradient accumulation. Use a "
                "larger axis `batch`."
            )
        self.optimizer.build(self.trainable_weights)
        means = TokenMean("loss"), Perplexity(), TokenAccuracy()
        self.__dict__["_means"] = means  # where Keras does not look for weights
        self._graphs = {}

    @property
    def metrics(self):
        return list(self.__dict__.get("_means", ()))

    def _train(self, tokens, labels, weights, training):
        variables = self.trainable_weights
        count = tf.reduce_sum(tf.cast(counted(labels), tf.float32))
        scale = tf.math.reciprocal_no_nan(count)
        with tf.GradientTape() as tape:
            sums = self._sums(tokens, labels, weights, training)
            loss = sums[0] * scale
        gradients = [
            dtensor.relayout(gradient, variable.layout)
            for gradient, variable in zip(
                tape.gradient(loss, variables), variables, strict=True
            )
        ]
        with ops.graph_owns_gradients():
            self.optimizer.apply_gradients(list(zip(gradients, variables, strict=True)))
        return sums

    def _run(self, batch, training):
        """Run a step on a batch that lies on the mesh, and take its sums."""
        step = self._graph(self._train if training else self._sums, training)
        with dtensor.default_mesh(self.mesh):
            sums = step(*batch)
        loss, correct, weight, count = (float(gather(total)) for total in sums)
        totals = (loss, count), (loss, weight), (correct, weight)
        for mean, (total, of_all) in zip(self.metrics, totals, strict=True):
            mean.add(total, of_all)
        return {mean.name: float(mean.result()) for mean in self.metrics}

    # fit, evaluate and predict are Keras's; what they call for each batch is not.

    def _prepare(self, method, given):
        for callback in tf.nest.flatten(given.get("callbacks")):
            if isinstance(callback, keras.callbacks.BackupAndRestore):
                raise InputError(
                    "`fit` on a mesh does not know BackupAndRestore. Resume with "
                    "`gpt_tf.train(mesh=...)`, or train `to_model()`."
                )
        super()._prepare(method, given)
        is_dataset = isinstance(given.get("x"), tf.data.Dataset)
        self._batch_rows = 0 if is_dataset else given.get("batch_size") or 32

    def prepare_fit(self, x, batch_size):
        return [_Barrier(self.mesh)]

    def make_train_function(self, force=False):
        batches = _Batches(self, self._batch_rows)

        def train(iterator):
            logs = self._run(batches.next_of(iterator), training=True)
            self._train_counter.assign_add(1)  # where TensorBoard finds the step
            return logs

        return train

    def make_test_function(self, force=False):
        batches = _Batches(self, self._batch_rows)
        return lambda iterator: self._run(batches.next_of(iterator), training=False)

    def predict(self, x, batch_size=None, verbose="auto", steps=None, **others):
        """Compute logits `(N, T, V)`, float32, of token ids `(N, T)`."""
        self._batch_rows = 0 if isinstance(x, tf.data.Dataset) else batch_size or 32
        return super().predict(x, batch_size, verbose, steps, **others)

    def make_predict_function(self, force=False):
        batches = _Batches(self, self._batch_rows)

        def predict(iterator):
            tokens, *_ = batches.next_of(iterator, labelled=False)
            return gather(self(tokens))[: batches.rows]

        return predict

    def _not_on_a_mesh(self, *args, **kwargs):
        """Refuse to work on a single batch."""
        raise InputError(
            "A mesh expects `fit`, `evaluate` or `predict`. Received: "
            "a call for one batch. Write `fit(x, y, batch_size=len(x))`, or use "
            "`to_model()`."
        )

    train_on_batch = test_on_batch = predict_on_batch = _not_on_a_mesh

    def _sums(self, tokens, labels, weights, training):
        """Return the sums of `ops.token_sums`, and the number of labels that count."""
        logits = self(tokens, training=training)
        counts = tf.cast(counted(labels), tf.float32)
        labels = tf.where(counted(labels), labels, tf.zeros_like(labels))
        weights *= counts
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        # The first of the largest logits, by reductions: they may be divided.
        largest = tf.reduce_max(logits, axis=-1, keepdims=True)
        ids = tf.where(logits >= largest, tf.range(self.vocab_size), self.vocab_size)
        correct = tf.cast(tf.reduce_min(ids, axis=-1) == labels, tf.float32)
        return (
            tf.reduce_sum(losses * weights),
            tf.reduce_sum(correct * weights),
            tf.reduce_sum(weights),
            tf.reduce_sum(counts),
        )

    def check_shape(self, shape):
        """Refuse batches `(B, T)` that are too long or that the mesh cannot divide."""
        if shape[1] > self.context_length:
            raise InputError(
                f"The model sees at most {self.context_length} positions. "
                f"Received: {shape[1]}. Cut the sequences, or build the model "
                f"with `context_length={shape[1]}`."
            )
        check_divides(self.mesh, shape)

    def _placed(self, array):
        return place(array, layout(self.mesh, *ACTIVATIONS["tokens"]))

    def _graph(self, function, training):
        """Return a method that computes on the mesh as a graph."""
        key = function.__name__, bool(training)
        if key not in self._graphs:
            self._graphs[key] = tf.function(
                functools.partial(function, training=training), autograph=False
            )
        return self._graphs[key]


class _Barrier(keras.callbacks.Callback):
    """Wait for the mesh at the end of an epoch.

    Operations on a mesh are asynchronous. One that a callback began, TensorBoard for
    the learning rate for example, would find its file closed.
    """

    def __init__(self, mesh):
        super().__init__()
        self.mesh = mesh

    def on_epoch_end(self, epoch, logs=None):
        dtensor.barrier(self.mesh)


class _Batches:
    """Puts the batches of a data iterator on a mesh, all in one shape.

    A dataset is read once and each batch divided then. `DTensorDataset` reads it once
    for every device, and one that is shuffled comes to each in another order.

    Args:
        model: A MeshGPT.
        num_rows: Rows of a batch; smaller ones are filled up with windows that do not
            count. 0: as many as the largest so far.

    Attributes:
        rows: Rows of the last batch before it was filled up.
    """

    def __init__(self, model, num_rows):
        self.model = model
        self.num_rows = num_rows
        self.rows = None

    def next_of(self, iterator, labelled=True):
        """Return ids, labels and weights, each `(B, T)` on the mesh."""
        x, y, weights = keras.utils.unpack_x_y_sample_weight(next(iterator))
        if dtensor.is_dtensor(x):  # of a `DTensorDataset`
            if weights is None:
                weights = self.model._placed(np.ones(x.shape, np.float32))
            return x, y, weights
        if labelled:
            check_there_are_labels("fit", y)
        x = np.asarray(x, np.int32)
        y = x if y is None else np.asarray(y, np.int32).reshape(x.shape)
        weights = 1.0 if weights is None else np.asarray(weights, np.float32)
        weights = weights[:, np.newaxis] if np.ndim(weights) == 1 else weights
        weights = np.broadcast_to(weights, x.shape).astype(np.float32)
        check_range(x, self.model.vocab_size, "inputs")
        check_range(y, self.model.vocab_size, "labels", IGNORED)
        self.rows = len(x)
        self.num_rows = max(self.num_rows, self.rows)
        self.model.check_shape((self.num_rows, x.shape[1]))
        filling = [(0, self.num_rows - self.rows), (0, 0)]
        return [
            self.model._placed(np.pad(array, filling, constant_values=value))
            for array, value in ((x, 0), (y, IGNORED), (weights, 0))
        ]
