"""Several workers on this machine, started together and, when one is lost, again.

For trying out what several machines do, and as an example of who restarts whom: every
start runs the same command, `--resume-or-start`, and so goes on from the newest good
checkpoint. Whatever happens to the launcher, no worker outlives it: a keeper, a tiny
process in a session of its own, reads from a pipe which workers run, and kills them
when the pipe's other end, the launcher's, is gone.

No TensorFlow here: it would take seconds and memory, and starts threads.
"""

import contextlib
import itertools
import os
import queue
import random
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from gpt_tf import artifacts
from gpt_tf.errors import InputError, PeerLostError, WorkerFailedError
from gpt_tf.parallel.peers import join_timeout as seconds_to_join
from gpt_tf.settings.arguments import integer

FOLDERS = {
    "train": "runs/gpt",
    "quantize": "runs/gpt-qat",
    "distil": "runs/gpt-student",
}

_KEEPER = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    change = groups.add if line[0] == "+" else groups.discard
    change(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""
# A worker begins only once the keeper knows it: else it reads the end of its input.
_WHEN_KNOWN = ["/bin/sh", "-c", 'read -r known && exec "$@" </dev/null', "worker"]
# Below the ports that Linux gives to outgoing connections, which could come between.
_PORTS = range(20000, 32768)


def launch(
    arguments,
    workers=2,
    *,
    trust_network=False,
    max_restarts=3,
    port=None,
    join_timeout=None,
    on_line=print,
):
    """Train with several workers on this machine.

    TensorFlow lets each worker listen on every interface of the machine, whatever
    address `TF_CONFIG` gives it, and obey whoever connects.

    Args:
        arguments: Command line of `gpt-tf train`, `quantize` or `distil`, from that
            word on.
        workers: Number of worker processes, at least 1. The first is the chief.
        trust_network: Whether all who can reach this machine may be trusted; has to
            be True.
        max_restarts: Starts again in a row, without a new checkpoint between.
        port: First of as many ports in a row; free ones are taken unless given.
        join_timeout: Seconds that the workers wait for each other at most.
        on_line: Takes each line of the workers, with `[worker 0] ` before it.

    Raises:
        InputError: The command cannot be launched, a port is in use, or the network
            is not said to be trusted.
        WorkerFailedError: A worker failed in a way that a new start does not mend.

    Example:
        >>> words = ["train", "--preset", "tiny", "--out", "runs/tiny"]
        >>> launch(words, workers=2, trust_network=True)
    """
    arguments = [str(argument) for argument in arguments]
    workers = integer("workers", workers, 1, 256)
    max_restarts = integer("max_restarts", max_restarts)
    port = integer("port", port, 1, 65535, or_none=True)
    seconds_to_join(join_timeout)
    _check(arguments)
    if not trust_network:
        raise InputError(
            "Workers of TensorFlow listen on every interface of this machine, not on "
            "the loopback only, and obey whoever connects. `trust_network` is expected "
            "to say that a firewall, or a network of your own, keeps strangers out. "
            "Received: nothing."
        )
    out = Path(_value(arguments, "--out") or FOLDERS[arguments[0]])
    before = _stamp(out / "run.json")

    def command(start):
        verb, *words = arguments
        if "--overwrite" in words and _stamp(out / "run.json") != before:
            words = [word for word in words if word != "--overwrite"]
        # Before the others: an option without its value must not take one of these.
        own = []
        if not {"--overwrite", "--resume"} & set(words):
            own.append("--resume-or-start")
        if _value(words, "--strategy") is None:
            own += ["--strategy", "multi_worker"]
        if join_timeout is not None:
            own += ["--join-timeout", str(join_timeout)]
        return [sys.executable, "-m", "gpt_tf.cli", verb, *own, *words]

    supervise(
        command,
        workers,
        max_restarts=max_restarts,
        port=port,
        progress=lambda: _newest_checkpoint(out),
        on_line=on_line,
    )


def supervise(
    command,
    workers=2,
    *,
    max_restarts=3,
    port=None,
    progress=lambda: None,
    on_line=print,
    settle_s=3.0,
    grace_s=10.0,
):
    """Run one command in several processes, all or none, until all have succeeded.

    Args:
        command: Called with the number of the start, from 0; returns program and
            arguments. Each process finds its place in `TF_CONFIG`.
        workers: As for `launch`.
        max_restarts: As for `launch`.
        port: As for `launch`.
        progress: Returns what tells whether a start got further than the last.
        on_line: As for `launch`.
        settle_s: Seconds after the first failure in which others may end by
            themselves: the cause may be among them.
        grace_s: Seconds that a process has to end before it is killed.

    Raises:
        InputError: A number is out of its range, or a port is in use.
        WorkerFailedError: As for `launch`.
        KeyboardInterrupt: The launcher was interrupted; all processes have ended.
        SystemExit: The launcher was told to end; all processes have ended.
    """
    if workers < 1 or max_restarts < 0:
        raise InputError(
            "A launch expects 1 or more workers and 0 or more restarts. "
            f"Received: {workers} and {max_restarts}."
        )
    with _caught_signals() as caught, _Keeper() as keeper:
        failure, restarts = None, 0
        for start in itertools.count():
            reached = progress()
            ports = free_ports(workers) if port is None else _ports_at(port, workers)
            group = _Group(keeper, on_line, grace_s)
            try:
                group.start(command(start), ports)
                group.run(caught, settle_s)
            finally:
                group.end()
            if caught:
                break
            before, failure = failure, group.failure()
            if failure is None:
                return
            moved = progress() != reached
            restarts = 1 if moved else restarts + 1
            _refuse_hopeless(failure, None if moved else before)
            if restarts > max_restarts:
                raise WorkerFailedError(
                    f"All workers were ended, after {max_restarts} new starts without "
                    f"progress. {failure.text}",
                    failure.exit_status,
                )
            on_line(f"[launch] {failure.text}")
            on_line(f"[launch] starting all again, {restarts} of {max_restarts}")
    if caught[0] == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + caught[0])


class _Failure:
    """How the first of the workers that failed by themselves did."""

    def __init__(self, index, status, last_line):
        self.status = status
        self.last_line = last_line
        self.may_pass = status < 0 or status == PeerLostError.EXIT_STATUS
        self.exit_status = 128 - status if status < 0 else status
        how = (
            f"was killed by {_signal_name(-status)}"
            if status < 0
            else f"failed with status {status}"
        )
        last = f"its last line was: {last_line}" if last_line else "it wrote nothing"
        self.text = f"Worker {index} {how}; {last}"


def _refuse_hopeless(failure, before):
    """Raise what a new start does not mend; `before` failed at the same point."""
    again = (
        before is not None
        and not failure.may_pass
        and (failure.status, failure.last_line) == (before.status, before.last_line)
    )
    if failure.status == 2 or again:
        what = " (twice in the same way)" if again else ""
        raise WorkerFailedError(
            f"All workers were ended, for one failed{what}. {failure.text}",
            failure.exit_status,
        )


class _Group:
    """The processes of one start."""

    def __init__(self, keeper, on_line, grace_s):
        self.keeper = keeper
        self.on_line = on_line
        self.grace_s = grace_s
        self.processes = []
        self.readers = []
        self.last_lines = {}
        self.statuses = {}  # of those that ended by themselves, in that order
        self.lines = queue.SimpleQueue()

    def start(self, command, ports):
        addresses = [f"127.0.0.1:{port}" for port in ports]
        for index in range(len(addresses)):
            task = {"type": "worker", "index": index}
            cluster = {"cluster": {"worker": addresses}, "task": task}
            process = subprocess.Popen(
                [*_WHEN_KNOWN, *command],
                env=_environment(len(addresses), cluster),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.processes.append(process)
            self.keeper.add(process.pid)
            reader = threading.Thread(
                target=self._read, args=(index, process.stdout), daemon=True
            )
            reader.start()
            self.readers.append(reader)
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(b"\n")
                process.stdin.close()

    def run(self, caught, settle_s):
        """Pass lines on until all have ended, or one failed, or a signal came."""
        deadline = None
        while not caught and len(self.statuses) < len(self.processes):
            self._pass_on(0.1)
            self._look()
            failed = [status for status in self.statuses.values() if status]
            if 2 in failed or (deadline is not None and time.monotonic() > deadline):
                return
            if failed and deadline is None:
                deadline = time.monotonic() + settle_s

    def _look(self):
        for index, process in enumerate(self.processes):
            if index not in self.statuses and process.poll() is not None:
                self.statuses[index] = process.returncode

    def end(self):
        """End whatever still runs, and pass the last lines on."""
        self._look()
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + self.grace_s
        try:
            while any(process.poll() is None for process in self.processes):
                if time.monotonic() > deadline:
                    break
                self._pass_on(0.05)
        finally:
            self._kill()
        self._pass_on(0.0)

    def _kill(self):
        for process in self.processes:
            # The whole group: a worker's own children, too.
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self.keeper.discard(process.pid)
        for reader in self.readers:
            reader.join(1.0)

    def failure(self):
        """Return why this start failed, or None."""
        failed = {index: s for index, s in self.statuses.items() if s}
        if not failed:
            return None
        # A worker that lost a peer says less than the peer that was lost.
        index = min(
            failed,
            key=lambda i: (failed[i] != 2, failed[i] == PeerLostError.EXIT_STATUS),
        )
        return _Failure(index, failed[index], self.last_lines.get(index, ""))

    def _signal(self, number):
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, number)

    def _read(self, index, stream):
        with stream:
            for line in stream:
                self.lines.put((index, line.decode("utf-8", "replace").rstrip()))

    def _pass_on(self, timeout_s):
        """Pass on the lines that are there, or the first that comes in time."""
        while True:
            try:
                index, line = self.lines.get(timeout=timeout_s or 1e-3)
            except queue.Empty:
                return
            timeout_s = 0.0
            if words := line.strip(" ╭╮╰╯─│"):  # of the box that an error stands in
                self.last_lines[index] = words
            self.on_line(f"[worker {index}] {line}")


class _Keeper:
    """A process that kills the workers' groups when this process is gone."""

    def __enter__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _KEEPER],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()

    def add(self, group):
        self._tell(f"+{group}\n")

    def discard(self, group):
        self._tell(f"-{group}\n")

    def _tell(self, line):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()


@contextlib.contextmanager
def _caught_signals():
    """Collect the signals that ask to end, instead of dying of them."""
    caught, before = [], {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                before[number] = signal.signal(number, lambda n, _: caught.append(n))
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _environment(workers, cluster):
    """Return a worker's environment: what the user sets himself stays."""
    cores = (
        len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count()
    )
    threads = str(max(1, (cores or 1) // workers))
    defaults = {
        "TF_NUM_INTRAOP_THREADS": threads,
        "OMP_NUM_THREADS": threads,
        "PYTHONUNBUFFERED": "1",
    }
    if workers > 1:
        # Each worker would take all the memory of all GPUs.
        defaults["CUDA_VISIBLE_DEVICES"] = "-1"
    return {**defaults, **os.environ, "TF_CONFIG": artifacts.to_json(cluster)}


def free_ports(count):
    """Return so many ports of this machine that nobody listens on.

    Raises:
        InputError: There are not so many.
    """
    ports = random.SystemRandom().sample(_PORTS, 200)
    free = list(itertools.islice(filter(_is_free, ports), count))
    if len(free) < count:
        raise InputError(
            f"A launch expects {count} free ports from {_PORTS[0]} to {_PORTS[-1]}. "
            f"Found: {len(free)}. Name the first of them with --port."
        )
    return free


def _ports_at(first, count):
    ports = range(first, first + count)
    if first < 1 or ports[-1] > 65535:
        raise InputError(
            f"`--port` expects {count} ports from 1 to 65535. Received: {first}."
        )
    for port in ports:
        if not _is_free(port):
            raise InputError(
                f"`--port {first}` expects {count} free ports in a row. "
                f"Received: {port}, which is in use. End the process that holds it, "
                "or choose another."
            )
    return list(ports)


def _is_free(port):
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except OSError:
        return False
    return True


def _check(arguments):
    if not arguments or arguments[0] not in FOLDERS:
        raise InputError(
            f"A launch expects one of the commands {', '.join(FOLDERS)}, with its "
            f"options. Received: {shlex.join(arguments[:3]) or 'nothing'}. Write, for "
            "example: gpt-tf launch --workers 2 train --preset tiny --out runs/tiny"
        )
    strategy = _value(arguments, "--strategy")
    if strategy not in (None, "multi_worker"):
        raise InputError(
            "Workers expect the strategy multi_worker, which is set unless given. "
            f"Received: {strategy!r}. Leave --strategy out."
        )
    if _value(arguments, "--extract") is not None:
        raise InputError(
            "A launch expects a run that trains. Received: --extract, which one "
            "process does. Run `gpt-tf distil --extract` without launch."
        )


def _value(arguments, option):
    """Return what an option of a command line was given last, or None."""
    value = None
    for word, following in itertools.zip_longest(arguments, arguments[1:]):
        if word == option:
            value = following
        elif word.startswith(f"{option}="):
            value = word.partition("=")[2]
    return value


def _stamp(path):
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_mtime_ns


def _newest_checkpoint(out):
    return max((path.name for path in (out / "checkpoints").glob("step-*")), default="")


def _signal_name(number):
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
