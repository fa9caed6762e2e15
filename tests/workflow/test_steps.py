"""What was done is not done again while its inputs stay, whatever ended it."""

import pytest

from gpt_tf import artifacts
from gpt_tf.workflow.steps import Step, Steps


class Accident(BaseException):
    """A process that is killed says no goodbye."""


@pytest.fixture
def house(tmp_path):
    """Run two steps, the second made of what the first made; return what was done."""

    def build(word="one", suffix="!", fail=None):
        worked = []
        steps = Steps(tmp_path, 2)

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

        def inputs():
            return {"a": artifacts.sha256_of(tmp_path / "first.txt"), "b": suffix}

        of_first = {"word": word}
        files = ["first.txt"], ["second.txt"]
        command = "a first"
        for step in (
            Step("first", "1st", lambda: of_first, files[0], first, command=command),
            Step("second", "2nd", inputs, files[1], second, begin),
        ):
            steps.run(step)
        return worked, steps

    build.folder = tmp_path
    return build


def test_a_second_run_does_nothing(house, notices):
    worked, steps = house()
    assert worked == ["first", "begin", "second"]
    assert [done.reused for done in steps.done] == [False, False]
    seconds = [done.seconds for done in steps.done]
    notices.clear()
    worked, steps = house()
    assert worked == []
    assert notices == ["[1/2] 1st: done before", "[2/2] 2nd: done before"]
    assert [done.reused for done in steps.done] == [True, True]
    assert [done.seconds for done in steps.done] == seconds
    assert steps.done[0].command == "a first"


def test_only_what_changed_is_done_again(house):
    house()
    assert house(suffix="?")[0] == ["begin", "second"]
    assert (house.folder / "second.txt").read_text() == "one?"
    assert house("two", "?")[0] == ["first", "begin", "second"]
    assert (house.folder / "second.txt").read_text() == "two?"


def test_a_killed_step_goes_on_without_beginning(house):
    with pytest.raises(Accident):
        house(fail="second")
    assert house()[0] == ["second"]
    assert house()[0] == []


def test_a_step_that_was_begun_with_other_inputs_begins_anew(house):
    with pytest.raises(Accident):
        house(fail="second")
    assert house(suffix="?")[0] == ["begin", "second"]


def test_a_step_killed_before_it_began_begins(house, monkeypatch):
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
    # The second step's input is the same again: it stays.
    assert house()[0] == ["first"]
    assert path.read_text() == "one"


@pytest.mark.parametrize("text", ["", "junk", "[]"])
def test_a_step_with_a_damaged_record_is_done_again(house, text):
    house()
    (house.folder / "stages" / "first.json").write_text(text)
    assert house()[0] == ["first"]
    assert house()[0] == []


def test_another_version_of_the_program_does_all_anew(house, monkeypatch):
    house()
    monkeypatch.setattr("gpt_tf.workflow.steps.__version__", "999")
    assert house()[0] == ["first", "begin", "second"]


def test_a_step_that_has_nothing_to_do_is_not_counted(tmp_path, notices):
    steps = Steps(tmp_path, 2)
    steps.skip()
    steps.run(Step("a", "it", dict, [], lambda: None))
    assert notices == ["[1/1] it"]
