"""Write docs/numbers.md: every benchmark's command, commit, machine and result.

    python benchmarks/numbers_page.py [--check]

The page is made from `benchmarks/results/*.json` alone, and so are the tables of
measurements in docs/comparison.md. With `--check` nothing is written: status 1 says
that a page is not what the results give. What a benchmark measures, and its command,
stand in its own docstring; a result that has no tables of its own here is shown as it
is. (A file called `numbers.py` would stand in the way of Python's own `numbers`.)

The date is the result's own `date`, else that under which the page has the same bytes
already, else that of the commit that wrote the file, else the file's.
"""

import argparse
import ast
import contextlib
import datetime
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "numbers.md"
COMPARISON = ROOT / "docs" / "comparison.md"

HEAD = """\
# Numbers

<!-- Written by `python benchmarks/numbers_page.py`. Do not edit. -->

Every number that this project states comes from a program in `benchmarks/`, which
leaves its result as a file in `benchmarks/results/`. This page is made from those
files. Contenders run in processes of their own and take turns, a warm-up is discarded;
ratios carry over to other machines, times do not.
"""

# Results that do not come from a program of their own name in `benchmarks/`.
STUDIES = {"scaling_model": ROOT / "studies" / "scaling" / "run.py"}

# What the committed results were made with, where it is more than the bare command.
OPTIONS = {"quantization": "--wide", "distillation": "--few"}

# The order of the page: the way of the data; what is not named here follows.
ORDER = (
    *("training", "generation", "quality", "parallel", "scaling_model"),
    *("quantization_strategies", "quantization", "distillation", "generalisation"),
    *("decode", "serving", "optimize", "explanation"),
)

PICTURES = {"decode": "edge.png", "training": "overview.png"}


def make_page(results=RESULTS, earlier=None):
    """Return the page's text.

    Args:
        results: Folder of the JSON files.
        earlier: The page as it stands; default: docs/numbers.md.
    """
    if earlier is None:
        earlier = PAGE.read_text("utf-8") if PAGE.exists() else ""
    known = dict(re.findall(r"^- SHA-256: `(\w+)`\n- date: (\S+)$", earlier, re.M))
    sections = [_section(path, known) for path in result_files(results)]
    return "\n".join([HEAD, *sections])


def result_files(results=RESULTS):
    """Return the JSON files in the order of the page."""

    def place(path):
        name = path.stem
        return (ORDER.index(name) if name in ORDER else len(ORDER), name)

    return sorted(Path(results).glob("*.json"), key=place)


def make_comparison(text, results=RESULTS):
    """Return docs/comparison.md with its tables of measurements made anew.

    Args:
        text: The page; a table stands between `<!-- numbers: NAME -->` and
            `<!-- end -->`.
        results: Folder of the JSON files.
    """

    def fill(match):
        maker = COMPARED.get(match[1])
        if maker is None:
            raise SystemExit(
                f"Expected a table of {', '.join(COMPARED)}. Received: {match[1]!r}."
            )
        content = json.loads((Path(results) / f"{match[1]}.json").read_text("utf-8"))
        return f"<!-- numbers: {match[1]} -->\n\n{maker(content)}\n\n<!-- end -->"

    pattern = r"<!-- numbers: (\w+) -->.*?<!-- end -->"
    return re.sub(pattern, fill, text, flags=re.S)


def command_of(name, folder=ROOT / "benchmarks"):
    """Return what a benchmark measures, and its command, from its docstring.

    Args:
        name: As in `results/NAME.json`.
        folder: Where the programs are.

    Returns:
        A line and a command; None for both where there is no such program.
    """
    path = STUDIES.get(name, Path(folder) / f"{name}.py")
    if not path.exists():
        return None, None
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    found = re.search(r"^ *(python \w+/\S+\.py)", text, re.M)
    command = found[1] if found else f"python benchmarks/{name}.py"
    return text.partition("\n\n")[0], f"{command} {OPTIONS.get(name, '')}".strip()


def _section(path, known):
    name, data = path.stem, path.read_bytes()
    content = json.loads(data)
    digest = hashlib.sha256(data).hexdigest()[:16]
    line, command = command_of(name)
    command = content.get("command", command)
    facts = [
        ("command", f"`{command}`" if command else "not stated"),
        ("result", f"`benchmarks/results/{path.name}`"),
        ("SHA-256", f"`{digest}`"),
        ("date", content.get("date") or known.get(digest) or _date(path)),
        ("commit", f"`{content['commit']}`" if "commit" in content else "not stated"),
        ("machine", _machine(content.get("machine", {}))),
        *(
            (f"build of {package}", f"`{build}`")
            for package, build in content.get("builds", {}).items()
        ),
    ]
    title = name.replace("_", " ")
    parts = [f"## {title[0].upper()}{title[1:]}", ""]
    if line:
        parts += [line.replace("\n", " "), ""]
    parts += [*(f"- {name}: {value}" for name, value in facts), ""]
    parts += [TABLES.get(name, _as_it_is)(content), ""]
    picture = PICTURES.get(name, f"{name}.png")
    if (path.parent / picture).exists():
        parts += [f"![{title}](../benchmarks/results/{picture})", ""]
    return "\n".join(parts)


def _date(path):
    def git(*arguments):
        return subprocess.run(
            ["git", "-C", path.parent, *arguments],
            capture_output=True,
            text=True,
            check=False,
        )

    with contextlib.suppress(OSError):  # there may be no git
        if not git("status", "--porcelain", "--", path.name).stdout.strip():
            date = git("log", "-1", "--format=%as", "--", path.name).stdout.strip()
            if date:
                return date
    return datetime.date.fromtimestamp(path.stat().st_mtime).isoformat()


def _machine(machine):
    parts = [f"{machine['cpu']}, {machine['cores']} cores"] if "cpu" in machine else []
    parts += [
        f"{name} {value}"
        for name, value in machine.items()
        if name not in ("cpu", "cores") and value != "not installed"
    ]
    return "; ".join(parts) or "not stated"


# Tables


def _table(titles, rows):
    """Return a Markdown table; columns of numbers are aligned to the right."""
    rows = [[str(cell) for cell in row] for row in rows]
    number = re.compile(r"^(-|[-+]?[\d,.]+( ± [\d.]+)?%?)$")
    aligned = [
        "---:" if titles[i] and all(number.match(row[i]) for row in rows) else "---"
        for i in range(len(titles))
    ]
    lines = [titles, aligned, *[[cell.replace("|", r"\|") for cell in r] for r in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _columns(rows, *columns):
    """Return a table of dicts; a column is (title, key or function, format)."""

    def cell(row, key, form):
        value = key(row) if callable(key) else row.get(key)
        return "-" if value is None else format(value, form)

    return _table(
        [title for title, _, _ in columns],
        [[cell(row, key, form) for _, key, form in columns] for row in rows],
    )


def _with_error(value, error, digits=4):
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _with_spread(value, spread, seeds):
    return _with_error(value, spread / 2, 2) if seeds > 1 else f"{value:.2f}"


def _joined(*parts):
    return "\n\n".join(part for part in parts if part)


def _training(content):
    tables = []
    if "commit" not in content:  # of before PyTorch's denormals were flushed
        tables.append(
            "PyTorch ran with denormal numbers here, which TensorFlow flushes: on some "
            "processors that slows it down threefold. Its rows are to be measured anew."
        )
    for name, study in content["shapes"].items():
        shape = study["shape"]
        tokens = shape["batch_size"] * shape["context_length"]
        tables += [
            f"{name.capitalize()}: {shape['num_layers']} layers, "
            f"{shape['embedding_dim']} wide, vocabulary {shape['vocab_size']}, "
            f"{tokens} tokens a step.",
            _columns(
                study["results"],
                ("", "name", ""),
                ("step, ms", "median_ms", ".1f"),
                ("p95", "p95_ms", ".1f"),
                ("p99", "p99_ms", ".1f"),
                ("MFU", "model_flop_utilisation", ".0%"),
                ("first step, s", "first_seconds", ".1f"),
            ),
        ]
    return _joined(*tables)


def _generation(content):
    return _joined(
        _columns(
            content["results"],
            ("", "name", ""),
            ("tokens/s", "tokens_per_second", ".1f"),
            ("of NumPy's read rate", "share_of_floor", ".0%"),
            ("first, with compilation, s", "first_seconds", ".1f"),
        ),
        f"Reading the float32 weights once a token at the "
        f"{content['read_gigabytes_per_second']:.1f} GB/s that NumPy reads would make "
        f"{content['floor_tokens_per_second']:.0f} tokens/s: a yardstick and no bound, "
        "a loop in C reads up to twice as fast.",
    )


def _quality(content):
    def row(name, runs):
        losses = [run["loss"] for run in runs]
        mean = sum(losses) / len(losses)
        return [name, *(f"{x:.3f}" for x in (mean, min(losses), max(losses)))] + [
            len(losses)
        ]

    return _joined(
        _table(
            ["learning rate of", "mean loss", "lowest", "highest", "seeds"],
            [row(*item) for item in content["runs"].items()],
        ),
        f"nanoGPT publishes {content['published_loss']}.",
    )


def _parallel(content):
    return _columns(
        content["rows"],
        ("", "label", ""),
        ("XLA", lambda row: "yes" if row["xla"] else "no", ""),
        ("step, ms", "step_ms", ".0f"),
        ("of one device", "of_one_device", ".2f"),
        (
            "sent a step, MB",
            lambda row: row["communicated_bytes_per_step"] / 1e6,
            ".0f",
        ),
        ("MB a device", lambda row: row["memory_bytes_per_device"] / 1e6, ".0f"),
    )


def _scaling_model(content):
    held_out = content["published"]["held_out"].items()
    parts = [
        "Against published measurements (one constant fitted on other rows):",
        _columns(
            [{"source": source, **errors} for source, errors in held_out],
            ("published by", "source", ""),
            ("rows", "rows", "d"),
            ("mean error", "mean", ".1%"),
            ("largest", "largest", ".1%"),
        ),
    ]
    return _joined(*parts)


def _strategies(content):
    return _joined(
        f"{content['model']}, {content['parameters']:,} parameters; "
        f"{content['tokens']:,} tokens of {content['corpus']}.",
        _columns(
            content["results"],
            ("strategy", "strategy", ""),
            ("bits", "bits", "d"),
            ("signal to noise, dB", "snr_db", ".1f"),
            ("perplexity", "perplexity", ".3f"),
            (
                "of float32",
                lambda row: _with_error(row["ratio"], row["ratio_standard_error"]),
                "",
            ),
            ("MB", lambda row: row["size_bytes"] / 1e6, ".2f"),
        ),
    )


def _quantization(content):
    parts = []
    for name, study in content["studies"].items():
        parts += [
            f"{name}, on {study['tokens']:,} held-out tokens; every row is a file, run "
            "by `EdgeGPT`.",
            _columns(
                study["rows"],
                ("file", "name", ""),
                ("MB", lambda row: row["tflite_bytes"] / 1e6, ".2f"),
                ("perplexity", "perplexity", ".3f"),
                ("of float32", "perplexity_ratio", ".4f"),
                (
                    "of its own float32",
                    lambda row: _with_error(
                        row["ratio_to_own_float32"],
                        row["ratio_to_own_float32_standard_error"],
                    ),
                    "",
                ),
                ("KL, nats", "divergence_nats", ".4f"),
                ("same top-1", "top1_agreement", ".1%"),
            ),
        ]
    return _joined(*parts)


def _distillation(content):
    parts = []
    for name, study in content["studies"].items():
        teacher, ways = study["teacher"], study["summary"]["ways"]
        parts += [
            f"{name.capitalize()}: teacher of {teacher['parameters']:,} parameters, "
            f"perplexity {teacher['perplexity']:.2f}, "
            f"{teacher['bits_per_byte']:.3f} bits per byte; {study['steps']} steps"
            f"{', commit ' + study['commit'] if 'commit' in study else ''}. "
            "Half the range over seeds behind ±.",
            _columns(
                [{"way": way, **found} for way, found in ways.items()],
                ("student", "way", ""),
                ("seeds", "seeds", "d"),
                (
                    "perplexity",
                    lambda row: _with_spread(
                        row["perplexity"], row["perplexity_spread"], row["seeds"]
                    ),
                    "",
                ),
                ("of teacher's", "of_teacher", ".3f"),
                ("bits per byte", "bits_per_byte", ".3f"),
                ("same top-1", "agreement", ".1%"),
                ("KL, nats", "divergence_nats", ".3f"),
            ),
        ]
        searched = [row for rows in study["searches"].values() for row in rows]
        if all("search_nats" in row for row in searched):
            parts += [
                "Learning rates, chosen by the loss on the first half of the held-out "
                "text; everything else here is measured on the second:",
                _columns(
                    searched,
                    ("student, seed 0", "name", ""),
                    ("loss, nats", "search_nats", ".3f"),
                ),
            ]
        else:
            inherited = "alone, from the teacher's layers"
            parts.append(
                "Learning rates were chosen on the text that is reported"
                + (
                    f"; that of the student {inherited}, was not searched: it is the "
                    "distilled student's."
                    if inherited in ways
                    else "."
                )
            )
        if study.get("int8_files"):
            parts += [
                "As int8 files, of the float32 file of the student from stored "
                "knowledge:",
                _columns(
                    study["int8_files"],
                    ("file", "name", ""),
                    ("perplexity, of float32", "ratio", ".4f"),
                ),
            ]
        if study.get("speeds"):
            speeds = study["speeds"].items()
            parts.append(
                _table(
                    ["decoding", "tokens/s"],
                    [[k, f"{v:,.0f}"] for k, v in speeds if isinstance(v, float)],
                )
            )
    parts += [
        "A training step of the student:",
        _columns(
            list(content["steps"].values()),
            ("", "name", ""),
            ("median, ms", "median_ms", ".0f"),
            ("tenth percentile", "p10_ms", ".0f"),
            ("p95", "p95_ms", ".0f"),
        ),
    ]
    return _joined(*parts)


def _decode(content):
    task = content["task"]
    parts = [
        f"{task['num_layers']} layers, {task['embedding_dim']} wide, vocabulary "
        f"{task['vocab_size']}; {task['prompt_tokens']} prompt tokens, "
        f"{task['new_tokens']} new ones, cache of {task['context_length']}.",
        _table(
            ["file", "MB"],
            [[k, f"{v / 1e6:.1f}"] for k, v in content["file_bytes"].items()],
        ),
    ]
    for threads, found in content["threads"].items():
        parts += [
            f"On {threads} thread{'s' * (threads != '1')}, which read "
            f"{found['read_gigabytes_per_second']:.1f} GB/s with NumPy (no bound: a "
            "loop in C reads up to twice as fast):",
            _columns(
                found["results"],
                ("", "name", ""),
                ("tokens/s", "tokens_per_second", ".0f"),
                ("fastest", "fastest_tokens_per_second", ".0f"),
                ("first token, ms", "first_token_ms", ".0f"),
                ("`dynamic_int8` is faster by", "ours_over_this", ".2f"),
            ),
        ]
    return _joined(*parts)


def _serving(content):
    requests = list(content["throughput"][0]["tokens_per_second"])
    return _joined(
        f"First tokens of prompts of {content['short_tokens']} tokens beside one of "
        f"{content['long_tokens']}, `{content['mode']}`, {content['threads']} threads:",
        _columns(
            content["response"],
            ("the long prompt", "name", ""),
            ("short: median, ms", "short_median_ms", ".0f"),
            ("p95", "short_p95_ms", ".0f"),
            ("worst", "short_worst_ms", ".0f"),
            ("long, ms", "long_ms", ".0f"),
        ),
        "Tokens per second, by the number of requests at once:",
        _table(
            ["", *requests],
            [
                [row["name"], *(f"{row['tokens_per_second'][n]:.0f}" for n in requests)]
                for row in content["throughput"]
            ],
        ),
    )


def _generalisation(content):
    def cells(row, text):
        found = row[text]
        number = _with_error(found["mean"], found["spread"], 3)
        if not found["verdict"]:
            return number, "-"
        return number, f"{found['change_percent']:+.1f}% {found['verdict']}"

    parts = []
    for name, text in content["texts"].items():
        rows = [
            [way, f"{row['best_step']:.0f}", *cells(row, "held-out, best")]
            + [*cells(row, "other, best"), f"{row['held-out, last']['mean']:.3f}"]
            for way, row in text["summary"].items()
        ]
        parts += [
            f"Trained on a tenth of {name}, {text['size_bytes']['train']:,} bytes; "
            f"bits per byte, mean of {content['seeds']} seeds and half their range:",
            _table(
                [
                    *("", "best step", "held-out", "change"),
                    *(text["other"], "change", "held-out at the end"),
                ],
                rows,
            ),
        ]
    return _joined(*parts)


def _explanation(content):
    def with_interval(found):
        return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"

    rows = []
    for model, test in content["tests"].items():
        kept = test["last_kept"]
        for method, found in test["methods"].items():
            rows.append(
                [
                    *(model, method, with_interval(found["drop"])),
                    with_interval(found["difference"]),
                    with_interval(kept["methods"][method]["drop"]),
                    with_interval(kept["methods"][method]["difference"]),
                ]
            )
    first = next(iter(content["tests"].values()))
    return _joined(
        f"{first['prompts']} prompts of {first['prompt_tokens']:.0f} tokens, "
        f"{first['fraction']:.0%} taken away; probability lost, and more than with "
        "random tokens; then the same with the last token kept. The nearest tokens "
        f"alone lose {first['nearest_drop']['value']:.3f} and, with the last kept, "
        f"{first['last_kept']['nearest_drop']['value']:.3f} (Keras):",
        _table(
            [
                *("model", "method", "lost", "more than random"),
                *("last kept: lost", "more than random"),
            ],
            rows,
        ),
        "Rank correlation of two models' scores, and of the first with itself under "
        "another seed:",
        _table(
            ["method", "models", "correlation", "with itself"],
            [
                [
                    *(method, f"{found['a']}, {found['b']}"),
                    with_interval(found["rank_correlation"]),
                    with_interval(found["ceiling"]),
                ]
                for method, found in content["compression"].items()
            ],
        ),
    )


def _as_it_is(content):
    """Show a result that has no tables of its own: its numbers, its lists of rows."""
    single, tables = [], []

    def visit(value, names):
        if isinstance(value, dict):
            for name, part in value.items():
                visit(part, [*names, str(name)])
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            tables.append((", ".join(names), _rows(value)))
        elif isinstance(value, (bool, int, float, str)):
            single.append([", ".join(names), _short(value)])

    others = ("machine", "builds", "commit", "date", "command")
    visit({k: v for k, v in content.items() if k not in others}, [])
    parts = [_table(["", "value"], single)] if single else []
    for name, table in tables:
        parts += [f"{name}:", table]
    return _joined(*parts) or "The file holds no numbers."


def _rows(rows):
    names = dict.fromkeys(
        name
        for row in rows
        for name, value in row.items()
        if isinstance(value, (bool, int, float, str))
    )
    return _table(
        [name.replace("_", " ") for name in names],
        [[_short(row.get(name, "-")) for name in names] for row in rows],
    )


def _short(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else value


TABLES = {
    "training": _training,
    "generation": _generation,
    "quality": _quality,
    "parallel": _parallel,
    "scaling_model": _scaling_model,
    "quantization_strategies": _strategies,
    "quantization": _quantization,
    "distillation": _distillation,
    "decode": _decode,
    "serving": _serving,
    "generalisation": _generalisation,
    "explanation": _explanation,
}

# Tables within docs/comparison.md.
COMPARED = {"decode": _decode, "training": _training, "generation": _generation}


def main(arguments=None):
    """Write the pages, or say which of them is not what the results give."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    pages = {PAGE: make_page()}
    if COMPARISON.exists():
        pages[COMPARISON] = make_comparison(COMPARISON.read_text("utf-8"))
    stale = [
        path
        for path, text in pages.items()
        if not path.exists() or path.read_text("utf-8") != text
    ]
    for path in stale:
        if not options.check:
            path.write_text(pages[path], "utf-8")
        print(f"{'stale' if options.check else 'wrote'} {path.relative_to(ROOT)}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
