"""Files written whole or not at all, and the manifests that describe them.

What is being written has a name of its own, `.NAME.gpt-tf.partial`, and takes its
final name only when it is complete and on disk: `atomic_file` for a file,
`replaced` for a folder or for files that belong together. A process that is killed
leaves the old or the new and that one name, which the next writer clears away. A
manifest is a JSON file that says what an artefact is, what it was made from and
which bytes it has, so that a damaged or foreign file is noticed before it is used.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import platform
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from gpt_tf.errors import DamagedFileError, InputError

MANIFEST_NAME = "manifest.json"
LOCK_NAME = ".lock"
_PARTIAL = ".gpt-tf.partial"

_VERSIONED_PACKAGES = (
    "gpt-tf",
    "tensorflow",
    "tf_keras",
    "numpy",
    "tokenizers",
    "ai-edge-litert",
)

# Full, over quota, too large a file, failing, gone: what nobody asked the disk for.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE)


def disk_trouble(error: Exception) -> str | None:
    """Return what the disk did, in the system's words, or None if it did nothing.

    Args:
        error: Any; shutil, h5py, safetensors and TensorFlow quote the system.

    Example:
        >>> disk_trouble(OSError(errno.ENOSPC, "..."))
        'No space left on device'
    """
    for code in _DISK_ERRORS:
        words = os.strerror(code)
        if getattr(error, "errno", None) == code or words in str(error):
            return words
    return None


@contextlib.contextmanager
def _disk_errors_explained(path):
    try:
        yield
    except Exception as error:
        trouble = disk_trouble(error)
        is_part = _PARTIAL in str(path)  # of something that is named outside
        if trouble is None or is_part or isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} cannot be written: {trouble}. Make room, or see to the disk, and "
            "start again; what was finished is kept."
        ) from error


def partial_path(path: str | os.PathLike) -> Path:
    """Return the name that something has until it is whole."""
    path = Path(path)
    return path.with_name(f".{path.name}{_PARTIAL}")


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Open a file that takes its final name only when the block ends well.

    Args:
        path: Final name. Missing parent folders are created.
        mode: `"wb"` for bytes or `"w"` for UTF-8 text.

    Yields:
        The open temporary file. After an exception it is removed and whatever
        stood at `path` before is untouched.

    Raises:
        InputError: Another process is writing it, or the disk is full or fails.

    Example:
        >>> with atomic_file("notes.txt", "w") as file:
        ...     file.write("whole or not at all")
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    encoding = None if "b" in mode else "utf-8"
    temporary = partial_path(path)
    with _disk_errors_explained(path):
        handle = _claim(temporary, path)
        with open(temporary, mode, encoding=encoding, opener=lambda *_: handle) as file:
            try:
                file.truncate(0)  # what a killed process wrote
                yield file
                file.flush()
                os.fsync(handle)
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        _sync(path.parent)


def check_writable(path: str | os.PathLike) -> None:
    """Find out whether a file can be written, before the work for it is done.

    Args:
        path: Its final name. Nothing is left there, and no folder is made.

    Raises:
        InputError: It cannot, or a folder stands there.

    Example:
        >>> check_writable("report.json")
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise InputError(
                f"A file is expected at {path}, but that is a folder. Choose another "
                "name."
            )
        above = (one for one in path.absolute().parents if one.exists())
        with tempfile.TemporaryFile(dir=next(above)):
            return
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror}. Choose another place."
        ) from None


@contextlib.contextmanager
def workspace(path: str | os.PathLike, *, keep: bool = False) -> Iterator[Path]:
    """Own a folder beside a path while the block runs, empty at first and then gone.

    Args:
        path: What it is for; another process cannot write there meanwhile. What one
            that was killed began there is settled first.
        keep: Whether what is in it stays, for the next block that keeps it.

    Yields:
        The folder.

    Raises:
        InputError: Another process writes there, or the disk is full or fails.
    """
    path = Path(path)
    work = partial_path(path)
    made = [work] if path.parent.exists() else [work, path.parent]
    with _disk_errors_explained(path):
        if os.path.lexists(work) and not _is_folder(work):  # `atomic_file` left it
            handle = _claim(work, path)
            os.unlink(work)
            os.close(handle)
        try:
            with _locked(work, path):
                try:
                    _settle(path)
                    for one in list(work.rglob("*")):  # there may be links in it
                        if not _is_folder(one) and not _is_own(os.lstat(one)):
                            one.unlink()
                    if not keep:
                        _clear(work)
                    yield work
                finally:
                    _settle(path)
                    if not keep:
                        _clear(work)
        finally:
            for folder in made:
                with contextlib.suppress(OSError):  # something is in it, or it is gone
                    os.rmdir(folder)


@contextlib.contextmanager
def replaced(
    path: str | os.PathLike, *beside: str, keep: bool = False
) -> Iterator[Path]:
    """Fill a folder whose entries take the places of others when the block ends well.

    The old entries are moved aside first, then the new ones come in, then the old ones
    are removed. What a killed process began is undone by the next one that writes
    there, or completed once the entry at `path` was in.

    Args:
        path: A file or folder that the block makes.
        *beside: Names of entries in the same folder that go and come with it.
        keep: Whether what an interrupted block left is there again the next time.

    Yields:
        The folder to put the new entries in, under their final names. What need not
        stay has room beside it, in its parent.

    Raises:
        InputError: As for `workspace`.

    Example:
        >>> with replaced("gpt.tflite", "gpt.tflite.json") as new:
        ...     write_file_manifest(export(new / "gpt.tflite"), "tflite")
    """
    path = Path(path)
    with workspace(path, keep=keep) as work:
        new = work / "new"
        new.mkdir(exist_ok=True)
        yield new
        for one in (new, *new.rglob("*")):
            _sync(one)
        (work / "old").mkdir()
        _swap(path, beside)


def settle(path: Path, *, keep: bool = True) -> None:
    """Undo or complete what a killed process began at a path.

    Args:
        path: As for `workspace`.
        keep: As for `workspace`.
    """
    if os.path.lexists(partial_path(path)):
        with workspace(path, keep=keep):
            pass


def _swap(path, beside):
    """Move the old entries aside and the new ones in, `path` first."""
    new, old = partial_path(path) / "new", partial_path(path) / "old"
    for name in (path.name, *beside):
        place = path.parent / name
        # A file at `path` is replaced in one step, and never missing.
        is_file = name == path.name and not (
            _is_folder(place) or _is_folder(new / name)
        )
        if os.path.lexists(place) and not is_file:
            os.rename(place, old / name)
    os.replace(new / path.name, path)
    for name in beside:
        if os.path.lexists(new / name):
            os.replace(new / name, path.parent / name)
    _sync(path.parent)


def _settle(path):
    """Undo a swap that was interrupted, or complete it if the entry at `path` is in."""
    work = partial_path(path)
    new, old = work / "new", work / "old"
    if not _is_folder(old):
        return
    is_in = not os.path.lexists(new / path.name)
    source = new if is_in else old
    for name in os.listdir(source) if _is_folder(source) else ():
        if not os.path.lexists(path.parent / name):
            os.rename(source / name, path.parent / name)
    if is_in:
        _clear(work)
    else:
        shutil.rmtree(old)


def _clear(work):
    """Remove all that is in a folder but its lock, `old`, by which we know, last."""
    for name in sorted(os.listdir(work), key=lambda name: name == "old"):
        if _is_folder(work / name):
            shutil.rmtree(work / name)
        elif name != LOCK_NAME:
            os.unlink(work / name)


@contextlib.contextmanager
def atomic_folder(
    path: str | os.PathLike, *, replace: bool = False, keep: bool = False
) -> Iterator[Path]:
    """Fill a folder that takes its final name only when the block ends well.

    Args:
        path: Final name; it must not exist yet, but with `replace`. Where it links to
            a folder, that one is meant.
        replace: Whether a folder of that name gives way, once the new one is whole.
        keep: As for `replaced`.

    Yields:
        A temporary folder. After an exception it is removed.

    Raises:
        InputError: `path` exists already, and `replace` is False; or as `replaced`.
    """
    path = Path(os.path.realpath(path))
    with replaced(path, keep=keep) as new:
        if path.exists() and not replace:
            raise InputError(
                f"A new folder was to be written at {path}, but something stands "
                "there. Remove it or choose another name."
            )
        folder = new / path.name
        folder.mkdir(exist_ok=True)
        yield folder


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, the latter whole or not at all."""
    with workspace(path) as work:
        if os.path.lexists(path):
            os.rename(path, work / "gone")


def _is_folder(path):
    """Return whether a folder stands at a path, and not a link to one."""
    return os.path.isdir(path) and not os.path.islink(path)


def _is_own(found):
    """Return whether a file is a plain one that has no other name."""
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


@contextlib.contextmanager
def locked(folder: str | os.PathLike, names: Iterable[str] = ()) -> Iterator[None]:
    """Keep other processes out of a folder while the block runs.

    The operating system takes the lock away from a process that ends, however it
    ends: a lock never has to be removed by hand.

    Args:
        folder: The folder; it is made where there is none, and removed again if
            nothing is put into it. Meanwhile its file `.lock` names the process that
            has it.
        names: Entries that the block may write to. What killed processes left of them
            is settled first.

    Raises:
        InputError: Another process has it, it cannot be written, or there is a
            symbolic link among the entries, through which something else would be.

    Example:
        >>> with locked("runs/mine"):
        ...     write_json("runs/mine/state.json", {"step": 3})
    """
    folder = Path(folder)
    with _locked(folder, folder):
        found = [
            path
            for name in names
            for top in (folder / name, partial_path(folder / name))
            for path in (top, *(top.rglob("*") if _is_folder(top) else ()))
        ]
        for path in found:
            if path.is_symlink():
                raise InputError(
                    f"Files and folders of its own are expected in {folder}. Received: "
                    f"{path}, a symbolic link. Put what it links to in its place; to "
                    f"use another disk, move all of {folder} there and link to that."
                )
        for path in found:
            if path.name.endswith(_PARTIAL):
                settle(path.with_name(path.name[1 : -len(_PARTIAL)]), keep=False)
        yield


def is_settled(folder: Path) -> bool:
    """Return whether nothing is being written in a folder, nor was when it ended."""
    return not any(
        path.name == LOCK_NAME or path.name.endswith(_PARTIAL)
        for path in folder.rglob(".*")
    )


def entries(folder: Path) -> set[str]:
    """Return the names in a folder, but for locks and for what is not whole yet."""
    return {
        name
        for name in os.listdir(folder)
        if name != LOCK_NAME and not name.endswith(_PARTIAL)
    }


@contextlib.contextmanager
def _locked(folder, what):
    """Lock a folder, on behalf of what is written with its help."""
    if folder.exists() and not folder.is_dir():
        raise InputError(
            f"A folder is expected at {folder}, but that is a file. Choose another "
            "name."
        )
    is_new = not folder.exists()
    handle = _claim(folder / LOCK_NAME, what)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows keeps what is open
            os.unlink(folder / LOCK_NAME)
        os.close(handle)
        if is_new and folder.is_dir() and not os.listdir(folder):
            os.rmdir(folder)  # nothing came of it


# Not the library filelock: its lock neither names its owner nor leaves the folder as
# it was, it gives up where a network file system knows no locks, and releases that
# refuse links need Python 3.11.
def _claim(path, what):
    """Return a plain file of ours alone, open and locked; it may have content.

    Whatever else stands there is removed and never followed: a folder that was
    unpacked from an archive may hold links to any file of the user's.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    while True:
        was_there = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            was_there = True
            if path.is_symlink():
                path.unlink(missing_ok=True)
            handle = os.open(path, flags, 0o666)
        except OSError as error:
            if was_there and not path.parent.is_dir():
                continue  # whoever had it removed the folder between our two steps
            raise InputError(
                f"{what} cannot be written: {error.strerror}. Choose another place."
            ) from error
        try:
            if not _try_lock(handle):
                raise InputError(
                    f"{what} is in use by another process{_owner(handle)}. Wait until "
                    "that has ended, or choose another place."
                )
            found = os.fstat(handle)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(found, os.lstat(path)):
                    if _is_own(found):
                        return handle
                    path.unlink(missing_ok=True)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _owner(handle) -> str:
    with contextlib.suppress(OSError, ValueError):  # Windows lets nobody read
        return f", {int(os.read(handle, 20))}"
    return ""


def _try_lock(handle) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems know no locks
        return True
    return True


def to_json(value: Any, **options: Any) -> str:
    """Return a value as JSON, which has neither NaN nor infinity.

    Args:
        value: What JSON knows: dicts, lists, text, numbers, booleans and None.
        **options: As for `json.dumps`.

    Raises:
        InputError: A number in it is not finite.

    Example:
        >>> to_json({"loss": 1.5})
        '{"loss": 1.5}'
    """
    try:
        text = json.dumps(value, allow_nan=False, **options)
        # Of a name that is not UTF-8, what is left over is escaped as JSON does it.
        return text.encode("utf-8", "backslashreplace").decode()
    except ValueError:
        _check_finite(value)
        raise


def _check_finite(value, place="$"):
    if isinstance(value, dict):
        for name, part in value.items():
            _check_finite(part, f"{place}.{name}")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            _check_finite(part, f"{place}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise InputError(
            f"JSON expects finite numbers. Received: {value} in {place}, where $ is "
            "the whole. Find out how it came about, or write null."
        )


def parse_json(text: str | bytes) -> Any:
    """Read JSON, without the NaN and infinities that Python adds to it.

    Raises:
        ValueError: It is not JSON.
    """
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name):
    raise ValueError(f"{name} is not JSON")


JSON_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as readable JSON, whole or not at all.

    Raises:
        InputError: A number in it is not finite.
    """
    text = to_json(value, indent=2, sort_keys=True, ensure_ascii=False)
    with atomic_file(path, "w") as file:
        file.write(f"{text}\n")


def read_json(path: str | os.PathLike, shape: Any = object) -> Any:
    """Read JSON that gpt_tf wrote.

    Args:
        path: The file.
        shape: What it holds: a type; a dict of shapes, in which a key that ends in `?`
            may be missing and the key `str` stands for all; a list of the one shape of
            its items; or a tuple of alternatives.

    Raises:
        DamagedFileError: The file is missing, is not JSON, as with NaN in it, or holds
            something else.
    """
    try:
        value = parse_json(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedFileError(
            f"Expected a JSON file at {path}; none is there."
        ) from None
    except (ValueError, OSError, RecursionError) as error:
        raise DamagedFileError(
            f"Expected JSON in {path}, but it cannot be read: {error}. "
            "The file is damaged or was not written by gpt_tf."
        ) from None
    return check_shape(value, shape, path)


def check_shape(value: Any, shape: Any, path: str | os.PathLike) -> Any:
    """Return what a file holds, or refuse it where it has not the shape expected.

    Args:
        value: JSON.
        shape: As for `read_json`.
        path: The file.

    Raises:
        DamagedFileError: It has not.
    """
    place = _misfit(value, shape)
    if place is not None:
        raise DamagedFileError(
            f"{path} is not what gpt_tf wrote: {place or 'all of it'} is missing or of "
            "another type. The file was altered, or is of another version."
        )
    return value


def _misfit(value, shape, place=""):
    """Return where a value has not its shape, or None."""
    if isinstance(shape, tuple):
        found = [_misfit(value, one, place) for one in shape]
        return None if None in found else max(found, key=len)
    if isinstance(shape, dict | list):
        if not isinstance(value, type(shape)):
            return place
        pairs = _pairs(value, shape)
        found = (_misfit(v, one, f"{place}.{key}".strip(".?")) for key, v, one in pairs)
        return next((one for one in found if one is not None), None)
    if shape is None or value is None:
        return None if shape in (value, object) else place
    if isinstance(value, bool):
        return None if shape in (bool, object) else place
    kinds = (int, float) if shape is float else shape
    return None if isinstance(value, kinds) else place


def _pairs(value, shape):
    """Yield key, value and shape of what a dict or a list holds."""
    if isinstance(shape, list):
        yield from ((index, one, shape[0]) for index, one in enumerate(value))
        return
    for key, one in shape.items():
        if key is str:
            yield from ((name, v, one) for name, v in value.items())
        elif key.removesuffix("?") in value or not key.endswith("?"):
            yield key, value.get(key.removesuffix("?"), _MISSING), one


_MISSING = type("Missing", (), {})()


def write_sealed_json(path: str | os.PathLike, facts: dict) -> dict[str, Any]:
    """Write facts as JSON with a SHA-256 of their own.

    Returns:
        What was written: the facts and `"sha256"`.
    """
    sealed = {**facts, "sha256": _sha256_of_content(facts)}
    write_json(path, sealed)
    return sealed


def check_seal(facts: Any, path: str | os.PathLike, own: str = "sha256") -> None:
    """Compare what `write_sealed_json` wrote, read again, with its SHA-256.

    Args:
        facts: What was read.
        path: Where from.
        own: Name of the SHA-256 among the facts.

    Raises:
        DamagedFileError: They are no facts, or were altered.
    """
    if not isinstance(facts, dict) or facts.get(own) != _sha256_of_content(facts, own):
        raise DamagedFileError(
            f"{path} does not have the SHA-256 that it states: it was altered, or "
            "another version of gpt_tf wrote it."
        )


def sha256_of(*paths: str | os.PathLike) -> str:
    """Return the SHA-256 of a file's bytes, or of several files' one after the other.

    It has 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages an artefact depends on."""
    found = {"python": platform.python_version()}
    for package in _VERSIONED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def write_manifest(
    folder: str | os.PathLike,
    kind: str,
    files: Iterable[str],
    **facts: Any,
) -> dict[str, Any]:
    """Describe the files of a folder in its `manifest.json`.

    Args:
        folder: The folder that holds the files.
        kind: What the folder is, `"checkpoint"` for example.
        files: Names relative to `folder`; size and SHA-256 of each are recorded.
        **facts: Anything else worth knowing, as JSON values.

    Returns:
        The manifest as written, with a SHA-256 of its own content.
    """
    folder = Path(folder)
    manifest = {
        "kind": kind,
        "versions": versions(),
        "files": {name: _bytes_of(folder / name) for name in files},
        **facts,
    }
    return write_sealed_json(folder / MANIFEST_NAME, manifest)


def check_manifest(
    folder: str | os.PathLike, kind: str, *, verify: bool = True
) -> dict[str, Any]:
    """Read a folder's manifest and compare every file it names with it.

    Args:
        folder: A folder that `write_manifest` described.
        kind: The kind that is expected.
        verify: Whether to compare the SHA-256 of each file, for which all of it is
            read; sizes are compared always.

    Returns:
        The manifest.

    Raises:
        DamagedFileError: The manifest is missing, altered or of another kind, or a
            file is missing, truncated or altered.
    """
    folder = Path(folder)
    manifest = read_json(folder / MANIFEST_NAME)
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        received = manifest.get("kind") if isinstance(manifest, dict) else manifest
        raise DamagedFileError(
            f"Expected a {kind} in {folder}. Received: {received!r}. "
            "Point to the folder that gpt_tf wrote."
        )
    check_seal(manifest, folder / MANIFEST_NAME)
    listed = {str: {"size_bytes": int, "sha256": str}}
    check_shape(manifest, {"files": listed}, folder / MANIFEST_NAME)
    for name, facts in manifest["files"].items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DamagedFileError(
                f"Expected names of files in {folder}. Received: {name}, which leads "
                "out of it. Somebody else wrote this manifest."
            )
        if not file.is_file():
            raise DamagedFileError(f"The {kind} in {folder} lacks its file {name}.")
        _compare(file, facts, verify)
    return manifest


def file_manifest_path(path: str | os.PathLike) -> Path:
    """Return where the manifest of a single file stands: `<file name>.json`."""
    path = Path(path)
    return path.with_name(path.name + ".json")


def write_file_manifest(
    path: str | os.PathLike, kind: str, **facts: Any
) -> dict[str, Any]:
    """Describe a single file in a manifest beside it, `<file name>.json`.

    Args:
        path: The file.
        kind: What the file is, `"tflite"` for example.
        **facts: Anything else worth knowing, as JSON values.

    Returns:
        The manifest as written: `"kind"`, `"versions"`, `"size_bytes"` and
        `"sha256"` of the file, the facts, and `"manifest_sha256"` of its own content.
    """
    manifest = {
        "kind": kind,
        "versions": versions(),
        **_bytes_of(path),
        **facts,
    }
    manifest["manifest_sha256"] = _sha256_of_content(manifest, "manifest_sha256")
    write_json(file_manifest_path(path), manifest)
    return manifest


def check_file_manifest(path: str | os.PathLike) -> dict[str, Any] | None:
    """Compare a single file with the manifest beside it, if there is one.

    Args:
        path: The file; whoever moves it may leave the manifest behind.

    Returns:
        The manifest, or None where there is none.

    Raises:
        DamagedFileError: The manifest is altered, or the file is not what it says.
    """
    path, beside = Path(path), file_manifest_path(path)
    if not beside.is_file():
        return None
    manifest = read_json(beside)
    if (
        not isinstance(manifest, dict)
        or not {"kind", "size_bytes", "sha256"} <= manifest.keys()
    ):
        raise DamagedFileError(
            f"Expected the manifest of {path} in {beside}. Received: other JSON. "
            "Remove it, or copy both files again."
        )
    check_seal(manifest, beside, "manifest_sha256")
    _compare(path, manifest)
    return manifest


def _bytes_of(file):
    return {"size_bytes": os.stat(file).st_size, "sha256": sha256_of(file)}


def _compare(file, facts, verify=True):
    size = file.stat().st_size
    if size != facts["size_bytes"]:
        raise DamagedFileError(
            f"{file} should have {facts['size_bytes']} bytes but has {size}: "
            "it is truncated or was written over."
        )
    if verify and sha256_of(file) != facts["sha256"]:
        raise DamagedFileError(
            f"{file} does not have the SHA-256 that its manifest states: "
            "its bytes were altered."
        )


def _sha256_of_content(manifest: dict[str, Any], own: str = "sha256") -> str:
    facts = {name: value for name, value in manifest.items() if name != own}
    # As JSON gives it back: keys as text, tuples as lists.
    content = to_json(parse_json(to_json(facts)), sort_keys=True)
    return hashlib.sha256(content.encode("utf-8")).hexdigest()


def _sync(path) -> None:
    """Force a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
