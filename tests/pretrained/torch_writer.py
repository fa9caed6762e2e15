"""Checkpoints as `torch.save` writes them, by stand-ins for PyTorch's classes."""

import io
import pickle
import zipfile
from collections import OrderedDict
from typing import NamedTuple

import ml_dtypes
import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
_KINDS = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.int32): "IntStorage",
    np.dtype(np.uint8): "ByteStorage",
    np.dtype(np.bool_): "BoolStorage",
}


class Global:
    """The name of a function or class, which need not be there."""

    def __init__(self, module, name):
        self.module, self.name = module, name

    def __call__(self):
        raise AssertionError("only its name is written")


class Call(NamedTuple):
    """What a function returns, as a pickle says it."""

    function: Global
    arguments: tuple


class Storage:
    """Numbers that tensors are views of."""

    def __init__(self, values, size=None):
        self.values = np.ascontiguousarray(values).reshape(-1)
        self.size = self.values.size if size is None else size

    def view(self, shape, strides, offset=0):
        """Return a tensor; offset and strides count numbers."""
        arguments = (self, offset, shape, strides, False, OrderedDict())
        return Call(Global("torch._utils", "_rebuild_tensor_v2"), arguments)


def tensor(values):
    """Return a tensor with a storage of its own."""
    values = np.ascontiguousarray(values)
    strides = tuple(step // values.itemsize for step in values.strides)
    return Storage(values).view(values.shape, strides)


def parameter(values):
    """Return what a model's own weights are, a tensor with a gradient."""
    arguments = (tensor(values), True, OrderedDict())
    return Call(Global("torch._utils", "_rebuild_parameter"), arguments)


class _Pickler(pickle._Pickler):
    def __init__(self, file, storages):
        super().__init__(file, protocol=2)
        self.storages = storages

    def persistent_id(self, value):
        if not isinstance(value, Storage):
            return None
        if value not in self.storages:
            self.storages.append(value)
        kind = Global("torch", _KINDS[value.values.dtype])
        key = str(self.storages.index(value))
        return ("storage", kind, key, "cpu", value.size)

    def reducer_override(self, value):
        if isinstance(value, Call):
            return value.function, value.arguments
        return NotImplemented

    def _save_global(self, value):
        self.write(f"c{value.module}\n{value.name}\n".encode())

    dispatch = {**pickle._Pickler.dispatch, Global: _save_global}  # noqa: RUF012


def pickled(value):
    """Return a pickle, and the storages that it names."""
    file, storages = io.BytesIO(), []
    _Pickler(file, storages).dump(value)
    return file.getvalue(), storages


def save_zip(path, value, program=None, compression=zipfile.ZIP_STORED, more=()):
    """Write a checkpoint as PyTorch does since version 1.6.

    Args:
        path: Where to.
        value: What it holds.
        program: A pickle to write instead.
        compression: Of all members.
        more: Further members: names and bytes.
    """
    data, storages = pickled(value)
    members = {
        "archive/data.pkl": data if program is None else program,
        "archive/byteorder": b"little",
        **{f"archive/data/{i}": s.values.tobytes() for i, s in enumerate(storages)},
        "archive/version": b"3\n",
        **dict(more),
    }
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            entry = zipfile.ZipInfo(name)
            entry.compress_type = compression
            entry.extra = b"FB\x05\0ZZZZZ"  # PyTorch moves storages to round places
            archive.writestr(entry, content)
    return path


def save_legacy(path, value, program=None):
    """Write a checkpoint as PyTorch did before version 1.6."""
    data, storages = pickled(value)
    with open(path, "wb") as file:
        for part in (MAGIC, 1001, {"little_endian": True}):
            file.write(pickle.dumps(part, protocol=2))
        file.write(data if program is None else program)
        keys = [str(index) for index in range(len(storages))]
        file.write(pickle.dumps(keys, protocol=2))
        for storage in storages:
            file.write(np.int64(storage.size).tobytes() + storage.values.tobytes())
    return path
