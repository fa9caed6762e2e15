"""What MkDocs makes while it builds: reference, tutorials, files of the repository.

The reference is written from the package each time the site is built, so it cannot go
stale: a page per room with every public name of `gpt_tf/__init__.py`, and one with
every command and option of `gpt-tf`. Neither needs TensorFlow. A link of a page to a
file outside `docs/`, a picture of a benchmark for example, works in the repository as
it stands; for the site the file is copied.
"""

import ast
import base64
import inspect
import json
import logging
import os
import posixpath
import re
import shutil
import tempfile
import types
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# With LiteRT.js in it, the site carries a page that runs the bundled model.
NODE_MODULES = Path(os.environ.get("GPT_TF_NODE_MODULES", ROOT / "node_modules"))
_log = logging.getLogger("mkdocs.plugins.gpt_tf")
_temporary = []  # folders

# The rooms' titles; a room that is not named here is called by its name.
ROOMS = {
    "training": "Training",
    "text": "Text and tokens",
    "models": "Models and generation",
    "parallel": "Parallel computation",
    "quantization": "Quantisation",
    "distillation": "Distillation",
    "export": "Export",
    "edge": "The device",
    "workflow": "The whole optimisation",
    "evaluation": "Measuring",
    "advisor": "Choosing",
    "explain": "Explaining",
    "reporting": "Reports",
    "bundled_model": "Bundled models",
    "errors": "Errors",
}

_TYPES = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH", bool: ""}


def public_names():
    """Return the public names by room, read from `gpt_tf/__init__.py`.

    Returns:
        `{"models": {"GPTModel": "gpt_tf.models.gpt"}}` and so on, in the order of the
        site.
    """
    tree = ast.parse((ROOT / "gpt_tf" / "__init__.py").read_text("utf-8"))
    found = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "_PUBLIC"
    )
    rooms = {}
    for name, module in found.items():
        rooms.setdefault(module.split(".")[1], {})[name] = module
    order = [*ROOMS, *sorted(rooms)]
    return {room: rooms[room] for room in sorted(rooms, key=order.index)}


def python_page(room, names):
    """Return the page of a room, in the language of mkdocstrings."""
    title = ROOMS.get(room, room.replace("_", " ").capitalize())
    lines = [f"# {title}", "", f"What `gpt_tf` has from `gpt_tf.{room}`.", ""]
    for name, module in sorted(names.items(), key=lambda item: item[0].lower()):
        lines += [f"::: {module}.{name}", ""]
    return "\n".join(lines)


def command_line_page():
    """Return the page of all commands and options, read from the program itself."""
    program = load_program()
    lines = ["# The command line", "", program.help, ""]
    lines += [
        "Invalid input prints one line that says how to fix it, with exit status 2; "
        "`gpt-tf --debug COMMAND` shows the traceback.",
        "",
    ]
    for name in program.list_commands(None):
        command = program.commands[name]
        if not command.hidden:
            lines += _command_section(name, command)
    return "\n".join(lines)


def load_program():
    """Return `gpt-tf` as click's group of commands, without TensorFlow."""
    import typer.main

    from gpt_tf.cli import app

    return typer.main.get_command(app)


def _command_section(name, command):
    own = [p for p in command.params if not getattr(p, "hidden", False)]
    arguments = [p for p in own if p.param_type_name == "argument"]
    options = [p for p in own if p.param_type_name == "option" and p.name != "help"]
    hints = typing.get_type_hints(command.callback)
    usage = ["gpt-tf", name]
    for argument in arguments:
        several = "..." if argument.nargs == -1 else ""
        word = f"{argument.name.upper()}{several}"
        usage.append(word if argument.required else f"[{word}]")
    usage += ["[OPTIONS]"] if options else []
    if command.context_settings.get("allow_extra_args"):
        usage.append("COMMAND ...")
    text = inspect.cleandoc(command.help or "").replace("\f", "")
    lines = [f"## gpt-tf {name}", "", text, "", "```text", " ".join(usage), "```", ""]
    if arguments:
        rows = [(f"`{p.name.upper()}`", getattr(p, "help", "")) for p in arguments]
        lines += [*_table(("argument", "meaning"), rows), ""]
    if options:
        rows = [
            (_option_names(p, hints.get(p.name)), p.help or "", _default(p))
            for p in options
        ]
        lines += [*_table(("option", "meaning", "default"), rows), ""]
    return lines


def _option_names(option, hint):
    names = ", ".join(f"`{name}`" for name in option.opts)
    if option.secondary_opts:
        names += ", " + ", ".join(f"`{name}`" for name in option.secondary_opts)
    kind = option.metavar or _kind(hint)
    return f"{names} {kind}".strip()


def _kind(hint):
    """Name a type as `--help` does: INTEGER for `int | None` or a list of them."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _kind(next(a for a in typing.get_args(hint) if a is not type(None)))
    if typing.get_origin(hint) in (list, tuple):
        return _kind(typing.get_args(hint)[0])
    return _TYPES.get(hint, "TEXT")


def _default(option):
    if option.required:
        return "required"
    if isinstance(option.show_default, str):  # of a field of a configuration
        return f"`{option.show_default}`"
    if option.default is None or option.default == ():
        return ""
    if isinstance(option.default, bool):
        return "yes" if option.default else "no"
    return f"`{option.default}`"


def _table(titles, rows):
    cells = [[str(cell or "").replace("|", r"\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *cells)]


def tutorials():
    """Return the site's pages of the notebooks, and their pictures.

    They are not run: what the notebooks keep is shown. The index is that of
    `notebooks/README.md`.

    Returns:
        `{place: text}` and `{place: bytes}`.
    """
    folder = ROOT / "notebooks"
    index = (folder / "README.md").read_text("utf-8")
    pages, pictures = {"tutorials/index.md": _leading_elsewhere(index)}, {}
    for path in sorted(folder.glob("*.ipynb")):
        lines = []
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            text = "".join(cell["source"])
            for name, found in cell.get("attachments", {}).items():
                place = f"{path.stem}_{name}"
                pictures[f"tutorials/{place}"] = base64.b64decode(found["image/png"])
                text = text.replace(f"(attachment:{name})", f"({place})")
            if cell["cell_type"] == "markdown":
                # Code within a list: Python-Markdown wants it further in than Jupyter.
                text = re.sub(r"^ {6}(?=\S)", " " * 8, text, flags=re.MULTILINE)
                lines += [_leading_elsewhere(text), ""]
            elif '"results:"' not in text:  # those are for the tests
                lines += ["```python", text, "```", ""]
                for output in cell["outputs"]:
                    lines += _shown(output, path.stem, pictures)
            if len(lines) == 2:  # below the opening
                lines += [f"[The notebook itself](../../notebooks/{path.name})", ""]
        pages[f"tutorials/{path.stem}.md"] = "\n".join(lines)
    return pages, pictures


def _shown(output, stem, pictures):
    """Return the lines that show an output of a cell; keep its picture."""
    data = output.get("data", {})
    if "image/png" in data:
        name = f"{stem}_{sum(stem in place for place in pictures) + 1}.png"
        pictures[f"tutorials/{name}"] = base64.b64decode(data["image/png"])
        return [f"![The picture that this cell draws]({name})", ""]
    if "text/html" in data:
        return ["<div>", "".join(data["text/html"]), "</div>", ""]
    if "text/markdown" in data:
        return ["".join(data["text/markdown"]), ""]
    text = "".join(output.get("text", data.get("text/plain", ""))).strip("\n")
    return ["```text", text, "```", ""] if text else []


def _leading_elsewhere(text):
    """Let the links of a notebook lead to pages of the site.

    A source file of the package leads to its room in the reference.
    """
    text = re.sub(r"\]\((\d\d_\w+)\.ipynb\)", r"](\1.md)", text)
    text = text.replace("](README.md)", "](index.md)")
    text = re.sub(r"\]\(\.\./gpt_tf/(\w+)[/.][\w/.]*\)", r"](../reference/\1.md)", text)
    text = re.sub(r"\]\(\.\./(?!docs/|reference/)", "](../../", text)
    return text.replace("](../docs/", "](../")


def generated_pages():
    """Return all pages that are written while the site is built, by their place."""
    pages, _ = tutorials()
    pages["reference/command_line.md"] = command_line_page()
    for room, names in public_names().items():
        pages[f"reference/{room}.md"] = python_page(room, names)
    return pages


def links_outside(text, page):
    """Return the links of a page to files outside `docs/`: `{link: file}`.

    Args:
        text: The page, Markdown.
        page: Its place in `docs/`, `"concepts/parallel.md"` for example.
    """
    found = {}
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        if ":" in link:
            continue
        place = posixpath.normpath(
            posixpath.join("docs", posixpath.dirname(page), link)
        )
        if not place.startswith("docs/"):
            found[link] = place
    return found


# What MkDocs calls


def on_config(config):
    """Put the generated pages of tutorials and reference into the navigation."""
    for entry in config.nav:
        if "Tutorials" in entry:
            pages, _ = tutorials()
            titles = {page: text[2 : text.index("\n")] for page, text in pages.items()}
            rest = [
                {t: page}
                for page, t in titles.items()
                if page not in entry["Tutorials"]
            ]
            entry["Tutorials"] = [*entry["Tutorials"], *rest]
        if "Reference" in entry:
            rooms = [
                {ROOMS.get(room, room.capitalize()): f"reference/{room}.md"}
                for room in public_names()
            ]
            entry["Reference"] = [*entry["Reference"], *rooms]
    return config


def on_files(files, config):
    """Add the generated pages, and the files outside `docs/` that pages link to."""
    from mkdocs.structure.files import File

    for place, content in {**generated_pages(), **tutorials()[1]}.items():
        files.append(File.generated(config, place, content=content))
    for page in list(files.documentation_pages()):
        for link, place in links_outside(page.content_string, page.src_uri).items():
            path = ROOT / place
            if not path.is_file():
                _log.warning("%s links to %s, which is no file", page.src_uri, link)
            elif f"repository/{place}" not in files.src_uris:
                copied = f"repository/{place}"
                files.append(File.generated(config, copied, abs_src_path=str(path)))
    for place, path in web_page().items():
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def web_page():
    """Return the files of the page with the bundled model by their place, if any."""
    if not (NODE_MODULES / "@litertjs/core").is_dir():
        _log.info("no page with a model: LiteRT.js is not in %s", NODE_MODULES)
        return {}
    from gpt_tf.edge.web_bundle import write_web

    _temporary.append(tempfile.mkdtemp())
    folder = Path(_temporary[-1]) / "try"
    model = ROOT / "saved_models/python-small.litertlm"
    prompt = "    def __init__(self"
    write_web(model, folder, runtime=NODE_MODULES, offline=True, prompt=prompt)
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {f"try/{path.relative_to(folder).as_posix()}": path for path in found}


def on_page_markdown(markdown, page, config, files):
    """Let links to files outside `docs/` lead to their copies."""
    own = page.file.src_uri
    for link, place in links_outside(markdown, own).items():
        copied = posixpath.relpath(f"repository/{place}", posixpath.dirname(own) or ".")
        markdown = markdown.replace(f"]({link}", f"]({copied}")
    if own == "index.md" and "try/index.html" in files.src_uris:
        line = "**[Write with the bundled model](try/index.html)**, in this browser."
        markdown = markdown.replace("\n\n", f"\n\n{line}\n\n", 1)
    return markdown


def on_startup(command, dirty):
    """Keep the packages quiet: pages are made, nothing is trained."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def on_post_build(config):
    """Remove what was copied into the site."""
    while _temporary:
        shutil.rmtree(_temporary.pop())
