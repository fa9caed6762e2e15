"""nanoGPT's checkpoints: `ckpt.pt`, of GPT-2's form, with or without biases."""

import dataclasses
from pathlib import Path

from gpt_tf.errors import InputError
from gpt_tf.pretrained.build import Description
from gpt_tf.pretrained.families import FAMILIES
from gpt_tf.pretrained.torch_file import read_checkpoint
from gpt_tf.text.tokenizer import FILE_NAME, load_tokenizer

_COMPILED = "_orig_mod."  # what `torch.compile` puts before names
_SIZES = {
    "vocab_size": "vocab_size",
    "n_embd": "embedding_dim",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "block_size": "context_length",
}


def describe(path: Path) -> Description:
    """Describe nanoGPT's `ckpt.pt`; its tokenizer is a tokenizer.json beside it.

    Raises:
        InputError: It is a checkpoint of something else.
        DamagedFileError: It is none, or its weights do not fit its sizes.

    Reference: Karpathy, github.com/karpathy/nanoGPT; its GELU is the exact one.
    """
    found = read_checkpoint(path)
    stated, weights = found.get("model_args"), found.get("model")
    if not isinstance(stated, dict) or not isinstance(weights, dict):
        raise InputError(
            f"{path} expects a checkpoint of nanoGPT, with `model` and `model_args`. "
            f"Received: one with {', '.join(map(str, list(found)[:5]))}. Weights of a "
            "Hugging Face model are opened by their folder."
        )
    for name in _SIZES:
        if type(stated.get(name)) is not int:
            raise InputError(
                f"{path} expects `model_args[{name!r}]` to be an integer. "
                f"Received: a {type(stated.get(name)).__name__}."
            )
    arguments = {ours: stated[theirs] for theirs, ours in _SIZES.items()}
    has_biases = stated.get("bias", True)
    arguments |= {
        "activation": "gelu",
        "biases": "all" if has_biases else "none",
        "norm_bias": bool(has_biases),
    }
    tensors = {str(name).removeprefix(_COMPILED): t for name, t in weights.items()}
    return Description(_FAMILY, arguments, tensors, (path,), lambda: _beside(path))


def _beside(path):
    has_tokenizer = (path.parent / FILE_NAME).is_file()
    return load_tokenizer(path.parent) if has_tokenizer else None


# Its layers are PyTorch's own, whose matrices are `(outputs, inputs)`.
_FAMILY = dataclasses.replace(
    FAMILIES["gpt2"],
    parts={
        name: dataclasses.replace(weight, is_transposed=True)
        for name, weight in FAMILIES["gpt2"].parts.items()
    },
)
