"""Steps of work that are done once: what was made is kept while its inputs stay.

A step has a name, inputs that decide what comes out, with hashes of the files among
them, and outputs. When it is done, `stages/NAME.json` says so, beside hashes of what
it made. Running the same steps again, after a kill or a week later, does those whose
inputs changed or whose outputs are gone, and no others.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gpt_tf import __version__, artifacts
from gpt_tf.errors import DamagedFileError

logger = logging.getLogger(__name__)

FOLDER = "stages"  # as folders of before have it


class Steps:
    """Runs steps in a folder, and knows which are done.

    Args:
        folder: Where the steps' outputs and their `stages/` lie.
        total: How many steps there are to be, for the lines that are logged.

    Attributes:
        done: A dict of each step so far: its `name` and `command`, the `seconds` that
            it took when it was done, and whether it was `reused`, done before.

    Example:
        >>> steps = Steps("out", 1)
        >>> steps.run("count", "words", {"text": text}, ["count.json"], count)
    """

    def __init__(self, folder: Path, total: int):
        self.folder = Path(folder)
        self.total = total
        self.done: list[dict] = []

    def run(
        self,
        name: str,
        title: str,
        inputs: dict,
        outputs: Sequence[str],
        work: Callable[[], None],
        *,
        begin: Callable[[], None] = lambda: None,
        command: str | None = None,
    ) -> None:
        """Do a step, unless it was done with these inputs.

        Args:
            name: Its name.
            title: What to call it in the line that is logged.
            inputs: JSON values that decide what comes out.
            outputs: Files that it leaves, relative to the folder.
            work: Does it. What it finds was left by a call with these very inputs, or
                by one before `begin`.
            begin: Called first where it was not begun with these inputs, to remove what
                it must not go on with.
            command: The command line that does the same alone, or None.
        """
        path = self.folder / FOLDER / f"{name}.json"
        content = artifacts.to_json([__version__, inputs], sort_keys=True)
        key = hashlib.sha256(content.encode("utf-8")).hexdigest()
        record = _read_record(path)
        is_begun = record.get("key") == key
        is_done = is_begun and self._is_whole(record)
        line = f"[{len(self.done) + 1}/{self.total}] {title}"
        logger.info("%s: done before" if is_done else "%s", line)
        if not is_begun:
            begin()
            artifacts.write_json(path, {"key": key, "inputs": inputs})
        if not is_done:
            began = time.perf_counter()
            work()
            record = {
                "key": key,
                "inputs": inputs,
                "seconds": round(time.perf_counter() - began, 2),
                "outputs": {
                    one: artifacts.sha256_of(self.folder / one) for one in outputs
                },
            }
            artifacts.write_json(path, record)
        done = {"name": name, "command": command, "seconds": record["seconds"]}
        self.done.append({**done, "reused": is_done})

    def skip(self) -> None:
        """Count one step less: it turned out to have nothing to do."""
        self.total -= 1

    def _is_whole(self, record):
        outputs = record.get("outputs")
        return outputs is not None and all(
            (self.folder / name).is_file()
            and artifacts.sha256_of(self.folder / name) == sha256
            for name, sha256 in outputs.items()
        )


def _read_record(path):
    """Return what is known of a step: nothing where its record is damaged."""
    done = {"key": str, "seconds": float, "outputs": {str: str}}
    try:
        return artifacts.read_json(path, (done, {"key": str, "outputs?": None}))
    except DamagedFileError:
        return {}
