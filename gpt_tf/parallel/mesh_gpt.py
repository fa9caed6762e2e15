"""Sequences and weights in parts: a GPT on a mesh of devices (article 3.1).

Each device holds some of the heads and feed-forward units and reads some of the
windows and some of their positions. Attention is the one place where positions meet:
there every device gathers the keys and values of all. What each device computes and
what they tell each other follows from the layouts, by DTensor.
"""

import itertools
import math

import numpy as np
import tensorflow as tf
import tf_keras as keras
from tensorflow.experimental import dtensor

from gpt_tf.errors import InputError, InputTypeError
from gpt_tf.models import ops
from gpt_tf.models.cached_forward import parts_of
from gpt_tf.models.checks import check_range, refuse_keras_3
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
from gpt_tf.parallel.mesh import (
    ACTIVATIONS,
    check_divides,
    check_fits,
    gather,
    layout,
    layout_map,
    place,
)


class MeshGPT(TokenTraining, keras.Model):
    """A GPTModel whose weights and sequences are divided among a mesh of devices.

    Training computes what the undivided model computes. `fit`, `evaluate`, `predict`,
    `get_weights`, `set_weights` and `save` are as of `GPTModel`, whose shapes weights
    have outside: what is saved loads as a plain model or on another mesh.

    Args:
        model: A GPTModel; its weights are copied.
        mesh: A mesh as of `gpt_tf.parallel.mesh.make_mesh`.
        layouts: A `LayoutMap`; `gpt_tf.parallel.mesh.layout_map` unless given.

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

    def __init__(self, model, mesh, layouts=None):
        refuse_keras_3(model, "model")
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
        super().__init__(name=model.name)
        self.mesh = mesh
        self.sizes = model.get_config()
        self.vocab_size = model.vocab_size
        self.context_length = model.context_length
        self.head_dim = model.embedding_dim // model.num_heads
        layouts = layouts or layout_map(mesh, model.vocab_size)
        self._graphs = {}
        self._own = _Weights(model, self._divided, layouts)
        self.built = True

    # Weights

    def _divided(self, name, shape):
        """Return the shape in which a weight of `GPTModel` has an axis of heads."""
        heads, width = self.sizes["num_heads"], self.head_dim
        if name.endswith("qkv_kernel"):
            return (shape[0], 3, heads, width)
        if name.endswith("output_kernel"):
            return (heads, width, shape[1])
        return shape

    @property
    def weights(self):
        return list(self._own.variables.values())

    @property
    def trainable_weights(self):
        return [v for v in self.weights if v.trainable]

    @property
    def non_trainable_weights(self):
        return [v for v in self.weights if not v.trainable]

    def count_params(self):
        return sum(v.shape.num_elements() for v in self.weights)

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
            # DTensor divides graphs.
            if not dtensor.is_dtensor(inputs):
                inputs = self._placed(inputs)
            with dtensor.default_mesh(self.mesh):
                return self._graph(training)(inputs)
        weights = {
            name: tf.convert_to_tensor(variable)
            for name, variable in self._own.variables.items()
            if variable.trainable
        }
        table = weights["embedding.token_table"]
        length = inputs.shape[1]
        places = weights["embedding.position_table"][:length]  # (T, C)
        x = self._on("x", tf.gather(table, inputs) + places)
        x = self._dropped(x, "embedding.dropout", training)
        for index in range(self.sizes["num_layers"]):
            x = self._block(x, f"block_{index}.", weights, training)
        x = self._normalised(x, weights, "final_norm.")
        kernel = weights.get("head.kernel", table)
        return tf.einsum("btc,vc->btv", x, kernel)

    def check_shape(self, shape):
        """Refuse batches `(B, T)` that are too long or that the mesh cannot divide."""
        if shape[1] > self.context_length:
            raise InputError(
                f"The model sees at most {self.context_length} positions. "
                f"Received: {shape[1]}. Cut the sequences, or build the model "
                f"with `context_length={shape[1]}`."
            )
        check_divides(self.mesh, shape)

    def _placed(self, tokens):
        tokens = np.asarray(tokens, np.int32)
        self.check_shape(tokens.shape)
        return place(tokens, layout(self.mesh, *ACTIVATIONS["tokens"]))

    def _graph(self, training):
        """Return the forward pass as a graph."""
        key = "call", bool(training)
        if key not in self._graphs:
            self._graphs[key] = tf.function(
                lambda tokens: self.call(tokens, training=training), autograph=False
            )
        return self._graphs[key]

    def _on(self, name, x):
        return dtensor.relayout(x, layout(self.mesh, *ACTIVATIONS[name]))

    def _normalised(self, x, weights, prefix):
        return ops.layer_norm(
            x,
            weights[f"{prefix}gamma"],
            weights[f"{prefix}beta"],
            self.sizes["layer_norm_epsilon"],
        )

    def _block(self, x, block, weights, training):
        normal = self._normalised(x, weights, f"{block}attention_norm_")
        qkv = tf.einsum("btc,cnhd->nbthd", normal, weights[f"{block}qkv_kernel"])
        bias = tf.reshape(
            weights[f"{block}qkv_bias"], [3, self.sizes["num_heads"], self.head_dim]
        )
        query, key, value = (
            self._on(name, tf.transpose(x + bias, [0, 2, 1, 3]))  # -> (B, H, T, D)
            for name, x, bias in zip(
                ("query", "key", "value"),
                tf.unstack(qkv),
                tf.unstack(bias),
                strict=True,
            )
        )
        mask = ops.causal_mask(x.shape[1])
        context = ops.attention(query, key, value, mask)
        attended = tf.einsum("bhtd,hdc->btc", context, weights[f"{block}output_kernel"])
        attended = self._on("x", attended) + weights[f"{block}output_bias"]
        x = x + self._dropped(attended, f"{block}dropout_1", training)

        normal = self._normalised(x, weights, f"{block}feedforward_norm_")
        up = tf.einsum("btc,cf->btf", normal, weights[f"{block}up_kernel"])
        hidden = ops.gelu(up + weights[f"{block}up_bias"])
        down = tf.einsum("btf,fc->btc", hidden, weights[f"{block}down_kernel"])
        down = self._on("x", down) + weights[f"{block}down_bias"]
        return x + self._dropped(down, f"{block}dropout_2", training)

    def _dropped(self, x, name, training):
        rate = self.sizes["dropout"]
        if not rate or not training:
            return x
        calls = self._own.variables[f"{name}.calls"].assign_add(1)
        seed = tf.stack([self._own.seeds[name], calls])
        return tf.nn.experimental.stateless_dropout(x, rate, seed, rng_alg="philox")

    def _sums(self, tokens, labels, weights, training):
        """Return the sums of `operations.token_sums`, and the number that counts."""
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

    def _step(self, training):
        """Return the training step or the test step as a graph."""
        key = "step", training
        if key not in self._graphs:
            run = self._train if training else self._test
            self._graphs[key] = tf.function(run, autograph=False)
        return self._graphs[key]

    def _train(self, tokens, labels, weights):
        variables = self.trainable_weights
        count = tf.reduce_sum(tf.cast(counted(labels), tf.float32))
        scale = tf.math.reciprocal_no_nan(count)
        with tf.GradientTape() as tape:
            sums = self._sums(tokens, labels, weights, training=True)
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

    def _test(self, tokens, labels, weights):
        return self._sums(tokens, labels, weights, training=False)

    def _run(self, batch, training):
        """Run a step on a batch that lies on the mesh, and take its sums."""
        with dtensor.default_mesh(self.mesh):
            sums = self._step(training)(*batch)
        loss, correct, weight, count = (float(gather(total)) for total in sums)
        totals = (loss, count), (loss, weight), (correct, weight)
        for mean, (total, of_all) in zip(self.metrics, totals, strict=True):
            mean.add(total, of_all)
        return {mean.name: float(mean.result()) for mean in self.metrics}

    def fit(
        self,
        x=None,
        y=None,
        batch_size=32,
        epochs=1,
        verbose="auto",
        callbacks=None,
        validation_data=None,
        shuffle=True,
        sample_weight=None,
        initial_epoch=0,
        steps_per_epoch=None,
        validation_steps=None,
        **others,
    ):
        """Train, as `GPTModel.fit`.

        Args:
            x: Token ids `(N, T)`, or a `tf.data.Dataset` of batches (inputs, labels) or
                (inputs, labels, sample_weight), all of one static shape.
            y: The next tokens `(N, T)`; not with a dataset.
            batch_size: Windows per step, with arrays.
            epochs: Passes, up to this number.
            verbose: As for `keras.Model.fit`.
            callbacks: tf_keras callbacks.
            validation_data: A dataset, or a tuple (x, y) or (x, y, sample_weight).
            shuffle: Whether arrays are shuffled before each epoch.
            sample_weight: `(N, T)` or `(N,)`, with arrays.
            initial_epoch: The first epoch.
            steps_per_epoch: Steps of an epoch, with a dataset that does not end.
            validation_steps: Steps of a validation.
            **others: What else `keras.Model.fit` takes is refused by its name.

        Returns:
            A `keras.callbacks.History`.

        Raises:
            InputError: The mesh does not divide the batch or its positions, something
                is asked for that a mesh does not have, or as for `GPTModel.fit`.
        """
        _refuse(others, callbacks)
        x, y = self._checked("fit", x, y, callbacks)
        data = _Batches(self, x, y, sample_weight, batch_size, shuffle)
        steps = data.steps if steps_per_epoch is None else steps_per_epoch
        if not isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks = keras.callbacks.CallbackList(
                callbacks,
                add_history=True,
                add_progbar=verbose not in (0, "0"),
                model=self,
                verbose=1 if verbose == "auto" else verbose,
                epochs=epochs,
                steps=steps,
            )
        self.stop_training = False
        callbacks.on_train_begin()
        logs = {}
        for epoch in range(initial_epoch, epochs):
            self.reset_metrics()
            callbacks.on_epoch_begin(epoch)
            for index, batch in enumerate(data.epoch(steps)):
                callbacks.on_train_batch_begin(index)
                logs = self._run(batch, training=True)
                self._train_counter.assign_add(1)  # where TensorBoard finds the step
                callbacks.on_train_batch_end(index, logs)
                if self.stop_training:
                    break
            if validation_data is not None:
                measured = self._validate(validation_data, batch_size, validation_steps)
                logs = {**logs, **{f"val_{key}": v for key, v in measured.items()}}
            callbacks.on_epoch_end(epoch, logs)
            if self.stop_training:
                break
        # Operations on a mesh are asynchronous. One that a callback began, TensorBoard
        # for the learning rate for example, would find its file closed.
        dtensor.barrier(self.mesh)
        callbacks.on_train_end(logs)
        return self.history

    def _validate(self, data, batch_size, steps):
        if isinstance(data, tf.data.Dataset):
            return self.evaluate(data, steps=steps, verbose=0, return_dict=True)
        x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
        return self.evaluate(
            x,
            y,
            sample_weight=weights,
            batch_size=batch_size,
            steps=steps,
            verbose=0,
            return_dict=True,
        )

    def evaluate(
        self,
        x=None,
        y=None,
        batch_size=32,
        verbose="auto",
        sample_weight=None,
        steps=None,
        callbacks=None,
        return_dict=False,
    ):
        """Measure, as `GPTModel.evaluate`."""
        x, y = self._checked("evaluate", x, y, callbacks)
        data = _Batches(self, x, y, sample_weight, batch_size, shuffle=False)
        self.reset_metrics()
        logs = {}
        for batch in data.epoch(data.steps if steps is None else steps):
            logs = self._run(batch, training=False)
        return logs if return_dict else list(logs.values())

    def predict(self, x, batch_size=32, verbose="auto"):
        """Compute logits `(N, T, V)`, float32, of token ids `(N, T)`."""
        x = np.asarray(x, np.int32)
        data = _Batches(self, x, x, None, batch_size, shuffle=False)
        pieces = [gather(self(tokens)) for tokens, *_ in data.epoch(data.steps)]
        return np.concatenate(pieces)[: len(x)]

    def _checked(self, method, x, y, callbacks):
        """Return data once it has been looked at; compile where needed."""
        if isinstance(x, dtensor.DTensorDataset):
            self._prepare(method, {"callbacks": callbacks, "x": None, "y": None})
            return x, y
        given = {"callbacks": callbacks, "x": x, "y": y}
        self._prepare(method, given)
        return given["x"], given["y"]

    def _not_on_a_mesh(self, *args, **kwargs):
        """Refuse to work on a single batch."""
        raise InputError(
            "A mesh expects `fit`, `evaluate` or `predict`. Received: "
            "a call for one batch. Write `fit(x, y, batch_size=len(x))`, or use "
            "`to_model()`."
        )

    train_on_batch = test_on_batch = predict_on_batch = _not_on_a_mesh

    def generate(self, prompt, **options):
        """Continue prompts with the undivided model; see `gpt_tf.generate`."""
        return self.to_model().generate(prompt, **options)


def _refuse(others, callbacks):
    """Refuse arguments and callbacks of Keras's that a mesh does not know."""
    names = sorted(name for name, value in others.items() if value not in (None, 0.0))
    for callback in tf.nest.flatten(callbacks):
        if isinstance(callback, keras.callbacks.BackupAndRestore):
            names.append("BackupAndRestore")
    if names:
        raise InputError(
            f"`fit` on a mesh does not know {', '.join(names)}. Divide the data into "
            "training and validation before, weigh tokens with `sample_weight`, and "
            "resume with `gpt_tf.train(mesh=...)`, or train `to_model()`."
        )


class _Weights:
    """Variables on a mesh by the name `layer.weight`, in the order of a model's.

    It is no Keras object, so that Keras does not look for variables in it.
    """

    def __init__(self, model, divided, layouts):
        self.variables = {}
        self.seeds = _seeds_of(model)
        for variable in model.weights:
            path = variable.name.partition(":")[0]  # block_0/dropout_1/calls
            name = path.replace("/", ".")
            shape = divided(name, tuple(variable.shape))
            self.variables[name] = dtensor.DVariable(
                place(
                    variable.numpy().reshape(shape),
                    self._layout_of(name, shape, layouts),
                ),
                name=path,
                trainable=variable.trainable,
            )

    @staticmethod
    def _layout_of(name, shape, layouts):
        found = layouts[name]
        if found is None or found.rank != len(shape):
            raise InputError(
                f"The layout map expects a layout of rank {len(shape)} for {name}. "
                f"Received: {found and found.sharding_specs}."
            )
        return found


def _seeds_of(model):
    """Return the seed of each dropout layer by its name."""
    parts = parts_of(model)
    seeds = {"embedding.dropout": parts.embedding.embedding_dropout.seed}
    for block in parts.blocks:
        seeds[f"{block.name}.dropout_1"] = block.attention_dropout.seed
        seeds[f"{block.name}.dropout_2"] = block.feedforward_dropout.seed
    return seeds


class _Batches:
    """Batches of one shape on a mesh.

    A dataset is read once and each batch divided then. `DTensorDataset` reads it once
    for every device, and one that is shuffled comes to each in another order.
    """

    def __init__(self, model, x, y, sample_weight, batch_size, shuffle):
        self.model = model
        self.layout = layout(model.mesh, *ACTIVATIONS["tokens"])
        self.iterator = None
        self.source = x
        self.shuffle = shuffle
        self.steps = None
        if _is_dataset(x):
            if not isinstance(x, dtensor.DTensorDataset):
                count = int(x.cardinality())
                self.steps = count if count >= 0 else None
            model.check_shape(_shape_of(x))
            return
        x, y = np.asarray(x, np.int32), np.asarray(y, np.int32)
        y = y.reshape(x.shape)
        weights = _spread(sample_weight, y.shape)
        # Windows that do not count fill the last batch.
        missing = -len(x) % batch_size
        filling = [(0, missing), (0, 0)]
        self.source = [
            np.pad(array, filling, constant_values=value)
            for array, value in ((x, 0), (y, IGNORED), (weights, 0))
        ]
        self.num_windows, self.batch_size = len(x), batch_size
        self.steps = (len(x) + missing) // batch_size
        model.check_shape((batch_size, x.shape[1]))

    def epoch(self, steps):
        """Yield batches; a dataset without an end goes on where it was."""
        if self.iterator is None or self.steps is not None:
            batches = self.source if _is_dataset(self.source) else self._of_arrays()
            self.iterator = iter(batches)
        for _, batch in zip(
            itertools.count() if steps is None else range(steps),
            self.iterator,
            strict=False,
        ):
            yield self._placed(batch)

    def _of_arrays(self):
        order = np.arange(len(self.source[0]))
        if self.shuffle:
            np.random.shuffle(order[: self.num_windows])
        for begin in range(0, len(order), self.batch_size):
            chosen = order[begin : begin + self.batch_size]
            yield [array[chosen] for array in self.source]

    def _placed(self, batch):
        if isinstance(self.source, dtensor.DTensorDataset):
            if len(batch) == 2:
                ones = np.ones(batch[0].shape, np.float32)
                batch = [*batch, place(ones, self.layout)]
            return batch
        x, y, weights = keras.utils.unpack_x_y_sample_weight(tuple(batch))
        x, y = np.asarray(x, np.int32), np.asarray(y, np.int32)
        self.model.check_shape(x.shape)
        check_range(x, self.model.vocab_size, "inputs")
        check_range(y, self.model.vocab_size, "labels", IGNORED)
        arrays = (x, y, _spread(weights, y.shape))
        return [place(array, self.layout) for array in arrays]


def _is_dataset(x):
    return isinstance(x, (tf.data.Dataset, dtensor.DTensorDataset))


def _shape_of(dataset):
    """Return the shape `(B, T)` of a dataset's batches; 0 where it varies."""
    spec = dataset.element_spec
    if not isinstance(spec, tuple) or len(spec) not in (2, 3):
        raise InputError(
            "A mesh expects a dataset of batches (inputs, labels[, weights]). "
            f"Received: {spec}."
        )
    return tuple(size or 0 for size in spec[0].shape)


def _spread(weights, shape):
    """Return a float32 weight per token from `(B, T)`, `(B,)` or None."""
    if weights is None:
        return np.ones(shape, np.float32)
    weights = np.asarray(weights, np.float32)
    weights = weights[:, np.newaxis] if weights.ndim == 1 else weights
    return np.ascontiguousarray(np.broadcast_to(weights, shape))
