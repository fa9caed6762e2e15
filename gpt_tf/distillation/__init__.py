"""Article 3.3: a small GPT that learns from a large one."""
