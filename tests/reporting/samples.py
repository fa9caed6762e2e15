"""Reports that look like real ones, for the tests of what shows them."""

import numpy as np

from gpt_tf.advisor.ranking import recommend
from gpt_tf.evaluation.report import new_entry, new_report

LONG_NAME = "student-of-four-layers-distilled-int8-{:02d}"  # 40 characters
MACHINE = {
    "cpu": "Some Processor avx2",
    "cores": 2,
    "physical_cores": 2,
    "memory_bytes": 8_300_000_000,
    "os": "Linux",
    "python": "3.11",
    "read_bytes_per_s": {"1": 18.7e9, "2": 31.9e9},
}
_SPREAD = {"median": 1, "p95": 1.2, "p99": 1.3, "worst": 2.5, "q1": 0.95, "q3": 1.05}


def spread(median):
    """Measurements around a median."""
    return {part: times * median for part, times in _SPREAD.items()} | {"count": 640}


def interval(value, width=0.01):
    return {"value": value, "low": value - width, "high": value + width}


def latency_of(median, with_details=True):
    """The latency of a file whose tokens come every so many milliseconds."""
    first, between = "time_to_first_token_ms", "inter_token_latency_ms"
    latency = {
        "engine": "gpt_tf",
        "threads": 2,
        "prompt_tokens": 64,
        "new_tokens": 32,
        "repetitions": 20,
        first: spread(7 * median),
        between: spread(median),
        "response_time_ms": spread(39 * median),
        "tokens_per_s": 1000 / median,
        "load_ms": spread(31.7),
        "cold_start_ms": spread(417.0),
        "peak_memory_bytes": 81_300_000,
        "bandwidth_share": 0.437,
        "energy_j_per_token": None,
        "by_context": [],
        "by_threads": [],
        "throughput": [],
    }
    if with_details:
        latency["by_context"] = [
            {"context": n, first: spread(n * median), between: spread((1 + n) * median)}
            for n in (16, 64)
        ]
        latency["by_threads"] = [
            {"threads": n, between: spread(1.9 * median / n)} for n in (1, 2)
        ]
        latency["throughput"] = [
            {"requests": n, "tokens_per_s": 1000 / median * n**0.3} for n in (1, 4)
        ]
    return latency


def accuracy_of(perplexity, reference=None):
    """The accuracy of a file; without a reference's perplexity, of the reference."""
    accuracy = {
        "tokens": 20_000,
        "bytes": 61_234,
        "blocks": 97,
        "perplexity": interval(perplexity, 0.083),
        "bits_per_byte": interval(1.2345, 0.012),
        "token_accuracy": interval(0.4567, 0.005),
        "perplexity_increase": None,
        "divergence_nats": None,
        "top1_agreement": None,
        "parsed": None,
    }
    if reference is not None:
        increase = perplexity / reference - 1
        accuracy["perplexity_increase"] = interval(increase, 0.0041)
        accuracy["divergence_nats"] = interval(0.0321 + increase / 9, 0.0013)
        accuracy["top1_agreement"] = interval(0.9123, 0.0071)
    return accuracy


def entry_of(name, size_mb=1.5, accuracy=None, latency=None, **parts):
    described = {
        "name": name,
        "path": f"files/{name}.litertlm",
        "kind": "litertlm",
        "mode": "dynamic_int8",
        "parameters": 1_234_567,
        "size_bytes": round(size_mb * 1e6),
        "sha256": "0" * 64,
        "context_length": 128,
        "config": {"vocab_size": 512, "num_layers": 2, "tie_embeddings": True},
    }
    return new_entry(described, accuracy=accuracy, latency=latency, **parts)


def report_of(count, seed=0, name=LONG_NAME, **parts):
    """A report of so many files, the first of which is the reference."""
    random = np.random.default_rng(seed)
    entries = []
    for index in range(count):
        perplexity = 5.0 * (1 + float(random.random()) ** 3) if index else 5.0
        entries.append(
            entry_of(
                name.format(index),
                float(10 ** random.uniform(-0.3, 1.2)),
                accuracy_of(perplexity, 5.0 if index else None),
                latency_of(float(10 ** random.uniform(0, 0.8))),
            )
        )
    return new_report(entries, **{"reference": name.format(0), **parts})


def _judged(drop, random_drop):
    return {
        "drop": interval(drop, 0.03),
        "random_drop": interval(random_drop, 0.02),
        "difference": interval(drop - random_drop, 0.03),
        "holds": drop - random_drop > 0.03,
    }


EXPLANATIONS = {
    "prompts": 60,
    "prompt_tokens": 32.0,
    "fraction": 0.2,
    "nearest_drop": interval(0.2468, 0.03),
    "methods": {"lime": _judged(0.3127, 0.1131), "attention": _judged(0.1212, 0.1131)},
    "compression": {
        "lime": {
            "a": "float32",
            "b": "dynamic_int8",
            "prompts": 58,
            "rank_correlation": interval(0.8712, 0.02),
            "ceiling": interval(0.9134, 0.02),
        }
    },
}


def full_report():
    """A report in which nothing is missing."""
    reference = 5.0
    entries = [
        entry_of("teacher-float32", 7.31, accuracy_of(reference), latency_of(4.6)),
        entry_of("student-int8", 1.57, accuracy_of(5.11, reference), latency_of(1.31)),
        entry_of("student-int4", 0.93, accuracy_of(6.4, reference), latency_of(1.17)),
        entry_of("student-fat", 3.3, accuracy_of(5.12, reference), latency_of(1.4)),
    ]
    for entry in entries:
        entry["made_from"] = "the teacher, distilled"
        parsed = {"share": interval(0.4131, 0.05), "of_true_text": 0.6217, "count": 73}
        entry["accuracy"]["parsed"] = parsed
        entry["accuracy"]["task"] = {
            "rows": 40,
            "score": interval(0.625, 0.14),
            "by_sum": None,
            "difference": interval(-0.025, 0.07),
            "gained": 1,
            "lost": 2,
            "wrong": {"line": 7, "expected": "Paris", "answered": "London"},
        }
        entry["latency"]["energy_j_per_token"] = 0.0372
    whole = {"difference": interval(0.0, 0.0), "gained": 0, "lost": 0, "wrong": None}
    entries[0]["accuracy"]["task"] |= whole
    train = "gpt-tf train --steps 9"
    report = new_report(
        entries,
        command="gpt-tf optimize --max-latency-ms 3",
        machine=MACHINE,
        corpus={
            "name": "python-stdlib",
            "split": "validation",
            "tokens": 20_000,
            "bytes": 61_234,
        },
        task={"name": "capitals.jsonl", "kind": "exact", "rows": 40},
        reference="teacher-float32",
        explanations=EXPLANATIONS,
        stages=[
            {"name": "teacher", "command": train, "seconds": 251.3, "reused": False},
            {"name": "accuracy", "command": None, "seconds": 8.25, "reused": True},
        ],
        notes=["Energy was not to be had."],
    )
    report["budgets"].update(
        max_perplexity_increase=0.03, max_latency_ms=3.0, max_size_mb=8.0
    )
    report["recommendation"] = recommend(report) | {
        "sample": {"prompt": "def main(", "text": "argv):\n    return 0"}
    }
    return report


def reports():
    """Reports of every kind by name."""
    latency = new_report([entry_of("bench", latency=latency_of(2.0, False))])
    kept = latency["entries"][0]["latency"]
    for part in ("load_ms", "cold_start_ms", "peak_memory_bytes", "bandwidth_share"):
        kept[part] = None
    perplexities = {"a": 5.0, "b": 6.0}
    accuracy = new_report(
        [entry_of(name, accuracy=accuracy_of(p)) for name, p in perplexities.items()]
    )
    bare = new_report([entry_of("bare")], versions=None)
    for part in ("size_bytes", "parameters", "config", "sha256", "context_length"):
        bare["entries"][0][part] = None
    return {
        "full": full_report(),
        "latency": latency,
        "accuracy": accuracy,
        "bare": bare,
        "empty": new_report([]),
    }
