"""GGUF, the file of llama.cpp: its tensors as float32, and its metadata.

The `gguf` library reads the container and undoes the quantisation.
"""

import os
import struct
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
        reader = _reader(gguf)(path)
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


def _reader(gguf):
    """Return the library's reader, but that it reads a list at once.

    The library makes two arrays of each item, of which a vocabulary has 100,000.
    """
    kinds = gguf.GGUFValueType

    class Reader(gguf.GGUFReader):
        def _get_field_parts(self, orig_offs, raw_type):
            inner = self._get(orig_offs, np.uint32)
            is_list = raw_type == kinds.ARRAY and self.byte_order == "I"
            if not is_list or inner[0] == kinds.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            length = self._get(orig_offs + 4, np.uint64)
            kind, count, start = kinds(inner[0]), int(length[0]), orig_offs + 12
            if kind == kinds.STRING:
                parts, end = _texts(memoryview(self.data), start, count)
            else:
                values = self._get(start, self.gguf_scalar_to_np[kind], count)
                if len(values) != count:
                    raise ValueError(f"a list of {count} ends after {len(values)}")
                parts, end = [values], start + values.nbytes
            places = list(range(2, 2 + len(parts)))
            types = [kinds.ARRAY, kind] if count else [kinds.ARRAY]
            return end - orig_offs, [inner, length, *parts], places, types

    return Reader


def _texts(data, start, count):
    """Return texts, each behind its length, and where they end."""
    found = []
    for _ in range(count):
        (size,) = struct.unpack_from("=Q", data, start)
        start += 8 + size
        if start > len(data):
            raise ValueError(f"a text ends at byte {start}")
        found.append(data[start - size : start])
    return found, start
