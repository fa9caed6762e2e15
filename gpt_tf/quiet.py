"""LiteRT's remarks kept off the standard error stream.

LiteRT logs from native code how it starts and ends, and its Python package has no
switch for that. Errors still get through.
"""

import contextlib
import ctypes
import functools
import os
import sys
import tempfile
import threading
from collections.abc import Iterator

# The levels of LiteRT's lines, and what continues one.
_REMARKS = (b"INFO:", b"WARNING:", b"VERBOSE:", "\u2514".encode())
_lock = threading.Lock()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what native code writes to standard error; errors follow at the end."""
    with _lock, contextlib.ExitStack() as stack:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            sys.stderr.flush()
        try:
            kept = os.dup(2)
        except OSError:  # there is no standard error
            yield
            return
        stack.callback(os.close, kept)
        swallowed = stack.enter_context(tempfile.TemporaryFile())
        stack.callback(_pass_errors_on, swallowed, kept)
        os.dup2(swallowed.fileno(), 2)
        stack.callback(os.dup2, kept, 2)
        yield


def _pass_errors_on(swallowed, stream):
    swallowed.seek(0)
    for line in swallowed:
        if not line.startswith(_REMARKS):
            os.write(stream, line)


@functools.cache
def end_quietly() -> None:
    """Close standard error once Python has ended: then LiteRT logs its own end.

    To be called when LiteRT has set itself up, for what is registered later is run
    earlier. Where the C library does not know how, the lines stay.
    """
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        close = ctypes.cast(library.close, ctypes.c_void_p)
        library.__cxa_atexit(close, ctypes.c_void_p(2), None)
