"""The specification of a GPT: its sizes, their ranges, the weights that follow.

Here `GPTModel`'s arguments are checked, and layers, block and export find the names and
shapes of weights.
"""

import math

import psutil

from gpt_tf.errors import InputError
from gpt_tf.settings import arguments

# Deeper ones take minutes to build and are trained by nobody.
MOST_LAYERS = 1024
# A weight in float32; in training its gradient and two moments too.
WEIGHT_BYTES = 4
TRAINED_WEIGHT_BYTES = 16
SIZES = (
    "vocab_size",
    "embedding_dim",
    "num_layers",
    "num_heads",
    "context_length",
    "feedforward_dim",
)
# `GPTModel`'s arguments as a file has them.
TYPES = {
    **dict.fromkeys(SIZES, (int,)),
    "dropout": (int, float),
    "tie_embeddings": (bool,),
    "layer_norm_epsilon": (int, float),
    "name": (str,),
}
# What describes a normalisation to the layers that compute one, with defaults.
NORM = {"epsilon": 1e-5}


def checked_config(given: dict) -> dict:
    """Return `GPTModel`'s arguments, but for its name, as Python's own, or refuse them.

    Args:
        given: The arguments by name.

    Raises:
        InputError: One is out of its range.
    """
    number = arguments.number
    dropout, epsilon = given["dropout"], given["layer_norm_epsilon"]
    return {
        **checked_sizes({name: given[name] for name in SIZES}),
        "dropout": number("dropout", dropout, least=0, below=1),
        "tie_embeddings": arguments.switch("tie_embeddings", given["tie_embeddings"]),
        "layer_norm_epsilon": number("layer_norm_epsilon", epsilon, above=0),
    }


def checked_sizes(sizes: dict) -> dict[str, int]:
    """Return the sizes of a GPT as Python's integers, or refuse them.

    Args:
        sizes: `vocab_size`, `embedding_dim`, `num_layers`, `num_heads`,
            `context_length` and `feedforward_dim`, which may be None.

    Raises:
        InputError: One is no integer, or out of its range.
    """
    found = {
        name: arguments.integer(
            name,
            size,
            1,
            MOST_LAYERS if name == "num_layers" else arguments.LARGEST,
            or_none=name == "feedforward_dim",
        )
        for name, size in sizes.items()
    }
    if found["feedforward_dim"] is None:
        found["feedforward_dim"] = 4 * found["embedding_dim"]
    if found["num_heads"] > found["embedding_dim"]:
        raise InputError(
            "`num_heads` expects at most one head per unit of `embedding_dim`. "
            f"Received: num_heads={found['num_heads']}, "
            f"embedding_dim={found['embedding_dim']}. Use fewer heads or a wider model."
        )
    return found


def norm_of(config: dict) -> dict:
    """Return what layers take for `NORM` from a GPTModel's configuration."""
    return {"epsilon": config["layer_norm_epsilon"]}


def norm_shapes(sizes: dict) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a normalisation's weights, by name."""
    width = sizes["embedding_dim"]
    return {"gamma": (width,), "beta": (width,)}


def block_shapes(sizes: dict) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a block's weights by name, in the order of a file.

    A product is a `_kernel` `(inputs, outputs)` and a `_bias`.
    """
    width, hidden = sizes["embedding_dim"], sizes["feedforward_dim"]
    inner = width // sizes["num_heads"] * sizes["num_heads"]
    shapes = {}
    for norm, products in (
        ("attention_norm", {"qkv": (width, 3 * inner), "output": (inner, width)}),
        ("feedforward_norm", {"up": (width, hidden), "down": (hidden, width)}),
    ):
        for part, shape in norm_shapes(sizes).items():
            shapes[f"{norm}_{part}"] = shape
        for name, shape in products.items():
            shapes[f"{name}_kernel"] = shape
            shapes[f"{name}_bias"] = shape[1:]
    return shapes


def count_parameters(sizes: dict) -> int:
    """Count a GPT's weights and biases; a tied token table counts once."""
    tables = 1 if sizes.get("tie_embeddings", True) else 2
    rows = tables * sizes["vocab_size"] + sizes["context_length"]
    block = sum(map(math.prod, block_shapes(sizes).values()))
    norm = sum(map(math.prod, norm_shapes(sizes).values()))
    return rows * sizes["embedding_dim"] + sizes["num_layers"] * block + norm


def check_memory(sizes: dict, weight_bytes: int = WEIGHT_BYTES, accelerators=0) -> None:
    """Refuse a GPT that this machine's memory cannot hold, before it is built.

    Args:
        sizes: As `checked_sizes` returns them, and `tie_embeddings`.
        weight_bytes: Bytes that each weight takes.
        accelerators: Devices besides the processor; each may have as much memory.

    Raises:
        InputError: It cannot hold it.
    """
    count, memory = count_parameters(sizes), psutil.virtual_memory().total
    if count * weight_bytes > memory * (1 + accelerators):
        raise InputError(
            f"A GPT expects sizes that fit into {memory / 1e9:,.0f} GB, this machine's "
            f"memory. Received: {count:,} parameters, which take "
            f"{count * weight_bytes / 1e9:,.0f} GB. Make `vocab_size`, "
            "`embedding_dim`, `num_layers` or `context_length` smaller."
        )
