import pytest

from gpt_tf.advisor import estimate as estimates
from gpt_tf.advisor.constraints import Budgets
from gpt_tf.advisor.estimate import estimate, refuse_impossible
from gpt_tf.errors import InputError
from gpt_tf.export.signatures import MODES
from tests.advisor.samples import MACHINE, SIZES

GPT2 = SIZES | {"vocab_size": 50257, "embedding_dim": 768, "num_layers": 12}
GPT2 |= {"num_heads": 12, "feedforward_dim": 3072, "context_length": 1024}


LEAST_MS = (86.9e6 - (32 << 20)) / 30e9 * 1e3  # of GPT2 in int4, to 1 %


@pytest.mark.parametrize(
    ("mode", "kind", "size"),
    # Of benchmarks/results/quantization.json, for the sizes of SIZES.
    [
        ("float32", "tflite", 3796352),
        ("float16", "tflite", 1930624),
        ("dynamic_int8", "tflite", 1034624),
        ("dynamic_int8", "litertlm", 1083776),
        ("int16x8", "tflite", 1066048),
        ("int8", "tflite", 1066368),
        ("int8_full", "tflite", 1069056),
        ("int4", "tflite", 667904),
    ],
)
def test_the_size_is_that_of_the_file(mode, kind, size):
    found = estimate(SIZES, mode, MACHINE, kind=kind)
    assert found["size_bytes"] == pytest.approx(size, rel=0.002)
    bigger = estimate({**SIZES, "vocab_size": 1100}, mode, MACHINE, kind=kind)
    assert bigger["size_bytes"] != pytest.approx(size, rel=0.002)


def test_the_bound_is_what_memory_gives_beyond_the_cache():
    found = estimate(GPT2, "float32", MACHINE, threads=1)
    # Every weight but the positions, the biases and the norms.
    blocks = 12 * 12 * 768**2
    assert found["bytes_per_token"] == 4 * (blocks + 50257 * 768)
    seconds = (found["bytes_per_token"] - (32 << 20)) / 20e9
    assert found["least_latency_ms"] == pytest.approx(seconds * 1e3)
    assert found["most_tokens_per_s"] == pytest.approx(1 / seconds)
    two = estimate(GPT2, "float32", MACHINE)
    assert two["threads"] == 2
    assert two["most_tokens_per_s"] == pytest.approx(1.5 / seconds)


@pytest.mark.parametrize("cache", [32 << 20, None])
def test_what_the_cache_may_hold_has_no_bound(cache):
    found = estimate(SIZES, "int8", MACHINE | {"cache_bytes": cache})
    assert found["least_latency_ms"] == 0 and found["most_tokens_per_s"] is None


@pytest.mark.parametrize(
    ("mode", "threads", "ms"),
    # Of benchmarks/results/decode.json, gpt_tf's rows.
    [
        ("dynamic_int8", 1, 6.865),
        ("int4", 1, 4.572),
        ("float32", 1, 16.889),
        ("dynamic_int8", 2, 4.708),
        ("int4", 2, 2.973),
        ("float32", 2, 14.443),
    ],
)
def test_measured_files_keep_to_their_bound(mode, threads, ms):
    machine = {**MACHINE, "read_bytes_per_s": {"1": 34.12e9, "2": 67.49e9}}
    found = estimate(GPT2, mode, machine, threads=threads)
    assert 0.2 * ms < found["least_latency_ms"] < ms


def test_the_read_rate_of_the_next_fewer_threads_is_taken():
    assert estimates.read_rate(MACHINE, 3) == 30e9
    with pytest.raises(InputError, match="describe_machine"):
        estimates.read_rate({"read_bytes_per_s": None}, 1)


def test_the_largest_cache_is_read_where_linux_shows_it(tmp_path):
    for index, size in enumerate(("48K", "1024K", "32768K")):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        (folder / "size").write_text(size + "\n")
    assert estimates.last_level_cache_bytes(tmp_path) == 32 << 20
    assert estimates.last_level_cache_bytes(tmp_path / "none") is None
    (folder / "size").write_text("unknown")
    assert estimates.last_level_cache_bytes(tmp_path) is None


def test_int4_is_not_offered_to_widths_it_cannot_store():
    odd = {**SIZES, "embedding_dim": 120, "feedforward_dim": 480}
    assert estimates.modes_of(SIZES) == MODES
    assert estimates.modes_of(odd) == tuple(m for m in MODES if m != "int4")
    for config, mode, named in (
        (odd, "int4", "multiples of 32"),
        (SIZES, "int2", "'int2'"),
        ({**SIZES, "num_layers": None}, "int8", "num_layers"),
        (dict.fromkeys(SIZES, 2**31 - 1) | {"num_layers": 1}, "int8", "config"),
    ):
        with pytest.raises(InputError, match=named):
            estimate(config, mode, MACHINE)


@pytest.mark.parametrize(
    ("name", "sizes", "least"),
    [
        ("max_size_mb", SIZES, 0.667904),  # of int4
        ("max_memory_mb", SIZES, 0.667904),
        ("max_latency_ms", GPT2, LEAST_MS),
        ("max_first_token_ms", GPT2, LEAST_MS),
        ("min_tokens_per_s", GPT2, 1e3 / LEAST_MS),
    ],
)
def test_budgets_that_no_file_keeps_are_refused(name, sizes, least):
    def budget(share):
        share = share if name.startswith("max") else 1 / share
        return Budgets(**{name: share * least})

    refuse_impossible(budget(1.02), sizes, MACHINE)
    with pytest.raises(InputError, match=name):
        refuse_impossible(budget(0.98), sizes, MACHINE)
    if sizes is GPT2:  # a small model is in the cache
        refuse_impossible(budget(1e-6), SIZES, MACHINE)
