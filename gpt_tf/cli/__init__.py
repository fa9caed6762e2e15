"""The command line: a verb per command, no logic of its own.

A command stands in the module named after its group and registers itself with the
program in `common`; its options follow from the settings that they fill (`options`).
Here is what ends a command: errors become one line and a status. Imports every room;
none imports it. Start with `training`.
"""

import contextlib
import errno
import itertools
import os
import re
import sys
import traceback
import warnings

import typer

from gpt_tf.artifacts import disk_trouble
from gpt_tf.cli import (  # noqa: F401  they register themselves
    artefacts,
    benchmark,
    evaluate,
    explain,
    optimize,
    recommend,
    training,
)
from gpt_tf.cli.common import app, show_notices
from gpt_tf.errors import InputError, PeerLostError, WorkerFailedError

__all__ = ["app", "main"]


def main():
    """Run the command line; what the user can mend is one line and status 2."""
    warnings.showwarning = _one_line
    _open_what_is_closed()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a stream that is not the system's
            stream.reconfigure(errors="replace")  # models write what some cannot show
    try:
        show_notices()
        _check_words(sys.argv)
        app(prog_name="gpt-tf")
    except InputError as error:
        if getattr(app, "debug", False):
            raise
        _say(_in_options(str(error)))
        sys.exit(2)
    except PeerLostError as error:
        if getattr(app, "debug", False):
            traceback.print_exc()
        _say(error)
        _exit_at_once(PeerLostError.EXIT_STATUS)
    except WorkerFailedError as error:
        _say(error)
        sys.exit(error.status)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if getattr(app, "debug", False) or package not in _EXTRAS:
            raise
        _say(
            f"this command expects the package {package}, which is not installed. "
            f"Install it with: pip install 'gpt-tf[{_EXTRAS[package]}]'"
        )
        sys.exit(2)
    except Exception as error:
        line = _of_the_disk(error)
        if getattr(app, "debug", False) or line is None:
            raise
        _say(line)
        sys.exit(2)


def _open_what_is_closed():
    """Let a closed standard stream be the null device.

    Its number would go to the next file that is opened, and what native code prints
    into that file.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - it stays


# Of an empty list nothing is measured.
_LISTS = ("--contexts", "--by-threads", "--requests")


def _check_words(words):
    """Refuse names that are empty, and of what is written those that are not UTF-8."""
    for before, word in itertools.pairwise(words):
        # `--out ""` would be the folder that one stands in.
        if not word or re.fullmatch("--[a-z-]+=", word):
            name = word[:-1] or before
            if name in _LISTS:
                continue
            raise InputError(f"{name} expects a value. Received: nothing but quotes.")
        is_out = before == "--out" or word.startswith("--out=")
        if is_out and re.search("[\udc80-\udcff]", word):
            raise InputError(
                "--out expects a name in UTF-8, which TensorFlow needs. Received: "
                f"{word!r}. Choose another."
            )


def _in_options(message):
    """Call what Python calls `num_layers` as this command does, `--student-layers`."""
    command = getattr(app, "command_run", None)
    options = {p.name: p.opts[0] for p in command.params} if command else {}

    def option(found):
        name, short = found[1], found[1].removeprefix("num_")
        students = (f"student_{name}", f"student_{short}")
        for other in (name, *students, short, short.removesuffix("s")):
            if options.get(other, "").startswith("--"):
                return f"`{options[other]}`"
        return found[0]

    return re.sub(r"`(\w+)`", option, message)


# What is wrong then is the place, and not gpt_tf.
_NO_PLACE = {
    *(errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG),
    *(errno.ENOTDIR, errno.EPERM, errno.EROFS),
}
_DEEP = 300  # folders; Python makes them by calls within calls


def _of_the_disk(error):
    """Return what to say of a file that cannot be read or written, else None."""
    name = getattr(error, "filename", None)
    if (trouble := disk_trouble(error)) is not None:
        return (
            f"{name or 'What was made'} cannot be written: {trouble}. Make room, or "
            "see to the disk, and start again; what was finished is kept."
        )
    if isinstance(error, OSError) and name and error.errno in _NO_PLACE:
        return f"{name} cannot be used: {error.strerror}. Choose another place."
    if isinstance(error, RecursionError):
        deepest = max(sys.argv, key=lambda word: word.count(os.sep))
        if deepest.count(os.sep) > _DEEP:
            return f"{deepest[:20]}... lies in too many folders. Choose another place."
    return None


_EXTRAS = dict.fromkeys(
    (
        *("tensorflow", "tf_keras", "tensorflow_model_optimization", "keras_nlp"),
        *("safetensors", "matplotlib", "flatbuffers", "litert_lm_builder", "h5py"),
        "scipy",
    ),
    "train",
) | {"ai_edge_litert": "edge", "lime": "explain", "shap": "explain", "ray": "cluster"}


def _exit_at_once(status):
    """Leave without TensorFlow's own farewell, which waits for the lost worker."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _one_line(message, category, filename, lineno, file=None, line=None):
    if category.__module__.startswith("gpt_tf"):
        _say(message)


def _say(message):
    # What a library remarks within a message may run over several lines.
    typer.echo(f"gpt-tf: {' '.join(str(message).splitlines())}", err=True)
