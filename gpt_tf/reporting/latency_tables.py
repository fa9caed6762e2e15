"""How fast files are, and what changed since a baseline, as tables in a terminal."""

import collections

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

_LABEL_WIDTH = 26
_CELL_WIDTH = 25
_MARKS = {"worse": ("worse", "bold red"), "better": ("better", "green"), "none": "="}
_LABELS = {
    "time_to_first_token_ms": "first token, ms",
    "inter_token_latency_ms": "between tokens, ms",
    "response_time_ms": "response, ms",
    "load_ms": "loading, ms",
    "cold_start_ms": "cold start, ms",
    "tokens_per_s": "tokens/s",
    "peak_memory_bytes": "peak memory, bytes",
    "size_bytes": "size, bytes",
    "energy_j_per_token": "joules a token",
}


class TurnProgress:
    """A bar over the turns of a measurement, gone once they are done.

    Args:
        console: Where to write; standard output unless given.

    Example:
        >>> with TurnProgress() as progress:
        ...     compare_latencies(paths, on_progress=progress.update)
    """

    def __init__(self, console=None):
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("opening the files", total=None)

    def __enter__(self):
        self._progress.start()
        return self

    def __exit__(self, *exception):
        self._progress.stop()

    def update(self, done: int, total: int, what: str) -> None:
        """Say how far it is, and what comes."""
        self._progress.update(self._task, completed=done, total=total, description=what)


def print_latency(report: dict, console=None) -> None:
    """Print the latencies of a report, files side by side.

    Args:
        report: As `measure_files` returns it.
        console: Where to write; standard output unless given.
    """
    console = console or Console()
    entries = [entry for entry in report["entries"] if entry["latency"]]
    most = max(1, (console.width - _LABEL_WIDTH) // _CELL_WIDTH)
    for start in range(0, len(entries), most):
        _print_side_by_side(entries[start : start + most], console)
    for line in (_machine_line(report["machine"]), *report["notes"]):
        if line:
            console.print(Text(line))


def _print_side_by_side(entries, console):
    first = entries[0]["latency"]
    table = _table(
        f"{first['prompt_tokens']} prompt tokens, {first['new_tokens']} new; times in "
        "ms: median (quartiles)"
    )
    table.add_column("", no_wrap=True)
    for entry in entries:
        # A name may hold brackets; none of it is rich's markup.
        table.add_column(Text(entry["name"]), justify="right", overflow="fold")
    for label, cells in _rows(entries):
        if any(cell != "-" for cell in cells):
            table.add_row(label, *cells)
    console.print(table)


def _rows(entries):
    """Yield labels, each with a cell per entry."""
    latencies = [entry["latency"] for entry in entries]

    def cells(form):
        return [form(latency) for latency in latencies]

    yield "size, MB", [f"{entry['size_bytes'] / 1e6:,.2f}" for entry in entries]
    yield "engine", cells(lambda one: one["engine"])
    yield "threads", cells(lambda one: str(one["threads"]))
    yield "first token", cells(lambda one: _spread(one["time_to_first_token_ms"]))
    yield "between tokens", cells(lambda one: _spread(one["inter_token_latency_ms"]))
    for part in ("p95", "p99", "worst"):
        found = cells(lambda one, part=part: _number(_gaps(one)[part]))
        yield f"  {part}", found
    yield "response", cells(lambda one: _spread(one["response_time_ms"]))
    yield "tokens/s while it writes", cells(lambda one: _number(one["tokens_per_s"]))
    for count in _keys(latencies, "throughput", "requests"):
        rates = _cells_of(latencies, "throughput", "requests", count)
        label = f"tokens/s, {count} request{'s' if count > 1 else ''}"
        yield label, [_number(one and one["tokens_per_s"]) for one in rates]
    yield "loading", cells(lambda one: _spread(one["load_ms"]))
    yield "cold start", cells(lambda one: _spread(one["cold_start_ms"]))
    yield (
        "peak memory, MB",
        cells(lambda one: _number(one["peak_memory_bytes"], 1e-6)),
    )
    yield "share of bandwidth", cells(lambda one: _percent(one["bandwidth_share"]))
    yield "joules a token", cells(lambda one: _number(one["energy_j_per_token"]))
    for length in _keys(latencies, "by_context", "context"):
        found = _cells_of(latencies, "by_context", "context", length)
        spreads = [one and one["time_to_first_token_ms"] for one in found]
        yield f"first token, prompt {length}", [_spread(one) for one in spreads]
        spreads = [one and _gaps(one) for one in found]
        yield f"between, prompt {length}", [_spread(one) for one in spreads]
    for count in _keys(latencies, "by_threads", "threads"):
        found = _cells_of(latencies, "by_threads", "threads", count)
        label = f"between, {count} thread{'s' if count > 1 else ''}"
        yield label, [_spread(one and _gaps(one)) for one in found]


def _gaps(measured):
    return measured["inter_token_latency_ms"]


def _keys(latencies, part, key):
    return sorted({one[key] for latency in latencies for one in latency[part]})


def _cells_of(latencies, part, key, value):
    """Return of each file what a list has for a key, or None."""
    return [
        next((one for one in latency[part] if one[key] == value), None)
        for latency in latencies
    ]


def print_baseline(comparison: dict, console=None) -> None:
    """Print what changed since a baseline, with a mark where it is beyond noise.

    Args:
        comparison: As `compare_with_baseline` returns it.
        console: Where to write; standard output unless given.
    """
    console = console or Console()
    rows = comparison["rows"]
    for name in dict.fromkeys(row["entry"] for row in rows):
        table = _table(Text(f"{name} beside the baseline; = is within noise"))
        table.add_column("", no_wrap=True)
        for title in ("before", "now", "ratio", ""):
            table.add_column(title, justify="right", no_wrap=True)
        for row in rows:
            if row["entry"] == name:
                table.add_row(*_change_cells(row))
        console.print(table)
    for line in comparison["notes"]:
        console.print(Text(line))
    count = collections.Counter(row["change"] for row in rows)
    console.print(f"{count['worse']} worse beyond noise, {count['better']} better")


def _change_cells(row):
    mark = _MARKS.get(row["change"], "")
    ratio = "-" if row["ratio"] is None else f"{row['ratio']:.3f}"
    return (
        _label(row["metric"]),
        _number(row["before"]),
        _number(row["after"]),
        ratio,
        Text(*mark) if isinstance(mark, tuple) else mark,
    )


def _label(metric):
    name, separator, rest = metric.partition(" ")
    comma = "," if name.endswith(",") else ""
    return _LABELS.get(name.rstrip(","), name.rstrip(",")) + comma + separator + rest


def _table(title):
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)


def _machine_line(machine):
    if not machine:
        return ""
    rates = machine.get("read_bytes_per_s") or {}
    read = ", ".join(
        f"{rate / 1e9:.1f} GB/s to {count} thread{'s' if count != '1' else ''}"
        for count, rate in rates.items()
    )
    memory = f"; memory gives {read}" if read else ""
    return f"{machine['cpu']}, {machine['cores']} cores{memory}"


def _spread(spread):
    if spread is None:
        return "-"
    median, *quartiles = (_number(spread[part]) for part in ("median", "q1", "q3"))
    return f"{median} ({'-'.join(quartiles)})"


def _number(value, scale=1):
    if value is None:
        return "-"
    value *= scale
    if value >= 100 or isinstance(value, int):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _percent(value):
    return "-" if value is None else f"{value:.0%}"
