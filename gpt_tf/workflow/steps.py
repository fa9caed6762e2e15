"""Steps of work that are done once: what was made is kept while its inputs stay.

A step has a name, inputs that decide what comes out, with hashes of the files among
them, and outputs. When it is done, `stages/NAME.json` says so, beside hashes of what
it made. Running the same steps again, after a kill or a week later, does those whose
inputs changed or whose outputs are gone, and no others.
"""

import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from gpt_tf import __version__, artifacts
from gpt_tf.errors import DamagedFileError

logger = logging.getLogger(__name__)

FOLDER = "stages"  # as folders of before have it


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of work in a folder.

    Attributes:
        name: Its name.
        title: What to call it in the line that is logged.
        inputs: Returns JSON values that decide what comes out; called when its turn
            has come, so that it can hash what earlier steps made.
        outputs: Files that it leaves, relative to the folder.
        work: Does it. What it finds was left by a call with these very inputs, or by
            one before `begin`.
        begin: Called first where it was not begun with these inputs, to remove what
            it must not go on with.
        command: The command line that does the same alone, or None.
    """

    name: str
    title: str
    inputs: Callable[[], dict]
    outputs: Sequence[str]
    work: Callable[[], None]
    begin: Callable[[], None] = lambda: None
    command: str | None = None


class Done(NamedTuple):
    """A step that is done.

    Attributes:
        name: Its name.
        command: The command line that does the same alone, or None.
        seconds: What it took when it was done.
        reused: Whether it had been done before.
    """

    name: str
    command: str | None
    seconds: float
    reused: bool


class Steps:
    """Runs steps in a folder, and knows which are done.

    Args:
        folder: Where the steps' outputs and their `stages/` lie.
        total: How many steps there are to be, for the lines that are logged.

    Attributes:
        done: The steps so far.

    Example:
        >>> steps = Steps("out", 1)
        >>> inputs = {"text": text}
        >>> steps.run(Step("count", "words", lambda: inputs, ["count.json"], count))
    """

    def __init__(self, folder: Path, total: int):
        self.folder = Path(folder)
        self.total = total
        self.done: list[Done] = []

    def run(self, step: Step) -> None:
        """Do a step, unless it was done with these inputs."""
        record_path = self.folder / FOLDER / f"{step.name}.json"
        inputs = step.inputs()
        key = _key(inputs)
        record = _read_record(record_path)
        line = f"[{len(self.done) + 1}/{self.total}] {step.title}"
        same = record.get("key") == key
        if same and self._is_whole(record):
            logger.info("%s: done before", line)
            self.done.append(Done(step.name, step.command, record["seconds"], True))
            return
        logger.info(line)
        if not same:
            step.begin()
            artifacts.write_json(record_path, {"key": key, "inputs": inputs})
        began = time.perf_counter()
        step.work()
        seconds = round(time.perf_counter() - began, 2)
        outputs = {
            output: artifacts.sha256_of(self.folder / output) for output in step.outputs
        }
        artifacts.write_json(
            record_path,
            {"key": key, "inputs": inputs, "seconds": seconds, "outputs": outputs},
        )
        self.done.append(Done(step.name, step.command, seconds, False))

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


def _key(inputs):
    content = artifacts.to_json([__version__, inputs], sort_keys=True)
    return hashlib.sha256(content.encode("utf-8")).hexdigest()
