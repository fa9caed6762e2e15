import collections
import contextlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from gpt_tf.edge import EdgeGPT
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.evaluation import latency
from gpt_tf.evaluation.harness import spread
from gpt_tf.evaluation.latency import compare_latencies, measure_files
from gpt_tf.evaluation.report import Latency, read_report, write_report
from gpt_tf.evaluation.worker import CONTEXT_TOKENS, WARM_UP, ModelRunner, measure

SAVED = Path(__file__).parents[2] / "saved_models"
FILE = SAVED / "python-small.litertlm"
SMALL = {"prompt_tokens": 5, "new_tokens": 4, "read_bytes_per_s": {"1": 1e6, "2": 1e9}}


class Clockwork:
    """A model without arithmetic: a clock of its own moves as it works.

    `slow_s` is what the first `slow` requests with prompts of a length take beside
    that.
    """

    def __init__(self, decode_s=(2.0,), slow_s=0.0, slow=0):
        self.config = {"vocab_size": 50}
        self.now = 0.0
        self.calls = []
        self._decode_s, self._slow_s, self._slow = decode_s, slow_s, slow
        self._seen = collections.Counter()

    def clock(self):
        return self.now

    def reset(self):
        self.now += 1000.0  # is no part of a request
        self.calls.append("reset")
        self._decoded = 0

    def prefill(self, ids):
        self.calls.append(("prefill", list(ids)))
        self._seen[len(ids)] += 1
        if self._seen[len(ids)] <= self._slow:
            self.now += self._slow_s
        self.now += 0.25 * len(ids)

    def decode(self, token):
        self.calls.append(("decode", token))
        self.now += self._decode_s[self._decoded % len(self._decode_s)]
        self._decoded += 1
        logits = np.zeros(50, np.float32)
        logits[(token + 1) % 50] = 1
        return logits


# What a process measures


def measured(gpt, **job):
    """What a process measures of a model by the model's own clock."""
    runner = ModelRunner(gpt, gpt.clock)
    runner.request(5, 1)
    small = {"prompt_tokens": 5, "new_tokens": 4, "count": 3}
    return measure(runner, {**small, "contexts": [], "requests": [], **job})


def test_a_request_is_a_prefill_and_then_token_after_token():
    """The first token has the prefill in it; emptying the cache is not counted."""
    gpt = Clockwork(decode_s=(3.0, 5.0, 7.0))
    timed = ModelRunner(gpt, gpt.clock).request(3, 3)
    empty, prefill, *decodes = gpt.calls
    assert empty == "reset" and len(prefill[1]) == 2
    (_, first), *others = decodes
    assert others == [("decode", (first + 1) % 50), ("decode", (first + 2) % 50)]
    assert timed == (2 * 0.25 + 3.0, [5.0, 7.0], 2 * 0.25 + 15.0)


def test_what_is_measured_is_what_the_clock_says():
    gpt = Clockwork(decode_s=(3.0, 5.0, 7.0, 5.0))
    found = measured(gpt, contexts=[20])
    assert found["first_ms"] == [4000.0] * 3
    assert found["gaps_ms"] == [5000.0, 7000.0, 5000.0] * 3
    assert found["response_ms"] == [21_000.0] * 3
    assert found["rates"] == [pytest.approx(3 / 17)] * 3
    assert found["throughput"] == [] and found["engine"] == "keras"
    (context,) = found["contexts"]
    assert context["first_ms"] == [19 * 250 + 3000] * 3
    assert len(context["gaps_ms"]) == 3 * (CONTEXT_TOKENS - 1)
    # Every request has the same ids of the vocabulary.
    prompts = [call[1] for call in gpt.calls if call[0] == "prefill"]
    prompts = [prompt for prompt in prompts if len(prompt) == 4]
    assert len(prompts) == 3 + WARM_UP
    assert all(prompt == prompts[0] for prompt in prompts)
    assert len(set(prompts[0])) > 1 and set(prompts[0]) <= set(range(50))


def test_the_warm_up_is_not_counted_but_what_follows_is():
    def worst(slow):
        found = measured(Clockwork(slow_s=100.0, slow=slow), contexts=[30])
        (context,) = found["contexts"]
        return [max(part["first_ms"]) / 1e3 for part in (found, context)]

    # Of another length of prompt one request is not counted.
    assert worst(0) == worst(1) == [4 * 0.25 + 2, 29 * 0.25 + 2]
    assert worst(WARM_UP) == [4 * 0.25 + 2, 29 * 0.25 + 102]
    assert worst(WARM_UP + 1)[0] == 4 * 0.25 + 102


# Taking turns


@pytest.fixture
def recorded(monkeypatch):
    """Answer for the processes; return the jobs that they were given."""
    jobs = []

    class Recorded(contextlib.AbstractContextManager):
        def __init__(self, make, arguments, *, name):
            (self.given,) = arguments
            if isinstance(self.given, dict):
                jobs.append(self.given)
            self.start_s = len(jobs) / 10

        def __exit__(self, *exception):
            pass

        def ask(self):
            if isinstance(self.given, list):
                return [(described(path), 2) for path in self.given]
            return answer(self.given, len(jobs))

    def described(path):
        sizes = {"a.tflite": 1000, "b.litertlm": 3000, "k": 9}
        return {
            "kind": "keras" if path == "k" else "tflite",
            "context_length": 100,
            "config": {"vocab_size": 50},
            "size_bytes": sizes[path],
            "parameters": 500,
        }

    def answer(job, number):
        count = job["count"]
        return {
            "engine": job["engine"],
            "first_ms": [float(number)] * count,
            "gaps_ms": [float(number)] * count * 3,
            "response_ms": [4.0 * number] * count,
            "rates": [1000.0 / number] * count,
            "joules": 2.0,
            "peak_memory_bytes": 100 * number,
            "load_ms": 10.0 * number,
            "contexts": [
                {"first_ms": [length + number], "gaps_ms": [number]}
                for length in job["contexts"]
            ],
            "throughput": [float(10 * number)] * len(job["requests"]),
        }

    monkeypatch.setattr(latency, "Worker", Recorded)
    return jobs


def test_files_take_turns_and_keep_what_is_theirs(recorded):
    """A B A B, whatever else is measured of them; each has its own processes."""
    told = []
    first, second = compare_latencies(
        ["a.tflite", "b.litertlm"],
        **SMALL,
        rounds=2,
        repetitions=6,
        contexts=[16],
        thread_counts=[1, 2],
        requests=[1, 4],
        on_progress=lambda *progress: told.append(progress),
    )
    assert [progress[:2] for progress in told] == [(done, 8) for done in range(9)]
    assert told[4][2] == "round 2 of 2: a.tflite, 2 threads"
    turns = [(job["path"], job["threads"]) for job in recorded]
    files = ("a.tflite", "b.litertlm")
    assert turns == 2 * [(file, threads) for threads in (2, 1) for file in files]
    # Only the ordinary number of threads does all of it.
    assert [job["requests"] for job in recorded] == [[1, 4], [1, 4], [], []] * 2
    assert [job["contexts"] for job in recorded] == [[16], [16], [], []] * 2
    # Processes 1 and 5 are the first file's, 2 and 6 the second's.
    assert first["inter_token_latency_ms"] == spread([[1.0] * 9, [5.0] * 9])
    assert second["inter_token_latency_ms"] == spread([[2.0] * 9, [6.0] * 9])
    assert second["cold_start_ms"] == spread([[200.0], [600.0]])
    assert second["load_ms"] == spread([[20.0], [60.0]])
    assert second["peak_memory_bytes"] == 400
    assert second["repetitions"] == 6
    assert second["energy_j_per_token"] == 4.0 / (6 * 4)
    assert second["bandwidth_share"] == pytest.approx(3000 / (1e9 * 4e-3))
    (context,) = second["by_context"]
    assert context["time_to_first_token_ms"] == spread([[18.0], [22.0]])
    one, two = second["by_threads"]
    assert (one["threads"], two["threads"]) == (1, 2)
    assert one["inter_token_latency_ms"] == spread([[4.0] * 9, [8.0] * 9])
    assert two["inter_token_latency_ms"] == second["inter_token_latency_ms"]
    rates = {"tokens_per_s": 40.0, "q1": 30.0, "q3": 50.0, "count": 2}
    rates["rounds"] = [20.0, 60.0]
    assert second["throughput"] == [{"requests": n} | rates for n in (1, 4)]
    assert set(first) == set(Latency.model_fields)


@pytest.mark.parametrize(
    ("repetitions", "rounds", "shares"),
    [(20, 5, [4] * 5), (7, 3, [3] * 3), (2, 5, [1, 1])],
)
def test_repetitions_are_shared_among_the_rounds(recorded, repetitions, rounds, shares):
    (found,) = compare_latencies(
        ["a.tflite"], **SMALL, repetitions=repetitions, rounds=rounds
    )
    assert [job["count"] for job in recorded] == shares
    assert found["repetitions"] == sum(shares) >= repetitions


def test_the_share_of_the_bandwidth_is_that_of_the_threads(recorded):
    # Of a Keras model a parameter is four bytes, whatever its file holds.
    for path, threads, share in (("a.tflite", 2, 1000 / 1e9), ("k", 1, 2000 / 1e6)):
        recorded.clear()
        options = {**SMALL, "threads": threads, "rounds": 1, "repetitions": 1}
        (found,) = compare_latencies([path], **options)
        assert found["threads"] == threads
        assert found["bandwidth_share"] == pytest.approx(share / 1e-3)


# Real processes


def check_structure(found, rounds, repetitions):
    assert set(found) == set(Latency.model_fields)
    for part in [name for name in found if name.endswith("_ms")]:
        quartiles = [found[part][name] for name in ("q1", "median", "q3", "worst")]
        assert quartiles[0] > 0 and quartiles == sorted(quartiles)
    assert found["load_ms"]["count"] == found["cold_start_ms"]["count"] == rounds
    assert found["response_time_ms"]["count"] == repetitions
    assert found["cold_start_ms"]["median"] > found["load_ms"]["median"]
    assert found["peak_memory_bytes"] > 20 << 20
    assert found["bandwidth_share"] > 0


def test_litert_lms_engine_runs_the_same_file_side_by_side(tmp_path):
    pytest.importorskip("litert_lm", reason="litert-lm, Google's runtime, is missing")
    made = measure_files(
        [FILE],
        engine="both",
        prompt_tokens=5,
        new_tokens=4,
        repetitions=2,
        rounds=1,
        contexts=[],
        thread_counts=[],
        requests=[2],
        out=SAVED / "report.json",
    )
    ours, theirs = made["entries"]
    assert (ours["name"], theirs["name"]) == (FILE.name, f"{FILE.name} (litert-lm)")
    assert ours["path"] == theirs["path"] == FILE.name
    # It tells the mean of a request's tokens, and takes one request at a time.
    for entry, engine, count in ((ours, "gpt_tf", 6), (theirs, "litert-lm", 2)):
        found = entry["latency"]
        assert found["engine"] == engine
        check_structure(found, rounds=1, repetitions=2)
        assert found["inter_token_latency_ms"]["count"] == count
    assert [row["requests"] for row in ours["latency"]["throughput"]] == [2]
    assert theirs["latency"]["throughput"] == []
    assert "threads" not in ours and made["machine"]["read_bytes_per_s"]
    assert any("2 requests of each file counted" in note for note in made["notes"])
    write_report(tmp_path / "report.json", made)
    assert read_report(tmp_path) == made


@pytest.mark.slow
def test_a_keras_model_is_measured_beside_its_file():
    keras, file = compare_latencies(
        [SAVED / "python-small", FILE],
        **SMALL,
        rounds=1,
        repetitions=2,
        threads=1,
        requests=[2],
    )
    check_structure(keras, rounds=1, repetitions=2)
    assert (keras["engine"], keras["threads"]) == ("keras", 1)
    assert keras["throughput"] == [] and file["throughput"]
    assert keras["peak_memory_bytes"] > file["peak_memory_bytes"]


# What cannot be measured


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"new_tokens": 1}, "`new_tokens` expects .* Received: 1"),
        ({"thread_counts": [0]}, "`thread_counts` .* Received: 0"),
        ({"paths": ["a", "b", "a"]}, "Received: a twice"),
        ({"paths": []}, "at least one file. Received: none"),
        ({"engine": "all"}, "both. Received: 'all'"),
        ({"engine": "litert-lm"}, "expects a .litertlm"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(recorded, options, message):
    with pytest.raises(InputError, match=message):
        measure_files(**{"paths": ["gpt.tflite"], **options})
    assert not recorded


def test_a_report_has_contexts_and_threads_that_fit_where_none_are_given(
    recorded, monkeypatch
):
    monkeypatch.setattr(latency.hardware, "thread_counts", lambda: [1, 2])
    monkeypatch.setattr(
        latency.hardware, "describe_machine", lambda: {"read_bytes_per_s": None}
    )
    monkeypatch.setattr(latency.hardware, "measure_read_rate", lambda *_, **__: 1e9)
    made = measure_files(["a.tflite"], prompt_tokens=5, new_tokens=4, out="x/y.json")
    found = made["entries"][0]["latency"]
    assert [row["context"] for row in found["by_context"]] == [16, 64]
    assert [row["threads"] for row in found["by_threads"]] == [1, 2]
    assert found["repetitions"] == 20 and len(recorded) == 2 * 5


def test_an_engine_that_is_not_installed_is_named(recorded, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install litert-lm"):
        measure_files([FILE], engine="litert-lm")


def test_a_request_that_is_not_given_fits_the_shortest_context(recorded):
    rates = {"read_bytes_per_s": SMALL["read_bytes_per_s"]}
    (found,) = compare_latencies(["b.litertlm"], **rates)
    assert (found["prompt_tokens"], found["new_tokens"]) == (50, 50)
    (found,) = compare_latencies(["b.litertlm"], new_tokens=3, **rates)
    assert (found["prompt_tokens"], found["new_tokens"]) == (50, 3)


def test_a_request_longer_than_the_context_is_refused(recorded):
    with pytest.raises(InputError, match=r"100 tokens of b.litertlm.*: 90 \+ 11"):
        compare_latencies(["b.litertlm"], prompt_tokens=90, new_tokens=11)
    with pytest.raises(InputError, match=r": 85 \+ 16"):
        compare_latencies(["b.litertlm"], **SMALL, contexts=[85])


def test_a_file_that_is_no_model_comes_back_as_its_process_says(tmp_path):
    broken = tmp_path / "broken.litertlm"
    broken.write_bytes(FILE.read_bytes()[:-1])
    with pytest.raises(DamagedFileError) as caught:
        compare_latencies([broken])
    with pytest.raises(DamagedFileError) as expected:
        EdgeGPT(broken)
    assert str(caught.value) == str(expected.value)
