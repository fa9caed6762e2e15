import dataclasses
import pickle
from typing import ClassVar

import numpy as np
import pytest
from pydantic import Field

from gpt_tf.errors import InputError, InputTypeError
from gpt_tf.settings.configuration import Configuration, Count, PathText, configuration
from gpt_tf.training.config import PRESETS, TrainingConfig
from gpt_tf.workflow.config import OptimizationConfig


@configuration
class Boxes(Configuration):
    title: ClassVar[str] = "A number of boxes"

    count: Count = Field(1, description="How many.")
    width: float | None = Field(None, gt=0, le=2, description="Of each.")
    places: PathText | tuple[PathText, ...] = Field("here", description="Where.")

    def __post_init__(self):
        self._check("count", self.count != 13, "that brings luck")


def test_fields_are_taken_by_place_and_by_name():
    assert Boxes(2, 1.5) == Boxes(count=2, width=1.5)


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
        ({"count": 1.5}, "`count` expects an integer of at least 1. Received: 1.5."),
        ({"width": 3.0}, "`width` expects a number above 0 and at most 2, or None."),
        ({"places": 3}, "`places` expects a text, or a list of texts. Received: 3."),
        ({"places": ""}, "`places` expects the path of a file or folder."),
        ({"count": 13}, "`count` expects a value that brings luck. Received: 13."),
    ],
)
def test_the_sentence_follows_from_what_is_stated(fields, message):
    with pytest.raises(InputError) as refused:
        Boxes(**fields)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("value", [{"colour": 1}, {1: 2}, 3, [("count", 1)]])
def test_unknown_fields_are_refused_with_the_known_ones(value):
    with pytest.raises(InputTypeError, match=r"Boxes or a dict .* count, p"):
        Boxes.of(value)


def test_a_configuration_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Boxes().count = 2


def test_every_setting_is_described():
    for kind in (TrainingConfig, OptimizationConfig):
        for name, field in kind.__pydantic_fields__.items():
            assert field.description.endswith("."), name
