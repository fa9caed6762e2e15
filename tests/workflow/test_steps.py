"""What was done is not done again while its inputs stay, whatever ended it."""

import pytest

from gpt_tf import artifacts
from gpt_tf.workflow.steps import Stages


class Accident(BaseException):
    """A process that is killed says no goodbye."""


@pytest.fixture
def house(tmp_path):
    """Run two stages, the second made of what the first made; return what was done."""

    def build(word="one", suffix="!", fail=None):
        said, worked = [], []
        stages = Stages(tmp_path, {"first": 30.0, "second": 90.0}, said.append)

        def first():
            worked.append("first")
            (tmp_path / "first.txt").write_text(word)

        def second():
            worked.append("second")
            if fail == "second":
                raise Accident
            text = (tmp_path / "first.txt").read_text() + suffix
            (tmp_path / "second.txt").write_text(text)

        def begin():
            worked.append("begin")

        stages.run("first", {"word": word}, ["first.txt"], first, command="a first")
        made = artifacts.sha256_of(tmp_path / "first.txt")
        inputs = {"a": made, "b": suffix}
        stages.run("second", inputs, ["second.txt"], second, begin=begin)
        return worked, said, stages

    build.folder = tmp_path
    return build


def test_a_second_run_does_nothing(house):
    worked, said, stages = house()
    assert worked == ["first", "begin", "second"]
    assert [done.reused for done in stages.done] == [False, False]
    worked, said, stages = house()
    assert worked == []
    assert said == ["[1/2] first: done before", "[2/2] second: done before"]
    assert [done.reused for done in stages.done] == [True, True]
    assert stages.done[0].command == "a first"


def test_only_what_changed_is_done_again(house):
    house()
    assert house(suffix="?")[0] == ["begin", "second"]
    assert (house.folder / "second.txt").read_text() == "one?"
    assert house("two", "?")[0] == ["first", "begin", "second"]
    assert (house.folder / "second.txt").read_text() == "two?"


def test_a_killed_stage_goes_on_without_beginning(house):
    with pytest.raises(Accident):
        house(fail="second")
    assert house()[0] == ["second"]
    assert house()[0] == []


def test_a_stage_that_was_begun_with_other_inputs_begins_anew(house):
    with pytest.raises(Accident):
        house(fail="second")
    assert house(suffix="?")[0] == ["begin", "second"]


def test_a_stage_killed_before_it_began_begins(house, monkeypatch):
    """What it must not go on with may still be there: the record comes after."""
    house()

    def die(path, value):
        raise Accident

    with monkeypatch.context() as patch, pytest.raises(Accident):
        patch.setattr(artifacts, "write_json", die)
        house(suffix="?")
    assert house(suffix="?")[0] == ["begin", "second"]


@pytest.mark.parametrize("damage", ["delete", "alter"])
def test_a_lost_or_altered_output_is_made_again(house, damage):
    house()
    path = house.folder / "first.txt"
    path.unlink() if damage == "delete" else path.write_text("other")
    # The second stage's input is the same again: it stays.
    assert house()[0] == ["first"]
    assert path.read_text() == "one"


@pytest.mark.parametrize("text", ["", "junk", "[]"])
def test_a_stage_with_a_damaged_record_is_done_again(house, text):
    house()
    (house.folder / "stages" / "first.json").write_text(text)
    assert house()[0] == ["first"]
    assert house()[0] == []


def test_another_version_of_the_program_does_all_anew(house, monkeypatch):
    house()
    monkeypatch.setattr("gpt_tf.workflow.steps.__version__", "999")
    assert house()[0] == ["first", "begin", "second"]


def test_the_time_left_follows_what_was_needed(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("gpt_tf.workflow.steps.time.perf_counter", lambda: now[0])
    said = []
    stages = Stages(tmp_path, {"a": 600.0, "b": 600.0, "c": 600.0}, said.append)

    def work():
        now[0] += 1920.0  # three times and more what was expected

    stages.run("a", {}, [], work)
    stages.run("b", {}, [], work)
    assert said[0] == "[1/3] a (about 30 min left)"
    # (1920 + 60) / (600 + 60) = 3 times the 20 minutes that are planned.
    assert said[1] == "[2/3] b (about 60 min left)"


def test_a_stage_that_has_nothing_to_do_leaves_the_plan(tmp_path):
    said = []
    stages = Stages(tmp_path, {"a": 60.0, "b": 600.0}, said.append)
    stages.skip("b")
    stages.run("a", {}, [], lambda: None)
    assert said == ["[1/1] a (about 1 min left)"]
