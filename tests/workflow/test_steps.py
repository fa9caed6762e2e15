"""What was done is not done again while its inputs stay, whatever ended it."""

import pytest

from gpt_tf import artifacts
from gpt_tf.workflow.steps import Steps


class Accident(BaseException):
    """A process that is killed says no goodbye."""


@pytest.fixture
def house(tmp_path):
    """Run two steps, the second made of what the first made; return what was done."""

    def build(word="one", suffix="!", fail=None):
        worked = []
        steps = Steps(tmp_path, 2)
        first, second = tmp_path / "first.txt", tmp_path / "second.txt"

        def make_first():
            worked.append("first")
            first.write_text(word)

        def make_second():
            worked.append("second")
            if fail == "second":
                raise Accident
            second.write_text(first.read_text() + suffix)

        steps.run(
            *("first", "1st", {"word": word}, [first.name], make_first),
            command="a first",
        )
        inputs = {"a": artifacts.sha256_of(first), "b": suffix}
        steps.run(
            *("second", "2nd", inputs, [second.name], make_second),
            begin=lambda: worked.append("begin"),
        )
        return worked, steps.done

    build.folder = tmp_path
    return build


def test_a_second_run_does_nothing(house, notices):
    worked, before = house()
    assert worked == ["first", "begin", "second"]
    assert [done["reused"] for done in before] == [False, False]
    assert [done["command"] for done in before] == ["a first", None]
    notices.clear()
    worked, after = house()
    assert worked == []
    assert notices == ["[1/2] 1st: done before", "[2/2] 2nd: done before"]
    assert after == [done | {"reused": True} for done in before]


def test_only_what_changed_is_done_again(house):
    house()
    assert house(suffix="?")[0] == ["begin", "second"]
    assert (house.folder / "second.txt").read_text() == "one?"
    assert house("two", "?")[0] == ["first", "begin", "second"]
    assert (house.folder / "second.txt").read_text() == "two?"


@pytest.mark.parametrize(
    ("suffix", "worked"), [("!", ["second"]), ("?", ["begin", "second"])]
)
def test_a_killed_step_goes_on_unless_it_has_other_inputs(house, suffix, worked):
    with pytest.raises(Accident):
        house(fail="second")
    assert house(suffix=suffix)[0] == worked
    assert house(suffix=suffix)[0] == []


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


@pytest.mark.parametrize("text", ["", "[]"])
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
    steps.run("a", "it", {}, [], lambda: None)
    assert notices == ["[1/1] it"]
