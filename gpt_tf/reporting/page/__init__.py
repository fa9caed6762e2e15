"""report.html: the report as people read it, one file that needs nothing else.

Style and pictures are inside it; it asks no network for anything and runs no script.
What comes from outside, such as names and generated text, is escaped by construction:
`_tag` escapes whatever is not an element already.
"""

import importlib.util
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from gpt_tf import artifacts
from gpt_tf.evaluation.report import write_report
from gpt_tf.reporting import pictures as drawing
from gpt_tf.reporting.page import (
    choice,
    elements,
    glossary,
    making,
    measurements,
    style,
)

PICTURES = {
    "pareto": drawing.draw_pareto,
    "latency": drawing.draw_latency,
    "sizes": drawing.draw_sizes,
    "accuracy": drawing.draw_accuracy,
}


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
    with artifacts.atomic_file(path, "w") as file:
        file.write(text)


def _can_draw():
    return importlib.util.find_spec("matplotlib") is not None


_UNDRAWN = (
    "There are no pictures: matplotlib, which draws them, is not installed. Install it "
    "with: pip install matplotlib"
)


def _document(report, drawn, folder):
    title, head = choice.answer(report, folder)
    sections = [
        section
        for section in (
            choice.budgets(report),
            measurements.plane(report, drawn),
            measurements.all_files(report, drawn),
            choice.reasons(report),
            measurements.estimates(report),
            measurements.latency(report, drawn),
            measurements.accuracy(report, drawn),
            making.explanations(report["explanations"]),
            making.making(report),
            making.notes(report),
        )
        if section is not None
    ]
    look = elements.Html(f"<style>{style.STYLE}</style>")
    page = elements.tag(
        "html",
        elements.tag(
            "head",
            elements.tag("meta", charset="utf-8"),
            elements.tag(
                "meta", name="viewport", content="width=device-width, initial-scale=1"
            ),
            elements.tag("meta", name="color-scheme", content="light dark"),
            elements.tag("meta", name="generator", content="gpt-tf"),
            elements.tag("title", f"{title} - gpt-tf report"),
            look,
        ),
        elements.tag(
            "body",
            elements.tag("header", head),
            _contents(sections),
            elements.tag("main", sections, glossary.glossary()),
            elements.tag(
                "footer",
                elements.tag(
                    "p", f"Measured by gpt-tf, {elements.day(report['made_at'])}. "
                ),
                elements.tag("p", "The same numbers for programs: report.json."),
                elements.tag("p", _UNDRAWN) if not drawn and not _can_draw() else None,
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
        title = elements.Html(section.partition("<h2>")[2].partition("</h2>")[0])
        links.append(elements.tag("li", elements.tag("a", title, href=f"#{anchor}")))
    links.append(elements.tag("li", elements.tag("a", "Terms", href="#terms")))
    return elements.tag("nav", elements.tag("ul", links), aria_label="Contents")
