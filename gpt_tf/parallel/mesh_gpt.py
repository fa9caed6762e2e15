"""Sequences and weights in parts: a GPT on a mesh of devices (article 3.1).

Each device holds some of the heads and feed-forward units and reads some of the
windows and some of their positions. Attention is the one place where positions meet:
there every device gathers the keys and values of all. What each device computes and
what they tell each other follows from the layouts, by DTensor.
"""

import functools
import math

import numpy as np
import tensorflow as tf
import tf_keras as keras
from tensorflow.experimental import dtensor

from gpt_tf.errors import InputError, InputTypeError
from gpt_tf.models import checks, ops
from gpt_tf.models.block import normalize, transformer_block
from gpt_tf.models.cached_forward import parts_of
from gpt_tf.models.gpt import GPTModel
from gpt_tf.models.language_model import TokenTraining
from gpt_tf.models.next_token import (
    IGNORED,
    Perplexity,
    TokenAccuracy,
    TokenMean,
    counted,
)
from gpt_tf.models.optimizer import AdamW
from gpt_tf.models.sizes import block_of, norm_of, refuse_mesh
from gpt_tf.parallel.mesh import (
    ACTIVATIONS,
    check_divides,
    check_fits,
    gather,
    layout,
    layout_map,
    place,
)


class _MeshWeights:
    """A model's weights on a mesh; outside they have the shapes of `GPTModel`'s."""

    @property
    def weights(self):
        return list(self._variables.values())

    @property
    def trainable_weights(self):
        return [v for v in self.weights if v.trainable]

    @property
    def non_trainable_weights(self):
        return [v for v in self.weights if not v.trainable]

    def read_variable(self, variable):
        """Return a weight, or what the optimiser keeps of it, as `GPTModel` has it."""
        return gather(variable).reshape(self.outer_shape(variable))

    def outer_shape(self, variable):
        """Return the shape that `GPTModel` gives to what a variable holds."""
        shape = tuple(variable.shape)
        if len(shape) == 4:  # the QKV kernel: (C, 3, H, D)
            return (shape[0], math.prod(shape[1:]))
        if len(shape) == 3:  # the output kernel: (H, D, C)
            return (math.prod(shape[:2]), shape[2])
        return shape

    def write_variable(self, variable, value):
        """Set a weight, or what the optimiser keeps of it, from `GPTModel`'s shape."""
        value = np.asarray(value, variable.dtype.as_numpy_dtype)
        variable.assign(place(value.reshape(variable.shape), variable.layout))

    def get_weights(self):
        return [self.read_variable(variable) for variable in self.weights]

    def set_weights(self, weights):
        shapes = [self.outer_shape(variable) for variable in self.weights]
        given = [np.shape(weight) for weight in weights]
        if given != shapes:
            raise InputError(
                f"`set_weights` expects the {len(shapes)} arrays of a GPTModel of "
                f"these sizes. Received: {len(given)} arrays, of other shapes."
            )
        for variable, value in zip(self.weights, weights, strict=True):
            self.write_variable(variable, value)


class MeshGPT(_MeshWeights, TokenTraining, keras.Model):
    """A GPTModel whose weights and sequences are divided among a mesh of devices.

    Training computes what the undivided model computes. `fit`, `evaluate` and `predict`
    are Keras's; `get_weights`, `set_weights` and `save` are as of `GPTModel`, whose
    shapes weights have outside: what is saved loads as a plain model or on another
    mesh. A batch that the axis `batch` does not divide is filled up.

    Args:
        model: A GPTModel; its weights are copied.
        mesh: A mesh as of `gpt_tf.parallel.mesh.make_mesh`.

    Raises:
        InputError: The mesh does not divide the heads or the feed-forward units.
        InputTypeError: The model is no GPTModel.

    Example:
        >>> divided = MeshGPT(model, make_mesh(model=2))
        >>> divided.fit(inputs, labels, batch_size=8)
        >>> divided.save("gpt.keras")

    Reference: Shoeybi et al., "Megatron-LM", arXiv:1909.08053; Li et al., "Sequence
    Parallelism", arXiv:2105.13120; article 3.1, subsequences as sub-tasks.
    """

    def __init__(self, model, mesh):
        checks.refuse_keras_3(model, "model")
        if not isinstance(model, GPTModel):
            raise InputTypeError(
                "`model` expects a GPTModel. "
                f"Received: {type(model).__module__}.{type(model).__name__}."
            )
        if keras.mixed_precision.global_policy().name != "float32":
            raise InputError(
                "A mesh expects the precision float32. "
                f"Received: {keras.mixed_precision.global_policy().name}."
            )
        check_fits(mesh, model.get_config())
        refuse_mesh(model.get_config())
        super().__init__(name=model.name)
        self.mesh = mesh
        self.sizes = model.get_config()
        self.vocab_size = model.vocab_size
        self.context_length = model.context_length
        # In `__dict__`, where Keras does not look for variables and metrics.
        self.__dict__["_variables"] = _variables_of(model, mesh)
        self.__dict__["_seeds"] = _seeds_of(model)
        self.__dict__["_means"] = ()
        self.__dict__["_graphs"] = {}
        self.built = True

    # As a plain model

    def to_model(self):
        """Return a plain GPTModel with these weights."""
        model = GPTModel.from_config(self.sizes)
        model.set_weights(self.get_weights())
        return model

    def save(self, filepath, **kwargs):
        """Write a plain GPTModel, as `GPTModel.save` does."""
        self.to_model().save(filepath, **kwargs)

    def get_config(self):
        return dict(self.sizes)

    # The forward pass

    def call(self, inputs, training=False):
        """Return logits `(B, T, V)` on the mesh, of token ids `(B, T)`."""
        if tf.executing_eagerly():
            if not dtensor.is_dtensor(inputs):
                self._check_shape(inputs.shape)
                inputs = self._placed(np.asarray(inputs, np.int32))
            return self._run(self.call, bool(training), inputs)
        weights = {
            name: tf.convert_to_tensor(variable)
            for name, variable in self._variables.items()
            if variable.trainable
        }
        table = weights["embedding.token_table"]
        position_embeddings = weights["embedding.position_table"][: inputs.shape[1]]
        x = tf.gather(table, inputs) + position_embeddings  # (B, T, C)
        x = dtensor.relayout(x, layout(self.mesh, *ACTIVATIONS["x"]))
        x = self._dropped("embedding.dropout", training, x)
        for index in range(self.sizes["num_layers"]):
            block = f"block_{index}."
            x = transformer_block(
                x,
                {
                    name.removeprefix(block): weight
                    for name, weight in weights.items()
                    if name.startswith(block)
                },
                num_heads=self.sizes["num_heads"],
                form=block_of(self.sizes),
                hooks={
                    f"{part}_dropout": functools.partial(
                        self._dropped, f"{block}dropout_{number}", training
                    )
                    for number, part in enumerate(("attention", "feedforward"), 1)
                },
                products=functools.partial(_MeshProducts, self.mesh),
            )
        x = normalize(x, weights, "final_norm.", norm_of(self.sizes))
        return tf.einsum("btc,vc->btv", x, weights.get("head.kernel", table))

    def _dropped(self, name, training, x):
        rate = self.sizes["dropout"]
        if not rate or not training:
            return x
        return ops.dropout(x, rate, self._seeds[name], self._variables[f"{name}.calls"])

    def _check_shape(self, shape):
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

    def _run(self, function, training, *tensors):
        """Call a function as a graph, which DTensor divides."""
        key = function.__name__, training
        if key not in self._graphs:
            self._graphs[key] = tf.function(
                lambda *tensors: function(*tensors, training=training), autograph=False
            )
        with dtensor.default_mesh(self.mesh):
            return self._graphs[key](*tensors)

    # Training

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
        kwargs |= {"jit_compile": False, "steps_per_execution": 1}
        super().compile(optimizer, loss, **kwargs)
        self.check_default_loss("A mesh")
        if self.gradient_accumulation_steps > 1:
            raise InputError(
                "A mesh expects whole batches. Received: gradient accumulation. Use a "
                "larger axis `batch`."
            )
        self.optimizer.build(self.trainable_weights)
        self.__dict__["_means"] = TokenMean("loss"), Perplexity(), TokenAccuracy()
        self._graphs.clear()

    @property
    def metrics(self):
        return list(self._means)

    def _prepare(self, method, given):
        for callback in tf.nest.flatten(given.get("callbacks")):
            if isinstance(callback, keras.callbacks.BackupAndRestore):
                raise InputError(
                    f"`{method}` on a mesh expects other callbacks. Received: "
                    "BackupAndRestore, which does not find a mesh's weights. Resume "
                    "with `gpt_tf.train(mesh=...)`."
                )
        super()._prepare(method, given)

    def prepare_fit(self, x, batch_size):
        # Operations on a mesh are asynchronous. One that a callback began, TensorBoard
        # for the learning rate for example, would find its file closed.
        def wait(epoch, logs):
            dtensor.barrier(self.mesh)

        return [keras.callbacks.LambdaCallback(on_epoch_end=wait)]

    def make_train_function(self, force=False):
        def train(count, *arrays):
            logs = self._measured(arrays, training=True)
            self._train_counter.assign_add(1)  # where TensorBoard finds the step
            return logs

        self.train_function = self._batchwise(train)
        return self.train_function

    def make_test_function(self, force=False):
        self.test_function = self._batchwise(
            lambda count, *arrays: self._measured(arrays, training=False)
        )
        return self.test_function

    def make_predict_function(self, force=False):
        self.predict_function = self._batchwise(
            lambda count, tokens, *_: gather(self(tokens))[:count], has_labels=False
        )
        return self.predict_function

    def _batchwise(self, run, has_labels=True):
        """Return what Keras calls for a step, with an iterator over batches.

        A batch is filled up, with windows that do not count, to as many as the largest
        before it has, and as the mesh divides: another shape would be traced anew.

        Args:
            run: Function of the number of windows that a batch brought, and of its
                tokens, labels and weights, arrays `(B, T)`.
            has_labels: Whether there have to be labels.
        """
        parts = self.mesh.dim_size("batch")
        rows = 0

        def step(iterator):
            nonlocal rows
            x, y, weights = keras.utils.unpack_x_y_sample_weight(next(iterator))
            x = self.tokens_of(x)
            if has_labels:
                checks.check_there_are_labels("fit", y)
            arrays = _checked(x, y if has_labels else x, weights, self.vocab_size)
            count = len(arrays[0])
            rows = max(rows, count + -count % parts)
            arrays = [
                np.pad(array, [(0, rows - count), (0, 0)], constant_values=value)
                for array, value in zip(arrays, (0, IGNORED, 0), strict=True)
            ]
            self._check_shape(arrays[0].shape)
            return run(count, *arrays)

        return step

    def _measured(self, arrays, training):
        """Run a step on a batch, and take its sums; return the metrics."""
        sums = self._run(self._step, training, *map(self._placed, arrays))
        loss, correct, weight, count = (float(gather(total)) for total in sums)
        totals = (loss, count), (loss, weight), (correct, weight)
        for mean, (total, of_all) in zip(self.metrics, totals, strict=True):
            mean.add(total, of_all)
        return {mean.name: float(mean.result()) for mean in self.metrics}

    def _step(self, tokens, labels, weights, training):
        """Compute a step; return its sums over tokens, and the number that counts."""
        if not training:
            return _sums(self(tokens, training=False), labels, weights)
        variables = self.trainable_weights
        count = tf.reduce_sum(tf.cast(counted(labels), tf.float32))
        with tf.GradientTape() as tape:
            sums = _sums(self(tokens, training=True), labels, weights)
            loss = sums[0] * tf.math.reciprocal_no_nan(count)
        gradients = tape.gradient(loss, variables)
        pairs = [
            (dtensor.relayout(gradient, variable.layout), variable)
            for gradient, variable in zip(gradients, variables, strict=True)
        ]
        with ops.graph_owns_gradients():
            self.optimizer.apply_gradients(pairs)
        return sums

    def generate(self, prompt, **options):
        """Continue prompts with the undivided model; see `gpt_tf.generate`."""
        return self.to_model().generate(prompt, **options)


class _MeshProducts:
    """A block's products, with the axes apart that the mesh divides."""

    def __init__(self, mesh, weights, num_heads, axes):
        self.mesh, self.weights = mesh, weights

    def begin(self, x):
        return x

    end = merge_heads = begin

    def dense(self, name, x):
        kernel, bias = self.weights[f"{name}_kernel"], self.weights[f"{name}_bias"]
        if name == "qkv":  # its bias is added when the three are apart
            return tf.einsum("btc,cnhd->nbthd", x, kernel)
        if name == "up":
            return tf.einsum("btc,cf->btf", x, kernel) + bias
        equation = "bhtd,hdc->btc" if name == "output" else "btf,fc->btc"
        return self._on("x", tf.einsum(equation, x, kernel)) + bias

    def split_heads(self, qkv):
        # DTensor refuses the gradients of one transposition and one bias for all three.
        bias = tf.reshape(self.weights["qkv_bias"], [3, *qkv.shape[3:]])
        pieces = zip(tf.unstack(qkv), tf.unstack(bias), strict=True)
        return [
            self._on(name, tf.transpose(x + bias, [0, 2, 1, 3]))  # -> (B, H, T, D)
            for name, (x, bias) in zip(("query", "key", "value"), pieces, strict=True)
        ]

    def _on(self, name, x):
        return dtensor.relayout(x, layout(self.mesh, *ACTIVATIONS[name]))


def _sums(logits, labels, weights):
    """Return loss, correct predictions, weights and labels that count, summed up.

    As `ops.token_sums`, by what DTensor divides.
    """
    vocab_size = logits.shape[-1]
    counts = tf.cast(counted(labels), tf.float32)
    labels = tf.where(counted(labels), labels, tf.zeros_like(labels))
    weights *= counts
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    # The first of the largest logits.
    largest = tf.reduce_max(logits, axis=-1, keepdims=True)
    ids = tf.where(logits >= largest, tf.range(vocab_size), vocab_size)
    correct = tf.cast(tf.reduce_min(ids, axis=-1) == labels, tf.float32)
    sums = losses * weights, correct * weights, weights, counts
    return tuple(map(tf.reduce_sum, sums))


def _checked(tokens, labels, weights, vocab_size):
    """Return a batch as three arrays `(B, T)`."""
    tokens = np.asarray(tokens)
    checks.check_shape_of_ids(tokens, "inputs")
    labels = np.asarray(tf.nest.flatten(labels)[0]).reshape(tokens.shape)
    checks.check_range(tokens, vocab_size, "inputs")
    checks.check_range(labels, vocab_size, "labels", IGNORED)
    weights = np.asarray(1.0 if weights is None else weights, np.float32)
    if weights.ndim == 1:
        weights = weights[:, np.newaxis]
    weights = np.broadcast_to(weights, tokens.shape)
    return tokens.astype(np.int32), labels.astype(np.int32), weights


def _variables_of(model, mesh):
    """Return a model's weights on a mesh, by the name `layer.weight`, in its order."""
    layouts = layout_map(mesh, model.vocab_size)
    heads, head_dim = model.num_heads, model.embedding_dim // model.num_heads
    variables = {}
    for variable in model.weights:
        path = variable.name.partition(":")[0]  # block_0/dropout_1/calls
        name, shape = path.replace("/", "."), tuple(variable.shape)
        if name.endswith("qkv_kernel"):
            shape = (shape[0], 3, heads, head_dim)
        elif name.endswith("output_kernel"):
            shape = (heads, head_dim, shape[1])
        variables[name] = dtensor.DVariable(
            place(variable.numpy().reshape(shape), layouts[name]),
            name=path,
            trainable=variable.trainable,
        )
    return variables


def _seeds_of(model):
    """Return the seed of each dropout layer by its name."""
    parts = parts_of(model)
    seeds = {"embedding.dropout": parts.embedding.embedding_dropout.seed}
    for block in parts.blocks:
        seeds[f"{block.name}.dropout_1"] = block.attention_dropout.seed
        seeds[f"{block.name}.dropout_2"] = block.feedforward_dropout.seed
    return seeds
