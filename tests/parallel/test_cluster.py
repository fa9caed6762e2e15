"""Workers that Ray starts, and starts again, on this machine and at an address."""

import contextlib
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
import uuid

import psutil
import pytest

from gpt_tf.errors import InputError
from gpt_tf.parallel import cluster
from gpt_tf.training.run_folder import load_model

needs_two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="a worker takes a core"
)


@pytest.fixture
def program():
    """Start commands, and know every process that came of them; none outlives it."""
    mark = uuid.uuid4().hex
    environment = {**os.environ, "GPT_TF_TEST": mark}
    # Workers are processes of their own: the tests' logical devices are not theirs.
    environment.pop("TF_CONFIG", None)

    class Program:
        def start(self, *words):
            return subprocess.Popen(
                words,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

        def gpt_tf(self, *words):
            return self.start(sys.executable, "-m", "gpt_tf.cli", *map(str, words))

        def processes(self, name=""):
            found = []
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    is_ours = process.environ().get("GPT_TF_TEST") == mark
                    if is_ours and name in " ".join(process.cmdline()):
                        found.append(process)
            return found

        def left(self, seconds=15):
            """Return what still runs after a while."""
            deadline = time.monotonic() + seconds
            while (found := self.processes()) and time.monotonic() < deadline:
                time.sleep(0.2)
            return found

    program = Program()
    yield program
    for process in program.processes():
        process.kill()


@pytest.fixture
def words(corpus_folder):
    """Make the command line of a run that takes seconds."""

    def make(out, steps=4, corpus=corpus_folder, workers=2):
        return shlex.split(
            f"train --preset tiny --corpus {corpus} --vocab-size 270 "
            f"--workers {workers} --context-length 16 --num-layers 1 --jit-compile off "
            f"--steps {steps} --validate-every {max(1, steps // 4)} "
            f"--checkpoint-every 10 --out {out}"
        )

    return make


def assert_one_line(process, part):
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert errors.count("\n") == 1 and str(part) in errors, errors


def wait_for_checkpoint(out, after=""):
    while not (found := [p.name for p in out.glob("checkpoints/step-*")]) or (
        max(found) <= after
    ):
        time.sleep(0.05)
    return max(found)


# Without Ray


@pytest.fixture
def no_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"workers": 0}, "workers"),
        ({"workers": 4000}, "4000 workers"),
        ({"workers": 1, "strategy": "mirrored"}, "mirrored"),
        ({"workers": 1, "address": "ray://here:1"}, "ray://here:1"),
        ({"workers": 1, "address": "127.0.0.1:1"}, "127.0.0.1:1"),
        ({"workers": 1, "address": "nowhere.invalid:6379"}, "nowhere.invalid"),
    ],
)
def test_what_cannot_be_started_is_refused_before_ray(no_ray, tmp_path, options, named):
    with pytest.raises(InputError, match=named):
        cluster.run(print, out=tmp_path / "run", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("workers", "machines", "cores"),
    [(2, [2], 1), (2, [8], 4), (3, [4, 4], 2), (1, [4, 8], 8), (5, [4, 1], 1)],
)
def test_workers_have_as_many_cores_as_fit(workers, machines, cores):
    assert cluster._cores_each(workers, machines) == cores


def test_an_address_without_workers_is_refused(command):
    result = command("train", "--ray-address", "127.0.0.1:6379")
    assert result.status == 2
    assert result.err.count("\n") == 1 and "--workers" in result.err


# With Ray


@needs_two_cores
def test_two_workers_train_a_run_and_leave_no_process(program, words, tmp_path):
    process = program.gpt_tf(*words(tmp_path / "run"))
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert errors == ""
    assert "validation perplexity" in out
    load_model(tmp_path / "run")
    assert program.left() == []
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@needs_two_cores
@pytest.mark.slow
def test_everything_listens_on_the_loopback_and_ends_when_it_is_told_to(
    program, words, tmp_path
):
    for number, status in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        out = tmp_path / str(number)
        process = program.gpt_tf(*words(out, steps=100_000))
        wait_for_checkpoint(out)
        listening = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True)
        ids = {f"pid={p.pid}," for p in program.processes()}
        lines = [x for x in listening.stdout.splitlines() if any(i in x for i in ids)]
        assert len(lines) > 5
        for line in lines:
            address = line.split()[3]
            assert "127.0.0.1" in address or "%lo:" in address, line
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == status
        assert program.left() == []


@needs_two_cores
@pytest.mark.slow
def test_a_run_whose_workers_were_killed_five_times_ends_bit_equal(
    program, words, assert_same, tmp_path
):
    dice = random.Random(3)
    process = program.gpt_tf(*words(tmp_path / "a", 400), "--max-restarts", 5)
    reached = ""
    for _ in range(5):
        reached = wait_for_checkpoint(tmp_path / "a", reached)
        time.sleep(dice.uniform(0.0, 0.3))
        workers = program.processes("RayTrainWorker")
        dice.choice(sorted(workers, key=lambda worker: worker.pid)).kill()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert program.left() == []
    for name, more in (("b", []), ("c", ["--seed", 2])):
        process = program.gpt_tf(*words(tmp_path / name, 400), *more)
        process.communicate(timeout=300)
    killed, same, other = (load_model(tmp_path / name)[0] for name in "abc")
    assert_same(killed, same, atol=0)
    with pytest.raises(AssertionError):
        assert_same(killed, other, atol=0)


@needs_two_cores
@pytest.mark.slow
def test_what_the_user_can_mend_is_one_line_within_a_minute(program, words, tmp_path):
    process = program.gpt_tf(*words(tmp_path / "run", corpus=tmp_path / "nowhere"))
    assert_one_line(process, tmp_path / "nowhere")
    assert program.left() == []
    assert list(tmp_path.iterdir()) == []


@needs_two_cores
@pytest.mark.slow
def test_workers_run_in_a_cluster_that_is_there(program, words, tmp_path, monkeypatch):
    port = random.Random().randrange(20000, 30000)
    ray = os.path.join(os.path.dirname(sys.executable), "ray")
    program.start(
        *(ray, "start", "--head", "--block", "--num-cpus=2", f"--port={port}"),
        *("--include-dashboard=false", "--disable-usage-stats"),
        *("--object-store-memory=100000000", "--temp-dir=/tmp/gpt-tf-ray-test"),
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            host = socket.gethostbyname(socket.gethostname())
            if probe.connect_ex((host, port)) == 0:
                break
        time.sleep(0.5)
    address = ["--ray-address", f"{host}:{port}"]
    process = program.gpt_tf(*words(tmp_path / "run", workers=3), *address)
    assert_one_line(process, "3 workers")
    process = program.gpt_tf(*words(tmp_path / "run"), *address)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    load_model(tmp_path / "run")
