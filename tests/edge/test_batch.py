import json

import numpy as np
import pytest

from gpt_tf.edge import EdgeGPT, EdgeScheduler, session
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.export import integrity, signatures
from gpt_tf.export.tflite import export_tflite
from tests.edge.conftest import CONTEXT
from tests.edge.test_runtime import OPTIONS, keras_logits, random_ids

LENGTHS = (20, 1, 11, CONTEXT, 3, 7, 2, 15, 5)
PROMPTS = [random_ids(count, seed) for seed, count in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def path(exported, tmp_path_factory):
    path = tmp_path_factory.mktemp("batched") / "gpt.tflite"
    options = {"prefill_lengths": (1, 4, 8), "batch_sizes": (4, 2)}
    export_tflite(exported.model, path, "float32", **options)
    return path


@pytest.fixture
def gpt(path, monkeypatch):
    """The opened file, whose caches grow early and often, and a token a step."""
    monkeypatch.setattr(session, "GROWTH", 4)
    with EdgeGPT(path, speculate="none") as opened:
        yield opened


def calls_of(scheduler):
    """Let it work; return how many requests each step decoded for."""
    calls = []
    while work := scheduler.step():
        if work.kind == "decode":
            assert work.tokens == len(work.requests)
            calls.append(len(work.requests))
    return calls


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_texts_are_those_that_each_request_has_alone(gpt, options):
    # Of several lengths: they end one after the other, and others take their places.
    counts = [30, 3, 12, 30, 1, 8, 5, 20, 9]
    alone = [
        gpt.generate(prompt, max_new_tokens=count, **options)
        for prompt, count in zip(PROMPTS, counts, strict=True)
    ]
    with EdgeScheduler(gpt, max_active=6) as scheduler:
        requests = [
            scheduler.submit(prompt, max_new_tokens=count, **options)
            for prompt, count in zip(PROMPTS, counts, strict=True)
        ]
        calls = calls_of(scheduler)
        assert [request.result() for request in requests] == alone
    assert sum(calls) == sum(counts) and {1, 2, 3, 4} <= set(calls)


def test_short_texts_follow_long_ones_with_a_row_free(gpt):
    prompts = [PROMPTS[0][:count] for count in (18, 17, 16, 3, 2, 1)]
    alone = [gpt.generate(prompt, max_new_tokens=4, seed=1) for prompt in prompts]
    with EdgeScheduler(gpt) as scheduler:
        for begin in (0, 3):
            texts = slice(begin, begin + 3)
            requests = [
                scheduler.submit(prompt, max_new_tokens=4, seed=1)
                for prompt in prompts[texts]
            ]
            assert [request.result() for request in requests] == alone[texts]


def test_each_row_has_the_logits_of_a_full_forward(gpt, exported):
    sessions = [gpt.new_session() for _ in range(3)]
    texts = PROMPTS[:3]
    decoder = gpt.batch_decoder()
    for ids, one in zip(texts, sessions, strict=True):
        one.prefill(ids[:-1])
    found = decoder.decode(sessions, [ids[-1] for ids in texts])
    wanted = [keras_logits(exported.model, ids)[-1] for ids in texts]
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert [one.ids for one in sessions] == [ids[:-1] for ids in texts]
    # One wrong token changes its own row and no other.
    changed = decoder.decode(sessions, [texts[0][-1] ^ 1, *(i[-1] for i in texts[1:])])
    assert not np.allclose(changed[0], wanted[0], atol=1e-3)
    np.testing.assert_allclose(changed[1:], wanted[1:], atol=2e-5)


def test_a_request_that_fails_or_is_interrupted_does_not_touch_the_others(
    gpt, monkeypatch
):
    options = {"max_new_tokens": 6, "temperature": 0}
    alone = [gpt.generate(prompt, **options) for prompt in PROMPTS[:4]]
    with EdgeScheduler(gpt) as scheduler:
        requests = [scheduler.submit(prompt, **options) for prompt in PROMPTS[:4]]

        def refuse(logits):
            raise InputError("no")

        monkeypatch.setattr(requests[1]._state, "push", refuse)
        run = scheduler._batch.decode

        def interrupted(sessions, tokens):
            run(sessions, tokens)
            monkeypatch.setattr(scheduler._batch, "decode", run)
            raise KeyboardInterrupt

        while any(request.unread for request in requests):
            scheduler.step()
        monkeypatch.setattr(scheduler._batch, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            scheduler.run()
        scheduler.run()
    assert requests[1].error is not None
    good = [r for r in requests if r.error is None]
    assert len(good) == 2
    assert [request.result() for request in good] == [
        alone[requests.index(request)] for request in good
    ]


def test_only_the_sizes_that_are_known_can_be_asked_for(exported, tmp_path):
    for wrong in ((3,), (0,), (4, "2")):
        with pytest.raises(InputError):
            export_tflite(exported.model, tmp_path / "a.tflite", batch_sizes=wrong)


@pytest.mark.parametrize("forged", [[2], [2, 8], [4, 2], [2, 4, 5], "24", [2, True]])
def test_a_file_with_other_batches_than_it_states_is_refused(path, tmp_path, forged):
    data = bytearray(path.read_bytes())
    stated = b'"batch_sizes": [2, 4]'
    text = b'"batch_sizes": ' + json.dumps(forged).encode()
    place = data.rindex(stated)
    # What is longer takes the room of a fact behind it, spaces what is shorter.
    end = data.index(b'"cache_dtype"', place)
    room = end - place
    data[place:end] = (text + b",").ljust(room)[:room]
    begin = data.rindex(signatures.SEAL_PREFIX) + len(signatures.SEAL_PREFIX)
    data[begin : begin + signatures.SEAL_DIGITS] = b"0" * signatures.SEAL_DIGITS
    integrity.seal(data)
    (tmp_path / "forged.tflite").write_bytes(data)
    with pytest.raises(DamagedFileError):
        EdgeGPT(tmp_path / "forged.tflite")
