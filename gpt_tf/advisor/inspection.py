"""What a GPT is, before it is opened: what it needs, and what can be done with it.

Configuration and shapes are read, no weights. What cannot be done is decided by the
functions that refuse it later, and said in their words.
"""

import os
import shlex
from pathlib import Path

import psutil

from gpt_tf import formatting
from gpt_tf.advisor.estimate import check_mode, file_of, size_of, sizes_of
from gpt_tf.errors import InputError
from gpt_tf.export.signatures import MODES
from gpt_tf.export.types import refuse_large
from gpt_tf.models import sizes
from gpt_tf.pretrained.source import describe, is_foreign
from gpt_tf.text.tokenizer import load_tokenizer

# Above it, a cache of the whole context is larger than most devices' memory.
_LONG_CONTEXT = 4096
_SHORTENED = 2048


def inspect_source(source: str | os.PathLike) -> dict:
    """Describe a GPT, whatever it is in; no weight is read.

    Args:
        source: As for `gpt_tf.open_model`, or a `.tflite` or `.litertlm` of gpt_tf's.

    Returns:
        `source`, `format`, `family` (None of a model of gpt_tf's whose form is not
        GPT-2's), `config`, `parameters`, `tokenizer` (`kind` and `vocab_size`, or
        None), `stored_types`, `size_bytes` on disk, `memory_bytes` that `open`, in
        float32, and `train` take, and this machine's `total`; `uses`, each with
        `what`, `is_possible` and `why` not; and the command to `begin` with.

    Raises:
        InputError: There is no such model, or its family or form is unknown.
        DamagedFileError: A file is not what it should be.

    Example:
        >>> inspect_source("gpt2/")["parameters"]
    """
    found = _foreign(source) if is_foreign(source) else _own(Path(source))
    config, tokenizer = sizes_of(found["config"]), found["tokenizer"]
    count = sizes.count_parameters(config)
    is_file = "mode" in found
    uses = _of_file(tokenizer) if is_file else _of_model(config, tokenizer)
    return {
        "source": str(source),
        **found,
        "config": found["config"].get("gpt", found["config"]),
        "parameters": count,
        "tokenizer": tokenizer
        and {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size},
        "memory_bytes": {
            "open": found["size_bytes"] if is_file else count * sizes.WEIGHT_BYTES,
            "train": None if is_file else count * sizes.TRAINED_WEIGHT_BYTES,
            "total": psutil.virtual_memory().total,
        },
        "uses": [
            {"what": what, "is_possible": why is None, "why": why}
            for what, why in uses.items()
        ],
        "begin": _first_command(str(source), config, tokenizer, is_file),
    }


def _foreign(source):
    form, found = describe(source)
    return {
        "format": form,
        "family": found.family.name,
        "config": found.check(),
        "tokenizer": found.read_tokenizer(),
        "stored_types": sorted({t.dtype for t in found.tensors.values()}),
        "size_bytes": sum(file.stat().st_size for file in found.files),
    }


def _own(path):
    file = file_of(path)
    if file.suffix == ".keras":
        from gpt_tf.models.keras_file import read_config

        config = read_config(file)
        has_tokenizer = (file.parent / "tokenizer.json").is_file()
        found = {
            "format": "keras_qat" if "gpt" in config else "keras",
            "config": config,
            "tokenizer": load_tokenizer(file.parent) if has_tokenizer else None,
            "stored_types": ["float32"],
        }
    else:
        from gpt_tf.edge.loader import open_artefact

        artefact = open_artefact(file)
        mode = artefact.facts["mode"]
        found = {
            "format": file.suffix.lstrip(".") or "tflite",
            "mode": mode,
            "config": artefact.facts["config"]
            | {"context_length": artefact.facts["capacity"]},
            "tokenizer": artefact.tokenizer,
            "stored_types": [mode],
        }
    has_form = sizes.stated_form(sizes_of(found["config"]))
    family = None if has_form else "gpt2"
    return {**found, "family": family, "size_bytes": file.stat().st_size}


# What can be done, each with None or why not


def _of_file(tokenizer):
    return {
        "run on a device (EdgeGPT), benchmark": None,
        "generate, evaluate, explain": _lack_of(tokenizer),
        "chat": _lack_of_template(tokenizer),
        "train, distil, quantise, export": "An exported file has the numbers of its "
        "mode. Take the model that it was exported from.",
    }


def _of_model(config, tokenizer):
    def mode_of(mode):
        check_mode(config, mode)
        refuse_large(size_of(config, mode, "tflite"))

    return {
        "open": _refusal(sizes.check_memory, config),
        "generate, evaluate, explain": _lack_of(tokenizer),
        "chat": _lack_of_template(tokenizer),
        "train, distil, quantise": _refusal(
            sizes.check_memory, config, sizes.TRAINED_WEIGHT_BYTES
        ),
        "train on a mesh": _refusal(sizes.refuse_mesh, config),
        "write for transformers or KerasHub": _refusal(sizes.refuse_writing, config),
        "export .litertlm": _lack_of(tokenizer),
        **{f"export {mode}": _refusal(mode_of, mode) for mode in MODES},
    }


def _lack_of(tokenizer):
    if tokenizer is None:
        return "There is no tokenizer. Put its tokenizer.json with the model."
    return None


def _lack_of_template(tokenizer):
    if getattr(tokenizer, "chat_template", None) is None:
        return "It has no chat template. Name one: gpt-tf chat --template FILE."
    return None


def _refusal(check, *arguments):
    try:
        check(*arguments)
    except InputError as error:
        return str(error)
    return None


def _first_command(source, config, tokenizer, is_file):
    name = shlex.quote(source)
    if is_file:
        if tokenizer is None:
            return f"gpt-tf benchmark {name}"
        return f"gpt-tf generate --model {name}"
    suffix = ".tflite" if tokenizer is None else ".litertlm"
    out = shlex.quote((Path(source).stem or "gpt") + suffix)
    is_long = config["context_length"] > _LONG_CONTEXT
    length = f" --context-length {_SHORTENED}" if is_long else ""
    return f"gpt-tf export --model {name} --mode dynamic_int8{length} --out {out}"


def print_inspection(found: dict) -> None:
    """Print what `inspect_source` returned, as two tables and the command."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    facts = Table(box=None, show_header=False, pad_edge=False)
    for name, text in _facts(found):
        facts.add_row(name, Text(text))  # none of it is rich's markup
    console.print(facts)
    uses = Table("what", "", "why not", box=box.SIMPLE_HEAD, pad_edge=False)
    for use in found["uses"]:
        answer = "yes" if use["is_possible"] else "no"
        uses.add_row(use["what"], answer, Text(use["why"] or ""))
    console.print(uses)
    console.print(Text(f"begin with: {found['begin']}"), soft_wrap=True)


def _facts(found):
    config, memory = sizes_of(found["config"]), found["memory_bytes"]
    tokenizer, stored = found["tokenizer"], ", ".join(found["stored_types"])
    form = sizes.stated_form(config)
    megabytes = formatting.megabytes
    yield "source", found["source"]
    yield "format", found["format"] + (f", {stored}" if stored else "")
    yield "family", found["family"] or "of its own form"
    if form:
        yield "form", ", ".join(f"{name}={value!r}" for name, value in form.items())
    yield (
        "sizes",
        f"{config['num_layers']} layers, width {config['embedding_dim']}, "
        f"{config['num_heads']} heads, feed-forward {config['feedforward_dim']}, "
        f"context {config['context_length']:,}",
    )
    yield "parameters", f"{found['parameters']:,}"
    kind = "none" if tokenizer is None else tokenizer["kind"]
    ids = tokenizer and f", {tokenizer['vocab_size']:,} tokens"
    yield "tokenizer", f"{kind}{ids or ''}; the model has {config['vocab_size']:,}"
    yield "on disk", megabytes(found["size_bytes"])
    needed = f"{megabytes(memory['open'])} to open"
    if memory["train"]:
        needed += f", {megabytes(memory['train'])} and activations to train"
    yield "memory", f"{needed}; here are {megabytes(memory['total'])}"
