"""Workers that never come or are lost in the middle, with real processes."""

import contextlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tensorflow as tf

from gpt_tf import cli
from gpt_tf.errors import InputError, PeerLostError
from gpt_tf.parallel import data as strategies
from gpt_tf.parallel import launch as launcher
from gpt_tf.training.run_folder import load_model


@pytest.fixture
def words(corpus_folder):
    """Make the command line of a run that takes seconds."""

    def make(out, steps=400):
        return shlex.split(
            f"train --preset tiny --corpus {corpus_folder} --vocab-size 270 "
            f"--context-length 16 --num-layers 1 --jit-compile off --steps {steps} "
            f"--validate-every 100 --checkpoint-every 10 --out {out}"
        )

    return make


@pytest.fixture
def start_worker():
    """Start the command line as one worker of a cluster; none outlives the test."""
    processes = []

    def start(words, ports, index):
        cluster = {
            "cluster": {"worker": [f"127.0.0.1:{port}" for port in ports]},
            "task": {"type": "worker", "index": index},
        }
        process = subprocess.Popen(
            [*(sys.executable, "-m", "gpt_tf.cli"), *words, "--strategy=multi_worker"],
            env=launcher._environment(len(ports), cluster),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def wait_for_checkpoint(out, number=1, seconds=200):
    deadline = time.monotonic() + seconds
    while len(list((out / "checkpoints").glob("step-*"))) < number:
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Never there


def test_a_worker_that_never_joins_is_one_clear_line_to_all_others(
    words, start_worker, tmp_path
):
    ports = launcher.free_ports(3)
    command = [*words(tmp_path / "run"), "--join-timeout", "15"]
    joining = [start_worker(command, ports, index) for index in range(2)]
    for process in joining:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2
        assert errors.count("\n") == 1, errors
        assert f"No answer from worker 2 (127.0.0.1:{ports[2]})." in errors
        assert "within 15 seconds" in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["0", "soon"])
def test_a_limit_that_is_none_is_refused_before_waiting(monkeypatch, value):
    task = {"type": "worker", "index": 0}
    cluster = {"cluster": {"worker": ["localhost:1", "localhost:2"]}, "task": task}
    monkeypatch.setenv("TF_CONFIG", json.dumps(cluster))
    monkeypatch.setenv("GPT_TF_JOIN_TIMEOUT", value)
    with pytest.raises(InputError, match="GPT_TF_JOIN_TIMEOUT"):
        strategies.make_strategy("multi_worker")


def test_one_address_for_two_tasks_is_refused(monkeypatch):
    cluster = {"cluster": {"chief": ["a:1"], "worker": ["b:1", "a:1"]}}
    task = {"task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps({**cluster, **task}))
    with pytest.raises(InputError, match="a:1 more than once"):
        strategies.read_tf_config()


# Lost


class FakePeers:
    def __init__(self, lost=None):
        self.lost = lost
        self.lost_event = threading.Event()
        self.did = []
        if lost:
            self.lost_event.set()

    def abandon(self):
        self.did.append("abandon")

    def leave(self):
        self.did.append("leave")


def strategy_with(peers):
    strategy = strategies.make_strategy("one_device")
    strategy._gpt_tf_peers = peers
    return strategy


def unavailable():
    return tf.errors.UnavailableError(None, None, "Collective ops is aborted")


@pytest.mark.parametrize("error", [unavailable(), KeyboardInterrupt()])
def test_an_error_of_tensorflow_is_told_as_the_loss_that_it_comes_from(error):
    peers = FakePeers("worker 1 (b:2)")
    with (
        pytest.raises(PeerLostError, match=r"worker 1 \(b:2\) ended") as caught,
        strategies.watched(strategy_with(peers)),
    ):
        raise error
    assert caught.value.__cause__ is error
    assert peers.did == ["abandon"]


@pytest.mark.parametrize("error", [InputError("mine"), KeyboardInterrupt()])
def test_an_error_of_ones_own_stays_and_the_others_learn_of_it(error):
    peers = FakePeers()
    with pytest.raises(type(error)), strategies.watched(strategy_with(peers)):
        raise error
    assert peers.did == ["abandon"]


def test_an_error_of_tensorflow_without_a_loss_stays(monkeypatch):
    peers = FakePeers()
    monkeypatch.setattr(peers.lost_event, "wait", lambda seconds: False)
    with (
        pytest.raises(tf.errors.UnavailableError),
        strategies.watched(strategy_with(peers)),
    ):
        raise unavailable()


def test_a_block_that_ends_well_leaves_with_the_others():
    peers = FakePeers()
    with strategies.watched(strategy_with(peers)):
        assert peers.did == []
    assert peers.did == ["leave"]


def test_a_lost_peer_is_one_line_and_asks_for_another_try(monkeypatch, capsys):
    def lose():
        raise PeerLostError("worker 1 is gone")

    monkeypatch.setattr(cli, "app", lambda **_: lose())
    monkeypatch.setattr(cli, "_exit_at_once", sys.exit)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == os.EX_TEMPFAIL
    assert capsys.readouterr().err == "gpt-tf: worker 1 is gone\n"


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize(
    ("number", "limit_s"), [(signal.SIGKILL, 30), (signal.SIGSTOP, 120)]
)
def test_when_a_worker_is_lost_the_other_ends_instead_of_waiting(
    words, start_worker, tmp_path, lost, number, limit_s
):
    ports = launcher.free_ports(2)
    command = words(tmp_path / "run", steps=100_000)
    workers = [start_worker(command, ports, index) for index in range(2)]
    wait_for_checkpoint(tmp_path / "run")
    workers[lost].send_signal(number)
    _, errors = workers[1 - lost].communicate(timeout=limit_s)
    assert workers[1 - lost].returncode == PeerLostError.EXIT_STATUS
    assert errors.count("\n") == 1, errors
    assert f"worker {lost} (127.0.0.1:{ports[lost]}) ended or fell silent" in errors


def launch_and_kill(command, out, victims, monkeypatch):
    """Launch a run whose workers are killed in turn; return the lines."""
    processes, lines, dice = [], [], random.Random(11)
    popen = subprocess.Popen

    def recorded(arguments, **options):
        process = popen(arguments, **options)
        if "TF_CONFIG" in options.get("env", ()):
            processes.append(process)
        return process

    monkeypatch.setattr(launcher.subprocess, "Popen", recorded)
    failures = []

    def run():
        try:
            launcher.launch(
                command, workers=2, trust_network=True, on_line=lines.append
            )
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    for start, victim in enumerate(victims):
        before = launcher._newest_checkpoint(out)
        while thread.is_alive() and (
            len(processes) < 2 * (start + 1)
            or launcher._newest_checkpoint(out) == before
        ):
            time.sleep(0.01)
        time.sleep(dice.uniform(0.0, 0.3))
        with contextlib.suppress(OSError):
            processes[2 * start + victim].kill()
    thread.join()
    assert failures == []
    return lines


def state_of(out):
    """The final weights, and the validation losses on the way there.

    What `history.json` says of single steps is a difference of Keras's running means,
    which begin anew with each start and round otherwise.
    """
    model, _ = load_model(out)
    history = json.loads((out / "history.json").read_text())
    losses = [(row["step"], row["loss"]) for row in history["validations"]]
    return model.get_weights(), losses


def assert_same_run(out, other):
    (weights, losses), (other_weights, other_losses) = state_of(out), state_of(other)
    assert [step for step, _ in losses] == [100, 200, 300, 400]
    assert losses == other_losses
    for a, b in zip(weights, other_weights, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_run_whose_workers_were_killed_five_times_ends_bit_equal(
    words, tmp_path, monkeypatch
):
    victims = random.Random(3).choices([0, 1], k=5)
    assert set(victims) == {0, 1}  # the chief is among them
    lines = launch_and_kill(words(tmp_path / "a"), tmp_path / "a", victims, monkeypatch)
    told = [line for line in lines if line.startswith("[launch] Worker")]
    assert len(told) == 5, lines
    for line, victim in zip(told, victims, strict=True):
        assert f"Worker {victim} was killed by SIGKILL" in line
    options = {"trust_network": True, "on_line": lambda line: None}
    launcher.launch(words(tmp_path / "b"), **options)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    launcher.launch([*words(tmp_path / "c"), "--seed", "2"], **options)
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "a", tmp_path / "c")


@pytest.mark.slow
def test_what_the_user_can_mend_ends_the_launch_with_his_message(words, tmp_path):
    launch = "-m gpt_tf.cli launch --workers 2 --trust-network".split()
    command = [*words(tmp_path / "run"), "--tokenizer", str(tmp_path / "no.json")]
    result = subprocess.run(
        [sys.executable, *launch, *command],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "Worker 0 failed with status 2" in result.stderr
    assert "there is none" in result.stderr
    assert "starting all again" not in result.stdout
