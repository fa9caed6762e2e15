from types import SimpleNamespace

import pytest

from gpt_tf.errors import InputError
from gpt_tf.models import sizes
from gpt_tf.models.gpt import GPTModel

SIZES = {
    "vocab_size": 11,
    "embedding_dim": 10,
    "num_layers": 2,
    "num_heads": 3,  # does not divide the width
    "context_length": 7,
    "feedforward_dim": 9,
}


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_without_building(tied):
    built = GPTModel(**SIZES, tie_embeddings=tied).count_params()
    assert sizes.count_parameters({**SIZES, "tie_embeddings": tied}) == built
    deeper = {**SIZES, "num_layers": 3, "tie_embeddings": tied}
    assert sizes.count_parameters(deeper) != built


def test_what_memory_cannot_hold_is_refused_before_it_is_built(monkeypatch):
    needed = sizes.count_parameters(SIZES) * sizes.WEIGHT_BYTES
    memory = SimpleNamespace(total=needed)
    monkeypatch.setattr(sizes.psutil, "virtual_memory", lambda: memory)
    GPTModel(**SIZES)
    memory.total -= 1
    with pytest.raises(InputError, match=f"{needed // 4:,} parameters"):
        GPTModel(**SIZES)
    sizes.check_memory(SIZES, accelerators=1)


def test_a_vocabulary_and_a_depth_without_end_are_refused():
    for name in ("vocab_size", "num_layers", "context_length"):
        with pytest.raises(InputError, match=f"`{name}`"):
            GPTModel(**{**SIZES, name: 10**12})
