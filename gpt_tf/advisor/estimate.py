"""What a file will be like before there is one, and how wrong that turned out.

The size follows from the parameters nearly exactly. The latency is

    weights beyond the cache / (read rate * share)
    + weights * time of a product                           divided among the threads
    + cached rows * time of a row + layers * time of a layer + time of a call

Its constants come from files of 0.02 to 14 million parameters in every mode, a tenth
percentile of single-threaded steps on an AMD EPYC (AVX-512, 32 MB of cache), which they
meet within 35 %; the shares from GPT-2 small in `benchmarks/results/decode.json`, with
one thread and with two, which they meet within 15 %. Another processor is another
matter, hence the factor of 2 that is stated with every estimate. Perplexity cannot be
estimated: only a run of the file on text tells it.
"""

import math
from pathlib import Path

from gpt_tf.advisor.constraints import Budgets, option, shown, significant
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.export.signatures import MODES
from gpt_tf.models import sizes
from gpt_tf.settings import arguments

# Factors that a value may be off by either way.
SIZE_FACTOR = 1.02
LATENCY_FACTOR = 2.0
MEMORY_FACTOR = 1.5

INT4_BLOCK = 32
_INT4 = "int4"

# Of a file's graph: bytes of the file, and of each layer in all its signatures.
_GRAPH = {
    "float32": (6960, 6500),
    "float16": (7220, 6950),
    "dynamic_int8": (7080, 6590),
    "int8": (6000, 10920),
    "int8_full": (6050, 11610),
    "int16x8": (5950, 10860),
    "int4": (7010, 7370),
}
# A .litertlm: its sections begin at multiples of this, and the tokenizer, compressed.
_SECTION = 16384
_TOKENIZER_BYTES_PER_TOKEN = 10

# Seconds of one weight in a decode step, and of one in each token of a prefill.
_WEIGHT_S = {
    "float32": (42e-12, 14e-12),
    "float16": (42e-12, 14e-12),
    "dynamic_int8": (10e-12, 4e-12),
    "int8": (10e-12, 4e-12),
    "int8_full": (12e-12, 9e-12),
    "int16x8": (39e-12, 9e-12),
    "int4": (8e-12, 5.5e-12),
}
# Share of the read rate that a mode's kernels reach, beside their computing.
_READ_SHARE = {"float32": 1.0, "float16": 1.0}
_INTEGER_READ_SHARE = 0.5
# What a loop in C read on the same machine, over what NumPy did.
_FASTEST_READ = 2.0
_CALL_S = 7.5e-6
_PREFILLED_TOKEN_S = 1.2e-6
_LAYER_S = 3.5e-6
_INTEGER_LAYER_S = 5.7e-6
_CACHED_NUMBER_S = 150e-12
_CACHED_INTEGER_S = 240e-12
# What several threads reach together of what each would alone.
_THREADS_SHARE = 0.75

# Python, NumPy, the tokenizer's library and LiteRT.
_PROCESS_BYTES = 60_000_000
_PROMPT_TOKENS = 64
_MOST_THREADS = 4


def estimate(
    config: dict,
    mode: str,
    machine: dict,
    *,
    threads: int | None = None,
    kind: str = "litertlm",
) -> dict:
    """Estimate size, speed and memory of a file that does not exist yet.

    Args:
        config: The GPT's sizes, as `GPTModel.get_config` states them.
        mode: One of `gpt_tf.export.signatures.MODES`.
        machine: As `gpt_tf.evaluation.hardware.describe_machine` says it of this one.
        threads: Threads that compute; default: the physical cores, at most 4.
        kind: `"litertlm"`, with the tokenizer in it, or `"tflite"`.

    Returns:
        `basis`, which is `"estimated"`; `mode`, `threads`, `parameters`; `size_bytes`;
        `latency_ms` of a typical token when half of the context is filled;
        `first_token_ms` after 64 prompt tokens; `tokens_per_s` of one request;
        `memory_bytes`; for each of them `<name>_range`, between which it is expected;
        `bytes_per_token` that are read and `cache_bytes` of the processor; and a
        `sentence` that says what all this is.

    Raises:
        InputError: The mode is unknown or the model cannot be stored in it, a size is
            missing, or the machine's read rate was not measured.

    Example:
        >>> estimate(model.get_config(), "int4", describe_machine())["latency_ms"]
    """
    config = sizes_of(config)
    _check_mode(config, mode)
    arguments.one_of("kind", kind, ("litertlm", "tflite"))
    arguments.instance("machine", machine, dict, "what `describe_machine` returns")
    most = arguments.MOST_THREADS
    threads = arguments.integer("threads", threads, 1, most, or_none=True)
    threads = threads or default_threads(machine)
    rate = read_rate(machine, threads)
    size = size_bytes(config, mode, kind)
    read = _bytes_per_token(config, mode)
    cache = _cache_bytes_of(machine)
    latency = _latency_s(config, mode, rate, threads, cache)
    weights = _block_weights(config)
    prompt = min(_PROMPT_TOKENS, config["context_length"]) - 1
    prefill_s = weights * _WEIGHT_S[mode][1] / _gain(threads) + _PREFILLED_TOKEN_S
    memory = _PROCESS_BYTES + size + _unpacked_bytes(config, mode, size)
    memory += _cached_numbers(config) * (1 if mode == "int8_full" else 4)
    values = {
        "size_bytes": (size, SIZE_FACTOR),
        "latency_ms": (latency * 1e3, LATENCY_FACTOR),
        "first_token_ms": ((latency + prompt * prefill_s) * 1e3, LATENCY_FACTOR),
        "tokens_per_s": (1 / latency, LATENCY_FACTOR),
        "memory_bytes": (memory, MEMORY_FACTOR),
    }
    result = {"basis": "estimated", "mode": mode, "threads": threads}
    result |= {"parameters": count_parameters(config), "bytes_per_token": read}
    for name, (value, factor) in values.items():
        rounded = round if name.endswith("bytes") else float
        result[name] = rounded(value)
        result[f"{name}_range"] = [rounded(value / factor), rounded(value * factor)]
    floor_ms = floor_latency_ms(config, mode, machine, threads)
    for name in ("latency_ms", "first_token_ms"):
        result[f"{name}_range"][0] = max(floor_ms, result[f"{name}_range"][0])
    result["cache_bytes"] = cache
    result["sentence"] = (
        f"An estimate, not a measurement: {significant(size / 1e6)} MB, and "
        f"{significant(latency * 1e3)} ms a token with {threads} "
        f"{'thread' if threads == 1 else 'threads'}, give or take a factor of "
        f"{LATENCY_FACTOR:g}. What it costs in perplexity cannot be estimated."
    )
    return result


def estimate_error(entry: dict) -> dict:
    """Compare an entry's estimate with what was measured later.

    Args:
        entry: Of a report; see `gpt_tf.evaluation.report`.

    Returns:
        For each of `size_bytes`, `latency_ms` (its median), `first_token_ms`,
        `tokens_per_s` and `memory_bytes` that has both: `estimated`, `measured`,
        `ratio`, the first divided by the second, and `within`, whether the
        measurement lies in the range that was stated.

    Raises:
        DamagedFileError: A number is no number.
    """
    guess, latency = entry.get("estimate") or {}, entry.get("latency") or {}
    measured = {
        "size_bytes": entry.get("size_bytes"),
        "latency_ms": (latency.get("inter_token_latency_ms") or {}).get("median"),
        "first_token_ms": (latency.get("time_to_first_token_ms") or {}).get("median"),
        "tokens_per_s": latency.get("tokens_per_s"),
        "memory_bytes": latency.get("peak_memory_bytes"),
    }
    errors = {}
    for name, value in measured.items():
        expected, between = guess.get(name), guess.get(f"{name}_range")
        if expected is None or value is None:
            continue
        try:
            errors[name] = {
                "estimated": expected,
                "measured": value,
                "ratio": expected / value,
                "within": between[0] <= value <= between[1],
            }
        except (TypeError, ZeroDivisionError, IndexError, KeyError):
            raise DamagedFileError(
                f"Expected numbers for {name} of {entry.get('name')!r}. Received: "
                f"{expected!r}, {between!r} and {value!r}. Measure again."
            ) from None
    return errors


def refuse_impossible(
    budgets: Budgets, config: dict, machine: dict, *, threads: int | None = None
) -> None:
    """Refuse budgets that no file of a model of these sizes can keep.

    Args:
        budgets: What may be spent.
        config: The GPT's sizes.
        machine: As for `estimate`.
        threads: As for `estimate`.

    Raises:
        InputError: The smallest file is larger than `max_size_mb` or `max_memory_mb`,
            or reading what the processor's caches cannot hold of its weights takes
            longer than a latency or speed allows.
    """
    modes = modes_of(config)
    smallest = min(modes, key=lambda mode: size_bytes(config, mode, "tflite"))
    least_mb = size_bytes(config, smallest, "tflite") / SIZE_FACTOR / 1e6
    for name in ("max_size_mb", "max_memory_mb"):
        limit = getattr(budgets, name)
        if limit is not None and limit < least_mb:
            raise InputError(
                f"`{name}` expects at least {significant(least_mb)} MB, which "
                f"{count_parameters(config):,} parameters take as {smallest}, the "
                f"smallest mode. Received: {shown(name, limit)}. Give {option(name)} "
                "more, or make a smaller model."
            )
    floor_ms = min(floor_latency_ms(config, mode, machine, threads) for mode in modes)
    limits = {
        "max_latency_ms": budgets.max_latency_ms,
        "max_first_token_ms": budgets.max_first_token_ms,
        "min_tokens_per_s": budgets.min_tokens_per_s and 1e3 / budgets.min_tokens_per_s,
    }
    for name, limit_ms in limits.items():
        if limit_ms and limit_ms < floor_ms:
            raise InputError(
                f"`{name}` asks for a token in {significant(limit_ms)} ms. Received: "
                f"{shown(name, getattr(budgets, name))}, but reading the weights of "
                f"the smallest file takes {significant(floor_ms)} ms on this "
                f"machine. Relax {option(name)}, or make a smaller model."
            )


def floor_latency_ms(config, mode, machine, threads=None) -> float:
    """Return what reading the weights takes at least that the caches cannot hold.

    It is 0 where they may hold all, or where the processor does not tell. Memory may be
    read twice as fast as the measured rate, which is NumPy's.

    Args:
        config, mode, machine, threads: As for `estimate`.
    """
    config = sizes_of(config)
    read = _bytes_per_token(config, mode)
    cache = _cache_bytes_of(machine)
    if cache is None or read <= cache:
        return 0.0
    threads = threads or default_threads(machine)
    return (read - cache) / (_FASTEST_READ * read_rate(machine, threads)) * 1e3


def size_bytes(config: dict, mode: str, kind: str = "litertlm") -> int:
    """Return about how many bytes a file has: numbers, scales, graphs, tokenizer."""
    config = sizes_of(config)
    file, layer = _GRAPH[mode]
    size = _stored_bytes(config, mode) + file + layer * config["num_layers"]
    size += _zero_point_bytes(config, mode)
    if kind == "litertlm":
        tokenizer = config["vocab_size"] * _TOKENIZER_BYTES_PER_TOKEN
        size += 2 * _SECTION + math.ceil(tokenizer / _SECTION) * _SECTION
    return size


def count_parameters(config: dict) -> int:
    """Count a GPT's parameters from its sizes, without building it.

    Args:
        config: As `GPTModel.get_config` or a file's seal states it.

    Returns:
        Weights and biases; a tied token table counts once, ranges of quantisers not.

    Raises:
        InputError: A size is missing.
    """
    return sizes.count_parameters(sizes_of(config))


def modes_of(config: dict) -> tuple[str, ...]:
    """Return the modes in which a model of these sizes can be stored."""
    config = sizes_of(config)
    inputs = (config["embedding_dim"], config["inner"], config["feedforward_dim"])
    fits = not any(width % INT4_BLOCK for width in inputs)
    return tuple(mode for mode in MODES if mode != _INT4 or fits)


def sizes_of(config: dict) -> dict:
    """Return the sizes that matter, with `inner`, the width of all heads together.

    Raises:
        InputError: One is missing or is no number of at least 1.
    """
    if not isinstance(config, dict):
        arguments.refuse("config", config, "what `GPTModel.get_config()` returns")
    config = config.get("gpt", config)
    names = ("vocab_size", "embedding_dim", "num_layers", "num_heads", "context_length")
    found = sizes.checked_sizes(
        {name: config.get(name) for name in (*names, "feedforward_dim")}
    )
    inner = found["embedding_dim"] // found["num_heads"] * found["num_heads"]
    tied = bool(config.get("tie_embeddings", True))
    return {**found, "inner": inner, "tie_embeddings": tied}


def default_threads(machine: dict) -> int:
    """Return how many threads `EdgeGPT` takes on a machine."""
    cores = machine.get("physical_cores") or machine.get("cores") or 1
    return max(1, min(cores, _MOST_THREADS))


def read_rate(machine: dict, threads: int) -> float:
    """Return bytes per second that so many threads read, or the next fewer measured.

    Raises:
        InputError: Nothing was measured.
    """
    rates = (machine or {}).get("read_bytes_per_s") or {}
    known = {int(count): rate for count, rate in rates.items() if rate}
    if not known:
        raise InputError(
            "An estimate expects the machine's read rate. Received: a machine without "
            "`read_bytes_per_s`. Call `describe_machine()`, which measures it."
        )
    fewer = [count for count in known if count <= threads]
    return float(known[max(fewer) if fewer else min(known)])


def last_level_cache_bytes(
    folder: str = "/sys/devices/system/cpu/cpu0/cache",
) -> int | None:
    """Return the size of the processor's largest cache, or None if it does not tell."""
    sizes = []
    for index in Path(folder).glob("index*"):
        try:
            text = (index / "size").read_text().strip()
            sizes.append(int(text.rstrip("KM")) << {"K": 10, "M": 20}.get(text[-1], 0))
        except (OSError, ValueError, IndexError):
            continue
    return max(sizes, default=None)


def _check_mode(config, mode):
    modes = modes_of(config)
    if isinstance(mode, str) and mode == _INT4 and mode not in modes:
        raise InputError(
            f"`mode` expects one of {', '.join(modes)}. Received: {mode!r}; its widths "
            f"are no multiples of {INT4_BLOCK}."
        )
    arguments.one_of("mode", mode, modes)


def _cache_bytes_of(machine):
    given = machine.get("cache_bytes")
    return last_level_cache_bytes() if given is None else given


def _matrices(config):
    """Yield (rows, inputs) of the matrices of one block."""
    width, inner, hidden = (
        config[name] for name in ("embedding_dim", "inner", "feedforward_dim")
    )
    yield from ((3 * inner, width), (width, inner), (hidden, width), (width, hidden))


def _block_weights(config):
    return config["num_layers"] * sum(a * b for a, b in _matrices(config))


def _tables(config):
    """Yield (rows, width) of the tables: tokens, the head if untied, positions."""
    count = 1 if config["tie_embeddings"] else 2
    for rows in [config["vocab_size"]] * count + [config["context_length"]]:
        yield rows, config["embedding_dim"]


def _vector_numbers(config):
    biases = sum(rows for rows, _ in _matrices(config))
    norms = 4 * config["embedding_dim"]
    return config["num_layers"] * (biases + norms) + 2 * config["embedding_dim"]


def _matrix_bytes(rows, inputs, mode, is_table=False):
    if mode in ("float32", "float16"):
        return rows * inputs * (4 if mode == "float32" else 2)
    if mode == _INT4 and not is_table:
        return rows * inputs // 2 + rows * (inputs // INT4_BLOCK) * 2
    return rows * inputs + rows * 4


def _stored_bytes(config, mode):
    """Return the bytes of all parameters and their scales, exactly."""
    blocks = sum(_matrix_bytes(*shape, mode) for shape in _matrices(config))
    tables = sum(_matrix_bytes(*shape, mode, True) for shape in _tables(config))
    return tables + config["num_layers"] * blocks + 4 * _vector_numbers(config)


def _zero_point_bytes(config, mode):
    """Return what the grids add: vectors of 0, one of each length, and biases'."""
    if mode in ("float32", "float16"):
        return 0
    width, inner, hidden = (
        config[name] for name in ("embedding_dim", "inner", "feedforward_dim")
    )
    tables = {config["vocab_size"], config["context_length"]}
    if mode == _INT4:
        return 8 * sum(tables)
    if mode == "dynamic_int8":
        return 8 * sum(tables | {3 * inner, width, hidden})
    biases = config["num_layers"] * sum(rows for rows, _ in _matrices(config))
    return 8 * sum(tables | {inner, width, hidden}) + 4 * biases


def _bytes_per_token(config, mode):
    """Return the bytes that one decode step reads of the weights.

    LiteRT unpacks float16 to float32 when it loads a file.
    """
    mode = "float32" if mode == "float16" else mode
    blocks = sum(_matrix_bytes(*shape, mode) for shape in _matrices(config))
    head = _matrix_bytes(config["vocab_size"], config["embedding_dim"], mode, True)
    return config["num_layers"] * blocks + head


def _unpacked_bytes(config, mode, size):
    """Return what LiteRT keeps beside the file: weights as its kernels want them."""
    if mode == "float32":
        return 0
    return 4 * count_parameters(config) if mode == "float16" else 0.6 * size


def _cached_numbers(config):
    return 2 * config["num_layers"] * config["inner"] * config["context_length"]


def _gain(threads):
    return threads * _THREADS_SHARE if threads > 1 else 1.0


def _latency_s(config, mode, rate, threads, cache):
    read = _bytes_per_token(config, mode)
    weights = _block_weights(config) + config["vocab_size"] * config["embedding_dim"]
    seconds = weights * _WEIGHT_S[mode][0] / _gain(threads)
    share = _READ_SHARE.get(mode, _INTEGER_READ_SHARE)
    share *= _THREADS_SHARE if threads > 1 else 1
    seconds += max(0, read - (cache or 0)) / (rate * share)
    integers = mode == "int8_full"
    row = _CACHED_INTEGER_S if integers else _CACHED_NUMBER_S
    layer = _INTEGER_LAYER_S if integers else _LAYER_S
    seconds += _cached_numbers(config) / 2 * row
    return seconds + config["num_layers"] * layer + _CALL_S
