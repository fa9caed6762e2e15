"""The specification of a GPT: its sizes and its form, and the weights that follow.

Here `GPTModel`'s arguments are checked, and layers, block and export find the names and
shapes of weights. The form is how a family differs from GPT-2: where it says nothing, a
GPT is one.
"""

import math

import numpy as np
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
# What describes a normalisation to the layers that compute one, as GPT-2 has it.
NORM = {"norm": "layer", "norm_bias": True, "epsilon": 1e-5}
# What else describes a block, as GPT-2 has it.
BLOCK = {
    "num_kv_heads": None,
    "head_dim": None,
    "positions": "learned",
    "rotary_base": 10000.0,
    "rotary_dim": None,
    "rotary_scaling": None,
    "activation": "gelu_tanh",
    "biases": "all",
    "query_key_norm": False,
    "parallel_residual": False,
}
FORM = {**BLOCK, "norm": NORM["norm"], "norm_bias": NORM["norm_bias"]}
CHOICES = {
    "positions": ("learned", "rotary"),
    "norm": ("layer", "rms"),
    "activation": ("gelu_tanh", "gelu", "relu", "swiglu"),
    "biases": ("all", "qkv", "none"),
}
ROTARY_SCALING = (
    "factor",
    "low_frequency_factor",
    "high_frequency_factor",
    "original_context_length",
)
# `GPTModel`'s arguments as a file has them; those of the form only where they differ.
TYPES = {
    **dict.fromkeys(SIZES, (int,)),
    "dropout": (int, float),
    "tie_embeddings": (bool,),
    "layer_norm_epsilon": (int, float),
    "name": (str,),
}
FORM_TYPES = {
    **dict.fromkeys(("num_kv_heads", "head_dim", "rotary_dim"), (int,)),
    **dict.fromkeys(CHOICES, (str,)),
    **dict.fromkeys(("norm_bias", "query_key_norm", "parallel_residual"), (bool,)),
    "rotary_base": (int, float),
    "rotary_scaling": (dict,),
}


def checked_config(given: dict) -> dict:
    """Return `GPTModel`'s arguments, but for its name, as Python's own, or refuse them.

    Args:
        given: The arguments by name.

    Raises:
        InputError: One is out of its range.
    """
    number = arguments.number
    dropout, epsilon = given["dropout"], given["layer_norm_epsilon"]
    sizes = checked_sizes({name: given[name] for name in SIZES})
    return {
        **sizes,
        "dropout": number("dropout", dropout, least=0, below=1),
        "tie_embeddings": arguments.switch("tie_embeddings", given["tie_embeddings"]),
        "layer_norm_epsilon": number("layer_norm_epsilon", epsilon, above=0),
        **checked_form(given, sizes),
    }


def checked_form(given: dict, sizes: dict) -> dict:
    """Return the form of a GPT, each part of it as Python's own, or refuse it.

    Args:
        given: Parts of `FORM`, by name; those that are missing are GPT-2's.
        sizes: As `checked_sizes` returns them.

    Returns:
        A dict with the keys of `FORM`. `num_kv_heads`, `head_dim` and, with rotary
        positions, `rotary_dim` are numbers in it.

    Raises:
        InputError: A part is none that is known, or does not fit the sizes.
    """
    form = {name: given.get(name, default) for name, default in FORM.items()}
    for name, known in CHOICES.items():
        arguments.one_of(name, form[name], known)
    for name in ("norm_bias", "query_key_norm", "parallel_residual"):
        form[name] = arguments.switch(name, form[name])
    heads, kv_heads = sizes["num_heads"], form["num_kv_heads"]
    if kv_heads is None:
        kv_heads = heads
    kv_heads = arguments.integer("num_kv_heads", kv_heads, 1, heads)
    if heads % kv_heads:
        arguments.refuse("num_kv_heads", kv_heads, f"a divisor of num_heads={heads}")
    width = form["head_dim"]
    if width is None:
        width = sizes["embedding_dim"] // heads
    width = arguments.integer("head_dim", width, 1)
    form |= {"num_kv_heads": kv_heads, "head_dim": width}
    base = arguments.number("rotary_base", form["rotary_base"], above=0)
    if form["positions"] == "learned":
        same = {name: FORM[name] for name in FORM if name.startswith("rotary")}
        return form | same
    turned = width if form["rotary_dim"] is None else form["rotary_dim"]
    turned = arguments.integer("rotary_dim", turned, 2, width)
    if turned % 2:
        arguments.refuse(
            "rotary_dim", turned, "an even number, as positions turn pairs"
        )
    scaling = form["rotary_scaling"]
    if scaling is not None:
        scaling = _checked_scaling(scaling)
    return form | {
        "rotary_base": base,
        "rotary_dim": turned,
        "rotary_scaling": scaling,
    }


def _checked_scaling(given):
    if not isinstance(given, dict) or given.keys() != set(ROTARY_SCALING):
        expected = f"None, or a dict of {', '.join(ROTARY_SCALING)}"
        arguments.refuse("rotary_scaling", given, expected)
    found = {
        name: arguments.number(f"rotary_scaling[{name!r}]", given[name], above=0)
        for name in ROTARY_SCALING
    }
    if found["low_frequency_factor"] >= found["high_frequency_factor"]:
        expected = "a low_frequency_factor below the high_frequency_factor"
        arguments.refuse("rotary_scaling", given, expected)
    return found


def stated_form(config: dict) -> dict:
    """Return the parts of a configuration's form that are not GPT-2's."""
    usual = checked_form({}, config)
    return {name: config[name] for name in FORM if config[name] != usual[name]}


def refuse_mesh(config: dict) -> None:
    """Refuse a GPT of another form than GPT-2's, which a mesh cannot divide."""
    _refuse_form(
        config,
        "A mesh expects",
        "Divide the batch among the devices, by MirroredStrategy, or the layers, by a "
        "Pipeline.",
    )


def refuse_writing(config: dict) -> None:
    """Refuse to write a GPT of another form as Hugging Face's or KerasHub's GPT-2."""
    _refuse_form(config, "Other libraries' GPT-2 is", "Keep it with `model.save`.")


def _refuse_form(config, expects, repair):
    form = checked_form(config, config)
    if stated := stated_form({**config, **form}):
        raise InputError(
            f"{expects} a GPT of GPT-2's form. Received: one with {', '.join(stated)} "
            f"of its own. {repair}"
        )


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


def rotary_frequencies(form: dict) -> np.ndarray:
    """Return the angle by which each pair of a head turns per position.

    Args:
        form: `rotary_base`, `rotary_dim` and `rotary_scaling`.

    Returns:
        `(rotary_dim / 2,)` float64, in radians.

    Reference: Su et al., arXiv:2104.09864, section 3.2.2; the scaling is that of
    Llama 3.1, which slows long waves down and leaves short ones.
    """
    count, scaling = form["rotary_dim"], form["rotary_scaling"]
    frequencies = form["rotary_base"] ** (-np.arange(0, count, 2) / count)
    if scaling is None:
        return frequencies
    low, high = scaling["low_frequency_factor"], scaling["high_frequency_factor"]
    turns = scaling["original_context_length"] * frequencies / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])


def turns_heads(form: dict) -> bool:
    """Whether queries and keys are other tensors than what the product wrote."""
    return form["positions"] == "rotary" or form["query_key_norm"]


def norm_of(config: dict) -> dict:
    """Return what layers take for `NORM` from a GPTModel's configuration."""
    form = {name: config.get(name, FORM[name]) for name in ("norm", "norm_bias")}
    return {**form, "epsilon": config["layer_norm_epsilon"]}


def block_of(config: dict) -> dict:
    """Return what a block takes for `NORM` and `BLOCK` from a configuration."""
    form = {name: config.get(name, default) for name, default in BLOCK.items()}
    return {**form, **norm_of(config)}


def norm_shapes(form: dict, width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a normalisation's weights, by name."""
    has_shift = form.get("norm", "layer") == "layer" and form.get("norm_bias", True)
    return {"gamma": (width,), **({"beta": (width,)} if has_shift else {})}


def block_shapes(sizes: dict) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a block's weights by name, in the order of a file.

    A product is a `_kernel` `(inputs, outputs)` and a `_bias`. The gate of SwiGLU
    stands before what it gates in `up_kernel`, and the keys' and values' heads after
    the queries' in `qkv_kernel`.

    Args:
        sizes: A configuration, or the sizes and the parts of the form that are not
            GPT-2's.
    """
    form = {**FORM, **sizes, **checked_form(sizes, sizes)}
    width, hidden = sizes["embedding_dim"], sizes["feedforward_dim"]
    inner = form["num_heads"] * form["head_dim"]
    qkv = inner + 2 * form["num_kv_heads"] * form["head_dim"]
    up = 2 * hidden if form["activation"] == "swiglu" else hidden
    shapes = {}
    for norm, products in (
        ("attention_norm", {"qkv": (width, qkv), "output": (inner, width)}),
        ("feedforward_norm", {"up": (width, up), "down": (hidden, width)}),
    ):
        for part, shape in norm_shapes(form, width).items():
            shapes[f"{norm}_{part}"] = shape
        for name, shape in products.items():
            shapes[f"{name}_kernel"] = shape
            if form["biases"] in ("all", name):
                shapes[f"{name}_bias"] = shape[1:]
            if name == "qkv" and form["query_key_norm"]:
                shapes["query_norm_gamma"] = (form["head_dim"],)
                shapes["key_norm_gamma"] = (form["head_dim"],)
    return shapes


def weight_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a GPT's weights, in the order of its layers.

    Args:
        config: A configuration, as `GPTModel.get_config` returns it.

    Returns:
        A dict of names such as `"block_0/qkv_kernel"` to shapes.
    """
    width = config["embedding_dim"]
    shapes = {"embedding/token_table": (config["vocab_size"], width)}
    if config.get("positions", "learned") == "learned":
        shapes["embedding/position_table"] = (config["context_length"], width)
    block = block_shapes(config)
    for index in range(config["num_layers"]):
        shapes |= {f"block_{index}/{name}": shape for name, shape in block.items()}
    for name, shape in norm_shapes(config, width).items():
        shapes[f"final_norm/{name}"] = shape
    if not config.get("tie_embeddings", True):
        shapes["head/kernel"] = (config["vocab_size"], width)
    return shapes


def count_parameters(config: dict) -> int:
    """Count a GPT's weights and biases; a tied token table counts once."""
    one = weight_shapes({**config, "num_layers": 1})
    block = sum(math.prod(one[name]) for name in one if name.startswith("block_"))
    others = sum(map(math.prod, one.values())) - block
    return others + config["num_layers"] * block


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
