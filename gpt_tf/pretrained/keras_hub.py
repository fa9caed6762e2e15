"""KerasHub's GPT-2 and Llama: presets, by folder or by name, and objects.

KerasHub is Keras 3: only NumPy arrays cross. What an object is becomes Hugging Face's
configuration, so that a family's limits are stated once.
"""

import dataclasses
import functools
import math
import tempfile
from pathlib import Path

import numpy as np

from gpt_tf import artifacts
from gpt_tf.errors import DamagedFileError, InputError, InputTypeError
from gpt_tf.models.interop import KERAS_HUB_BLOCK, KERAS_HUB_TOP
from gpt_tf.models.sizes import weight_shapes
from gpt_tf.pretrained.build import Description, config_of
from gpt_tf.pretrained.families import FAMILIES, Weight
from gpt_tf.pretrained.tensors import Tensor, as_float32
from gpt_tf.text.tokenizer import BPETokenizer

# KerasHub's name of a field -> Hugging Face's, of each family.
_FIELDS = {
    "gpt2": {
        "vocabulary_size": "vocab_size",
        "hidden_dim": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "max_sequence_length": "n_positions",
        "intermediate_dim": "n_inner",
    },
    "llama": {
        "vocabulary_size": "vocab_size",
        "hidden_dim": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_query_heads": "num_attention_heads",
        "num_key_value_heads": "num_key_value_heads",
        "intermediate_dim": "intermediate_size",
        "rope_max_wavelength": "rope_theta",
        "layer_norm_epsilon": "rms_norm_eps",
        "tie_word_embeddings": "tie_word_embeddings",
    },
}
_SCALING = {
    "rope_frequency_adjustment_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_pretraining_sequence_length": "original_max_position_embeddings",
}
# A Llama of KerasHub's states no context; its preprocessor cuts texts here.
_LLAMA_CONTEXT = 1024


def _weights(names):
    return {ours: Weight(tuple(theirs)) for ours, theirs in names.items()}


_ATTENTION = "_self_attention_layer._{}_dense.kernel".format
_REVERSED = "token_embedding.reverse_embeddings"
_FEEDFORWARD = "_feedforward_{}_dense.kernel".format
_PARTS = {
    "gpt2": (_weights(KERAS_HUB_TOP), _weights(KERAS_HUB_BLOCK)),
    "llama": (
        {
            "embedding/token_table": Weight(("token_embedding.embeddings",)),
            "final_norm/gamma": Weight(("layer_norm.scale",)),
            "head/kernel": Weight((_REVERSED,), is_transposed=True),
        },
        _weights(
            {
                "attention_norm_gamma": ["_self_attention_layernorm.scale"],
                "qkv_kernel": map(_ATTENTION, ("query", "key", "value")),
                "output_kernel": [_ATTENTION("output")],
                "feedforward_norm_gamma": ["_feedforward_layernorm.scale"],
                "up_kernel": map(_FEEDFORWARD, ("gate", "intermediate")),
                "down_kernel": [_FEEDFORWARD("output")],
            }
        ),
    ),
}
_FAMILIES = {
    name: dataclasses.replace(
        FAMILIES[name], prefix="", top=top, block="transformer_layers.{}.", parts=block
    )
    for name, (top, block) in _PARTS.items()
}
_BACKBONES = {
    "GPT2Backbone": "gpt2",
    "LlamaBackbone": "llama",
    "Llama3Backbone": "llama",
}
_PIECES = "Backbone CausalLM CausalLMPreprocessor Preprocessor Tokenizer".split()
_CLASSES = {
    "DTypePolicy",
    *(kind + part for kind in ("GPT2", "Llama", "Llama3") for part in _PIECES),
}
_MODULES = {"", "keras", "keras_hub", "keras_nlp"}
_FLOATS = ("float32", "float16", "bfloat16", "float64")
# What is fetched of a preset: what KerasHub itself reads, and so has in its cache.
_FILES = ("config.json", "model.weights.h5")
_TOKENIZER_FILES = tuple(
    f"assets/tokenizer/{name}" for name in ("vocabulary.json", "merges.txt")
)


def describe(folder: Path) -> Description:
    """Describe a preset's folder, without KerasHub.

    Raises:
        InputError: The preset is of another model than GPT-2 or Llama.
        DamagedFileError: It names classes that these do not consist of.
    """
    config = artifacts.read_json(folder / "config.json")
    for name in ("config.json", "tokenizer.json", "metadata.json"):
        if (folder / name).is_file():
            _check_classes(artifacts.read_json(folder / name), folder / name)
    kind = config.get("class_name") if isinstance(config, dict) else None
    kind = str(kind).replace("CausalLM", "Backbone")
    if kind not in _BACKBONES:
        raise InputError(
            f"{folder} expects a preset of {', '.join(_BACKBONES)}. Received: "
            f"{kind!r}. Other families are opened from Hugging Face's folders."
        )
    config = config.get("config") or {}
    config = (config.get("backbone") or {}).get("config", config)
    family = _FAMILIES[_BACKBONES[kind]]
    arguments = _arguments(family, config.get)
    return Description(
        family,
        arguments,
        {},
        (folder / "model.weights.h5",),
        lambda: _tokenizer(folder / "assets" / "tokenizer"),
        lambda changes: describe_object(_load(kind, folder)).open(
            {**arguments, **changes}
        ),
    )


def describe_object(model) -> Description:
    """Describe a model of KerasHub's, whose weights are copied.

    Args:
        model: A `GPT2CausalLM` or `LlamaCausalLM`, or the backbone of one.

    Raises:
        InputTypeError: It is something else.
        InputError: Its weights are no floats, or it has a form that is unknown.
    """
    backbone = getattr(model, "backbone", model)
    kinds = [kind.__name__ for kind in type(backbone).__mro__]
    name = next((_BACKBONES[kind] for kind in kinds if kind in _BACKBONES), None)
    if name is None:
        kind = type(model)
        raise InputTypeError(
            "Expected a path, or a GPT2CausalLM or LlamaCausalLM of KerasHub or its "
            f"backbone. Received: {kind.__module__}.{kind.__name__}."
        )
    family, preprocessor = _FAMILIES[name], getattr(model, "preprocessor", None)
    arguments = _arguments(
        family,
        lambda field: getattr(backbone, field, None),
        getattr(preprocessor, "sequence_length", None) or _LLAMA_CONTEXT,
    )
    tensors = {
        path: _tensor(backbone, path, shape)
        for weight, shape in weight_shapes(config_of(arguments)).items()
        for path in family.place_of(weight).names
    }
    return Description(
        family, arguments, tensors, (), lambda: _tokenizer_of(preprocessor)
    )


def _arguments(family, field_of, context=_LLAMA_CONTEXT):
    """Return `GPTModel`'s arguments, given the function that returns a field."""
    config = {theirs: field_of(name) for name, theirs in _FIELDS[family.name].items()}
    scaling = {theirs: field_of(name) for name, theirs in _SCALING.items()}
    if scaling["factor"] is not None:
        config["rope_scaling"] = {"rope_type": "llama3", **scaling}
    if field_of("rope_position_scaling_factor") not in (None, 1):
        config["rope_scaling"] = {"rope_type": "linear"}
    config |= {"model_type": family.name, "max_position_embeddings": context}
    return family.arguments(config)


def _tensor(backbone, path, shape):
    """Return a variable of KerasHub's, whose heads have no axis of their own."""
    variable = backbone
    for part in path.split("."):
        is_number = part.isdigit()
        variable = variable[int(part)] if is_number else getattr(variable, part)
    dtype = getattr(variable.dtype, "name", variable.dtype)
    if dtype not in _FLOATS:
        raise InputError(
            f"A model of KerasHub's expects weights in {', '.join(_FLOATS)}. Received: "
            f"{dtype}, of {path}. Open it before it is quantised."
        )
    axes, size = tuple(variable.shape), math.prod(variable.shape)
    if len(shape) == 1:
        axes = (size,)
    elif len(axes) == 3:
        axes = (shape[0], size // shape[0])

    def read():
        return as_float32(np.asarray(variable)).reshape(axes)

    return Tensor(axes, read, dtype)


def _load(kind, folder):
    import keras_nlp

    try:
        return getattr(keras_nlp.models, kind).from_preset(str(folder))
    except Exception as error:  # of the library, which is given anything
        raise DamagedFileError(
            f"{folder} cannot be read as a preset of KerasHub: {_line_of(error)} "
            "Save it anew with `save_to_preset`."
        ) from None


def _tokenizer(folder):
    """Return GPT-2's tokenizer, of a preset's files; Llama's are SentencePiece's."""
    files = folder / "vocabulary.json", folder / "merges.txt"
    is_there = all(file.is_file() for file in files)
    return BPETokenizer.from_gpt2_files(*files) if is_there else None


def _tokenizer_of(preprocessor):
    tokenizer = getattr(preprocessor, "tokenizer", None)
    if type(tokenizer).__name__ != "GPT2Tokenizer":
        return None
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_assets(folder)
        return _tokenizer(Path(folder))


def _line_of(error):
    return (str(error) or type(error).__name__).splitlines()[0]


@functools.cache
def folder_of(name: str) -> Path:
    """Return the folder of a preset that has a name, from KerasHub's cache or fetched.

    Raises:
        InputError: There is no such preset, or no network to fetch it over.
    """
    import kagglehub
    import keras_nlp

    try:
        handle = keras_nlp.models.Backbone.presets[name]["kaggle_handle"]
        handle = handle.removeprefix("kaggle://")
        files = _FILES + _TOKENIZER_FILES * name.startswith("gpt2")
        for file in files:
            place = kagglehub.model_download(handle, file)
        return Path(place.removesuffix(file))
    except Exception as error:  # of the libraries and of the network under them
        raise InputError(
            f"The preset {name!r} could not be fetched: {_line_of(error)} A named "
            "preset is downloaded once and needs a network; without one, name a folder "
            "that KerasHub's `save_to_preset` wrote."
        ) from None


def _check_classes(value, file):
    """Refuse classes that are no part of these models: KerasHub would call them."""
    if isinstance(value, dict):
        names = [value.get(key) for key in ("class_name", "registered_name", "module")]
        own, registered, module = (str(name or "") for name in names)
        is_known = own in _CLASSES and registered.rpartition(">")[2] in ("", own)
        if any(names) and not (is_known and module.partition(".")[0] in _MODULES):
            raise DamagedFileError(
                f"{file} expects the classes of a GPT-2 or Llama. Received: {names}. "
                "Nothing of it was called."
            )
    for part in value.values() if isinstance(value, dict) else ():
        _check_classes(part, file)
    for part in value if isinstance(value, list) else ():
        _check_classes(part, file)
