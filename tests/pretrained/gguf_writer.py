"""GGUF files of Hugging Face's tensors, as llama.cpp's converter writes them."""

import json

import gguf
import numpy as np

from gpt_tf.text.tokenizer import BPETokenizer
from tests.pretrained.folders import CONFIGS

ARCHITECTURES = {"gpt2": "gpt2", "gpt_neox": "gptneox", "llama": "llama"}
# One place for all of the converter's names; each family has some of them.
_NAMES = {
    **{"transformer.wte": "token_embd", "transformer.wpe": "position_embd"},
    **{"transformer.ln_f": "output_norm", "transformer.h": "blk"},
    **{"ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv"},
    **{"attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
    **{"gpt_neox.embed_in": "token_embd", "embed_out": "output"},
    **{"gpt_neox.final_layer_norm": "output_norm", "gpt_neox.layers": "blk"},
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    **{"mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down"},
    **{"model.embed_tokens": "token_embd", "model.norm": "output_norm"},
    **{"model.layers": "blk", "lm_head": "output"},
    **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    **{f"self_attn.{n}_proj": f"attn_{n}" for n in "qkv"},
    **{f"self_attn.{n}_norm": f"attn_{n}_norm" for n in "qk"},
    "self_attn.o_proj": "attn_output",
    **{"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"},
    "mlp.down_proj": "ffn_down",
}


def small_tokenizer():
    """Return a byte-level tokenizer of 280 tokens."""
    words = ["the quick brown fox's 12345 jumps\n\nover it ALL "]
    return BPETokenizer.train(words * 9, vocab_size=280)


def config_of(name, **changes):
    """Return a configuration whose rows can be quantised: of 64 numbers and more."""
    config = {**CONFIGS[name], "vocab_size": 280}
    if name.startswith("gpt2"):
        return {**config, "n_embd": 64, "n_head": 4, "n_layer": 1, **changes}
    config |= {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config["num_hidden_layers"] = 1
    return {**config, **changes}


def renamed(config, tensors):
    """Return tensors by llama.cpp's names, in llama.cpp's order of numbers."""
    kind, found = config["model_type"], {}
    for name, values in tensors.items():
        if kind == "gpt2" and values.ndim == 2 and ".h." in name:
            values = values.T
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            which = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            values = side_by_side(values, config[which])
        if kind == "gpt_neox" and "query_key_value" in name:
            values = by_parts(values, config["num_attention_heads"])
        for theirs, llamas in _NAMES.items():
            name = name.replace(theirs, llamas)
        found[name] = np.ascontiguousarray(values)
    return found


def side_by_side(values, heads):
    """Put the two numbers of a turned pair beside each other, as the converter does."""
    rows = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return rows.swapaxes(1, 2).reshape(values.shape)


def by_parts(values, heads):
    """Put all queries before all keys before all values, as the converter does."""
    rows = values.reshape(heads, 3, -1, *values.shape[1:])
    return np.concatenate([rows[:, part] for part in range(3)]).reshape(values.shape)


def write_gguf(path, config, tensors, types="F32", tokenizer=None, **changes):
    """Write a GGUF file.

    Args:
        path: Where to.
        config: Hugging Face's.
        tensors: By Hugging Face's names; those without a name of llama.cpp's as
            they are.
        types: Name of the quantisation of all matrices.
        tokenizer: A `BPETokenizer`; `small_tokenizer()` unless given.
        **changes: `architecture`, `model`, `pre` and `metadata` to write instead.
    """
    kind = config["model_type"]
    architecture = ARCHITECTURES.get(kind, kind)
    writer = gguf.GGUFWriter(path, changes.get("architecture", architecture))
    writer.arch = architecture  # so are the names of its metadata
    if kind == "gpt2":
        writer.add_embedding_length(config["n_embd"])
        writer.add_block_count(config["n_layer"])
        writer.add_head_count(config["n_head"])
        writer.add_context_length(config["n_positions"])
        writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    else:
        heads, width = config["num_attention_heads"], config["hidden_size"]
        writer.add_embedding_length(width)
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_head_count(heads)
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_feed_forward_length(config["intermediate_size"])
    if kind == "gpt_neox":
        writer.add_rope_dimension_count(int(config["rotary_pct"] * width // heads))
        writer.add_parallel_residual(config["use_parallel_residual"])
        writer.add_layer_norm_eps(config["layer_norm_eps"])
    elif kind != "gpt2":
        size = config.get("head_dim", width // heads)
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_key_length(size)
        writer.add_value_length(size)
        writer.add_rope_dimension_count(size)
        writer.add_rope_freq_base(config["rope_theta"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    _add_tokenizer(writer, tokenizer or small_tokenizer(), changes)
    for key, value in changes.get("metadata", {}).items():
        writer.kv_data[0].pop(key, None)
        kinds = {str: writer.add_string, int: writer.add_uint32}
        kinds.get(type(value), writer.add_array)(key, value)
    quantised = gguf.GGMLQuantizationType[types]
    for name, values in renamed(config, tensors).items():
        if types == "F32" or values.ndim < 2:
            writer.add_tensor(name, values)
        elif types == "F16":
            writer.add_tensor(name, values.astype(np.float16))
        else:
            data = gguf.quants.quantize(values, quantised)
            writer.add_tensor(name, data, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer, tokenizer, changes):
    vocabulary = tokenizer.backend.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    added = {t.content for t in tokenizer.backend.get_added_tokens_decoder().values()}
    merges = json.loads(tokenizer.to_json())["model"]["merges"]
    writer.add_tokenizer_model(changes.get("model", "gpt2"))
    writer.add_tokenizer_pre(changes.get("pre", "gpt-2"))
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in added else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
