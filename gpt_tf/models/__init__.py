"""The GPT itself: layers, model, cached decoding, other libraries' weights."""
