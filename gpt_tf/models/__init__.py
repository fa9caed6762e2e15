"""The GPT itself: layers, model, training step, optimiser, cached decoding.

`block` computes a transformer block, `layers` hold its weights, `gpt` puts the model
together, `language_model` adds defaults to Keras's `compile` and `fit`, `train_step` is
the step on a batch, `cached_forward` decodes with a key-value cache, `interop` writes
GPT-2 for other libraries, `keras_file` opens a `.keras` archive without
running anything in it. Imports `generation` and `text`; knows none of the three
methods. Start with `gpt`.
"""
