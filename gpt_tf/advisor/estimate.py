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

from gpt_tf import artifacts
from gpt_tf.advisor.constraints import (
    KINDS,
    Budgets,
    option,
    scenario_of,
    shown,
    significant,
)
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.export.signatures import MODES
from gpt_tf.models import sizes
from gpt_tf.settings import arguments

_MOST_THREADS = 4
_INT4_BLOCK = 32
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
        machine: As `gpt_tf.evaluation.hardware.describe_machine` describes it.
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
    _check_mode(config, mode)
    arguments.one_of("kind", kind, ("litertlm", "tflite"))
    arguments.instance("machine", machine, dict, "what `describe_machine` returns")
    most = arguments.MOST_THREADS
    threads = arguments.integer("threads", threads, 1, most, or_none=True)
    if threads is None:
        cores = machine.get("physical_cores") or machine.get("cores") or 1
        threads = max(1, min(cores, _MOST_THREADS))
    rate = read_rate(machine, threads)
    read = _bytes_per_token(config, mode)
    cache = machine.get("cache_bytes", last_level_cache_bytes())
    # A processor that does not say may hold all of it.
    from_memory = 0 if cache is None else max(0, read - cache)
    return {
        "mode": mode,
        "threads": threads,
        "parameters": sizes.count_parameters(config),
        "size_bytes": size_bytes(config, mode, kind),
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

    Only the model's sizes are read: neither TensorFlow nor LiteRT runs anything.

    Args:
        path: As for `read_sizes`.
        machine: As for `estimate`.
        budgets: They come before the scenario's.
        scenario: A key of `gpt_tf.advisor.constraints.SCENARIOS`.

    Returns:
        `basis`, which is `"estimated"`; `path`, `parameters`, `machine`, `scenario`,
        `budgets`; and under `modes` what `estimate` returns for each, with `breaks`,
        the names of budgets that its file cannot keep, and `fits`: `"no"` where there
        are any, `"yes"` where only the size has a budget, else `"perhaps"`.

    Raises:
        InputError: There are no sizes of a model, or the machine's read rate is not
            known.
        DamagedFileError: A file is not what it should be.

    Example:
        >>> estimate_modes("runs/teacher", describe_machine())["modes"][0]["size_bytes"]
    """
    config = read_sizes(path)
    limits = Budgets.of(budgets).over(scenario_of(scenario).budgets)
    modes = []
    for mode in modes_of(config):
        found = estimate(config, mode, machine)
        breaks = list(_broken(found, limits))
        known = limits.given().keys() <= {"max_size_mb"}
        fits = "no" if breaks else "yes" if known else "perhaps"
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
    """Print a table of each mode's size and bound.

    Args:
        result: As `estimate_modes` returns it.
        console: Where to write; standard output unless given.
    """
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    threads = result["modes"][0]["threads"]
    table = Table(
        title=f"Estimates: {result['parameters']:,} parameters, {threads} "
        f"{'thread' if threads == 1 else 'threads'} of this machine"
    )
    table.add_column("mode", no_wrap=True)
    for heading in ("MB", "MB read a token", "tokens/s at most"):
        table.add_column(heading, justify="right")
    table.add_column("fits the budgets", overflow="fold")
    limited = any(value is not None for value in result["budgets"].values())
    for mode in result["modes"]:
        fits = mode["fits"]
        if mode["breaks"]:
            fits += f": breaks {', '.join(KINDS[name].what for name in mode['breaks'])}"
        most = mode["most_tokens_per_s"]
        table.add_row(
            mode["mode"],
            significant(mode["size_bytes"] / 1e6),
            significant(mode["bytes_per_token"] / 1e6),
            "in the cache" if most is None else significant(most),
            fits if limited else "-",
        )
    console.print(table)
    console.print(
        "Estimates: nothing was measured but the rate at which memory is read. A file "
        "is slower than its bound, and its perplexity is found by `gpt-tf evaluate`."
    )


def refuse_impossible(
    budgets: Budgets, config: dict, machine: dict, *, threads: int | None = None
) -> None:
    """Refuse budgets that no file of a model of these sizes can keep.

    Args:
        budgets: The limits.
        config: The GPT's sizes.
        machine, threads: As for `estimate`.

    Raises:
        InputError: The smallest file exceeds `max_size_mb` or `max_memory_mb`, or
            reading its weights from memory takes longer than a budget of time allows.
    """
    found = [
        _broken(
            estimate(config, mode, machine, threads=threads, kind="tflite"), budgets
        )
        for mode in modes_of(config)
    ]
    for name, limit in budgets.given().items():
        if all(name in broken for broken in found):
            pick = max if KINDS[name].is_least else min
            best = pick(broken[name] for broken in found)
            raise InputError(
                f"`{name}` expects what a model of {count_parameters(config):,} "
                f"parameters can reach on this machine, {shown(name, best)} at best. "
                f"Received: {shown(name, limit)}. Relax {option(name)}, or make a "
                "smaller model."
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
        if name in best
        and (best[name] < limit if KINDS[name].is_least else best[name] > limit)
    }


def size_bytes(config: dict, mode: str, kind: str = "litertlm") -> int:
    """Return the bytes of a file: numbers, scales, zero points, graph, tokenizer."""
    config = sizes_of(config)
    blocks, tables = _matrices(config)
    layers, width = config["num_layers"], config["embedding_dim"]
    biases = layers * sum(rows for rows, _ in blocks)
    norms = (4 * layers + 2) * width
    file, layer = _GRAPH_BYTES[mode]
    size = layers * sum(_matrix_bytes(*shape, mode) for shape in blocks)
    size += sum(_matrix_bytes(*shape, mode, is_table=True) for shape in tables)
    size += 4 * (biases + norms) + file + layer * layers
    # Quantised tensors of one length share a vector of zero points.
    lengths = {rows for rows, _ in tables}
    inner, hidden = config["inner"], config["feedforward_dim"]
    if mode == "int4":
        size += 8 * sum(lengths)
    elif mode == "dynamic_int8":
        size += 8 * sum(lengths | {3 * inner, width, hidden})
    elif mode not in ("float32", "float16"):
        size += 8 * sum(lengths | {inner, width, hidden}) + 4 * biases
    if kind == "litertlm":
        tokenizer = config["vocab_size"] * _TOKENIZER_BYTES_PER_TOKEN
        size += _SECTION_BYTES * (2 + math.ceil(tokenizer / _SECTION_BYTES))
    return size


def count_parameters(config: dict) -> int:
    """Count a GPT's parameters from its sizes, without building it.

    Args:
        config: As `GPTModel.get_config` or an exported file states it.

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
    fits = not any(width % _INT4_BLOCK for width in inputs)
    return tuple(mode for mode in MODES if mode != "int4" or fits)


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
    """Return the size of the processor's largest cache, or None if it does not say."""
    found = []
    for index in Path(folder).glob("index*"):
        try:
            text = (index / "size").read_text().strip()
            found.append(int(text.rstrip("KM")) << {"K": 10, "M": 20}.get(text[-1], 0))
        except (OSError, ValueError, IndexError):
            continue
    return max(found, default=None)


def read_sizes(path: str | os.PathLike) -> dict:
    """Read the sizes of a model where they are stated.

    Args:
        path: A run's folder or its run.json, a model's folder, a `.keras` file, or a
            `.tflite` or `.litertlm` that gpt_tf exported.

    Returns:
        The configuration of the GPT.

    Raises:
        InputError: There is no such thing, or the model's sizes are not settled yet.
        DamagedFileError: A file is not what it should be.
    """
    path = Path(path)
    if path.is_dir() or path.name == "run.json":
        config = _sizes_of_folder(path if path.is_dir() else path.parent)
    elif not path.is_file():
        raise InputError(
            f"Expected a run, a model or an exported file at {path}; there is none. "
            "Name the folder that `gpt-tf train` wrote, or a .litertlm."
        )
    elif path.suffix == ".keras":
        from gpt_tf.models.keras_file import read_config

        config = read_config(path)
    else:
        from gpt_tf.edge.loader import open_artefact

        config = open_artefact(path).facts["config"]
    config = config.get("gpt", config)
    sizes_of(config)
    return config


def _sizes_of_folder(folder):
    for place in (folder / "model", folder, folder / "initial"):
        if (place / artifacts.MANIFEST_NAME).is_file():
            manifest = artifacts.check_manifest(place, "model", verify=False)
            config = manifest.get("config")
            if not isinstance(config, dict):
                raise DamagedFileError(
                    "Expected the model's sizes in "
                    f"{place / artifacts.MANIFEST_NAME}. Received: {config!r}. Another "
                    "version of gpt_tf wrote it; save the model again."
                )
            return config
    if not (folder / "run.json").is_file():
        raise InputError(
            f"Expected a run or a model in {folder}. Received: neither run.json nor "
            f"{artifacts.MANIFEST_NAME}. Name the folder that `gpt-tf train` wrote."
        )
    config = artifacts.read_json(folder / "run.json", {"config": dict})["config"]
    if config.get("init_from") or config.get("distillation"):
        raise InputError(
            f"The run in {folder} takes its sizes from another model and has not got "
            "it yet. Name that model, or wait until the run has begun."
        )
    if (folder / "tokenizer.json").is_file():
        from gpt_tf.text.tokenizer import load_tokenizer

        config = config | {"vocab_size": load_tokenizer(folder).vocab_size}
    return config


def _check_mode(config, mode):
    modes = modes_of(config)
    if isinstance(mode, str) and mode == "int4" and mode not in modes:
        raise InputError(
            f"`mode` expects one of {', '.join(modes)}. Received: {mode!r}; its widths "
            f"are no multiples of {_INT4_BLOCK}."
        )
    arguments.one_of("mode", mode, modes)


def _matrices(config):
    """Return the matrices of one block, and the tables, as (rows, columns)."""
    width, inner, hidden = (
        config[name] for name in ("embedding_dim", "inner", "feedforward_dim")
    )
    blocks = [(3 * inner, width), (width, inner), (hidden, width), (width, hidden)]
    tables = [(config["vocab_size"], width)] * (1 if config["tie_embeddings"] else 2)
    return blocks, [*tables, (config["context_length"], width)]


def _matrix_bytes(rows, columns, mode, is_table=False):
    """Return the bytes of a matrix and its scales."""
    if mode in ("float32", "float16"):
        return rows * columns * (4 if mode == "float32" else 2)
    if mode == "int4" and not is_table:
        return rows * columns // 2 + rows * (columns // _INT4_BLOCK) * 2
    return rows * columns + rows * 4


def _bytes_per_token(config, mode):
    """Return the bytes that one decode step reads of the weights."""
    # LiteRT unpacks float16 to float32 when it loads a file.
    mode = "float32" if mode == "float16" else mode
    blocks, (head, *_) = _matrices(config)
    read = config["num_layers"] * sum(_matrix_bytes(*shape, mode) for shape in blocks)
    return read + _matrix_bytes(*head, mode, is_table=True)
