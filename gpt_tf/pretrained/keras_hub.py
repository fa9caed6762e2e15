"""Presets that KerasHub saved: GPT-2's.

KerasHub, which is Keras 3, reads the weights: only NumPy arrays cross.
"""

from pathlib import Path

from gpt_tf import artifacts
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.pretrained.build import Description
from gpt_tf.pretrained.families import FAMILIES
from gpt_tf.text.tokenizer import BPETokenizer

_SIZES = {
    "vocabulary_size": "vocab_size",
    "hidden_dim": "embedding_dim",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
    "max_sequence_length": "context_length",
    "intermediate_dim": "feedforward_dim",
}
_CLASSES = {
    *("GPT2Backbone", "GPT2CausalLM", "GPT2CausalLMPreprocessor", "GPT2Tokenizer"),
    *("GPT2Preprocessor", "DTypePolicy"),
}
_MODULES = {"", "keras", "keras_hub", "keras_nlp"}


def describe(folder: Path) -> Description:
    """Describe a preset's folder.

    Raises:
        InputError: The preset is of another model than GPT-2.
        DamagedFileError: It names classes that a GPT-2 does not consist of.
    """
    config = artifacts.read_json(folder / "config.json")
    for name in ("config.json", "tokenizer.json", "metadata.json"):
        if (folder / name).is_file():
            _check_classes(artifacts.read_json(folder / name), folder / name)
    kind = config.get("class_name") if isinstance(config, dict) else None
    if kind not in ("GPT2Backbone", "GPT2CausalLM"):
        raise InputError(
            f"{folder} expects a preset of a GPT2Backbone. Received: {kind!r}. "
            "Other families are opened from Hugging Face's folders."
        )
    config = config.get("config") or {}
    config = (config.get("backbone") or {}).get("config", config)
    return Description(
        FAMILIES["gpt2"],
        {ours: config.get(theirs) for theirs, ours in _SIZES.items()},
        {},
        (folder / "model.weights.h5",),
        lambda: _tokenizer(folder),
        lambda changes: _model(folder, changes),
    )


def _check_classes(value, file):
    """Refuse classes that are no part of a GPT-2: KerasHub would call them."""
    if isinstance(value, dict):
        names = [value.get(key) for key in ("class_name", "registered_name", "module")]
        own, registered, module = (str(name or "") for name in names)
        is_known = own in _CLASSES and registered.rpartition(">")[2] in ("", own)
        if any(names) and not (is_known and module.partition(".")[0] in _MODULES):
            raise DamagedFileError(
                f"{file} expects the classes of a GPT-2. Received: {names}. "
                "Nothing of it was called."
            )
    for part in value.values() if isinstance(value, dict) else ():
        _check_classes(part, file)
    for part in value if isinstance(value, list) else ():
        _check_classes(part, file)


def _model(folder, changes):
    from gpt_tf.models import interop

    return interop.from_preset(str(folder), **changes)


def _tokenizer(folder):
    if not (folder / "tokenizer.json").is_file():
        return None
    assets = folder / "assets" / "tokenizer"
    return BPETokenizer.from_gpt2_files(
        assets / "vocabulary.json", assets / "merges.txt"
    )
