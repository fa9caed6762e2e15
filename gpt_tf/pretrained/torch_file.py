"""PyTorch's checkpoints, of which nothing is run.

A checkpoint holds a pickle, which is a program. Here it is data: operations that build
dicts, lists, tuples, numbers, texts and records of tensors are known, and so are the
few names that stand in such records. Whatever else a pickle holds is refused. No
function of it is looked up, and pickle's own machine is not used.
"""

import math
import mmap
import os
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from gpt_tf.errors import DamagedFileError
from gpt_tf.pretrained.tensors import Tensor, as_float32

_STORAGES = {
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch DoubleStorage": np.dtype(np.float64),
    "torch LongStorage": np.dtype(np.int64),
    "torch IntStorage": np.dtype(np.int32),
    "torch ShortStorage": np.dtype(np.int16),
    "torch CharStorage": np.dtype(np.int8),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch BoolStorage": np.dtype(np.bool_),
}
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_DICT = "collections OrderedDict"
_SIZE = "torch Size"
_NAMES = {_TENSOR, _PARAMETER, _DICT, _SIZE, *_STORAGES}
# A record takes some 200 bytes.
_LARGEST_PICKLE = 1 << 26
_MOST_AXES = 64
_MAGIC = 0x1950A86A20F9469CFC6C


class _Name(str):
    """One of `_NAMES`, as an operand."""


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    size: int


class _View(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple
    strides: tuple


class _Refused(Exception):
    """A pickle holds what is no record of tensors."""


def read_checkpoint(path: str | os.PathLike) -> dict:
    """Return what `torch.save` wrote, with a `Tensor` for each tensor.

    Args:
        path: A checkpoint, of PyTorch's present kind or the one before version 1.6.

    Returns:
        A dict, as a rule of names to tensors.

    Raises:
        DamagedFileError: It is no checkpoint, is damaged, or holds other things than
            dicts, lists, tuples, numbers, texts and tensors.

    Reference: `torch.serialization` of PyTorch; opcodes as in Python's `pickletools`.
    """
    path = Path(path)
    try:
        read = _read_zip if zipfile.is_zipfile(path) else _read_legacy
        found, places = read(path)
        if not isinstance(found, dict):
            raise _Refused(f"a {type(found).__name__} where a dict is expected")
        return _with_tensors(found, path, places)
    except _Refused as error:
        raise DamagedFileError(
            f"{path} expects a checkpoint of tensors, numbers and texts. Received: "
            f"{error}. Nothing of it was run. Save the model's `state_dict()` alone, "
            "or as safetensors."
        ) from None
    except Exception as error:  # of the formats' readers, and of what they were given
        raise DamagedFileError(
            f"{path} cannot be read as a checkpoint of PyTorch's: "
            f"{type(error).__name__} {error}. Fetch it anew."
        ) from None


def _read_zip(path):
    """Return what the pickle holds, and where storages lie: offset and bytes."""
    places, pickles, end = {}, [], path.stat().st_size
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise _Refused(f"{entry.filename!r}, which is compressed")
            _, _, name = entry.filename.partition("/")
            if name.startswith("data/"):
                # What stands before the bytes has a length of its own.
                file.seek(entry.header_offset + 26)
                before = 30 + sum(np.frombuffer(file.read(4), "<u2").tolist())
                start = entry.header_offset + before
                if start + entry.file_size > end:
                    raise _Refused("less than its storages need")
                places[name.removeprefix("data/")] = start, entry.file_size
            elif name == "data.pkl":
                pickles.append(entry)
            elif name == "byteorder" and archive.read(entry) != b"little":
                raise _Refused("numbers whose first byte is the largest")
        if len(pickles) != 1:
            raise _Refused(f"{len(pickles)} pickles")
        if pickles[0].file_size > _LARGEST_PICKLE:
            raise _Refused(f"a pickle of {pickles[0].file_size} bytes")
        with archive.open(pickles[0]) as pickle:
            return _run(pickle.read()), places


def _read_legacy(path):
    # Mapped, since a read takes the memory that a record declares, were there none.
    with (
        path.open("rb") as whole,
        mmap.mmap(whole.fileno(), 0, access=mmap.ACCESS_READ) as file,
    ):
        if _run(file) != _MAGIC:
            raise _Refused("a file that does not begin as a checkpoint does")
        _run(file)  # the protocol's number
        _run(file)  # sizes of the writer's integers
        found = _run(file)
        sizes = {view.storage.key: view.storage for view in _views(found)}
        places, end = {}, path.stat().st_size
        for key in _run(file):
            (count,) = np.frombuffer(file.read(8), "<i8").tolist()
            if key not in sizes or count != sizes[key].size:
                raise _Refused(f"a storage {key!r} of {count} numbers, without record")
            size = count * sizes[key].dtype.itemsize
            places[key] = file.tell(), size
            if file.tell() + size > end:
                raise _Refused("less than its storages need")
            file.seek(size, os.SEEK_CUR)
    return found, places


def _views(value) -> Iterator[_View]:
    waiting, seen = [value], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, _View):
            yield value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value


def _with_tensors(found, path, places):
    """Put a `Tensor` in the place of each record, in dicts within dicts."""

    def convert(value, depth):
        if isinstance(value, _View):
            return _tensor(value, path, places)
        if isinstance(value, dict) and depth:
            return {name: convert(part, depth - 1) for name, part in value.items()}
        return value

    return convert(found, 2)  # nanoGPT's has the tensors one dict further in


def _tensor(view, path, places):
    storage, offset, shape, strides = view
    start, size = places.get(storage.key, (0, -1))
    itemsize = storage.dtype.itemsize
    counts = (offset, *shape, *strides)
    is_known = len(shape) == len(strides) <= _MOST_AXES
    if not is_known or not all(type(n) is int and 0 <= n < 1 << 63 for n in counts):
        raise _Refused("a tensor whose shape or strides are none")
    last = offset + sum(
        (n - 1) * stride for n, stride in zip(shape, strides, strict=True)
    )
    # A view that repeats its numbers could be of any size.
    is_held = 0 in shape or (last < storage.size and math.prod(shape) <= storage.size)
    if size != storage.size * itemsize or not is_held:
        raise _Refused(f"a tensor of shape {shape}, which its storage cannot hold")

    def read():
        if 0 in shape:
            return np.zeros(shape, np.float32)
        stored = np.memmap(path, storage.dtype, "r", start, (storage.size,))
        steps = [stride * itemsize for stride in strides]
        values = np.lib.stride_tricks.as_strided(stored[offset:], shape, steps)
        return np.array(as_float32(values))

    return Tensor(shape, read, storage.dtype.name)


def _run(pickle):
    """Return what a pickle's operations build, if they are known ones."""
    stack, marks, memo = [], [], {}

    def cut():
        nonlocal stack
        items, stack = stack, marks.pop()
        return items

    for operation, operand, _ in pickletools.genops(pickle):
        name = operation.name
        if name in ("PROTO", "FRAME", "STOP"):
            continue
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _OPERANDS:
            stack.append(operand)
        elif name == "MARK":
            marks.append(stack)
            stack = []
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[operand] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[operand])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            if name == "STACK_GLOBAL":
                parts = stack.pop(-2), stack.pop()
                operand = " ".join(_expect(part, str) for part in parts)
            if operand not in _NAMES:
                raise _Refused(f"the name {operand.replace(' ', '.')!r}")
            stack.append(_Name(operand))
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            items = tuple(cut())
            stack.append(items)
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else cut()
            _expect(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else cut()
            pairs = zip(items[::2], items[1::2], strict=True)
            _expect(stack[-1], dict).update(_with_keys(pairs))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            arguments = _expect(stack.pop(), tuple)
            stack.append(_record(_expect(stack.pop(), _Name), arguments))
        elif name == "BUILD":  # attributes of a dict, versions of the layers
            stack.pop()
            _expect(stack[-1], dict)
        else:
            raise _Refused(f"the operation {name}")
    (value,) = stack
    return value


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list}
_OPERANDS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _expect(value, kind):
    if type(value) is not kind:
        raise _Refused(f"a {type(value).__name__} where a {kind.__name__} is expected")
    return value


def _with_keys(pairs):
    """Refuse tuples as keys: one that holds itself twice, and so on, hashes for ever.

    For the same reason no message shows a value that is not known to be a text.
    """
    for key, value in pairs:
        if type(key) not in (str, int, float, bool, type(None)):
            raise _Refused(f"a {type(key).__name__} as a key")
        yield key, value


def _storage(record):
    kind, dtype, key, _, size, *_ = _expect(record, tuple)
    if kind != "storage" or _expect(dtype, _Name) not in _STORAGES:
        raise _Refused("a reference to something else than a storage")
    _expect(size, int)
    return _Storage(_expect(key, str), _STORAGES[dtype], size)


def _record(name, arguments):
    if name == _TENSOR:
        storage, offset, shape, strides, *_ = arguments
        _expect(storage, _Storage)
        return _View(storage, offset, _expect(shape, tuple), _expect(strides, tuple))
    if name == _PARAMETER:
        return _expect(arguments[0], _View)
    if name == _SIZE:
        return tuple(_expect(arguments[0], tuple))
    if name == _DICT:
        return dict(_with_keys(*arguments or ((),)))
    raise _Refused(f"{name.replace(' ', '.')!r} as a function")
