"""Files and Keras models answer the same questions in the same way."""

from pathlib import Path

import numpy as np
import pytest

from gpt_tf.edge import EdgeGPT
from gpt_tf.errors import InputError
from gpt_tf.evaluation.accuracy import measure_accuracies
from gpt_tf.evaluation.code_validity import measure_code_validity
from gpt_tf.evaluation.models import KerasGPT, describe, open_model, unique_names
from gpt_tf.explain.attribution import explain_prompt
from gpt_tf.export.tflite import export_tflite
from gpt_tf.generation.sampler import log_softmax
from gpt_tf.text.tokenizer import CharacterTokenizer

pytestmark = pytest.mark.usefixtures("eagerly")

SAVED = Path(__file__).parent.parent.parent / "saved_models"


def test_pieces_of_a_text_give_the_logits_of_the_whole(make_model):
    model = make_model(context_length=150)
    ids = np.random.default_rng(1).integers(0, 31, 150)
    whole = model(ids[None]).numpy()[0]
    gpt = KerasGPT(model)
    found = [gpt.logits(ids[:70]), gpt.logits(ids[70:83]), gpt.decode(ids[83])[None]]
    gpt.prefill(ids[84:140])
    found.append(gpt.logits(ids[140:]))
    assert gpt.position == 150
    wanted = np.concatenate([whole[:84], whole[140:]])
    np.testing.assert_allclose(np.concatenate(found), wanted, atol=2e-5)
    gpt.reset()
    # Another first token is another text: the cache was emptied.
    assert np.abs(gpt.logits(ids[1:3]) - whole[1:3]).max() > 1e-3
    np.testing.assert_allclose(
        gpt.logits(ids[3:5]), model(ids[None, 1:5]).numpy()[0, 2:], atol=2e-5
    )


def test_ids_without_a_token_have_no_probability_in_keras_and_in_a_file(
    make_model, tmp_path
):
    tokenizer = CharacterTokenizer.train(["abcdefgh"])
    model = make_model(vocab_size=31)
    path = tmp_path / "gpt.tflite"
    options = {"prefill_lengths": (4,), "allow_untrained": True}
    export_tflite(model, path, "float32", tokenizer=tokenizer, **options)
    ids = [1, 5, 2, 8]
    with KerasGPT(model, tokenizer) as keras, EdgeGPT(path) as edge:
        found, other = (np.exp(log_softmax(gpt.logits(ids))) for gpt in (keras, edge))
        scores = edge.score(ids)
    np.testing.assert_allclose(found, other, atol=1e-6)
    assert not found[:, 9:].any()
    np.testing.assert_allclose(np.exp(scores), found[np.arange(3), ids[1:]], rtol=1e-5)


def test_what_cannot_be_appended_is_refused(make_model):
    gpt = KerasGPT(make_model())
    with pytest.raises(InputError, match=r"room for 16 more\. Received: 17"):
        gpt.logits([1] * 17)
    with pytest.raises(InputError, match="31"):
        gpt.logits([31])
    assert gpt.logits([]).shape == (0, 31)
    assert gpt.position == 0


def test_a_file_and_its_model_are_described_alike():
    paths = [SAVED / "python-small", SAVED / "python-small.litertlm"]
    facts = []
    for path in paths:
        with open_model(path) as subject:
            facts.append(describe(path, subject))
    model, file = facts
    assert model["parameters"] == file["parameters"] == 940_800
    assert (model["kind"], model["mode"]) == ("keras", "keras")
    assert (file["kind"], file["mode"]) == ("litertlm", "dynamic_int8")
    assert file["size_bytes"] == paths[1].stat().st_size < model["size_bytes"] / 3
    shared = model["config"].keys() & file["config"].keys()
    assert {"vocab_size", "num_layers", "num_heads"} <= shared
    assert all(model["config"][name] == file["config"][name] for name in shared)


def test_names_are_as_long_as_they_must_be():
    assert unique_names(["a/x.tflite", "a/y.tflite"]) == ["x.tflite", "y.tflite"]
    assert unique_names(["a/g/x", "b/g/x", "y"]) == ["a/g/x", "b/g/x", "y"]
    with pytest.raises(InputError, match="twice"):
        unique_names(["x", "./x"])


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("folder", "missing.litertlm"):
        with pytest.raises(InputError, match=name):
            open_model(tmp_path / name)


@pytest.mark.parametrize(
    "measure",
    [
        lambda subject: explain_prompt(subject, "def"),
        lambda subject: measure_accuracies({"a": subject}, None, "def main():"),
        lambda subject: measure_code_validity(subject, "def main():"),
    ],
)
def test_what_is_not_open_is_refused_with_what_opens_it(make_model, measure):
    with pytest.raises(InputError, match=r"str. Pass `open_model\('a.litertlm'\)`"):
        measure("a.litertlm")
    with pytest.raises(InputError, match=r"GPTModel. Pass `KerasGPT\(model, tok"):
        measure(make_model())
