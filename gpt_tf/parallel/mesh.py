"""A mesh of devices with axes `batch`, `model` and `sequence`, on DTensor.

What a GPT's weights and activations look like on a mesh is written down here: which
of their axes is divided among which axis of the mesh.
"""

import math

import numpy as np
import tensorflow as tf
import tf_keras as keras
from tensorflow.experimental import dtensor

from gpt_tf.errors import InputError
from gpt_tf.parallel.config import AXES
from gpt_tf.parallel.data import devices_for
from gpt_tf.settings import arguments

# How activations lie on a mesh: for each of their axes the mesh's that divides it.
ACTIVATIONS = {
    "tokens": ("batch", "sequence"),  # (B, T), labels and weights too
    "x": ("batch", "sequence", None),  # (B, T, C), between and within blocks
    "query": ("batch", "model", "sequence", None),  # (B, H, T, D)
    "key": ("batch", "model", None, None),  # every device sees those of all positions
    "value": ("batch", "model", None, None),
}


def make_mesh(batch=1, model=1, sequence=1, *, devices=None):
    """Arrange devices in a mesh.

    Args:
        batch: Parts into which a batch is divided.
        model: Parts into which heads, feed-forward units and the vocabulary are.
        sequence: Parts into which the positions of a window are.
        devices: `batch * model * sequence` device names. Default: GPUs, or logical
            CPUs, into which the CPU is split if TensorFlow has not been used yet.

    Returns:
        A `tf.experimental.dtensor.Mesh` with these axes.

    Raises:
        InputError: A number is below 1, or there are too few devices.

    Example:
        >>> mesh = make_mesh(batch=2, model=2)

    Reference: tf.experimental.dtensor.
    """
    sizes = {"batch": batch, "model": model, "sequence": sequence}
    sizes = {name: arguments.integer(name, size, 1) for name, size in sizes.items()}
    names = devices_for(math.prod(sizes.values()), devices, "A mesh's parts")
    return dtensor.create_mesh(list(sizes.items()), devices=names)


def check_fits(mesh, sizes):
    """Refuse a mesh that does not divide a model.

    Args:
        mesh: As of `make_mesh`.
        sizes: `num_heads` and `feedforward_dim` of a GPT.

    Raises:
        InputError: It does not.
    """
    arguments.instance("mesh", mesh, dtensor.Mesh, "what `make_mesh` returns")
    missing = [name for name in AXES if name not in mesh.dim_names]
    if missing:
        raise InputError(
            f"A mesh expects the axes {', '.join(AXES)}. Received: "
            f"{', '.join(mesh.dim_names)}. Make it with `make_mesh`."
        )
    for name in ("num_heads", "feedforward_dim"):
        if sizes[name] % mesh.dim_size("model"):
            raise InputError(
                f"The mesh divides `{name}` among {mesh.dim_size('model')} devices of "
                f"its axis `model`. Received: {sizes[name]}. Use a mesh whose axis "
                "divides it, or a model of another size."
            )


def check_divides(mesh, shape):
    """Refuse batches that a mesh does not divide.

    Args:
        mesh: As of `make_mesh`.
        shape: `(B, T)`, windows of a batch and positions of a window.

    Raises:
        InputError: It does not divide them.
    """
    for what, size, axis in (
        ("windows of a batch", shape[0], "batch"),
        ("positions of a window", shape[1], "sequence"),
    ):
        parts = mesh.dim_size(axis)
        if size % parts:
            raise InputError(
                f"The mesh divides the {what} among {parts} devices of its axis "
                f"`{axis}`. Received: {size}. Use a multiple of {parts}."
            )


def layout(mesh, *axes):
    """Return the layout in which each axis of a tensor is divided, None for whole."""
    return dtensor.Layout([axis or dtensor.UNSHARDED for axis in axes], mesh)


def layout_map(mesh, vocab_size):
    """Return how each weight of a GPT lies on a mesh, by the name `layer.weight`.

    Heads and feed-forward units are divided as in Megatron-LM: of two products in a
    row the first is divided by its outputs and the second by its inputs, so that
    activations are added up over the devices once for both.

    Args:
        mesh: As of `make_mesh`.
        vocab_size: `V`. A vocabulary that the axis `model` does not divide stays
            whole on every device.

    Returns:
        A `tf_keras.dtensor.experimental.LayoutMap`.

    Reference: Shoeybi et al., "Megatron-LM", arXiv:1909.08053, section 3.
    """
    table = None if vocab_size % mesh.dim_size("model") else "model"
    found = keras.dtensor.experimental.LayoutMap(mesh=mesh)
    found[r"embedding\.token_table"] = layout(mesh, table, None)
    found[r"embedding\.position_table"] = layout(mesh, None, None)
    found[r"block_\d+\.qkv_kernel"] = layout(mesh, None, None, "model", None)
    found[r"block_\d+\.output_kernel"] = layout(mesh, "model", None, None)
    found[r"block_\d+\.up_kernel"] = layout(mesh, None, "model")
    found[r"block_\d+\.up_bias"] = layout(mesh, "model")
    found[r"block_\d+\.down_kernel"] = layout(mesh, "model", None)
    found[r"head\.kernel"] = layout(mesh, table, None)
    found[r".*(gamma|beta|bias)"] = layout(mesh, None)
    found[r".*\.calls"] = layout(mesh)
    return found


def place(array, wanted):
    """Put a NumPy array on a mesh, each device its part.

    Args:
        array: Of any shape; the mesh divides the axes that `wanted` divides.
        wanted: Its layout.

    Returns:
        A DTensor.
    """
    array = np.asarray(array)
    parts = []
    for location in wanted.mesh.local_device_locations():
        index = []
        for size, axis in zip(array.shape, wanted.sharding_specs, strict=True):
            if axis == dtensor.UNSHARDED:
                index.append(slice(None))
                continue
            part = size // wanted.mesh.dim_size(axis)
            index.append(slice(location[axis] * part, (location[axis] + 1) * part))
        parts.append(tf.constant(array[tuple(index)]))
    return dtensor.pack(parts, wanted)


def gather(value):
    """Return a DTensor, or a variable of one, as a NumPy array."""
    if isinstance(value, dtensor.DVariable):
        value = value.read_value()
    found = dtensor.fetch_layout(value)
    if not found.is_fully_replicated():
        whole = dtensor.Layout.replicated(found.mesh, rank=found.rank)
        value = dtensor.relayout(value, whole)
    # All devices have the same then.
    return np.asarray(dtensor.unpack(value)[0])
