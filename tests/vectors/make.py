"""Make the test vectors: what another implementation must compute, too.

`sampling.json` and `detokenizing.json` are exact. `model.json` is of a model in
`saved_models/`: ids are exact, logits those of one CPU.

    python tests/vectors/make.py
"""

from pathlib import Path

import numpy as np

from gpt_tf import artifacts
from gpt_tf.edge import EdgeGPT
from gpt_tf.edge.session import plan
from gpt_tf.generation.sampler import Sampler
from gpt_tf.generation.sequence import Detokenizer
from gpt_tf.text.tokenizer import BPETokenizer

HERE = Path(__file__).parent
MODEL = "saved_models/python-small.litertlm"
SEEDS = (0, 7, 2**32, 2**53 - 1, 2**64 + 5, 10**40)
SAMPLERS = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9, "seed": 7},
    {"top_k": 3, "seed": 1},
    {"temperature": 1.5, "top_k": 9, "top_p": 0.5, "seed": 2**40},
    {"repetition_penalty": 1.7, "temperature": 0.3, "seed": 3},
    {"temperature": 1e-9, "seed": 4},
    {"top_p": 1e-9, "seed": 5},
)
TEXTS = (
    ("abc STOP def", ["STOP"]),
    ("\U0001f600 \u4e2d\u6587 \u00e9e\u0301 \U0001f469\u200d\U0001f680!", []),
    ("\ufeffa ST STO STOP", ["STOP", "never"]),
    ("\u4e2d\U0001f600\u4e2d", ["\U0001f600"]),
    ("ends in half of a stop text: ST", ["STOP"]),
)
# Bytes that are no UTF-8, and a character that is cut off.
BROKEN = (b"a\xff\xf0\x9f\x98b\xe4\xb8", b"\xc0\xaf\xf4\x90")
PROMPTS = (
    ("    def __init__(self", {"temperature": 0.8, "top_p": 0.95, "seed": 7}, []),
    ("import os\n\n\ndef main", {"seed": 1, "top_k": 40}, ["\n\n"]),
    ("# \u4e2d\U0001f600 \u00e9\n", {"seed": 2, "repetition_penalty": 1.2}, []),
)


def sampling():
    generator = np.random.default_rng(3)
    logits = generator.normal(0, 3, (12, 24)).astype(np.float32)
    logits[3:5] = np.round(logits[3:5])  # ties
    choices = []
    for options in SAMPLERS:
        sampler, seen, chosen = Sampler(**options, suppress_tokens=[5]), {1, 2}, []
        (source,) = sampler.generators(1)
        for row in logits:
            chosen.append(sampler.choose(row, seen, source))
            seen.add(chosen[-1])
        choices.append({"options": options, "chosen": chosen})
    random = [
        {"seed": str(seed), "numbers": Sampler(seed=seed).generators(1)[0].random(4)}
        for seed in SEEDS
    ]
    for one in random:
        one["numbers"] = one["numbers"].tolist()
    cases = [(75, 100, [1, 8, 64]), (63, 63, [1, 8, 64]), (200, 900, [8, 64])]
    calls = [
        {"count": c, "free": f, "lengths": of, "calls": plan(c, f, tuple(of))}
        for c, f, of in cases
    ]
    return {
        "random": random,
        "logits": [[float(value) for value in row] for row in logits],
        "suppressed": [5],
        "seen": [1, 2],
        "choices": choices,
        "plans": calls,
    }


def detokenizing():
    tokenizer = BPETokenizer.train(["abc STOP def never"], 257)
    found = []
    for text, stop in [*TEXTS, *((data, []) for data in BROKEN)]:
        data = text if isinstance(text, bytes) else text.encode("utf-8")
        detokenizer = Detokenizer(tokenizer, [s.encode("utf-8") for s in stop], True)
        pieces = []
        for token in tokenizer.encode_bytes(data):
            pieces.append("".join(detokenizer.push(token)))
            if detokenizer.stopped:
                break
        pieces.append("".join(detokenizer.finish()))
        found.append({"bytes": data.decode("latin-1"), "stop": stop, "pieces": pieces})
    return found


def model(path=MODEL):
    found = []
    with EdgeGPT(path) as gpt:
        for prompt, options, stop in PROMPTS:
            ids = gpt.tokenizer.encode(prompt, special=True)
            gpt.reset()
            gpt.prefill(ids[:-1])
            logits = gpt.decode(ids[-1])
            best = np.argsort(-logits, kind="stable")[:5].tolist()
            greedy = gpt.generate(ids, max_new_tokens=16, temperature=0)
            text = gpt.generate(prompt, max_new_tokens=40, stop=stop, **options)
            found.append(
                {
                    "prompt": prompt,
                    "ids": ids,
                    "most_likely": [[i, round(float(logits[i]), 2)] for i in best],
                    "greedy_ids": greedy,
                    "options": options | {"max_new_tokens": 40, "stop": stop},
                    "text": text,
                }
            )
    return {"model": path, "prompts": found}


VECTORS = {
    "sampling.json": sampling,
    "detokenizing.json": detokenizing,
    "model.json": model,
}

if __name__ == "__main__":
    for name, make in VECTORS.items():
        artifacts.write_json(HERE / name, make())
