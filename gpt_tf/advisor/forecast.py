"""What each mode would make of a model, before any file of it is measured.

Only the model's sizes are read: neither TensorFlow nor LiteRT runs anything.
"""

import dataclasses
import os
from pathlib import Path

from gpt_tf import artifacts
from gpt_tf.advisor.constraints import KINDS, Budgets, scenario_of, shown, significant
from gpt_tf.advisor.estimate import estimate, modes_of, sizes_of
from gpt_tf.errors import DamagedFileError, InputError

# What an estimate says of each quantity that has a budget, and what makes it a budget's
# number.
_ESTIMATED = {
    "latency": ("latency_ms", 1),
    "size": ("size_bytes", 1e-6),
    "memory": ("memory_bytes", 1e-6),
    "first_token": ("first_token_ms", 1),
    "throughput": ("tokens_per_s", 1),
}


def forecast(
    path: str | os.PathLike,
    machine: dict,
    budgets: Budgets | dict | None = None,
    scenario: str = "custom",
) -> dict:
    """Estimate every mode's file of a model and compare it with budgets.

    Args:
        path: As for `read_sizes`.
        machine: As `gpt_tf.evaluation.hardware.describe_machine` says it of this one.
        budgets: They come before the scenario's.
        scenario: A key of `gpt_tf.advisor.constraints.SCENARIOS`.

    Returns:
        `basis`, which is `"estimated"`; `path`, `parameters`, `machine`, `scenario`,
        `budgets`; under `modes` what `estimate` returns for each, with `breaks` and
        `may_break`, names of budgets, the latter of those within the range of the
        estimate, `because`, sentences about both, and `fits`, which is `"yes"`,
        `"perhaps"` or `"no"` and leaves the perplexity out; and `notes`, sentences.

    Raises:
        InputError: There are no sizes of a model, or the machine's read rate is not
            known.
        DamagedFileError: A file is not what it should be.

    Example:
        >>> forecast("runs/teacher", describe_machine())["modes"][0]["size_bytes"]
    """
    config = read_sizes(path)
    limits = Budgets.of(budgets).over(scenario_of(scenario).budgets)
    modes = []
    for mode in modes_of(config):
        guess = estimate(config, mode, machine)
        modes.append(guess | _verdict(guess, limits.given()))
    notes = ["These are estimates; nothing was measured but how fast memory is read."]
    if limits.max_perplexity_increase is not None:
        notes.append(
            "The perplexity cannot be estimated: whether it keeps its budget of "
            f"{shown('max_perplexity_increase', limits.max_perplexity_increase)} is "
            "found out by `gpt-tf evaluate` on the file."
        )
    return {
        "basis": "estimated",
        "path": str(path),
        "parameters": modes[0]["parameters"],
        "machine": machine,
        "scenario": scenario,
        "budgets": dataclasses.asdict(limits),
        "modes": modes,
        "notes": notes,
    }


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
    if path.is_dir():
        config = _of_folder(path)
    elif path.name == "run.json":
        config = _of_folder(path.parent)
    elif path.suffix == ".keras" and path.is_file():
        from gpt_tf.models.keras_file import read_config

        config = read_config(path)
    elif path.is_file():
        from gpt_tf.edge.loader import open_artefact

        config = open_artefact(path).facts["config"]
    else:
        raise InputError(
            f"Expected a run, a model or an exported file at {path}; there is none. "
            "Name the folder that `gpt-tf train` wrote, or a .litertlm."
        )
    config = config.get("gpt", config)
    sizes_of(config)
    return config


def print_forecast(result: dict, console=None) -> None:
    """Print a table of what each mode would be, marked as estimates.

    Args:
        result: As `forecast` returns it.
        console: Where to write; standard output unless given.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    threads = result["modes"][0]["threads"]
    table = Table(
        title=f"Estimates: {result['parameters']:,} parameters, {threads} "
        f"{'thread' if threads == 1 else 'threads'} of this machine"
    )
    table.add_column("mode", no_wrap=True)
    for heading in ("MB", "ms a token", "first token", "memory"):
        table.add_column(heading, justify="right")
    table.add_column("fits the budgets", overflow="fold")
    limited = any(value is not None for value in result["budgets"].values())
    for mode in result["modes"]:
        table.add_row(
            mode["mode"],
            significant(mode["size_bytes"] / 1e6),
            _between(mode["latency_ms_range"]),
            _between(mode["first_token_ms_range"]),
            significant(mode["memory_bytes"] / 1e6, 2) + " MB",
            Text(_told(mode) if limited else "-"),
        )
    console.print(table)
    for note in result["notes"]:
        console.print(Text(note))


def _between(bounds):
    return " to ".join(significant(bound, 2) for bound in bounds)


def _told(mode):
    parts = [
        f"{word} {', '.join(KINDS[name].what for name in names)}"
        for word, names in (("breaks", mode["breaks"]), ("risks", mode["may_break"]))
        if names
    ]
    return ": ".join([mode["fits"], "; ".join(parts)]) if parts else mode["fits"]


def _verdict(guess, given):
    """Compare the ranges of an estimate with the budgets."""
    found = {"breaks": [], "may_break": [], "because": []}
    for name, limit in given.items():
        kind = KINDS[name]
        if kind.measure not in _ESTIMATED:
            continue
        key, factor = _ESTIMATED[kind.measure]
        low, high = (bound * factor for bound in guess[f"{key}_range"])
        surely = high < limit if kind.is_least else low > limit
        perhaps = low < limit if kind.is_least else high > limit
        if perhaps:
            found["breaks" if surely else "may_break"].append(name)
            found["because"].append(
                f"The {kind.what}, {shown(name, low, 2)} to {shown(name, high, 2)}, "
                f"{'breaks' if surely else 'may break'} {shown(name, limit)}."
            )
    fits = "no" if found["breaks"] else "perhaps" if found["may_break"] else "yes"
    return found | {"fits": fits}


def _of_folder(folder):
    for place in (folder / "model", folder):
        if (place / artifacts.MANIFEST_NAME).is_file():
            return _of_model(place)
    if not (folder / "run.json").is_file():
        raise InputError(
            f"Expected a run or a model in {folder}. Received: neither run.json nor "
            f"{artifacts.MANIFEST_NAME}. Name the folder that `gpt-tf train` wrote."
        )
    if (folder / "initial" / artifacts.MANIFEST_NAME).is_file():
        return _of_model(folder / "initial")
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


def _of_model(folder):
    manifest = artifacts.check_manifest(folder, "model", verify=False)
    config = manifest.get("config")
    if not isinstance(config, dict):
        raise DamagedFileError(
            f"Expected the model's sizes in {folder / artifacts.MANIFEST_NAME}. "
            f"Received: "
            f"{config!r}. Another version of gpt_tf wrote it; save the model again."
        )
    return config
