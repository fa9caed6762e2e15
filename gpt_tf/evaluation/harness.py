"""Timing: processes of their own, turns, and how times are spread.

`gpt-tf benchmark` and the scripts in `benchmarks/` measure with these. Each contender
works in a process of its own, so that threads, settings and memory of one do not touch
another, and they take turns, A B A B, so that a noisy machine is noisy for all.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gpt_tf.errors import InputError, WorkerFailedError

_FAILED = 70  # EX_SOFTWARE of sysexits.h
_PERCENTS = {"median": 50, "p95": 95, "p99": 99, "q1": 25, "q3": 75}


def spread(rounds: Sequence[Sequence[float]]) -> dict:
    """Return how measurements are spread over rounds, as a report's `Spread`.

    Percentiles are interpolated between measurements; `rounds` has each one's median,
    `p95_rounds` each one's 95th percentile.
    """
    values = np.concatenate([np.asarray(one, float) for one in rounds])
    found = np.percentile(values, list(_PERCENTS.values()))
    return {
        **dict(zip(_PERCENTS, map(float, found), strict=True)),
        "worst": float(values.max()),
        "count": len(values),
        "rounds": [float(np.median(one)) for one in rounds],
        "p95_rounds": [float(np.percentile(one, 95)) for one in rounds],
    }


def throughput(requests: int, rates: Sequence[float]) -> dict:
    """Return the tokens per second of each round as a report's `Throughput`."""
    found = spread([[rate] for rate in rates])
    parts = {part: found[part] for part in ("q1", "q3", "count", "rounds")}
    return {"requests": requests, "tokens_per_s": found["median"], **parts}


def take_turns(turns: Sequence[Callable[[], object]], rounds: int) -> list[list]:
    """Let everyone have a turn in every round; return of each what its turns gave."""
    found = [[] for _ in turns]
    for _ in range(rounds):
        for turn, results in zip(turns, found, strict=True):
            results.append(turn())
    return found


class Worker:
    """A process of its own that does one kind of work as often as it is asked.

    Args:
        make: A function of a module, so that the process finds it. Called with
            `arguments` it prepares the work and returns a function.
        arguments: For `make`; arguments and results are pickled.
        name: What errors call that which is measured.
        quiet: Whether what the process writes is kept for an error; if not, it is seen.

    Attributes:
        start_s: Seconds from the start of the process until the work was prepared.

    Raises:
        InputError, ModuleNotFoundError: As the process raised it.
        WorkerFailedError: It broke down, or raised something else.

    Example:
        >>> with Worker(open_runner, (job,), name="gpt.litertlm") as worker:
        ...     times = worker.ask(20)
    """

    def __init__(self, make, arguments=(), *, name: str, quiet: bool = True):
        self.name = name
        # Closed by `close`.
        self._remarks = tempfile.TemporaryFile() if quiet else None  # noqa: SIM115
        # Our own package first, and nothing from the current folder.
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *(path for path in sys.path if path not in ("", root))]
        code = (
            f"import sys; sys.path[:] = {paths!r}; "
            "from gpt_tf.evaluation.harness import serve; serve()"
        )
        began = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._remarks,
            env={"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ},
        )
        try:
            work = pickle.dumps((make, arguments))
            main = _name_of_main() if b"__main__" in work else None
            self.ask(main, work)
        except BaseException:
            self.close()
            raise
        self.start_s = time.perf_counter() - began

    def ask(self, *request):
        """Do the work once, with these arguments; return its result."""
        try:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
            kind, value = pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise self._failure() from None
        if kind == "raised":
            raise value
        if kind == "failed":
            what = f"The process that measured {self.name} failed: {value}"
            raise WorkerFailedError(what, _FAILED)
        return value

    def _failure(self):
        """Return the error of a process that ended."""
        # It has ended, or writes what is no answer.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        self._process.kill()
        status = self._process.wait()
        last = "it wrote nothing"
        if self._remarks is not None:
            self._remarks.seek(0)
            text = self._remarks.read().decode("utf-8", "replace").strip()
            last = f"its last line was: {text.splitlines()[-1]}" if text else last
        how = f"ended with status {status}"
        if status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
        return WorkerFailedError(
            f"The process that measured {self.name} {how}; {last}",
            _FAILED if status >= 0 else 128 - status,
        )

    def close(self) -> None:
        """End the process: a library's own farewell may take long."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._remarks):
            with contextlib.suppress(OSError, AttributeError):
                pipe.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception):
        self.close()


def serve() -> None:
    """Do what a `Worker` asks for, until it asks no more: what its process runs."""
    # Native code may write to standard output too.
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    work = None
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        try:
            if work is None:
                work, answer = _make(*request), ("done", None)
            else:
                answer = "done", work(*request)
        except (InputError, ModuleNotFoundError) as error:
            answer = "raised", error
        except Exception as error:
            traceback.print_exc()
            answer = "failed", f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


def _make(main, work):
    if main is not None:  # a script, whose functions are pickled as those of `__main__`
        sys.modules["__main__"] = __import__(main, fromlist=["*"])
    make, arguments = pickle.loads(work)
    return make(*arguments)


def _name_of_main():
    main = sys.modules["__main__"]
    return main.__spec__.name if main.__spec__ else Path(main.__file__).stem
