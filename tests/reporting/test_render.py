"""report.html: what it says first, what it leaves out, and that it is safe."""

import os
import re
import shlex
from pathlib import Path

import pytest
from markupsafe import escape

from gpt_tf import artifacts
from gpt_tf.errors import InputError
from gpt_tf.evaluation.report import new_report, read_report
from gpt_tf.formatting import NOT_MEASURED
from gpt_tf.reporting import render
from tests.reporting.reader import Reader
from tests.reporting.samples import (
    MACHINE,
    accuracy_of,
    entry_of,
    full_report,
    interval,
    latency_of,
    reports,
)

GOLDEN = Path(__file__).parent / "golden" / "report.html"
ATTACK = "<script>alert(\"x\")</script>&amp;'quoted'{{ 7 * 7 }}"
PLOTS = {
    "full": ["accuracy", "latency", "pareto", "sizes"],
    "nothing": ["accuracy", "latency", "pareto", "sizes"],
    "latency": ["latency", "sizes"],
    "accuracy": ["accuracy", "sizes"],
    "bare": [],
    "empty": [],
}


def read(path):
    return Reader(path.read_text("utf-8"))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder of published reports by name, and the reports."""
    folder = tmp_path_factory.mktemp("published")
    made = reports()
    for name, report in made.items():
        render.publish(report, folder / name)
    return folder, made


def write(report, tmp_path):
    """Write a page without plots, and read it."""
    render.write_page(report, tmp_path / "report.html", {})
    return read(tmp_path / "report.html")


def normalised(page):
    """A page without what differs between versions of libraries, and without style."""
    page = re.sub(r"(?s)<svg.*?</svg>", "<svg/>", page)
    page = re.sub(r"(?s)<style>.*?</style>", "<style/>", page)
    lines = (line.strip() for line in page.splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def test_the_page_is_the_golden_one(tmp_path, monkeypatch):
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
    render.write_page(report, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    render.write_page(report, tmp_path / "report.html")
    assert page == (tmp_path / "report.html").read_text("utf-8")
    found = normalised(page)
    if os.environ.get("WRITE_GOLDEN"):
        GOLDEN.write_text(found, "utf-8")
    assert found == GOLDEN.read_text("utf-8"), "if it is meant, run with WRITE_GOLDEN=1"


@pytest.mark.parametrize("kind", PLOTS)
def test_the_page_needs_nothing_but_itself_and_says_no_none(published, kind):
    folder, made = published[0] / kind, published[1]
    page = (folder / "report.html").read_text("utf-8")
    reader = Reader(page)
    assert not re.search(r"https?:|@import|url\([^#]", page)
    assert not {"script", "link", "iframe", "object", "img"} & set(reader.tags)
    assert all(link.startswith("#") for link in reader.links)
    assert {link[1:] for link in reader.links} <= set(reader.ids)
    assert len(reader.ids) == len(set(reader.ids))
    text = " ".join(reader.words)
    assert not re.search(r"\b(None|nan|NaN|inf|null|Undefined|True|False)\b", text)
    assert "{" not in text
    for entry in made[kind]["entries"]:
        assert entry["name"] in text


@pytest.mark.parametrize("kind", PLOTS)
def test_a_report_is_published_with_the_plots_it_has_numbers_for(published, kind):
    folder, made = published[0] / kind, published[1]
    names = [f"{name}.png" for name in PLOTS[kind]]
    files = sorted(file.name for file in folder.iterdir())
    assert files == sorted([*names, "report.html", "report.json"])
    assert read_report(folder) == made[kind]
    assert read(folder / "report.html").tags.count("svg") == len(names)


def test_the_chosen_file_is_named_first_with_before_and_after(published):
    reader = read(published[0] / "full" / "report.html")
    header = reader.texts["header"].replace("\N{NO-BREAK SPACE}", " ")
    assert reader.texts["h1"] == "student-int8"
    for part in (
        "7.31 MB",
        "1.57 MB",
        "4.7\N{MULTIPLICATION SIGN} smaller",
        "217",
        "763",
        "3.5\N{MULTIPLICATION SIGN} faster",
    ):
        assert part in header
    assert "5.11 (5.03 to 5.19)" in header and "+2.20 % (+1.79 to +2.61 %)" in header
    command = "gpt-tf generate --model files/student-int8.litertlm --prompt 'def main('"
    assert command in header
    # Points say name and numbers on hover.
    (title,) = {title for title in reader.titles if title.startswith("student-int8:")}
    assert all(n in title for n in ("1.57 MB", "1.31 ms", "1.57 ms", "+2.2 %"))
    # All else folds.
    assert reader.tags.count("details") == reader.tags.count("summary") > 6


def test_where_nothing_fits_the_nearest_miss_is_named(published):
    header = read(published[0] / "nothing" / "report.html").texts["header"]
    miss = published[1]["nothing"]["recommendation"]["nearest_miss"]["sentence"]
    assert "Nothing fits" in header and miss in header


def test_what_is_not_measured_is_said(published):
    folder = published[0]
    header = read(folder / "latency" / "report.html").texts["header"]
    assert header.count("not measured") == 1  # perplexity
    page = (folder / "accuracy" / "report.html").read_text("utf-8")
    assert "Best in" in page and "tokens per second" not in page
    reader = read(folder / "full" / "report.html")
    rows = [row for row in reader.rows if row[0] == "teacher-float32"]
    (row,) = [row for row in rows if row[1].startswith("1.234")]
    assert row[3:5] == [NOT_MEASURED] * 2  # the reference's divergence and agreement


def attacked(value):
    """The report with every text in it an attack."""
    if isinstance(value, dict):
        return {key: attacked(part) for key, part in value.items()}
    if isinstance(value, list):
        return [attacked(part) for part in value]
    return ATTACK + value if isinstance(value, str) else value


def test_every_text_of_a_report_is_escaped(tmp_path):
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
    render.write_page(report, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    reader = Reader(page)
    assert "script" not in reader.tags and "<script" not in page
    assert all(link.startswith("#") for link in reader.links)
    assert str(escape(ATTACK)) in page
    assert reader.texts["h1"] == attacked("student-int8")
    assert reader.text.count(ATTACK) > 60
    assert any(title.startswith(ATTACK[:20]) for title in reader.titles)


def test_a_command_survives_the_shell(tmp_path):
    report = full_report()
    chosen = next(e for e in report["entries"] if e["name"] == "student-int8")
    chosen["path"] = "my files/it's.litertlm"
    report["recommendation"]["sample"] = {"prompt": 'say "it\'s" $HOME', "text": "."}
    command = write(report, tmp_path).texts["code"].partition("gpt-tf optimize")[0]
    assert shlex.split(command) == [
        *("gpt-tf", "generate", "--model", "my files/it's.litertlm"),
        *("--prompt", 'say "it\'s" $HOME'),
    ]


def test_the_folder_of_a_command_is_named_where_the_file_lies_there(tmp_path):
    report, said = new_report([entry_of("x" * 90)]), "in the folder of this page"
    text = write(report, tmp_path).text
    assert said not in text and "x" * 90 in text
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / f"{'x' * 90}.litertlm").touch()
    assert said in write(report, tmp_path).text


def test_the_reference_against_itself_has_no_interval(tmp_path):
    entry = entry_of("itself", accuracy=accuracy_of(5.0, 5.0))
    for part in ("perplexity_increase", "divergence_nats"):
        entry["accuracy"][part] = interval(0.0, 0.0)
    reader = write(new_report([entry], reference="itself"), tmp_path)
    cells = {cell.replace("\N{NO-BREAK SPACE}", " ") for r in reader.rows for cell in r}
    assert {"0 %", "0 nats"} <= cells


def test_equal_files_are_all_named_where_the_frontier_is_told(tmp_path):
    places = {"fast": (2.0, 6.0), "same-1": (3.0, 5.0), "same-2": (3.0, 5.0)}
    places |= {"dominated": (3.0, 5.5)}
    report = new_report(
        [
            entry_of(name, 1, accuracy_of(perplexity), latency_of(median, False))
            for name, (median, perplexity) in places.items()
        ]
    )
    render.write_page(report, tmp_path / "report.html")
    text = read(tmp_path / "report.html").text
    assert "On the frontier: fast, same-1, same-2." in text


def test_plots_of_an_earlier_report_do_not_stay(tmp_path):
    (tmp_path / "pareto.png").write_bytes(b"of an earlier report")
    render.publish(new_report([entry_of("one")]), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"report.json", "report.html", "sizes.png"}


@pytest.mark.parametrize(
    ("write", "name"), [(render.publish, ""), (render.write_page, "report.html")]
)
def test_what_is_interrupted_leaves_the_old_files(tmp_path, monkeypatch, write, name):
    def fail(handle):
        raise OSError("disk full")

    render.publish(new_report([entry_of("one")]), tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(artifacts.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write(new_report([entry_of("other")]), tmp_path / name)
    assert old == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_report_with_a_number_that_is_none_is_not_published(tmp_path):
    report = full_report()
    report["entries"][0]["latency"]["tokens_per_s"] = float("nan")
    with pytest.raises(InputError):
        render.publish(report, tmp_path)
    assert not list(tmp_path.iterdir())
