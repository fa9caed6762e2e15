"""GGUF, the file of llama.cpp: its tensors as float32, and its metadata.

The `gguf` library reads the container and undoes the quantisation.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.pretrained.tensors import Tensor

KNOWN = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K")


class GGUF(NamedTuple):
    """What a GGUF file holds.

    Attributes:
        metadata: Texts, numbers and lists, by name.
        tensors: By llama.cpp's names; a matrix is `(outputs, inputs)`.
    """

    metadata: dict
    tensors: dict[str, Tensor]


def read_gguf(path: str | os.PathLike) -> GGUF:
    """Read a GGUF file; its tensors' numbers are read when they are asked for.

    Raises:
        InputError: The library is missing, or a tensor is quantised in another way than
            those of `KNOWN`.
        DamagedFileError: It is no GGUF file, or a part of one.

    Reference: the GGUF specification of ggml.
    """
    try:
        import gguf
    except ImportError:
        raise InputError(
            f"{path} expects the `gguf` library to be read. "
            "Install it with `pip install gguf`."
        ) from None
    path = Path(path)
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        stored = reader.tensors
        for tensor in stored:
            expected = tensor.data_offset + tensor.n_bytes
            if expected > path.stat().st_size:
                raise ValueError(f"{tensor.name} ends at byte {expected}")
    except Exception as error:  # of the library, which is given anything
        raise DamagedFileError(
            f"{path} cannot be read as GGUF: {type(error).__name__} {error}. "
            "Fetch it anew."
        ) from None
    for tensor in stored:
        if tensor.tensor_type.name not in KNOWN:
            raise InputError(
                f"{path} expects tensors of the types {', '.join(KNOWN)}. Received: "
                f"{tensor.tensor_type.name}, of {tensor.name}. Take a file that is "
                "quantised in one of these ways, Q8_0 for example."
            )

    def reader_of(tensor, shape):
        def read():
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            return np.asarray(values, np.float32).reshape(shape)

        return read

    tensors = {}
    for tensor in stored:
        shape = tuple(int(axis) for axis in reversed(tensor.shape))
        kind = tensor.tensor_type.name
        tensors[tensor.name] = Tensor(shape, reader_of(tensor, shape), kind)
    return GGUF(metadata, tensors)
