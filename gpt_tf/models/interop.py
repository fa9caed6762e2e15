"""GPT-2 weights of KerasHub and Hugging Face, both ways.

KerasHub is Keras 3: only NumPy arrays cross. Hugging Face's files are read and
written directly, `config.json`, `model.safetensors` and those of the tokenizer; pickles
are never opened.
"""

import math
import operator
import os
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy

from gpt_tf import artifacts
from gpt_tf.errors import DamagedFileError, InputError, InputTypeError
from gpt_tf.generation.sequence import ids_without_token
from gpt_tf.models.gpt import GPTModel
from gpt_tf.models.keras_file import can_hold
from gpt_tf.models.sizes import refuse_writing
from gpt_tf.text.tokenizer import END_OF_TEXT, BPETokenizer, Tokenizer

_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")

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
# Our weight of a block -> KerasHub's, which has query, key and value apart.
_KERAS_HUB_BLOCK = {
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


def from_huggingface(folder: str | os.PathLike, **changes) -> GPTModel:
    """Build a GPT-2 from Hugging Face's files.

    Args:
        folder: Holds `config.json` and `model.safetensors`.
        **changes: Arguments of `GPTModel` to replace, `dropout` for example.

    Returns:
        A `GPTModel` with these weights.

    Raises:
        InputError: A file is missing, or the configuration is not plain GPT-2.
        DamagedFileError: A tensor is missing or has another shape.

    Example:
        >>> model = from_huggingface("gpt2")
    """
    folder = Path(folder)
    sizes = _read_config(folder)
    path = folder / "model.safetensors"
    tensors = _read_tensors(path)
    held = sum(tensor.nbytes for tensor in tensors.values())
    if not can_hold(sizes, held, len(tensors) // len(_HUGGINGFACE_BLOCK)):
        raise DamagedFileError(
            f"{path} expects the weights of {sizes}, as config.json states. Received: "
            f"{held} bytes in {len(tensors)} tensors. Fetch the file anew, or correct "
            "config.json."
        )
    model = GPTModel(**{**sizes, **changes})
    for name, variable in named_variables(model).items():
        if name not in tensors:
            raise DamagedFileError(
                f"{path} lacks the tensor {name!r}, which a GPT-2 of "
                f"{model.num_layers} layers has. Fetch the file anew, or correct "
                "config.json."
            )
        value = tensors[name]
        if value.shape != tuple(variable.shape):
            raise DamagedFileError(
                f"{path}: {name!r} expects the shape {tuple(variable.shape)}. "
                f"Received: {value.shape}. config.json, or an argument that replaces "
                "a part of it, does not fit the file."
            )
        variable.assign(np.asarray(value, np.float32))
    return model


def to_huggingface(
    model: GPTModel, folder: str | os.PathLike, tokenizer: Tokenizer | None = None
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


def from_preset(preset: str, **changes) -> GPTModel:
    """Build a GPT-2 from a KerasHub preset, weights included.

    Args:
        preset: A name such as `"gpt2_base_en"`, which is downloaded, or the path of
            a preset that KerasHub saved.
        **changes: Arguments of `GPTModel` to replace.

    Raises:
        InputError: There is no such preset, or no network to fetch it over.
    """
    return from_keras_hub(_load_preset("GPT2Backbone", preset), **changes)


def tokenizer_from_preset(preset: str) -> BPETokenizer:
    """Read the tokenizer that belongs to a KerasHub preset of GPT-2.

    Args:
        preset: As for `from_preset`.

    Raises:
        InputError: There is no such preset, or no network to fetch it over.

    Example:
        >>> model = from_preset("gpt2_base_en")
        >>> tokenizer = tokenizer_from_preset("gpt2_base_en")
        >>> generate(model, "A GPT is", tokenizer=tokenizer, max_new_tokens=20)
    """
    theirs = _load_preset("GPT2Tokenizer", preset)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_assets(folder)
        vocabulary, merges = Path(folder, "vocabulary.json"), Path(folder, "merges.txt")
        return BPETokenizer.from_gpt2_files(vocabulary, merges)


def _load_preset(kind, preset):
    import keras_nlp

    try:
        return getattr(keras_nlp.models, kind).from_preset(preset)
    except Exception as error:
        raise InputError(
            f"The preset {preset!r} could not be loaded: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__} "
            "A named preset is downloaded and needs a network; without one, name a "
            "folder that KerasHub's `save_to_preset` wrote."
        ) from None


def from_keras_hub(backbone, **changes) -> GPTModel:
    """Copy a KerasHub `GPT2Backbone` into a GPTModel.

    Args:
        backbone: The backbone, or the `GPT2CausalLM` around it; its vocabulary head is
            its token embedding.
        **changes: Arguments of `GPTModel` to replace.

    Raises:
        InputTypeError: It is neither.

    Example:
        >>> model = from_keras_hub(keras_hub.models.GPT2CausalLM.from_preset(path))
    """
    received = type(backbone)
    backbone = getattr(backbone, "backbone", backbone)
    if "GPT2Backbone" not in {kind.__name__ for kind in type(backbone).__mro__}:
        raise InputTypeError(
            "`from_keras_hub` expects a GPT2Backbone or GPT2CausalLM of KerasHub. "
            f"Received: {received.__module__}.{received.__name__}."
        )
    model = GPTModel(
        **{
            "vocab_size": backbone.vocabulary_size,
            "embedding_dim": backbone.hidden_dim,
            "num_layers": backbone.num_layers,
            "num_heads": backbone.num_heads,
            "context_length": backbone.max_sequence_length,
            "feedforward_dim": backbone.intermediate_dim,
            **changes,
        }
    )
    for ours, theirs in _keras_hub_pairs(model, backbone):
        parts = [np.asarray(part).reshape(_as_rows(ours.shape)) for part in theirs]
        whole = np.concatenate(parts, axis=1).astype(np.float32)
        ours.assign(whole.reshape(ours.shape))
    return model


def to_keras_hub(model: GPTModel):
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
    embedding, norm = model.get_layer("embedding"), model.get_layer("final_norm")
    yield embedding.token_table, [backbone.token_embedding.embeddings]
    positions = backbone.position_embedding.position_embeddings
    yield embedding.position_table, [positions]
    for index, theirs in enumerate(backbone.transformer_layers):
        block = model.get_layer(f"block_{index}")
        for ours, paths in _KERAS_HUB_BLOCK.items():
            found = [operator.attrgetter(path)(theirs) for path in paths]
            yield getattr(block, ours), found
    yield norm.gamma, [backbone.layer_norm.gamma]
    yield norm.beta, [backbone.layer_norm.beta]


def _as_rows(shape):
    """Return the shape in which parts of a kernel or a bias stand side by side."""
    return (shape[0] if len(shape) == 2 else 1, -1)


def _read_config(folder):
    """Return the arguments of the `GPTModel` that a folder's config.json is of."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"Expected Hugging Face's config.json in {folder}; there is none. Name "
            "the folder of a GPT-2 model."
        )
    try:
        config = artifacts.parse_json(path.read_text("utf-8"))
        width = config["n_embd"]
        sizes = {
            "vocab_size": config["vocab_size"],
            "embedding_dim": width,
            "num_layers": config["n_layer"],
            "num_heads": config["n_head"],
            "context_length": config.get("n_positions") or config.get("n_ctx") or 1024,
            "feedforward_dim": config.get("n_inner") or 4 * width,
        }
        if not all(type(size) is int and size > 0 for size in sizes.values()):
            raise ValueError(f"expects integers of at least 1, received {sizes}")
        epsilon = config.get("layer_norm_epsilon")
        sizes["layer_norm_epsilon"] = 1e-5 if epsilon is None else float(epsilon)
        tied = config.get("tie_word_embeddings")
        sizes["tie_embeddings"] = True if tied is None else bool(tied)
    except Exception as error:  # of the reading, or of what was read
        raise DamagedFileError(
            f"{path} is no configuration of a GPT-2: {type(error).__name__} {error}."
        ) from None
    expected = (
        ("model_type", None, ("gpt2",)),
        ("activation_function", "gelu_new", _TANH_GELU),
        ("scale_attn_weights", True, (True,)),
        ("scale_attn_by_inverse_layer_idx", False, (False,)),
        ("add_cross_attention", False, (False,)),
    )
    for name, default, known in expected:
        value = config.get(name, default)
        if value not in known:
            raise InputError(
                f"{path}: `{name}` expects one of {known}. Received: {value!r}. "
                "gpt_tf reads plain GPT-2 models."
            )
    return sizes


def _read_tensors(path):
    if not path.is_file():
        pickled = path.with_name("pytorch_model.bin").is_file()
        raise InputError(
            f"Expected model.safetensors in {path.parent}; there is none."
            + (
                " A pytorch_model.bin is a pickle, which can run code and is not "
                "opened; convert it with transformers' "
                "`save_pretrained(folder, safe_serialization=True)`."
                if pickled
                else ""
            )
        )
    tensors = read_safetensors(path)
    return {name.removeprefix("transformer."): t for name, t in tensors.items()}


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read the arrays of a safetensors file.

    Raises:
        DamagedFileError: It is none, or has arrays of a type that NumPy does not.
    """
    try:
        return safetensors.numpy.load_file(path)
    except Exception as error:  # safetensors' and NumPy's own
        raise DamagedFileError(f"{path} cannot be read: {error}.") from None
