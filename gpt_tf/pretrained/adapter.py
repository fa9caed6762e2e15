"""Folders of LoRA adapters in the form of the library PEFT, read and written.

Beside the weight of each layer of PyTorch's, PEFT keeps `lora_A (r, inputs)` and
`lora_B (outputs, r)`. Where several layers make up a kernel of ours, ours have `A` in
common.

Reference: https://huggingface.co/docs/peft, "Checkpoint format".
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from gpt_tf import artifacts
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.models.sizes import weight_shapes
from gpt_tf.pretrained.build import variables_of
from gpt_tf.pretrained.families import FAMILIES, Family, regrouped
from gpt_tf.pretrained.tensors import read_safetensors
from gpt_tf.pretrained.torch_file import read_checkpoint

if TYPE_CHECKING:
    from gpt_tf.models.gpt import GPTModel

CONFIG = "adapter_config.json"
_WEIGHTS, _PICKLED = "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_FINGERPRINT = "gpt_tf_base_sha256"
# Fields that make an adapter something else than `scale * B A`.
_OTHERS = (
    *("use_dora", "lora_bias", "use_qalora", "rank_pattern", "alpha_pattern"),
    *("modules_to_save", "layer_replication", "trainable_token_indices"),
    *("target_parameters", "alora_invocation_tokens", "megatron_config"),
)


class _Part(NamedTuple):
    """A layer of PyTorch's whose weight is in a kernel of ours."""

    module: str
    kernel: str
    columns: slice
    is_transposed: bool
    heads_first: bool


def add_adapter(model: "GPTModel", folder: Path) -> None:
    """Add an adapter to the weights of the model that it was trained on.

    Args:
        model: A `GPTModel` of the adapter's base; it is changed.
        folder: Of PEFT's, with `adapter_config.json` and the adapter's weights.

    Raises:
        InputError: It is no LoRA adapter of the blocks' products, or is one of another
            base. The model is then as it was.
        DamagedFileError: A file is not what it should be.
    """
    config = read_config(folder)
    rank, scale = config["r"], config["lora_alpha"] / config["r"]
    if config.get("use_rslora"):
        scale *= rank**0.5
    tensors, fingerprint = _weights_of(folder)
    if fingerprint not in (None, fingerprint_of(model)):
        raise InputError(
            f"The adapter in {folder} expects the model that it was trained on, "
            f"{config.get('base_model_name_or_path')}. Received: one with other "
            "weights. Name that one."
        )
    sizes = model.get_config()
    shapes, found = weight_shapes(sizes), []
    for part in _parts(sizes):
        names = [f"{_PREFIX}{part.module}.lora_{m}.weight" for m in "AB"]
        if not any(name in tensors for name in names):
            continue
        rows, _ = shapes[part.kernel]
        outputs = part.columns.stop - part.columns.start
        for name, shape in zip(names, ((rank, rows), (outputs, rank)), strict=True):
            received = tensors[name].shape if name in tensors else "no such tensor"
            if received != shape:
                raise InputError(
                    f"{folder} expects a base of the adapter's sizes: {name} of the "
                    f"shape {shape}. Received: {received}. Name the model that it was "
                    "trained on."
                )
        found.append((part, *(tensors.pop(name) for name in names)))
    if tensors or not found:
        raise InputError(
            f"{folder} expects adapters of the projections of the model's "
            f"{sizes['num_layers']} blocks. Received: "
            f"{next(iter(tensors), 'none')}. Name the model that it was trained on, "
            "or merge the adapter with PEFT's `merge_and_unload`."
        )
    variables = variables_of(model)
    for part, a, b in found:
        delta = scale * (b.read() @ a.read())  # (outputs, inputs)
        if part.heads_first:
            delta = regrouped(delta, sizes["num_heads"], 3)
        value = variables[part.kernel].numpy()
        value[:, part.columns] += delta.T.astype(value.dtype)
        variables[part.kernel].assign(value)


def write_adapter(
    folder: Path,
    sizes: dict,
    adapters: dict[str, tuple[np.ndarray, np.ndarray]],
    *,
    alpha: float,
    base: str,
    fingerprint: str,
) -> None:
    """Write an adapter for PEFT, in place of an old folder.

    Args:
        folder: Where to.
        sizes: The base's configuration, as of `GPTModel.get_config`.
        adapters: `A (inputs, r)` and `B (r, outputs)` by the names of kernels.
        alpha: The product of the two counts `alpha / r` times.
        base: The base's name or path, for those who load it.
        fingerprint: The base's, of `fingerprint_of`.
    """
    tensors, targets, parts = {}, set(), _parts(sizes)
    for part in parts:
        a, b = adapters[part.kernel]
        theirs = b[:, part.columns].T  # (outputs, r)
        if part.heads_first:
            theirs = regrouped(theirs, 3, sizes["num_heads"])
        name = f"{_PREFIX}{part.module}.lora_"
        tensors[f"{name}A.weight"] = np.ascontiguousarray(a.T)
        tensors[f"{name}B.weight"] = np.ascontiguousarray(theirs)
        targets.add(part.module.rpartition(".")[2])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": a.shape[1],
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(targets),
        "fan_in_fan_out": not parts[0].is_transposed,
        "bias": "none",
        "inference_mode": True,
    }
    about = {"format": "pt", _FINGERPRINT: fingerprint}
    with artifacts.atomic_folder(folder, replace=True) as temporary:
        # Not by `save_file`, whose file nobody else may read.
        data = safetensors.numpy.save(tensors, about)
        (temporary / _WEIGHTS).write_bytes(data)
        artifacts.write_json(temporary / CONFIG, config)


def read_config(folder: Path) -> dict:
    """Return the configuration of an adapter, checked to be a plain LoRA's.

    Raises:
        InputError: It is another kind of adapter.
        DamagedFileError: It is no configuration of an adapter.
    """
    shape = {
        "peft_type": str,
        "base_model_name_or_path?": (str, None),
        "r": int,
        "lora_alpha": float,
    }
    config = artifacts.read_json(Path(folder) / CONFIG, shape)
    if config["peft_type"] != "LORA" or config["r"] < 1:
        received = f"peft_type={config['peft_type']!r}, r={config['r']}"
        raise InputError(f"{folder} expects a LoRA adapter. Received: {received}.")
    others = [name for name in _OTHERS if config.get(name)]
    if config.get("bias", "none") != "none":
        others.append("bias")
    if others:
        raise InputError(
            f"{folder} expects a plain LoRA adapter. Received: one with `{others[0]}`. "
            "Merge it with PEFT's `merge_and_unload`, and open the result."
        )
    return config


def fingerprint_of(model: "GPTModel") -> str:
    """Return a SHA-256 over a model's weights, by which an adapter knows its base."""
    digest = hashlib.sha256()
    for variable in variables_of(model).values():
        digest.update(np.ascontiguousarray(variable.numpy()))
    return digest.hexdigest()


def family_of_form(config: dict) -> Family:
    """Return the family that a model of a configuration is of, for names of weights."""
    if config.get("norm", "layer") == "rms":
        has_bias = config.get("biases", "all") == "qkv"
        plain = "qwen2" if has_bias else "llama"
        return FAMILIES["qwen3" if config.get("query_key_norm") else plain]
    if config.get("positions", "learned") == "rotary":
        return FAMILIES["gpt_neox"]
    return FAMILIES["opt" if config.get("activation") == "relu" else "gpt2"]


def _weights_of(folder):
    """Return an adapter's tensors, and the fingerprint of its base or None."""
    path = Path(folder) / _WEIGHTS
    if path.is_file():
        tensors = read_safetensors(path)
        with safetensors.safe_open(path, framework="np") as file:
            return tensors, (file.metadata() or {}).get(_FINGERPRINT)
    if (Path(folder) / _PICKLED).is_file():
        return read_checkpoint(Path(folder) / _PICKLED), None
    raise DamagedFileError(f"The adapter in {folder} lacks its file {_WEIGHTS}.")


def _parts(sizes) -> list[_Part]:
    """Return the layers that a family has for our kernels, of all blocks."""
    family, found = family_of_form(sizes), []
    for kernel, shape in weight_shapes(sizes).items():
        if not kernel.endswith("_kernel"):
            continue
        weight, total = family.place_of(kernel), shape[1]
        inner = total // len(weight.names)  # the gate and what it gates, or the whole
        if kernel.endswith("qkv_kernel") and len(weight.names) == 3:
            inner = weight_shapes(sizes)[kernel.replace("qkv", "output")][0]
        stops = [inner, (inner + total) // 2, total][: len(weight.names) - 1] + [total]
        starts = [0, *stops[:-1]]
        for name, start, stop in zip(weight.names, starts, stops, strict=True):
            module = family.prefix + name.removesuffix(".weight")
            columns = slice(start, stop)
            found.append(
                _Part(module, kernel, columns, weight.is_transposed, weight.heads_first)
            )
    return found
