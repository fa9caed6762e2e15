"""Running an exported GPT on a device: NumPy, LiteRT and a tokenizer, no TensorFlow."""

from gpt_tf.edge.runtime import EdgeGPT

__all__ = ["EdgeGPT"]
