"""Write docs/numbers.md: every benchmark's command, commit, machine and result.

    python benchmarks/numbers_page.py [--check]

The page is made from `benchmarks/results/*.json` alone, and so are the tables of
measurements in docs/comparison.md. With `--check` nothing is written: status 1 says
that a page is not what the results give. What a benchmark measures, and its command,
stand in its own docstring, its tables in `numbers.md.j2`. (A file called `numbers.py`
would stand in the way of Python's own `numbers`.)

The date is the result's own `date`, else that under which the page has the same bytes
already, else that of the commit that wrote the file, else the file's.
"""

import argparse
import ast
import contextlib
import datetime
import functools
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jinja2

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
    *("finetune", "real"),
    *("decode", "speculation", "browser", "serving", "server"),
    *("optimize", "explanation"),
)

PICTURES = {"decode": "edge.png", "training": "overview.png"}

# Results that have a table within docs/comparison.md.
COMPARED = ("decode", "training", "generation")


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
        name = match[1]
        if name not in COMPARED:
            raise SystemExit(
                f"Expected a table of {', '.join(COMPARED)}. Received: {name!r}."
            )
        content = json.loads((Path(results) / f"{name}.json").read_text("utf-8"))
        tables = tables_of(name, content)
        return f"<!-- numbers: {name} -->\n\n{tables}\n\n<!-- end -->"

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
    parts += [tables_of(name, content), ""]
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


def tables_of(name, content):
    """Return the tables of a result as Markdown.

    Args:
        name: As in `results/NAME.json`.
        content: Of that file.
    """
    text = getattr(_templates(), name)(content)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


@functools.cache
def _templates():
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.ChainableUndefined,
        extensions=["jinja2.ext.do"],
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["table"] = _table
    environment.filters["f"] = _format
    return environment.get_template("numbers.md.j2").module


def _format(value, form, divisor=1, error=None):
    """Write a number, with its error behind; what was not measured is a dash."""
    if value is None or isinstance(value, jinja2.Undefined):
        return "-"
    text = format(value / divisor if divisor != 1 else value, form)
    if error is None or isinstance(error, jinja2.Undefined):
        return text
    return f"{text} ± {error:{form}}"


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
