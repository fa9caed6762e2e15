"""The models that the repository brings along load, and know what they learnt."""

from pathlib import Path

import numpy as np
import pytest

import gpt_tf

FOLDER = Path(__file__).parent.parent / "saved_models"

SNIPPET = """
class Reader:
    def __init__(self, path):
        self.path = path

    def read(self):
        with open(self.path) as file:
            return file.read()
"""


@pytest.fixture(
    scope="module",
    params=[path.name for path in sorted(FOLDER.iterdir()) if path.is_dir()],
)
def saved(request):
    return gpt_tf.load_model(FOLDER / request.param)


def loss_of(model, ids):
    x, y = np.array([ids[:-1]]), np.array([ids[1:]])
    return model.evaluate(x, y, verbose=0, return_dict=True)["loss"]


def test_it_expects_python_and_not_python_backwards(saved):
    model, tokenizer = saved
    ids = tokenizer.encode(SNIPPET)
    blind = np.log(tokenizer.vocab_size)
    assert loss_of(model, ids) < 0.5 * blind
    assert loss_of(model, ids[::-1]) > 0.8 * blind


def test_it_closes_a_bracket_and_goes_on(saved):
    model, tokenizer = saved
    text = gpt_tf.generate(
        model,
        "    def __init__(self",
        tokenizer=tokenizer,
        max_new_tokens=24,
        temperature=0,
    )
    assert "):\n" in text


@pytest.mark.parametrize(
    "path", sorted(FOLDER.glob("*.litertlm")), ids=lambda p: p.stem
)
def test_its_file_predicts_what_its_model_predicts(path):
    model, tokenizer = gpt_tf.load_model(path.with_suffix(""))
    ids = tokenizer.encode(SNIPPET)
    with gpt_tf.EdgeGPT(path) as gpt:
        loss = -gpt.score(ids).mean()
        backwards = -gpt.score(ids[::-1]).mean()
    assert abs(loss - loss_of(model, ids)) < 0.02
    assert backwards > 0.8 * np.log(tokenizer.vocab_size)
