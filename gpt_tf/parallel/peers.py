"""The workers of one run: they wait for each other, and notice when one is gone.

TensorFlow waits without limit for a worker that never comes, and its survivors wait
without limit for one that was killed. So the workers meet here first: each listens
on its own port of `TF_CONFIG`, sees that it reaches all others, and tells the leader,
who lets all go at once. TensorFlow then takes the ports over, while the connections
between leader and workers stay. A process that ends closes them, however it ended; a
machine that is switched off or frozen sends no more heartbeats. Lines of JSON travel:

    worker to leader    hello, then unreached (addresses), alive, done
    leader to worker    welcome, taken, refused or failed; missing, go, alive, lost, bye

No TensorFlow here, so that none of this waits for it.
"""

import contextlib
import errno
import hashlib
import os
import selectors
import socket
import threading
import time

from gpt_tf import artifacts
from gpt_tf.errors import InputError
from gpt_tf.settings import arguments

JOIN_TIMEOUT_S = 600.0
JOIN_TIMEOUT_VARIABLE = "GPT_TF_JOIN_TIMEOUT"
_LONGEST_LINE = 1 << 20
_TIMEOUT_S = 5.0
_LONG_S = 5.0


def join_timeout(given=None):
    """Return how long workers wait for each other, in seconds.

    Args:
        given: Seconds, above 0; None takes the environment variable
            `GPT_TF_JOIN_TIMEOUT`, or ten minutes.

    Raises:
        InputError: That is no number above 0.
    """
    limits = {"above": 0, "below": threading.TIMEOUT_MAX}
    if given is not None:
        return arguments.number("join_timeout", given, **limits)
    value = os.environ.get(JOIN_TIMEOUT_VARIABLE) or JOIN_TIMEOUT_S
    with contextlib.suppress(ValueError):
        value = float(value)
    return arguments.number(JOIN_TIMEOUT_VARIABLE, value, **limits)


class Peers:
    """The other workers of this run, as this worker sees them.

    Args:
        cluster: Lists of `host:port` by task type, of which chief and workers count.
        task: This process's `type` and `index`.
        heartbeat_s: Seconds between signs of life.
        silence_s: Seconds without one after which a worker counts as lost.

    Attributes:
        is_leader: Whether the others report to this process.
        lost: Name of the first worker that was lost, or None.

    Example:
        >>> peers = Peers(cluster, {"type": "worker", "index": 0})
        >>> peers.join(timeout_s=600)
        >>> peers.watch(on_lost=print)
        >>> peers.leave()
    """

    def __init__(self, cluster, task, heartbeat_s=5.0, silence_s=60.0):
        self.addresses = {
            f"{kind} {index}": address
            for kind in ("chief", "worker")
            for index, address in enumerate(cluster.get(kind, ()))
        }
        self.name = f"{task['type']} {task['index']}"
        self.leader = next(iter(self.addresses))
        self.is_leader = self.name == self.leader
        self.heartbeat_s = heartbeat_s
        self.silence_s = silence_s
        self.lost = None
        self.lost_event = threading.Event()
        self._missing = []
        self._came = set()
        self._channels = {}
        self._leaving = threading.Event()
        self._ended = threading.Event()
        self._watcher = None

    def __str__(self):
        return ", ".join(map(self._describe, self.addresses))

    def _describe(self, name):
        return f"{name} ({self.addresses.get(name, 'of another cluster')})"

    # Coming together

    def join(self, timeout_s, on_waiting=None):
        """Wait until all workers are there and reach each other.

        Args:
            timeout_s: Seconds to wait at most.
            on_waiting: Takes one line on who is missing, if that takes long.

        Raises:
            InputError: This worker's port is in use, its cluster is another than the
                leader's, or not all workers came in time.
        """
        deadline = time.monotonic() + timeout_s
        timer = threading.Timer(_LONG_S, self._say_who_is_missing, [on_waiting])
        timer.daemon = True
        with self._listen() as listener:
            others = [n for n in self.addresses if n not in (self.name, self.leader)]
            unreached = dict.fromkeys(others)
            over = threading.Event()
            threading.Thread(
                target=self._reach, args=(unreached, over), daemon=True
            ).start()
            timer.start()
            try:
                if self.is_leader:
                    self._gather(listener, deadline, timeout_s, unreached)
                else:
                    self._report(deadline, timeout_s, unreached)
            except BaseException:
                self.abandon()
                raise
            finally:
                timer.cancel()
                over.set()

    def _say_who_is_missing(self, on_waiting):
        if on_waiting is not None and self._missing:
            on_waiting(f"waiting for {', '.join(self._missing)}")

    def _listen(self):
        port = _host_and_port(self.addresses[self.name])[1]
        dual = socket.has_dualstack_ipv6()
        try:
            return socket.create_server(
                ("", port),
                family=socket.AF_INET6 if dual else socket.AF_INET,
                backlog=max(16, len(self.addresses)),
                dualstack_ipv6=dual,
            )
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                why = "which is in use"
            else:
                why = f"which cannot be opened: {error.strerror}"
            raise InputError(
                f"TF_CONFIG gives {self.name} the port {port} of this machine, {why}. "
                "End the process that holds it, or name another port in the "
                "TF_CONFIG of all workers."
            ) from None

    def _reach(self, unreached, over):
        """Connect to the other workers' ports until each has answered once."""
        while unreached and not over.is_set():
            for name in list(unreached):
                with contextlib.suppress(OSError):
                    _connect(self.addresses[name], 1.0).close()
                    del unreached[name]
            over.wait(0.2)

    def _gather(self, listener, deadline, timeout_s, unreached):
        """Collect hello and readiness of all others, then let all go."""
        listener.setblocking(False)
        waiting, told = {}, 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            try:
                while missing := self._who_is_missing(waiting, unreached):
                    self._missing = missing
                    now = time.monotonic()
                    if now > deadline:
                        text = _who_is_missing(timeout_s, missing)
                        self._tell_all({"failed": text})
                        raise InputError(text)
                    if now - told > 0.5:
                        self._tell_all({"missing": missing})
                        told = now
                    for key, _ in selector.select(0.2):
                        if key.data is None:
                            _accept(listener, selector)
                        elif not self._hear(key.data, waiting):
                            selector.unregister(key.data)
                            self._forget(key.data, waiting)
            finally:
                known = self._channels.values()
                for key in list(selector.get_map().values()):
                    if key.data is not None and key.data not in known:
                        key.data.close()
        self._tell_all({"go": True})

    def _forget(self, channel, waiting):
        channel.close()
        if self._channels.get(channel.name) is channel:
            del self._channels[channel.name]
            waiting.pop(channel.name, None)

    def _who_is_missing(self, waiting, unreached):
        missing = [n for n in self.addresses if n not in waiting and n != self.name]
        if missing:
            # Who came and gave up before us is not the cause.
            never = [name for name in missing if name not in self._came]
            return list(map(self._describe, never or missing))
        reports = {**waiting, self.name: list(unreached)}
        return [
            f"{self._describe(name)} from {reporter}"
            for reporter, names in reports.items()
            for name in names
        ]

    def _hear(self, channel, waiting):
        """Take what a worker says while all gather; return whether it is still there.

        A worker is not waited for once it has said what it cannot reach yet.
        """
        messages, is_open = channel.read()
        for message in messages:
            if "unreached" in message and channel.name:
                waiting[channel.name] = [
                    name for name in message["unreached"] if name in self.addresses
                ]
            if "hello" not in message:
                continue
            name = message["hello"]
            if message.get("cluster") != self._fingerprint():
                channel.send({"refused": ", ".join(self.addresses.values())})
            elif name in self.addresses and name not in (self.name, *self._channels):
                channel.name = name
                self._channels[name] = channel
                self._came.add(name)
                channel.send({"welcome": True})
            else:
                channel.send({"taken": True})
        return is_open

    def _report(self, deadline, timeout_s, unreached):
        """Say hello to the leader until it answers, then wait until it says go."""
        self._missing = [self._describe(self.leader)]
        while time.monotonic() < deadline:
            try:
                connection = _connect(self.addresses[self.leader], 2.0)
            except OSError:
                time.sleep(0.2)
                continue
            channel = _Channel(connection, self.leader)
            try:
                go = self._wait_for_go(channel, deadline, unreached)
            except BaseException:
                channel.close()
                raise
            if go:
                self._channels[self.leader] = channel
                return
            channel.close()
            time.sleep(0.2)
        raise InputError(_who_is_missing(timeout_s, self._missing))

    def _wait_for_go(self, channel, deadline, unreached):
        """Return whether the leader said go before it was gone."""
        channel.send({"hello": self.name, "cluster": self._fingerprint()})
        said, welcome, is_open = time.monotonic(), False, True
        # Who does not answer is not the leader, or not yet: TensorFlow of the run
        # before may still hold the port.
        while (
            is_open
            and (now := time.monotonic()) < deadline
            and (welcome or now - said < _TIMEOUT_S)
        ):
            messages, is_open = channel.read(0.2)
            for message in messages:
                if "go" in message:
                    return True
                if "failed" in message:
                    raise InputError(message["failed"])
                if "refused" in message:
                    raise InputError(
                        "All workers expect the same cluster in TF_CONFIG. "
                        f"Received: {', '.join(self.addresses.values())} here, "
                        f"{message['refused']} at {self._describe(self.leader)}. "
                        "Give all the same list."
                    )
                if "taken" in message:
                    twice = f"{self.name} twice: another process is that too"
                    self._missing = [twice]
                welcome = welcome or "welcome" in message
                self._missing = message.get("missing", self._missing)
            if welcome:
                channel.send({"unreached": list(unreached)})
        return False

    def _fingerprint(self):
        text = artifacts.to_json(self.addresses, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    # Staying together

    def watch(self, on_lost):
        """Begin to watch the others, in a thread of its own.

        Args:
            on_lost: Called once with the name of a worker that is gone, or silent
                for too long.
        """
        self._watcher = threading.Thread(
            target=self._watch, args=(on_lost,), daemon=True
        )
        self._watcher.start()

    def leave(self, timeout_s=30.0):
        """Say that this worker is done, and wait until all are.

        TensorFlow's last answers may still be on their way to the others.
        """
        self._leaving.set()
        if self._watcher is not None and self.lost is None:
            self._ended.wait(timeout_s)
        self.abandon()

    def abandon(self):
        """Leave without a goodbye: to the others this worker is lost."""
        self._ended.set()
        for channel in list(self._channels.values()):
            channel.close()

    def ended(self, timeout_s):
        """Wait a while for this worker to leave; return whether it did."""
        return self._ended.wait(timeout_s)

    def _watch(self, on_lost):
        lost, done, beaten, said = None, set(), 0.0, False
        now = time.monotonic()
        for channel in self._channels.values():
            channel.seen = now
        while not self._ended.is_set():
            for name, channel in list(self._channels.items()):
                messages, is_open = channel.read(0.2 / len(self._channels))
                for message in messages:
                    if "done" in message:
                        done.add(name)
                    if "bye" in message:
                        self._ended.set()
                    lost = lost or message.get("lost")
                now = time.monotonic()
                silent = now - channel.seen > self.silence_s
                if (not is_open or silent) and name not in done:
                    lost = lost or self._describe(name)
                    done.add(name)
                if not is_open:
                    time.sleep(0.2 / len(self._channels))
            if self._ended.is_set():
                return
            if lost and not self._leaving.is_set():
                self._tell_all({"lost": lost})
                self.lost = lost
                self.lost_event.set()
                on_lost(lost)
                return
            if now - beaten > self.heartbeat_s:
                self._tell_all({"alive": True})
                beaten = now
            if self._leaving.is_set() and not self.is_leader and not said:
                self._tell_all({"done": True})
                said = True
            if self._leaving.is_set() and (lost or done >= set(self._channels)):
                self._tell_all({"bye": True})
                self._ended.set()

    def _tell_all(self, message):
        for channel in list(self._channels.values()):
            channel.send(message)


class _Channel:
    """Lines of JSON over a connection; a broken connection only stops to be open."""

    def __init__(self, connection, name=None):
        connection.settimeout(_TIMEOUT_S)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self.name = name
        self.seen = time.monotonic()
        self._rest = b""

    def fileno(self):
        return self.connection.fileno()

    def close(self):
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads
        self.connection.close()

    def send(self, message):
        with contextlib.suppress(OSError):
            self.connection.settimeout(_TIMEOUT_S)
            self.connection.sendall(artifacts.to_json(message).encode() + b"\n")

    def read(self, timeout_s=_TIMEOUT_S):
        """Return what comes within a time, and whether the connection is open."""
        try:
            self.connection.settimeout(timeout_s)
            data = self.connection.recv(1 << 16)
        except TimeoutError:
            return [], True
        except OSError:
            return [], False
        if not data or len(self._rest) > _LONGEST_LINE:
            return [], False
        self.seen = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        messages = []
        for line in lines:
            try:
                message = artifacts.parse_json(line)
            except ValueError:
                return messages, False  # somebody else's protocol
            if isinstance(message, dict):
                messages.append(message)
        return messages, True


def _accept(listener, selector):
    with contextlib.suppress(OSError):
        channel = _Channel(listener.accept()[0])
        selector.register(channel, selectors.EVENT_READ, channel)


def _host_and_port(address):
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _connect(address, timeout_s):
    return socket.create_connection(_host_and_port(address), timeout_s)


def _who_is_missing(timeout_s, missing):
    return (
        f"All workers of TF_CONFIG are expected within {timeout_s:g} seconds. "
        f"No answer from {', '.join(missing)}. Check that each was started with an "
        "index of its own, that its address is right and that no firewall closes its "
        "port; --join-timeout waits longer."
    )
