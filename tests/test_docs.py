"""The documentation says what is there: links, commands, names, numbers."""

import ast
import importlib.util
import itertools
import json
import posixpath
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
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

WRITTEN = {
    path.relative_to(DOCS).as_posix(): path.read_text("utf-8")
    for path in sorted(DOCS.rglob("*.md"))
}


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
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))

    class Config:
        nav = config["nav"]

    named = nav_of(hooks.on_config(Config).nav)

    assert sorted(named) == sorted(pages)


def anchors(text):
    """Return the anchors that Markdown gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        plain = re.sub(r"[`*]", "", heading).strip().lower()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain)))
    return found


def broken_links(pages, page):
    """Return the links of a page that lead nowhere."""
    text = re.sub(r"^```.*?^```", "", pages[page], flags=re.M | re.S)
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
        elif not (DOCS / place).is_file():
            broken.append(link)
    return broken


def test_links_between_pages_and_to_files_resolve(pages):
    broken = {page: broken_links(pages, page) for page in pages}

    assert {page: links for page, links in broken.items() if links} == {}


@pytest.mark.parametrize(
    "link",
    [
        "[a](nowhere.md)",
        "[a](b.md#nothing)",
        "[a](#nothing)",
        "![a](../benchmarks/results/nothing.png)",
        "[a][gpt_tf.models.gpt.Nothing]",
    ],
)
def test_a_link_that_leads_nowhere_is_found(link):
    pages = {"a.md": f"# A\n{link}", "b.md": "# B\n::: gpt_tf.models.gpt.GPTModel"}

    assert len(broken_links(pages, "a.md")) == 1


def test_links_that_lead_somewhere_are_not_called_broken():
    links = "[a](b.md#b-c) [a](#a) [a](https://x.y/z) ![a](slurm.sh) [a](../Makefile)"
    pages = {
        "a.md": f"# A\n{links}\n[a][gpt_tf.x.Y]",
        "b.md": "# `B` c\n::: gpt_tf.x.Y",
    }

    assert broken_links(pages, "a.md") == []


def test_files_outside_docs_are_found_and_links_to_pages_are_not():
    text = "[a](../other.md) ![b](../../benchmarks/results/edge.png) [c](https://d.e/f)"

    assert hooks.links_outside(text, "how_to/x.md") == {
        "../../benchmarks/results/edge.png": "benchmarks/results/edge.png"
    }


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
    without = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    indented = re.findall(r"^ {4}.*$", without, re.M)
    lines = "\n".join([*fenced, *indented]).replace("\\\n", " ").splitlines()
    found = (re.match(r"\s*(?:\$ |run: )?gpt-tf (.*)", line) for line in lines)
    return [match[1] for match in found if match]


def complaints(words, program):
    """Return what is wrong with a call of gpt-tf: names of commands and options."""
    if not words or words[0] not in program.commands:
        return [f"no command {' '.join(words[:1])!r}"]
    name, *rest = words
    command = program.commands[name]
    options = {
        spelling: option
        for option in command.params
        if option.param_type_name == "option"
        for spelling in (*option.opts, *option.secondary_opts)
    }
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    wrong, given, values = [], set(), []
    while rest:
        word, *rest = rest
        if not word.startswith("-"):
            if command.context_settings.get("allow_extra_args"):
                return wrong + complaints([word, *rest], program)
            values.append(word)
            continue
        spelling, equals, _ = word.partition("=")
        option = options.get(spelling)
        if option is None:
            wrong.append(f"{name} has no option {spelling}")
            continue
        given.add(option.name)
        if not option.is_flag and not equals:
            if not rest:
                wrong.append(f"{name} {spelling} expects a value")
            rest = rest[1:]
    several = any(argument.nargs == -1 for argument in arguments)
    if len(values) > len(arguments) and not several:
        wrong.append(f"{name} does not take {values[-1]!r}")
    if len(values) < sum(argument.required for argument in arguments):
        wrong.append(f"{name} expects {arguments[len(values)].name}")
    wrong += [
        f"{name} requires {option.opts[0]}"
        for option in options.values()
        if option.required and option.name not in given
    ]
    return wrong


PAGES_WITH_COMMANDS = {
    name: text
    for name, text in {**WRITTEN, "README.md": (ROOT / "README.md").read_text()}.items()
    if commands_in(text)
}


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS)
def test_commands_and_options_on_a_page_exist(page):
    program = hooks.load_program()
    lines = commands_in(PAGES_WITH_COMMANDS[page])

    wrong = {
        line: found
        for line in lines
        if (found := complaints(shlex.split(line, comments=True), program))
    }

    assert wrong == {}


@pytest.mark.parametrize(
    "line",
    [
        "trian --out runs/a",
        "train --no-such-option=3",
        "train --out",
        "train runs/a",
        "export --out gpt.tflite",
    ],
)
def test_a_command_that_does_not_exist_is_found(line):
    assert len(complaints(line.split(), hooks.load_program())) == 1


def test_commands_are_found_in_every_kind_of_block():
    text = (
        "`gpt-tf a`\n\n```console\n$ gpt-tf b \\\n  --c\nprinted\n```\n"
        "    gpt-tf d\n\n```yaml\n- x\n  run: gpt-tf e\n```\ngpt-tf f\n"
    )

    assert [line.split() for line in commands_in(text)] == [["b", "--c"], ["e"], ["d"]]


# Reference


def test_every_public_name_has_its_place_in_the_reference(pages):
    reference = "\n".join(t for page, t in pages.items() if page[:10] == "reference/")
    listed = re.findall(r"^::: gpt_tf\.(?:\w+\.)*(\w+)$", reference, re.M)

    assert sorted(listed) == gpt_tf.__all__


def test_what_the_reference_names_is_defined_where_it_says(pages):
    # The site reads the sources without importing them, and so does this.
    for path in re.findall(r"^::: (\S+)$", "\n".join(pages.values()), re.M):
        if (ROOT / path.replace(".", "/")).with_suffix(".py").is_file():
            continue  # a module's own text
        module, _, name = path.rpartition(".")
        file = ROOT / module.replace(".", "/")
        file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        bound = set()
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                bound.add(node.name)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                bound |= {alias.asname or alias.name for alias in node.names}
        assert name in bound, path


@pytest.mark.parametrize("page", WRITTEN)
def test_python_on_a_page_is_python_and_uses_public_names(page):
    blocks = re.findall(r"^```python\n(.*?)^```", WRITTEN[page], re.M | re.S)
    known = {*gpt_tf.__all__, *(path.stem for path in (ROOT / "gpt_tf").iterdir())}

    for node in itertools.chain.from_iterable(ast.walk(ast.parse(b)) for b in blocks):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.value.id != "gpt_tf" or node.attr in known, node.attr
        if isinstance(node, ast.ImportFrom) and node.module.startswith("gpt_tf"):
            folder = ROOT / node.module.replace(".", "/")
            text = (folder / "__init__.py").read_text("utf-8")
            for alias in node.names:
                is_module = folder.joinpath(f"{alias.name}.py").is_file()
                assert is_module or f'"{alias.name}"' in text, alias.name


def test_the_page_of_the_command_line_has_every_command_and_option(pages):
    page = pages["reference/command_line.md"]
    program = hooks.load_program()

    assert re.findall(r"^## gpt-tf (\S+)$", page, re.M) == program.list_commands(None)
    for name, command in program.commands.items():
        section = page.partition(f"## gpt-tf {name}\n")[2].partition("\n## ")[0]
        for option in command.params:
            if option.param_type_name == "option" and option.name != "help":
                names = ", ".join(
                    f"`{s}`" for s in (*option.opts, *option.secondary_opts)
                )
                assert f"| {names} " in section, (name, option.name)


def test_types_and_defaults_of_options_are_told(pages):
    page = pages["reference/command_line.md"]

    assert "| `--num-layers` INTEGER | Blocks. | `4` |" in page
    assert "| `--corpus` TEXT | Typical text" in page
    assert "A run's or model's folder. | required |" in page
    assert "`dynamic_int8` |" in page


def test_the_reference_is_made_without_tensorflow():
    code = (
        f"import sys; sys.path.insert(0, {str(DOCS)!r}); import hooks; "
        "hooks.generated_pages(); "
        "sys.exit(bool({'tensorflow', 'tf_keras', 'mkdocs'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)

    assert done.returncode == 0


def test_every_notebook_is_among_the_tutorials(pages):
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"(../notebooks/{path.name})" in pages["tutorials.md"]


# Numbers


def test_the_page_of_numbers_is_what_the_results_give():
    assert numbers.PAGE.read_text("utf-8") == numbers.make_page(), (
        "run `python benchmarks/numbers_page.py`"
    )


def test_the_measurements_of_the_comparison_are_what_the_results_give():
    text = numbers.COMPARISON.read_text("utf-8")

    assert text == numbers.make_comparison(text), (
        "run `python benchmarks/numbers_page.py`"
    )


def test_every_result_has_its_entry_with_command_date_and_machine():
    page = numbers.make_page()
    sections = page.split("\n## ")[1:]

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


def test_a_date_stays_as_long_as_the_result_has_the_same_bytes(tmp_path):
    path = tmp_path / "decode.json"
    content = json.loads((numbers.RESULTS / "decode.json").read_text("utf-8"))
    content.pop("date", None)  # older results have none of their own
    path.write_text(json.dumps(content), "utf-8")
    page = re.sub(r"- date: \S+", "- date: 2001-02-03", numbers.make_page(tmp_path))

    assert "- date: 2001-02-03" in numbers.make_page(tmp_path, page)
    path.write_bytes(path.read_bytes() + b"\n")
    assert "- date: 2001-02-03" not in numbers.make_page(tmp_path, page)


def test_an_unknown_table_in_the_comparison_is_refused():
    with pytest.raises(SystemExit, match="nothing"):
        numbers.make_comparison("<!-- numbers: nothing --><!-- end -->")


# The site


def test_the_search_of_a_site_opened_as_files_needs_no_network():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    polyfills = config["extra"].get("polyfills", [])

    # Without one of this name the plugin adds its own, from a network.
    assert "offline" in config["plugins"]
    assert any("iframe-worker" in place for place in polyfills)
    assert all((DOCS / place).is_file() for place in polyfills)


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
    assert "gpt_tf.edge.EdgeGPT" in (tmp_path / "reference/edge.html").read_text(
        "utf-8"
    )
