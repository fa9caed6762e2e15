"""What a model or a file is worth: accuracy, validity of code, latency.

It measures and draws nothing. `models` opens what is measured, `text` chooses what it
is measured on, `accuracy`, `tasks` and `latency` measure, the last by the processes and
turns of `harness`. `lm_eval` lets lm-eval measure, `regression` compares with an
earlier report, `report` is the schema of what comes out. Imports `edge` and `training`.
Start with `accuracy`.
"""
