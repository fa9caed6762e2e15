"""One command line, started again after every failure, comes to its end."""

import dataclasses
import shutil

import pytest
import tf_keras as keras

from gpt_tf import artifacts
from gpt_tf.errors import InputError
from gpt_tf.training import loop
from gpt_tf.training.run_folder import read_run

pytestmark = pytest.mark.usefixtures("eagerly")


def test_it_goes_on_from_the_newest_checkpoint(
    start, tiny, finished, have_same_weights, copy_of_finished, cut, tmp_path
):
    cut(copy_of_finished, keep=[2, 3])
    # A run on another disk, which is a link as a whole.
    (tmp_path / "link").symlink_to(copy_of_finished)
    result, steps, notices = start(tiny, tmp_path / "link")
    assert steps == 1
    assert "going on from step 3" in notices
    assert have_same_weights(result, finished)
    assert (copy_of_finished / "model").is_dir()


def test_a_run_killed_before_its_first_checkpoint_starts_from_step_0(
    start, tiny, finished, have_same_weights, copy_of_finished, cut
):
    cut(copy_of_finished, keep=[])
    before = (copy_of_finished / "run.json").stat().st_ino
    result, steps, notices = start(tiny, copy_of_finished)
    assert steps == 4
    assert any("starting from step 0" in line for line in notices)
    assert (copy_of_finished / "run.json").stat().st_ino == before
    assert have_same_weights(result, finished)


def test_a_run_killed_while_it_was_prepared_is_prepared_anew(
    start, tiny, finished, have_same_weights, copy_of_finished, cut
):
    cut(copy_of_finished, keep=[])
    (copy_of_finished / "run.json").unlink()
    (copy_of_finished / "data" / "train.tokens").write_bytes(b"half")
    result, steps, _ = start(tiny, copy_of_finished)
    assert steps == 4
    assert have_same_weights(result, finished)


def test_what_is_no_run_stays(start, tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="something else"):
        start(tiny, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_finished_run_is_returned_without_training(
    start, tiny, finished, have_same_weights, copy_of_finished, monkeypatch
):
    # Nor does it wait for workers that are gone.
    strategies = loop.strategies
    monkeypatch.setattr(strategies, "make_strategy", lambda *_: pytest.fail("joined"))
    times = {
        path: path.stat().st_mtime_ns
        for path in copy_of_finished.rglob("*")
        if path.is_file()
    }
    result, steps, notices = start(tiny, copy_of_finished)
    assert steps == 0
    assert notices == [f"the run in {copy_of_finished} is finished"]
    assert have_same_weights(result, finished)
    assert result.validation_loss == finished.validation_loss
    assert result.history == finished.history
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_what_a_killed_process_left_in_a_finished_run_is_cleared_away(
    start, tiny, copy_of_finished
):
    before = sorted(copy_of_finished.rglob("*"))
    (copy_of_finished / artifacts.LOCK_NAME).touch()
    (artifacts.partial_path(copy_of_finished / "model") / "new").mkdir(parents=True)
    _, steps, _ = start(tiny, copy_of_finished)
    assert steps == 0
    assert sorted(copy_of_finished.rglob("*")) == before


def test_a_damaged_model_is_made_again_from_the_last_checkpoint(
    start, tiny, finished, have_same_weights, copy_of_finished
):
    (copy_of_finished / "model" / "model.keras").write_bytes(b"half")
    result, steps, notices = start(tiny, copy_of_finished)
    assert steps == 0
    assert "going on from step 4" in notices
    assert have_same_weights(result, finished)
    artifacts.check_manifest(copy_of_finished / "model", "model")


@pytest.mark.parametrize(
    ("how", "place"),
    [
        ("resume", "checkpoints"),
        ("resume_or_start", "logs/train"),
        ("overwrite", "history.json"),
    ],
)
def test_a_run_is_not_written_through_links(
    tiny, copy_of_finished, tmp_path, place, how
):
    """They may have come from an archive, and lead to any file of the user's."""
    if how == "resume_or_start":
        shutil.rmtree(copy_of_finished / "model")
    disk = tmp_path / "disk"
    shutil.move(copy_of_finished / place, disk)
    (copy_of_finished / place).symlink_to(disk)
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(InputError, match="symbolic link"):
        loop.train(None if how == "resume" else tiny, copy_of_finished, **{how: True})
    assert before.keys() == set(tmp_path.rglob("*"))
    for path, time in before.items():
        assert path.is_dir() or path.lstat().st_mtime_ns == time


def test_a_run_whose_configuration_is_removed_meanwhile_is_finished(
    start, tiny, finished, tmp_path
):
    removal = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: (tmp_path / "run" / "run.json").unlink()
    )
    other = dataclasses.replace(tiny, seed=2, steps=1)
    result, steps, _ = start(other, tmp_path / "run", callbacks=[removal])
    assert steps == 1
    _, steps, notices = start(other, tmp_path / "run")
    assert steps == 0 and "is finished" in notices[0]
    # Another seed draws other weights.
    losses = [each.history["steps"][0]["loss"] for each in (result, finished)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("is_finished", [True, False])
def test_another_configuration_is_refused_and_shown(
    start, tiny, copy_of_finished, cut, is_finished
):
    if not is_finished:
        cut(copy_of_finished, keep=[3])
    changed = dataclasses.replace(tiny, steps=8, seed=3)
    with pytest.raises(InputError) as caught:
        start(changed, copy_of_finished)
    assert "seed=1337 instead of 3, steps=4 instead of 8" in str(caught.value)
    assert read_run(copy_of_finished) == tiny


@pytest.mark.parametrize("other", ["resume", "overwrite"])
def test_what_contradicts_it_is_refused(tiny, tmp_path, other):
    with pytest.raises(InputError, match=f"--{other}"):
        loop.train(tiny, tmp_path, resume_or_start=True, **{other: True})


def test_training_that_stopped_early_does_not_go_on(
    start, tiny, have_same_weights, tmp_path
):
    early = dataclasses.replace(
        tiny, steps=9, validate_every=1, patience=1, learning_rate=1e-12
    )
    result, steps, _ = start(early, tmp_path / "early")
    assert steps < 9
    shutil.rmtree(tmp_path / "early" / "model")
    again, more, _ = start(early, tmp_path / "early")
    assert more == 0
    assert have_same_weights(again, result)
