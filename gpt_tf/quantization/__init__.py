"""Article 3.2, quantisation: weights and activations as integers.

`config` and `modes` say what can be chosen, `calibration` measures ranges after
training, `equalize` makes activations easier to round, `gptq` rounds weights together,
`qat` trains with quantisation in the loop (TF-MOT), `weights` quantises weights alone.
Imports `models`; only this room knows TF-MOT. Start with `config`.
"""
