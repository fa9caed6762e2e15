"""A `GPTModel` of GPT-2's form for other libraries: Hugging Face's and KerasHub's.

Hugging Face's files are written directly, `config.json`, `model.safetensors` and those
of the tokenizer. KerasHub is Keras 3: only NumPy arrays cross. The way here is
`gpt_tf.open_model`.
"""

import math
import operator
import os
from typing import TYPE_CHECKING

import numpy as np
import safetensors.numpy

from gpt_tf import artifacts
from gpt_tf.errors import InputError
from gpt_tf.generation.sequence import ids_without_token
from gpt_tf.models.sizes import refuse_writing
from gpt_tf.text.tokenizer import END_OF_TEXT, Tokenizer

if TYPE_CHECKING:
    from gpt_tf.models.gpt import GPTModel

# Our weight of a block -> Hugging Face's; both keep kernels as (in, out).
_HUGGINGFACE_BLOCK = {
    "attention_norm_gamma": "ln_1.weight",
    "attention_norm_beta": "ln_1.bias",
    "qkv_kernel": "attn.c_attn.weight",
    "qkv_bias": "attn.c_attn.bias",
    "output_kernel": "attn.c_proj.weight",
    "output_bias": "attn.c_proj.bias",
    "feedforward_norm_gamma": "ln_2.weight",
    "feedforward_norm_beta": "ln_2.bias",
    "up_kernel": "mlp.c_fc.weight",
    "up_bias": "mlp.c_fc.bias",
    "down_kernel": "mlp.c_proj.weight",
    "down_bias": "mlp.c_proj.bias",
}

_QKV = ("query", "key", "value")
# Our weight -> KerasHub's, which has query, key and value apart.
KERAS_HUB_TOP = {
    "embedding/token_table": ["token_embedding.embeddings"],
    "embedding/position_table": ["position_embedding.position_embeddings"],
    "final_norm/gamma": ["layer_norm.gamma"],
    "final_norm/beta": ["layer_norm.beta"],
}
KERAS_HUB_BLOCK = {
    "attention_norm_gamma": ["_self_attention_layer_norm.gamma"],
    "attention_norm_beta": ["_self_attention_layer_norm.beta"],
    "qkv_kernel": [f"_self_attention_layer._{part}_dense.kernel" for part in _QKV],
    "qkv_bias": [f"_self_attention_layer._{part}_dense.bias" for part in _QKV],
    "output_kernel": ["_self_attention_layer._output_dense.kernel"],
    "output_bias": ["_self_attention_layer._output_dense.bias"],
    "feedforward_norm_gamma": ["_feedforward_layer_norm.gamma"],
    "feedforward_norm_beta": ["_feedforward_layer_norm.beta"],
    "up_kernel": ["_feedforward_intermediate_dense.kernel"],
    "up_bias": ["_feedforward_intermediate_dense.bias"],
    "down_kernel": ["_feedforward_output_dense.kernel"],
    "down_bias": ["_feedforward_output_dense.bias"],
}


def named_variables(model) -> dict:
    """Return a GPTModel's variables by the names that Hugging Face gives them.

    Args:
        model: A `GPTModel`.

    Returns:
        A dict of name, without the prefix `transformer.`, to variable.
    """
    embedding = model.get_layer("embedding")
    norm = model.get_layer("final_norm")
    named = {
        "wte.weight": embedding.token_table,
        "wpe.weight": embedding.position_table,
        "ln_f.weight": norm.gamma,
        "ln_f.bias": norm.beta,
    }
    for index in range(model.num_layers):
        block = model.get_layer(f"block_{index}")
        for ours, theirs in _HUGGINGFACE_BLOCK.items():
            named[f"h.{index}.{theirs}"] = getattr(block, ours)
    if not model.tie_embeddings:
        named["lm_head.weight"] = model.get_layer("head").kernel
    return named


def to_huggingface(
    model: "GPTModel", folder: str | os.PathLike, tokenizer: Tokenizer | None = None
) -> None:
    """Write a GPTModel as Hugging Face's GPT-2, whole or not at all.

    Args:
        model: A `GPTModel` whose heads divide its width.
        folder: A new folder for `config.json`, `generation_config.json` and
            `model.safetensors`.
        tokenizer: The model's tokenizer, for `tokenizer.json`, `tokenizer_config.json`
            and `special_tokens_map.json`. Its end of text is then the token that ends
            a text, and begins one. None: no token does, whatever GPT-2's own is.

    Raises:
        InputError: The model has a shape that GPT-2 does not, the tokenizer has more
            tokens than it, or the folder exists.

    Example:
        >>> to_huggingface(model, "my-gpt", tokenizer)
        >>> transformers.pipeline("text-generation", "my-gpt")("The ")
    """
    refuse_writing(model.get_config())
    if model.embedding_dim % model.num_heads:
        raise InputError(
            "Hugging Face's GPT-2 expects `num_heads` to divide `embedding_dim`. "
            f"Received: {model.num_heads} and {model.embedding_dim}. Such a model can "
            "only be saved with `model.save`; train one whose heads divide its width."
        )
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
        raise InputError(
            f"`tokenizer` expects at most the model's {model.vocab_size} tokens. "
            f"Received: {tokenizer.vocab_size}. Take the one it was trained with."
        )
    # Left out, they would be GPT-2's own 50256.
    end = None if tokenizer is None else tokenizer.end_of_text_id
    special_ids = {"bos_token_id": end, "eos_token_id": end}
    unknown = ids_without_token(tokenizer, model.vocab_size).tolist()
    unknown = {"suppress_tokens": unknown} if unknown else {}
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": model.vocab_size,
        "n_embd": model.embedding_dim,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_positions": model.context_length,
        "n_ctx": model.context_length,
        "n_inner": model.feedforward_dim,
        "layer_norm_epsilon": model.layer_norm_epsilon,
        "tie_word_embeddings": model.tie_embeddings,
        "attn_pdrop": 0.0,
        "embd_pdrop": model.dropout,
        "resid_pdrop": model.dropout,
        **special_ids,
    }
    tensors = {}
    for name, variable in named_variables(model).items():
        prefix = "" if name.startswith("lm_head") else "transformer."
        tensors[prefix + name] = np.ascontiguousarray(variable.numpy())
    with artifacts.atomic_folder(folder) as temporary:
        artifacts.write_json(temporary / "config.json", config)
        generation = {**special_ids, **unknown}
        artifacts.write_json(temporary / "generation_config.json", generation)
        if tokenizer is not None:
            _write_tokenizer(tokenizer, model.context_length, temporary)
        safetensors.numpy.save_file(
            tensors, temporary / "model.safetensors", metadata={"format": "pt"}
        )


def _write_tokenizer(tokenizer, context_length, folder):
    tokenizer.save(folder)
    special, template = {}, tokenizer.chat_template
    if tokenizer.end_of_text_id is not None:
        special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    chat = {} if template is None else template.to_config()
    special |= {} if template is None else template.special_tokens
    artifacts.write_json(folder / "special_tokens_map.json", special)
    artifacts.write_json(
        folder / "tokenizer_config.json",
        {
            # The class that takes tokenizer.json as it stands, of whatever kind.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": context_length,
            "clean_up_tokenization_spaces": False,
            **special,
            **chat,
        },
    )


def to_keras_hub(model: "GPTModel"):
    """Copy a GPTModel into a new KerasHub `GPT2Backbone`.

    Raises:
        InputError: The model is not tied, its heads do not divide its width, or its
            `layer_norm_epsilon` is not the one that KerasHub has built in, 1e-5.
    """
    refuse_writing(model.get_config())
    if (
        not model.tie_embeddings
        or model.embedding_dim % model.num_heads
        or not math.isclose(model.layer_norm_epsilon, 1e-5)
    ):
        raise InputError(
            "KerasHub's GPT2Backbone expects tied embeddings, heads that divide the "
            "width and a layer_norm_epsilon of 1e-5. "
            f"Received: tie_embeddings={model.tie_embeddings}, "
            f"num_heads={model.num_heads}, embedding_dim={model.embedding_dim}, "
            f"layer_norm_epsilon={model.layer_norm_epsilon}. "
            "`to_huggingface` writes an untied head and any epsilon."
        )
    import keras_nlp

    backbone = keras_nlp.models.GPT2Backbone(
        vocabulary_size=model.vocab_size,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        hidden_dim=model.embedding_dim,
        intermediate_dim=model.feedforward_dim,
        dropout=model.dropout,
        max_sequence_length=model.context_length,
    )
    for ours, theirs in _keras_hub_pairs(model, backbone):
        whole = ours.numpy().reshape(_as_rows(ours.shape))
        parts = np.split(whole, len(theirs), axis=1)
        for variable, part in zip(theirs, parts, strict=True):
            variable.assign(part.reshape(variable.shape))
    return backbone


def _keras_hub_pairs(model, backbone):
    """Yield our variables, and KerasHub's: one, or query, key and value apart."""
    places = [(name, paths, backbone) for name, paths in KERAS_HUB_TOP.items()]
    for index, layer in enumerate(backbone.transformer_layers):
        for name, paths in KERAS_HUB_BLOCK.items():
            places.append((f"block_{index}/{name}", paths, layer))
    for name, paths, holder in places:
        layer, weight = name.split("/")
        ours = getattr(model.get_layer(layer), weight)
        yield ours, [operator.attrgetter(path)(holder) for path in paths]


def _as_rows(shape):
    """Return the shape in which parts of a kernel or a bias stand side by side."""
    return (shape[0] if len(shape) == 2 else 1, -1)
