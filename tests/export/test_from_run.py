import json
import shutil

import numpy as np
import pytest

import gpt_tf
from gpt_tf.errors import InputError
from gpt_tf.export.from_run import export_trained, windows_of
from gpt_tf.text.dataset import TokenFile
from gpt_tf.text.tokenizer import BPETokenizer
from gpt_tf.training.run_folder import save_model
from tests.export.conftest import VOCAB_SIZE, with_four_bits


@pytest.fixture
def calibrations(monkeypatch):
    from gpt_tf.quantization import calibration

    seen = []

    def calibrate(model, inputs, **options):
        seen.append(np.asarray(inputs))
        return measure(model, inputs, **options)

    measure = calibration.calibrate
    monkeypatch.setattr(calibration, "calibrate", calibrate)
    return seen


def test_a_run_is_calibrated_and_verified_on_its_own_text(
    trained, tmp_path, calibrations, notices
):
    path = tmp_path / "gpt.litertlm"
    manifest = export_trained(trained.out, path, "int8")
    train = TokenFile.open(trained.out / "data" / "train.tokens").tokens
    (inputs,) = calibrations
    assert inputs.shape == (64, trained.model.context_length)
    text = "".join(map(chr, train))
    assert all("".join(map(chr, row)) in text for row in inputs)
    assert manifest["verification"]["text"] == "given text"
    assert any("calibrating" in line for line in notices)
    with gpt_tf.EdgeGPT(path) as gpt:
        assert gpt.mode == "int8"
        assert gpt.generate("the", max_new_tokens=4, temperature=0)


@pytest.mark.usefixtures("eagerly")  # one calibration takes less than its trace
def test_a_quantised_run_brings_its_own_ranges(trained, tmp_path, calibrations):
    run, data = tmp_path / "qat", trained.out / "data"
    text = TokenFile.open(data / "train.tokens").tokens
    inputs = windows_of(text, trained.model.context_length)[:8]
    model = gpt_tf.quantize_gpt_model(trained.model, inputs)
    shutil.copytree(data, run / "data")
    save_model(model, trained.tokenizer, run / "model")
    calibrations.clear()
    manifest = export_trained(run, tmp_path / "gpt.tflite", "int8")
    assert not calibrations
    assert (tmp_path / "tokenizer.json").is_file()
    # What the file computes is what the fake-quantised model does, not the float one.
    assert manifest["verification"]["divergence_nats"] < 1e-3


def test_a_model_without_text_takes_that_of_a_corpus(trained, corpus_folder, tmp_path):
    path = tmp_path / "gpt.litertlm"
    with pytest.raises(InputError, match="representative"):
        export_trained(trained.out / "model", path, "int8")
    manifest = export_trained(
        trained.out / "model", path, "int8", corpus=str(corpus_folder)
    )
    beside = json.loads((tmp_path / "gpt.litertlm.json").read_text("utf-8"))
    assert beside == manifest


def test_other_file_names_are_refused(trained, tmp_path):
    with pytest.raises(InputError, match=r"\.litertlm or \.tflite"):
        export_trained(trained.out, tmp_path / "gpt.onnx")


def test_a_litertlm_needs_a_tokenizer(trained, tmp_path):
    (tmp_path / "model.keras").write_bytes(
        (trained.out / "model" / "model.keras").read_bytes()
    )
    with pytest.raises(InputError, match="tokenizer"):
        export_trained(tmp_path, tmp_path / "gpt.litertlm")


def test_windows_are_spread_over_the_whole_text():
    windows = windows_of(np.arange(10_000), 16)
    assert windows.shape == (64, 16) and windows.dtype == np.int32
    assert windows[0, 0] == 0 and windows[-1, -1] == 9_999
    assert windows_of(np.arange(5), 16).tolist() == [[0, 1, 2, 3, 4]]
    with pytest.raises(InputError, match="expects text"):
        windows_of(np.arange(0), 16)


def test_weights_of_4_bits_are_not_rounded_to_others(build_model, tmp_path, notices):
    model = with_four_bits(build_model(embedding_dim=64))
    tokenizer = BPETokenizer.train(["the cat sat on the mat. " * 40], VOCAB_SIZE)
    save_model(model, tokenizer, tmp_path / "model")
    path = tmp_path / "gpt.litertlm"
    manifest = export_trained(tmp_path / "model", path, "int4", prepare=True)
    assert manifest["has_offsets"]
    assert manifest["verification"]["divergence_nats"] < 1e-3
    assert any("4 bits already" in line for line in notices)
    manifest = export_trained(tmp_path / "model", path, "dynamic_int8", prepare=True)
    assert not manifest["has_offsets"]
