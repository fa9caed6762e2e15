import numpy as np
import pytest

from gpt_tf.edge import EdgeGPT, EdgeScheduler, prefixes
from gpt_tf.errors import InputError
from gpt_tf.evaluation.worker import ModelRunner
from tests.edge.conftest import CONTEXT
from tests.edge.test_runtime import OPTIONS, random_ids

PROMPTS = [random_ids(20), [3], random_ids(11, seed=2), random_ids(CONTEXT), [5, 3, 5]]
KINDS = [{"chunked": False}, {"max_chunk": 4}, {"max_active": 2}]


@pytest.fixture(scope="module")
def gpt(exported):
    """The opened file, which takes one token a step, so that steps can be counted."""
    with EdgeGPT(exported.litertlm, speculate="none") as opened:
        yield opened


def works_of(scheduler):
    """Let it work; return what was done: the request's number, kind and tokens."""
    works = []
    while work := scheduler.step():
        works.append((work.requests[0].arrival, work.kind, work.tokens))
    return works


# Texts


@pytest.mark.parametrize(
    ("kind", "options"), list(zip(KINDS, OPTIONS, strict=True)), ids=str
)
def test_texts_are_those_that_each_request_has_alone(gpt, kind, options):
    # Long enough for the oldest half to be dropped.
    options = {"max_new_tokens": 30, **options}
    alone = [gpt.generate(prompt, **options) for prompt in PROMPTS]
    with EdgeScheduler(gpt, **kind) as scheduler:
        requests = [scheduler.submit(prompt, **options) for prompt in PROMPTS]
        scheduler.run()
        assert all(request.done for request in requests)
        assert [request.result() for request in requests] == alone
        assert scheduler.active == 0 and scheduler.step() is None


def test_pieces_join_to_the_text_and_others_go_on_meanwhile(gpt):
    options = {"max_new_tokens": 20, "seed": 3}
    with EdgeScheduler(gpt) as scheduler:
        other = scheduler.submit("fox", **options)
        pieces = list(scheduler.submit("abc", **options).stream())
        assert "".join(pieces) == gpt.generate("abc", **options) and len(pieces) > 1
        assert other.done and other.result() == gpt.generate("fox", **options)
        ids = scheduler.submit([1, 2], **options)
        assert list(ids.stream()) == gpt.generate([1, 2], **options) == ids.result()
        requests = [scheduler.submit(prompt, **options) for prompt in ("abc", "fox")]
        texts = dict.fromkeys(requests, "")
        for request, piece in scheduler:
            texts[request] += piece
        assert list(texts.values()) == [request.result() for request in requests]


def test_the_model_may_be_used_meanwhile_and_stays_open(gpt):
    with EdgeScheduler(gpt) as scheduler:
        request = scheduler.submit([1, 2, 3], max_new_tokens=20, temperature=0)
        scheduler.step()
        alone = gpt.generate([1, 2, 3], max_new_tokens=20, temperature=0)
        assert request.result() == alone
    assert gpt.generate([1, 2, 3], max_new_tokens=20, temperature=0) == alone


# Order


def test_a_short_request_does_not_wait_for_a_long_prompt(gpt):
    with EdgeScheduler(gpt, max_chunk=8) as scheduler:
        scheduler.submit(PROMPTS[3], max_new_tokens=1, temperature=0)
        scheduler.step()
        scheduler.submit([1, 2, 3], max_new_tokens=2, temperature=0)
        kinds = [(number, kind) for number, kind, _ in works_of(scheduler)]
    # Its prompt goes before the rest of the long one's, between whose chunks it writes.
    long, short = (0, "prefill"), (1, "decode")
    assert kinds[:4] == [(1, "prefill"), short, long, short]
    assert kinds[4:-1] == [long] * (len(kinds) - 5) and kinds[-1] == (0, "decode")
    with EdgeScheduler(gpt, max_chunk=8, chunked=False) as scheduler:
        scheduler.submit(PROMPTS[3], max_new_tokens=2, temperature=0)
        scheduler.submit([1, 2, 3], max_new_tokens=2, temperature=0)
        whole = [(0, "prefill", CONTEXT - 1), (1, "prefill", 2)]
        assert works_of(scheduler)[:2] == whole


@pytest.mark.parametrize("max_chunk", [1, 4, 8, 12, 64])
def test_no_chunk_is_longer_than_asked_for_and_every_token_is_read(gpt, max_chunk):
    with EdgeScheduler(gpt, max_chunk=max_chunk) as scheduler:
        scheduler.submit(PROMPTS[3], max_new_tokens=1, temperature=0)
        counts = [count for _, kind, count in works_of(scheduler) if kind == "prefill"]
    assert sum(counts) == CONTEXT - 1 and max(counts) <= max_chunk
    assert len(counts) == 1 or max_chunk < CONTEXT


def test_between_two_chunks_every_writer_gets_one_token(gpt):
    with EdgeScheduler(gpt, max_chunk=4) as scheduler:
        for prompt in ([1], [2], [3]):
            scheduler.submit(prompt, max_new_tokens=4, temperature=0)
        scheduler.submit(PROMPTS[0], max_new_tokens=1, temperature=0)
        works = [(number, kind) for number, kind, _ in works_of(scheduler)]
    chunks = [place for place, (_, kind) in enumerate(works) if kind == "prefill"]
    for begin, end in zip([-1, *chunks[:3]], chunks, strict=False):
        assert works[begin + 1 : end] == [(0, "decode"), (1, "decode"), (2, "decode")]


def test_the_shortest_prompt_goes_first_but_none_is_passed_over_for_ever(gpt):
    with EdgeScheduler(gpt, max_chunk=1, patience=3) as scheduler:
        scheduler.submit(random_ids(9), max_new_tokens=1, temperature=0)
        for _ in range(6):
            scheduler.submit(random_ids(3), max_new_tokens=1, temperature=0)
        order = [n for n, kind, _ in works_of(scheduler) if kind == "prefill"]
    # Chunks of one token: two for each short prompt, and 8 for the long one.
    assert order == [1, 1, 2, 0, 2, 3, 3, 0, 4, 4, 5, 0, 5, 6, 6, 0, *[0] * 4]


def test_no_more_than_max_active_have_a_cache(gpt):
    with EdgeScheduler(gpt, max_active=2) as scheduler:
        options = {"max_new_tokens": 3, "temperature": 0}
        requests = [scheduler.submit([n], **options) for n in range(5)]
        seen = []
        while scheduler.step():
            seen.append(scheduler.active)
            held = [request for request in requests if request._session is not None]
            assert len(held) == scheduler.active
        assert max(seen) == 2
    assert [r.tokens for r in requests] == gpt.generate(
        [[n] for n in range(5)], **options
    )


# Ends


def test_a_cancelled_request_makes_room(gpt):
    with EdgeScheduler(gpt, max_active=1) as scheduler:
        first = scheduler.submit([1], max_new_tokens=50, temperature=0)
        second = scheduler.submit([2], max_new_tokens=3, temperature=0)
        scheduler.step()
        first.cancel()
        first.cancel()
        assert first.done and len(first.tokens) == 1
        assert second.result() == gpt.generate([2], max_new_tokens=3, temperature=0)
        pieces = scheduler.submit([3], max_new_tokens=50, temperature=0).stream()
        next(pieces)
        pieces.close()
        assert scheduler.active == 0


def test_a_request_that_fails_does_not_touch_the_others(gpt, monkeypatch):
    options = {"max_new_tokens": 5, "temperature": 0}
    alone = gpt.generate([4], **options)
    with EdgeScheduler(gpt) as scheduler:
        bad, good = (scheduler.submit([n], **options) for n in (3, 4))
        scheduler.step()
        scheduler.step()
        verify = bad._session.verify
        monkeypatch.setattr(
            bad._session, "verify", lambda *tokens: verify(*tokens) * np.nan
        )
        assert good.result() == alone
        scheduler.run()
        assert bad.done and len(bad.tokens) == 1 and scheduler.active == 0
        for call in (bad.result, lambda: list(bad.stream())):
            with pytest.raises(InputError, match="finite logits"):
                call()


def test_a_speed_is_measured_though_the_text_has_ended(gpt, monkeypatch):
    (first, *_) = gpt.generate([1, 2], max_new_tokens=1, temperature=0)
    monkeypatch.setattr(type(gpt.tokenizer), "end_ids", (first,))
    asked = {"max_new_tokens": 5, "temperature": 0}
    with EdgeScheduler(gpt) as scheduler:
        ended = scheduler.submit([1, 2], **asked)
        goes_on = scheduler.submit([1, 2], **asked, ignore_eos=True)
        scheduler.run()
    assert (len(ended.tokens), len(goes_on.tokens)) == (0, 5)
    assert all(rate > 0 for rate in ModelRunner(gpt).throughput([1, 2], 2, 3))


def test_nothing_asked_for_is_nothing_done(gpt):
    with EdgeScheduler(gpt) as scheduler:
        assert scheduler.step() is None and list(scheduler) == []
        request = scheduler.submit("abc", max_new_tokens=0)
        assert request.done and request.result() == "" and not list(request.stream())
        assert scheduler.step() is None


def test_closing_ends_requests_and_a_file_that_it_opened(exported):
    scheduler = EdgeScheduler(exported.litertlm, num_threads=1)
    request = scheduler.submit("abc")
    waiting = scheduler.submit("fox")
    scheduler.step()
    scheduler.close()
    assert request.done and waiting.done
    with pytest.raises(InputError, match="was closed"):
        scheduler.submit("abc")
    with pytest.raises(InputError, match="was closed"):
        scheduler.step()


# Bad requests


def test_bad_requests_are_refused_and_nothing_is_queued(gpt):
    with EdgeScheduler(gpt) as scheduler:
        for prompt, options in (([], {}), (["abc"], {}), ([1], {"temperature": -1})):
            with pytest.raises(InputError):
                scheduler.submit(prompt, **options)
        assert scheduler.step() is None


@pytest.mark.parametrize("name", ["max_chunk", "max_active", "patience"])
def test_bad_arguments_are_refused(gpt, name):
    with pytest.raises(InputError, match=rf"`{name}` expects"):
        EdgeScheduler(gpt, **{name: 0})
    with pytest.raises(InputError, match="open EdgeGPT"):
        EdgeScheduler(gpt, num_threads=2)


# Prefixes


def test_prompts_that_begin_alike_are_computed_once_and_give_the_same_texts(
    gpt, monkeypatch
):
    monkeypatch.setattr(prefixes, "FEWEST_TOKENS", 4)
    long = random_ids(21, seed=4)
    prompts = [long, long, [*long[:18], 1, 2], [*long[:5], *long[:15]], long, long]
    options = {"max_new_tokens": 2, "seed": 2}
    alone = [gpt.generate(prompt, **options) for prompt in prompts]
    with EdgeScheduler(gpt, max_chunk=8, prefixes=1) as scheduler:
        read = []
        for batch in (prompts[:3], *([prompt] for prompt in prompts[3:])):
            requests = [scheduler.submit(prompt, **options) for prompt in batch]
            works = works_of(scheduler)
            read += [
                sum(n for number, kind, n in works if (number, kind) == (r, "prefill"))
                for r in (request.arrival for request in requests)
            ]
            assert [r.result() for r in requests] == alone[: len(batch)]
            alone = alone[len(batch) :]
            assert len(scheduler._prefixes.kept) == 1 and scheduler.active == 0
    # The third is the shortest and goes first; all but a chunk is copied from it. The
    # fourth shares none, and drives the others out.
    assert read == [4, 0, 19, 19, 20, 0]


def test_rows_scores_and_ends_are_told(gpt):
    options = {"max_new_tokens": 6, "seed": 5}
    texts = gpt.generate(["abc"] * 3, **options)
    ids = gpt.tokenizer.encode("abc")
    with EdgeScheduler(gpt) as scheduler:
        for row, text in enumerate(texts):
            request = scheduler.submit(
                ids, row=row, as_text=True, num_logprobs=3, **options
            )
            assert request.result() == text
            assert request.at_limit and request.num_shown == len(request.tokens) == 6
            expected = gpt.score([*ids, *request.tokens])[len(ids) - 1 :]
            found = [score.logprob for score in request.scores]
            np.testing.assert_allclose(found, expected, atol=1e-4)
            assert [score.token for score in request.scores] == request.tokens
            for score in request.scores:
                best = [value for _, value in score.top]
                assert len(best) == 3 and best == sorted(best, reverse=True)
                assert best[0] >= score.logprob
        stopped = scheduler.submit("abc", stop=[texts[0][2]], **options)
        assert stopped.result() == texts[0][:2] and not stopped.at_limit
