import pytest

from gpt_tf.errors import InputError
from gpt_tf.training.config import TrainingConfig
from gpt_tf.training.schedule import WarmupCosine

TEACHER = {"distillation": {"teacher": "runs/t"}}


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 6, "gradient_accumulation_steps": 4},
        {"num_heads": 257},
        {"augmentation": {"bpe_dropout": 1.0}},
        {"augmentation": {"dropout": 0.1}},
        {"distillation": {}},
        {"distillation": {"teacher": "a", "knowledge": "b"}, "augmentation": {}},
        {**TEACHER, "augmentation": {"teacher": "a", "written_tokens": 9}},
        {"quantization": {}},
        {"init_from": "runs/a", "quantization": {}, "precision": "mixed_float16"},
        {"mesh": "2x2", "pipeline_stages": 2},
        {"mesh": "2x2", "precision": "mixed_float16"},
        {"mesh": "2x2", "strategy": "mirrored"},
        {"pipeline_stages": 2, "strategy": "mirrored"},
        {"pipeline_stages": 2, "gradient_accumulation_steps": 2},
        {"pipeline_stages": 2, **TEACHER},
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes):
    with pytest.raises(InputError, match="Received"):
        TrainingConfig(**changes)


def test_the_learning_rate_rises_and_falls():
    schedule = WarmupCosine(1.0, 0.1, warmup_steps=10, total_steps=110)
    rates = [float(schedule(step)) for step in range(120)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55, abs=1e-3)
    assert rates[110] == rates[119] == pytest.approx(0.1)
    again = WarmupCosine.from_config(schedule.get_config())
    assert float(again(37)) == rates[37]
