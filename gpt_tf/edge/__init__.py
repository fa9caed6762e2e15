"""Running an exported GPT on a device: NumPy, LiteRT and a tokenizer, no TensorFlow."""

from gpt_tf.edge.runtime import EdgeGPT
from gpt_tf.edge.scheduler import EdgeScheduler

__all__ = ["EdgeGPT", "EdgeScheduler"]
