"""Small models of each family with random weights, as Hugging Face's folders."""

import json
import math

import numpy as np
import safetensors.numpy

VOCAB_SIZE, CONTEXT = 97, 40
_GPT2 = {
    "model_type": "gpt2",
    "vocab_size": VOCAB_SIZE,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": CONTEXT,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
}
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": CONTEXT,
}
_OPT = {
    **_COMMON,
    "model_type": "opt",
    "ffn_dim": 50,
    "word_embed_proj_dim": 24,
    "activation_function": "relu",
}
_NEOX = {
    **_COMMON,
    "model_type": "gpt_neox",
    "num_attention_heads": 3,
    "intermediate_size": 50,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
}
_LLAMA = {
    **_COMMON,
    "model_type": "llama",
    "num_key_value_heads": 2,
    "intermediate_size": 50,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
# Of a short original context, so that 30 positions have waves of all three kinds.
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "gpt2": _GPT2,
    "gpt2_other": {
        **_GPT2,
        "activation_function": "relu",
        "n_inner": 50,
        "tie_word_embeddings": False,
    },
    "opt": _OPT,
    "gpt_neox": {**_NEOX, "hidden_size": 48},
    "gpt_neox_sequential": {**_NEOX, "rotary_pct": 1.0, "use_parallel_residual": False},
    "llama": _LLAMA,
    "llama3": {
        **_LLAMA,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_theta": 500.0,
        "rope_scaling": SCALING,
        "tie_word_embeddings": True,
    },
    "qwen2": {**_LLAMA, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {
        **_LLAMA,
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "head_dim": 10,
    },
}
FAMILIES = ("gpt2", "opt", "gpt_neox", "llama", "qwen2", "qwen3")


def shapes_of(config):
    """Return the shapes of a model's tensors by Hugging Face's names."""
    kind, vocab = config["model_type"], config["vocab_size"]
    if kind == "gpt2":
        return _gpt2_shapes(config)
    width, depth = config["hidden_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    if kind == "opt":
        top, block, hidden = "model.decoder.", "model.decoder.layers", config["ffn_dim"]
        shapes = {
            f"{top}embed_tokens.weight": (vocab, width),
            f"{top}embed_positions.weight": (
                config["max_position_embeddings"] + 2,
                width,
            ),
            **_norm(f"{top}final_layer_norm", width),
        }
        parts = {
            **_norm("self_attn_layer_norm", width),
            **_norm("final_layer_norm", width),
            **_linear("fc1", width, hidden),
            **_linear("fc2", hidden, width),
        }
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            parts |= _linear(f"self_attn.{name}", width, width)
    elif kind == "gpt_neox":
        block, hidden = "gpt_neox.layers", config["intermediate_size"]
        shapes = {
            "gpt_neox.embed_in.weight": (vocab, width),
            "embed_out.weight": (vocab, width),
            **_norm("gpt_neox.final_layer_norm", width),
        }
        parts = {
            **_norm("input_layernorm", width),
            **_norm("post_attention_layernorm", width),
            **_linear("attention.query_key_value", width, 3 * width),
            **_linear("attention.dense", width, width),
            **_linear("mlp.dense_h_to_4h", width, hidden),
            **_linear("mlp.dense_4h_to_h", hidden, width),
        }
    else:
        block, hidden = "model.layers", config["intermediate_size"]
        size = config.get("head_dim", width // heads)
        inner, kv = heads * size, config["num_key_value_heads"] * size
        shapes = {
            "model.embed_tokens.weight": (vocab, width),
            "model.norm.weight": (width,),
        }
        if not config.get("tie_word_embeddings"):
            shapes["lm_head.weight"] = (vocab, width)
        parts = {
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
            "self_attn.o_proj.weight": (width, inner),
            "mlp.gate_proj.weight": (hidden, width),
            "mlp.up_proj.weight": (hidden, width),
            "mlp.down_proj.weight": (width, hidden),
        }
        for name, count in (("q", inner), ("k", kv), ("v", kv)):
            product = _linear(f"self_attn.{name}_proj", width, count)
            if kind != "qwen2":
                del product[f"self_attn.{name}_proj.bias"]
            parts |= product
        if kind == "qwen3":
            parts |= {f"self_attn.{n}_norm.weight": (size,) for n in "qk"}
    return shapes | _blocks(block, depth, parts)


def _gpt2_shapes(config):
    width, vocab = config["n_embd"], config["vocab_size"]
    hidden = config.get("n_inner") or 4 * width
    shapes = {
        "transformer.wte.weight": (vocab, width),
        "transformer.wpe.weight": (config["n_positions"], width),
        **_norm("transformer.ln_f", width),
    }
    if not config.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (vocab, width)
    parts = {**_norm("ln_1", width), **_norm("ln_2", width)}
    for name, inputs, outputs in (
        ("attn.c_attn", width, 3 * width),
        ("attn.c_proj", width, width),
        ("mlp.c_fc", width, hidden),
        ("mlp.c_proj", hidden, width),
    ):
        # Not `Linear`'s: GPT-2 has `(inputs, outputs)`.
        parts |= {f"{name}.weight": (inputs, outputs), f"{name}.bias": (outputs,)}
    return shapes | _blocks("transformer.h", config["n_layer"], parts)


def _linear(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _blocks(prefix, depth, parts):
    return {
        f"{prefix}.{index}.{name}": shape
        for index in range(depth)
        for name, shape in parts.items()
    }


def random_tensors(config, seed=0):
    """Return a model's tensors by Hugging Face's names, in which all weights matter."""
    generator, tensors = np.random.default_rng(seed), {}
    for name, shape in shapes_of(config).items():
        is_norm = "norm" in name or "ln_" in name
        start = 1.0 if is_norm and name.endswith("weight") else 0.0
        spread = 1.5 / math.sqrt(shape[-1]) if len(shape) == 2 else 0.2
        tensors[name] = (start + generator.normal(0, spread, shape)).astype("float32")
    return tensors


def write_folder(folder, config, tensors=None):
    """Write `config.json` and `model.safetensors`; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    if tensors is not None:
        path = folder / "model.safetensors"
        safetensors.numpy.save_file(tensors, path, {"format": "pt"})
    return folder


def ids_of(vocab_size=VOCAB_SIZE, rows=2, length=30):
    """Return token ids `(rows, length)`."""
    return np.random.default_rng(0).integers(0, vocab_size, (rows, length))


def assert_same_logits(found, expected, tolerance=1e-4):
    """Compare logits within a part of the largest."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
