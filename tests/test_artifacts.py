import contextlib
import errno
import functools
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_tf import artifacts
from gpt_tf.errors import DamagedFileError, InputError


class Accident(BaseException):
    """Not an `Exception`, as a KeyboardInterrupt is not."""


@contextlib.contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture
def described(tmp_path):
    """A folder of two files and its manifest."""
    folder = tmp_path / "described"
    (folder / "deep").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(bytes(range(256)))
    (folder / "deep" / "empty").touch()
    names = ["weights.bin", "deep/empty"]
    artifacts.write_manifest(folder, "thing", names, step=7, loss=0.1, shape=(2, 3))
    return folder


# Whole or nothing


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_a_file_is_whole_or_unchanged(tmp_path, mode):
    path = tmp_path / "deep" / "notes.txt"
    old, new = ("old", "neu\u00e9") if mode == "w" else (b"old", b"\xffnew")
    with artifacts.atomic_file(path, mode) as file:
        file.write(old)
    with pytest.raises(Accident), artifacts.atomic_file(path, mode) as file:
        file.write(new)
        raise Accident
    assert path.read_bytes() == b"old"
    with artifacts.atomic_file(path, mode) as file:
        file.write(new)
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == (new.encode() if mode == "w" else new)
    assert os.listdir(path.parent) == ["notes.txt"]


def test_a_file_that_cannot_be_renamed_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError), artifacts.atomic_file(tmp_path / "taken") as file:
        file.write(b"new")
    assert os.listdir(tmp_path) == ["taken"]


def test_a_folder_is_whole_or_absent(tmp_path):
    path = tmp_path / "deep" / "folder"
    with pytest.raises(Accident), artifacts.atomic_folder(path) as temporary:
        (temporary / "half").write_text("half")
        raise Accident
    assert not path.parent.exists()
    with artifacts.atomic_folder(path) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "whole").write_text("whole")
        assert not path.exists()
    assert (path / "inner" / "whole").read_text() == "whole"
    assert os.listdir(path.parent) == ["folder"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_folder_replaces_nothing_unasked(tmp_path, kind):
    path = tmp_path / "taken"
    path.touch() if kind == "file" else path.mkdir()
    message = "something stands there"
    with pytest.raises(InputError, match=message), artifacts.atomic_folder(path):
        pass
    assert os.listdir(tmp_path) == ["taken"]


def test_a_folder_gives_way_only_to_a_whole_one(tmp_path):
    path = tmp_path / "folder"
    for name in ("old", "new"):
        with artifacts.atomic_folder(path, replace=True) as temporary:
            (temporary / name).write_text(name)
    assert [file.name for file in path.iterdir()] == ["new"]
    with (
        pytest.raises(Accident),
        artifacts.atomic_folder(path, replace=True) as temporary,
    ):
        (temporary / "newer").write_text("half")
        raise Accident
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_entries_are_replaced_together(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text("old")
    with artifacts.replaced(tmp_path / "a", "b", "d") as new:
        for name in ("a", "d"):
            (new / name).write_text("new")
        (new.parent / "scratch").write_text("does not stay")
        assert (tmp_path / "a").read_text() == "old"
    content = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert content == {"a": "new", "c": "old", "d": "new"}


@pytest.mark.parametrize("moves", [0, 1, 2, 3])
def test_a_replacement_that_fails_in_the_middle_is_undone_or_completed(
    tmp_path, monkeypatch, moves
):
    """The first folder decides: once it is in, the second one follows."""

    def write(folder, text):
        for name in ("a", "b"):
            (folder / name).mkdir()
            (folder / name / "text").write_text(text)

    def failing(move, *arguments):
        done.append(arguments)
        if len(done) > moves:
            monkeypatch.undo()
            raise Accident
        move(*arguments)

    write(tmp_path, "old")
    done = []
    with pytest.raises(Accident), artifacts.replaced(tmp_path / "a", "b") as new:
        write(new, "new")
        for name in ("rename", "replace"):
            move = functools.partial(failing, getattr(os, name))
            monkeypatch.setattr(os, name, move)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    found = {(tmp_path / name / "text").read_text() for name in "ab"}
    assert found == {"new" if moves == 3 else "old"}


def test_what_was_kept_is_there_the_next_time(tmp_path):
    for keep in (True, True):
        with (
            pytest.raises(Accident),
            artifacts.atomic_folder(tmp_path / "folder", keep=keep) as folder,
        ):
            with open(folder / "numbers", "a") as file:
                file.write("1")
            raise Accident
    artifacts.settle(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    with artifacts.atomic_folder(tmp_path / "folder", keep=True) as folder:
        assert (folder / "numbers").read_text() == "11"
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_removed_is_gone_and_what_it_links_to_stays(tmp_path, kind):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis").write_text("precious")
    path = tmp_path / "thing"
    if kind == "link":
        path.symlink_to(tmp_path / "other")
    else:
        path.touch() if kind == "file" else (path / "deep").mkdir(parents=True)
    for _ in range(2):
        artifacts.remove(path)
        assert os.listdir(tmp_path) == ["other"]
    assert (tmp_path / "other" / "thesis").read_text() == "precious"


def test_a_folder_that_is_a_link_is_filled_where_it_links_to(tmp_path):
    """Somebody may keep what is large on another disk."""
    (tmp_path / "disk" / "folder").mkdir(parents=True)
    (tmp_path / "folder").symlink_to(tmp_path / "disk" / "folder")
    with artifacts.atomic_folder(tmp_path / "folder", replace=True) as new:
        (new / "text").touch()
    assert (tmp_path / "folder").is_symlink()
    assert os.listdir(tmp_path / "disk" / "folder") == ["text"]
    assert os.listdir(tmp_path / "disk") == ["folder"]


def test_two_cannot_write_one_file(tmp_path):
    with artifacts.atomic_file(tmp_path / "a", "w") as file:
        with (
            pytest.raises(InputError, match="in use by another"),
            artifacts.atomic_file(tmp_path / "a", "w"),
        ):
            pytest.fail("two wrote it")
        file.write("whole")
    assert (tmp_path / "a").read_text() == "whole"


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
@pytest.mark.parametrize("write", ["file", "folder", "lock"])
def test_links_at_names_of_ours_are_not_written_through(tmp_path, link, write):
    """A folder that was unpacked from an archive may bring them."""
    mine = tmp_path / "thesis"
    mine.write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    name = (
        artifacts.LOCK_NAME
        if write == "lock"
        else artifacts.partial_path(run / "a").name
    )
    getattr(run / name, link)(mine)
    if write == "file":
        artifacts.write_json(run / "a", 1)
    elif write == "folder":
        with artifacts.atomic_folder(run / "a") as new:
            (new / "text").touch()
    else:
        with artifacts.locked(run):
            assert (run / name).read_text() == str(os.getpid())
    assert mine.read_text() == "precious"
    assert os.listdir(run) == ([] if write == "lock" else ["a"])


@pytest.mark.parametrize("place", ["partial", "new", "old"])
def test_a_link_to_a_folder_is_not_taken_for_a_place_of_ours(tmp_path, place):
    mine = tmp_path / "mine"
    for name in ("new", "old"):
        (mine / name).mkdir(parents=True)
        (mine / name / "thesis").write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    partial = artifacts.partial_path(run / "a")
    if place == "partial":
        partial.symlink_to(mine)
    else:
        partial.mkdir()
        (partial / place).symlink_to(mine / place)
    for keep in (True, False):
        with artifacts.atomic_folder(run / "a", replace=True, keep=keep) as new:
            (new / "text").touch()
    assert [(mine / name / "thesis").read_text() for name in ("new", "old")] == [
        "precious",
        "precious",
    ]
    assert sorted(os.listdir(mine)) == ["new", "old"]
    assert os.listdir(run) == ["a"] and os.listdir(run / "a") == ["text"]


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EFBIG", "EIO", "ESTALE"])
@pytest.mark.parametrize("place", ["file", "folder"])
def test_what_the_disk_does_is_told_and_leaves_the_old(tmp_path, code, place):
    path = tmp_path / "a"
    write = {
        "file": artifacts.atomic_file,
        "folder": lambda path: artifacts.atomic_folder(path, replace=True),
    }[place]
    with write(path):
        pass
    number = getattr(errno, code)
    for error in (
        OSError(number, os.strerror(number)),
        RuntimeError(f"I/O error: {os.strerror(number)} (os error {number})"),
    ):
        with pytest.raises(InputError, match=os.strerror(number)), write(path):
            raise error
    with pytest.raises(RuntimeError), write(path):
        raise RuntimeError("something else")
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_that_is_too_large_is_told(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    artifacts.write_json(tmp_path / "a", 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(InputError, match="a cannot be written: File too large"):
            artifacts.write_json(tmp_path / "a", "long" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert artifacts.read_json(tmp_path / "a") == 1
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_permissions_follow_the_umask(tmp_path, mask):
    with umask(mask):
        with artifacts.atomic_file(tmp_path / "file"):
            pass
        with artifacts.atomic_folder(tmp_path / "folder"):
            pass
        assert os.umask(mask) == mask
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_place_is_seen_to_take_a_file_before_there_is_one(tmp_path):
    artifacts.check_writable(tmp_path / "new" / "a.json")
    (tmp_path / "file").touch()
    artifacts.check_writable(tmp_path / "file")
    with pytest.raises(InputError, match=r"Not a directory\. Choose another"):
        artifacts.check_writable(tmp_path / "file" / "new" / "a.json")
    with pytest.raises(InputError, match="that is a folder"):
        artifacts.check_writable(tmp_path)
    assert os.listdir(tmp_path) == ["file"]


# JSON


def test_json_comes_back_as_it_was(tmp_path):
    value = {"b": [1, 2.5, None], "a": "\u00e9\u4e2d", "c": {"nested": True}}
    artifacts.write_json(tmp_path / "value.json", value)
    assert artifacts.read_json(tmp_path / "value.json") == value
    text = (tmp_path / "value.json").read_text("utf-8")
    assert text.index('"a"') < text.index('"b"')
    assert "\u4e2d" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_not_written(tmp_path, value):
    path = tmp_path / "file.json"
    with pytest.raises(InputError, match=rf"{value} in \$\.rows\[1\]\.loss"):
        artifacts.write_json(path, {"rows": ({"loss": 1.0}, {"loss": value})})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_are_not_finite_are_not_read(tmp_path, value):
    path = tmp_path / "file.json"
    path.write_text(f'{{"loss": [1.0, {value}]}}')
    with pytest.raises(DamagedFileError, match=value):
        artifacts.read_json(path)


def test_json_that_cannot_be_written_leaves_the_old(tmp_path):
    artifacts.write_json(tmp_path / "value.json", 1)
    with pytest.raises(TypeError):
        artifacts.write_json(tmp_path / "value.json", {"key": object()})
    assert artifacts.read_json(tmp_path / "value.json") == 1
    assert os.listdir(tmp_path) == ["value.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, None])
def test_what_is_no_json_is_damaged(tmp_path, content):
    path = tmp_path / "value.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"value\.json"):
        artifacts.read_json(path)


# Manifests


def test_a_sound_folder_passes_and_gives_its_facts(described):
    manifest = artifacts.check_manifest(described, "thing")
    assert manifest["step"] == 7
    assert manifest["shape"] == [2, 3]
    assert manifest["versions"] == artifacts.versions()
    assert manifest["files"]["weights.bin"]["size_bytes"] == 256
    assert manifest["files"]["deep/empty"]["sha256"] == artifacts.sha256_of(os.devnull)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "weights.bin").write_bytes(b"short"), "truncated"),
        (lambda f: (f / "weights.bin").write_bytes(bytes(256)), "SHA-256"),
        (lambda f: (f / "deep" / "empty").write_bytes(b"more"), "should have 0 bytes"),
        (lambda f: (f / "deep" / "empty").unlink(), "lacks its file deep/empty"),
        (lambda f: (f / "manifest.json").unlink(), "none is there"),
        (lambda f: (f / "manifest.json").write_text("{"), "Expected JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), "Expected a thing"),
        (lambda f: (f / "manifest.json").write_text('{"kind": "thing"}'), "SHA-256"),
        (lambda f: shutil.rmtree(f), "none is there"),
    ],
)
def test_damage_is_noticed_and_named(described, damage, message):
    damage(described)
    with pytest.raises(DamagedFileError, match=message):
        artifacts.check_manifest(described, "thing")


@pytest.mark.parametrize(
    "name", ["../secret", "deep/../../secret", "{tmp_path}/secret"]
)
def test_names_that_lead_out_of_the_folder_are_refused(described, tmp_path, name):
    (tmp_path / "secret").write_text("precious")
    artifacts.write_manifest(described, "thing", [name.format(tmp_path=tmp_path)])
    with pytest.raises(DamagedFileError, match="leads out"):
        artifacts.check_manifest(described, "thing")


def test_sizes_are_compared_even_without_verification(described):
    (described / "weights.bin").write_bytes(bytes(256))
    artifacts.check_manifest(described, "thing", verify=False)
    (described / "weights.bin").write_bytes(bytes(255))
    with pytest.raises(DamagedFileError, match="truncated"):
        artifacts.check_manifest(described, "thing", verify=False)


def test_another_kind_is_refused(described):
    with pytest.raises(DamagedFileError, match=r"Expected a model .* 'thing'"):
        artifacts.check_manifest(described, "model")


@pytest.mark.parametrize("fact", ["step", "files", "versions"])
def test_an_altered_or_missing_fact_is_noticed(described, fact):
    path = described / "manifest.json"
    manifest = json.loads(path.read_text())
    for changed in ({**manifest, fact: 8}, {**manifest, "new": 1}):
        path.write_text(json.dumps(changed))
        with pytest.raises(DamagedFileError, match="was altered"):
            artifacts.check_manifest(described, "thing")
    path.write_text(json.dumps({k: v for k, v in manifest.items() if k != fact}))
    with pytest.raises(DamagedFileError, match="was altered"):
        artifacts.check_manifest(described, "thing")
    path.write_text(json.dumps(manifest))  # its layout is of no matter
    artifacts.check_manifest(described, "thing")


@given(data=st.binary(min_size=1, max_size=200), choice=st.data())
def test_any_flipped_bit_of_a_file_or_its_manifest_is_noticed(
    tmp_path_factory, data, choice
):
    folder = tmp_path_factory.mktemp("folder")
    (folder / "data").write_bytes(data)
    artifacts.write_manifest(folder, "thing", ["data"], loss=0.25, step=3)
    path = folder / choice.draw(st.sampled_from(["data", "manifest.json"]))
    content = bytearray(path.read_bytes())
    index = choice.draw(st.integers(0, len(content) - 1))
    content[index] ^= 1 << choice.draw(st.integers(0, 7))
    before = artifacts.read_json(folder / "manifest.json")
    path.write_bytes(content)
    try:
        after = artifacts.check_manifest(folder, "thing")
    except DamagedFileError:
        return
    # White space between the facts is all that may change unnoticed.
    assert path.name == "manifest.json"
    assert json.dumps(after) == json.dumps(before)


# Manifests of single files


@pytest.fixture
def single(tmp_path):
    """A file and the manifest beside it."""
    path = tmp_path / "model.tflite"
    path.write_bytes(bytes(range(256)))
    artifacts.write_file_manifest(path, "tflite", mode="int8", lengths=(1, 8))
    return path


def test_a_sound_file_passes_and_gives_its_facts(single):
    manifest = artifacts.check_file_manifest(single)
    assert artifacts.file_manifest_path(single).name == "model.tflite.json"
    assert manifest["kind"] == "tflite" and manifest["mode"] == "int8"
    assert manifest["lengths"] == [1, 8]
    assert manifest["versions"] == artifacts.versions()
    assert manifest["size_bytes"] == 256
    assert manifest["sha256"] == artifacts.sha256_of(single)


def test_a_file_and_its_manifest_may_be_renamed_together(single):
    other = single.with_name("other.tflite")
    artifacts.file_manifest_path(single).rename(artifacts.file_manifest_path(other))
    single.rename(other)
    assert artifacts.check_file_manifest(other)["mode"] == "int8"


def test_a_file_without_a_manifest_is_left_to_other_checks(single):
    artifacts.file_manifest_path(single).unlink()
    assert artifacts.check_file_manifest(single) is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f, m: f.write_bytes(b"short"), "tflite should have 256 bytes but"),
        (lambda f, m: f.write_bytes(bytes(256)), "tflite does not have the SHA-256"),
        (lambda f, m: m.write_text("{"), r"Expected JSON in .*tflite\.json"),
        (lambda f, m: m.write_bytes(b""), r"Expected JSON in .*tflite\.json"),
        (lambda f, m: m.write_text("[]"), r"tflite\.json. Received: other JSON"),
        (lambda f, m: m.write_text('{"kind": "tflite"}'), "other JSON"),
        (
            lambda f, m: m.write_text(m.read_text().replace("int8", "int4")),
            r"tflite\.json does not have the SHA-256 that it states",
        ),
    ],
)
def test_a_damaged_file_or_manifest_is_named(single, damage, message):
    damage(single, artifacts.file_manifest_path(single))
    with pytest.raises(DamagedFileError, match=message):
        artifacts.check_file_manifest(single)


# Locks


def _hold(folder):
    """Start a process that has a folder until its input is closed."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import sys; from gpt_tf import artifacts\n"
            f"with artifacts.locked({str(folder)!r}):\n"
            "    print('locked', flush=True)\n"
            "    sys.stdin.read()\n",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_locked_folder_is_refused_and_its_process_named(tmp_path):
    with _hold(tmp_path / "run") as process:
        with (
            pytest.raises(InputError, match=f"another process, {process.pid}"),
            artifacts.locked(tmp_path / "run"),
        ):
            pytest.fail("two processes had the folder")
        process.stdin.close()
    with artifacts.locked(tmp_path / "run"):
        assert (tmp_path / "run" / artifacts.LOCK_NAME).read_text() == str(os.getpid())


def test_a_lock_that_was_removed_meanwhile_is_no_lock(tmp_path, monkeypatch):
    real, removed = artifacts._try_lock, []

    def remove_once(handle):
        if not removed:
            removed.append(os.unlink(tmp_path / artifacts.LOCK_NAME))
        return real(handle)

    monkeypatch.setattr(artifacts, "_try_lock", remove_once)
    with (
        artifacts.locked(tmp_path),
        pytest.raises(InputError, match="in use"),
        artifacts.locked(tmp_path),
    ):
        pytest.fail("two had the folder")


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/step", "run.json"])
def test_links_among_what_is_written_are_refused_before_anything_is_lost(
    tmp_path, place
):
    run, disk = tmp_path / "run", tmp_path / "disk"
    disk.mkdir()
    (disk / "thesis").write_text("precious")
    (run / place).parent.mkdir(parents=True)
    (run / place).symlink_to(disk)
    names = ("run.json", "checkpoints")
    with pytest.raises(InputError, match="symbolic link"), artifacts.locked(run, names):
        pytest.fail("it was taken")
    assert (disk / "thesis").read_text() == "precious"
    assert not (run / artifacts.LOCK_NAME).exists()
    with artifacts.locked(run, ("model",)):  # of others nothing is asked
        pass
    (tmp_path / "link").symlink_to(run)
    (run / place).unlink()
    with artifacts.locked(tmp_path / "link", names):
        pass


def test_what_was_left_in_a_folder_is_cleared_away_by_who_locks_it(tmp_path):
    for path in ("run.json", "checkpoints/step", "notes"):
        partial = artifacts.partial_path(tmp_path / path)
        partial.parent.mkdir(exist_ok=True)
        partial.touch() if path == "run.json" else (partial / "new").mkdir(parents=True)
    assert artifacts.entries(tmp_path) == {"checkpoints"}
    assert not artifacts.is_settled(tmp_path)
    with artifacts.locked(tmp_path, ("run.json", "checkpoints")):
        assert os.listdir(tmp_path / "checkpoints") == []
        assert not artifacts.partial_path(tmp_path / "run.json").exists()
    assert artifacts.partial_path(tmp_path / "notes").exists()
    artifacts.settle(tmp_path / "notes", keep=False)
    assert artifacts.is_settled(tmp_path)


def test_a_lock_leaves_no_folder_in_which_nothing_is(tmp_path):
    with pytest.raises(Accident), artifacts.locked(tmp_path / "new"):
        raise Accident
    assert not (tmp_path / "new").exists()
    with artifacts.locked(tmp_path / "new"):
        (tmp_path / "new" / "result").touch()
    assert os.listdir(tmp_path / "new") == ["result"]


def test_a_file_cannot_be_locked_as_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match="that is a file"),
        artifacts.locked(tmp_path / "file"),
    ):
        pass
