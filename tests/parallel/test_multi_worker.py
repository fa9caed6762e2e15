"""Two processes on this machine train as one, and only the chief writes."""

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from gpt_tf import cli
from gpt_tf.errors import InputError, PeerLostError
from gpt_tf.parallel import data as strategies
from gpt_tf.training import loop
from gpt_tf.training.config import PRESETS, TrainingConfig

WORKER = """
import json, os, sys

options = json.loads(sys.argv[1])
touched = []

def watch(event, arguments):
    if event == "open":
        path, _, flags = arguments
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
    elif event not in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"):
        return
    if str(arguments[0]).startswith(options["around"]):
        touched.append(str(arguments[0]))

sys.addaudithook(watch)

import tf_keras as keras
from gpt_tf.training import config, loop
from gpt_tf import cli
from gpt_tf.errors import InputError, PeerLostError

class Interruption(keras.callbacks.Callback):
    left = options["stop"]

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

answer = {"pid": os.getpid()}
try:
    result = loop.train(
        options["config"] and config.TrainingConfig(**options["config"]),
        options["out"],
        resume=options["config"] is None,
        callbacks=[Interruption()],
        verbose=False,
    )
    answer["sums"] = [float(abs(w).sum()) for w in result.model.get_weights()]
    answer["history"] = result.history
except (InputError, KeyboardInterrupt) as error:
    answer["error"] = f"{type(error).__name__}: {error}"
print(json.dumps({**answer, "touched": touched}))
"""


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("localhost", 0))
        return [opened.getsockname()[1] for opened in sockets]


@contextlib.contextmanager
def two_workers(*words, **options):
    """Start a Python program twice, as the two workers of a cluster."""
    workers = [f"127.0.0.1:{port}" for port in free_ports(2)]
    processes = []
    for index in range(2):
        task = {"type": "worker", "index": index}
        cluster = json.dumps({"cluster": {"worker": workers}, "task": task})
        environment = {**os.environ, "TF_CONFIG": cluster}
        command = [sys.executable, *words]
        options = {"stderr": subprocess.PIPE, "text": True, **options}
        processes.append(subprocess.Popen(command, env=environment, **options))
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def run_workers(out, config, stop=0):
    """Train in two processes, or go on without a `config`; return their answers."""
    options = {
        "around": str(out.parent),
        "out": str(out),
        "config": config and dataclasses.asdict(config),
        "stop": stop,
    }
    words = ["-c", WORKER, json.dumps(options)]
    answers = []
    with two_workers(*words, stdout=subprocess.PIPE) as processes:
        for process in processes:
            written, errors = process.communicate(timeout=400)
            assert process.returncode == 0, errors[-3000:]
            answers.append(json.loads(written.splitlines()[-1]))
    return answers


@pytest.fixture
def config(corpus_folder):
    return dataclasses.replace(
        PRESETS["tiny"],
        corpus=str(corpus_folder),
        vocab_size=270,
        context_length=16,
        steps=6,
        validate_every=3,
        checkpoint_every=2,
        strategy="multi_worker",
    )


@pytest.mark.slow
def test_two_workers_go_on_to_the_model_of_one_device_and_only_the_chief_writes(
    config, assert_same, tmp_path
):
    out = tmp_path / "shared" / "run"
    interrupted = run_workers(out, config, stop=5)
    for answer in interrupted:
        assert answer["error"].startswith("KeyboardInterrupt")
    names = sorted(os.listdir(out / "checkpoints"))
    assert names == ["step-00000002", "step-00000004"]
    chief, worker = resumed = run_workers(out, None)
    assert chief["sums"] == worker["sums"]
    alone, another = (
        loop.train(
            dataclasses.replace(config, strategy="one_device", seed=seed),
            tmp_path / str(seed),
            verbose=False,
        )
        for seed in (config.seed, config.seed + 1)
    )
    model, _ = loop.load_model(out)
    assert_same(model, alone.model, atol=1e-4)
    with pytest.raises(AssertionError):
        assert_same(model, another.model, atol=1e-4)
    for key in ("steps", "validations"):
        losses = [
            [(row["step"], row["loss"]) for row in history[key]]
            for history in (chief["history"], alone.history)
        ]
        np.testing.assert_allclose(*losses, rtol=1e-4)
    # TensorBoard writes past Python, and names the process.
    events = [path.name for path in out.rglob("*tfevents*")]
    for chief, worker in (interrupted, resumed):
        assert chief["touched"]
        assert worker["touched"] == []
        assert any(f".{chief['pid']}." in name for name in events)
        assert not any(f".{worker['pid']}." in name for name in events)


def test_when_the_chief_cannot_start_no_worker_waits_for_it(config, tmp_path):
    out = tmp_path / "shared" / "run"
    out.mkdir(parents=True)
    (out / "thesis.txt").write_text("precious")
    chief, worker = run_workers(out, config)
    assert "InputError: The folder" in chief["error"]
    assert "InputError: This worker expects the chief" in worker["error"]
    assert os.listdir(out) == ["thesis.txt"]


def test_alone_a_process_is_the_chief():
    strategy = strategies.make_strategy("one_device")
    done = []
    strategies.on_chief(strategy, lambda: done.append(True))
    assert done == [True]
    with pytest.raises(InputError, match="its own"):
        strategies.on_chief(strategy, fail)


def fail():
    raise InputError("its own")


def test_a_worker_without_the_shared_folder_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(strategies, "is_chief", lambda strategy: False)
    config = TrainingConfig(strategy="one_device")
    with pytest.raises(InputError, match="folder that all workers share"):
        loop.train(config, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_strategy_that_comes_too_late_is_refused(monkeypatch):
    task = {"type": "worker", "index": 0}
    cluster = {"cluster": {"worker": ["localhost:1"]}, "task": task}
    monkeypatch.setenv("TF_CONFIG", json.dumps(cluster))
    strategies.make_strategy("one_device")
    with pytest.raises(InputError, match="before anything else uses TensorFlow"):
        strategies.make_strategy("multi_worker")


@pytest.mark.slow
def test_when_a_worker_is_killed_the_other_ends_and_asks_for_a_new_start(
    config, tmp_path
):
    words = ["train", "--resume-or-start", "--strategy=multi_worker", "--preset=tiny"]
    words += [f"--corpus={config.corpus}", "--vocab-size=270", "--steps=100000"]
    words += ["--checkpoint-every=2", f"--out={tmp_path / 'run'}"]
    with two_workers("-m", "gpt_tf.cli", *words, stdout=subprocess.DEVNULL) as workers:
        while not list(tmp_path.glob("run/checkpoints/step-*")):
            assert workers[0].poll() is None
            time.sleep(0.1)
        workers[1].kill()
        _, errors = workers[0].communicate(timeout=120)
        assert workers[0].returncode == PeerLostError.EXIT_STATUS, errors
        assert errors.count("gpt-tf: ") == 1, errors


def test_a_lost_worker_is_one_line_and_asks_for_another_try(monkeypatch, capsys):
    def lose():
        raise PeerLostError("worker 1 is gone")

    monkeypatch.setattr(cli, "app", lambda **_: lose())
    monkeypatch.setattr(cli, "_exit_at_once", sys.exit)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == os.EX_TEMPFAIL
    assert capsys.readouterr().err == "gpt-tf: worker 1 is gone\n"
