"""How a language model is compiled and fitted, whatever it is made of.

`fit` and `evaluate` are Keras's own. What is added here: defaults for `compile`, and
checks of what is handed in. The step on a batch is in `gpt_tf.models.train_step`.
"""

import contextlib
import functools
import inspect

import tensorflow as tf
import tf_keras as keras

from gpt_tf.errors import InputError, InputTypeError
from gpt_tf.models import checks, placement, xla
from gpt_tf.models.next_token import NextTokenLoss
from gpt_tf.models.optimizer import AdamW
from gpt_tf.models.train_step import OWN_METRICS, TokenStep
from gpt_tf.settings import arguments


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


class TokenTraining(TokenStep):
    """What a Keras model from token ids `(B, T)` to logits `(B, T, V)` trains with.

    Stands before `keras.Model` among the bases of a class. `fit`, `evaluate`,
    `train_on_batch` and `test_on_batch` are Keras's, and work without a `compile`
    before them. The model has the attribute `vocab_size`.
    """

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
        ours = [kind() for kind in OWN_METRICS]
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

    # Text

    def generate(self, prompt, **options):
        """Continue prompts; see `gpt_tf.generate`."""
        from gpt_tf.models import cached_forward

        return cached_forward.generate(self, prompt, **options)

    def chat(self, messages, **options):
        """Answer a conversation; see `gpt_tf.models.cached_forward.chat`."""
        from gpt_tf.models import cached_forward

        return cached_forward.chat(self, messages, **options)


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
            f"Received: {type(model).__module__}.{type(model).__name__}. "
            "Build it with `gpt_tf.GPTModel(...)`."
        )


def strategy_scope(model):
    """Return the scope of the strategy that a model was built under.

    Where a scope is open already it does nothing: that one stays.
    """
    if tf.distribute.has_strategy():
        return contextlib.nullcontext()
    return model.distribute_strategy.scope()
