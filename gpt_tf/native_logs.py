"""What native code remarks, kept off the standard error stream.

LiteRT and TensorFlow's libraries log from native code how they start and end, and
their Python packages have no switch for that. Errors still get through.
"""

import contextlib
import ctypes
import functools
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator

# The levels of LiteRT's lines, and what continues one.
_REMARKS = (b"INFO:", b"WARNING:", b"VERBOSE:", "\u2514".encode())
_lock = threading.Lock()


def quiet():
    """Hold back LiteRT's remarks; whatever else is written follows at the end."""
    return held_back(lambda line, failed: not line.startswith(_REMARKS))


@contextlib.contextmanager
def held_back(passes: Callable[[bytes, bool], bool]) -> Iterator[None]:
    """Hold back what native code writes to standard error while the block runs.

    `passes` says of each line, and of whether the block failed, if it follows then.
    """
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

        def replay(kind, error, traceback):
            swallowed.seek(0)
            for line in swallowed:
                if passes(line, error is not None):
                    os.write(kept, line)

        stack.push(replay)
        os.dup2(swallowed.fileno(), 2)
        stack.callback(os.dup2, kept, 2)
        yield


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
