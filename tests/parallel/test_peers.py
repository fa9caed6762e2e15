"""Workers wait for each other with a limit, and notice when one is gone."""

import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from gpt_tf.errors import InputError
from gpt_tf.parallel import peers as module
from gpt_tf.parallel.peers import Peers, join_timeout


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]


@pytest.fixture
def make():
    """Make the workers of one cluster; they leave when the test ends."""
    made = []

    def workers(count, **options):
        cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(count)]}
        for index in range(count):
            task = {"type": "worker", "index": index}
            made.append(Peers(cluster, task, **options))
        return made[-count:]

    yield workers
    for peers in made:
        peers.abandon()


def join(workers, timeout_s=20.0):
    """Join in a thread each; return what each was refused with, or None."""

    def outcome(peers):
        try:
            peers.join(timeout_s)
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(len(workers)) as pool:
        return list(pool.map(outcome, workers))


@pytest.fixture
def together(make):
    """Make workers that have joined and watch; return them and who lost whom."""

    def start(count, **options):
        workers = make(count, **options)
        assert join(workers) == [None] * count
        lost = [[] for _ in workers]
        for peers, names in zip(workers, lost, strict=True):
            peers.watch(names.append)
        return workers, lost

    return start


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


# Coming together


def test_no_worker_goes_on_before_the_last_has_come(make):
    workers = make(3)
    gone_on = []

    def go(peers):
        peers.join(20.0)
        gone_on.append(peers.name)

    threads = [threading.Thread(target=go, args=(peers,)) for peers in workers]
    for thread in threads[:2]:
        thread.start()
    time.sleep(1.0)
    assert gone_on == []
    threads[2].start()
    for thread in threads:
        thread.join()
    assert sorted(gone_on) == ["worker 0", "worker 1", "worker 2"]


def test_a_chief_of_its_own_is_the_leader():
    cluster = {"worker": ["a:1", "b:2"], "chief": ["c:3"], "ps": ["d:4"]}
    peers = Peers(cluster, {"type": "worker", "index": 0})
    assert (peers.leader, peers.is_leader) == ("chief 0", False)
    assert list(peers.addresses.values()) == ["c:3", "a:1", "b:2"]


def test_a_worker_that_never_comes_is_named_to_all_that_came(make):
    workers = make(3)
    absent = workers[2].addresses["worker 2"]
    for message in join(workers[:2], timeout_s=1.5):
        assert f"No answer from worker 2 ({absent})." in message
        assert "within 1.5 seconds" in message
        assert "worker 1 (" not in message


def test_who_came_and_gave_up_first_is_not_named_as_missing(make):
    workers = make(3)
    with ThreadPoolExecutor(2) as pool:
        leader = pool.submit(workers[0].join, 3.0)
        early = pool.submit(workers[1].join, 1.0)
        assert "worker 2 (" in str(early.exception())
        message = str(leader.exception())
    assert "No answer from worker 2 (" in message
    assert "worker 1" not in message


def test_a_leader_that_never_comes_is_named(make):
    workers = make(3)
    began = time.monotonic()
    for message in join(workers[1:], timeout_s=1.0):
        assert f"worker 0 ({workers[0].addresses['worker 0']})" in message
    assert time.monotonic() - began < 10.0


@pytest.mark.parametrize("present", [0, 1])
def test_who_waits_long_says_for_whom(make, monkeypatch, present):
    monkeypatch.setattr(module, "_LONG_S", 0.5)
    workers, said = make(2), []
    with pytest.raises(InputError):
        workers[present].join(1.0, said.append)
    absent = f"worker {1 - present}"
    assert said == [f"waiting for {absent} ({workers[0].addresses[absent]})"]
    said.clear()
    monkeypatch.setattr(module, "_LONG_S", 60.0)
    with pytest.raises(InputError):
        workers[present].join(1.0, said.append)
    assert said == []


def test_a_worker_that_cannot_be_reached_by_another_is_named(make, monkeypatch):
    workers = make(3)
    closed = workers[2].addresses["worker 2"]
    connect = module._connect

    def firewall(address, timeout_s):
        if address == closed:
            raise ConnectionRefusedError
        return connect(address, timeout_s)

    monkeypatch.setattr(module, "_connect", firewall)
    for message in join(workers, timeout_s=2.0):
        assert f"worker 2 ({closed}) from worker" in message


def test_another_cluster_is_refused_with_both_lists(make):
    first, _ = make(2)
    (port,) = free_ports(1)
    cluster = {"worker": [first.addresses["worker 0"], f"127.0.0.1:{port}"]}
    stranger = Peers(cluster, {"type": "worker", "index": 1})
    _, message = join([first, stranger], timeout_s=2.0)
    assert "same cluster" in message
    assert f"127.0.0.1:{port} here" in message
    assert f"{first.addresses['worker 1']} at worker 0" in message


def test_two_processes_of_one_index_are_told_so(make):
    workers = make(3)
    double = Peers(
        {"worker": list(workers[0].addresses.values())}, {"type": "worker", "index": 1}
    )
    double._listen = contextlib.nullcontext  # as on another machine
    _, *messages = join([workers[0], workers[1], double], timeout_s=2.0)
    assert any("worker 1 twice" in message for message in messages)
    assert not all("worker 1 twice" in message for message in messages)


def test_a_port_in_use_is_named(make):
    first, second = make(2)
    port = int(second.addresses["worker 1"].rpartition(":")[2])
    with socket.create_server(("", port)), pytest.raises(InputError) as caught:
        second.join(1.0)
    assert f"port {port} of this machine, which is in use" in str(caught.value)
    assert first.is_leader


@pytest.mark.parametrize(
    "said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x00\xff\n", b"[1]\n", b'{"hello": 7}\n']
)
def test_a_stranger_does_not_disturb_those_that_join(make, said):
    workers = make(2)
    address = module._host_and_port(workers[0].addresses["worker 0"])
    stop = threading.Event()

    def knock():
        while not stop.wait(0.01):
            with (
                contextlib.suppress(OSError),
                socket.create_connection(address, 1.0) as connection,
            ):
                connection.sendall(said)
                if stop.wait(0.05):
                    return

    thread = threading.Thread(target=knock)
    thread.start()
    try:
        time.sleep(0.1)
        assert join(workers) == [None, None]
    finally:
        stop.set()
        thread.join()


def test_a_worker_that_starts_again_meanwhile_is_welcome(make):
    leader, worker = make(2)
    address = module._host_and_port(leader.addresses["worker 0"])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(leader.join, 20.0)
        hello = {"hello": worker.name, "cluster": worker._fingerprint()}
        for _ in range(100):
            with contextlib.suppress(OSError):
                connection = socket.create_connection(address)
                break
            time.sleep(0.05)
        with connection:
            connection.sendall(json.dumps(hello).encode() + b"\n")
            assert b"welcome" in connection.recv(1000)
        assert not waiting.done()
        worker.join(20.0)
        waiting.result()


def test_the_port_is_free_for_tensorflow_once_all_have_come(make):
    workers = make(2)
    assert join(workers) == [None, None]
    for name, address in workers[0].addresses.items():
        with socket.create_server(("", int(address.rpartition(":")[2]))):
            assert workers[0].addresses[name] == address


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", ""])
def test_a_time_limit_that_is_none_is_refused(monkeypatch, value):
    monkeypatch.setenv("GPT_TF_JOIN_TIMEOUT", value)
    if value == "":
        assert join_timeout() == 600.0
        return
    with pytest.raises(InputError, match="GPT_TF_JOIN_TIMEOUT"):
        join_timeout()
    with pytest.raises(InputError, match="`join_timeout`"):
        join_timeout(value)
    monkeypatch.setenv("GPT_TF_JOIN_TIMEOUT", "7.5")
    assert (join_timeout(), join_timeout(3)) == (7.5, 3.0)


# Staying together


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_all_others_learn_which_worker_is_gone(together, gone):
    workers, lost = together(3)
    workers[gone].abandon()
    stay = [index for index in range(3) if index != gone]
    assert wait_until(lambda: all(lost[index] for index in stay))
    name = workers[0]._describe(f"worker {gone}")
    assert [lost[index] for index in stay] == [[name], [name]]
    assert lost[gone] == []
    assert all(workers[index].lost == name for index in stay)


@pytest.mark.parametrize("silent", [0, 1])
def test_a_worker_that_falls_silent_is_lost(make, silent):
    workers = make(2, heartbeat_s=0.1, silence_s=1.0)
    assert join(workers) == [None, None]
    lost = []
    workers[1 - silent].watch(lost.append)
    assert not wait_until(lambda: lost, seconds=0.4)
    assert wait_until(lambda: lost)
    assert lost == [workers[0]._describe(f"worker {silent}")]


def test_workers_that_give_signs_of_life_are_not_lost(together):
    _, lost = together(3, heartbeat_s=0.1, silence_s=2.0)
    assert not wait_until(lambda: any(lost), seconds=3.5)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_nobody_leaves_before_all_are_done_and_nobody_is_lost(together, order):
    workers, lost = together(3)
    left = []

    def leave(index):
        workers[index].leave()
        left.append(index)

    threads = [threading.Thread(target=leave, args=(index,)) for index in order]
    for thread in threads[:2]:
        thread.start()
    time.sleep(1.0)
    assert left == []
    threads[2].start()
    for thread in threads:
        thread.join()
    assert sorted(left) == [0, 1, 2]
    assert lost == [[], [], []]


def test_one_that_dies_while_others_leave_does_not_keep_them(together):
    workers, lost = together(2)
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        leaving = pool.submit(workers[0].leave)
        time.sleep(0.5)
        workers[1].abandon()
        leaving.result()
    assert time.monotonic() - began < 10.0
    assert lost[0] == []
