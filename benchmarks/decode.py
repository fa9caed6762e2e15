"""Decoding on a device at GPT-2 small's shape: gpt_tf's file and runtime beside others.

    python benchmarks/decode.py [--rounds N] [--threads N ...] [--depths N ...] [--all]

Every contender continues the same 64 random tokens greedily by 64, one sequence at a
time, with the same random weights where it takes them, on 1 and on 2 threads. Ours
runs the exported file, whose cache may take 1024 positions. Of that, EdgeGPT uses what
the text needs and LiteRT-LM all, so both run once more on a file whose cache takes the
128 positions of this text: there the capacities are equal. Behind longer prompts
(`--depths`) each continues by 32. A token reads every weight once, and the keys and
values of all positions: its floor is what that takes at the rate at which a loop in C
reads as many bytes. What is not installed is named and left out.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np
import peers
from generation import Task
from harness import (
    Contender,
    console,
    finish,
    gpt_tf_model,
    print_machine,
    read_rate,
    take_turns,
)

MODES = ("dynamic_int8", "int4", "float32")
QUICK_PEERS = ("ONNX Runtime int8", "llama.cpp q8_0", "llama.cpp q4_0")


def gpt_tf_edge(task, threads, folder, mode):
    """`EdgeGPT` on the exported file, with a loop of one's own."""
    from gpt_tf.edge import EdgeGPT

    gpt = EdgeGPT(exported_path(folder, task, mode), num_threads=threads)
    prompt = [int(token) for token in task.prompt()]

    def once():
        gpt.reset()
        began = time.perf_counter()
        gpt.prefill(prompt[:-1])
        token = int(np.argmax(gpt.decode(prompt[-1])))
        times = [time.perf_counter()]
        for _ in range(task.new_tokens - 1):
            token = int(np.argmax(gpt.decode(token)))
            times.append(time.perf_counter())
        return {
            "first_token_seconds": times[0] - began,
            "decode_seconds": float(np.median(np.diff(times))),
        }

    return lambda count: [once() for _ in range(count)]


def exported_path(folder, task, mode):
    return Path(folder) / f"gpt2-small-{task.context_length}-{mode}.litertlm"


def export(task, folder, modes):
    """Build the model of the peers' weights and export it; return bytes by mode.

    A contender, so that TensorFlow's memory goes with its process.
    """
    import gpt_tf
    from gpt_tf.export.litertlm import export_litertlm

    def once():
        model = gpt_tf_model(task)
        weights = peers.random_weights(task)
        names = ["tokens", "positions"]
        for layer in range(task.num_layers):
            for part in ("norm_1", "qkv", "out", "norm_2", "up", "down"):
                names += [f"{part}_{layer}", f"{part}_bias_{layer}"]
        names += ["norm", "norm_bias"]
        model.set_weights([weights[name] for name in names])
        # Any tokenizer will do: what is measured are ids.
        tokenizer = gpt_tf.BPETokenizer.train(["nothing"], 257)
        for mode in modes:
            path = exported_path(folder, task, mode)
            if not path.is_file():
                export_litertlm(model, tokenizer, path, mode)

    began = time.perf_counter()
    once()
    seconds = time.perf_counter() - began
    return lambda count: [seconds] * count


def floors(task, folder, modes, threads, depth):
    """Return what a step behind so many tokens reads, and its floor, by mode.

    Weights are read once, and keys and values of all positions.
    """
    from gpt_tf.artifacts import check_file_manifest

    found, width = {}, task.num_layers * task.embedding_dim
    for mode in modes:
        manifest = check_file_manifest(exported_path(folder, task, mode))
        weights = manifest["verification"]["parameter_bytes"]
        # Of the position table a token reads one row.
        wide = 4 if mode == "float32" else 1
        weights -= task.context_length * task.embedding_dim * wide
        cache = 2 * 4 * width * depth
        rate = read_rate(weights + cache, threads)
        found[mode] = {
            "weight_bytes": weights,
            "cache_bytes": cache,
            "read_bytes_per_second": rate,
            "tokens_per_second": rate / (weights + cache),
        }
    return found


def print_shares(rows, floor):
    """Print how much of its floor each of our modes reaches."""
    for row, mode in zip(rows, floor, strict=False):
        if "tokens_per_second" in row:
            row["share_of_floor"] = (
                row["tokens_per_second"] / floor[mode]["tokens_per_second"]
            )
            console.print(
                f"  {row['name']}: {row['share_of_floor']:.0%} of what reading "
                f"{floor[mode]['weight_bytes'] / 1e6:.0f} + "
                f"{floor[mode]['cache_bytes'] / 1e6:.0f} MB at "
                f"{floor[mode]['read_bytes_per_second'] / 1e9:.1f} GB/s allows"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--depths", type=int, nargs="*", default=[512, 960])
    parser.add_argument("--folder", type=Path, help="keeps the models")
    parser.add_argument("--all", action="store_true", help="the slow peers too")
    arguments = parser.parse_args()
    task = Task(prompt_tokens=64, new_tokens=64)
    folder = arguments.folder or Path(tempfile.gettempdir()) / "gpt-tf-peers"
    folder.mkdir(parents=True, exist_ok=True)
    print_machine()
    console.print("exporting the files")
    fitted = dataclasses.replace(
        task, context_length=task.prompt_tokens + task.new_tokens
    )
    for one, modes in ((task, MODES), (fitted, MODES[:1])):
        take_turns([Contender("export", export, (one, folder, modes))], 1, 1, 1)
    report = {}
    for threads in arguments.threads:
        report[threads] = measure(task, fitted, folder, threads, arguments)
    finish(
        "decode",
        {
            "task": dataclasses.asdict(task),
            "file_bytes": {
                mode: exported_path(folder, task, mode).stat().st_size for mode in MODES
            },
            "threads": report,
        },
    )


def measure(task, fitted, folder, threads, arguments):
    depths = [task.prompt_tokens, *arguments.depths]
    floor = {
        depth: floors(task, folder, MODES, threads, depth + task.new_tokens // 2)
        for depth in depths
    }
    contenders = [
        peers.contender(f"gpt_tf {mode}", gpt_tf_edge, task, threads, folder, mode)
        for mode in MODES
    ]
    for name, make in peers.PEERS.items():
        if arguments.all or name in QUICK_PEERS:
            contenders.append(peers.contender(name, make, task, threads, folder))
    whole = len(contenders)
    name = f"dynamic_int8, cache of {fitted.context_length}"
    mine, theirs = f"gpt_tf {name}", f"LiteRT-LM {name}"
    contenders.append(
        peers.contender(mine, gpt_tf_edge, fitted, threads, folder, "dynamic_int8")
    )
    for name, one in (("LiteRT-LM dynamic_int8", task), (theirs, fitted)):
        path = exported_path(folder, one, "dynamic_int8")
        contenders.append(
            peers.contender(name, peers.litert_lm, one, threads, folder, path)
        )
    rows = rows_of(contenders, arguments.rounds)
    # At equal capacity ours is the one with that capacity.
    speeds = {row["name"]: row.get("tokens_per_second") for row in rows}
    if speeds[theirs]:
        rows[-1]["ours_over_this"] = speeds[mine] / speeds[theirs]
    for depth in depths:  # of both times: others on the host can only take from it
        again = floors(task, folder, MODES, threads, depth + task.new_tokens // 2)
        for mode in MODES:
            if (
                again[mode]["tokens_per_second"]
                > floor[depth][mode]["tokens_per_second"]
            ):
                floor[depth][mode] = again[mode]
    print_shares(rows, floor[task.prompt_tokens])
    compared = contenders[:whole] + contenders[-2:-1]
    by_depth = {}
    for depth in arguments.depths:
        deep = [at_depth(one, depth) for one in compared]
        by_depth[depth] = rows_of(deep, arguments.rounds)
        print_shares(by_depth[depth], floor[depth])
    return {"floors": floor, "results": rows, "depths": by_depth}


def at_depth(contender, depth):
    """Return a contender that continues a prompt of so many tokens by 32."""
    make, (task, *others) = contender.arguments
    task = dataclasses.replace(task, prompt_tokens=depth, new_tokens=32)
    return dataclasses.replace(contender, arguments=(make, (task, *others)))


def rows_of(contenders, rounds):
    """Measure contenders in turn; return their rows, compared with the first."""
    results = take_turns(contenders, rounds, 1, warm_up=1)
    rows = [peers.summary(measured) for measured in results]
    for row in rows[1:]:
        if "tokens_per_second" in row:
            ours = rows[0]["tokens_per_second"]
            row["ours_over_this"] = ours / row["tokens_per_second"]
            row["sooner_by"] = row["first_token_ms"] / rows[0]["first_token_ms"]
    return rows


if __name__ == "__main__":
    main()
