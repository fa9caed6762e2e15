"""A GPT in a GGUF file: its configuration, its weights and its tokenizer.

llama.cpp has names of its own, one for each part whatever the family. The metadata
become Hugging Face's configuration, so that a family's limits are stated once.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.models.sizes import rotary_frequencies
from gpt_tf.pretrained.build import Description
from gpt_tf.pretrained.families import FAMILIES, Family, Weight, linear, normalization
from gpt_tf.pretrained.gguf_file import GGUF, read_gguf
from gpt_tf.pretrained.tensors import Tensor
from gpt_tf.text.chat import ChatTemplate, tokens_of
from gpt_tf.text.tokenizer import Tokenizer, tokenizer_from_json

# llama.cpp's architecture -> Hugging Face's `model_type`.
_FAMILIES = {
    "gpt2": "gpt2",
    "gptneox": "gpt_neox",
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}

_TOP = {
    "embedding/token_table": Weight(("token_embd.weight",)),
    "embedding/position_table": Weight(("position_embd.weight",)),
    **normalization("final_norm/", "output_norm"),
    "head/kernel": Weight(("output.weight",)),
}
_PARTS = {
    **normalization("attention_norm_", "attn_norm"),
    **linear("qkv", "attn_q", "attn_k", "attn_v"),
    **normalization("query_norm_", "attn_q_norm"),
    **normalization("key_norm_", "attn_k_norm"),
    **linear("output", "attn_output"),
    **normalization("feedforward_norm_", "ffn_norm"),
    **linear("up", "ffn_gate", "ffn_up"),
    **linear("down", "ffn_down"),
}
# Families whose query, key and value are one, and whose feed-forward has no gate.
_WHOLE = {**_PARTS, **linear("qkv", "attn_qkv"), **linear("up", "ffn_up")}


def family_of(file: GGUF, path: str | os.PathLike) -> tuple[Family, dict]:
    """Return the family of a file's model, with llama.cpp's names, and its arguments.

    Args:
        file: What `read_gguf` returned.
        path: Its name, for messages.

    Returns:
        The family and `GPTModel`'s arguments.

    Raises:
        InputError: The model is of another family, or a form of one that is unknown.
        DamagedFileError: The metadata lack something.

    Reference: llama.cpp's `convert_hf_to_gguf.py`, of which this is the way back.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in _FAMILIES:
        raise InputError(
            f"{path} expects a model of the architectures {', '.join(_FAMILIES)}. "
            f"Received: {name!r}. Take a model of one of these."
        )
    family = FAMILIES[_FAMILIES[name]]
    try:
        config = _config(file, name, family.name)
    except KeyError as error:
        raise DamagedFileError(
            f"{path} expects the metadata {error.args[0]!r}, which it lacks."
        ) from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise DamagedFileError(
            f"{path} expects metadata that are a model's sizes. Received: {error}."
        ) from None
    arguments = family.arguments(config)
    arguments |= _scaling(file.tensors, arguments, path)
    parts = _PARTS if arguments["activation"] == "swiglu" else _WHOLE
    family = dataclasses.replace(
        family, prefix="", top=_TOP, block="blk.{}.", parts=parts
    )
    return family, arguments


def _config(file, name, model_type):
    """Return metadata as Hugging Face's configuration."""

    def of(key, default=None):
        key = f"{name}.{key}"
        if default is None and key not in file.metadata:
            raise KeyError(key)
        return file.metadata.get(key, default)

    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise KeyError("token_embd.weight")
    width, heads = of("embedding_length"), of("attention.head_count")
    common = {
        "model_type": model_type,
        "vocab_size": table.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if model_type == "gpt2":
        return common | {
            "n_embd": width,
            "n_layer": of("block_count"),
            "n_head": heads,
            "n_positions": of("context_length"),
            "n_inner": of("feed_forward_length"),
            "layer_norm_epsilon": of("attention.layer_norm_epsilon"),
        }
    common |= {
        "hidden_size": width,
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": heads,
        "max_position_embeddings": of("context_length"),
        "intermediate_size": of("feed_forward_length"),
        "rope_theta": of("rope.freq_base", 10000.0),
    }
    head_dim = of("attention.key_length", width // max(heads, 1))
    turned = of("rope.dimension_count", head_dim)
    kind = of("rope.scaling.type", "none")
    if kind != "none":
        common["rope_scaling"] = {"rope_type": kind}
    if model_type == "gpt_neox":
        return common | {
            "rotary_pct": turned / head_dim,
            "layer_norm_eps": of("attention.layer_norm_epsilon"),
            "use_parallel_residual": of("use_parallel_residual", True),
        }
    if turned != head_dim or of("attention.value_length", head_dim) != head_dim:
        raise InputError(
            f"A {model_type} expects heads of one width, all of it turned. Received: "
            f"{head_dim} of which {turned} are turned."
        )
    return common | {
        "num_key_value_heads": of("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": of("attention.layer_norm_rms_epsilon"),
    }


def _scaling(tensors, arguments, path):
    """Return Llama 3's scaling, of which a file holds the result alone."""
    if "rope_freqs.weight" not in tensors:
        return {}
    stored = tensors["rope_freqs.weight"].read().ravel()
    form = {
        "rotary_base": arguments["rotary_base"],
        "rotary_dim": 2 * stored.size,
        "rotary_scaling": None,
    }
    plain = rotary_frequencies(form)
    form["rotary_scaling"] = {
        "factor": float(stored.max(initial=1.0)),
        "low_frequency_factor": 1.0,
        "high_frequency_factor": 4.0,
        "original_context_length": 8192.0,
    }
    found = plain / rotary_frequencies(form)
    is_of_heads = 2 * stored.size == arguments.get("head_dim", 2 * stored.size)
    if not is_of_heads or not np.allclose(found, stored, rtol=1e-4):
        raise InputError(
            f"{path} expects rotary frequencies that are plain or scaled as Llama 3's. "
            "Received: others. Open the model's Hugging Face folder."
        )
    return {"rotary_scaling": form["rotary_scaling"]}


def tensors_of(file: GGUF, arguments: dict) -> dict[str, Tensor]:
    """Return the tensors, with heads whose halves are turned with each other.

    llama.cpp has the pairs of Llama's queries and keys side by side.
    """
    tensors = dict(file.tensors)
    if file.metadata["general.architecture"] != "llama":
        return tensors
    counts = {"attn_q": "num_heads", "attn_k": "num_kv_heads"}
    for name, tensor in file.tensors.items():
        part = name.split(".")[-2] if "." in name else ""
        if part in counts:
            heads = arguments[counts[part]]
            tensors[name] = tensor._replace(read=_halves(tensor, heads))
    return tensors


def _halves(tensor, heads):
    def read():
        values = tensor.read()
        apart = values.reshape(heads, -1, 2, *values.shape[1:])
        return apart.swapaxes(1, 2).reshape(values.shape)

    return read


# The tokenizer

_CONTROL, _USER_DEFINED = 3, 4
_DIGITS = r"\p{N}"
_GPT_4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def describe(path: Path) -> Description:
    """Describe a GGUF file.

    Raises:
        InputError: The model, its quantisation or its tokenizer is of an unknown kind.
        DamagedFileError: The file is none, or its parts do not fit.
    """
    file = read_gguf(path)
    family, arguments = family_of(file, path)
    backend = tokenizer_of(file, path)
    return Description(
        family,
        arguments,
        tensors_of(file, arguments),
        (path,),
        lambda: _with_template(file, tokenizer_from_json(backend.to_str(), str(path))),
    )


def _with_template(file: GGUF, tokenizer: Tokenizer) -> Tokenizer:
    """Give a tokenizer the chat template in a file's metadata, if there is one."""
    source = file.metadata.get("tokenizer.chat_template")
    if isinstance(source, str):

        def token_of(kind):
            return tokens_of(
                [file.metadata.get(f"tokenizer.ggml.{kind}_token_id")],
                tokenizer.backend,
            )

        kinds = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        special = {f"{k}_token": t for k, name in kinds.items() for t in token_of(name)}
        ends = [*token_of("eot"), *token_of("eom")]
        tokenizer.chat_template = ChatTemplate(source, special, tuple(ends))
    return tokenizer


def _split(pattern):
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, last])


def _pre_tokenizer(kind):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind in ("smollm", "starcoder", "refact", "command-r"):
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, byte_level])
    if kind == "qwen2":
        return _split(_GPT_4 % _DIGITS)
    if kind in ("llama-bpe", "llama3", "llama-v3"):
        return _split(_GPT_4 % r"\p{N}{1,3}")
    if kind in ("gpt-2", "default", "olmo", "phi-2"):
        return byte_level
    return None


def tokenizer_of(file: GGUF, path: str | os.PathLike) -> tokenizers.Tokenizer:
    """Return the tokenizer in a file's metadata.

    Raises:
        InputError: It is none of byte-level BPE, or splits text in an unknown way.
        DamagedFileError: The metadata lack something.
    """
    metadata = file.metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise InputError(
            f"{path} expects a tokenizer of byte-level BPE. Received: {kind!r}, "
            "SentencePiece as a rule. Open the model's Hugging Face folder, with its "
            "tokenizer.json."
        )
    splits = metadata.get("tokenizer.ggml.pre", "default")
    pre_tokenizer = _pre_tokenizer(splits)
    if pre_tokenizer is None:
        raise InputError(
            f"{path} expects a tokenizer that splits text as GPT-2, SmolLM, Llama 3 or "
            f"Qwen 2. Received: {splits!r}. Open the model's Hugging Face folder, with "
            "its tokenizer.json."
        )
    try:
        tokens = metadata["tokenizer.ggml.tokens"]
        merges = [tuple(m.split(" ")) for m in metadata["tokenizer.ggml.merges"]]
        types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
        vocabulary = {token: index for index, token in enumerate(tokens)}
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
        for index, token in enumerate(tokens):
            if types[index] in (_CONTROL, _USER_DEFINED):
                is_special = types[index] == _CONTROL
                added = tokenizers.AddedToken(
                    token, special=is_special, normalized=False
                )
                backend.add_tokens([added])
    except Exception as error:  # of what a stranger wrote
        raise DamagedFileError(
            f"{path} expects a vocabulary and merges. Received: {error}."
        ) from None
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    return backend
