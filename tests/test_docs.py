"""The documentation says what is there: links, commands, names, numbers."""

import ast
import importlib.util
import json
import posixpath
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

import gpt_tf

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def _load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = _load(DOCS / "hooks.py")
numbers = _load(ROOT / "benchmarks" / "numbers_page.py")
program = hooks.load_program()

WRITTEN = {
    path.relative_to(DOCS).as_posix(): path.read_text("utf-8")
    for path in sorted(DOCS.rglob("*.md"))
}


PICTURES = hooks.tutorials()[1]


@pytest.fixture(scope="module")
def pages():
    """All pages of the site by their place, those that are generated too."""
    return {**WRITTEN, **hooks.generated_pages()}


# Navigation and links


def nav_of(entries):
    """Return the places of all pages that a navigation names."""
    found = []
    for entry in entries:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        found += nav_of(value) if isinstance(value, list) else [value]
    return found


def test_the_navigation_names_every_page_once_and_no_other(pages):
    class Config:
        nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]

    assert sorted(nav_of(hooks.on_config(Config).nav)) == sorted(pages)


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors(text):
    """Return the anchors that Markdown gives the headings of a page."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", without_code(text), re.M):
        plain = re.sub(r"[`*]", "", heading).strip().lower()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain)))
    return found


def broken_links(pages, page):
    """Return the links of a page that lead nowhere."""
    text = without_code(pages[page])
    listed = re.findall(r"^::: (\S+)$", "\n".join(pages.values()), re.M)
    broken = [n for n in re.findall(r"\]\[(gpt_tf[\w.]+)\]", text) if n not in listed]
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        place = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        place = place if target else page
        if place in pages:
            if anchor and anchor not in anchors(pages[place]):
                broken.append(link)
        elif place not in PICTURES and not (DOCS / place).is_file():
            broken.append(link)
    return broken


def test_links_between_pages_and_to_files_resolve(pages):
    broken = {page: broken_links(pages, page) for page in pages}
    assert {page: links for page, links in broken.items() if links} == {}


def test_links_that_lead_nowhere_are_found():
    bad = "[a](nowhere.md) [a](b.md#nothing) [a](#nothing) [a][gpt_tf.Nothing]"
    pages = {"a.md": f"# A\n{bad} [a](b.md#b-c) [a](slurm.sh)", "b.md": "# `B` c\n"}
    assert len(broken_links(pages, "a.md")) == 4


def test_links_outside_docs_lead_to_their_copies():
    class Page:
        class file:
            src_uri = "how_to/x.md"

    text = "![b](../../benchmarks/results/edge.png) and [c](device.md)"
    changed = hooks.on_page_markdown(text, Page, None, None)
    assert changed == (
        "![b](../repository/benchmarks/results/edge.png) and [c](device.md)"
    )


# Commands


def commands_in(text):
    """Return the lines in blocks of code that call gpt-tf, continued ones as one."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    indented = re.findall(r"^ {4}.*$", without_code(text), re.M)
    lines = "\n".join([*fenced, *indented]).replace("\\\n", " ").splitlines()
    found = (re.match(r"\s*(?:\$ |run: )?gpt-tf (.*)", line) for line in lines)
    return [match[1] for match in found if match]


def parse(line):
    """Read a command as `gpt-tf` does, without running it."""
    name, *words = shlex.split(line, comments=True)
    program.commands[name].make_context(name, words)


PAGES_WITH_COMMANDS = {
    name: text
    for name, text in {**WRITTEN, "README.md": (ROOT / "README.md").read_text()}.items()
    if commands_in(text)
}


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS)
def test_commands_and_options_on_a_page_exist(page):
    for line in commands_in(PAGES_WITH_COMMANDS[page]):
        parse(line)


@pytest.mark.parametrize("line", ["trian", "train --none=3", "train --out", "export"])
def test_a_command_that_does_not_exist_is_found(line):
    with pytest.raises((KeyError, typer.BadParameter.__base__)):  # `UsageError`
        parse(line)


# Reference


def test_every_public_name_has_its_place_in_the_reference(pages):
    reference = "\n".join(t for page, t in pages.items() if page[:10] == "reference/")
    listed = re.findall(r"^::: gpt_tf\.(?:\w+\.)*(\w+)$", reference, re.M)
    assert sorted(listed) == gpt_tf.__all__


@pytest.mark.parametrize("page", WRITTEN)
def test_python_on_a_page_is_python_and_uses_public_names(page):
    known = {*gpt_tf.__all__, *(path.stem for path in (ROOT / "gpt_tf").iterdir())}
    for block in re.findall(r"^```python\n(.*?)^```", WRITTEN[page], re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.value.id != "gpt_tf" or node.attr in known, node.attr
            if isinstance(node, ast.ImportFrom) and node.module.startswith("gpt_tf"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    is_module = importlib.util.find_spec(f"{node.module}.{alias.name}")
                    assert is_module or hasattr(module, alias.name), alias.name


def test_the_page_of_the_command_line_has_every_command_and_option(pages):
    page = pages["reference/command_line.md"]
    assert re.findall(r"^## gpt-tf (\S+)$", page, re.M) == program.list_commands(None)
    for name, command in program.commands.items():
        section = page.partition(f"## gpt-tf {name}\n")[2].partition("\n## ")[0]
        for option in command.params:
            if option.param_type_name == "option" and option.name != "help":
                spellings = (*option.opts, *option.secondary_opts)
                names = ", ".join(f"`{spelling}`" for spelling in spellings)
                assert f"| {names} " in section, (name, option.name)
    assert "| `--num-layers` INTEGER | Blocks. | `4` |" in page
    assert "A run's or model's folder. | required |" in page
    assert "`dynamic_int8` |" in page


def test_the_reference_is_made_without_tensorflow():
    code = (
        f"import sys; sys.path.insert(0, {str(DOCS)!r}); import hooks; "
        "hooks.generated_pages(); "
        "sys.exit(bool({'tensorflow', 'tf_keras', 'mkdocs'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_tutorials_are_pages_with_their_outputs_and_pictures(pages):
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        page = pages[f"tutorials/{path.stem}.md"]
        pictures = [place for place in PICTURES if f"/{path.stem}_" in place]
        assert pictures and all(place.partition("/")[2] in page for place in pictures)
        assert f"({path.stem}.md)" in pages["tutorials/index.md"]
        assert "```text\n" in page and '"results:"' not in page
        assert "\n|---|" in page and "Markdown object" not in page
        assert not re.search(r"\n {6}gpt-tf ", page)  # would not be shown as code


# Numbers


def test_the_pages_of_numbers_are_what_the_results_give():
    made = "run `python benchmarks/numbers_page.py`"
    assert numbers.PAGE.read_text("utf-8") == numbers.make_page(), made
    text = numbers.COMPARISON.read_text("utf-8")
    assert text == numbers.make_comparison(text), made


def test_every_result_has_its_entry_with_command_date_and_machine():
    sections = numbers.make_page().split("\n## ")[1:]
    assert len(sections) == len(list(numbers.RESULTS.glob("*.json")))
    for path, section in zip(numbers.result_files(), sections, strict=True):
        assert f"- result: `benchmarks/results/{path.name}`" in section
        command = r"^- command: `python (benchmarks|studies/scaling)/\w+\.py"
        assert re.search(command, section, re.M), path
        assert re.search(r"^- date: \d{4}-\d\d-\d\d$", section, re.M), path
        assert "\n- machine: " in section and "machine: not stated" not in section
        assert re.search(r"^\| .*\d", section, re.M), path


def test_a_changed_number_changes_the_page(tmp_path):
    shutil.copy(numbers.RESULTS / "decode.json", tmp_path)
    before = numbers.make_page(tmp_path)
    content = json.loads((tmp_path / "decode.json").read_text())
    content["threads"]["1"]["results"][0]["tokens_per_second"] = 4321.0
    (tmp_path / "decode.json").write_text(json.dumps(content))
    after = numbers.make_page(tmp_path)
    assert "| 4321 |" in after and "| 4321 |" not in before


def test_the_page_of_sizes_states_what_was_measured():
    page = WRITTEN["sizes.md"]
    for name, mode in (("python-student", "int8"), ("python-small", "dynamic_int8")):
        path = ROOT / "saved_models" / f"{name}.litertlm.json"
        manifest = json.loads(path.read_text())
        median = manifest["measured"]["inter_token_latency_ms"]["median"]
        size = manifest["size_bytes"] / 1e6
        assert f"| `{mode}` | {size:.2f} | - | {median:.2f} |" in page
    decode = json.loads((numbers.RESULTS / "decode.json").read_text())
    for mode in ("float32", "dynamic_int8", "int4"):
        ms = [
            f"{1e3 / row['tokens_per_second']:.1f}"
            for threads in decode["threads"].values()
            for row in threads["results"]
            if row["name"] == f"gpt_tf {mode}"
        ]
        size = decode["file_bytes"][mode] / 1e6
        assert f"| `{mode}` | {size:.0f} | {ms[0]} | {ms[1]} |" in page
    training = json.loads((numbers.RESULTS / "training.json").read_text())
    for name, digits in (("small", -2), ("large", -1)):
        rows = training["shapes"][name]["results"]
        (rate,) = [r["tokens_per_second"] for r in rows if r["name"] == "gpt_tf, XLA"]
        assert f"M | {round(rate, digits):,.0f} |" in page


# The site


def test_fields_are_shown_with_and_without_a_description():
    pytest.importorskip("griffe")
    default_and_description = _load(DOCS / "docstrings.py").default_and_description
    shown = default_and_description("Field(4, ge=1, description='Blocks.')", {})
    assert shown == ("4", "Blocks. At least 1.")
    assert default_and_description("Field(None, alias='a')", {}) == ("None", "")


@pytest.mark.slow
def test_the_site_builds_strictly_and_fetches_nothing(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "search/search_index.js").is_file()
    for path in tmp_path.rglob("*.html"):
        page = path.read_text("utf-8")
        loaded = re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="(http[^"]+)', page)
        assert loaded == [], path.name
    reference = (tmp_path / "reference/edge.html").read_text("utf-8")
    assert "gpt_tf.edge.EdgeGPT" in reference
