"""LiteRT's compiled model of a file, opened alike to verify it and to run it."""

import ctypes
import functools

from ai_edge_litert.compiled_model import CompiledModel, CpuOptions, Options
from ai_edge_litert.environment import Environment
from ai_edge_litert.hardware_accelerator import HardwareAccelerator

# A weight cache of this name is one packed copy in memory, for all signatures.
IN_MEMORY = ":memory"


def compiled(
    model: str | bytes, num_threads: int, weight_cache: str = IN_MEMORY
) -> CompiledModel:
    """Return a compiled model for the CPU.

    Args:
        model: A file's path, or its content, which has to stay as long as the model.
        num_threads: At least 1.
        weight_cache: The file that XNNPACK maps packed weights from, `IN_MEMORY`, or
            nothing, for a copy for each signature.

    Raises:
        RuntimeError: LiteRT cannot open it.
    """
    cpu = CpuOptions(num_threads=num_threads, xnnpack_weight_cache_path=weight_cache)
    options = Options(HardwareAccelerator.CPU, cpu_options=cpu)
    is_file = isinstance(model, str)
    load = CompiledModel.from_file if is_file else CompiledModel.from_buffer
    return load(model, environment=_environment(), options=options)


@functools.cache
def _environment():
    """Return LiteRT's environment, one for all models.

    A path that leads nowhere keeps it from loading compilers for other processors.
    """
    environment = Environment.create(compiler_plugin_path="none")
    # Never taken apart: it would log that, when Python ends.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(environment))
    return environment
