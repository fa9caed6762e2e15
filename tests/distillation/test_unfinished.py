"""Claims about folders that are filled over several sittings."""

import json

import numpy as np
import pytest

from gpt_tf import files
from gpt_tf.distillation.unfinished import Unfinished, check_place, partial_path
from gpt_tf.errors import InputError

SIZES = {"squares": 8, "names": 3}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder"


def fill(path, *, stop=20, fail_at=None, every=4, notices=None, facts=(("power", 2),)):
    """Write two records a step, and count them every few steps."""
    notices = [] if notices is None else notices
    with Unfinished(path, dict(facts), SIZES, notices.append) as folder:
        begun = folder.steps
        for step in range(begun, stop):
            values = np.array([2 * step, 2 * step + 1])
            names = np.stack([values.astype("u1")] * 3, axis=1)
            folder.write(squares=values**2, names=names)
            if step == fail_at:
                raise KeyboardInterrupt
            if (step + 1) % every == 0:
                folder.save(step + 1)
        folder.finish("squares", overwrite=False)
    return begun


def interrupted(path, fail_at, **options):
    with pytest.raises(KeyboardInterrupt):
        fill(path, fail_at=fail_at, **options)


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("fail_at", [0, 3, 4, 5, 18, 19])
def test_an_interrupted_folder_goes_on_to_the_same_bytes(tmp_path, path, fail_at):
    fill(tmp_path / "whole")
    interrupted(path, fail_at)
    assert not path.exists()
    notices = []
    begun = fill(path, notices=notices)
    assert begun == fail_at // 4 * 4
    assert not begun or f"after {2 * begun} records" in notices[0]
    assert len(notices) == (begun > 0)
    assert content(path) == content(tmp_path / "whole")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "whole"]
    assert files.check_manifest(path, "squares")["power"] == 2
    values = np.fromfile(path / "squares", np.int64)
    np.testing.assert_array_equal(values, np.arange(40) ** 2)


def test_it_may_be_interrupted_again_and_again(path):
    for fail_at in (5, 6, 11, 17):
        interrupted(path, fail_at)
    assert fill(path) == 16
    values = np.fromfile(path / "squares", np.int64)
    np.testing.assert_array_equal(values, np.arange(40) ** 2)


def test_other_facts_start_anew(path):
    interrupted(path, 9)
    notices = []
    assert fill(path, notices=notices, facts=(("power", 2.5),)) == 0
    assert "starts anew" in notices[0]
    assert len(np.fromfile(path / "squares", np.int64)) == 40


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_file_starts_anew(path, damage):
    interrupted(path, 9)
    file = partial_path(path) / "names"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:47])
    notices = []
    assert fill(path, notices=notices) == 0
    assert "lacks" in notices[0]
    assert (path / "names").stat().st_size == 40 * 3


@pytest.mark.parametrize("stranger", ["notes.txt", "progress.json", None])
def test_what_another_put_there_is_not_touched(path, stranger):
    place = partial_path(path)
    if stranger is None:
        place.write_text("mine")
    else:
        place.mkdir()
        (place / stranger).write_text(json.dumps(["mine"]))
    with pytest.raises(InputError, match="is where folder is filled"):
        fill(path)
    assert place.is_file() or list(place.iterdir()) == [place / stranger]


def test_an_empty_place_is_taken(path):
    partial_path(path).mkdir()
    fill(path)


def test_a_new_place_is_always_free(path):
    for overwrite in (False, True):
        check_place(path, "squares", overwrite)


def test_only_the_same_kind_is_overwritten(path):
    fill(path)
    with pytest.raises(InputError, match="something stands there"):
        check_place(path, "squares", False)
    check_place(path, "squares", True)
    with pytest.raises(InputError, match="Only cubes can be overwritten"):
        check_place(path, "cubes", True)


@pytest.mark.parametrize("stranger", ["file", "folder", "json"])
def test_strangers_are_never_overwritten(path, stranger):
    if stranger == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        name = "manifest.json" if stranger == "json" else "notes"
        (path / name).write_text("[1]")
    with pytest.raises(InputError, match="did not write"):
        check_place(path, "squares", True)


def test_an_old_folder_stands_until_the_new_one_is_whole(path):
    fill(path)
    before = content(path)
    interrupted(path, 9, stop=10)
    assert content(path) == before
    with Unfinished(path, {"power": 2}, SIZES, print) as folder:
        folder.finish("squares", overwrite=True)
    assert (path / "squares").stat().st_size == 16 * 8
    assert not partial_path(path).exists()
