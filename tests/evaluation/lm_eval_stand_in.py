"""As much of lm-eval 0.4 as a model of somebody else meets, where it is not installed.

`LM` and `register_model` are what lm-eval calls so; `scores_of` is how its tasks of
multiple choice come from requests to `acc` and `acc_bytes` (`lm_eval/api/task.py`).
"""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np


class LM:
    def __init__(self):
        self.cache_hook = SimpleNamespace(add_partial=self.keep)
        self.kept = []

    def keep(self, method, arguments, result):
        self.kept.append((method, arguments, result))

    @classmethod
    def create_from_arg_obj(cls, arguments, more):
        return cls(**arguments, **{k: v for k, v in more.items() if v is not None})


def install(monkeypatch):
    """Put it among the modules; return the models that are registered, by name."""
    models = {}

    def register_model(name):
        return lambda kind: models.setdefault(name, kind)

    for name, content in (
        ("lm_eval", {}),
        ("lm_eval.api", {}),
        ("lm_eval.api.model", {"LM": LM}),
        ("lm_eval.api.registry", {"register_model": register_model}),
    ):
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return models


def scores_of(lm, rows):
    """Return `acc` and `acc_bytes` of rows with prompt, choices and answer."""
    requests = [
        SimpleNamespace(args=(row["prompt"], choice))
        for row in rows
        for choice in row["choices"]
    ]
    results = iter(lm.loglikelihood(requests))
    right, right_by_bytes = [], []
    for row in rows:
        sums = np.array([next(results)[0] for _ in row["choices"]])
        sizes = np.array([len(choice.encode("utf-8")) for choice in row["choices"]])
        right.append(np.argmax(sums) == row["answer"])
        right_by_bytes.append(np.argmax(sums / sizes) == row["answer"])
    return {"acc": np.mean(right), "acc_bytes": np.mean(right_by_bytes)}
