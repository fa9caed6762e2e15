"""Forward passes of six families in NumPy, float64, head by head.

Written from Hugging Face's definitions, on its configurations and names of tensors:
nothing of gpt_tf is imported, and clarity comes before speed.
"""

import math

import numpy as np

_erf = np.vectorize(math.erf)


def forward(config, tensors, tokens):
    """Logits `(T, V)` of one sequence of token ids `(T,)`.

    Args:
        config: As `config.json` has it.
        tensors: Arrays by Hugging Face's full names.
        tokens: Ids.
    """
    tensors = {name: np.asarray(t, np.float64) for name, t in tensors.items()}
    return _FAMILIES[config["model_type"]](config, tensors, np.asarray(tokens))


def gpt2(config, w, tokens):
    width, heads = config["n_embd"], config["n_head"]
    epsilon = config["layer_norm_epsilon"]
    x = w["transformer.wte.weight"][tokens]
    x = x + w["transformer.wpe.weight"][: len(tokens)]
    for i in range(config["n_layer"]):

        def conv1d(x, name, i=i):
            name = f"transformer.h.{i}.{name}"
            return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

        h = layer_norm(x, w, f"transformer.h.{i}.ln_1", epsilon)
        q, k, v = np.split(conv1d(h, "attn.c_attn"), 3, axis=1)
        shape = (len(tokens), heads, width // heads)
        h = attend(q.reshape(shape), k.reshape(shape), v.reshape(shape))
        x = x + conv1d(h, "attn.c_proj")
        h = layer_norm(x, w, f"transformer.h.{i}.ln_2", epsilon)
        h = ACTIVATIONS[config["activation_function"]](conv1d(h, "mlp.c_fc"))
        x = x + conv1d(h, "mlp.c_proj")
    x = layer_norm(x, w, "transformer.ln_f", epsilon)
    return x @ w.get("lm_head.weight", w["transformer.wte.weight"]).T


def opt(config, w, tokens):
    heads = config["num_attention_heads"]
    shape = (len(tokens), heads, config["hidden_size"] // heads)
    x = w["model.decoder.embed_tokens.weight"][tokens]
    # Positions begin at 2.
    x = x + w["model.decoder.embed_positions.weight"][2 : 2 + len(tokens)]
    for i in range(config["num_hidden_layers"]):
        block = f"model.decoder.layers.{i}."
        h = layer_norm(x, w, block + "self_attn_layer_norm", 1e-5)
        q, k, v = (
            linear(h, w, f"{block}self_attn.{part}_proj").reshape(shape)
            for part in "qkv"
        )
        x = x + linear(attend(q, k, v), w, block + "self_attn.out_proj")
        h = layer_norm(x, w, block + "final_layer_norm", 1e-5)
        h = ACTIVATIONS[config["activation_function"]](linear(h, w, block + "fc1"))
        x = x + linear(h, w, block + "fc2")
    x = layer_norm(x, w, "model.decoder.final_layer_norm", 1e-5)
    return x @ w.get("lm_head.weight", w["model.decoder.embed_tokens.weight"]).T


def gpt_neox(config, w, tokens):
    width, heads = config["hidden_size"], config["num_attention_heads"]
    turned = int(width // heads * config["rotary_pct"])
    frequencies = 1 / config["rotary_emb_base"] ** (np.arange(0, turned, 2) / turned)
    epsilon = config["layer_norm_eps"]
    x = w["gpt_neox.embed_in.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        block = f"gpt_neox.layers.{i}."
        h = layer_norm(x, w, block + "input_layernorm", epsilon)
        h = linear(h, w, block + "attention.query_key_value")
        # Each head has its query, its key and its value side by side.
        h = h.reshape(len(tokens), heads, 3, width // heads)
        q, k = rotate(h[:, :, 0], frequencies), rotate(h[:, :, 1], frequencies)
        attended = linear(attend(q, k, h[:, :, 2]), w, block + "attention.dense")
        read = x if config["use_parallel_residual"] else x + attended
        h = layer_norm(read, w, block + "post_attention_layernorm", epsilon)
        h = ACTIVATIONS[config["hidden_act"]](linear(h, w, block + "mlp.dense_h_to_4h"))
        x = x + attended + linear(h, w, block + "mlp.dense_4h_to_h")
    x = layer_norm(x, w, "gpt_neox.final_layer_norm", epsilon)
    return x @ w.get("embed_out.weight", w["gpt_neox.embed_in.weight"]).T


def llama(config, w, tokens):
    """Llama, Qwen 2 (biases of query, key and value) and Qwen 3 (normalised heads)."""
    heads, width = config["num_attention_heads"], config["hidden_size"]
    kv_heads = config.get("num_key_value_heads", heads)
    size = config.get("head_dim", width // heads)
    epsilon = config["rms_norm_eps"]
    frequencies = config["rope_theta"] ** (-np.arange(0, size, 2) / size)
    if config.get("rope_scaling"):
        frequencies = llama3(frequencies, config["rope_scaling"])
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}."
        h = rms_norm(x, w[block + "input_layernorm.weight"], epsilon)
        q, k, v = (
            linear(h, w, f"{block}self_attn.{part}_proj").reshape(-1, count, size)
            for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        if config["model_type"] == "qwen3":
            q = rms_norm(q, w[block + "self_attn.q_norm.weight"], epsilon)
            k = rms_norm(k, w[block + "self_attn.k_norm.weight"], epsilon)
        attended = attend(rotate(q, frequencies), rotate(k, frequencies), v)
        x = x + linear(attended, w, block + "self_attn.o_proj")
        h = rms_norm(x, w[block + "post_attention_layernorm.weight"], epsilon)
        gate = linear(h, w, block + "mlp.gate_proj")
        h = gate / (1 + np.exp(-gate)) * linear(h, w, block + "mlp.up_proj")
        x = x + linear(h, w, block + "mlp.down_proj")
    x = rms_norm(x, w["model.norm.weight"], epsilon)
    return x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def llama3(frequencies, scaling):
    """Llama 3's frequencies: long waves are slowed down, short ones are left."""
    factor, length = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    found = []
    for frequency in frequencies:
        wave = 2 * np.pi / frequency
        if wave > length / low:
            found.append(frequency / factor)
        elif wave < length / high:
            found.append(frequency)
        else:
            smooth = (length / wave - low) / (high - low)
            found.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.array(found)


def attend(query, key, value):
    """Causal attention of `(T, H, D)` over `(T, G, D)`; returns `(T, H * D)`."""
    length, heads, size = query.shape
    shared = heads // key.shape[1]
    outputs = np.zeros(query.shape)
    for head in range(heads):
        for t in range(length):
            seen = key[: t + 1, head // shared]
            scores = seen @ query[t, head] / np.sqrt(size)
            shares = np.exp(scores - scores.max())
            shares /= shares.sum()
            outputs[t, head] = shares @ value[: t + 1, head // shared]
    return outputs.reshape(length, -1)


def rotate(x, frequencies):
    """Turn the first dimensions of heads `(T, H, D)`; pair `i` is `i` and `i + n`."""
    n = len(frequencies)
    angles = np.arange(len(x))[:, None, None] * frequencies
    first, second, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    return np.concatenate(
        [
            first * np.cos(angles) - second * np.sin(angles),
            second * np.cos(angles) + first * np.sin(angles),
            rest,
        ],
        axis=-1,
    )


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def layer_norm(x, w, name, epsilon):
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def rms_norm(x, gamma, epsilon):
    return gamma * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon)


ACTIVATIONS = {
    "gelu_new": lambda x: (
        0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    ),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / np.sqrt(2))),
    "relu": lambda x: np.maximum(x, 0),
}
_FAMILIES = {
    "gpt2": gpt2,
    "opt": opt,
    "gpt_neox": gpt_neox,
    **dict.fromkeys(("llama", "qwen2", "qwen3"), llama),
}
