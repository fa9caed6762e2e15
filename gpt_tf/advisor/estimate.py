"""What a model's sizes say about its files before any is made: their size, and a bound.

The size follows from the parameters and from how each mode stores them, to about 0.2 %.
Speed is bounded by the roofline of decoding: a token reads every weight once, and what
the processor's caches cannot hold comes from memory, at the rate that
`gpt_tf.evaluation.hardware` measures. A real file is slower, often by a factor of two;
measure it with `gpt-tf benchmark`. Perplexity cannot be told from sizes.

Reference: Williams, Waterman and Patterson, "Roofline: An Insightful Visual Performance
Model for Multicore Architectures", Communications of the ACM 52 (2009).
"""

import dataclasses
import math
import os
from pathlib import Path

from gpt_tf import formatting
from gpt_tf.advisor.constraints import KINDS, Budgets, option, scenario_of
from gpt_tf.errors import InputError
from gpt_tf.export.constants import INT4_BLOCK, outline
from gpt_tf.export.signatures import MODES
from gpt_tf.export.types import Type
from gpt_tf.models import sizes
from gpt_tf.pretrained.source import describe, is_foreign
from gpt_tf.settings import arguments

CACHES = "/sys/devices/system/cpu/cpu0/cache"
_DEFAULT_THREADS = 4
# NumPy cannot describe larger matrices.
_MOST_PARAMETERS = 2**60
# Bytes of a file's graph, and of each layer in all its signatures, by mode.
_GRAPH_BYTES = {
    "float32": (6960, 6500),
    "float16": (7220, 6950),
    "dynamic_int8": (7080, 6590),
    "int8": (6000, 10920),
    "int8_full": (6050, 11610),
    "int16x8": (5950, 10860),
    "int4": (7010, 7370),
}
# A .litertlm: its sections begin at multiples of this, and the tokenizer, compressed.
_SECTION_BYTES = 16384
_TOKENIZER_BYTES_PER_TOKEN = 10


def estimate(
    config: dict,
    mode: str,
    machine: dict,
    *,
    threads: int | None = None,
    kind: str = "litertlm",
) -> dict:
    """Return the size of a file that does not exist yet, and a bound of its speed.

    Args:
        config: The GPT's sizes, as `GPTModel.get_config` states them.
        mode: One of `gpt_tf.export.signatures.MODES`.
        machine: As `describe_machine` describes it.
        threads: Threads that compute; default: the physical cores, at most 4.
        kind: `"litertlm"`, with the tokenizer in it, or `"tflite"`.

    Returns:
        `mode`, `threads`, `parameters`, `size_bytes`; `bytes_per_token` that decoding
        reads; `least_latency_ms` between two tokens, 0 where the caches may hold
        everything; and `most_tokens_per_s`, None then.

    Raises:
        InputError: The mode is unknown or the model cannot be stored in it, a size is
            missing, or the machine's read rate was not measured.

    Example:
        >>> estimate(model.get_config(), "int4", describe_machine())["size_bytes"]
    """
    config = sizes_of(config)
    arguments.one_of("mode", mode, MODES)
    check_mode(config, mode)
    arguments.one_of("kind", kind, ("litertlm", "tflite"))
    arguments.instance("machine", machine, dict, "what `describe_machine` returns")
    most = arguments.MOST_THREADS
    threads = arguments.integer("threads", threads, 1, most, or_none=True)
    if threads is None:
        cores = machine.get("physical_cores") or machine.get("cores") or 1
        threads = max(1, min(cores, _DEFAULT_THREADS))
    rate = read_rate(machine, threads)
    read = _bytes_per_token(config, mode)
    cache = machine.get("cache_bytes", last_level_cache_bytes())
    # A processor that does not say may hold all of it.
    from_memory = 0 if cache is None else max(0, read - cache)
    return {
        "mode": mode,
        "threads": threads,
        "parameters": sizes.count_parameters(config),
        "size_bytes": size_of(config, mode, kind),
        "bytes_per_token": read,
        "least_latency_ms": from_memory / rate * 1e3,
        "most_tokens_per_s": rate / from_memory if from_memory else None,
    }


def estimate_modes(
    path: str | os.PathLike,
    machine: dict,
    budgets: Budgets | dict | None = None,
    scenario: str = "custom",
) -> dict:
    """Estimate the file of every mode of a model and compare it with budgets.

    Args:
        path: As for `read_sizes`; neither TensorFlow nor LiteRT runs anything.
        machine: As for `estimate`.
        budgets, scenario: As for `gpt_tf.advisor.ranking.recommend`.

    Returns:
        `basis`, which is `"estimated"`; `path`, `parameters`, `machine`, `scenario`,
        `budgets`; and under `modes` what `estimate` returns for each, with `breaks`,
        the names of budgets that its file cannot keep, and `fits`: `"no"` where there
        are any, `"yes"` where only the size has a budget, else `"perhaps"`.

    Example:
        >>> estimate_modes("runs/teacher", describe_machine())["modes"][0]["size_bytes"]
    """
    config = read_sizes(path)
    limits = Budgets.of(budgets).over(scenario_of(scenario).budgets)
    is_known = limits.given().keys() <= {"max_size_mb"}
    modes = []
    for mode in modes_of(config):
        found = estimate(config, mode, machine)
        breaks = list(_broken(found, limits))
        fits = "no" if breaks else "yes" if is_known else "perhaps"
        modes.append(found | {"breaks": breaks, "fits": fits})
    return {
        "basis": "estimated",
        "path": str(path),
        "parameters": modes[0]["parameters"],
        "machine": machine,
        "scenario": scenario,
        "budgets": dataclasses.asdict(limits),
        "modes": modes,
    }


def print_estimates(result: dict, console=None) -> None:
    """Print a table of each mode's size and bound, as `estimate_modes` returns them."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    parameters = formatting.count(result["parameters"], "parameter")
    threads = formatting.count(result["modes"][0]["threads"], "thread")
    headings = ("mode", "size", "read a token", "tokens/s at most", "fits")
    table = Table(*headings, title=f"Estimates: {parameters}, {threads}")
    for mode in result["modes"]:
        breaks = ", ".join(KINDS[name].what for name in mode["breaks"])
        most = mode["most_tokens_per_s"]
        table.add_row(
            mode["mode"],
            formatting.megabytes(mode["size_bytes"]),
            formatting.megabytes(mode["bytes_per_token"]),
            "in the cache" if most is None else formatting.number(most),
            f"no: breaks {breaks}" if breaks else mode["fits"],
        )
    console.print(table)
    console.print(
        "Estimates: nothing was measured but the rate at which memory is read. A file "
        "is slower than its bound, and its perplexity is found by `gpt-tf evaluate`."
    )


def refuse_impossible(budgets: Budgets, config: dict, machine: dict) -> None:
    """Refuse budgets that no file of a model of these sizes can keep.

    Raises:
        InputError: The smallest file exceeds `max_size_mb` or `max_memory_mb`, or
            reading its weights from memory takes longer than a budget of time allows.
    """
    modes = modes_of(config)
    files = [estimate(config, mode, machine, kind="tflite") for mode in modes]
    broken = [_broken(file, budgets) for file in files]
    for name, limit in budgets.given().items():
        if all(name in one for one in broken):
            kind = KINDS[name]
            best = (max if kind.is_least else min)(one[name] for one in broken)
            raise InputError(
                f"`{name}` expects what a model of {files[0]['parameters']:,} "
                "parameters can reach on this machine, "
                f"{kind.text(best)} at best. Received: {kind.text(limit)}. Relax "
                f"{option(name)}, or make a smaller model."
            )


def _broken(found, budgets):
    """Return the budgets that an estimate cannot keep, with the best it can reach."""
    size_mb, latency_ms = found["size_bytes"] / 1e6, found["least_latency_ms"]
    best = {
        "max_size_mb": size_mb,
        "max_memory_mb": size_mb,
        "max_latency_ms": latency_ms,
        "max_first_token_ms": latency_ms,
        "min_tokens_per_s": found["most_tokens_per_s"] or math.inf,
    }
    return {
        name: best[name]
        for name, limit in budgets.given().items()
        if name in best and KINDS[name].is_broken(best[name], limit)
    }


def modes_of(config: dict) -> tuple[str, ...]:
    """Return the modes in which a model of these sizes can be stored."""
    config = sizes_of(config)
    return tuple(mode for mode in MODES if mode != "int4" or _has_blocks(config))


def check_mode(config: dict, mode: str) -> None:
    """Refuse a mode in which a model of these sizes cannot be stored."""
    if mode not in modes_of(config):
        arguments.refuse("mode", mode, f"widths that are multiples of {INT4_BLOCK}")


def _has_blocks(config):
    inner = config["head_dim"] * config["num_heads"]
    inputs = (config["embedding_dim"], inner, config["feedforward_dim"])
    return not any(width % INT4_BLOCK for width in inputs)


def sizes_of(config: dict) -> dict:
    """Return the sizes that matter, and `head_dim`; refuse those that are none."""
    arguments.instance("config", config, dict, "what `GPTModel.get_config()` returns")
    config = config.get("gpt", config)
    found = sizes.checked_sizes({name: config.get(name) for name in sizes.SIZES})
    found |= sizes.checked_form(config, found)
    found["tie_embeddings"] = bool(config.get("tie_embeddings", True))
    arguments.integer("config", sizes.count_parameters(found), 1, _MOST_PARAMETERS)
    return found


def read_rate(machine: dict, threads: int) -> float:
    """Return bytes per second that so many threads read, or the next fewer measured."""
    rates = (machine or {}).get("read_bytes_per_s") or {}
    known = {int(count): rate for count, rate in rates.items() if rate}
    if not known:
        raise InputError(
            "An estimate expects the machine's read rate. Received: a machine without "
            "`read_bytes_per_s`. Call `describe_machine()`, which measures it."
        )
    fewer = [count for count in known if count <= threads]
    return float(known[max(fewer) if fewer else min(known)])


def last_level_cache_bytes(folder: str | os.PathLike = CACHES) -> int | None:
    """Return the size of the processor's largest cache, or None if it does not say."""
    try:
        found = [path.read_text() for path in Path(folder).glob("index*/size")]
        return max(int(text.strip().rstrip("K")) << 10 for text in found)
    except (OSError, ValueError):
        return None


def read_sizes(path: str | os.PathLike) -> dict:
    """Read the configuration of a model where it is stated.

    Args:
        path: A run's or model's folder, a `.keras` file, a `.tflite` or `.litertlm`
            that gpt_tf exported, or what `gpt_tf.open_model` opens.

    Raises:
        InputError: There is no such thing.
        DamagedFileError: A file is not what it should be.
    """
    if is_foreign(path):
        return describe(path)[1].check()
    file = file_of(path)
    if file.suffix == ".keras":
        from gpt_tf.models.keras_file import read_config

        config = read_config(file)
    else:
        from gpt_tf.edge.loader import open_artefact

        config = open_artefact(file).facts["config"]
    config = config.get("gpt", config)
    sizes_of(config)
    return config


def file_of(path: str | os.PathLike) -> Path:
    """Return the file in which a model is that gpt_tf wrote.

    Raises:
        InputError: There is none.
    """
    path = Path(path)
    places = [path / name / "model.keras" for name in ("model", "", "initial")]
    file = next((place for place in places if place.is_file()), path)
    if not file.is_file():
        raise InputError(
            f"Expected a model or an exported file at {path}; there is none. Name the "
            "folder of a run that `gpt-tf train` finished, a .litertlm, a folder of "
            "Hugging Face's, a .gguf, or nanoGPT's ckpt.pt."
        )
    return file


def size_of(config: dict, mode: str, kind: str = "litertlm") -> int:
    """Return the bytes of a file: numbers, scales, zero points, graph, tokenizer.

    Args:
        config: As `sizes_of` returns it.
        mode, kind: As for `estimate`.
    """
    stored = outline(mode, config, per_channel=True, masked=False)
    matrices, vectors = stored.matrices.values(), stored.vectors
    file, layer = _GRAPH_BYTES[mode]
    size = sum(matrix.size_bytes for matrix in matrices)
    size += sum(vector.nbytes for vector in vectors.values())
    size += file + layer * config["num_layers"]
    # Quantised matrices of as many rows share a vector of zero points.
    size += 8 * sum({len(one.values) for one in matrices if one.kind == Type.INT8})
    if stored.mode.activations is not None:  # biases of integers have scales too
        size += sum(one.nbytes for name, one in vectors.items() if "bias" in name)
    if kind == "litertlm":
        tokenizer = config["vocab_size"] * _TOKENIZER_BYTES_PER_TOKEN
        size += _SECTION_BYTES * (2 + math.ceil(tokenizer / _SECTION_BYTES))
    return size


def _bytes_per_token(config, mode):
    """Return the bytes that one decode step reads of the weights."""
    # LiteRT unpacks float16 to float32 when it loads a file.
    mode = "float32" if mode == "float16" else mode
    matrices = outline(mode, config, per_channel=True, masked=False).matrices
    # A lookup reads one row of a table; the head reads its table whole.
    lookups = {"embedding/position_table"}
    if not config["tie_embeddings"]:
        lookups.add("embedding/token_table")
    return sum(one.size_bytes for name, one in matrices.items() if name not in lookups)
