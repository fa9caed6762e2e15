"""The page's elements: escaped tags, tables, and numbers with their units."""

import base64
import datetime
import html
import re
import shlex

from gpt_tf.reporting.pictures import format_interval, format_number, format_percent

NOTHING = "\N{EN DASH}"
SPACE = "\N{NO-BREAK SPACE}"

EXPLAINED = {
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


class Html(str):
    """Text that is HTML already."""


def tag(name, /, *children, **attributes):
    """An element; children that are no elements are escaped, None is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in ("img", "meta", "br"):
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children):
    return Html(
        "".join(
            child if isinstance(child, Html) else html.escape(str(child))
            for child in _flat(children)
        )
    )


def _flat(children):
    for child in children:
        if isinstance(child, list | tuple):
            yield from _flat(child)
        elif child is not None:
            yield child


def section(anchor, title, *children):
    """A section, or None where all that it would show is None."""
    children = list(_flat(children))
    if not children:
        return None
    return tag("section", tag("h2", title), *children, id=anchor)


def table(heads, rows, *, caption=None, cards=False, texts=()):
    """A table that scrolls in its own box; with `cards`, cards on a phone.

    Columns in which no row says anything are left out.

    Args:
        heads: Titles of the columns.
        rows: Lists of cells; the first cell names the row. `NOTHING` is empty.
        texts: Titles of columns of words, which are set to the left.
    """
    rows = [list(row) for row in rows]
    if not rows:
        return None
    kept = [
        column
        for column in range(len(heads))
        if column == 0 or any(row[column] != NOTHING for row in rows)
    ]
    kinds = ["text" if head in texts else "num" for head in heads]
    head = [
        tag("th", heads[column], scope="col", class_=kinds[column] if column else None)
        for column in kept
    ]
    body = []
    for row in rows:
        cells = [tag("th", row[0], scope="row")]
        for column in kept[1:]:
            label = _plain(heads[column]) if cards else None
            shown = (
                tag("span", NOTHING, title="not measured")
                if row[column] == NOTHING
                else row[column]
            )
            cells.append(
                tag("td", tag("div", shown), class_=kinds[column], data_label=label)
            )
        body.append(tag("tr", cells))
    table = tag(
        "table",
        tag("caption", caption) if caption else None,
        tag("thead", tag("tr", head)),
        tag("tbody", body),
        class_="cards" if cards else None,
    )
    # What the keyboard can scroll has a name, for those who hear the page.
    name = _heard(caption or ", ".join(_plain(heads[column]) for column in kept))
    return tag(
        "div", table, class_="scroll", tabindex="0", role="group", aria_label=name
    )


def _heard(text):
    """Text without its elements."""
    return (
        html.unescape(re.sub("<[^>]*>", "", text)) if isinstance(text, Html) else text
    )


def _plain(head):
    return head if not isinstance(head, Html) else head.split(">")[1].split("<")[0]


def term(text, anchor):
    """A word with a link to what it means."""
    return tag("a", text, href=f"#term-{anchor}", class_="term")


def picture(drawn, name, alt, caption):
    if name not in drawn:
        return None
    data = base64.b64encode(drawn[name]).decode()
    # A PNG states its size at a fixed place.
    width, height = (int.from_bytes(drawn[name][at : at + 4], "big") for at in (16, 20))
    return tag(
        "figure",
        tag(
            "img",
            src=f"data:image/png;base64,{data}",
            alt=alt,
            width=width,
            height=height,
        ),
        tag("figcaption", caption),
        class_="picture",
    )


def unit(value, unit):
    return NOTHING if value is None else f"{format_number(value)}{SPACE}{unit}"


def share(value):
    """0.413 as 41.3 %."""
    return NOTHING if value is None else f"{format_number(value * 100)}{SPACE}%"


def _change(value):
    """0.021 as +2.1 %."""
    if value is None:
        return NOTHING
    return format_percent(value).replace(" ", SPACE)


def megabytes(value):
    return NOTHING if value is None else unit(value / 1e6, "MB")


def interval(found, name="", is_change=False):
    """A value with its interval beneath; of a change or share, in percent."""
    if not found:
        return NOTHING
    scale, sign = (100.0 if name == "%" else 1.0), ("+" if is_change else "")
    if found["low"] == found["high"]:
        # As of the reference against itself.
        return unit(found["value"] * scale, name).rstrip(SPACE)
    value, low, high = format_interval(found, scale, sign)
    behind = f"{SPACE}{name}" if name else ""
    return join(
        f"{value}{behind} ",
        tag("small", f"({low} to {high}{behind})", class_="interval"),
    )


def ms(value):
    """Milliseconds; seconds where these are thousands."""
    if value is not None and value >= 1000:
        return unit(value / 1000, "s")
    return unit(value, "ms")


def spread(measured, part):
    return NOTHING if not measured else ms(measured.get(part))


def median(measured):
    """A median with its 95th percentile beneath."""
    if not measured:
        return NOTHING
    return join(
        f"{spread(measured, 'median')} ",
        tag("small", f"(p95 {spread(measured, 'p95')})", class_="interval"),
    )


def seconds(value):
    if value is None:
        return NOTHING
    if value < 60:
        return unit(round(value, 1) if value >= 1 else value, "s")
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min"), (rest, "s"))
    return " ".join(unit(number, name) for number, name in parts if number)


def day(made_at):
    try:
        moment = datetime.datetime.fromisoformat(made_at)
    except (TypeError, ValueError):
        return str(made_at)
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def count(number, one, many=None):
    return f"{number:,}{SPACE}{one if number == 1 else many or one + 's'}"


def entries_by_name(report):
    return {entry["name"]: entry for entry in report["entries"]}


def sentence(said):
    """A sentence, of a text or of a dict that has one."""
    if not isinstance(said, dict):
        return str(said)
    name, sentence = said.get("name"), said.get("sentence")
    if name and sentence and name not in sentence:
        return f"{name}. {sentence}"
    return sentence or name or ""


def rounded(ratio):
    return round(ratio) if ratio >= 10 else round(ratio, 1)


def nonbreaking(text):
    return text.replace(" ", SPACE)


def verdict(is_met):
    if is_met:
        return tag("span", "\N{CHECK MARK} met", class_="met")
    return tag("span", "\N{BALLOT X} not met", class_="unmet")


def name_cell(report, entry):
    words = []
    if entry["name"] == (report["recommendation"] or {}).get("choice"):
        words.append(tag("span", "recommended", class_="tag good"))
    if entry["name"] == report["reference"]:
        words.append(tag("span", "reference", class_="tag"))
    return join(entry["name"], [join(" ", word) for word in words])


def words(name):
    """A key as words."""
    return str(name).replace("_", " ")


def folded(title, *children):
    children = list(_flat(children))
    if not children:
        return None
    return tag("details", tag("summary", title), children)


def table_of_dicts(head, rows, caption):
    """A table of dicts by name, whatever parts these have."""
    rows = {
        name: value
        if isinstance(value, dict) and not _is_interval(value)
        else {"value": value}
        for name, value in (rows or {}).items()
    }
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    heads = [EXPLAINED.get(part, words(part)) for part in parts]
    texts = {
        title
        for title, part in zip(heads, parts, strict=True)
        if any(isinstance(row.get(part), str | bool) for row in rows.values())
    }
    return table(
        [head, *heads],
        [
            [name, *(any_value(row.get(part)) for part in parts)]
            for name, row in rows.items()
        ],
        caption=caption,
        texts=texts,
        cards=True,
    )


def _is_interval(value):
    return isinstance(value, dict) and {"value", "low", "high"} <= value.keys()


def any_value(value):
    """Any JSON value, for people."""
    if value is None or value == {} or value == []:
        return NOTHING
    if _is_interval(value):
        return interval(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return format_number(value)
    if isinstance(value, dict):
        parts = ((words(key), any_value(part)) for key, part in value.items())
        return join([join(f"{key} ", part, "; ") for key, part in parts])
    if isinstance(value, list):
        return join([join(any_value(part), "; ") for part in value])
    return str(value)


def line(command):
    return shlex.join(command) if isinstance(command, list) else command


def titled(title, content):
    return None if content is None else [tag("h3", title), content]
