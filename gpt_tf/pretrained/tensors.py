"""Tensors in a file, of which shapes are known before any number is read."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from gpt_tf import artifacts
from gpt_tf.errors import DamagedFileError, InputError

INDEX = "model.safetensors.index.json"


class Tensor(NamedTuple):
    """A tensor of a file.

    Attributes:
        shape: Its axes.
        read: Returns its numbers, float32 unless they are integers.
        dtype: The type that they are stored in, by the file's name for it.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    dtype: str


def as_float32(values: np.ndarray) -> np.ndarray:
    """Return 16-bit and double numbers in float32, and others as they are."""
    is_float = values.dtype.kind == "f" or values.dtype == ml_dtypes.bfloat16
    return values.astype(np.float32, copy=False) if is_float else values


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, by name.

    Raises:
        DamagedFileError: It is no safetensors file.
    """

    def reader(name):
        def read():
            with _opened(path) as file:
                return as_float32(file.get_tensor(name))

        return read

    with _opened(path) as file:
        found = {}
        for name in file.keys():  # noqa: SIM118 - it is no dict
            part = file.get_slice(name)
            shape = tuple(part.get_shape())
            found[name] = Tensor(shape, reader(name), part.get_dtype())
        return found


def read_shards(index: Path) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    """Return the tensors of a model in several files, by name, and these files.

    Raises:
        InputError: A file that the index names is missing.
        DamagedFileError: A file is no safetensors file, or the index none.
    """
    places = _places_of(index)
    files = _files_of(index, places)
    shards = {file.name: read_safetensors(file) for file in files}
    missing = [name for name, shard in places.items() if name not in shards[shard]]
    if missing:
        raise DamagedFileError(
            f"{index} expects {missing[0]!r} in {places[missing[0]]}, which lacks it. "
            "Fetch the model's files anew."
        )
    return {name: shards[shard][name] for name, shard in places.items()}, files


def shards_of(index: Path) -> tuple[Path, ...]:
    """Return the files that an index names; raises as `read_shards`."""
    return _files_of(index, _places_of(index))


def _places_of(index):
    stated = artifacts.read_json(index)
    places = stated.get("weight_map") if isinstance(stated, dict) else None
    if not isinstance(places, dict) or not all(
        isinstance(name, str) and name == os.path.basename(name)
        for name in places.values()
    ):
        raise DamagedFileError(
            f"{index} expects a `weight_map` of tensors to files beside it. "
            "Fetch the model's files anew."
        )
    return places


def _files_of(index, places):
    for name in sorted(set(places.values())):
        if not index.with_name(name).is_file():
            raise InputError(
                f"{index} expects the file {name} beside it, with "
                f"{list(places.values()).count(name)} of the model's tensors. There "
                "is none. Fetch it, too."
            )
    return tuple(index.with_name(name) for name in sorted(set(places.values())))


def _opened(path):
    try:
        return safetensors.safe_open(path, framework="np")
    except Exception as error:  # safetensors' own
        raise DamagedFileError(
            f"{path} cannot be read as safetensors: {error}. Fetch it anew."
        ) from None
