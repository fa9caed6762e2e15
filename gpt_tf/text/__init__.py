"""Text on its way to the model: documents, tokens, windows."""
