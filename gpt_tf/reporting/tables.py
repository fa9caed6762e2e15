"""Tables in a terminal: accuracy, latency, and what changed since a baseline."""

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

from gpt_tf.formatting import (
    NOT_MEASURED,
    bandwidth,
    count,
    interval,
    number,
    percent,
    quantity,
)

# How the rows of a task are judged.
TASKS = {
    "exact": "exact match",
    "regex": "a regular expression is found",
    "choice": "choice by log-probability per byte",
}
_LABEL_WIDTH = 26
_CELL_WIDTH = 25
_MARKS = {
    "worse": Text("worse", "bold red"),
    "better": Text("better", "green"),
    "none": Text("="),
}
# Heading in two lines, part of an entry's accuracy, scale, and whether it is a change.
_ACCURACY = (
    ("perplexity", "perplexity", 1, False),
    ("increase\n%", "perplexity_increase", 100, True),
    ("bits a\nbyte", "bits_per_byte", 1, False),
    ("right\n%", "token_accuracy", 100, False),
    ("KL\nnats", "divergence_nats", 1, False),
    ("agreed\n%", "top1_agreement", 100, False),
    ("parsed\n%", "parsed", 100, False),
)


class MeasurementProgress(Progress):
    """Bars of a measurement on standard error, gone once it is done.

    Nothing is shown where that is no terminal.

    Example:
        >>> with MeasurementProgress() as progress:
        ...     evaluate_files(paths, on_progress=progress.count)
    """

    def __init__(self):
        console = Console(stderr=True)
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._bars = {}

    def count(self, what: str, done: int, total: int) -> None:
        """Say how far one of several counts is; each has its own bar."""
        self.turn(done, total, what, bar=what)

    def turn(self, done: int, total: int, what: str, bar: str = "turn") -> None:
        """Say how many turns are done, and what comes; all turns share a bar."""
        if bar not in self._bars:
            self._bars[bar] = self.add_task(what)
        self.update(self._bars[bar], completed=done, total=total, description=what)


def print_accuracy(report: dict) -> None:
    """Print how well files predict text, below each value its 95 % interval.

    Args:
        report: As `gpt_tf.evaluation.accuracy.evaluate_files` returns it; nothing is
            printed where no text was judged.
    """
    entries = report["entries"]
    if report["corpus"] is None:
        return
    # Columns in which nothing stands only take space.
    columns = [
        column
        for column in _ACCURACY
        if any(entry["accuracy"][column[1]] for entry in entries)
    ]
    table = _table(
        "Accuracy; below each value the ends of its 95 % interval",
        show_lines=True,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("file", overflow="fold")
    for title, *_ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for entry in entries:
        accuracy = entry["accuracy"]
        cells = []
        for _, part, scale, signed in columns:
            found = accuracy[part]
            if part == "parsed" and found:
                found = found["share"]
            lines = interval(found, scale, signed) if found else [NOT_MEASURED]
            cells.append("\n".join(lines))
        size = quantity(entry["size_bytes"] / 1e6, "MB")
        # A name may hold brackets; none of it is rich's markup.
        table.add_row(Text(f"{entry['name']}\n{entry['mode']}\n{size}"), *cells)
    console = Console()
    console.print(table)
    for line in _what_was_judged(report):
        console.print(Text(line))


def _what_was_judged(report):
    entries, corpus = report["entries"], report["corpus"]
    blocks = entries[0]["accuracy"]["blocks"]
    compared = f"; compared with {report['reference']}" if report["reference"] else ""
    yield (
        f"{corpus['tokens']:,} tokens, {corpus['bytes']:,} bytes in {blocks} blocks of "
        f"{corpus['name']} ({corpus['split']}){compared}"
    )
    parsed = [entry["accuracy"]["parsed"] for entry in entries]
    if any(parsed):
        shares = sorted({f"{found['of_true_text']:.0%}" for found in parsed if found})
        yield (
            f"parsed: {parsed[0]['count']} functions completed; of their own text, cut "
            f"likewise, {' or '.join(shares)}"
        )


def print_task(report: dict) -> None:
    """Print how much of a task files do, below each value its 95 % interval.

    Args:
        report: As `gpt_tf.evaluation.accuracy.evaluate_files` returns it; nothing is
            printed where there was no task.
    """
    if report["task"] is None:
        return
    facts, reference = report["task"], report["reference"]
    scores = {entry["name"]: entry["accuracy"]["task"] for entry in report["entries"]}
    rows = f"{facts['name']}: {count(facts['rows'], 'row')}"
    table = _table(f"Task {rows}, {TASKS[facts['kind']]}", show_lines=True)
    table.add_column("file", overflow="fold")
    table.add_column("right\n%", justify="right", no_wrap=True)
    if facts["kind"] == "choice":
        table.add_column("by sum\n%", justify="right", no_wrap=True)
    if reference:
        for title in ("change\npoints", "gained\nrows", "lost\nrows"):
            table.add_column(title, justify="right", no_wrap=True)
    for name, found in scores.items():
        cells = ["\n".join(interval(found["score"], 100))]
        if facts["kind"] == "choice":
            cells.append(number(100 * found["by_sum"]))
        if reference:
            is_itself = name == reference
            ends = interval(found["difference"], 100, signed=True)
            cells.append("reference" if is_itself else "\n".join(ends))
            counts = found["gained"], found["lost"]
            cells += [NOT_MEASURED if is_itself else str(n) for n in counts]
        table.add_row(Text(name), *cells)
    console = Console()
    console.print(table)
    for name, found in scores.items():
        if wrong := found["wrong"]:
            said = f"expected {wrong['expected']!r}, answered {wrong['answered']!r}"
            console.print(Text(f"{name}, line {wrong['line']}: {said}"))


def print_latency(report: dict, console: Console | None = None) -> None:
    """Print the latencies of a report, files side by side.

    Args:
        report: As `gpt_tf.evaluation.latency.measure_files` returns it.
        console: Where to write; standard output unless given.
    """
    console = console or Console()
    entries = [entry for entry in report["entries"] if entry["latency"]]
    most = max(1, (console.width - _LABEL_WIDTH) // _CELL_WIDTH)
    for start in range(0, len(entries), most):
        shown = entries[start : start + most]
        first = shown[0]["latency"]
        table = _table(
            f"{first['prompt_tokens']} prompt tokens, {first['new_tokens']} new; times "
            "in ms: median (quartiles)"
        )
        table.add_column("", no_wrap=True)
        for entry in shown:
            # A name may hold brackets; none of it is rich's markup.
            table.add_column(Text(entry["name"]), justify="right", overflow="fold")
        columns = [_latency_cells(entry) for entry in shown]
        for label in dict.fromkeys(label for cells in columns for label in cells):
            cells = [column.get(label, NOT_MEASURED) for column in columns]
            if any(cell != NOT_MEASURED for cell in cells):
                table.add_row(label, *cells)
        console.print(table)
    if machine := report["machine"]:
        read = bandwidth(machine.get("read_bytes_per_s") or {})
        memory = f"; memory gives {read}" if read else ""
        console.print(Text(f"{machine['cpu']}, {machine['cores']} cores{memory}"))
    for line in report["notes"]:
        console.print(Text(line))


def _latency_cells(entry):
    """Return the cells of a file by their labels."""
    latency = entry["latency"]
    gaps, memory = latency["inter_token_latency_ms"], latency["peak_memory_bytes"]
    size, threads = entry["size_bytes"], latency["threads"]
    cells = {
        "size, MB": number(size and size / 1e6),
        "engine": latency["engine"],
        "threads": NOT_MEASURED if threads is None else str(threads),
        "first token": _spread(latency["time_to_first_token_ms"]),
        "between tokens": _spread(gaps),
        **{f"  {part}": number(gaps[part]) for part in ("p95", "p99", "worst")},
        "response": _spread(latency["response_time_ms"]),
        "tokens/s": number(latency["tokens_per_s"]),
        "loading": _spread(latency["load_ms"]),
        "cold start": _spread(latency["cold_start_ms"]),
        "peak memory, MB": number(memory and memory / 1e6),
        "share of bandwidth": percent(latency["bandwidth_share"]),
        "joules a token": number(latency["energy_j_per_token"]),
    }
    for row in latency["throughput"]:
        label = f"tokens/s, {count(row['requests'], 'request')}"
        cells[label] = number(row["tokens_per_s"])
    for row in latency["by_context"]:
        prompt = f"prompt {row['context']}"
        cells[f"first token, {prompt}"] = _spread(row["time_to_first_token_ms"])
        cells[f"between, {prompt}"] = _spread(row["inter_token_latency_ms"])
    for row in latency["by_threads"]:
        label = f"between, {count(row['threads'], 'thread')}"
        cells[label] = _spread(row["inter_token_latency_ms"])
    return cells


def print_baseline(comparison: dict) -> None:
    """Print what changed since a baseline, with a mark where it is beyond noise.

    Args:
        comparison: As `gpt_tf.evaluation.regression.compare_with_baseline` returns it.
    """
    console = Console()
    rows = comparison["rows"]
    for name in dict.fromkeys(row["entry"] for row in rows):
        table = _table(Text(f"{name} beside the baseline; = is within noise"))
        table.add_column("", no_wrap=True)
        for title in ("before", "now", "ratio", ""):
            table.add_column(title, justify="right", no_wrap=True)
        for row in rows:
            if row["entry"] == name:
                ratio = NOT_MEASURED if row["ratio"] is None else f"{row['ratio']:.3f}"
                values = (number(row["before"]), number(row["after"]), ratio)
                mark = _MARKS.get(row["change"], "")
                table.add_row(row["metric"].replace("_", " "), *values, mark)
        console.print(table)
    for line in comparison["notes"]:
        console.print(Text(line))
    changes = collections.Counter(row["change"] for row in rows)
    console.print(f"{changes['worse']} worse beyond noise, {changes['better']} better")


def _table(title, **options):
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, **options)


def _spread(spread):
    if spread is None:
        return NOT_MEASURED
    median, *quartiles = (number(spread[part]) for part in ("median", "q1", "q3"))
    return f"{median} ({'-'.join(quartiles)})"
