"""What each family of GPTs is in our words: its configuration, its weights' names.

A family is a row: how Hugging Face's `config.json` becomes `GPTModel`'s arguments, and
which tensors make up each weight. What a family can have and a `GPTModel` cannot is
refused by the name that it has in the configuration.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.pretrained.tensors import Tensor

_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
_GATED = {"silu": "swiglu", "swish": "swiglu"}


@dataclasses.dataclass(frozen=True)
class Weight:
    """How one of our weights lies in a family's tensors.

    Args:
        names: The tensors, side by side in our weight's columns.
        is_transposed: Whether a matrix is `(outputs, inputs)`.
        heads_first: Whether query, key and value alternate by heads.
        skipped_rows: Rows before the first that is ours.
    """

    names: tuple[str, ...]
    is_transposed: bool = False
    heads_first: bool = False
    skipped_rows: int = 0

    def read(self, tensors: Mapping[str, Tensor], shape, num_heads) -> np.ndarray:
        """Return our weight, the first rows of tensors that were checked."""
        parts = [tensors[name].read() for name in self.names]
        if self.heads_first:
            # (H * 3 * D, ...) -> (3 * H * D, ...)
            parts = [regrouped(part, num_heads, 3) for part in parts]
        if self.is_transposed and len(shape) == 2:
            parts = [part.T for part in parts]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        rows = slice(self.skipped_rows, self.skipped_rows + shape[0])
        return np.ascontiguousarray(whole[rows], np.float32)

    def check(self, tensors: Mapping[str, Tensor], shape) -> None:
        """See that the tensors are there and fit, before any is read.

        Raises:
            DamagedFileError: A tensor is missing or does not fit the shape.
        """
        for name in self.names:
            if name not in tensors:
                raise DamagedFileError(
                    f"The model expects a tensor {name!r}; there is none. "
                    "Its configuration does not fit its weights: fetch both anew."
                )
        found = [tensors[name].shape for name in self.names]
        is_turned = self.is_transposed and len(shape) == 2
        columns = 0 if is_turned else -1
        total = sum(axes[columns] for axes in found if axes)
        ours = (shape[0] + self.skipped_rows, *shape[1:])
        expected = ours[::-1] if is_turned else ours
        for name, axes in zip(self.names, found, strict=True):
            fits = len(axes) == len(expected) and total == expected[columns]
            rest = axes[1:] if columns == 0 else axes[:-1]
            wanted = expected[1:] if columns == 0 else expected[:-1]
            if not fits or rest != wanted:
                raise DamagedFileError(
                    f"The tensor {name!r} expects the shape {expected}"
                    + (", with those beside it" if len(found) > 1 else "")
                    + f". Received: {axes}. The configuration does not fit the weights."
                )


def regrouped(rows: np.ndarray, outer: int, inner: int) -> np.ndarray:
    """Exchange two axes that the first axis is made of."""
    apart = rows.reshape(outer, inner, -1, *rows.shape[1:])
    return np.swapaxes(apart, 0, 1).reshape(rows.shape)


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of GPT.

    Args:
        name: Hugging Face's `model_type`.
        arguments: Turns a configuration into `GPTModel`'s arguments.
        prefix: Before the names of tensors, but for the head's.
        top: Our weights outside of blocks -> a `Weight`.
        block: Prefix of a block's tensors, with `{}` for its number.
        parts: Our weights of a block -> a `Weight`.
    """

    name: str
    arguments: Callable[[dict], dict]
    prefix: str
    top: dict[str, Weight]
    block: str
    parts: dict[str, Weight]

    def place_of(self, name: str) -> Weight:
        """Return where a weight of ours lies, `"block_0/qkv_kernel"` for example."""
        layer, _, part = name.partition("/")
        if not layer.startswith("block_"):
            return self.top[name]
        prefix = self.block.format(layer.removeprefix("block_"))
        weight = self.parts[part]
        names = tuple(prefix + name for name in weight.names)
        return dataclasses.replace(weight, names=names)


class _Config:
    """Hugging Face's configuration, read with types and refusals."""

    def __init__(self, given: dict):
        self.given = given

    def size(self, *names, default=None):
        """Return the first of these fields that is there, a positive integer."""
        for name in names:
            value = self.given.get(name)
            if value is not None:
                if type(value) is not int or value < 1:
                    self.refuse(name, "an integer of at least 1")
                return value
        if default is None:
            self.refuse(names[0], "an integer of at least 1")
        return default

    def number(self, name, default):
        value = self.given.get(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not 0 < value < 1e308:
            self.refuse(name, "a number above 0")
        return float(value)

    def mapping(self, name):
        value = self.given.get(name)
        if value is not None and not isinstance(value, dict):
            self.refuse(name, "an object")
        return value or {}

    def only(self, name, *known, default=None):
        """Return a field that has to be one of the known values."""
        value = self.given.get(name)
        value = default if value is None else value
        if value not in known:
            self.refuse(name, " or ".join(map(repr, known)))
        return value

    def named(self, name, known: dict, default=None):
        return known[self.only(name, *known, default=default)]

    def refuse(self, name, expected):
        family = self.given.get("model_type")
        raise InputError(
            f"A {family} expects `{name}` to be {expected}. "
            f"Received: {self.given.get(name)!r}. gpt_tf has no other form of it."
        )

    def rotary(self):
        """Return the arguments that rotary positions need."""
        stated = self.mapping("rope_parameters")
        scaling = stated or self.mapping("rope_scaling")
        base = _Config({**self.given, **stated}).number(
            "rope_theta", self.number("rotary_emb_base", 10000.0)
        )
        found = {"positions": "rotary", "rotary_base": base}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "llama3":
            names = {
                "factor": "factor",
                "low_freq_factor": "low_frequency_factor",
                "high_freq_factor": "high_frequency_factor",
                "original_max_position_embeddings": "original_context_length",
            }
            try:
                found["rotary_scaling"] = {
                    ours: float(scaling[theirs]) for theirs, ours in names.items()
                }
            except (KeyError, TypeError, ValueError, OverflowError):
                self.refuse("rope_scaling", f"Llama 3's, with {', '.join(names)}")
        elif kind != "default":
            self.refuse("rope_scaling", "none or Llama 3's")
        return found

    def sizes(self):
        """Return the arguments that all families but GPT-2 name alike."""
        return {
            "vocab_size": self.size("vocab_size"),
            "embedding_dim": self.size("hidden_size"),
            "num_layers": self.size("num_hidden_layers"),
            "context_length": self.size("max_position_embeddings"),
        }

    def is_tied(self, default):
        return self.only("tie_word_embeddings", True, False, default=default)

    def heads(self, width):
        """Return the arguments of attention whose queries share keys and values."""
        count = self.size("num_attention_heads")
        found = {
            "num_heads": count,
            "num_kv_heads": self.size("num_key_value_heads", default=count),
        }
        if self.given.get("head_dim") is not None:
            found["head_dim"] = self.size("head_dim")
        elif width % count:
            self.refuse("num_attention_heads", f"a divisor of `hidden_size`, {width}")
        return found


def _gpt2_arguments(given):
    config = _Config(given)
    config.only("scale_attn_weights", True, default=True)
    config.only("scale_attn_by_inverse_layer_idx", False, default=False)
    config.only("add_cross_attention", False, default=False)
    width = config.size("n_embd")
    return {
        "vocab_size": config.size("vocab_size"),
        "embedding_dim": width,
        "num_layers": config.size("n_layer"),
        "num_heads": config.size("n_head"),
        "context_length": config.size("n_positions", "n_ctx", default=1024),
        "feedforward_dim": config.size("n_inner", default=4 * width),
        "activation": config.named("activation_function", _ACTIVATIONS, "gelu_new"),
        "layer_norm_epsilon": config.number("layer_norm_epsilon", 1e-5),
        "tie_embeddings": config.is_tied(True),
    }


def _opt_arguments(given):
    config = _Config(given)
    width = config.size("hidden_size")
    config.only("word_embed_proj_dim", width, default=width)
    config.only("do_layer_norm_before", True, default=True)
    config.only("_remove_final_layer_norm", False, default=False)
    config.only("enable_bias", True, default=True)
    config.only("layer_norm_elementwise_affine", True, default=True)
    return {
        **config.sizes(),
        "num_heads": config.size("num_attention_heads"),
        "feedforward_dim": config.size("ffn_dim"),
        "activation": config.named("activation_function", _ACTIVATIONS, "relu"),
        "tie_embeddings": config.is_tied(True),
    }


def _gpt_neox_arguments(given):
    config = _Config(given)
    config.only("attention_bias", True, default=True)
    width, heads = config.size("hidden_size"), config.size("num_attention_heads")
    if width % heads:
        config.refuse("num_attention_heads", f"a divisor of `hidden_size`, {width}")
    rotary = config.rotary()
    stated = given.get("rope_parameters") or {}
    share = stated.get("partial_rotary_factor", given.get("rotary_pct"))
    share = 0.25 if share is None else share
    if not isinstance(share, (int, float)) or not 0 < share <= 1:
        config.refuse("rotary_pct", "a number above 0 and at most 1")
    return {
        **config.sizes(),
        "num_heads": heads,
        "feedforward_dim": config.size("intermediate_size"),
        "activation": config.named("hidden_act", _ACTIVATIONS, "gelu"),
        "layer_norm_epsilon": config.number("layer_norm_eps", 1e-5),
        "tie_embeddings": config.is_tied(False),
        "parallel_residual": config.only(
            "use_parallel_residual", True, False, default=True
        ),
        **rotary,
        "rotary_dim": int(width // heads * share),
    }


def _llama_arguments(given, biases="none", query_key_norm=False):
    config = _Config(given)
    config.only("mlp_bias", False, default=False)
    config.only("use_sliding_window", False, default=False)
    if biases == "none":
        config.only("attention_bias", False, default=False)
    width = config.size("hidden_size")
    return {
        **config.sizes(),
        **config.heads(width),
        "feedforward_dim": config.size("intermediate_size"),
        "activation": config.named("hidden_act", _GATED, "silu"),
        "norm": "rms",
        "layer_norm_epsilon": config.number("rms_norm_eps", 1e-6),
        "biases": biases,
        "query_key_norm": query_key_norm,
        "tie_embeddings": config.is_tied(False),
        **config.rotary(),
    }


def _qwen2_arguments(given):
    return _llama_arguments(given, biases="qkv")


def _qwen3_arguments(given):
    return _llama_arguments({"head_dim": 128, **given}, query_key_norm=True)


# The weights


def linear(ours, *theirs):
    """Return a product's kernel and bias, of one layer of PyTorch's or several."""
    return {
        f"{ours}_{part}": Weight(
            tuple(f"{name}.{suffix}" for name in theirs), is_transposed=True
        )
        for part, suffix in (("kernel", "weight"), ("bias", "bias"))
    }


def _conv1d(ours, theirs):
    return {
        f"{ours}_kernel": Weight((f"{theirs}.weight",)),
        f"{ours}_bias": Weight((f"{theirs}.bias",)),
    }


def normalization(ours, theirs):
    """Return a normalisation's scale and shift."""
    return {
        f"{ours}gamma": Weight((f"{theirs}.weight",)),
        f"{ours}beta": Weight((f"{theirs}.bias",)),
    }


def _top(tokens, norm, head, positions=None, skipped=0):
    found = {"embedding/token_table": Weight((f"{tokens}.weight",))}
    if positions is not None:
        table = Weight((f"{positions}.weight",), skipped_rows=skipped)
        found["embedding/position_table"] = table
    return {
        **found,
        **normalization("final_norm/", norm),
        "head/kernel": Weight((head,)),
    }


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA = {
    "prefix": "model.",
    "top": _top("embed_tokens", "norm", "lm_head.weight"),
    "block": "layers.{}.",
    "parts": {
        **normalization("attention_norm_", "input_layernorm"),
        **linear("qkv", *_ATTENTION),
        **normalization("query_norm_", "self_attn.q_norm"),
        **normalization("key_norm_", "self_attn.k_norm"),
        **linear("output", "self_attn.o_proj"),
        **normalization("feedforward_norm_", "post_attention_layernorm"),
        **linear("up", "mlp.gate_proj", "mlp.up_proj"),
        **linear("down", "mlp.down_proj"),
    },
}
FAMILIES = {
    family.name: family
    for family in (
        Family(
            "gpt2",
            _gpt2_arguments,
            prefix="transformer.",
            top=_top("wte", "ln_f", "lm_head.weight", "wpe"),
            block="h.{}.",
            parts={
                **normalization("attention_norm_", "ln_1"),
                **_conv1d("qkv", "attn.c_attn"),
                **_conv1d("output", "attn.c_proj"),
                **normalization("feedforward_norm_", "ln_2"),
                **_conv1d("up", "mlp.c_fc"),
                **_conv1d("down", "mlp.c_proj"),
            },
        ),
        Family(
            "opt",
            _opt_arguments,
            prefix="model.decoder.",
            # OPT counts positions from 2, as the library it was trained in did.
            top=_top(
                *("embed_tokens", "final_layer_norm", "lm_head.weight"),
                *("embed_positions", 2),
            ),
            block="layers.{}.",
            parts={
                **normalization("attention_norm_", "self_attn_layer_norm"),
                **linear("qkv", *_ATTENTION),
                **linear("output", "self_attn.out_proj"),
                **normalization("feedforward_norm_", "final_layer_norm"),
                **linear("up", "fc1"),
                **linear("down", "fc2"),
            },
        ),
        Family(
            "gpt_neox",
            _gpt_neox_arguments,
            prefix="gpt_neox.",
            top=_top("embed_in", "final_layer_norm", "embed_out.weight"),
            block="layers.{}.",
            parts={
                **normalization("attention_norm_", "input_layernorm"),
                **{
                    name: dataclasses.replace(weight, heads_first=True)
                    for name, weight in linear(
                        "qkv", "attention.query_key_value"
                    ).items()
                },
                **linear("output", "attention.dense"),
                **normalization("feedforward_norm_", "post_attention_layernorm"),
                **linear("up", "mlp.dense_h_to_4h"),
                **linear("down", "mlp.dense_4h_to_h"),
            },
        ),
        Family("llama", _llama_arguments, **_LLAMA),
        Family("qwen2", _qwen2_arguments, **_LLAMA),
        Family("qwen3", _qwen3_arguments, **_LLAMA),
    )
}


def family_of(config: dict) -> Family:
    """Return the family that a configuration is of.

    Raises:
        InputError: gpt_tf has none of that name.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(
            f"`model_type` expects one of {', '.join(FAMILIES)}. Received: {name!r}. "
            f"{_LACKING.get(str(name), 'gpt_tf has no such block')}: take a model of "
            "one of these families."
        )
    return FAMILIES[name]


_LACKING = {
    "gemma": "gpt_tf has no GeGLU and no scaled embeddings",
    "gemma2": "gpt_tf has no GeGLU and no norms after attention",
    "gemma3_text": "gpt_tf has no sliding windows and no norms after attention",
    "phi": "gpt_tf has no parallel block with one norm",
    "phi3": "gpt_tf has no kernels of query, key and value in one with long rotary",
    "mistral": "gpt_tf has no sliding windows",
    "mixtral": "gpt_tf has no mixture of experts",
    "qwen2_moe": "gpt_tf has no mixture of experts",
    "qwen3_moe": "gpt_tf has no mixture of experts",
    "gpt_neo": "gpt_tf has no local attention",
    "gptj": "gpt_tf has no parallel block with one norm",
    "bloom": "gpt_tf has no ALiBi positions",
    "mpt": "gpt_tf has no ALiBi positions",
    "falcon": "gpt_tf has no parallel block with one norm",
}
