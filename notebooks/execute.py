"""Run the tutorials and keep their outputs.

    python notebooks/execute.py
    python notebooks/execute.py 03_quantise --set steps=20 --out small

Each tutorial is a text source, `NN_name.py` in jupytext's percent format. It runs
from top to bottom in a kernel of this very Python, in a temporary folder, and its
notebook is written whole or not at all: where a cell fails, the old one stays.
"""

import argparse
import ast
import os
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from gpt_tf.artifacts import atomic_file
from gpt_tf.errors import InputError

# Where a tutorial's opening shows the last picture that its cells draw.
RESULT = "result.png"
KERNEL_OPTIONS = [
    # What TensorFlow's C++ remarks on the machine stays in the terminal.
    "--IPKernelApp.capture_fd_output=False",
    "--IPKernelApp.log_level=40",
]


class ThisPython(KernelSpecManager):
    """Knows one kernel: the Python that runs this file, whatever is installed."""

    def get_kernel_spec(self, kernel_name):
        return KernelSpec(
            argv=[
                sys.executable,
                *("-m", "ipykernel_launcher", "-f", "{connection_file}"),
            ],
            display_name="Python 3",
            language="python",
        )


def tutorials() -> list[Path]:
    """Return the sources of all tutorials in their order."""
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def read_source(path: str | os.PathLike) -> nbformat.NotebookNode:
    """Read a tutorial's source as a notebook without outputs.

    Cells are numbered, so that the same source makes the same notebook.
    """
    notebook = jupytext.read(path)
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index:02d}"
    return notebook


def execute(path: str | os.PathLike, parameters=None) -> nbformat.NotebookNode:
    """Run a tutorial in a temporary folder.

    Args:
        path: The source of the tutorial.
        parameters: Values that replace those of the cell tagged `parameters`.

    Returns:
        The notebook with its outputs, without times and versions.

    Raises:
        InputError: A parameter is not set in the cell tagged `parameters`.
        CellExecutionError: A cell failed.

    Example:
        >>> notebook = execute("03_quantise.py", {"steps": 20})
    """
    notebook = read_source(path)
    if parameters:
        _insert_parameters(notebook, parameters)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            km=AsyncKernelManager(kernel_spec_manager=ThisPython()),
            timeout=None,
            record_timing=False,
            coalesce_streams=True,
            extra_arguments=KERNEL_OPTIONS,
            resources={"metadata": {"path": folder}},
        )
        client.execute(env=_environment())
    notebook.metadata.language_info.pop("version", None)
    _show_result_at_the_top(notebook)
    return notebook


def _show_result_at_the_top(notebook):
    """Attach a picture to the opening, where that has a place for it.

    It is that of the cell tagged `result`, or the last.
    """
    tagged = [c for c in notebook.cells if "result" in c.metadata.get("tags", ())]
    pictures = [
        output.data["image/png"]
        for cell in tagged or notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", ())
    ]
    opening = notebook.cells[0]
    if pictures and f"(attachment:{RESULT})" in opening.source:
        opening.attachments = {RESULT: {"image/png": pictures[-1]}}


def _insert_parameters(notebook, parameters):
    """Add a cell that sets the parameters anew, below the one that sets them."""
    tagged = [
        index
        for index, cell in enumerate(notebook.cells)
        if "parameters" in cell.metadata.get("tags", ())
    ]
    if len(tagged) != 1:
        raise InputError(
            "Parameters expect one cell tagged `parameters`. "
            f"Received: a tutorial with {len(tagged)}. Begin that cell with "
            '`# %% tags=["parameters"]`.'
        )
    known = [
        target.id
        for statement in ast.parse(notebook.cells[tagged[0]].source).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
    ]
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise InputError(
            f"The tutorial's parameters are {', '.join(known)}. "
            f"Received: {', '.join(unknown)}."
        )
    lines = [f"{name} = {value!r}" for name, value in parameters.items()]
    added = nbformat.v4.new_code_cell(
        "\n".join(lines),
        id="injected-parameters",
        metadata={"tags": ["injected-parameters"]},
    )
    notebook.cells.insert(tagged[0] + 1, added)


def _environment():
    """Let the kernel find this checkout's gpt_tf, and draw into the notebook."""
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }


def _assignment(text):
    """Read `name=value`; a value that is no Python literal is a text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(
            f"expected name=value, for example steps=20. Received: {text!r}"
        )
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def main(arguments=None) -> int:
    """Run the tutorials that were named, or all, and write their notebooks.

    Returns:
        Exit status: 0, or 1 where a cell failed, or 2 where an argument is wrong.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="all unless given")
    parser.add_argument(
        *("--set", "-s"),
        action="append",
        default=[],
        type=_assignment,
        metavar="NAME=VALUE",
        help="replace a parameter of the tutorial; may be repeated",
    )
    parser.add_argument(
        *("--out", "-o"),
        type=Path,
        metavar="FOLDER",
        help="where the notebooks go; beside their sources unless given",
    )
    options = parser.parse_args(arguments)
    paths = {path.stem: path for path in tutorials()}
    unknown = [name for name in options.names if name not in paths]
    if unknown:
        parser.error(f"tutorials are {', '.join(paths)}. Received: {unknown[0]}.")
    if options.set and options.out is None:
        parser.error("--set expects --out: the kept notebooks run as they are written.")
    for name in options.names or paths:
        target = (options.out or HERE) / f"{name}.ipynb"
        print(f"running {name}", flush=True)
        try:
            notebook = execute(paths[name], dict(options.set))
        except InputError as error:
            parser.error(str(error))
        except CellExecutionError as error:
            print(f"{name} failed, and {target} stays as it was:", file=sys.stderr)
            print(error, file=sys.stderr)
            return 1
        with atomic_file(target, "w") as file:
            nbformat.write(notebook, file)
        print(f"wrote {target}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
