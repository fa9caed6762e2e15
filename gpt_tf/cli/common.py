"""What the commands share: the program itself, notices, TensorFlow."""

import functools
import logging
import shlex
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Annotated

import typer
import typer.core
from rich.text import Text

import gpt_tf
from gpt_tf.native_logs import held_back

# Exit status: nothing that was measured fits the budgets; what comes nearest was told.
NOTHING_FITS = 3


# Where each command stands, as `--help` names them: the way of the data.
_MODULES = {
    "optimize": "optimize",
    "train": "training",
    "finetune": "training",
    "distil": "training",
    "quantize": "training",
    "inspect": "inspect",
    "export": "artefacts",
    "generate": "artefacts",
    "chat": "chat",
    "serve": "serve",
    "web": "web",
    "evaluate": "evaluate",
    "benchmark": "benchmark",
    "recommend": "recommend",
    "explain": "explain",
}


class _Verbs(Mapping):
    """The commands by name; one is imported when it is asked for."""

    def __getitem__(self, name):
        return _command(name, _MODULES[name])

    def __iter__(self):
        return iter(_MODULES)

    def __len__(self):
        return len(_MODULES)


@functools.cache
def _command(name, module):
    single = typer.Typer(add_completion=False)
    single.command(name)(getattr(import_module(f"gpt_tf.cli.{module}"), name))
    return typer.main.get_command(single)


class _Commands(typer.core.TyperGroup):
    """Commands that say that they were interrupted, whatever version typer has."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.commands = _Verbs()

    def invoke(self, context):
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            typer.echo("gpt-tf: interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool):
    if wanted:
        typer.echo(f"gpt-tf {gpt_tf.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version, and end.",
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option(help="Show the traceback of an error.")
    ] = False,
):
    """Train a GPT, make it fast, and ship it to an edge device."""
    app.debug = debug
    app.command_run = context.command.get_command(context, context.invoked_subcommand)


def command_line() -> str:
    """Return the command as it was typed, for a report."""
    return shlex.join(["gpt-tf", *sys.argv[1:]])


def notice(line):
    """Print a line on standard output, above a bar that is being drawn."""
    # Here and not above: it brings all that draws progress.
    from gpt_tf.progress import current_console

    # It may quote any text; none of it is rich's markup.
    current_console().print(Text(line))


class _NoticeHandler(logging.Handler):
    """Prints what the package logs."""

    def emit(self, record):
        notice(self.format(record))


def show_notices():
    """Print on standard output what the package logs; again changes nothing."""
    logger = logging.getLogger("gpt_tf")
    logger.setLevel(logging.INFO)
    if not any(isinstance(one, _NoticeHandler) for one in logger.handlers):
        logger.addHandler(_NoticeHandler())


def import_tensorflow():
    """Import TensorFlow without the lines that its libraries log meanwhile."""
    with held_back(lambda line, failed: failed):
        import tensorflow as tf
    tf.get_logger().setLevel("ERROR")
