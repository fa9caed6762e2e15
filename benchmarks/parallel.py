"""A training step divided among devices in every way, beside the undivided one.

    python benchmarks/parallel.py [--rounds N] [--only mirrored,pipeline]

The devices are logical ones of the same cores, so nothing can become faster here: what
is measured is what the division costs. All contenders train the same model on the same
global batch, by `fit`, and take turns; the undivided model takes part in every group.
Workers are processes on this machine.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import (
    Contender,
    console,
    finish,
    gpt_tf_model,
    print_machine,
    take_turns,
)
from training import Shape, fit_by_steps, token_ids

SHAPE = Shape(6, 8, 512, 128, 8, 10000)
MICRO_BATCHES = 4
FLOAT = 4  # bytes


@dataclasses.dataclass(frozen=True)
class Way:
    """One way of dividing the work.

    Args:
        name: Its kind: a strategy, `pipeline`, or an axis of a mesh.
        devices: Number of devices in all.
        workers: Number of processes.
        xla: Whether XLA compiles the steps.
        schedule: Of a pipeline.
        parts: Sizes of a mesh's axes.
    """

    name: str
    devices: int = 1
    workers: int = 1
    xla: bool = True
    schedule: str | None = None
    parts: tuple = ()

    @property
    def label(self):
        if self.name == "one_device":
            return "one device" + ("" if self.xla else ", without XLA")
        if self.name == "pipeline":
            return f"pipeline, {self.devices} stages, {self.schedule}"
        if self.name == "multi_worker":
            return f"{self.workers} worker{'s' * (self.workers > 1)}"
        if self.name == "mirrored":
            devices = f"{self.devices} device{'s' * (self.devices > 1)}"
            return f"mirrored, {devices}" + ("" if self.xla else ", without XLA")
        axes = zip(("batch", "model", "sequence"), self.parts, strict=True)
        return "mesh, " + " x ".join(f"{axis} {n}" for axis, n in axes if n > 1)


def mesh(name, batch=1, model=1, sequence=1):
    return Way(
        name, batch * model * sequence, xla=False, parts=(batch, model, sequence)
    )


ONE = Way("one_device")
PLAIN = Way("one_device", xla=False)
# Each group is measured in turns, beside its own undivided model.
GROUPS = {
    "mirrored": [
        ONE,
        Way("mirrored", 1),
        Way("mirrored", 2),
        Way("mirrored", 4),
        PLAIN,
        Way("mirrored", 2, xla=False),
    ],
    "pipeline": [
        ONE,
        Way("pipeline", 2, schedule="1f1b"),
        Way("pipeline", 2, schedule="gpipe"),
        Way("pipeline", 4, schedule="1f1b"),
    ],
    "mesh": [
        PLAIN,
        mesh("batch", batch=2),
        mesh("tensor", model=2),
        mesh("sequence", sequence=2),
        mesh("tensor", model=4),
        mesh("batch_tensor", batch=2, model=2),
    ],
    "workers": [ONE, Way("multi_worker", 1, 1), Way("multi_worker", 2, 2)],
}


# What a contender does in its own process


def divided_fit(way, shape, facts):
    """Build the model in a way and return what trains it; write down its memory."""
    import gpt_tf

    if way.name == "multi_worker":
        return _with_workers(way, shape, facts)
    if way.devices > 1:
        gpt_tf.split_cpu(way.devices)
    model = _compiled(_built(way, shape), way)
    return _fit(model, shape, facts)


def _built(way, shape):
    import gpt_tf

    if way.name == "pipeline":
        with gpt_tf.Pipeline(way.devices, MICRO_BATCHES, way.schedule).scope():
            return gpt_tf_model(shape)
    if way.parts:
        return gpt_tf.MeshGPT(gpt_tf_model(shape), gpt_tf.make_mesh(*way.parts))
    with gpt_tf.make_strategy(way.name).scope():
        return gpt_tf_model(shape)


def _compiled(model, way):
    with model.distribute_strategy.scope():
        model.compile(jit_compile=way.xla)
    return model


def _dataset(model, shape):
    import gpt_tf

    windows = gpt_tf.Windows(token_ids(shape), shape.context_length, shape.batch_size)
    strategy = model.distribute_strategy
    if strategy.cluster_resolver is None:
        return windows.dataset()
    return strategy.distribute_datasets_from_function(
        lambda context: windows.dataset(
            num_shards=context.num_input_pipelines, shard=context.input_pipeline_id
        )
    )


def _fit(model, shape, facts):
    import tf_keras

    repeat = fit_by_steps(model, _dataset(model, shape), tf_keras)

    def measured(count):
        seconds = repeat(count)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        content = {"state_bytes": _state_bytes(model), "peak_bytes": peak}
        Path(facts).write_text(json.dumps(content), "utf-8")
        return seconds

    return measured


def _state_bytes(model):
    """Return bytes of weights, gradients and the optimiser's moments by device."""
    from tensorflow.experimental import dtensor

    found = {}
    weights = {id(v) for v in model.trainable_weights}
    for variable in [*model.weights, *model.optimizer.variables]:
        copies = 2 if id(variable) in weights else 1  # with its gradient
        if isinstance(variable, dtensor.DVariable):
            parts = dtensor.unpack(variable.read_value())
            places = [(part.device, part.shape.num_elements()) for part in parts]
        else:
            replicas = getattr(variable, "values", [variable])
            places = [(v.device, v.shape.num_elements()) for v in replicas]
        for device, size in places:
            found[device] = found.get(device, 0) + copies * size * FLOAT
    return found


# Workers: the first one is the contender, the others are told how much to do.


def _with_workers(way, shape, facts):
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("localhost", 0)))
            for _ in range(way.workers)
        ]
        addresses = [f"localhost:{one.getsockname()[1]}" for one in sockets]

    def environment(index):
        task = {"type": "worker", "index": index}
        return json.dumps({"cluster": {"worker": addresses}, "task": task})

    others = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(vars_of(way, shape))],
            env={**os.environ, "TF_CONFIG": environment(index)},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for index in range(1, way.workers)
    ]
    os.environ["TF_CONFIG"] = environment(0)
    repeat = _fit(_compiled(_built(way, shape), way), shape, facts)

    def together(count):
        for other in others:
            print(count, file=other.stdin, flush=True)
        return repeat(count)

    return together


def vars_of(way, shape):
    return {"way": dataclasses.asdict(way), "shape": dataclasses.asdict(shape)}


def work(text):
    """Be another worker: train as often as the first one says."""
    given = json.loads(text)
    way = Way(**{**given["way"], "parts": tuple(given["way"]["parts"])})
    shape = Shape(**given["shape"])
    repeat = _fit(_compiled(_built(way, shape), way), shape, os.devnull)
    for line in sys.stdin:
        repeat(int(line))
    # The first worker is gone; saying goodbye to it would wait for an answer.
    os._exit(0)


# What follows from sizes alone


def communicated_bytes(way, shape):
    """Return the bytes that the busiest device sends in a step.

    A sum over `k` devices by a ring sends `2 (k - 1) / k` times the tensor.
    """
    width, vocab = shape.embedding_dim, shape.vocab_size
    activations = FLOAT * shape.tokens * width
    weights = FLOAT * (
        shape.num_layers * (12 * width * width + 13 * width)
        + (vocab + shape.context_length + 2) * width
    )
    k = way.workers if way.name == "multi_worker" else way.devices
    ring = 2 * (k - 1) / k
    if way.name in ("mirrored", "multi_worker", "batch"):
        return ring * weights
    if way.name == "pipeline":
        boundaries = min(2, k - 1)  # activations forward, their gradients back
        return boundaries * activations + (FLOAT * vocab * width if k > 1 else 0)
    if way.name == "sequence":
        # Keys and values of all positions forward, the sums of their gradients back.
        gathered = shape.num_layers * 2 * activations
        return ring * weights + (ring / 2 + ring) * gathered
    if way.name in ("tensor", "batch_tensor"):
        batch, model, _ = way.parts
        sums = 4 * shape.num_layers + 2  # two a block and way; the embedding, the head
        within = 2 * (model - 1) / model * sums * activations / batch
        return within + 2 * (batch - 1) / batch * weights / model
    return 0.0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps in a turn")
    parser.add_argument("--only", help="groups, apart by commas")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker)
        return
    only = arguments.only.split(",") if arguments.only else list(GROUPS)
    print_machine()
    report = {"shape": dataclasses.asdict(SHAPE), "rows": []}
    for name in only:
        console.print(f"\n{name}: {SHAPE}")
        rows = measure_group(GROUPS[name], arguments)
        report["rows"] += [{"group": name, **row} for row in rows]
    finish("parallel", report, keep=not arguments.only)


def measure_group(ways, arguments):
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / str(index) for index in range(len(ways))]
        results = take_turns(
            [
                Contender(way.label, divided_fit, (way, SHAPE, str(path)))
                for way, path in zip(ways, paths, strict=True)
            ],
            arguments.rounds,
            arguments.steps,
        )
        facts = [
            json.loads(path.read_text("utf-8")) if path.exists() else {}
            for path in paths
        ]
    plain = next((m for w, m in zip(ways, results, strict=True) if w == PLAIN), None)
    rows = []
    for way, measured, fact in zip(ways, results, facts, strict=True):
        if measured.failure:
            rows.append({"label": way.label, "failure": measured.failure})
            continue
        same = results[0] if way.xla or plain is None else plain
        rows.append(
            {
                "label": way.label,
                "way": way.name,
                "devices": way.devices,
                "workers": way.workers,
                "micro_batches": MICRO_BATCHES if way.name == "pipeline" else 1,
                "schedule": way.schedule,
                "xla": way.xla,
                "step_ms": measured.median_ms,
                "p10_ms": measured.percentile_ms(10),
                "p95_ms": measured.percentile_ms(95),
                "of_one_device": measured.median_ms / same.median_ms,
                # Both run in the same seconds, so the ratio of a turn is the quieter.
                "of_one_device_p10": measured.percentile_ms(10)
                / same.percentile_ms(10),
                "tokens_per_second": SHAPE.tokens / measured.median_ms * 1e3,
                "communicated_bytes_per_step": communicated_bytes(way, SHAPE),
                "memory_bytes_per_device": max(fact["state_bytes"].values()),
                "peak_bytes_of_process": fact["peak_bytes"],
                "first_seconds": measured.first_seconds,
            }
        )
    return rows


if __name__ == "__main__":
    main()
