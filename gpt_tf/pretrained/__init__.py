"""GPTs that were trained elsewhere, opened from whatever file they are in.

A reader a format: `huggingface`, `keras_hub`, `gguf_file` and `gguf_model`, `nanogpt`;
`torch_file` and `tensors` read what others consist of; `adapter` reads and writes LoRA
adapters in PEFT's form. A row a family: `families`.
Nothing that is in a file is run. May import models, generation and text. Begin with
`source`, and with `families` for a new one.
"""
