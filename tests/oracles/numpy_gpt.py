"""GPT-2's forward pass in NumPy, float64, one head and one sequence at a time.

An independent statement of the architecture, written from the paper: nothing of
gpt_tf is imported, and clarity comes before speed.
"""

import numpy as np


def forward(weights, tokens, num_layers, num_heads, epsilon=1e-5):
    """Logits `(T, V)` of one sequence of token ids `(T,)`.

    Args:
        weights: Arrays by Hugging Face's names, without the prefix `transformer.`.
        tokens: Ids.
        num_layers: Blocks.
        num_heads: Heads; the head width is the width of a head's share of c_attn.
        epsilon: Of the layer normalisations.
    """
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    x = w["wte.weight"][tokens] + w["wpe.weight"][: len(tokens)]
    for i in range(num_layers):
        x = x + attend(
            norm(x, w[f"h.{i}.ln_1.weight"], w[f"h.{i}.ln_1.bias"], epsilon),
            w[f"h.{i}.attn.c_attn.weight"],
            w[f"h.{i}.attn.c_attn.bias"],
            w[f"h.{i}.attn.c_proj.weight"],
            w[f"h.{i}.attn.c_proj.bias"],
            num_heads,
        )
        h = norm(x, w[f"h.{i}.ln_2.weight"], w[f"h.{i}.ln_2.bias"], epsilon)
        h = h @ w[f"h.{i}.mlp.c_fc.weight"] + w[f"h.{i}.mlp.c_fc.bias"]
        h = gelu(h) @ w[f"h.{i}.mlp.c_proj.weight"] + w[f"h.{i}.mlp.c_proj.bias"]
        x = x + h
    x = norm(x, w["ln_f.weight"], w["ln_f.bias"], epsilon)
    return x @ w.get("lm_head.weight", w["wte.weight"]).T


def attend(x, qkv_kernel, qkv_bias, out_kernel, out_bias, num_heads):
    """Causal self-attention of `(T, C)`, position by position."""
    inner = qkv_kernel.shape[1] // 3
    width = inner // num_heads
    query, key, value = np.split(x @ qkv_kernel + qkv_bias, 3, axis=1)
    outputs = np.zeros((len(x), inner))
    for head in range(num_heads):
        part = slice(head * width, (head + 1) * width)
        for t in range(len(x)):
            scores = key[: t + 1, part] @ query[t, part] / np.sqrt(width)
            shares = np.exp(scores - scores.max())
            outputs[t, part] = shares @ value[: t + 1, part] / shares.sum()
    return outputs @ out_kernel + out_bias


def norm(x, gamma, beta, epsilon):
    mean = x.mean(axis=1, keepdims=True)
    return gamma * (x - mean) / np.sqrt(x.var(axis=1, keepdims=True) + epsilon) + beta


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def mean_loss(logits, labels):
    """Mean cross-entropy in nats of `(T, V)` logits."""
    top = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    return float(np.mean(total - logits[np.arange(len(labels)), labels]))
