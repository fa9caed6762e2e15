import os
import signal
import stat

import numpy as np
import pytest

from gpt_tf.errors import DamagedFileError, WorkerFailedError
from gpt_tf.evaluation import harness
from gpt_tf.evaluation.harness import Worker, spread


@pytest.mark.parametrize("count", [1, 2, 101])
def test_a_spread_states_numpys_percentiles(count):
    values = np.random.default_rng(count).exponential(size=count)
    found = spread([values[: count // 2], values[count // 2 :]][-min(2, count) :])
    assert found["count"] == count and found["worst"] == values.max()
    percents = {"q1": 25, "median": 50, "q3": 75, "p95": 95, "p99": 99}
    for name, percent in percents.items():
        assert found[name] == np.percentile(values, percent)
    assert found["rounds"][-1] == np.median(values[count // 2 :])


# What processes do; they find these functions in this module.


def adder(start):
    print("native noise on standard output")

    def add(number):
        if number == 0:
            raise DamagedFileError("no file")
        if number == 1:
            raise ModuleNotFoundError("No module", name="x.y")
        if number == 2:
            raise ValueError("no\nreason")
        if number == 3:
            os.write(2, b"low memory\n\n")
            os.kill(os.getpid(), signal.SIGKILL)
        return start + number, os.getpid()

    return add


def broken():
    raise DamagedFileError("nothing was made")


def test_a_worker_works_in_a_process_of_its_own_as_often_as_asked():
    with Worker(adder, (100,), name="a") as worker:
        (first, process), (second, again) = worker.ask(10), worker.ask(20)
    assert (first, second) == (110, 120)
    assert process == again != os.getpid()
    assert worker.start_s > 0
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (0, DamagedFileError, "no file"),
        (1, ModuleNotFoundError, "No module"),
        (2, WorkerFailedError, "measured a failed: ValueError: no"),
        (3, WorkerFailedError, "killed by SIGKILL; its last line was: low memory"),
    ],
)
def test_what_goes_wrong_in_a_process_is_raised_here(number, error, message):
    with (
        Worker(adder, (100,), name="a") as worker,
        pytest.raises(error, match=message) as caught,
    ):
        worker.ask(number)
    if error is WorkerFailedError:
        assert caught.value.status == (137 if number == 3 else 70)
    if error is ModuleNotFoundError:
        assert caught.value.name == "x.y"


def test_what_cannot_be_prepared_is_raised_at_once():
    with pytest.raises(DamagedFileError, match="nothing was made"):
        Worker(broken, name="a")


def test_a_process_that_answers_nothing_we_know_has_failed(tmp_path, monkeypatch):
    shell = tmp_path / "python"
    shell.write_text("#!/bin/sh\necho unknown\necho low memory >&2\nexit 3\n")
    shell.chmod(shell.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(harness.sys, "executable", str(shell))
    told = "ended with status 3; its last line was: low memory"
    with pytest.raises(WorkerFailedError, match=told):
        Worker(broken, name="a")
