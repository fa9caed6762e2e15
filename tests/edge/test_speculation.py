import numpy as np
import pytest

from gpt_tf.edge import EdgeGPT, EdgeScheduler, session
from gpt_tf.errors import InputError
from gpt_tf.export import tflite
from gpt_tf.generation.speculation import Pace
from tests.edge.conftest import CONTEXT, LETTERS

# Windows slide, stop texts come, and all kinds of choices are made.
REQUESTS = [
    {"prompt": "abcdabcdabc", "max_new_tokens": 60, "temperature": 0},
    {"prompt": "hello hello hel", "seed": 2, "top_k": 5, "repetition_penalty": 1.3},
    {"prompt": ["xyxyxyxy", "a"], "seed": 3, "temperature": 0.2, "top_p": 0.8},
    {"prompt": [1, 2, 3, 1, 2, 3, 1], "max_new_tokens": 7, "seed": 1},
    {"prompt": "ababababab", "seed": 6, "temperature": 0.4, "stop": ["b", "é"]},
]


@pytest.fixture
def always(monkeypatch):
    """Propose in any length, whether it pays or not; count what is verified."""
    generator, lengths = np.random.default_rng(0), []

    def length(self, most):
        return int(generator.choice([n for n in (1, 2, 4, 8) if n <= most]))

    record = Pace.record

    def recorded(self, length, accepted, seconds):
        lengths.append((length, accepted))
        record(self, length, accepted, seconds)

    monkeypatch.setattr(Pace, "length", length)
    monkeypatch.setattr(Pace, "record", recorded)
    return lengths


@pytest.mark.parametrize("growth", [4, 64])
def test_the_text_is_the_one_without_proposals(exported, monkeypatch, always, growth):
    monkeypatch.setattr(session, "GROWTH", growth)
    with EdgeGPT(exported.litertlm, speculate="none") as gpt:
        expected = [gpt.generate(**request) for request in REQUESTS]
    assert not always
    with EdgeGPT(exported.litertlm) as gpt:
        assert [gpt.generate(**request) for request in REQUESTS] == expected
    # Some were accepted, some were not.
    assert {accepted for length, accepted in always if length == 4} >= {0, 3}
    always.clear()
    options = {"speculate": "none", "draft": exported.tflite}
    with EdgeGPT(exported.litertlm, **options) as gpt:
        assert [gpt.generate(**request) for request in REQUESTS] == expected
        # It draws as the other one does: where there is room, it is always right.
        assert sum(accepted for _, accepted in always) > 40
        assert all(accepted == length - 1 for length, accepted in always[:9])
        streams = [gpt.stream(**REQUESTS[index]) for index in (0, 1)]
        texts = ["", ""]
        for pieces in zip(*streams, strict=False):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        assert all(map(str.startswith, expected[:2], texts)) and all(texts)


def test_a_lone_request_of_a_scheduler_is_foreseen_too(exported, always):
    prompts = [REQUESTS[0], REQUESTS[3], REQUESTS[4]]
    with EdgeGPT(exported.litertlm, speculate="none") as gpt:
        expected = [gpt.generate(**request) for request in prompts]
    with (
        EdgeGPT(exported.litertlm, draft=exported.tflite) as gpt,
        EdgeScheduler(gpt) as scheduler,
    ):

        def begin(prompt, **options):
            as_text = isinstance(prompt, str)
            return scheduler.submit(prompt, as_text=as_text, **options)

        for request, text in zip(prompts, expected, strict=True):
            assert begin(**request).result() == text
        assert sum(accepted for _, accepted in always) > 40
        always.clear()
        scored = scheduler.submit(num_logprobs=1, **prompts[1])
        scored.result()
        assert len(scored.scores) == len(scored.tokens) and not always
        # Together, and each alone when the others have ended.
        requests = [begin(**one) for one in prompts]
        assert [request.result() for request in requests] == expected


def test_a_file_without_short_scores_writes_the_same(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(tflite, "SCORE_LENGTHS", (64,))
    path = tmp_path / "gpt.tflite"
    tokenizer = exported.tokenizer
    tflite.export_tflite(exported.model, path, "float32", tokenizer=tokenizer)
    with EdgeGPT(path, draft=exported.tflite) as old, EdgeGPT(exported.tflite) as new:
        assert sorted(old._executor.scores) == [CONTEXT]
        assert old.generate(**REQUESTS[0]) == new.generate(**REQUESTS[0])
    # What it takes to verify is little.
    assert exported.tflite.stat().st_size < path.stat().st_size + (1 << 17)


def test_a_draft_with_other_tokens_is_refused(exported, tmp_path):
    other = exported.tokenizer.train([LETTERS[:-1] + "ß"])
    path = tmp_path / "gpt.tflite"
    tflite.export_tflite(exported.model, path, "float32", tokenizer=other)
    with pytest.raises(InputError, match="draft"):
        EdgeGPT(exported.litertlm, draft=path)
    with pytest.raises(InputError, match="speculate"):
        EdgeGPT(exported.litertlm, speculate="always")
    with EdgeGPT(path) as draft, pytest.raises(InputError, match="draft"):
        EdgeGPT(exported.litertlm, draft=draft)
