import base64
import copy
import html
import json
import re
import shlex
from html.parser import HTMLParser

import pytest

from gpt_tf import artifacts
from gpt_tf.advisor.estimate import estimate
from gpt_tf.advisor.ranking import recommend
from gpt_tf.errors import InputError
from gpt_tf.evaluation.report import new_report, read_report
from gpt_tf.reporting import page
from gpt_tf.reporting.pictures import draw_sizes, format_interval, format_number
from tests.reporting.test_pictures import (
    accuracy_of,
    entry_of,
    interval,
    latency_of,
)

VOID = {"meta", "img", "br", "link", "input", "hr"}
ATTACK = "<script>alert(\"x\")</script>&amp;'quoted'"
MACHINE = {
    "cpu": "Some Processor avx2",
    "cores": 2,
    "physical_cores": 2,
    "memory_bytes": 8_300_000_000,
    "os": "Linux",
    "python": "3.11",
    "read_bytes_per_s": {"1": 18.7e9, "2": 31.9e9},
}
CONFIG = {
    "vocab_size": 512,
    "embedding_dim": 64,
    "num_layers": 2,
    "num_heads": 2,
    "context_length": 128,
}
EXPLANATIONS = {
    "prompts": 60,
    "prompt_tokens": 32.0,
    "fraction": 0.2,
    "nearest_drop": interval(0.2468, 0.03),
    "methods": {
        "lime": {
            "drop": interval(0.3127, 0.03),
            "random_drop": interval(0.1131, 0.02),
            "difference": interval(0.1996, 0.03),
            "holds": True,
        },
        "attention": {
            "drop": interval(0.1212, 0.03),
            "random_drop": interval(0.1131, 0.02),
            "difference": interval(0.0081, 0.03),
            "holds": False,
        },
    },
    "compression": {
        "lime": {
            "a": "float32",
            "b": "dynamic_int8",
            "prompts": 58,
            "rank_correlation": interval(0.8712, 0.02),
            "ceiling": interval(0.9134, 0.02),
        }
    },
}


class Reader(HTMLParser):
    """Reads a page: its text, its elements, and whether they are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.words, self.links, self.ids, self.tags = [], [], [], [], []
        self.texts, self.rows = {}, []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.links += [
            attributes[name] for name in ("src", "href", "srcset") if name in attributes
        ]
        self.links += [name for name in attributes if name.startswith("on")]
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            return
        self.words.append(data)
        for tag in set(self.open):
            self.texts[tag] = self.texts.get(tag, "") + data
        if "tr" in self.open and self.rows[-1]:
            self.rows[-1][-1] += data

    @property
    def text(self):
        return "".join(self.words).replace("\N{NO-BREAK SPACE}", " ")


def read(path):
    """A page as its reader sees it."""
    reader = Reader()
    reader.feed(path.read_text("utf-8"))
    reader.close()
    assert reader.open == []
    return reader


def full_report():
    """A report in which nothing is missing."""
    reference = 5.0
    entries = [
        entry_of("teacher-float32", 7.31, accuracy_of(reference), latency_of(4.6)),
        entry_of("student-int8", 1.57, accuracy_of(5.11, reference), latency_of(1.31)),
        entry_of("student-int4", 0.93, accuracy_of(6.4, reference), latency_of(1.17)),
        entry_of("student-fat", 3.3, accuracy_of(5.12, reference), latency_of(1.4)),
    ]
    for entry in entries:
        entry["estimate"] = estimate(CONFIG, "dynamic_int8", MACHINE)
        entry["made_from"] = "the teacher, distilled"
        entry["accuracy"]["parsed"] = {
            "share": interval(0.4131, 0.05),
            "of_true_text": 0.6217,
            "count": 73,
        }
        entry["latency"]["energy_j_per_token"] = 0.0372
    report = new_report(
        entries,
        command="gpt-tf optimize --max-latency-ms 3",
        machine=MACHINE,
        corpus={
            "name": "python-stdlib",
            "split": "validation",
            "tokens": 20_000,
            "bytes": 61_234,
        },
        reference="teacher-float32",
        explanations=EXPLANATIONS,
        stages=[
            {
                "name": "teacher",
                "command": "gpt-tf train --steps 9",
                "seconds": 251.3,
                "reused": False,
            },
            {"name": "accuracy", "command": None, "seconds": 8.25, "reused": True},
        ],
        notes=["Energy was not to be had."],
    )
    report["budgets"].update(
        max_perplexity_increase=0.03, max_latency_ms=3.0, max_size_mb=8.0
    )
    report["recommendation"] = recommend(report) | {
        "sample": {"prompt": "def main(", "text": "argv):\n    return 0"}
    }
    return report


def reports():
    """Reports of every kind by name."""
    full = full_report()
    nothing = full_report()
    nothing["budgets"]["max_size_mb"] = 0.5
    nothing["recommendation"] = recommend(nothing)
    assert nothing["recommendation"]["choice"] is None
    latency = new_report([entry_of("bench", latency=latency_of(2.0, False))])
    kept = latency["entries"][0]["latency"]
    for part in ("load_ms", "cold_start_ms", "peak_memory_bytes", "bandwidth_share"):
        kept[part] = None
    accuracy = new_report(
        [
            entry_of("a", accuracy=accuracy_of(5.0)),
            entry_of("b", accuracy=accuracy_of(6)),
        ]
    )
    bare = new_report([entry_of("bare")], versions=None)
    for part in ("size_bytes", "parameters", "config", "sha256", "context_length"):
        bare["entries"][0][part] = None
    return {
        "full": full,
        "nothing": nothing,
        "latency": latency,
        "accuracy": accuracy,
        "bare": bare,
        "empty": new_report([]),
    }


KINDS = ("full", "nothing", "latency", "accuracy", "bare", "empty")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders of published reports by name, and the reports."""
    folder = tmp_path_factory.mktemp("published")
    made = reports()
    for name, report in made.items():
        page.publish(report, folder / name)
    return folder, made


def write(report, tmp_path):
    """Write a page without pictures, and read it."""
    path = tmp_path / "report.html"
    page.write_page(report, path, [])
    return read(path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_needs_nothing_but_itself(published, kind):
    text = (published[0] / kind / "report.html").read_text("utf-8")
    reader = read(published[0] / kind / "report.html")
    for link in reader.links:
        assert link.startswith(("#", "data:image/png;base64,")), link
    assert not re.search(r"https?://|@import|url\(", text)
    assert not {"script", "link", "iframe", "object"} & set(reader.tags)


@pytest.mark.parametrize("kind", KINDS)
def test_links_within_the_page_lead_somewhere(published, kind):
    reader = read(published[0] / kind / "report.html")
    assert len(reader.ids) == len(set(reader.ids))
    inner = {link[1:] for link in reader.links if link.startswith("#")}
    assert inner
    assert inner <= set(reader.ids)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_parts_leave_no_trace_in_the_text(published, kind):
    folder, made = published
    reader = read(folder / kind / "report.html")
    # Apart, since neighbouring cells have nothing between them.
    text = " ".join(reader.words)
    assert not re.search(r"\b(None|nan|NaN|inf|null|Traceback|True|False)\b", text)
    assert "{" not in text
    for entry in made[kind]["entries"]:
        assert entry["name"] in text


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_is_published_with_the_pictures_it_has_numbers_for(published, kind):
    expected = {
        "full": ["accuracy", "latency", "pareto", "sizes"],
        "nothing": ["accuracy", "latency", "pareto", "sizes"],
        "latency": ["latency", "sizes"],
        "accuracy": ["accuracy", "sizes"],
        "bare": [],
        "empty": [],
    }[kind]
    folder, made = published[0] / kind, published[1]
    names = sorted(file.name for file in folder.iterdir())
    assert names == sorted(
        [*(f"{name}.png" for name in expected), "report.html", "report.json"]
    )
    assert read_report(folder) == made[kind]
    reader = read(folder / "report.html")
    inside = [link for link in reader.links if link.startswith("data:")]
    drawn = {base64.b64decode(link.partition(",")[2]) for link in inside}
    assert drawn == {(folder / f"{name}.png").read_bytes() for name in expected}


def test_every_number_of_every_file_is_on_the_page(published):
    folder, made = published
    text = read(folder / "full" / "report.html").text
    for entry in made["full"]["entries"]:
        accuracy, latency = entry["accuracy"], entry["latency"]
        wanted = [f"{format_number(entry['size_bytes'] / 1e6)} MB"]
        for part in ("perplexity", "bits_per_byte", "divergence_nats"):
            if accuracy[part]:
                wanted += format_interval(accuracy[part])
        for part in ("token_accuracy", "top1_agreement", "perplexity_increase"):
            if accuracy[part]:
                sign = "+" if part == "perplexity_increase" else ""
                wanted += format_interval(accuracy[part], 100, sign)
        for part in ("inter_token_latency_ms", "time_to_first_token_ms"):
            for measured in ("median", "p95", "p99", "worst"):
                wanted.append(f"{format_number(latency[part][measured])} ms")
        for part in ("response_time_ms", "load_ms", "cold_start_ms"):
            wanted.append(f"{format_number(latency[part]['median'])} ms")
        wanted.append(f"{format_number(latency['tokens_per_s'])} tokens/s")
        for row in latency["by_context"] + latency["by_threads"]:
            spread = row["inter_token_latency_ms"]
            wanted.append(f"{format_number(spread['median'])} ms")
        for row in latency["throughput"]:
            wanted.append(f"{format_number(row['tokens_per_s'])} tokens/s")
        wanted += ["81.3 MB", "43.7 %", "0.0372 J", "73 completions", "62.2 %"]
        for number in wanted:
            assert number in text, number


def test_a_number_stands_in_the_row_of_its_file(published):
    reader = read(published[0] / "full" / "report.html")
    rows = [row for row in reader.rows if row[0].startswith("student-int8")]
    others = [row for row in reader.rows if row[0].startswith("student-int4")]
    assert any("5.11 (5.03 to 5.19)" in cell for row in rows for cell in row)
    assert not any("5.11 (5.03 to 5.19)" in cell for row in others for cell in row)


def test_the_answer_comes_first_with_what_it_costs_and_how_to_run_it(published):
    reader = read(published[0] / "full" / "report.html")
    header = reader.texts["header"].replace("\N{NO-BREAK SPACE}", " ")
    assert reader.texts["h1"] == "student-int8"
    for part in (
        *("1.57 MB", "4.7 times smaller than teacher-float32"),
        *("1.57 ms", "3.5 times faster than teacher-float32"),
        *("5.11", "+2.20 % (+1.79 to +2.61 %) against teacher-float32"),
        "def main(argv):\n    return 0",
    ):
        assert part in header
    command = "gpt-tf generate --model files/student-int8.litertlm --prompt 'def main('"
    assert command in header


def test_sections_stand_in_the_order_in_which_questions_come(published):
    reader = read(published[0] / "full" / "report.html")
    sections = [name for name in reader.ids if not name.startswith("term-")]
    assert sections == [
        *("budgets", "pareto", "files", "reasons", "estimates", "latency"),
        *("accuracy", "explanations", "making", "notes", "terms"),
    ]


def test_budgets_are_said_to_be_met_or_not(published):
    folder = published[0]
    met = read(folder / "full" / "report.html").text
    assert met.count("\N{CHECK MARK} met") == 3
    assert "not met" not in met
    missed = read(folder / "nothing" / "report.html")
    assert missed.texts["h1"] == "Nothing fits the budgets"
    assert "The nearest miss is student-int8" in missed.texts["header"]
    assert "1.57 MB \N{BALLOT X} not met" in missed.text


def test_reasons_name_runner_up_and_what_ruled_the_others_out(published):
    folder, made = published
    text = read(folder / "full" / "report.html").text
    recommendation = made["full"]["recommendation"]
    assert recommendation["runner_up"] == "student-fat"
    assert recommendation["runner_up_cost"] in text
    assert len(recommendation["ruled_out"]) == 2
    for row in recommendation["ruled_out"]:
        assert row["sentence"] in text
    for sentence in recommendation["why"]:
        assert sentence in text
    (beaten,) = recommendation["dominated"]
    assert beaten["sentence"] in text


def test_explanations_are_judged(published):
    reader = read(published[0] / "full" / "report.html")
    rows = {row[0]: row for row in reader.rows if row and row[0] in ("attention",)}
    assert rows["attention"][-1] == "no"
    lime = [row for row in reader.rows if row and row[0] == "lime"]
    assert lime[0][-1] == "yes"
    assert "0.871 (0.851 to 0.891)" in lime[1][4]
    assert "from each of 60 prompts" in reader.text
    nearest = "last tokens, which takes no explanation, the probability falls by 0.247"
    assert nearest in reader.text
    assert "nearest drop" not in reader.text


def test_unknown_parts_of_explanations_are_shown_too(tmp_path):
    report = new_report(
        [], explanations={"methods": {"other": {"some_score": 0.125}}, "seed": 17}
    )
    reader = write(report, tmp_path)
    assert ["other", "0.125"] in reader.rows
    assert "some score" in reader.text
    assert "17" in reader.texts["dl"]


def test_how_it_was_made_is_told(published):
    text = read(published[0] / "full" / "report.html").text
    for part in (
        *("gpt-tf optimize --max-latency-ms 3", "4 min 11 s", "kept from before"),
        *("gpt-tf train --steps 9", "4 min 20 s", "Some Processor avx2", "8.3 GB"),
        *("18.7 GB/s by 1 thread, 31.9 GB/s by 2 threads", "python-stdlib"),
        *("Energy was not to be had.", "0" * 64, "num layers 2"),
    ):
        assert part in text, part


def attacked(value):
    """The report with every text in it an attack."""
    if isinstance(value, dict):
        return {key: attacked(part) for key, part in value.items()}
    if isinstance(value, list):
        return [attacked(part) for part in value]
    return ATTACK + value if isinstance(value, str) else value


def test_every_text_of_a_report_is_escaped(tmp_path):
    report = full_report()
    # What the page looks up stays what it is.
    for part in ("command", "versions", "corpus", "explanations", "stages", "notes"):
        report[part] = attacked(report[part])
    names = {entry["name"]: attacked(entry["name"]) for entry in report["entries"]}
    for entry in report["entries"]:
        for part in ("path", "kind", "mode", "made_from", "sha256"):
            entry[part] = attacked(entry[part])
        entry["config"] = {ATTACK: ATTACK}
        entry["latency"]["engine"] = ATTACK
        entry["name"] = names[entry["name"]]
    report["machine"] = attacked(MACHINE) | {ATTACK: ATTACK}
    report["explanations"]["methods"][ATTACK] = {ATTACK: ATTACK}
    report["reference"] = names[report["reference"]]
    said = report["recommendation"]
    choice, sample = names[said["choice"]], attacked(said["sample"])
    report["recommendation"] = attacked(said) | {
        "budgets": said["budgets"],
        "choice": choice,
        "sample": sample,
    }
    reader = write(report, tmp_path)
    assert "script" not in reader.tags
    assert "alert" not in " ".join(reader.links)
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "<script" not in text
    assert html.escape(ATTACK) in text
    assert reader.texts["h1"] == choice
    assert reader.text.count(ATTACK) > 60


def test_what_the_keyboard_scrolls_has_a_name(published):
    page = (published[0] / "full" / "report.html").read_text("utf-8")
    groups = re.findall(r'<div class="scroll"[^>]*>', page)
    names = [re.search(r'aria-label="([^"<&]+)"', group) for group in groups]
    assert len(groups) > 5 and all(names)
    assert any(name[1].startswith("How fast they are: ") for name in names)
    assert any(name[1].startswith("File, KL divergence, ") for name in names)


def test_a_long_name_beside_a_picture_does_not_widen_the_page():
    # A bare 1fr is at least as wide as the longest word in it.
    assert "grid-template-columns: 35rem minmax(0, 1fr)" in page.style.STYLE


def test_names_are_shown_whole_however_long(tmp_path):
    names = [f"{'x' * 39}{index}" for index in range(10)]
    report = new_report([entry_of(name) for name in names])
    text = write(report, tmp_path).text
    for name in names:
        assert name in text


def test_a_command_survives_the_shell(tmp_path):
    report = full_report()
    chosen = next(e for e in report["entries"] if e["name"] == "student-int8")
    chosen["path"] = "my files/it's.litertlm"
    report["recommendation"]["sample"] = {"prompt": 'say "it\'s" $HOME', "text": "."}
    text = write(report, tmp_path).texts["code"]
    end = text.index("gpt-tf optimize")
    words = shlex.split(text[text.index("gpt-tf generate") : end])
    assert words == [
        *("gpt-tf", "generate", "--model", "my files/it's.litertlm"),
        *("--prompt", 'say "it\'s" $HOME'),
    ]


def test_the_folder_of_a_command_is_named_where_the_file_lies_there(tmp_path):
    report = new_report([entry_of("one")])
    assert "in the folder of this page" not in write(report, tmp_path).text
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "one.litertlm").touch()
    assert "in the folder of this page" in write(report, tmp_path).text


def test_the_reference_against_itself_has_no_interval(tmp_path):
    entry = entry_of("itself", accuracy=accuracy_of(5.0, 5.0))
    entry["accuracy"]["perplexity_increase"] = interval(0.0, 0.0)
    entry["accuracy"]["divergence_nats"] = interval(0.0, 0.0)
    reader = write(new_report([entry], reference="itself"), tmp_path)
    rows = [row for row in reader.rows if row[0].startswith("itself")]
    assert rows[0][5] == "0\N{NO-BREAK SPACE}%"
    assert "0\N{NO-BREAK SPACE}nats" in {cell for row in rows for cell in row}


def test_a_page_draws_its_pictures_unless_they_are_given(tmp_path):
    report = new_report([entry_of("one")])
    page.write_page(report, tmp_path / "drawn.html")
    assert draw_sizes(report, tmp_path / "sizes.png")
    page.write_page(report, tmp_path / "given.html", [tmp_path / "sizes.png"])
    drawn, given = (tmp_path / f"{name}.html" for name in ("drawn", "given"))
    assert drawn.read_bytes() == given.read_bytes()
    assert "img" in read(drawn).tags


def test_equal_files_are_all_named_where_the_frontier_is_told(tmp_path):
    places = {"fast": (2.0, 6.0), "same-1": (3.0, 5.0), "same-2": (3.0, 5.0)}
    places |= {"beaten": (3.0, 5.5)}
    report = new_report(
        [
            entry_of(name, 1, accuracy_of(perplexity), latency_of(median))
            for name, (median, perplexity) in places.items()
        ]
    )
    page.write_page(report, tmp_path / "report.html")
    text = read(tmp_path / "report.html").text
    assert "none is better in both: fast, same-1, same-2." in text


def test_pictures_of_an_earlier_report_do_not_stay(tmp_path):
    (tmp_path / "pareto.png").write_bytes(b"of an earlier report")
    written = page.write_pictures(new_report([entry_of("one")]), tmp_path)
    assert written == [tmp_path / "sizes.png"]
    assert not (tmp_path / "pareto.png").exists()


def test_without_matplotlib_there_is_a_page_without_pictures(tmp_path, monkeypatch):
    find = page.importlib.util.find_spec
    monkeypatch.setattr(
        page.importlib.util,
        "find_spec",
        lambda name: None if name == "matplotlib" else find(name),
    )
    written = page.publish(reports()["latency"], tmp_path)
    assert [path.name for path in written] == ["report.json", "report.html"]
    reader = read(tmp_path / "report.html")
    assert "img" not in reader.tags
    assert "pip install matplotlib" in reader.text


def test_an_interrupted_page_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(handle):
        raise OSError("disk full")

    monkeypatch.setattr(artifacts.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        page.write_page(new_report([]), path, [])
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_report_with_a_number_that_is_none_is_not_published(tmp_path):
    report = copy.deepcopy(full_report())
    report["entries"][0]["latency"]["tokens_per_s"] = float("nan")
    with pytest.raises(InputError, match="finite"):
        page.publish(report, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_same_report_makes_the_same_page(tmp_path):
    report = full_report()
    page.write_page(report, tmp_path / "one.html", [])
    again = json.loads(json.dumps(report))
    page.write_page(again, tmp_path / "other.html", [])
    one, other = (tmp_path / f"{name}.html" for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()
