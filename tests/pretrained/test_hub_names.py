"""`hf://owner/name`, also where a command made a path of it."""

from pathlib import Path

import huggingface_hub
import pytest

from gpt_tf.errors import InputError
from gpt_tf.pretrained import source


@pytest.mark.parametrize("name", ["hf://owner/name", Path("hf://owner/name")])
def test_a_name_on_the_hub_is_fetched_by_its_name(monkeypatch, name, tmp_path):
    asked = []

    def fetch(repository, **options):
        asked.append(repository)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert source.is_foreign(name)
    with pytest.raises(InputError):  # the folder is empty
        source.describe(name)
    assert asked == ["owner/name"]
