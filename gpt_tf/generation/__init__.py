"""Continuing a prompt, whoever computes the logits: NumPy and a tokenizer only.

`sampler` chooses the next token, `sequence` holds a sequence while it grows (window,
stop texts, streaming). Keras models and the edge runtime drive both, so that one seed
gives one text wherever the logits agree. Imports `text`. Start with `sequence`; a new
way to choose a token belongs in `sampler`.
"""
