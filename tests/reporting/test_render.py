"""report.html: what it says first, what it leaves out, and that it is safe."""

import os
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gpt_tf import artifacts
from gpt_tf.advisor.ranking import recommend
from gpt_tf.errors import InputError
from gpt_tf.evaluation.report import new_report, read_report
from gpt_tf.reporting import plots, render
from tests.reporting.samples import (
    MACHINE,
    accuracy_of,
    entry_of,
    full_report,
    interval,
    reports,
)

GOLDEN = Path(__file__).parent / "golden" / "report.html"
ATTACK = "<script>alert(\"x\")</script>&amp;'quoted'{{ 7 * 7 }}"
UNWRITTEN = re.compile(r"\b(None|nan|NaN|inf|null|Undefined|True|False)\b")
PLOTS = {
    "full": ["accuracy", "latency", "pareto"],
    "latency": ["latency"],
    "accuracy": ["accuracy"],
    "bare": [],
    "empty": [],
}


def text_of(element):
    return "".join(element.itertext()).replace("\N{NO-BREAK SPACE}", " ")


def rows_of(page):
    return [[text_of(cell).strip() for cell in row] for row in page.iter("tr")]


def page_of(report):
    """The page without plots."""
    return ElementTree.fromstring(render.page_of(report, {}))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder of published reports by name, and the reports."""
    folder = tmp_path_factory.mktemp("published")
    made = reports()
    for name, report in made.items():
        render.publish(report, folder / name)
    return folder, made


def read(folder):
    # A page that is not well-formed is no tree.
    return ElementTree.parse(folder / "report.html").getroot()


def figures_of(report):
    return {name: plots.figure_of(name, report) for name in plots.PLOTS}


def test_the_page_is_the_golden_one(monkeypatch):
    report = full_report()
    report |= {"made_at": "2026-01-02T03:04:05+00:00", "versions": {"gpt-tf": "1.0"}}
    # The advisor's words are tested with the advisor.
    monkeypatch.setattr(render, "RULE", "The rule.")
    report["recommendation"] |= {
        "why": ["The first reason.", "The second one."],
        "runner_up_cost": "What the runner-up would cost.",
        "ruled_out": [{"name": "student-int4", "sentence": "It is ruled out."}],
        "dominated": [{"name": "student-fat", "sentence": "It is dominated."}],
    }

    page, again = (render.page_of(report, figures_of(report)) for _ in range(2))
    assert page == again
    # Without what differs between versions of libraries, and without style.
    found = re.sub(r"(?s)<(svg|style).*?</\1>", r"<\1/>", page)
    lines = (line.strip() for line in found.splitlines())
    found = "\n".join(line for line in lines if line) + "\n"
    if os.environ.get("WRITE_GOLDEN"):
        GOLDEN.write_text(found, "utf-8")
    assert found == GOLDEN.read_text("utf-8"), "if it is meant, run with WRITE_GOLDEN=1"


@pytest.mark.parametrize("kind", PLOTS)
def test_the_page_needs_nothing_but_itself_and_has_the_plots_there_are_numbers_for(
    published, kind
):
    folder, report = published[0] / kind, published[1][kind]
    names = [f"{name}.png" for name in PLOTS[kind]]
    files = sorted(file.name for file in folder.iterdir())
    assert files == sorted([*names, "report.html", "report.json"])
    assert read_report(folder) == report
    text = (folder / "report.html").read_text("utf-8")
    assert not re.search(r"https?:|@import|url\([^#]|\son\w+=", text)
    page = read(folder)
    assert len(list(page.iter("svg"))) == len(names)
    tags = {element.tag for element in page.iter()}
    assert not {"script", "link", "iframe", "object", "img"} & tags
    ids = [element.get("id") for element in page.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    links = [element.get("href") for element in page.iter() if element.get("href")]
    assert {f"#{name}" for name in ids} >= set(links)
    text = text_of(page.find("body"))
    assert not UNWRITTEN.search(text)
    for entry in report["entries"]:
        assert entry["name"] in text


def test_points_say_name_and_numbers_on_hover(published):
    page = read(published[0] / "full")
    titles = {title.text for title in page.iter("title")}
    (title,) = {title for title in titles if title.startswith("student-int8:")}
    assert all(n in title for n in ("1.57 MB", "1.31 ms", "1.57 ms", "+2.2 %"))


def test_where_nothing_fits_the_nearest_miss_is_named():
    report = full_report()
    report["budgets"]["max_size_mb"] = 0.5
    report["recommendation"] = recommend(report)
    page = page_of(report)
    header = text_of(page.find(".//header"))
    miss = report["recommendation"]["nearest_miss"]["sentence"]
    assert "Nothing fits" in header and miss in header
    assert not UNWRITTEN.search(text_of(page.find("body")))


def attacked(value):
    """The report with every text in it an attack."""
    if isinstance(value, dict):
        return {key: attacked(part) for key, part in value.items()}
    if isinstance(value, list):
        return [attacked(part) for part in value]
    return ATTACK + value if isinstance(value, str) else value


def test_every_text_of_a_report_is_escaped():
    report = full_report()
    for part in ("command", "versions", "corpus", "explanations", "stages", "notes"):
        report[part] = attacked(report[part])
    for entry in report["entries"]:
        for part in ("name", "path", "kind", "mode", "made_from", "sha256"):
            entry[part] = attacked(entry[part])
        entry["config"] = {ATTACK: ATTACK}
        entry["latency"]["engine"] = ATTACK
    report["machine"] = attacked(MACHINE) | {ATTACK: ATTACK}
    report["explanations"]["methods"][ATTACK] = {ATTACK: ATTACK}
    report["reference"] = attacked(report["reference"])
    said = report["recommendation"]
    report["recommendation"] = attacked(said) | {"budgets": said["budgets"]}
    page = ElementTree.fromstring(render.page_of(report, figures_of(report)))
    assert "script" not in {element.tag for element in page.iter()}
    assert page.findtext(".//h1") == attacked("student-int8")
    assert text_of(page).count(ATTACK) > 60
    titles = [title.text for title in page.iter("title")]
    assert any(title.startswith(ATTACK[:20]) for title in titles)


def test_a_command_survives_the_shell():
    report = full_report()
    chosen = next(e for e in report["entries"] if e["name"] == "student-int8")
    chosen["path"] = "my files/it's.litertlm"
    report["recommendation"]["sample"] = {"prompt": 'say "it\'s" $HOME', "text": "."}
    assert shlex.split(page_of(report).findtext(".//code")) == [
        *("gpt-tf", "generate", "--model", "my files/it's.litertlm"),
        *("--prompt", 'say "it\'s" $HOME'),
    ]


def test_the_reference_against_itself_has_no_interval():
    entry = entry_of("itself", accuracy=accuracy_of(5.0, 5.0))
    for part in ("perplexity_increase", "divergence_nats"):
        entry["accuracy"][part] = interval(0.0, 0.0)
    page = page_of(new_report([entry], reference="itself"))
    cells = {cell for row in rows_of(page) for cell in row}
    assert {"0 %", "0 nats"} <= cells


def test_plots_of_an_earlier_report_do_not_stay(tmp_path):
    (tmp_path / "pareto.png").write_bytes(b"of an earlier report")
    render.publish(new_report([entry_of("one")]), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.html"}


def test_what_is_interrupted_leaves_the_old_files(tmp_path, monkeypatch):
    def fail(handle):
        raise OSError("disk full")

    render.publish(new_report([entry_of("one")]), tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(artifacts.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        render.publish(new_report([entry_of("other")]), tmp_path)
    assert old == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_report_with_a_number_that_is_none_is_not_published(tmp_path):
    report = full_report()
    report["entries"][0]["latency"]["tokens_per_s"] = float("nan")
    with pytest.raises(InputError):
        render.publish(report, tmp_path)
    assert not list(tmp_path.iterdir())
