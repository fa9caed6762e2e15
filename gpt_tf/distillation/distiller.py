"""`Distiller`: a Keras model that wraps a teacher and the student that it trains."""

import contextlib
import types

import tensorflow as tf
import tf_keras as keras

from gpt_tf.distillation import losses
from gpt_tf.distillation.generated_text import OnPolicySteps
from gpt_tf.distillation.top_k import logits_from_sorted, logits_from_top_k
from gpt_tf.errors import InputError
from gpt_tf.models import ops
from gpt_tf.models.cached_forward import parts_of
from gpt_tf.models.checks import check_takes_logits, refuse_keras_3
from gpt_tf.models.language_model import (
    TokenTraining,
    check_language_model,
    strategy_scope,
)
from gpt_tf.models.layers import observed
from gpt_tf.models.next_token import (
    NextTokenLoss,
    Perplexity,
    TokenAccuracy,
    TokenMean,
    counted,
    token_weights,
)
from gpt_tf.settings import arguments

_STORED = "teacher_log_probs"
_NO_KNOWLEDGE = (
    "A Distiller without a teacher expects stored knowledge among its inputs. "
    "Received: none. Take the data from `KnowledgeStore.windows`, or pass `teacher=`."
)
# Numbers of `compile`.
_NUMBERS = (
    *("alpha", "temperature", "on_policy_fraction"),
    *("on_policy_prompt_length", "on_policy_seed"),
)


class DistillationWarning(UserWarning):
    """A pair of teacher and student from which little is to be expected."""


@keras.saving.register_keras_serializable(package="gpt_tf")
class Distiller(OnPolicySteps, TokenTraining, keras.Model):
    """Trains a student on the labels and on a teacher's probabilities.

        loss = alpha * student_loss + (1 - alpha) * distillation_loss

    Each is a mean over the tokens of the global batch whose label counts. The teacher
    runs in inference mode and is not trained; the student stays an ordinary GPT.

    Args:
        teacher: A trained GPT, float or quantisation-aware. None where the inputs
            bring stored knowledge with them.
        student: A GPT of at most the teacher's size and context, float or
            quantisation-aware. It is trained in place.

    Call arguments:
        inputs: Token ids `(B, T)`, or a dict of `"tokens"`, `"teacher_log_probs"` and
            perhaps `"teacher_ids"`, as `KnowledgeStore.windows` gives it.

    Returns:
        The student's logits `(B, T, V)`, float32.

    Raises:
        InputError: Teacher and student do not fit each other.
        InputTypeError: One of them is no GPT of this package.

    Example:
        >>> student = make_student(teacher, num_layers=2)
        >>> distiller = Distiller(teacher=teacher, student=student)
        >>> distiller.compile(distillation_loss="forward_kl", temperature=2.0)
        >>> distiller.fit(inputs, labels, epochs=3)
        >>> student.save("student.keras")

    Reference: Hinton, Vinyals and Dean, arXiv:1503.02531; article 3.3.
    """

    def __init__(self, *, teacher, student, name="distiller", **kwargs):
        _check_pair(teacher, student)
        with strategy_scope(student):  # Keras trains a model where it was built
            super().__init__(name=name, **kwargs)
        self.teacher = teacher
        self.student = student
        self.distillation_loss = None
        self._has_measured = False
        self.vocab_size = student.vocab_size
        self.context_length = student.context_length
        self.built = True

    def get_config(self):
        described = keras.saving.serialize_keras_object
        return {
            "teacher": self.teacher and described(self.teacher),
            "student": described(self.student),
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        models = {
            role: config[role]
            and keras.saving.deserialize_keras_object(config[role], custom_objects)
            for role in ("teacher", "student")
        }
        return cls(**{**config, **models})

    def build_from_config(self, config):
        """Nothing: teacher and student are built."""

    def call(self, inputs, training=None):
        return self.student(self.tokens_of(inputs), training=training)

    @property
    def trainable_weights(self):
        found = list(self.student.trainable_weights)
        if self.distillation_loss is not None:
            found += self.distillation_loss.trainable_weights
        return found

    @property
    def non_trainable_weights(self):
        teacher = [] if self.teacher is None else self.teacher.weights
        return [*self.student.non_trainable_weights, *teacher]

    @property
    def changing_weights(self):
        """All weights but the teacher's, which stay as they are."""
        return [*self.trainable_weights, *self.student.non_trainable_weights]

    # Keras: compile and fit

    def compile(
        self,
        optimizer=None,
        metrics=None,
        weighted_metrics=None,
        *,
        student_loss=None,
        distillation_loss=None,
        alpha=0.1,
        temperature=1.0,
        on_policy_fraction=0.0,
        on_policy_prompt_length=None,
        on_policy_seed=0,
        **kwargs,
    ):
        """Choose optimiser, losses and their balance; each has a sensible default.

        Args:
            optimizer: As for `GPTModel.compile`.
            metrics: As for `GPTModel.compile`, of the student's logits.
            weighted_metrics: Likewise.
            student_loss: A tf_keras loss of labels `(B, T)` and logits `(B, T, V)`
                that has a value per token. Default: `NextTokenLoss`.
            distillation_loss: As for `losses.get`. Default: `"forward_kl"`.
            alpha: Share of the student loss, in [0, 1].
            temperature: Divides the logits of both before they are compared, above 0.
            on_policy_fraction: Share of the steps, in [0, 1], in which the student
                continues the text itself and only the teacher judges what it wrote.
            on_policy_prompt_length: Tokens of the text that it is given then; a
                quarter of the window unless given.
            on_policy_seed: Of these steps and of what the student writes.
            **kwargs: As for `GPTModel.compile`.

        Raises:
            InputError: A number is out of its range, or the loss does not fit the
                pair: plain divergences across vocabularies, for example.
            InputTypeError: A Keras 3 object was handed in.
        """
        for name in ("loss", "loss_weights"):
            if name in kwargs:
                raise InputError(
                    "`Distiller.compile` expects `student_loss`, `distillation_loss` "
                    f"and `alpha`. Received: `{name}`. Name the one that is meant."
                )
        refuse_keras_3(student_loss, "student_loss")
        check_takes_logits(student_loss, "student_loss")
        alpha = arguments.number("alpha", alpha, least=0, most=1)
        on_policy_fraction = arguments.number(
            "on_policy_fraction", on_policy_fraction, least=0, most=1
        )
        on_policy_prompt_length = arguments.integer(
            "on_policy_prompt_length", on_policy_prompt_length, 1, or_none=True
        )
        on_policy_seed = arguments.integer("on_policy_seed", on_policy_seed)
        temperature = losses.check_temperature(temperature)
        if on_policy_fraction and self.teacher is None:
            raise InputError(
                "`on_policy_fraction` expects a teacher, to judge what the student "
                "writes. Received: stored knowledge. Pass `teacher=`, or 0."
            )
        student_loss = keras.losses.get(student_loss or NextTokenLoss())
        distillation_loss = losses.get(distillation_loss)
        distillation_loss.build_for(
            self.teacher and shape_of(self.teacher), shape_of(self.student)
        )
        self.student_loss = student_loss
        self.distillation_loss = distillation_loss
        self.alpha = alpha
        self.temperature = temperature
        self.on_policy_fraction = on_policy_fraction
        self.on_policy_prompt_length = on_policy_prompt_length
        self.on_policy_seed = on_policy_seed
        super().compile(
            optimizer, metrics=metrics, weighted_metrics=weighted_metrics, **kwargs
        )
        with self.distribute_strategy.scope(), self.on_the_weights_device():
            # In an object of no kind that Keras looks for weights in.
            self._means = types.SimpleNamespace(by_name=_new_means())
        self._has_measured = False
        if hasattr(self.student, "count_steps_of"):
            self.student.count_steps_of(self.optimizer)

    def get_compile_config(self):
        config = super().get_compile_config()
        if config is None:
            return None
        del config["loss"], config["loss_weights"]
        for name in ("student_loss", "distillation_loss"):
            config[name] = keras.saving.serialize_keras_object(getattr(self, name))
        return {**config, **{name: getattr(self, name) for name in _NUMBERS}}

    def _with_defaults(self, metrics, weighted_metrics):
        return weighted_metrics or []  # the means know of the teacher, too

    def check_data(self, method, x, y):
        super().check_data(method, x, y)
        spec = x.element_spec[0] if isinstance(x, tf.data.Dataset) else x
        names = spec if isinstance(spec, dict) else ()
        if method == "fit" and self.teacher is None and _STORED not in names:
            raise InputError(_NO_KNOWLEDGE)

    def tokens_of(self, x):
        return x["tokens"] if isinstance(x, dict) else super().tokens_of(x)

    def prepare_fit(self, x, batch_size):
        if isinstance(x, tf.data.Dataset):
            tokens = x.map(lambda inputs, *others: self.tokens_of(inputs))
        else:
            tokens = self.tokens_of(x)
        return self.student.prepare_fit(tokens, batch_size)

    # Keras: the step

    @property
    def metrics(self):
        # Those of Keras exist from the first batch on, and are then saved.
        means = self._means.by_name.values() if self._has_measured else ()
        return [*means, *super().metrics]

    def unpack(self, data):
        x, y, sample_weight = super().unpack(data)
        x = x if isinstance(x, dict) else {"tokens": self.tokens_of(x)}
        real = (_STORED, "labelled")
        x = {k: tf.cast(v, tf.float32 if k in real else tf.int32) for k, v in x.items()}
        return x, y, sample_weight

    def observing(self, rows):
        return self.student.observing(rows)

    @property
    def observed_shape(self):
        return self.student.observed_shape

    def update_observers(self, observed):
        self.student.update_observers(observed)

    def loss_of(self, x, y, sample_weight, training):
        if training and self.teacher is None and _STORED not in x:
            raise InputError(_NO_KNOWLEDGE)
        wants = self.distillation_loss.wants
        student = outputs_of(self.student, x["tokens"], wants, training)
        return self.compute_loss(x, y, student, sample_weight), student.logits

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        """Compute the loss of a batch, and take the means that are reported.

        As `keras.Model.compute_loss`, of a dict of inputs; `y_pred` is the student's
        `Outputs`, or its logits.
        """
        student = y_pred
        if not isinstance(student, losses.Outputs):
            student = losses.Outputs(y_pred)
        loss_of = self.distillation_loss
        teacher, known = _teacher_outputs(self.teacher, x, student, loss_of)
        count = tf.reduce_sum(tf.cast(counted(y), tf.float32))
        weights = token_weights(y, sample_weight)
        labelled, known = weights * x.get("labelled", 1.0), weights * known
        known_weight = tf.reduce_sum(known)
        labels = tf.where(counted(y), y, tf.zeros_like(y))
        hard = _label_losses(self.student_loss, labels, student.logits)
        hard = _weighted_sum(hard, labelled)
        soft = loss_of(teacher, student, self.temperature)
        soft = _weighted_sum(soft, known)
        total = self.alpha * hard + (1.0 - self.alpha) * soft
        loss = tf.math.divide_no_nan(total, count)
        if self.student.losses:
            loss += tf.add_n(self.student.losses)
        cross_entropy, correct, weight = ops.token_sums(
            tf.stop_gradient(student.logits), labels, labelled
        )
        agreement, divergence = _nearness(x, teacher.logits, student.logits)
        sums = {
            "loss": (loss * count, count),
            "perplexity": (cross_entropy, weight),
            "token_accuracy": (correct, weight),
            "student_loss": (hard, weight),
            "distillation_loss": (soft, known_weight),
            "teacher_agreement": (_weighted_sum(agreement, known), known_weight),
            "kl_divergence": (_weighted_sum(divergence, known), known_weight),
        }
        for name, mean in self._means.by_name.items():
            mean.add(*sums[name])
        self._has_measured = True
        return loss / self.distribute_strategy.num_replicas_in_sync


def _label_losses(student_loss, labels, logits):
    found = student_loss.call(labels, logits)
    if found.shape.rank != 2:
        raise InputError(
            "`student_loss` expects a loss per token, (B, T). Received: shape "
            f"{tuple(found.shape)} from {type(student_loss).__name__}. Use "
            "NextTokenLoss() or SparseCategoricalCrossentropy(from_logits=True)."
        )
    return tf.cast(found, tf.float32)


def _teacher_outputs(teacher, x, student, loss):
    """Return the teacher's `Outputs`, live or stored, and where there are any."""
    if _STORED in x:
        log_probs = x[_STORED]
        if "teacher_ids" in x:
            own = tf.stop_gradient(student.logits)
            logits = logits_from_top_k(x["teacher_ids"], log_probs, own)
        elif loss.across_vocabularies:
            logits = logits_from_sorted(log_probs, student.logits.shape[-1])
        else:
            raise InputError(
                f"{type(loss).__name__} compares probabilities of the same tokens. "
                "Received: sorted ones, of a teacher with another tokenizer. Compile "
                "with 'universal_logit'."
            )
        return losses.Outputs(logits), tf.cast(log_probs[..., -1] < -1e-6, tf.float32)
    everywhere = tf.ones(tf.shape(student.logits)[:2])
    if teacher is None:
        # Validation without the teacher tells the student's own loss.
        return losses.Outputs(tf.stop_gradient(student.logits)), 0.0 * everywhere
    found = outputs_of(teacher, x["tokens"], loss.wants)
    return tf.nest.map_structure(tf.stop_gradient, found), everywhere


def _new_means():
    """Make the means that a Distiller reports, by their names."""
    means = [TokenMean(name="loss"), Perplexity(), TokenAccuracy()]
    for name in ("student_loss", "distillation_loss", "teacher_agreement"):
        means.append(TokenMean(name=name))
    return {mean.name: mean for mean in [*means, TokenMean(name="kl_divergence")]}


def _nearness(x, teacher_logits, student_logits):
    """Return whether the top-1 tokens are equal, and the KL divergence, each `(B, T)`.

    Where the teacher's probabilities are not of the student's own tokens neither has
    a meaning; both are then 0.
    """
    ranks = _STORED in x and "teacher_ids" not in x
    if ranks or teacher_logits.shape[-1] != student_logits.shape[-1]:
        nothing = tf.zeros(tf.shape(student_logits)[:2])
        return nothing, nothing
    teacher_logits, student_logits = map(
        tf.stop_gradient, (teacher_logits, student_logits)
    )
    same = tf.argmax(teacher_logits, -1) == tf.argmax(student_logits, -1)
    return tf.cast(same, tf.float32), losses.forward_kl(teacher_logits, student_logits)


def _weighted_sum(values, weights):
    # A token of weight 0 may have any loss, infinities included.
    return tf.reduce_sum(tf.where(weights > 0.0, values * weights, 0.0))


def shape_of(model):
    """Return the configuration of the GPTModel that a model is or holds."""
    return dict(model.gpt) if hasattr(model, "gpt") else model.get_config()


def _check_pair(teacher, student):
    for role, model in (("teacher", teacher), ("student", student)):
        if role == "student" or model is not None:
            check_language_model(model, role)
    if teacher is None:
        return
    ours = {id(variable) for variable in teacher.weights}
    if teacher is student or any(id(variable) in ours for variable in student.weights):
        raise InputError(
            "`teacher` and `student` expect two models. Received: the same one, or "
            "models that share weights. Cut the student with `make_student(teacher)`."
        )
    sizes = teacher.count_params(), student.count_params()
    if sizes[0] < sizes[1]:
        raise InputError(
            "`teacher` expects a model at least as large as the student. Received: "
            f"{sizes[0]:,} parameters for the teacher, {sizes[1]:,} for the student. "
            "Are they swapped?"
        )
    if teacher.context_length < student.context_length:
        raise InputError(
            "`teacher` expects a context at least as long as the student's. Received: "
            f"{teacher.context_length} and {student.context_length} positions. Build "
            f"the student with context_length={teacher.context_length}."
        )
    if teacher.distribute_strategy is not student.distribute_strategy:
        raise InputError(
            "Teacher and student expect the same tf.distribute strategy. Received: "
            f"{type(teacher.distribute_strategy).__name__} and "
            f"{type(student.distribute_strategy).__name__}. Build or load both under "
            "`strategy.scope()`."
        )


def outputs_of(model, tokens, wants=("logits",), training=False):
    """Run a GPT and return what losses want to compare.

    Args:
        model: A `GPTModel`, or a `QuantizationAwareGPT`.
        tokens: `(B, T)` int32.
        wants: Any of `"logits"`, `"hidden_states"` and `"attentions"`.
        training: Whether dropout is on.

    Returns:
        `Outputs`: logits `(B, T, V)`; if wanted, hidden states, `L + 1` of
        `(B, T, C)`, and attention, `L` of `(B, H, T, T)`.

    Raises:
        InputError: The model's attention cannot be seen.
    """
    if set(wants) <= {"logits"}:
        return losses.Outputs(model(tokens, training=training))
    parts = parts_of(model)
    attentions, watching = [], contextlib.nullcontext()
    if "attentions" in wants:
        watching = observed(
            parts.blocks,
            lambda layer, name, x: attentions.append(x),
            ("probabilities_activation",),
        )
    with watching:
        x, table = parts.embed(tokens, training)
        hidden = [x]
        for block in parts.blocks:
            x = block(x, training=training)
            hidden.append(x)
        logits = parts.score(x, table, training)
    if "attentions" in wants and len(attentions) != len(parts.blocks):
        raise InputError(
            "Attention transfer expects blocks that show their attention. Received: "
            f"{type(model).__name__} {model.name!r}. Distil a float student first, or "
            "compare hidden states."
        )
    return losses.Outputs(logits, tuple(hidden), tuple(attentions))
