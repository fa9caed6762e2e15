"""The command line: a verb per command, no logic of its own.

A command stands in the module named after its group; its options follow from the
settings that they fill (`options`). `common` puts the verbs in order, and imports
the one that is run; here what ends a command becomes one line and a status. Imports
every room; none imports it. Start with `training`.
"""

import contextlib
import errno
import functools
import itertools
import os
import re
import sys
import traceback
import warnings

import typer

from gpt_tf.artifacts import disk_trouble
from gpt_tf.cli.common import app, show_notices
from gpt_tf.errors import InputError, PeerLostError, WorkerFailedError

__all__ = ["app", "main"]

_EXTRAS = {
    **dict.fromkeys(
        "tensorflow tf_keras tensorflow_model_optimization keras_nlp safetensors scipy "
        "matplotlib flatbuffers litert_lm_builder h5py gguf ml_dtypes".split(),
        "train",
    ),
    **{"ai_edge_litert": "edge", "lime": "explain", "shap": "explain"},
    **dict.fromkeys(("fastapi", "prometheus_client", "uvicorn"), "serve"),
    "ray": "cluster",
}
# What is wrong then is the place, and not gpt_tf.
_NO_PLACE = {
    *(errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG),
    *(errno.ENOTDIR, errno.EPERM, errno.EROFS),
}
# Options of which nothing between quotes means: none of these.
_LISTS = ("--contexts", "--by-threads", "--requests")


def main():
    """Run the command line; what the user can mend is one line and status 2."""
    warnings.showwarning = _one_line
    # What is closed becomes the null device: its number would go to the next file that
    # is opened, and what native code prints into that file.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - it stays
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a stream that is not the system's
            stream.reconfigure(errors="replace")  # models write what some cannot show
    try:
        show_notices()
        _check_words(sys.argv)
        app(prog_name="gpt-tf")
    except Exception as error:
        line = _line_of(error)
        if line is None:
            raise
        if getattr(app, "debug", False):
            traceback.print_exc()
        _say(line)
        if isinstance(error, PeerLostError):
            _exit_at_once(PeerLostError.EXIT_STATUS)
        sys.exit(getattr(error, "status", 2))


def _exit_at_once(status):
    """Leave without TensorFlow's own farewell, which waits for the lost worker."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _check_words(words):
    """Refuse what is empty, and an `--out` that TensorFlow cannot take."""
    for before, word in itertools.pairwise(words):
        # `--out ""` would be the folder that one stands in.
        if not word or re.fullmatch("--[a-z-]+=", word):
            name = word[:-1] or before
            if name not in _LISTS:
                raise InputError(f"{name} expects a value. Received: nothing.")
        is_out = before == "--out" or word.startswith("--out=")
        if is_out and re.search("[\udc80-\udcff]", word):
            raise InputError(
                "--out expects a name in UTF-8, which TensorFlow needs. Received: "
                f"{word!r}. Choose another."
            )


def _line_of(error):
    """Return what to say of an error that the user can mend, else None."""
    if isinstance(error, InputError):
        return _in_options(str(error))
    if isinstance(error, PeerLostError | WorkerFailedError):
        return str(error)
    name = getattr(error, "filename", None)
    if (trouble := disk_trouble(error)) is not None:
        return (
            f"{name or 'What was made'} cannot be written: {trouble}. Make room, or "
            "see to the disk, and start again; what was finished is kept."
        )
    if isinstance(error, OSError) and name and error.errno in _NO_PLACE:
        return f"{name} cannot be used: {error.strerror}. Choose another place."
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package in _EXTRAS:
        return (
            f"this command expects the package {package}, which is not installed. "
            f"Install it with: pip install 'gpt-tf[{_EXTRAS[package]}]'"
        )
    return None


def _in_options(message):
    """Call what Python calls `num_layers` as this command does, `--student-layers`."""
    command = getattr(app, "command_run", None)
    options = {p.name: p.opts[0] for p in command.params} if command else {}

    def option(found):
        spelled = options.get(found[1], "")
        return f"`{spelled}`" if spelled.startswith("--") else found[0]

    return re.sub(r"`(\w+)`", option, message)


def _one_line(message, category, filename, lineno, file=None, line=None):
    if category.__module__.startswith("gpt_tf"):
        _say_once(str(message))


@functools.cache
def _say_once(message):
    # Python itself forgets what it has said where a library changes its filters.
    _say(message)


def _say(message):
    # What a library remarks within a message may run over several lines.
    typer.echo(f"gpt-tf: {' '.join(str(message).splitlines())}", err=True)
