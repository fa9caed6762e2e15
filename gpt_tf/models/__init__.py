"""The GPT itself: layers, model, training step, optimiser, cached decoding.

`layers` computes a block, `gpt` puts the model together, `language_model` adds what
Keras's `compile` and `fit` need (default loss, metrics, accumulation), `cached_forward`
decodes with a key-value cache, `interop` reads and writes other libraries' weights,
`keras_file` opens a `.keras` archive without running anything in it. Imports
`generation` and `text`; knows none of the three methods. Start with `gpt`.
"""
