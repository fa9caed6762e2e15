"""What is interrupted at any moment goes on right, or says that it failed."""

import contextlib
import threading
import weakref

import numpy as np
import pytest

import gpt_tf
from gpt_tf.edge import EdgeGPT, EdgeScheduler, session
from gpt_tf.edge.scheduler import Request
from gpt_tf.errors import InputError
from tests.edge.conftest import CONTEXT
from tests.edge.interruption import Interruption, no_longer_than, some_of
from tests.edge.test_runtime import random_ids

FILES = "edge/", "generation/"
ERRORS = KeyboardInterrupt, MemoryError
# The first slides, and the third ends at a stop text.
REQUESTS = [
    {"prompt": random_ids(20), "max_new_tokens": 12, "temperature": 0},
    {"prompt": "abc", "max_new_tokens": 6, "seed": 1},
    {"prompt": "fox", "max_new_tokens": 12, "seed": 5, "stop": "q"},
    {"prompt": [3], "max_new_tokens": 4, "seed": 2},
    {"prompt": [5, 3, 5], "max_new_tokens": 4, "seed": 3},
]
COUNTS = [12, pytest.param(240, marks=pytest.mark.slow)]


@pytest.fixture
def opened(exported, monkeypatch):
    """Open the file; its caches grow early, and are counted."""
    monkeypatch.setattr(session, "GROWTH", 4)
    make = session.Executor._new_cache

    @contextlib.contextmanager
    def open_it():
        buffers = weakref.WeakSet()

        def counted(self, capacity):
            cache = make(self, capacity)
            buffers.update(cache.buffers.values())
            return cache

        monkeypatch.setattr(session.Executor, "_new_cache", counted)
        session.plan.cache_clear()  # so that all runs are alike
        with EdgeGPT(exported.litertlm, num_threads=1) as gpt:
            yield gpt
            caches = [gpt._session._cache, *gpt._executor._pool]
            kept = {id(part) for cache in caches for part in cache.buffers.values()}
            assert {id(part) for part in buffers} == kept
            assert sum(cache.capacity for cache in caches[1:]) <= CONTEXT // 2

    return open_it


@pytest.fixture
def alone(gpt):
    """The texts that the requests have without an interruption."""
    return [gpt.generate(**options) for options in REQUESTS]


def sweep(try_at, count, *files):
    """Try an undisturbed run, then one for each of so many moments of it."""
    whole = Interruption(*files)
    try_at(whole)
    for index, moment in enumerate(some_of(whole.moments, count)):
        error = ERRORS[index % len(ERRORS)]
        interruption = Interruption(*files, error=error, moment=moment)
        with no_longer_than(60):
            try_at(interruption)
        assert interruption.raised


def work(gpt, interruption):
    """Use a scheduler in every way, interrupted; return requests and its texts."""
    requests, streamed = [], {}
    with (
        contextlib.suppress(*ERRORS),
        EdgeScheduler(gpt, max_chunk=4, max_active=2) as scheduler,
    ):
        try:
            with interruption:
                for options in REQUESTS[:3]:
                    requests.append(scheduler.submit(**options))
                    scheduler.step()
                streamed[1] = "".join(requests[1].stream())
                for options in REQUESTS[3:]:
                    requests.append(scheduler.submit(**options))
                for _ in zip(scheduler, range(9), strict=False):
                    pass
                requests[2].result()
                scheduler.run()
        except ERRORS:
            pass
        texts = {}
        for place, request in enumerate(requests):
            with contextlib.suppress(InputError):
                texts[place] = request.result()
        # All goes on, for new requests too.
        again = [scheduler.submit(**options) for options in REQUESTS]
        scheduler.run()
        assert scheduler.active == 0
        return texts, streamed, [request.result() for request in again]


def check_scheduler(opened, alone, count):
    failed = []

    def try_at(interruption):
        with opened() as gpt:
            texts, streamed, again = work(gpt, interruption)
            for found in (texts, streamed):
                assert found == {place: alone[place] for place in found}
            assert again == alone
            failed.append(len(REQUESTS) - len(texts))

    sweep(try_at, count, *FILES)
    assert failed[0] == 0


@pytest.mark.parametrize("count", COUNTS)
def test_a_scheduler_interrupted_at_any_moment_gives_right_texts_or_errors(
    opened, alone, count
):
    check_scheduler(opened, alone, count)


def test_the_sweep_finds_a_request_that_goes_on_after_an_interruption(
    opened, alone, monkeypatch
):
    ignored = property(lambda self: False, lambda self, value: None)
    monkeypatch.setattr(Request, "_working", ignored, raising=False)
    with pytest.raises((AssertionError, IndexError)):
        check_scheduler(opened, alone, 60)


@pytest.mark.parametrize("count", COUNTS)
def test_a_model_interrupted_at_any_moment_goes_on_with_right_texts(
    opened, alone, count
):
    ids = random_ids(CONTEXT)
    with opened() as gpt:
        gpt.prefill(ids[:-1])
        logits = gpt.decode(ids[-1])
        scores = gpt.score(ids)

    def try_at(interruption):
        with opened() as gpt:
            stream, pieces = gpt.stream(**REQUESTS[1]), []
            reading = appending = False
            try:
                with interruption:
                    reading = True
                    pieces += [next(stream), next(stream)]
                    reading = False
                    gpt.generate(**REQUESTS[0])
                    reading = True
                    pieces.append(next(stream))
                    reading = False
                    gpt.score(ids)
                    gpt.reset()
                    appending = True
                    gpt.prefill(ids[:7])
                    gpt.logits(ids[7:9])
                    for token in ids[9:15]:
                        gpt.decode(token)
            except ERRORS:
                pass
            if appending:  # the position says where to go on
                for token in ids[gpt.position :]:
                    found = gpt.decode(token)
                np.testing.assert_allclose(found, logits, atol=2e-5)
            if not reading:
                assert "".join([*pieces, *stream]) == alone[1]
            assert [gpt.generate(**options) for options in REQUESTS] == alone
            np.testing.assert_allclose(gpt.score(ids), scores, atol=2e-5)

    sweep(try_at, count, *FILES)


# Windows slide, one after the other.
BATCH = {"prompt": [random_ids(n) for n in (23, 21)], "max_new_tokens": 9, "seed": 4}


@pytest.mark.parametrize(
    ("count", "cold"),
    [
        (4, False),
        pytest.param(120, False, marks=pytest.mark.slow),
        pytest.param(20, True, marks=pytest.mark.slow),  # while it is traced
    ],
)
def test_keras_interrupted_at_any_moment_goes_on_with_right_texts(
    exported, count, cold
):
    def generate(options):
        return gpt_tf.generate(exported.model, tokenizer=exported.tokenizer, **options)

    both = BATCH, REQUESTS[2]
    alone = [generate(options) for options in both]

    def try_at(interruption):
        if cold:
            exported.model.__dict__.pop("_decoding_functions", None)
        with contextlib.suppress(*ERRORS), interruption:
            for options in both:
                generate(options)
        assert [generate(options) for options in both] == alone

    sweep(try_at, count, "models/", "generation/")


# Threads


def in_a_thread(call):
    """Call something in another thread; return what it gave or raised."""
    found = []

    def run():
        try:
            found.append(call())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def while_it_computes(monkeypatch, gpt, intrude):
    """Let another thread come in the middle of the third run of a signature."""
    found, runs, run = [], [], session.Session.run

    def meanwhile(self, signature, chunk):
        runs.append(chunk)
        if len(runs) == 3:
            found.append(in_a_thread(intrude))
        return run(self, signature, chunk)

    monkeypatch.setattr(session.Session, "run", meanwhile)
    return found


@pytest.mark.parametrize(
    "intrude",
    [
        lambda gpt, other: gpt.generate([1], max_new_tokens=2),
        lambda gpt, other: next(gpt.stream([1])),
        lambda gpt, other: gpt.score([1, 2]),
        lambda gpt, other: gpt.decode(1),
        lambda gpt, other: gpt.prefill([1]),
        lambda gpt, other: gpt.reset(),
        lambda gpt, other: gpt.new_session(),
        lambda gpt, other: gpt.close(),
        lambda gpt, other: other._scheduler.submit([1]),
        lambda gpt, other: other._scheduler.step(),
        lambda gpt, other: other.cancel(),
        lambda gpt, other: next(other.stream()),
    ],
)
def test_a_second_thread_meanwhile_gets_an_error_and_disturbs_nothing(
    exported, monkeypatch, intrude
):
    options = {"max_new_tokens": 9, "seed": 1}
    with EdgeGPT(exported.litertlm) as gpt:
        alone = gpt.generate("abc", **options)
        with EdgeScheduler(gpt) as scheduler:
            other = scheduler.submit("fox", **options)
            found = while_it_computes(monkeypatch, gpt, lambda: intrude(gpt, other))
            assert gpt.generate("abc", **options) == alone
    (error,) = found
    assert isinstance(error, InputError) and "one thread" in str(error)


def test_a_stream_left_open_goes_on_after_another_thread_has_used_the_model(
    opened, alone
):
    with opened() as gpt:
        stream = gpt.stream(**REQUESTS[0])
        begun = [next(stream) for _ in range(3)]
        assert in_a_thread(lambda: gpt.generate(**REQUESTS[1])) == alone[1]
        assert in_a_thread(lambda: next(stream)) == alone[0][3]
        assert [*begun, alone[0][3], *stream] == alone[0]
