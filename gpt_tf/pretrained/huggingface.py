"""Folders in Hugging Face's form: `config.json`, weights, `tokenizer.json`."""

from pathlib import Path

from gpt_tf import artifacts
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.pretrained.build import Description
from gpt_tf.pretrained.families import family_of
from gpt_tf.pretrained.tensors import INDEX, read_safetensors, read_shards
from gpt_tf.pretrained.torch_file import read_checkpoint
from gpt_tf.text.tokenizer import load_tokenizer

_PICKLED = "pytorch_model.bin"


def read_config(folder: Path) -> dict:
    """Return `config.json`, checked to be an object."""
    config = artifacts.read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise DamagedFileError(
            f"{folder / 'config.json'} expects an object. "
            f"Received: a {type(config).__name__}."
        )
    return config


def describe(folder: Path) -> Description:
    """Describe a folder.

    Args:
        folder: With `config.json`; weights in `model.safetensors`, in several such
            files and their index, or in `pytorch_model.bin`; `tokenizer.json`, or
            GPT-2's two files, or none.

    Raises:
        InputError: The family or a form of it is unknown, or a file is missing.
        DamagedFileError: A file is not what it should be.
    """
    config = read_config(folder)
    family = family_of(config)
    tensors, files = _tensors(folder)
    return Description(
        family, family.arguments(config), tensors, files, lambda: _tokenizer(folder)
    )


def _tensors(folder):
    whole = folder / "model.safetensors"
    if whole.is_file():
        return read_safetensors(whole), (whole,)
    if (folder / INDEX).is_file():
        return read_shards(folder / INDEX)
    if (folder / _PICKLED).is_file():
        return read_checkpoint(folder / _PICKLED), (folder / _PICKLED,)
    raise InputError(
        f"{folder} expects weights: model.safetensors, {INDEX} with its files, or "
        f"{_PICKLED}. There are none. Fetch them, too."
    )


def _tokenizer(folder):
    names = ("tokenizer.json", "vocab.json")
    if any((folder / name).is_file() for name in names):
        return load_tokenizer(folder)
    if (folder / "tokenizer.model").is_file():
        raise InputError(
            f"{folder} expects a tokenizer.json. Received: SentencePiece's "
            "tokenizer.model alone. Convert it with transformers: "
            "`AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`."
        )
    return None
