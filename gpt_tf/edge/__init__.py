"""Running an exported GPT on a device: NumPy, LiteRT and a tokenizer, no TensorFlow.

`loader` opens a file, `session` runs its signatures and holds the cache, `weight_cache`
keeps packed weights, `speculation` takes several tokens a step, `runtime` is `EdgeGPT`,
`scheduler` serves several requests at once. Imports `export`'s contract and
`generation`, never TensorFlow or Keras. Start with `runtime`.
"""

from gpt_tf.edge.runtime import EdgeGPT
from gpt_tf.edge.scheduler import EdgeScheduler

__all__ = ["EdgeGPT", "EdgeScheduler"]
