"""Files written whole or not at all, and the manifests that describe them.

A file appears under its final name only when it is complete: the bytes go to a
temporary neighbour, are forced to disk, and the neighbour is then renamed. A
manifest is a JSON file that says what an artefact is, what it was made from and
which bytes it has, so that a damaged or foreign file is noticed before it is used.
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from gpt_tf.errors import DamagedFileError, InputError

MANIFEST_NAME = "manifest.json"
LOCK_NAME = ".lock"

_VERSIONED_PACKAGES = (
    "gpt-tf",
    "tensorflow",
    "tf_keras",
    "numpy",
    "tokenizers",
    "ai-edge-litert",
)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Open a file that takes its final name only when the block ends well.

    Args:
        path: Final name. Missing parent folders are created.
        mode: `"wb"` for bytes or `"w"` for UTF-8 text.

    Yields:
        The open temporary file. After an exception it is removed and whatever
        stood at `path` before is untouched.

    Example:
        >>> with atomic_file("notes.txt", "w") as file:
        ...     file.write("whole or not at all")
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    encoding = None if "b" in mode else "utf-8"
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        os.close(handle)  # opened again by name, so that `file.name` is a path
        with open(temporary, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


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
def atomic_folder(path: str | os.PathLike, *, replace: bool = False) -> Iterator[Path]:
    """Fill a folder that takes its final name only when the block ends well.

    Args:
        path: Final name; it must not exist yet, but with `replace`.
        replace: Whether a folder of that name gives way, once the new one is whole.

    Yields:
        A temporary folder beside `path`. Every file in it is forced to disk
        before the rename. After an exception it is removed.

    Raises:
        InputError: `path` exists already, and `replace` is False.
    """
    path = Path(path)
    if path.exists() and not replace:
        raise InputError(
            f"A new folder was to be written at {path}, but something stands there. "
            "Remove it or choose another name."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
        os.chmod(temporary, 0o777 & ~_umask())
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Keep other processes out of a folder while the block runs.

    The operating system takes the lock away from a process that ends, however it
    ends: a lock never has to be removed by hand.

    Args:
        folder: The folder; it is made where there is none, and removed again if
            nothing is put into it. Meanwhile its file `.lock` names the process that
            has it.

    Raises:
        InputError: Another process has it, or it cannot be written.

    Example:
        >>> with locked("runs/mine"):
        ...     write_json("runs/mine/state.json", {"step": 3})
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(
            f"A folder is expected at {folder}, but that is a file. Choose another "
            "name."
        )
    is_new = not folder.exists()
    handle = _open_lock(folder)
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


def _open_lock(folder):
    """Return the lock of a folder, opened and ours."""
    path = folder / LOCK_NAME
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(
                f"The folder {folder} cannot be written: {error.strerror}. Choose "
                "another."
            ) from None
        if not _try_lock(handle):
            try:
                raise InputError(
                    f"The folder {folder} is in use by another process"
                    f"{_owner(handle)}. Wait until that has ended, or choose another "
                    "folder."
                )
            finally:
                os.close(handle)
        # Whoever had it may have removed the file between our two steps.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
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
    return check_shape(_read_json(path), shape, path)


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


def _read_json(path):
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedFileError(
            f"Expected a JSON file at {path}; none is there."
        ) from None
    except (ValueError, OSError, RecursionError) as error:
        raise DamagedFileError(
            f"Expected JSON in {path}, but it cannot be read: {error}. "
            "The file is damaged or was not written by gpt_tf."
        ) from None


def sha256_of(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    digest = hashlib.sha256()
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
        "files": {
            name: {
                "size_bytes": (folder / name).stat().st_size,
                "sha256": sha256_of(folder / name),
            }
            for name in files
        },
        **facts,
    }
    manifest["sha256"] = _sha256_of_content(manifest)
    write_json(folder / MANIFEST_NAME, manifest)
    return manifest


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
    if manifest.get("sha256") != _sha256_of_content(manifest):
        raise DamagedFileError(
            f"{folder / MANIFEST_NAME} does not have the SHA-256 that it states: it "
            "was altered, or another version of gpt_tf wrote it."
        )
    listed = {str: {"size_bytes": int, "sha256": str}}
    check_shape(manifest, {"files": listed}, folder / MANIFEST_NAME)
    for name, facts in manifest["files"].items():
        file = folder / name
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
        "size_bytes": Path(path).stat().st_size,
        "sha256": sha256_of(path),
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
    stated = manifest.get("manifest_sha256")
    if stated != _sha256_of_content(manifest, "manifest_sha256"):
        raise DamagedFileError(
            f"{beside} does not have the SHA-256 that it states: it was altered, or "
            "another version of gpt_tf wrote it."
        )
    _compare(path, manifest)
    return manifest


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


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
