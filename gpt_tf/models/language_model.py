"""How a language model is compiled, trained and measured, whatever it is made of.

The step is Keras's own: the loss and the metrics are ordinary Keras objects, computed
by `compute_loss` and `compute_metrics`. What is added here: defaults for `compile`,
checks of the token ids, XLA around the forward and the backward pass, and gradient
accumulation.
"""

import contextlib
import functools
import inspect
import warnings

import tensorflow as tf
import tf_keras as keras

from gpt_tf.errors import InputError, InputTypeError
from gpt_tf.models import checks, ops, placement, step, xla
from gpt_tf.models.next_token import (
    NextTokenLoss,
    Perplexity,
    TokenAccuracy,
    counted,
    share_that_counts,
    token_weights,
)
from gpt_tf.models.optimizer import AdamW
from gpt_tf.settings import arguments

_OWN_METRICS = (Perplexity, TokenAccuracy)


def _prepared(name):
    """Return a method of `keras.Model` that checks its data, and compiles, first."""
    theirs = getattr(keras.Model, name)
    signature = inspect.signature(theirs)

    @functools.wraps(theirs)
    def method(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs)
        self._prepare(name, given.arguments)
        with checks.telling_bad_ids():
            return theirs(*given.args, **given.kwargs)

    return method


class TokenTraining:
    """What a Keras model from token ids `(B, T)` to logits `(B, T, V)` trains with.

    Stands before `keras.Model` among the bases of a class. `fit`, `evaluate`,
    `train_on_batch` and `test_on_batch` are Keras's, and work without a `compile`
    before them. The model has the attribute `vocab_size`. One that wants to observe
    its activations while it trains, as quantisation does, overrides `observing` and
    `take_observed`.
    """

    observed_shape = (0,)

    # compile

    def compile(
        self,
        optimizer=None,
        loss=None,
        metrics=None,
        loss_weights=None,
        weighted_metrics=None,
        run_eagerly=None,
        steps_per_execution=None,
        jit_compile=None,
        pss_evaluation_shards=0,
        *,
        gradient_accumulation_steps=1,
        **kwargs,
    ):
        """Choose optimiser, loss and metrics; each has a sensible default.

        Args:
            optimizer: A tf_keras optimiser or its name. Default: AdamW at 3e-4.
            loss: A tf_keras loss of labels and logits. Default: `NextTokenLoss`, with
                perplexity and token accuracy among the weighted metrics.
            metrics: As for `keras.Model.compile`.
            loss_weights: As for `keras.Model.compile`.
            weighted_metrics: As for `keras.Model.compile`.
            run_eagerly: As for `keras.Model.compile`.
            steps_per_execution: As for `keras.Model.compile`.
            jit_compile: Whether XLA compiles the forward and backward pass. None or
                `"auto"`: yes, but not on TPUs, where it is always so, nor where it
                cannot compile the loss or the model.
            pss_evaluation_shards: As for `keras.Model.compile`.
            gradient_accumulation_steps: Number of equal parts in which a batch is
                computed, one after the other, before the one update; the next larger
                number where it does not divide a batch.
            **kwargs: As for `keras.Model.compile`.

        Raises:
            InputError: A loss or a metric takes probabilities, or is summed up over a
                batch that is computed in parts.
            InputTypeError: A Keras 3 object was handed in.
        """
        for role, value in (
            ("optimizer", optimizer),
            ("loss", loss),
            ("metrics", metrics),
            ("weighted_metrics", weighted_metrics),
        ):
            for part in tf.nest.flatten(value):
                checks.refuse_keras_3(part, role)
                if role != "optimizer":
                    checks.check_takes_logits(part, role)
        steps = arguments.integer(
            "gradient_accumulation_steps", gradient_accumulation_steps, 1
        )
        if isinstance(jit_compile, str):
            arguments.one_of("jit_compile", jit_compile, ["auto"])
        elif jit_compile is not None:
            jit_compile = arguments.switch("jit_compile", jit_compile)
        self.gradient_accumulation_steps = steps
        self._wanted_jit_compile = jit_compile
        self._use_xla = bool(jit_compile)
        if jit_compile in (None, "auto"):
            has_tpu = bool(tf.config.list_logical_devices("TPU"))
            self._use_xla = xla.ON_BY_DEFAULT and not has_tpu
        self.__dict__["_step_functions"] = {}
        # Keras compiles whole steps, and with them the update of all replicas. That is
        # left for a `train_step` of the user's own.
        is_ours = type(self).train_step.__module__.startswith("gpt_tf.")
        theirs = jit_compile is True and (not is_ours or bool(run_eagerly))
        with self.distribute_strategy.scope(), self.on_the_weights_device():
            loss = NextTokenLoss() if loss is None else loss
            self._averages_tokens = isinstance(loss, NextTokenLoss)
            self._label_check = checks.check_of_labels(loss)
            if steps > 1:
                checks.check_is_a_mean(loss)
            super().compile(
                optimizer=AdamW() if optimizer is None else optimizer,
                loss=loss,
                metrics=metrics,
                loss_weights=loss_weights,
                weighted_metrics=self._with_defaults(metrics, weighted_metrics),
                run_eagerly=run_eagerly,
                steps_per_execution=steps_per_execution,
                jit_compile=theirs,
                pss_evaluation_shards=pss_evaluation_shards,
                **kwargs,
            )
        if is_ours:
            # Metrics tell the same of all replicas: several workers' are not to be
            # added.
            self.distribute_reduction_method = "first"

    def _with_defaults(self, metrics, weighted_metrics):
        """Return the weighted metrics with those of the default loss before them."""
        weighted = tf.nest.flatten(weighted_metrics) if weighted_metrics else []
        if not self._averages_tokens:
            # An empty list keeps Keras from remarking that weights meet no metric.
            return weighted_metrics or []
        given = [getattr(m, "name", m) for m in [*tf.nest.flatten(metrics), *weighted]]
        ours = [kind() for kind in _OWN_METRICS]
        return [*(metric for metric in ours if metric.name not in given), *weighted]

    def on_the_weights_device(self):
        """Return a context for what goes with the weights, if one device has them."""
        device = placement.device_of(self)
        if device is None or self.distribute_strategy.num_replicas_in_sync > 1:
            return contextlib.nullcontext()  # each replica has a device of its own
        return tf.device(device)

    def get_compile_config(self):
        config = super().get_compile_config()
        return config and {
            **config,
            "jit_compile": self._wanted_jit_compile,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
        }

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))
        self._build_optimizer()

    def _build_optimizer(self):
        """Make the optimiser's variables before a step is traced.

        TensorFlow traces a function that makes variables twice.
        """
        if isinstance(self.optimizer, keras.optimizers.Optimizer) and self.built:
            with self.distribute_strategy.scope(), self.on_the_weights_device():
                self.optimizer.build(self.trainable_variables)

    @property
    def uses_xla(self):
        """Whether XLA compiles the steps; known after `compile`."""
        return self._use_xla and not self.run_eagerly

    @property
    def jit_compile(self):
        """Whether XLA compiles Keras's steps whole; set it to change `uses_xla`."""
        return self._jit_compile

    @jit_compile.setter
    def jit_compile(self, value):
        self._wanted_jit_compile, self._use_xla = value, bool(value)
        self.__dict__["_step_functions"] = {}
        self._reset_compile_cache()

    # fit, evaluate: Keras's, after a look at what they were given

    fit = _prepared("fit")
    evaluate = _prepared("evaluate")
    train_on_batch = _prepared("train_on_batch")
    test_on_batch = _prepared("test_on_batch")

    def _prepare(self, method, given):
        """Check and complete the arguments of a method of Keras's, a dict."""
        for callback in tf.nest.flatten(given.get("callbacks")):
            checks.refuse_keras_3(callback, "callbacks")
        if given.get("class_weight") is not None:
            raise InputError(
                f"`{method}` of a language model expects `sample_weight`. Received: "
                "`class_weight`, for which Keras takes labels (B, T) for one-hot rows. "
                "Pass `sample_weight=weights[labels]`, weights a NumPy array (V,)."
            )
        for role in ("x", "y"):
            if role in given:
                given[role] = checks.as_arrays(given[role])
        self.check_data(method, given.get("x"), given.get("y"))
        if not self._is_compiled:
            self.compile()
        if method in ("fit", "train_on_batch"):
            self._build_optimizer()
        if method == "fit":
            callbacks = self.prepare_fit(given.get("x"), given.get("batch_size") or 32)
            if callbacks:
                before = tf.nest.flatten(given.get("callbacks") or [])
                given["callbacks"] = [*before, *callbacks]

    def check_data(self, method, x, y):
        """Refuse data that cannot be token ids and labels, before it is read.

        Raises:
            InputError: Inputs without labels, or of another shape or type.
        """
        if isinstance(x, tf.data.Dataset):
            spec = x.element_spec if isinstance(x.element_spec, tuple) else ()
            x, y = (*spec, None, None)[:2]
        if not tf.nest.flatten(x) or not hasattr(tf.nest.flatten(x)[0], "shape"):
            return  # a generator, for one: its batches are seen in the step
        checks.check_there_are_labels(method, y)
        checks.check_shape_of_ids(self.tokens_of(x), "inputs")

    def tokens_of(self, x):
        """Return the token ids `(B, T)` among the inputs."""
        return tf.nest.flatten(x)[0]

    def prepare_fit(self, x, batch_size):
        """Do what has to be done before weights move; return callbacks to add."""
        return []

    # The step

    def train_step(self, data):
        x, y, sample_weight = self.unpack(data)
        differentiate = self._compiled(self.differentiate)
        gradients, observed, y_pred = differentiate(
            x, y, sample_weight, self._share_of_replica(y)
        )
        self.take_observed(observed)
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
            is none; what is for `take_observed`; and the model's outputs for
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
        batch, parts = step.parts_of_batch(
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
        """Return the loss of a batch, as of `compute_loss`, and the outputs."""
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
            not isinstance(metric, _OWN_METRICS) for metric in tf.nest.flatten(theirs)
        )

    def _measured(self, y, y_pred, sample_weight):
        """Update the metrics, or return the outputs that they want."""
        if self.wants_outputs:
            return y_pred
        self.compiled_metrics.update_state(y, y_pred, sample_weight)
        return None

    def report_sums(self, sums, x, y, y_pred, sample_weight):
        """Update the metrics from the sums of `operations.token_sums`; return them.

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
        return tf.math.divide_no_nan(own * replicas, step.add_over_replicas(own))

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
            are for `take_observed`.
        """
        yield lambda: tf.zeros(self.observed_shape)

    def take_observed(self, observed):
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

    # Text

    def generate(self, prompt, **options):
        """Continue prompts; see `gpt_tf.generate`."""
        from gpt_tf.models import cached_forward

        return cached_forward.generate(self, prompt, **options)


class LanguageModel(TokenTraining, keras.Model):
    """A Functional model from token ids `(B, T)` to logits `(B, T, V)` that trains.

    A subclass builds the graph of this package's layers.
    """


def check_language_model(model, role):
    """Refuse what is no GPT of this package.

    Raises:
        InputTypeError: It is none.
    """
    checks.refuse_keras_3(model, role)
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
