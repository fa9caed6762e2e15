"""Work in stages that is done once: what was made is kept while its inputs stay.

Each stage has a name and inputs, values that decide what comes out, with hashes of
the files among them. When a stage is done, `stages/NAME.json` says so, beside hashes of
what it made. Whoever runs the same stages again, after a kill or a week later, does
those whose inputs changed or whose outputs are gone, and no others.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from gpt_tf import __version__, artifacts
from gpt_tf.errors import DamagedFileError

FOLDER = "stages"


class Done(NamedTuple):
    """A stage that is behind us.

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


class Stages:
    """A sequence of stages in a folder.

    Args:
        folder: Where the stages' outputs and their `stages/` lie.
        plan: Name of every stage to come, in order, with the seconds that it may take;
            they need only be right in proportion.
        say: Takes a line per stage.

    Attributes:
        done: The stages so far.

    Example:
        >>> stages = Stages("out", {"count": 1.0}, print)
        >>> stages.run("count", {"text": text}, ["count.json"], count)
    """

    def __init__(
        self, folder: Path, plan: dict[str, float], say: Callable[[str], None]
    ):
        self.folder = Path(folder)
        self.plan = dict(plan)
        self.say = say
        self.done: list[Done] = []
        self._worked, self._expected = 0.0, 0.0

    def run(
        self,
        name: str,
        inputs: dict,
        outputs: Sequence[str],
        work: Callable[[], None],
        *,
        begin: Callable[[], None] = lambda: None,
        title: str | None = None,
        command: str | None = None,
    ) -> bool:
        """Do a stage, unless it was done with these inputs.

        Args:
            name: One of the plan's.
            inputs: JSON values that decide what comes out.
            outputs: Files that it leaves, relative to the folder.
            work: Does it. What it finds was left by a call with these very inputs, or
                by one before `begin`.
            begin: Called first where it was not begun with these inputs, to remove what
                it must not go on with.
            title: What to call it in the line that is said; its name if not given.
            command: The command line that does the same alone.

        Returns:
            Whether it was done now, and not before.
        """
        record_path = self.folder / FOLDER / f"{name}.json"
        key = _key(inputs)
        record = _read_record(record_path)
        number = f"[{len(self.done) + 1}/{len(self.plan)}] {title or name}"
        same = record.get("key") == key
        if same and self._is_whole(record):
            self.say(f"{number}: done before")
            self.done.append(Done(name, command, record["seconds"], True))
            return False
        self.say(f"{number}{self._time_left(name)}")
        if not same:
            begin()
            artifacts.write_json(record_path, {"key": key, "inputs": inputs})
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
        record = {
            "key": key,
            "inputs": inputs,
            "seconds": round(seconds, 2),
            "outputs": {
                output: artifacts.sha256_of(self.folder / output) for output in outputs
            },
        }
        artifacts.write_json(record_path, record)
        self._worked += seconds
        self._expected += self.plan[name]
        self.done.append(Done(name, command, record["seconds"], False))
        return True

    def skip(self, name: str) -> None:
        """Take a stage out of the plan that turned out to have nothing to do."""
        self.plan.pop(name)

    def _is_whole(self, record):
        outputs = record.get("outputs")
        return outputs is not None and all(
            (self.folder / name).is_file()
            and artifacts.sha256_of(self.folder / name) == sha256
            for name, sha256 in outputs.items()
        )

    def _time_left(self, name):
        """Estimate from what the stages before took, of what was expected of them."""
        names = list(self.plan)
        ahead = sum(self.plan[name] for name in names[names.index(name) :])
        # One stage alone says little: the plan counts as a stage of a minute too.
        speed = (self._worked + 60.0) / (self._expected + 60.0)
        minutes = ahead * speed / 60
        return f" (about {max(1, round(minutes))} min left)"


def _read_record(path):
    """Return what is known of a stage: nothing where its record is damaged."""
    done = {"key": str, "seconds": float, "outputs": {str: str}}
    try:
        return artifacts.read_json(path, (done, {"key": str, "outputs?": None}))
    except DamagedFileError:
        return {}


def _key(inputs):
    content = artifacts.to_json([__version__, inputs], sort_keys=True)
    return hashlib.sha256(content.encode("utf-8")).hexdigest()
