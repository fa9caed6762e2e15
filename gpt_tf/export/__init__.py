"""From a trained GPT to one file for a device: `.tflite` and `.litertlm`.

`signatures` is the contract with the runtime, written down without TensorFlow; `graph`
describes the computation in `operations`, `tflite_writer` writes it, `litertlm` bundles
it with the tokenizer, `verify` runs the result against the model before it takes its
name, `structure` and `integrity` check a file before it is opened. Imports `training`,
`quantization` and `models`. Start with `signatures`.
"""
