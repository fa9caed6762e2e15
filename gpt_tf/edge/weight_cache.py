"""Weights as XNNPACK packs them, kept in the user's cache folder.

XNNPACK lays weights out anew for its kernels. Mapped from a file, they are there at
once when a model is opened again, several processes share them, and a step is faster
than with the same weights in memory. LiteRT believes what such a file says, so its name
states what it was made of and the SHA-256 of its content, and both are checked before
LiteRT sees it. Whatever goes wrong, the weights are packed in memory.

Reference: XNNPACK's weight cache, tensorflow/lite/delegates/xnnpack/README.md.
"""

import contextlib
import hashlib
import logging
import os
import platform
import shutil
import stat
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from gpt_tf import artifacts
from gpt_tf.errors import InputError

KINDS = ("disk", "memory", "none")

# Smaller models are packed faster than a file is found, and fit a processor's caches.
SMALLEST_BYTES = 16 << 20
# What all files together may take; of more, those that were not used longest go.
MOST_BYTES = 4 << 30

# Under this name LiteRT keeps one packed copy for all signatures in memory.
_IN_MEMORY = ":memory"
_SUFFIX = ".xnnpack"

logger = logging.getLogger(__name__)


def folder() -> Path:
    """Return where the files are: `gpt_tf/weights` in the user's cache folder.

    That is `$XDG_CACHE_HOME` where it is set, else the system's place.
    """
    place = "Library/Caches" if sys.platform == "darwin" else ".cache"
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser(f"~/{place}")
    return Path(caches) / "gpt_tf" / "weights"


def load(
    load_model: Callable[..., None], kind: str, identity: str, size_bytes: int
) -> None:
    """Load a model with its packed weights as they are kept.

    Args:
        load_model: Loads it and runs it once. Called with the name of XNNPACK's cache,
            or None, and with `errors=False` where LiteRT is not to write any.
        kind: One of `KINDS`: in a file, in memory, or a copy for each signature.
        identity: What is to be the same for the same weights: the SHA-256 of the model.
        size_bytes: The model's size.

    Raises:
        RuntimeError: LiteRT cannot load the model, however its weights are kept.
    """
    # Windows neither renames nor removes what is mapped.
    wants_file = kind == "disk" and sys.platform != "win32"
    if wants_file and size_bytes >= SMALLEST_BYTES:
        try:
            _load_from_file(load_model, folder(), _key(identity), size_bytes)
            return
        except (InputError, OSError, RuntimeError) as error:
            logger.debug("packed weights are kept in memory: %s", error)
    load_model(None if kind == "none" else _IN_MEMORY)


def _load_from_file(load_model, place, key, size_bytes):
    found = _verified(place, key)
    if found is not None:
        os.utime(found)  # used now
        try:
            load_model(str(found), errors=False)
        except RuntimeError:  # LiteRT does not take it
            found.unlink()
            raise
        return
    with artifacts.locked(place):
        for left in place.glob(artifacts.partial_path("*").name):
            left.unlink()  # of a process that was killed
        if shutil.disk_usage(place).free < 2 * size_bytes:
            raise OSError(f"{place} has too little room")
        partial = artifacts.partial_path(place / key)
        try:
            load_model(str(partial), errors=False)
            digest = artifacts.sha256_of(partial)
            partial.chmod(0o400)  # nobody writes to what is mapped
            os.replace(partial, place / f"{key}-{digest}{_SUFFIX}")
        finally:
            partial.unlink(missing_ok=True)
        _bound(place)


def _verified(place, key):
    """Return the file of a key, whose content is what its name says, or None."""
    for path in place.glob(f"{key}-*{_SUFFIX}"):
        if _is_ours(path) and path.stem == f"{key}-{artifacts.sha256_of(path)}":
            return path
        path.unlink()
    return None


def _is_ours(path):
    """Whether it is a plain file that nobody else can have written."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_mode & 0o022:
        return False
    return not hasattr(os, "getuid") or found.st_uid == os.getuid()


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
