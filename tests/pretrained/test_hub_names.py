"""`hf://owner/name`, also where a command made a path of it."""

from pathlib import Path

import huggingface_hub
import pytest

from gpt_tf.pretrained import source
from gpt_tf.training.run_folder import load_model, model_files
from tests.pretrained.folders import CONFIGS, random_tensors, write_folder


@pytest.mark.parametrize("kind", [str, Path])
def test_a_name_on_the_hub_is_asked_once(monkeypatch, kind, tmp_path):
    name, asked = kind(f"hf://owner/{kind.__name__}"), []

    def fetch(repository, **options):
        asked.append(repository)
        return str(tmp_path)

    config = CONFIGS["gpt2"]
    write_folder(tmp_path, config, random_tensors(config))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert source.is_foreign(name)
    load_model(name)
    assert model_files(name) == (tmp_path / "model.safetensors",)
    assert asked == [f"owner/{kind.__name__}"]
