import dataclasses
import pickle
from typing import ClassVar

import numpy as np
import pytest
from pydantic import Field

from gpt_tf.errors import InputError, InputTypeError
from gpt_tf.settings.configuration import Configuration, Count, PathText, configuration
from gpt_tf.training.config import PRESETS
from gpt_tf.workflow.config import OptimizationConfig


@configuration
class Boxes(Configuration):
    title: ClassVar[str] = "A number of boxes"

    count: Count = Field(1, description="How many.")
    width: float | None = Field(None, gt=0, le=2, description="Of each.")
    places: PathText | tuple[PathText, ...] = Field("here", description="Where.")

    def __post_init__(self):
        self._check("count", self.count != 13, "that brings luck")


def test_fields_are_taken_by_place_and_by_name_and_stay():
    boxes = Boxes(2, 1.5)
    assert boxes == Boxes(count=2, width=1.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        boxes.count = 2


def test_a_changed_copy_is_checked_too():
    boxes = dataclasses.replace(Boxes(2), count=3)
    assert boxes.count == 3
    with pytest.raises(InputError, match="`count`"):
        dataclasses.replace(boxes, count=0)


def test_what_json_does_not_know_becomes_what_it_knows(tmp_path):
    boxes = Boxes(np.int64(2), np.float64(0.5), [tmp_path / "a", "b"])
    assert boxes.get_config() == {
        "count": 2,
        "width": 0.5,
        "places": (str(tmp_path / "a"), "b"),
    }
    assert {type(value) for value in (boxes.count, boxes.width)} == {int, float}


@pytest.mark.parametrize("config", [Boxes(2), *PRESETS.values(), OptimizationConfig()])
def test_configurations_survive_files_and_processes(config):
    assert type(config).of(config.get_config()) == config
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 1.5}, "`count` expects a valid integer. Received: 1.5."),
        ({"count": 0}, "`count` expects a value greater than or equal to 1. Received"),
        ({"width": 3.0}, "`width` expects a value less than or equal to 2."),
        (
            {"places": 3},
            "`places` expects a valid string, or a valid list.",
        ),
        ({"places": ""}, "`places` expects the path of a file or folder."),
        ({"count": 13}, "`count` expects a value that brings luck. Received: 13."),
        ({"colour": 1}, "A number of boxes expects a Boxes or a dict of its fields"),
    ],
)
def test_the_sentence_follows_from_what_is_stated(fields, message):
    with pytest.raises(InputError) as refused:
        Boxes(**fields)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("value", [{1: 2}, 3, [("count", 1)]])
def test_what_is_no_dict_of_fields_is_refused_with_the_known_ones(value):
    with pytest.raises(InputTypeError, match=r"Boxes or a dict .* count, p"):
        Boxes.of(value)
