"""Running an exported GPT on a device: NumPy, LiteRT and a tokenizer, no TensorFlow.

`loader` opens a file, `session` runs its signatures and holds the cache, `runtime` is
`EdgeGPT`, `scheduler` serves several requests at once; `web_bundle` writes a page that
runs a file in a browser by the scripts in `web`. Imports `export`'s contract and
`generation`, never TensorFlow or Keras. Start with `runtime`.
"""

from gpt_tf.edge.runtime import EdgeGPT
from gpt_tf.edge.scheduler import EdgeScheduler

__all__ = ["EdgeGPT", "EdgeScheduler"]
