"""Claims about folders that are filled over several sittings."""

import numpy as np
import pytest

from gpt_tf import artifacts
from gpt_tf.distillation.unfinished import check_place, unfinished
from gpt_tf.errors import InputError

SIZES = {"squares": 8, "names": 3}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder"


def fill(path, *, stop=20, fail_at=None, every=4, notices=None, power=2, **options):
    """Write two records a step, and count them every few steps."""
    where = path, "squares", {"power": power}, SIZES
    with unfinished(*where, ([] if notices is None else notices).append, **options) as (
        folder
    ):
        begun = folder.steps
        for step in range(begun, stop):
            values = np.array([2 * step, 2 * step + 1])
            names = np.stack([values.astype("u1")] * 3, axis=1)
            folder.write(squares=values**2, names=names)
            if step == fail_at:
                raise KeyboardInterrupt
            if (step + 1) % every == 0:
                folder.save(step + 1)
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
    assert artifacts.check_manifest(path, "squares")["power"] == 2
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
    assert fill(path, notices=notices, power=2.5) == 0
    assert "starts anew" in notices[0]
    assert len(np.fromfile(path / "squares", np.int64)) == 40


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_file_starts_anew(path, damage):
    interrupted(path, 9)
    file = artifacts.partial_path(path) / "new" / "folder" / "names"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:47])
    notices = []
    assert fill(path, notices=notices) == 0
    assert "lacks" in notices[0]
    assert (path / "names").stat().st_size == 40 * 3


def test_what_it_was_begun_with_does_not_come_along(path):
    interrupted(path, 9)
    with unfinished(path, "cubes", {}, {"cubes": 8}, print) as folder:
        folder.write(cubes=np.arange(3))
    assert content(path).keys() == {"cubes", "manifest.json"}


@pytest.mark.parametrize("progress", [None, "", "[1]", '{"steps": 3}'])
def test_a_folder_killed_in_its_first_write_is_begun_anew(tmp_path, path, progress):
    fill(tmp_path / "whole")
    interrupted(path, 2)
    if progress is not None:
        (artifacts.partial_path(path) / "progress.json").write_text(progress)
    assert fill(path) == 0
    assert content(path) == content(tmp_path / "whole")


@pytest.mark.parametrize("link", ["soft", "hard"])
def test_links_among_what_was_begun_are_not_followed(tmp_path, path, link):
    """Such a folder may come from an archive of somebody else's."""
    mine = tmp_path / "thesis"
    mine.write_text("precious")
    interrupted(path, 9)
    planted = artifacts.partial_path(path) / "new" / "folder" / "names"
    planted.unlink()
    planted.symlink_to(mine) if link == "soft" else planted.hardlink_to(mine)
    fill(path)
    assert mine.read_text() == "precious"
    assert len(np.fromfile(path / "squares", np.int64)) == 40


def test_two_cannot_fill_one_folder(path):
    with (
        unfinished(path, "squares", {}, SIZES, print),
        pytest.raises(InputError, match="in use by another process"),
        unfinished(path, "squares", {}, SIZES, print),
    ):
        pytest.fail("two filled it")


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
    interrupted(path, 9, stop=10, overwrite=True)
    assert content(path) == before
    assert fill(path, stop=8, overwrite=True) == 8
    assert (path / "squares").stat().st_size == 16 * 8
    assert not artifacts.partial_path(path).exists()
