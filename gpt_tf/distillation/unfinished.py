"""A folder that is filled over several sittings, and complete or not there at all."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gpt_tf import artifacts
from gpt_tf.errors import DamagedFileError, InputError


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
        manifest = artifacts.read_json(path / artifacts.MANIFEST_NAME)
        is_ours |= isinstance(manifest, dict) and manifest.get("kind") == kind
    if not is_ours:
        raise InputError(
            f"Only {kind} can be overwritten at {path}. Received: something that "
            "gpt_tf did not write there. Remove it, or choose another name."
        )


@contextlib.contextmanager
def unfinished(
    path: Path,
    kind: str,
    facts: dict,
    record_bytes: dict[str, int],
    on_notice: Callable[[str], None],
    *,
    overwrite: bool = False,
) -> Iterator["Unfinished"]:
    """Fill a folder that takes its place, with a manifest, when the block ends well.

    What an interrupted block left is gone on with by the next one of the same facts.

    Args:
        path: Final place.
        kind: What the manifest says it is.
        facts: What is being made, and from what, as JSON values, for the manifest too.
            A folder that was begun with other facts is begun anew.
        record_bytes: Bytes of one record, by the name of the file.
        on_notice: Takes one-line notices.
        overwrite: Whether a folder that stands at `path` gives way.

    Yields:
        The folder.

    Raises:
        InputError: As for `files.atomic_folder`.

    Example:
        >>> where = Path("squares"), "numbers", {"power": 2}, {"values": 8}, print
        >>> with unfinished(*where) as folder:
        ...     for step in range(folder.steps, 100):
        ...         folder.write(values=np.array([step**2]))
        ...         folder.save(step + 1)
    """
    with artifacts.atomic_folder(path, replace=overwrite, keep=True) as folder:
        for other in set(os.listdir(folder)) - {*record_bytes}:
            os.unlink(folder / other)
        with contextlib.ExitStack() as stack:
            opened = {
                name: stack.enter_context(open(folder / name, "ab"))
                for name in record_bytes
            }
            # Beside the folder, since it is not to stay.
            progress = folder.parent.parent / "progress.json"
            yield Unfinished(path, opened, progress, facts, record_bytes, on_notice)
        artifacts.write_manifest(folder, kind, list(record_bytes), **facts)


class Unfinished:
    """Files that grow record by record, in a folder that is not whole yet.

    Now and then `save` forces them to disk and only then counts what they hold. What
    stands after that when the work was interrupted is cut off, and done again.

    Attributes:
        steps: Number of steps that were saved.
    """

    def __init__(self, path, opened, progress, facts, record_bytes, on_notice):
        self._open = opened
        self._progress = progress
        self._facts = artifacts.parse_json(artifacts.to_json(facts))
        self._record_bytes = record_bytes
        self.steps, self._saved = self._begun(path, on_notice)
        for name, file in opened.items():
            file.truncate(self._saved * record_bytes[name])
            file.seek(0, os.SEEK_END)

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
        artifacts.write_json(
            self._progress,
            {"facts": self._facts, "steps": steps, "records": self._saved},
        )

    def _begun(self, path, notice):
        """Return the steps and records that an interrupted work left."""
        try:
            progress = artifacts.read_json(self._progress)
            facts, steps = progress["facts"], progress["steps"]
            count = progress["records"]
        except (DamagedFileError, KeyError, TypeError):
            return 0, 0
        if facts != self._facts:
            notice(f"{path} was begun from other things: it starts anew")
            return 0, 0
        for name, file in self._open.items():
            if file.seek(0, os.SEEK_END) < count * self._record_bytes[name]:
                notice(f"what there is of {path} lacks bytes: it starts anew")
                return 0, 0
        if steps:
            notice(f"going on with {path} after {count:,} records")
        return steps, count
