"""What a model or a file is worth: accuracy, validity of code, latency.

It measures and draws nothing. `models` opens what is measured, `text` chooses what it
is measured on, `accuracy` and `latency` measure, the latter by the processes and turns
of `harness`, `regression` compares with an earlier report, `report` is the schema of
what comes out. Imports `edge` and `training`. Start with `accuracy`.
"""
