"""Sequences and weights in parts: a GPT on a mesh of devices (article 3.1).

Each device holds some of the heads and feed-forward units and reads some of the
windows and some of their positions. Attention is the one place where positions meet:
there every device gathers the keys and values of all. What each device computes and
what they tell each other follows from the layouts, by DTensor.
"""

import functools

import numpy as np
import tensorflow as tf
import tf_keras as keras
from tensorflow.experimental import dtensor

from gpt_tf.errors import InputError, InputTypeError
from gpt_tf.models import ops
from gpt_tf.models.block import normalize, transformer_block
from gpt_tf.models.cached_forward import parts_of
from gpt_tf.models.checks import refuse_keras_3
from gpt_tf.models.gpt import GPTModel
from gpt_tf.parallel.mesh import (
    ACTIVATIONS,
    check_fits,
    divided_shape,
    gather,
    layout,
    layout_map,
    outer_shape,
    place,
)
from gpt_tf.parallel.mesh_training import MeshTraining


class MeshGPT(MeshTraining, keras.Model):
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
        self._own = _Weights(model, layouts or layout_map(mesh, model.vocab_size))
        self._graphs = {}
        self._batch_rows = 0
        self.built = True

    # Weights

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
        return gather(variable).reshape(outer_shape(variable.shape))

    def outer_shape(self, variable):
        """Return the shape that `GPTModel` gives to what a variable holds."""
        return outer_shape(variable.shape)

    def write_variable(self, variable, value):
        """Set a weight, or what the optimiser keeps of it, from `GPTModel`'s shape."""
        value = np.asarray(value, variable.dtype.as_numpy_dtype)
        variable.assign(place(value.reshape(variable.shape), variable.layout))

    def get_weights(self):
        return [self.read_variable(variable) for variable in self.weights]

    def set_weights(self, weights):
        shapes = [outer_shape(variable.shape) for variable in self.weights]
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
                inputs = np.asarray(inputs, np.int32)
                self.check_shape(inputs.shape)
                inputs = self._placed(inputs)
            with dtensor.default_mesh(self.mesh):
                return self._graph(self.call, training)(inputs)
        weights = {
            name: tf.convert_to_tensor(variable)
            for name, variable in self._own.variables.items()
            if variable.trainable
        }
        table = weights["embedding.token_table"]
        positions = weights["embedding.position_table"][: inputs.shape[1]]  # (T, C)
        x = self._relaid("x", tf.gather(table, inputs) + positions)
        if training and self.sizes["dropout"]:
            x = self._dropped("embedding.dropout", x)
        for index in range(self.sizes["num_layers"]):
            x = self._block(f"block_{index}.", x, weights, training)
        epsilon = self.sizes["layer_norm_epsilon"]
        x = normalize(x, weights, "final_norm.", epsilon)
        kernel = weights.get("head.kernel", table)
        return tf.einsum("btc,vc->btv", x, kernel)

    def _block(self, prefix, x, weights, training):
        """Compute `transformer_block`, whose tensors get their layouts by its hooks."""
        own = {
            name.removeprefix(prefix): weight
            for name, weight in weights.items()
            if name.startswith(prefix)
        }
        own["qkv_bias"] = tf.reshape(own["qkv_bias"], own["qkv_kernel"].shape[1:])
        hooks = {
            name: functools.partial(self._relaid, name)
            for name in ("query", "key", "value")
        }
        for name in ("attended_activation", "down_activation"):
            hooks[name] = functools.partial(self._relaid, "x")
        if training and self.sizes["dropout"]:
            for name, layer in (
                ("attention_dropout", "dropout_1"),
                ("feedforward_dropout", "dropout_2"),
            ):
                hooks[name] = functools.partial(self._dropped, prefix + layer)
        return transformer_block(
            x,
            own,
            num_heads=self.sizes["num_heads"],
            epsilon=self.sizes["layer_norm_epsilon"],
            hooks=hooks,
        )

    def _relaid(self, name, x):
        return dtensor.relayout(x, layout(self.mesh, *ACTIVATIONS[name]))

    def _dropped(self, name, x):
        calls = self._own.variables[f"{name}.calls"]
        return ops.dropout(x, self.sizes["dropout"], self._own.seeds[name], calls)

    def generate(self, prompt, **options):
        """Continue prompts with the undivided model; see `gpt_tf.generate`."""
        return self.to_model().generate(prompt, **options)


class _Weights:
    """Variables on a mesh by the name `layer.weight`, in the order of a model's.

    It is no Keras object, so that Keras does not look for variables in it.
    """

    def __init__(self, model, layouts):
        self.variables = {}
        self.seeds = _seeds_of(model)
        for variable in model.weights:
            path = variable.name.partition(":")[0]  # block_0/dropout_1/calls
            name = path.replace("/", ".")
            shape = divided_shape(name, tuple(variable.shape), model.num_heads)
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
