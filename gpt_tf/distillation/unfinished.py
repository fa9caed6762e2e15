"""A folder that is filled over several sittings, and complete or not there at all."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gpt_tf import files
from gpt_tf.errors import DamagedFileError, InputError

_PROGRESS = "progress.json"


def partial_path(path: str | os.PathLike) -> Path:
    """Return where a folder is filled until it is complete: `<name>.partial`."""
    path = Path(path)
    return path.with_name(path.name + ".partial")


def check_place(path: Path, kind: str, overwrite: bool) -> None:
    """Refuse a place that something else stands at.

    Args:
        path: Where a folder is to be put.
        kind: What its manifest says it is.
        overwrite: Whether one of the same kind gives way.

    Raises:
        InputError: A file or folder is there that must stay.
    """
    if not path.exists():
        return
    if not overwrite:
        raise InputError(
            f"A new folder of {kind} was to be written at {path}, but something stands "
            "there. Choose another name, or pass `overwrite` to replace it."
        )
    is_ours = path.is_dir() and not any(path.iterdir())
    with contextlib.suppress(DamagedFileError):
        manifest = files.read_json(path / files.MANIFEST_NAME)
        is_ours |= isinstance(manifest, dict) and manifest.get("kind") == kind
    if not is_ours:
        raise InputError(
            f"Only {kind} can be overwritten at {path}. Received: something that "
            "gpt_tf did not write there. Remove it, or choose another name."
        )


class Unfinished:
    """Files that grow record by record, in a folder beside its final place.

    Now and then `save` forces them to disk and only then counts what they hold. What
    stands after that when the work was interrupted is cut off, and done again.

    Args:
        path: Final place.
        facts: What is being made, and from what, as JSON values. A folder that was
            begun with other facts is begun anew.
        record_bytes: Bytes of one record, by the name of the file.
        on_notice: Takes one-line notices.

    Attributes:
        steps: Number of steps that were saved.

    Raises:
        InputError: Something else stands where it would be filled.

    Example:
        >>> with Unfinished("squares", {"power": 2}, {"values": 8}, print) as folder:
        ...     for step in range(folder.steps, 100):
        ...         folder.write(values=np.array([step**2]))
        ...         folder.save(step + 1)
        ...     folder.finish("numbers", overwrite=False)
    """

    def __init__(
        self,
        path: Path,
        facts: dict,
        record_bytes: dict[str, int],
        on_notice: Callable[[str], None],
    ):
        self.path = path
        self.folder = partial_path(path)
        self._facts = files.parse_json(files.to_json(facts))
        self._record_bytes = record_bytes
        self.steps, self._saved = self._begun(on_notice)
        self._open = {}

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.save(self.steps)  # what stands here is ours from now on
        for name, size in self._record_bytes.items():
            self._open[name] = open(self.folder / name, "ab")
            self._open[name].truncate(self._saved * size)
            self._open[name].seek(0, os.SEEK_END)
        return self

    def __exit__(self, *error):
        self._close()

    def write(self, **arrays: np.ndarray) -> None:
        """Append records: for each file an array whose bytes are to be written."""
        for name, array in arrays.items():
            self._open[name].write(np.ascontiguousarray(array).tobytes())

    def save(self, steps: int) -> None:
        """Force to disk what was written, and count it.

        Args:
            steps: Number of steps that are done.
        """
        for name, file in self._open.items():
            file.flush()
            os.fsync(file.fileno())
            self._saved = file.tell() // self._record_bytes[name]
        self.steps = steps
        progress = {"facts": self._facts, "steps": steps, "records": self._saved}
        files.write_json(self.folder / _PROGRESS, progress)

    def finish(self, kind: str, *, overwrite: bool) -> None:
        """Describe the files in a manifest and put the folder in its final place.

        Args:
            kind: For the manifest, which has the facts too.
            overwrite: Whether a folder that stands there gives way.
        """
        self._close()
        names = list(self._record_bytes)
        files.write_manifest(self.folder, kind, names, **self._facts)
        with files.atomic_folder(self.path, replace=overwrite) as folder:
            for name in (*names, files.MANIFEST_NAME):
                os.replace(self.folder / name, folder / name)
        shutil.rmtree(self.folder)

    def _close(self):
        for file in self._open.values():
            file.close()
        self._open = {}

    def _begun(self, notice):
        """Return the steps and records that an interrupted work left."""
        if not self.folder.exists():
            return 0, 0
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            return 0, 0
        try:
            progress = files.read_json(self.folder / _PROGRESS)
            facts, steps = progress["facts"], progress["steps"]
            count = progress["records"]
        except (DamagedFileError, KeyError, TypeError):
            raise InputError(
                f"{self.folder} is where {self.path.name} is filled. Received: "
                "something that is no interrupted work of gpt_tf. Remove it, or "
                "choose another name."
            ) from None
        if facts != self._facts:
            notice(f"{self.folder} was begun from other things: it starts anew")
            return 0, 0
        for name, size in self._record_bytes.items():
            file = self.folder / name
            if count and (not file.is_file() or file.stat().st_size < count * size):
                notice(f"{self.folder} lacks what it should hold: it starts anew")
                return 0, 0
        if steps:
            notice(f"going on in {self.folder} after {count:,} records")
        return steps, count
