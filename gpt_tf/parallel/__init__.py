"""Article 3.1, parallel computation: the work in parts, each part on a device.

`data` copies the model and divides the batch (`tf.distribute`), `pipeline` divides the
layers, `mesh_gpt` divides layers' weights and sequences over a DTensor mesh, `cluster`
lets Ray start workers. Imports `models`; knows neither quantisation nor distillation.
Start with `data`.
"""
