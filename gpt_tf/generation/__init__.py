"""Generating text from logits: NumPy and a tokenizer only.

`sampler` chooses the next token, `sequence` holds the state of a sequence
(window, stop texts, streaming), `speculation` proposes tokens that are verified
together, `conversation` makes the prompt of a chat. Keras models and the edge runtime
drive them, so that one seed gives one text wherever the logits agree. Imports `text`.
Start with `sequence`; a new way to choose a token belongs in `sampler`.
"""
