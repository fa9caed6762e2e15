"""Entries, sizes and a machine for the tests of the advisor."""

from tests.reporting.samples import entry_of, interval

SIZES = {
    "vocab_size": 1024,
    "embedding_dim": 128,
    "num_layers": 4,
    "num_heads": 4,
    "context_length": 128,
    "feedforward_dim": 512,
    "tie_embeddings": True,
}
MACHINE = {
    "read_bytes_per_s": {"1": 20e9, "2": 30e9},
    "physical_cores": 2,
    "cache_bytes": 32 << 20,
}


def entry(
    name,
    increase=0.02,
    p95=5.0,
    mb=4.0,
    *,
    memory_mb=90.0,
    first=20.0,
    speed=150.0,
    together=None,
    margin=0.0,
    drop=None,
    **parts,
):
    """An entry of a report; what is None was not measured."""
    accuracy = latency = None
    if increase is not None:
        accuracy = {"perplexity_increase": interval(increase, margin)}
    if drop is not None:
        task = {"rows": 50, "score": interval(0.8 - drop)}
        task["difference"] = interval(-drop, margin)
        accuracy = (accuracy or {}) | {"task": task}
    if p95 is not None:
        step = {"median": 0.9 * p95, "p95": p95, "p99": 1.5 * p95}
        rates = (1, speed), (4, together or speed)
        latency = {
            "inter_token_latency_ms": step,
            "time_to_first_token_ms": {"median": first},
            "tokens_per_s": speed,
            "peak_memory_bytes": memory_mb and memory_mb * 1e6,
            "throughput": [{"requests": n, "tokens_per_s": rate} for n, rate in rates],
        }
    return entry_of(name, mb, **{"accuracy": accuracy, "latency": latency} | parts)
