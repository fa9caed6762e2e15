"""What XLA compiles, what it can, and the notice where it cannot."""

import contextlib
import functools

import tensorflow as tf
from tensorflow.python.framework import kernels

from gpt_tf.models import ops

# Whether XLA compiles what is not told otherwise. Its executables stay in memory as
# long as the process.
ON_BY_DEFAULT = True


class XlaNotice(UserWarning):
    """XLA was switched off, since it cannot compile a training step."""


def compiled(function, uses_xla=None):
    """Return a graph function without autograph, compiled by XLA or not.

    Args:
        function: A function of tensors.
        uses_xla: Whether XLA compiles it; `ON_BY_DEFAULT` unless given.
    """
    uses_xla = ON_BY_DEFAULT if uses_xla is None else uses_xla

    def traced(*args):
        with ops.inside_xla() if uses_xla else contextlib.nullcontext():
            return function(*args)

    return tf.function(traced, jit_compile=uses_xla, autograph=False)


def unknown_operations(graph):
    """Return the names of operations in a traced graph that XLA cannot compile."""
    definition = graph.as_graph_def()
    functions = definition.library.function
    nodes = [*definition.node, *(node for f in functions for node in f.node_def)]
    names = {f.signature.name for f in functions}
    return {
        op
        for op in {node.op for node in nodes} - names - {"Placeholder"}
        if not _has_xla_kernel(op)
    }


@functools.cache
def _has_xla_kernel(op):
    _register_xla_kernels()
    found = kernels.get_registered_kernels_for_op(op).kernel
    # Operations without any kernel are rewritten before they run.
    return not found or any(kernel.device_type.endswith("_JIT") for kernel in found)


@functools.cache
def _register_xla_kernels():
    """Let TensorFlow register XLA's kernels, as the first compilation does."""
    tf.function(lambda: tf.constant(0), jit_compile=True)()
