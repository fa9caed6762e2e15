"""Weights as XNNPACK packs them, kept in the user's cache folder.

XNNPACK lays weights out anew for its kernels. Mapped from a file, they are there at
once when a model is opened again, and several processes share them. LiteRT believes
what such a file says, and ends the process where it cannot write one. So it packs in
memory, and what it packed is copied; the copy's name states what it was made of and
the SHA-256 of its content, and both are checked before LiteRT sees it. Whatever goes
wrong, the weights stay in memory. All of this is Linux's, and elsewhere they do, too.

Reference: XNNPACK's weight cache, tensorflow/lite/delegates/xnnpack/README.md.
"""

import contextlib
import hashlib
import logging
import os
import platform
import shutil
import stat
import threading
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from gpt_tf import artifacts
from gpt_tf.errors import InputError
from gpt_tf.export.litert import IN_MEMORY

KINDS = ("disk", "memory", "none")

# Smaller models are packed faster than a file is found, and fit a processor's caches.
SMALLEST_BYTES = 16 << 20
# What all files together may take; of more, those that were not used longest go.
MOST_BYTES = 4 << 30

# LiteRT keeps what it packs in memory in an open file of this name.
_FILE_IN_MEMORY = "/memfd:XNNPack in-memory weight cache"
_OPEN_FILES = Path("/proc/self/fd")
_SUFFIX = ".xnnpack"

# So that a file in memory that is new is the one of the model that was loaded.
_one_at_a_time = threading.Lock()

logger = logging.getLogger(__name__)


def folder() -> Path:
    """Return where the files are: `gpt_tf/weights` in the user's cache folder."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches) / "gpt_tf" / "weights"


def load(
    load_model: Callable[[str], None], kind: str, identity: str, size_bytes: int
) -> None:
    """Load a model with its packed weights as they are kept.

    Args:
        load_model: Loads it; called with the name of XNNPACK's cache, or none.
        kind: One of `KINDS`: in a file, in memory, or a copy for each signature.
        identity: What is to be the same for the same weights: the SHA-256 of the model.
        size_bytes: The model's size.

    Raises:
        RuntimeError: LiteRT cannot load the model, however its weights are kept.
    """
    wants_file = kind == "disk" and size_bytes >= SMALLEST_BYTES
    if not wants_file or not _OPEN_FILES.is_dir():
        with _one_at_a_time:
            load_model("" if kind == "none" else IN_MEMORY)
        return
    place, key = folder(), _key(identity)
    with _one_at_a_time:
        with _told("cannot be used"):
            if _load_from_file(load_model, place, key):
                return
        before = _files_in_memory()
        load_model(IN_MEMORY)
        with _told("cannot be kept"):
            ((packed, _),) = _files_in_memory() - before
            _keep(packed, place, key)


@contextlib.contextmanager
def _told(what):
    """Go on where something fails: it is done without."""
    try:
        yield
    except (InputError, OSError, ValueError) as error:
        logger.debug("packed weights %s: %s", what, error)


def _load_from_file(load_model, place, key):
    """Load a model with the file of a key; return whether there is one."""
    for path in place.glob(f"{key}-*{_SUFFIX}"):
        with contextlib.suppress(OSError, RuntimeError), open(path, "rb") as file:
            # By this name it stays the file that was verified, whatever comes after.
            pinned = _OPEN_FILES / str(file.fileno())
            stated = path.stem.rpartition("-")[2]
            if _is_ours(file) and artifacts.sha256_of(pinned) == stated:
                with contextlib.suppress(OSError):
                    os.utime(path)  # used now
                load_model(str(pinned))
                return True
        path.unlink()
    return False


def _is_ours(file):
    """Whether it is a plain file that nobody else can have written."""
    found = os.fstat(file.fileno())
    is_private = stat.S_ISREG(found.st_mode) and not found.st_mode & 0o022
    return is_private and found.st_uid == os.getuid()


def _files_in_memory():
    """Return the open files that hold what LiteRT packed in memory, and their nodes."""
    found = set()
    for path in _OPEN_FILES.iterdir():
        with contextlib.suppress(OSError):
            if os.readlink(path).startswith(_FILE_IN_MEMORY):
                found.add((path, path.stat().st_ino))
    return found


def _keep(packed, place, key):
    """Copy what was packed into a file of a key."""
    with artifacts.locked(place):
        for left in place.glob(artifacts.partial_path("*").name):
            left.unlink()  # of a process that was killed
        partial = artifacts.partial_path(place / key)
        try:
            shutil.copyfile(packed, partial)
            partial.chmod(0o400)
            digest = artifacts.sha256_of(partial)
            os.replace(partial, place / f"{key}-{digest}{_SUFFIX}")
        finally:
            partial.unlink(missing_ok=True)
        _bound(place)


def _bound(place):
    """Remove the files that were not used for longest, if all are too large."""
    files = sorted(place.glob(f"*{_SUFFIX}"), key=os.path.getmtime, reverse=True)
    total = 0
    for path in files:
        total += path.stat().st_size
        if total > MOST_BYTES and path != files[0]:
            path.unlink()


def _key(identity):
    """Return the hash of what packed weights depend on."""
    facts = [identity, metadata.version("ai-edge-litert"), platform.machine()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        names = ("flags", "Features", "model name", "CPU part")
        facts += sorted({line for line in lines if line.startswith(names)})
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]
