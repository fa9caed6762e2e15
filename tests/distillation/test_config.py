import json

import pytest

from gpt_tf.distillation import losses
from gpt_tf.distillation.config import DistillationConfig
from gpt_tf.errors import InputError


def test_it_survives_json():
    config = DistillationConfig(
        "runs/teacher",
        layers=[0, 2],
        loss=[["forward_kl", 1.0], ["hidden_states", 0.1]],
    )
    again = DistillationConfig.of(json.loads(json.dumps(config.get_config())))
    assert again == config
    terms = losses.get(again.compile_arguments()["distillation_loss"])
    assert terms.factors == [1.0, 0.1]


def test_sizes_that_were_not_given_are_the_teachers():
    config = DistillationConfig(num_layers=2, num_heads=4)
    assert config.student_sizes() == {"num_layers": 2, "num_heads": 4}


@pytest.mark.parametrize("fields", [{"on_policy_fraction": 0.5}, {"written_tokens": 5}])
def test_stored_knowledge_is_of_no_text_that_is_written_meanwhile(fields):
    with pytest.raises(InputError, match="Leave out one"):
        DistillationConfig(knowledge="k", **fields)


def test_unknown_fields_are_refused():
    with pytest.raises(InputError, match="distillation config expects"):
        DistillationConfig.of({"tempreature": 2.0})
