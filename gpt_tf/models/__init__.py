"""The GPT itself: its layers, the model, cached decoding, and other libraries' weights."""
