"""Text on its way to the model: corpora, tokenizers, token files, augmentation.

`corpus` reads documents, `records` rows of JSON lines, `examples` rows to fine-tune
on; `tokenizer` turns them into ids, `chat` makes a conversation one text (by
`template_process`, a program of its own), `dataset` holds ids in files and cuts them
into windows for `tf.data`, `augment` changes them while they are read, `rng` numbers
what is random. Imports `settings` and the modules beside the rooms; TensorFlow only in
`dataset`, in what uses it, and for a download. Start with `dataset`.
"""
