"""report.html: the report as people read it, one file that needs nothing else.

Style and pictures are inside it; it asks no network for anything and runs no script.
What comes from outside, such as names and generated text, is escaped by construction:
`_tag` escapes whatever is not an element already.
"""

import base64
import datetime
import html
import importlib.util
import os
import shlex
import tempfile
from collections.abc import Iterable
from pathlib import Path

from gpt_tf import files
from gpt_tf.evaluation import pictures as drawing
from gpt_tf.evaluation.budgets import KINDS, shown
from gpt_tf.evaluation.estimate import estimate_error
from gpt_tf.evaluation.pictures import (
    format_interval,
    format_number,
    format_percent,
)
from gpt_tf.evaluation.report import write_report

PICTURES = {
    "pareto": drawing.draw_pareto,
    "latency": drawing.draw_latency,
    "sizes": drawing.draw_sizes,
    "accuracy": drawing.draw_accuracy,
}

_NOTHING = "\N{EN DASH}"
_SPACE = "\N{NO-BREAK SPACE}"


def publish(report: dict, folder: str | os.PathLike) -> list[Path]:
    """Write a report for programs and for people into a folder.

    Each file is written whole or not at all.

    Args:
        report: As `gpt_tf.evaluation.report` states it.
        folder: Where `report.json`, the PNG pictures and `report.html` go.

    Returns:
        The paths of what was written.

    Raises:
        InputError: A number in the report is not finite.

    Example:
        >>> publish(report, "runs/optimized")
    """
    folder = Path(folder)
    write_report(folder / "report.json", report)
    pictures = write_pictures(report, folder)
    write_page(report, folder / "report.html", pictures)
    return [folder / "report.json", *pictures, folder / "report.html"]


def write_pictures(report: dict, folder: str | os.PathLike) -> list[Path]:
    """Draw what there is to draw, as PNG.

    A picture of an earlier report for which this one has no numbers is removed.

    Args:
        report: As `gpt_tf.evaluation.report` states it.
        folder: Where `pareto.png`, `latency.png`, `sizes.png` and `accuracy.png` go.

    Returns:
        The paths of those that were written; none where matplotlib is not installed,
        as on a device.
    """
    folder = Path(folder)
    can_draw = _can_draw()
    written = []
    for name, draw in PICTURES.items():
        path = folder / f"{name}.png"
        if can_draw and draw(report, path):
            written.append(path)
        else:
            path.unlink(missing_ok=True)
    return written


def write_page(
    report: dict,
    path: str | os.PathLike,
    pictures: Iterable[str | os.PathLike] | None = None,
) -> None:
    """Write report.html, whole or not at all.

    Args:
        report: As `gpt_tf.evaluation.report` states it.
        path: The file.
        pictures: Paths of PNGs that `write_pictures` wrote, which are put into the
            page; None draws them.

    Example:
        >>> write_page(read_report("runs/optimized"), "report.html")
    """
    if pictures is None:
        with tempfile.TemporaryDirectory() as folder:
            return write_page(report, path, write_pictures(report, folder))
    drawn = {Path(picture).stem: Path(picture).read_bytes() for picture in pictures}
    text = _document(report, drawn, Path(path).parent)
    with files.atomic_file(path, "w") as file:
        file.write(text)


def _can_draw():
    return importlib.util.find_spec("matplotlib") is not None


_UNDRAWN = (
    "There are no pictures: matplotlib, which draws them, is not installed. Install it "
    "with: pip install matplotlib"
)


# Elements


class _Html(str):
    """Text that is HTML already."""


def _tag(name, /, *children, **attributes):
    """An element; children that are no elements are escaped, None is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in ("img", "meta", "br"):
        return _Html(f"<{name}{written}>")
    return _Html(f"<{name}{written}>{_join(*children)}</{name}>")


def _join(*children):
    return _Html(
        "".join(
            child if isinstance(child, _Html) else html.escape(str(child))
            for child in _flat(children)
        )
    )


def _flat(children):
    for child in children:
        if isinstance(child, list | tuple):
            yield from _flat(child)
        elif child is not None:
            yield child


def _section(anchor, title, *children):
    """A section, or None where all that it would show is None."""
    children = list(_flat(children))
    if not children:
        return None
    return _tag("section", _tag("h2", title), *children, id=anchor)


def _table(heads, rows, *, caption=None, cards=False, texts=()):
    """A table that scrolls in its own box; with `cards`, cards on a phone.

    Columns in which no row says anything are left out.

    Args:
        heads: Titles of the columns.
        rows: Lists of cells; the first cell names the row. `_NOTHING` is empty.
        texts: Titles of columns of words, which are set to the left.
    """
    rows = [list(row) for row in rows]
    if not rows:
        return None
    kept = [
        column
        for column in range(len(heads))
        if column == 0 or any(row[column] != _NOTHING for row in rows)
    ]
    kinds = ["text" if head in texts else "num" for head in heads]
    head = [
        _tag("th", heads[column], scope="col", class_=kinds[column] if column else None)
        for column in kept
    ]
    body = []
    for row in rows:
        cells = [_tag("th", row[0], scope="row")]
        for column in kept[1:]:
            label = _plain(heads[column]) if cards else None
            shown = (
                _tag("span", _NOTHING, title="not measured")
                if row[column] == _NOTHING
                else row[column]
            )
            cells.append(
                _tag("td", _tag("div", shown), class_=kinds[column], data_label=label)
            )
        body.append(_tag("tr", cells))
    table = _tag(
        "table",
        _tag("caption", caption) if caption else None,
        _tag("thead", _tag("tr", head)),
        _tag("tbody", body),
        class_="cards" if cards else None,
    )
    return _tag("div", table, class_="scroll", tabindex="0", role="group")


def _plain(head):
    return head if not isinstance(head, _Html) else head.split(">")[1].split("<")[0]


def _term(text, anchor):
    """A word with a link to what it means."""
    return _tag("a", text, href=f"#term-{anchor}", class_="term")


def _picture(drawn, name, alt, caption):
    if name not in drawn:
        return None
    data = base64.b64encode(drawn[name]).decode()
    # A PNG states its size at a fixed place.
    width, height = (int.from_bytes(drawn[name][at : at + 4], "big") for at in (16, 20))
    return _tag(
        "figure",
        _tag(
            "img",
            src=f"data:image/png;base64,{data}",
            alt=alt,
            width=width,
            height=height,
        ),
        _tag("figcaption", caption),
        class_="picture",
    )


# Numbers


def _unit(value, unit):
    return _NOTHING if value is None else f"{format_number(value)}{_SPACE}{unit}"


def _share(value):
    """0.413 as 41.3 %."""
    return _NOTHING if value is None else f"{format_number(value * 100)}{_SPACE}%"


def _change(value):
    """0.021 as +2.1 %."""
    if value is None:
        return _NOTHING
    return format_percent(value).replace(" ", _SPACE)


def _megabytes(value):
    return _NOTHING if value is None else _unit(value / 1e6, "MB")


def _interval(interval, unit="", is_change=False):
    """A value with its interval beneath; of a change or share, in percent."""
    if not interval:
        return _NOTHING
    scale, sign = (100.0 if unit == "%" else 1.0), ("+" if is_change else "")
    if interval["low"] == interval["high"]:
        # As of the reference against itself.
        return _unit(interval["value"] * scale, unit).rstrip(_SPACE)
    value, low, high = format_interval(interval, scale, sign)
    unit = f"{_SPACE}{unit}" if unit else ""
    return _join(
        f"{value}{unit} ", _tag("small", f"({low} to {high}{unit})", class_="interval")
    )


def _ms(value):
    """Milliseconds; seconds where these are thousands."""
    if value is not None and value >= 1000:
        return _unit(value / 1000, "s")
    return _unit(value, "ms")


def _spread(spread, part):
    return _NOTHING if not spread else _ms(spread.get(part))


def _median(spread):
    """A median with its 95th percentile beneath."""
    if not spread:
        return _NOTHING
    return _join(
        f"{_spread(spread, 'median')} ",
        _tag("small", f"(p95 {_spread(spread, 'p95')})", class_="interval"),
    )


def _seconds(value):
    if value is None:
        return _NOTHING
    if value < 60:
        return _unit(round(value, 1) if value >= 1 else value, "s")
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min"), (seconds, "s"))
    return " ".join(_unit(number, unit) for number, unit in parts if number)


def _day(made_at):
    try:
        moment = datetime.datetime.fromisoformat(made_at)
    except (TypeError, ValueError):
        return str(made_at)
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _count(number, one, many=None):
    return f"{number:,}{_SPACE}{one if number == 1 else many or one + 's'}"


# The page


def _document(report, drawn, folder):
    title, head = _answer(report, folder)
    sections = [
        section
        for section in (
            _budgets(report),
            _plane(report, drawn),
            _all_files(report, drawn),
            _reasons(report),
            _estimates(report),
            _latency(report, drawn),
            _accuracy(report, drawn),
            _explanations(report["explanations"]),
            _making(report),
            _notes(report),
        )
        if section is not None
    ]
    style = _Html(f"<style>{_STYLE}</style>")
    page = _tag(
        "html",
        _tag(
            "head",
            _tag("meta", charset="utf-8"),
            _tag(
                "meta", name="viewport", content="width=device-width, initial-scale=1"
            ),
            _tag("meta", name="color-scheme", content="light dark"),
            _tag("meta", name="generator", content="gpt-tf"),
            _tag("title", f"{title} - gpt-tf report"),
            style,
        ),
        _tag(
            "body",
            _tag("header", head),
            _contents(sections),
            _tag("main", sections, _glossary()),
            _tag(
                "footer",
                _tag("p", f"Measured by gpt-tf, {_day(report['made_at'])}. "),
                _tag("p", "The same numbers for programs: report.json."),
                _tag("p", _UNDRAWN) if not drawn and not _can_draw() else None,
            ),
        ),
        lang="en",
    )
    return f"<!DOCTYPE html>\n{page}\n"


def _contents(sections):
    """Links to the sections, read back from their headings."""
    links = []
    for section in sections:
        anchor = section.partition('id="')[2].partition('"')[0]
        title = _Html(section.partition("<h2>")[2].partition("</h2>")[0])
        links.append(_tag("li", _tag("a", title, href=f"#{anchor}")))
    links.append(_tag("li", _tag("a", "Terms", href="#terms")))
    return _tag("nav", _tag("ul", links), aria_label="Contents")


def _entries_by_name(report):
    return {entry["name"]: entry for entry in report["entries"]}


def _answer(report, folder):
    """The title and the first thing that is read."""
    recommendation = report["recommendation"]
    if recommendation is None:
        return _summary(report, folder)
    scenario = recommendation.get("scenario")
    choice = _entries_by_name(report).get(recommendation.get("choice"))
    eyebrow = f"for a {scenario}" if scenario not in (None, "custom") else ""
    if choice is None:
        title = "Nothing fits the budgets"
        return title, _join(
            _tag("p", f"gpt-tf report {eyebrow}", class_="eyebrow"),
            _tag("h1", title),
            _tag(
                "p",
                f"Of {_count(len(report['entries']), 'file')} none stays within all "
                "of them.",
            ),
            _nearest_miss(recommendation),
        )
    basis = recommendation.get("basis")
    return choice["name"], _join(
        _tag("p", f"Recommended file {eyebrow}", class_="eyebrow"),
        _tag("h1", choice["name"]),
        _tag("p", _what_it_is(choice), class_="what"),
        _tag("p", f"The choice is {basis}.", class_="warn")
        if basis not in (None, "measured")
        else None,
        _figures(report, choice),
        _sample(recommendation.get("sample")),
        _command(choice, recommendation.get("sample"), folder),
    )


def _nearest_miss(recommendation):
    miss = recommendation.get("nearest_miss")
    if not miss:
        return None
    return _tag("p", _sentence(miss), class_="miss")


def _sentence(said):
    """A sentence, of a text or of a dict that has one."""
    if not isinstance(said, dict):
        return str(said)
    name, sentence = said.get("name"), said.get("sentence")
    if name and sentence and name not in sentence:
        return f"{name}. {sentence}"
    return sentence or name or ""


def _what_it_is(entry):
    parts = [_MODES.get(entry["mode"], entry["mode"])]
    if entry["parameters"]:
        parts.append(_count(entry["parameters"], "parameter"))
    if entry["context_length"]:
        parts.append(f"context of {_count(entry['context_length'], 'token')}")
    if entry["made_from"]:
        parts.append(str(entry["made_from"]).rstrip("."))
    return ", ".join(str(part) for part in parts if part)


_MODES = {
    "float32": "float32 weights",
    "float16": "float16 weights, computed in float32",
    "dynamic_int8": "int8 weights, activations quantised as it runs",
    "int8": "int8 weights and activations",
    "int8_full": "int8 weights, activations and cache",
    "int16x8": "int8 weights, int16 activations",
    "int4": "int4 weights",
    "keras": "Keras model in float32",
    "keras_qat": "quantisation-aware Keras model",
}


def _figures(report, entry):
    """Size, latency and perplexity, and what each is beside the reference.

    Of each: what it is, the number, a detail, and `(sentence, is_better)` or None.
    """
    reference = _entries_by_name(report).get(report["reference"])
    is_reference = reference is not None and reference["name"] == entry["name"]
    other = None if is_reference else reference
    shown = []
    if entry["size_bytes"]:
        beside = None
        if other is not None and other["size_bytes"]:
            ratio = other["size_bytes"] / entry["size_bytes"]
            beside = _times(ratio, "smaller than", "the size of", other["name"])
        shown.append(("Size", _megabytes(entry["size_bytes"]), None, beside))
    spread = (entry["latency"] or {}).get("inter_token_latency_ms")
    if spread:
        beside = None
        others = ((other or {}).get("latency") or {}).get("inter_token_latency_ms")
        if others:
            ratio = others["p95"] / spread["p95"]
            beside = _times(ratio, "faster than", "the latency of", other["name"])
        shown.append(
            (
                _term("Latency, p95", "inter-token"),
                _spread(spread, "p95"),
                f"between two tokens; median {_spread(spread, 'median')}",
                beside,
            )
        )
    accuracy = entry["accuracy"] or {}
    if accuracy.get("perplexity"):
        beside, increase = None, accuracy.get("perplexity_increase")
        if increase and other is not None:
            value, low, high = format_interval(increase, 100, "+")
            beside = f"{value}{_SPACE}% ({low} to {high}{_SPACE}%) against "
            beside = (beside + other["name"], increase["value"] <= 0)
        value, low, high = format_interval(accuracy["perplexity"])
        shown.append(
            (
                _term("Perplexity", "perplexity"),
                value,
                f"95{_SPACE}% interval {low} to {high}",
                beside,
            )
        )
    first = (entry["latency"] or {}).get("time_to_first_token_ms")
    if first:
        prompt = entry["latency"].get("prompt_tokens")
        shown.append(
            (
                _term("First token", "first-token"),
                _spread(first, "median"),
                f"median, after a prompt of {_count(prompt, 'token')}"
                if prompt
                else "median",
                None,
            )
        )
    if not shown:
        return None
    return _tag(
        "dl",
        [
            _tag(
                "div",
                _tag("dt", label),
                _tag("dd", value, class_="big"),
                _tag("dd", detail) if detail else None,
                _tag("dd", beside[0], class_="better" if beside[1] else "cost")
                if beside
                else None,
            )
            for label, value, detail, beside in shown
        ],
        class_="figures",
    )


def _times(ratio, better, share, name):
    """Compare with another file: a sentence, and whether this one is better."""
    if ratio >= 1.05:
        return f"{format_number(_rounded(ratio))} times {better} {name}", True
    if ratio > 1 / 1.05:
        return f"{share} {name}, within 5{_SPACE}%", True
    return f"{format_number(_rounded(1 / ratio))} times {share} {name}", False


def _rounded(ratio):
    return round(ratio) if ratio >= 10 else round(ratio, 1)


def _sample(sample):
    if not sample or not sample.get("text"):
        return None
    return _tag(
        "figure",
        _tag(
            "pre",
            _tag("b", sample.get("prompt") or ""),
            sample["text"],
            class_="sample",
            tabindex="0",
        ),
        _tag("figcaption", "What it writes: the prompt is bold, the rest is its own."),
    )


def _command(entry, sample, folder):
    prompt = (sample or {}).get("prompt") or "def "
    path = entry["path"] or entry["name"]
    command = f"gpt-tf generate --model {shlex.quote(str(path))}"
    command += f" --prompt {shlex.quote(prompt)}"
    # Paths of what lies elsewhere are as they were given.
    is_below = not os.path.isabs(path) and (folder / path).exists()
    where = " in the folder of this page" if is_below else ""
    return _tag(
        "figure",
        _tag("pre", _tag("code", command), class_="command", tabindex="0"),
        _tag("figcaption", f"Run it{where}."),
    )


def _summary(report, folder):
    """Without a recommendation: what is best in each way."""
    entries = report["entries"]
    title = f"{_count(len(entries), 'file')} measured"
    if len(entries) == 1:
        title = entries[0]["name"]
        return title, _join(
            _tag("p", "Measured file", class_="eyebrow"),
            _tag("h1", title),
            _tag("p", _what_it_is(entries[0]), class_="what"),
            _figures(report, entries[0]),
            _command(entries[0], None, folder),
        )
    bests = []
    for label, value_of, write in (
        ("Smallest", lambda entry: entry["size_bytes"], _megabytes),
        (
            "Lowest latency between tokens, p95",
            lambda entry: (
                (entry["latency"] or {}).get("inter_token_latency_ms") or {}
            ).get("p95"),
            _ms,
        ),
        (
            "Lowest perplexity",
            lambda entry: ((entry["accuracy"] or {}).get("perplexity") or {}).get(
                "value"
            ),
            format_number,
        ),
    ):
        measured = [entry for entry in entries if value_of(entry) is not None]
        if measured:
            best = min(measured, key=value_of)
            bests.append((label, write(value_of(best)), best["name"]))
    return title, _join(
        _tag("p", "gpt-tf report", class_="eyebrow"),
        _tag("h1", title),
        _tag(
            "dl",
            [
                _tag(
                    "div",
                    _tag("dt", label),
                    _tag("dd", value, class_="big"),
                    _tag("dd", name),
                )
                for label, value, name in bests
            ],
            class_="figures",
        )
        if bests
        else None,
    )


def _budgets(report):
    budgets = drawing.budgets_of(report)
    recommendation = report["recommendation"]
    if not budgets:
        said = "None was set." if recommendation is not None else None
        return _section("budgets", "Budgets", _tag("p", said) if said else None)
    candidates = drawing.candidates_by_name(report)
    said = recommendation or {}
    shown_one = said.get("choice") or (said.get("nearest_miss") or {}).get("name")
    names = [shown_one] if shown_one in candidates else list(candidates)
    rows = []
    for name in names:
        row = [name]
        for budget, limit in budgets.items():
            value = candidates[name].of(budget)
            if value is None:
                row.append("not measured")
                continue
            row.append(
                _join(
                    _nonbreaking(shown(budget, value.number)),
                    ", estimated " if value.is_estimate else " ",
                    _verdict(not candidates[name].breaks(budget, limit)),
                )
            )
        rows.append(row)
    heads = ["File", *(_limit(name, limit) for name, limit in budgets.items())]
    return _section(
        "budgets", "Budgets", _table(heads, rows, texts=heads, cards=len(rows) == 1)
    )


def _limit(name, limit):
    """A budget as a column is called."""
    kind = KINDS[name]
    word = "at least" if kind.is_least else "at most"
    what = kind.what[0].upper() + kind.what[1:]
    return f"{what}: {word} {_nonbreaking(shown(name, limit))}"


def _nonbreaking(text):
    return text.replace(" ", _SPACE)


def _verdict(is_met):
    if is_met:
        return _tag("span", "\N{CHECK MARK} met", class_="met")
    return _tag("span", "\N{BALLOT X} not met", class_="unmet")


def _plane(report, drawn):
    points, _ = drawing._pareto_points(report)
    frontier = [name for _, _, name in drawing.frontier_of(drawing._plane(points))]
    return _section(
        "pareto",
        "Accuracy against latency",
        _picture(
            drawn,
            "pareto",
            f"Perplexity against inter-token latency of {_count(len(points), 'file')}. "
            f"On the frontier, from fast to accurate: {', '.join(frontier)}.",
            "A point further left is faster, a lower one more accurate, a smaller one "
            "a smaller file. On the line are the files than which none is better in "
            f"both: {', '.join(frontier)}.",
        ),
    )


def _name_cell(report, entry):
    words = []
    if entry["name"] == (report["recommendation"] or {}).get("choice"):
        words.append(_tag("span", "recommended", class_="tag good"))
    if entry["name"] == report["reference"]:
        words.append(_tag("span", "reference", class_="tag"))
    return _join(entry["name"], [_join(" ", word) for word in words])


def _all_files(report, drawn):
    worth, speed = [], []
    for entry in report["entries"]:
        name = _name_cell(report, entry)
        accuracy, latency = entry["accuracy"] or {}, entry["latency"] or {}
        count = entry["parameters"]
        worth.append(
            [
                name,
                entry["mode"] or _NOTHING,
                f"{count:,}" if count else _NOTHING,
                _megabytes(entry["size_bytes"]),
                _interval(accuracy.get("perplexity")),
                _interval(accuracy.get("perplexity_increase"), "%", is_change=True),
                _interval(accuracy.get("bits_per_byte"), "bits"),
                _interval(accuracy.get("token_accuracy"), "%"),
            ]
        )
        spread = latency.get("inter_token_latency_ms")
        speed.append(
            [
                name,
                *(_spread(spread, part) for part in ("median", "p95", "p99", "worst")),
                _median(latency.get("time_to_first_token_ms")),
                _unit(latency.get("tokens_per_s"), "tokens/s"),
                _median(latency.get("response_time_ms")),
                _megabytes(latency.get("peak_memory_bytes")),
                _share(latency.get("bandwidth_share")),
            ]
        )
    has_speed = any(entry["latency"] for entry in report["entries"])
    return _section(
        "files",
        "All files",
        _table(
            [
                "File",
                "Mode",
                "Parameters",
                "Size",
                _term("Perplexity", "perplexity"),
                "Above the reference",
                _term("Bits per byte", "bits-per-byte"),
                _term("Token accuracy", "token-accuracy"),
            ],
            worth,
            caption=f"What they are, and how well they predict; in brackets "
            f"95{_SPACE}% intervals"
            if any(entry["accuracy"] for entry in report["entries"])
            else "What they are",
            texts=("Mode",),
            cards=True,
        ),
        _table(
            [
                "File",
                _term("Between tokens, median", "inter-token"),
                _term("p95", "percentile"),
                _term("p99", "percentile"),
                "Worst",
                _term("First token", "first-token"),
                _term("Tokens per second", "tokens-per-second"),
                _term("Response time", "response-time"),
                _term("Peak memory", "peak-memory"),
                _term("Share of bandwidth limit", "bandwidth"),
            ],
            speed,
            caption=_join("How fast they are", _conditions(report)),
            cards=True,
        )
        if has_speed
        else None,
        _picture(
            drawn,
            "sizes",
            "Bars: the size of each file and the peak memory of a process that runs "
            "it, as in the tables.",
            "Size of the file and, where it was measured, memory of a process that "
            "runs it, Python included.",
        ),
    )


def _conditions(report):
    """How latency was measured, where that is the same for all files."""
    found = []
    for part, one, many in (
        ("prompt_tokens", "prompt token", None),
        ("new_tokens", "new token", None),
        ("threads", "thread", None),
        ("repetitions", "repetition", None),
    ):
        values = {
            entry["latency"].get(part)
            for entry in report["entries"]
            if entry["latency"]
        }
        if len(values) == 1 and None not in values:
            found.append(_count(values.pop(), one, many))
    return f": {', '.join(found)}" if found else ""


def _reasons(report):
    recommendation = report["recommendation"]
    if recommendation is None:
        return None
    why = recommendation.get("why") or []
    why = [why] if isinstance(why, str) else why
    ruled_out = recommendation.get("ruled_out") or []
    dominated = recommendation.get("dominated") or []
    runner_up = recommendation.get("runner_up")
    cost = recommendation.get("runner_up_cost")
    cost = [cost] if isinstance(cost, str | dict) else cost or []
    return _section(
        "reasons",
        "Why this one" if recommendation.get("choice") else "Why none",
        _tag("ul", [_tag("li", _sentence(reason)) for reason in why]) if why else None,
        _tag("h3", "Runner-up") if runner_up else None,
        [_tag("p", _sentence(said)) for said in cost] or None,
        _table(
            ["File", "Ruled out by", "Because"],
            [
                [row["name"], _constraint(row.get("constraint")), _because(row)]
                for row in ruled_out
            ],
            caption="Ruled out",
            texts=("Ruled out by", "Because"),
            cards=True,
        ),
        _table(
            ["File", "Never better than", "Because"],
            [[row["name"], row["by"], _because(row)] for row in dominated],
            caption="Within the budgets, but in nothing better than another",
            texts=("Never better than", "Because"),
            cards=True,
        ),
    )


def _because(row):
    return row.get("sentence") or _NOTHING


def _constraint(constraint):
    if constraint in KINDS:
        return KINDS[constraint].what
    return _words(constraint) if constraint else _NOTHING


def _words(name):
    """A key as words."""
    return str(name).replace("_", " ")


def _estimates(report):
    """What was estimated before measuring, beside what was measured."""
    rows, within, count = [], 0, 0
    for entry in report["entries"]:
        errors = estimate_error(entry)
        if not errors:
            continue
        row = [entry["name"]]
        for name, (_, write) in _ESTIMATED.items():
            if name not in errors:
                row.append(_NOTHING)
                continue
            found = errors[name]
            within, count = within + found["within"], count + 1
            row.append(
                _join(
                    f"{write(found['estimated'])}, then {write(found['measured'])} ",
                    _tag("small", _off_by(found["ratio"]), class_="interval"),
                )
            )
        rows.append(row)
    if not rows:
        return None
    return _section(
        "estimates",
        "Estimate against measurement",
        _tag(
            "p",
            "Before anything was measured, this was computed from the model's sizes "
            "and the rate at which the machine reads memory. Of "
            f"{_count(count, 'measurement')} {within} fell within the range that was "
            "stated with the estimate.",
        ),
        _table(
            ["File", *(title for title, _ in _ESTIMATED.values())],
            rows,
            caption="Estimated, then measured",
            cards=True,
        ),
    )


def _off_by(ratio):
    """How far an estimate divided by its measurement is from 1."""
    if 0.995 < ratio < 1.005:
        return "right"
    factor, word = (ratio, "high") if ratio > 1 else (1 / ratio, "low")
    if factor < 1.1:
        return f"{_share(abs(ratio - 1))} too {word}"
    return f"{format_number(_rounded(factor))} times too {word}"


_ESTIMATED = {
    "size_bytes": ("Size", _megabytes),
    "latency_ms": ("Between tokens, median", _ms),
    "first_token_ms": ("First token, median", _ms),
    "memory_bytes": ("Peak memory", _megabytes),
}


def _latency(report, drawn):
    measured = [entry for entry in report["entries"] if entry["latency"]]
    if not measured:
        return None
    starts, contexts, threads, requests = [], [], [], []
    for entry in measured:
        name, latency = entry["name"], entry["latency"]
        starts.append(
            [
                name,
                _ENGINES.get(latency.get("engine"), latency.get("engine") or _NOTHING),
                _median(latency.get("load_ms")),
                _median(latency.get("cold_start_ms")),
                *(
                    _spread(latency.get("time_to_first_token_ms"), part)
                    for part in ("median", "p95", "p99", "worst")
                ),
                *_middle_half(latency.get("inter_token_latency_ms")),
                _unit(latency.get("energy_j_per_token"), "J"),
            ]
        )
        contexts += [
            [
                name,
                _count(row["context"], "token"),
                _median(row.get("time_to_first_token_ms")),
                _median(row.get("inter_token_latency_ms")),
            ]
            for row in latency.get("by_context") or []
        ]
        threads += [
            [
                name,
                _count(row["threads"], "thread"),
                *(
                    _spread(row.get("inter_token_latency_ms"), part)
                    for part in ("median", "p95", "p99")
                ),
            ]
            for row in latency.get("by_threads") or []
        ]
        requests += [
            [
                name,
                _count(row["requests"], "request"),
                _unit(row.get("tokens_per_s"), "tokens/s"),
                _unit(
                    None
                    if row.get("tokens_per_s") is None
                    else row["tokens_per_s"] / row["requests"],
                    "tokens/s",
                ),
            ]
            for row in latency.get("throughput") or []
        ]
    return _section(
        "latency",
        "Latency in detail",
        _picture(
            drawn,
            "latency",
            "Time between tokens and until the first token of each file, and how it "
            "changes with context, threads and requests; the numbers are in the tables "
            "below.",
            "A dot is the median, a bar's end the 95th percentile, a cross the 99th.",
        ),
        _table(
            [
                "File",
                "Engine",
                _term("Load time", "load-time"),
                _term("Cold start", "cold-start"),
                _term("First token, median", "first-token"),
                "p95",
                "p99",
                "Worst",
                _term("Between tokens, middle half", "middle-half"),
                "Tokens timed",
                _term("Energy per token", "energy"),
            ],
            starts,
            caption="Starting, the first token, and spread",
            texts=("Engine",),
            cards=True,
        ),
        _folded(
            "By context length",
            _table(
                ["File", "Context", "First token", "Between tokens"],
                contexts,
                texts=("Context",),
            ),
        ),
        _folded(
            "By threads",
            _table(
                ["File", "Threads", "Between tokens, median", "p95", "p99"],
                threads,
                texts=("Threads",),
            ),
        ),
        _folded(
            "By concurrent requests",
            _table(
                ["File", "At once", "All together", "Each"],
                requests,
                texts=("At once",),
            ),
        ),
    )


_ENGINES = {"gpt_tf": "gpt_tf", "litert-lm": "LiteRT-LM", "keras": "Keras"}


def _middle_half(spread):
    """Quartiles, and of how many measurements."""
    spread = spread or {}
    quartiles = [spread.get(part) for part in ("q1", "q3")]
    count = spread.get("count")
    return (
        _NOTHING
        if None in quartiles
        else f"{' to '.join(map(format_number, quartiles))}{_SPACE}ms",
        f"{count:,}" if count else _NOTHING,
    )


def _folded(title, *children):
    children = list(_flat(children))
    if not children:
        return None
    return _tag("details", _tag("summary", title), children)


def _accuracy(report, drawn):
    rows = []
    for entry in report["entries"]:
        accuracy = entry["accuracy"]
        if not accuracy:
            continue
        parsed = accuracy.get("parsed") or {}
        of_true = parsed.get("of_true_text")
        rows.append(
            [
                entry["name"],
                _interval(accuracy.get("divergence_nats"), "nats"),
                _interval(accuracy.get("top1_agreement"), "%"),
                _join(
                    _interval(parsed.get("share"), "%"),
                    f" of {_count(parsed['count'], 'completion')}"
                    if parsed.get("count")
                    else "",
                    f"; of the true text {_share(of_true)}"
                    if of_true is not None
                    else "",
                )
                if parsed
                else _NOTHING,
                _count(accuracy["tokens"], "token")
                if accuracy.get("tokens")
                else _NOTHING,
                f"{accuracy['blocks']:,}" if accuracy.get("blocks") else _NOTHING,
            ]
        )
    if not rows:
        return None
    reference = report["reference"]
    return _section(
        "accuracy",
        "Accuracy in detail",
        _tag(
            "p",
            *(
                [
                    "The reference is ",
                    _tag("b", reference),
                    ". Where the interval of an increase contains 0, the measurement "
                    "cannot tell that file from it.",
                ]
                if reference
                else ["There is no reference: each file is judged by the text alone."]
            ),
        ),
        _picture(
            drawn,
            "accuracy",
            "Perplexity and divergence of each file with intervals, as in the tables.",
            f"A dot is the measured value, the bar its 95{_SPACE}% interval.",
        ),
        _table(
            [
                "File",
                _term("KL divergence", "kl"),
                _term("Same likeliest token", "top1"),
                _term("Completions that parse", "parsed"),
                "Judged on",
                "Blocks",
            ],
            rows,
            cards=True,
        ),
    )


_EXPLAINED = {
    "drop": "Without its highest tokens the probability falls by",
    "random_drop": "Without random tokens",
    "difference": "Difference",
    "holds": "Better than random",
    "a": "First",
    "b": "Second",
    "prompts": "Prompts",
    "rank_correlation": "Rank correlation of the two",
    "ceiling": "Of the first with itself",
}


def _explanations(explanations):
    """The deletion test, and what compression does to explanations."""
    if not explanations:
        return None
    methods = explanations.get("methods") or {}
    compression = explanations.get("compression") or {}
    prompts, fraction = explanations.get("prompts"), explanations.get("fraction")
    said = (
        "An explanation says which tokens of a prompt made the model expect the next "
        "one. If it is right, taking away its highest tokens lowers that probability "
        "more than taking away as many random ones."
    )
    if fraction is not None:
        said += f" Here {_share(fraction)} of the tokens were taken away"
        said += f" from each of {_count(prompts, 'prompt')}." if prompts else "."
    known = ("methods", "compression", "prompts", "prompt_tokens", "fraction")
    others = {
        name: value
        for name, value in explanations.items()
        if name not in known and value is not None
    }
    return _section(
        "explanations",
        "Are explanations worth anything?",
        _tag("p", said),
        _table_of_dicts("Method", methods, "Deletion test; probabilities from 0 to 1"),
        _table_of_dicts(
            "Method",
            compression,
            "Does compression change the explanation? 1 is the same order of tokens, "
            "0 an unrelated one",
        ),
        _facts(others),
    )


def _table_of_dicts(head, rows, caption):
    """A table of dicts by name, whatever parts these have."""
    rows = {
        name: value
        if isinstance(value, dict) and not _is_interval(value)
        else {"value": value}
        for name, value in (rows or {}).items()
    }
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    heads = [_EXPLAINED.get(part, _words(part)) for part in parts]
    texts = {
        title
        for title, part in zip(heads, parts, strict=True)
        if any(isinstance(row.get(part), str | bool) for row in rows.values())
    }
    return _table(
        [head, *heads],
        [
            [name, *(_shown(row.get(part)) for part in parts)]
            for name, row in rows.items()
        ],
        caption=caption,
        texts=texts,
        cards=True,
    )


def _is_interval(value):
    return isinstance(value, dict) and {"value", "low", "high"} <= value.keys()


def _shown(value):
    """Any JSON value, for people."""
    if value is None or value == {} or value == []:
        return _NOTHING
    if _is_interval(value):
        return _interval(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return format_number(value)
    if isinstance(value, dict):
        parts = ((_words(key), _shown(part)) for key, part in value.items())
        return _join([_join(f"{key} ", part, "; ") for key, part in parts])
    if isinstance(value, list):
        return _join([_join(_shown(part), "; ") for part in value])
    return str(value)


_PACKAGES = ("tf_keras",)


def _facts(facts):
    """A list of names and values."""
    # Versions are by the names of packages, which may have an underscore.
    rows = [
        (key if key in _PACKAGES else _words(key), _shown(value))
        for key, value in facts.items()
        if value is not None
    ]
    if not rows:
        return None
    return _tag(
        "dl",
        [_tag("div", _tag("dt", key), _tag("dd", value)) for key, value in rows],
        class_="facts",
    )


def _making(report):
    stages = report["stages"] or []
    command = report["command"]
    command = shlex.join(command) if isinstance(command, list) else command
    seconds = [stage.get("seconds") or 0 for stage in stages]
    rows = [
        [
            stage.get("name") or _NOTHING,
            _seconds(stage.get("seconds")),
            "kept from before" if stage.get("reused") else "done",
            _tag("code", _line(stage["command"])) if stage.get("command") else _NOTHING,
        ]
        for stage in stages
    ]
    if len(stages) > 1:
        rows.append(["all", _seconds(sum(seconds)), "", ""])
    made = [
        [
            entry["name"],
            entry["path"] or _NOTHING,
            entry["made_from"] or _NOTHING,
            _config(entry["config"]),
            _tag("code", entry["sha256"], class_="hash")
            if entry["sha256"]
            else _NOTHING,
        ]
        for entry in report["entries"]
    ]
    return _section(
        "making",
        "How it was made",
        _tag("pre", _tag("code", command), class_="command") if command else None,
        _table(
            ["Stage", "Time", "This time", "Command"],
            rows,
            texts=("This time", "Command"),
            cards=True,
        ),
        _titled("Text that accuracy was measured on", _facts(_corpus(report))),
        _titled("Machine", _facts(_machine(report["machine"]))),
        _titled("Versions", _facts(report["versions"] or {})),
        _folded(
            "The files and their hashes",
            _table(
                ["File", "Path", "Made from", "Sizes", "SHA-256"],
                made,
                texts=("Path", "Made from", "Sizes", "SHA-256"),
                cards=True,
            ),
        ),
    )


def _line(command):
    return shlex.join(command) if isinstance(command, list) else command


def _titled(title, content):
    return None if content is None else [_tag("h3", title), content]


def _config(config):
    if not config:
        return _NOTHING
    return ", ".join(
        f"{_words(key)} {_plain_value(value)}" for key, value in config.items()
    )


def _plain_value(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _corpus(report):
    corpus = dict(report["corpus"] or {})
    if isinstance(corpus.get("bytes"), int | float):
        corpus["size"] = _megabytes(corpus.pop("bytes"))
    return corpus


def _machine(machine):
    facts = dict(machine or {})
    rates = facts.pop("read_bytes_per_s", None)
    if facts.get("memory_bytes"):
        facts["memory"] = _unit(facts.pop("memory_bytes") / 1e9, "GB")
    if isinstance(rates, dict) and rates:
        facts["memory is read at"] = ", ".join(
            f"{_unit(rate / 1e9, 'GB/s')} by {_count(int(threads), 'thread')}"
            for threads, rate in rates.items()
            if rate
        )
    return facts


def _notes(report):
    notes = report["notes"] or []
    return _section(
        "notes",
        "What to keep in mind",
        _tag("ul", [_tag("li", _sentence(note)) for note in notes]) if notes else None,
    )


_TERMS = (
    (
        "inter-token",
        "Inter-token latency",
        "The time from one token of the answer to the next, in milliseconds. It is "
        "what makes text seem to flow: a person reads about 5 to 10 tokens a second, "
        "one in 100 to 200 ms.",
    ),
    (
        "first-token",
        "Time to first token",
        "From the request until the first token of the answer is there: the whole "
        "prompt has to be read first, so it grows with the prompt.",
    ),
    (
        "response-time",
        "Response time",
        "From the request until the last token of the answer: the first token's time "
        "and that of all the others.",
    ),
    (
        "percentile",
        "Median, p95, p99, worst",
        "Of a hundred measurements put in order, the 50th, the 95th, the 99th and the "
        "last. The median is the usual case; p95 is exceeded by one in twenty, and is "
        "what a latency budget is about, since people notice the slow ones.",
    ),
    (
        "middle-half",
        "Middle half",
        "Between the 25th and the 75th of a hundred measurements put in order: how far "
        "usual ones differ from each other.",
    ),
    (
        "tokens-per-second",
        "Tokens per second",
        "How many tokens one request gets in a second while it is written. Throughput "
        "is the same of all concurrent requests together.",
    ),
    (
        "load-time",
        "Load time",
        "Opening the file in a process that runs already, until it can be asked.",
    ),
    (
        "cold-start",
        "Cold start",
        "From starting a new process to its first token, with everything that has to "
        "be loaded.",
    ),
    (
        "peak-memory",
        "Peak memory",
        "The most memory that a process running the file had at any moment, with "
        "Python and the libraries in it.",
    ),
    (
        "bandwidth",
        "Share of the bandwidth limit",
        "For each token all weights are read from memory, so memory's speed sets a "
        "limit to how fast tokens can come. 50 % means: half as fast as if nothing but "
        "reading took time. Weights that stay in the processor's cache can exceed it.",
    ),
    (
        "energy",
        "Energy per token",
        "Joules that the processor and its memory used per token, where the machine "
        "counts them; left out where it does not.",
    ),
    (
        "perplexity",
        "Perplexity",
        "How surprised a model is by text that it has not seen: 5 means as unsure "
        "as between 5 equally likely tokens. Lower is better. It depends on the "
        "tokenizer; only models with the same one can be compared by it.",
    ),
    (
        "bits-per-byte",
        "Bits per byte",
        "The same surprise, per byte of text instead of per token, so that models with "
        "different tokenizers can be compared. Lower is better.",
    ),
    (
        "token-accuracy",
        "Token accuracy",
        "The share of places at which the model's likeliest token is the one that "
        "follows.",
    ),
    (
        "kl",
        "KL divergence",
        "How far a model's probabilities for the next token are from the reference's, "
        "in nats; 0 means the same. It shows what compression changed even where "
        "perplexity stayed.",
    ),
    (
        "top1",
        "Same likeliest token",
        "The share of places at which a file and the reference expect the same token "
        "most: what a reader of greedy text would notice.",
    ),
    (
        "parsed",
        "Completions that parse",
        "Of code that a model continued, the share that Python's parser accepts. The "
        "true text cut in the same places does not always parse either.",
    ),
    (
        "interval",
        "95 % interval",
        "Other text of the same kind would have given another number. In 95 of 100 "
        "cases an interval made like this contains the true one. Two files whose "
        "intervals overlap widely may be equally good.",
    ),
    (
        "quantisation",
        "float32, int8, int4",
        "How many bits a weight takes: 32, 8 or 4. Fewer make a file smaller and "
        "usually faster, and its answers less exact.",
    ),
    (
        "distillation",
        "Teacher and student",
        "A student is a smaller model that learns from a larger one, its teacher, what "
        "that expects at every place.",
    ),
)


def _glossary():
    terms = [
        _tag("div", _tag("dt", title, id=f"term-{anchor}"), _tag("dd", text))
        for anchor, title, text in _TERMS
    ]
    return _tag(
        "section",
        _tag("h2", "Terms"),
        _tag(
            "details",
            _tag("summary", "What the words mean"),
            _tag("dl", terms, class_="terms"),
        ),
        id="terms",
    )


_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --card: #f5f7f9; --ink: #1f2933; --soft: #52606d;
  --line: #d9e0e6; --link: #00558a; --accent: #a33c00; --good: #00664a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181d; --card: #1e242b; --ink: #e6eaee; --soft: #a8b3bd;
    --line: #343d47; --link: #7cc4f0; --accent: #ff9a5c; --good: #4fd1a5;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 68rem; padding: 1.5rem 1.25rem 3rem;
  background: var(--paper); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  overflow-wrap: break-word;
}
header { border-bottom: 1px solid var(--line); padding-bottom: 1rem; }
h1 {
  font-size: clamp(1.5rem, 6vw, 2.4rem); line-height: 1.15; margin: 0 0 .4rem;
  overflow-wrap: anywhere;
}
h2 { font-size: 1.35rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .5rem; }
p, ul { max-width: 44rem; }
a { color: var(--link); }
a.term {
  color: inherit; text-decoration: underline dotted; text-underline-offset: .2em;
}
.eyebrow { color: var(--accent); font-weight: 600; margin: 0 0 .25rem; }
.what, figcaption, footer, small, caption { color: var(--soft); }
.miss, .warn { border-left: 4px solid var(--accent); padding-left: .75rem; }
nav ul {
  list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1rem; max-width: none;
  margin: 1rem 0 0; padding: 0; font-size: .9rem;
}
nav li { padding: .2rem 0; }
.figures {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr));
  gap: .75rem; margin: 1.25rem 0;
}
.figures > div {
  background: var(--card); border-radius: .6rem; padding: .8rem 1rem;
}
.figures dt { font-size: .9rem; color: var(--soft); }
.figures dd { margin: 0; font-size: .9rem; overflow-wrap: anywhere; }
.figures .big {
  font-size: 1.6rem; font-weight: 650; line-height: 1.25; white-space: nowrap;
}
.better, .cost { font-weight: 600; }
.better { color: var(--good); }
figure { margin: 1.25rem 0; }
figcaption { font-size: .9rem; margin-top: .4rem; max-width: 44rem; }
img {
  display: block; width: 100%; max-width: 35rem; height: auto; background: #fff;
  border: 1px solid var(--line); border-radius: .5rem; padding: .4rem;
}
pre {
  background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .75rem 1rem; margin: 0; overflow-x: auto; font-size: .875rem;
}
pre.sample { max-height: 22rem; }
pre.command { white-space: pre-wrap; overflow-wrap: anywhere; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
td code { font-size: .85em; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
caption { text-align: left; padding-bottom: .4rem; }
th, td {
  padding: .45rem .6rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top;
}
thead th { font-size: .82rem; color: var(--soft); vertical-align: bottom; }
tbody th { font-weight: 600; overflow-wrap: anywhere; min-width: 8.5rem; }
.num { text-align: right; font-variant-numeric: tabular-nums; }
td small { display: block; white-space: nowrap; font-size: .8em; }
.tag {
  border: 1px solid currentColor; border-radius: 1rem; padding: 0 .5rem;
  font-size: .75rem; font-weight: 600; white-space: nowrap; color: var(--soft);
}
.tag.good, .met { color: var(--good); }
.unmet { color: var(--accent); }
.met, .unmet { font-weight: 600; white-space: nowrap; }
details { margin: .75rem 0; }
summary { cursor: pointer; padding: .4rem 0; font-weight: 600; color: var(--link); }
.facts { display: grid; gap: .3rem; margin: .5rem 0; }
.facts > div { display: grid; grid-template-columns: 11rem 1fr; gap: .75rem; }
.facts dt { color: var(--soft); }
.facts dd, .terms dd { margin: 0; overflow-wrap: anywhere; }
.terms { max-width: 44rem; }
.terms > div { margin: 0 0 .9rem; }
.terms dt { font-weight: 650; }
.terms dt:target { color: var(--accent); }
footer { margin-top: 3rem; border-top: 1px solid var(--line); font-size: .85rem; }
footer p { margin: .5rem 0; }
@media (min-width: 60rem) {
  figure.picture {
    display: grid; grid-template-columns: 35rem 1fr; gap: 1.5rem; align-items: start;
  }
  .picture figcaption { margin: .5rem 0 0; position: sticky; top: 1rem; }
}
@media (max-width: 44rem) {
  body { padding: 1rem 1rem 2rem; }
  .figures { grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
  .facts > div { grid-template-columns: 1fr; gap: 0; }
  table.cards thead {
    position: absolute; width: 1px; height: 1px; overflow: hidden;
    clip-path: inset(50%);
  }
  table.cards, .cards tbody, .cards caption { display: block; }
  .cards tr {
    display: grid; grid-template-columns: 1fr 1fr; gap: .5rem .9rem;
    background: var(--card); border-radius: .6rem; padding: .75rem .9rem;
    margin-bottom: .75rem;
  }
  .cards th, .cards td { display: block; padding: 0; border: 0; text-align: left; }
  .cards tbody th { grid-column: 1 / -1; font-size: 1rem; }
  .cards td.text { grid-column: 1 / -1; }
  .cards td::before {
    content: attr(data-label); display: block; color: var(--soft); font-size: .78rem;
  }
  .cards td small { white-space: normal; }
}
@media print {
  :root {
    color-scheme: light; --paper: #fff; --card: #f5f7f9; --ink: #000; --soft: #444;
    --line: #bbb; --link: #000; --accent: #a33c00; --good: #00664a;
  }
  body { max-width: none; padding: 0; font-size: 9.5pt; }
  nav { display: none; }
  .scroll { overflow: visible; }
  table { font-size: 7pt; }
  thead th { font-size: 6.5pt; }
  .tag { font-size: 6pt; }
  th, td { padding: .2rem .3rem; }
  tbody th { min-width: 0; }
  td small { white-space: normal; }
  h2 { break-after: avoid; }
  tr, .figures > div { break-inside: avoid; }
  img { max-width: 28rem; max-height: 24cm; width: auto; }
  pre { white-space: pre-wrap; }
  pre.sample { max-height: none; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
