"""Training runs: settings, preparation, loop, checkpoints and exact resume.

`loop` holds the verbs (train, quantize, distil, finetune, extract_knowledge), `config`
the settings and presets. A run goes through `preparation` (text to tokens; with `start`
the models that it goes on or learns from), `run` (fits it and writes the results) and
`checkpoint` (saves and restores); `callbacks` act between the steps, `schedule` is the
learning rate, `lora` trains adapters alone, `run_folder` lists what a run's folder
holds. Imports the three methods, `pretrained`, `models` and `text`. Start with `loop`.
"""
