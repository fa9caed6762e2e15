"""Workers on this machine are started together, and again when one is lost."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from gpt_tf.errors import InputError, WorkerFailedError
from gpt_tf.parallel import data as strategies
from gpt_tf.parallel import launch as module
from gpt_tf.parallel.launch import launch, supervise

# What a fake worker begins with: its index, the number of the start, a folder.
BEGIN = """
import json, os, signal, subprocess, sys, time
index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
start, folder = int(sys.argv[1]), sys.argv[2]
with open(f"{folder}/{start}.{index}", "w") as file:
    file.write(str(os.getpid()))
def all_have_begun():
    while not all(os.path.exists(f"{folder}/{start}.{i}") for i in range(2)):
        time.sleep(0.01)
"""
# What a shell starts in the background ignores the interrupt, and so would this.
LAUNCHER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from gpt_tf.parallel.launch import supervise
supervise(
    lambda start: [sys.executable, "-c", sys.argv[1], str(start), sys.argv[2]],
    grace_s=0.5,
    on_line=lambda line: print(line, flush=True),
)
"""
SLEEP = "print('ready', flush=True); time.sleep(100)"


@pytest.fixture
def fake(tmp_path):
    """Make the command of a fake worker from a piece of code."""
    return lambda code: (
        lambda start: [*(sys.executable, "-c", BEGIN + code, str(start), str(tmp_path))]
    )


@pytest.fixture
def run(fake, tmp_path):
    """Supervise fake workers; return their lines, the failure and the starts."""

    def supervised(code, **options):
        lines, failure = [], None
        try:
            times = {"settle_s": 0.3, "grace_s": 0.5}
            supervise(fake(code), on_line=lines.append, **{**times, **options})
        except WorkerFailedError as error:
            failure = error
        assert_nothing_runs(tmp_path)
        starts = 1 + max(int(path.stem) for path in tmp_path.glob("*.?"))
        return lines, failure, starts

    return supervised


def is_running(pid):
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
    ).stdout.strip()
    return bool(state) and not state.startswith("Z")


def assert_nothing_runs(folder, seconds=0.0):
    pids = [int(path.read_text()) for path in folder.glob("*.*")]
    assert pids
    deadline = time.monotonic() + seconds
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, pids))


# Lines and places


def test_lines_come_with_the_worker_that_wrote_them(run):
    code = "print('one'); print('two', file=sys.stderr); print('gr\\u00fcn')"
    lines, failure, starts = run("sys.stdout.reconfigure(encoding='utf-8')\n" + code)
    assert (failure, starts) == (None, 1)
    for index in range(2):
        own = [line for line in lines if line.startswith(f"[worker {index}] ")]
        assert sorted(line.split("] ")[1] for line in own) == ["grün", "one", "two"]
    assert len(lines) == 6


def test_a_line_comes_while_the_worker_still_runs(fake, tmp_path):
    seen = []

    def on_line(line):
        seen.append((line, is_running(int((tmp_path / "0.0").read_text()))))

    code = "print('now', flush=True); time.sleep(0.5)"
    supervise(fake(code), workers=1, on_line=on_line)
    assert seen == [("[worker 0] now", True)]


def test_the_last_line_is_one_of_words(run):
    _, failure, _ = run("print('╭──╮\\n│ so │\\n╰──╯'); sys.exit(2)")
    assert str(failure).endswith("its last line was: so")


def test_each_worker_finds_its_own_place(run, monkeypatch):
    lines, _, _ = run("print(os.environ['TF_CONFIG'])", workers=3)
    clusters = {}
    for line in lines:
        monkeypatch.setenv("TF_CONFIG", line.split("] ", 1)[1])
        config = strategies.read_tf_config()
        assert line.startswith(f"[worker {config['task']['index']}] ")
        clusters[config["task"]["index"]] = config["cluster"]
    assert sorted(clusters) == [0, 1, 2]
    assert clusters[0] == clusters[1] == clusters[2]
    assert len(set(clusters[0]["worker"])) == 3


def test_cores_are_divided_and_what_the_user_set_stays(run, monkeypatch):
    cores = len(os.sched_getaffinity(0))
    code = "print(os.environ['TF_NUM_INTRAOP_THREADS'])"
    assert sorted(run(code)[0])[0] == f"[worker 0] {max(1, cores // 2)}"
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "7")
    assert run(code)[0][0].endswith("] 7")


def test_a_port_in_use_is_one_clear_line(run):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(InputError, match=f"{port}, which is in use"):
            supervise(lambda start: ["true"], port=port - 1)
    lines, _, _ = run("print(os.environ['TF_CONFIG'])", port=port)
    assert f'"127.0.0.1:{port}", "127.0.0.1:{port + 1}"' in lines[0]


@pytest.mark.parametrize("port", [0, 65535, -5])
def test_a_port_that_is_none_is_refused(port):
    with pytest.raises(InputError, match="from 1 to 65535"):
        supervise(lambda start: ["true"], port=port)


@pytest.mark.parametrize("options", [{"workers": 0}, {"max_restarts": -1}])
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(InputError, match="1 or more workers"):
        supervise(lambda start: ["true"], **options)


# Failures and new starts


@pytest.mark.parametrize(
    "end", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(75)", "os.abort()"]
)
@pytest.mark.parametrize("lost", [0, 1])
def test_when_a_worker_is_lost_all_start_again_with_fresh_ports(run, end, lost):
    lines, failure, starts = run(
        f"print(os.environ['TF_CONFIG'], flush=True)\n"
        f"all_have_begun()\n"
        f"if start < 2 and index == {lost}: {end}\n"
        f"if start < 2: time.sleep(100)"
    )
    assert (failure, starts) == (None, 3)
    assert [line for line in lines if line.startswith("[launch] starting")] == [
        "[launch] starting all again, 1 of 3",
        "[launch] starting all again, 2 of 3",
    ]
    assert sum(line.startswith(f"[launch] Worker {lost} ") for line in lines) == 2
    clusters = {
        line.split("] ", 1)[1].partition('"task"')[0]
        for line in lines
        if line.startswith("[worker ")
    }
    assert len(clusters) == 3


@pytest.mark.parametrize("limit", [0, 2])
def test_new_starts_in_a_row_have_a_limit(run, limit):
    _, failure, starts = run("os.kill(os.getpid(), signal.SIGKILL)", max_restarts=limit)
    assert starts == limit + 1
    assert "SIGKILL" in str(failure)
    assert failure.status == 128 + signal.SIGKILL


def test_a_new_start_that_gets_further_counts_anew(run):
    steps = iter(range(100))
    code = "sys.exit(0 if start == 6 else 75)"
    _, failure, starts = run(code, max_restarts=1, progress=lambda: next(steps))
    assert (failure, starts) == (None, 7)


def test_wrong_input_ends_all_at_once_and_is_quoted(run):
    began = time.monotonic()
    _, failure, starts = run(
        "all_have_begun()\n"
        "if index == 0: time.sleep(100)\n"
        "print('gpt-tf: no such corpus', file=sys.stderr); sys.exit(2)"
    )
    assert starts == 1
    assert failure.status == 2
    assert str(failure) == (
        "All workers were ended, for one failed. Worker 1 failed with status 2; its "
        "last line was: gpt-tf: no such corpus"
    )
    assert time.monotonic() - began < 20


def test_the_worker_with_the_cause_is_named_not_those_that_lost_it(run):
    _, failure, starts = run(
        "all_have_begun()\n"
        "if index == 0: sys.exit(75)\n"
        "time.sleep(0.5); print('the cause'); sys.exit(2)",
        settle_s=20.0,
    )
    assert starts == 1
    assert "Worker 1 failed with status 2; its last line was: the cause" in str(failure)


def test_the_same_failure_twice_is_not_tried_a_third_time(run):
    code = "all_have_begun(); sys.exit(f'ValueError: {start // 2}' if index else 0)"
    _, failure, starts = run(code, max_restarts=9)
    assert starts == 2
    assert "twice in the same way" in str(failure)
    assert "ValueError: 0" in str(failure)
    assert failure.status == 1


def test_another_failure_each_time_is_tried_again(run):
    code = "all_have_begun(); sys.exit(f'ValueError: {start}' if index else 0)"
    _, failure, starts = run(code, max_restarts=3)
    assert starts == 4
    assert "after 3 new starts" in str(failure)


# No process stays


def test_a_worker_that_does_not_want_to_end_is_killed(run):
    _, failure, _ = run(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "all_have_begun()\n"
        "if index: sys.exit(2)\n"
        "time.sleep(100)"
    )
    assert failure.status == 2  # and `run` saw that nothing runs


CHILD = """
all_have_begun()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
with open(f"{folder}/{start}.child{index}", "w") as file:
    file.write(str(child.pid))
"""


def test_a_workers_own_children_end_with_it(fake, tmp_path):
    supervise(fake(CHILD), on_line=lambda line: None)
    assert len(list(tmp_path.glob("*.child*"))) == 2
    assert_nothing_runs(tmp_path, seconds=5)


def test_a_listener_that_fails_leaves_no_worker(fake, tmp_path):
    def on_line(line):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        supervise(fake(SLEEP), on_line=on_line)
    assert_nothing_runs(tmp_path, seconds=5)


@pytest.fixture
def launcher(tmp_path):
    """Start a launcher in a process of its own, and wait until its workers run."""
    started = []

    def start(code):
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, BEGIN + code, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        started.append(process)
        for _ in range(2):
            assert process.stdout.readline().endswith("] ready\n")
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_launcher_ends_all_workers_first(launcher, tmp_path, number):
    process = launcher("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEP)
    process.send_signal(number)
    status = process.wait(20)
    assert_nothing_runs(tmp_path)
    assert status == (-number if number == signal.SIGINT else 128 + number)


def test_no_worker_outlives_a_launcher_that_is_killed(launcher, tmp_path):
    process = launcher(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + CHILD + SLEEP
    )
    process.kill()
    process.wait()
    assert_nothing_runs(tmp_path, seconds=10)
    assert len(list(tmp_path.glob("0.*"))) == 4


def test_a_worker_that_the_keeper_does_not_know_does_not_begin(tmp_path):
    process = subprocess.Popen(
        [*module._WHEN_KNOWN, "touch", str(tmp_path / "begun")], stdin=subprocess.PIPE
    )
    process.stdin.close()
    assert process.wait(10) != 0
    assert list(tmp_path.iterdir()) == []


def test_signals_mean_what_they_meant_once_the_launch_is_over(run):
    before = signal.getsignal(signal.SIGTERM)
    run("")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_thread_may_launch_too(fake):
    lines = []
    thread = threading.Thread(
        target=lambda: supervise(fake("print('here')"), on_line=lines.append)
    )
    thread.start()
    thread.join(20)
    assert sorted(lines) == ["[worker 0] here", "[worker 1] here"]


# Why the network has to be trusted. Where this fails, TensorFlow has learnt to bind.


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/net")
def test_tensorflow_listens_on_every_interface_whatever_address_it_is_given(run):
    code = """
from gpt_tf.parallel.data import make_strategy
make_strategy("multi_worker")
own = []
for name in os.listdir("/proc/self/fd"):
    try:
        own.append(os.readlink(f"/proc/self/fd/{name}"))
    except OSError:
        pass
for kind in ("tcp", "tcp6"):
    with open(f"/proc/net/{kind}") as table:
        for line in list(table)[1:]:
            _, address, _, state, *_ = words = line.split()
            if state == "0A" and f"socket:[{words[9]}]" in own:
                print("listens on", address.split(":")[0], flush=True)
time.sleep(2)
os._exit(0)
"""
    lines, failure, _ = run(code, settle_s=60, grace_s=60)
    assert failure is None
    found = [line.split()[-1] for line in lines if "listens on" in line]
    assert len(found) == 2 and all(int(address, 16) == 0 for address in found)


# The commands of gpt-tf


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "Received: nothing"),
        ("generate --model runs/gpt", "train, quantize, distil"),
        ("--out x train", "Received: --out x train"),
        ("train --strategy tpu", "Received: 'tpu'"),
        ("train --strategy=mirrored", "Received: 'mirrored'"),
        ("distil --extract store", "--extract"),
    ],
)
def test_what_cannot_be_launched_is_refused(words, message):
    with pytest.raises(InputError, match=message):
        launch(words.split())


@pytest.fixture
def commands(monkeypatch):
    """Let `launch` only say how it would start; return its function and options."""

    def of(words, **options):
        caught = {}
        monkeypatch.setattr(
            module,
            "supervise",
            lambda command, workers, **rest: caught.update(
                rest, command=command, workers=workers
            ),
        )
        launch(words, trust_network=True, **options)
        return caught

    return of


def test_every_start_goes_on_or_starts(commands, tmp_path):
    words = ["train", "--out", tmp_path, "--steps", 5]
    caught = commands(words, workers=3, join_timeout=7)
    assert caught["workers"] == 3
    for start in range(2):
        command = caught["command"](start)
        assert command[1:4] == ["-m", "gpt_tf.cli", "train"]
        assert command[4:] == (
            "--resume-or-start --strategy multi_worker --join-timeout 7 "
            f"--out {tmp_path} --steps 5"
        ).split(" ")


def test_an_option_without_a_value_takes_none_of_ours(commands):
    words = commands(["train", "--steps", 5, "--out"])["command"](0)
    assert words[-1] == "--out"


def test_without_a_word_that_the_network_is_trusted_nothing_starts(monkeypatch):
    monkeypatch.setattr(module, "supervise", None)
    with pytest.raises(InputError, match="every interface"):
        launch(["train"])


def test_a_run_is_overwritten_once(commands, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    caught = commands(["train", f"--out={tmp_path}", "--overwrite"])
    for start in range(2):  # killed before it came to that
        assert "--overwrite" in caught["command"](start)
        assert "--resume-or-start" not in caught["command"](start)
    (tmp_path / "run.json").unlink()
    (tmp_path / "other").write_text("{}")
    (tmp_path / "other").rename(tmp_path / "run.json")
    assert "--overwrite" not in caught["command"](2)
    assert "--resume-or-start" in caught["command"](2)


def test_a_resumed_run_keeps_its_own_word(commands):
    caught = commands(["train", "--resume"])
    assert "--resume-or-start" not in caught["command"](0)


def test_progress_is_the_newest_checkpoint(commands, tmp_path):
    progress = commands(["train", "--out", tmp_path])["progress"]
    assert progress() == ""
    for step in (8, 16):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        assert progress() == f"step-{step:08d}"


def test_the_launcher_does_without_tensorflow():
    code = (
        "import json, sys, gpt_tf.parallel.launch; print('tensorflow' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert result.stdout == "False\n"


def test_the_command_line_hands_on_what_follows_the_verb(monkeypatch):
    from gpt_tf import cli

    caught = []
    monkeypatch.setattr(module, "launch", lambda *a, **k: caught.append((a, k)))
    words = "--workers 3 --port 5000 --trust-network train --out x --port 7 --no-such"
    monkeypatch.setattr(sys, "argv", ["gpt-tf", "launch", *words.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    monkeypatch.setattr(
        sys, "argv", ["gpt-tf", "launch", "--workers", "3", "--port", "5000", "--"]
    )
    sys.argv += ["train", "--out", "x", "--port", "7", "--no-such"]
    with pytest.raises(SystemExit):
        cli.main()
    for arguments, options in caught:
        assert arguments == (["train", "--out", "x", "--port", "7", "--no-such"], 3)
        assert options["port"] == 5000
        assert (options["max_restarts"], options["join_timeout"]) == (3, None)
    assert [options["trust_network"] for _, options in caught] == [True, False]


def test_the_command_line_ends_with_the_workers_status(monkeypatch, capsys):
    from gpt_tf import cli

    def fail(*arguments, **options):
        raise WorkerFailedError("Worker 1 failed with status 7; it wrote nothing", 7)

    monkeypatch.setattr(module, "launch", fail)
    monkeypatch.setattr(sys, "argv", ["gpt-tf", "launch", "train"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 7
    assert capsys.readouterr().err == (
        "gpt-tf: Worker 1 failed with status 7; it wrote nothing\n"
    )
