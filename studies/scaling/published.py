"""Published measurements, and what the model says of the same runs.

One constant a machine, the share of the peak that products reach, is fitted on rows
that are marked; all others are held out.
"""

import dataclasses

import numpy as np
from model import Layout, Link, Machine, Model, predict, run_pipeline

# From data sheets; latencies and the overhead of a call are assumptions.
A100 = Machine(
    name="A100 80 GB, NVLink, InfiniBand 200 Gbit/s a device",
    peak_flops=312e12,
    memory_bandwidth=2.039e12,
    memory_bytes=80e9,
    devices_per_node=8,
    node=Link(300e9, 3e-6),
    network=Link(25e9, 5e-6),
)
A100_ETHERNET = dataclasses.replace(
    A100,
    name="A100 80 GB, NVLink, Ethernet 100 Gbit/s a node",
    network=Link(100e9 / 8 / 8, 30e-6),
)
DGX_2H = Machine(
    name="V100 32 GB, NVSwitch, InfiniBand 100 GB/s a node of 16",
    peak_flops=130e12,
    memory_bandwidth=0.9e12,
    memory_bytes=32e9,
    devices_per_node=16,
    node=Link(150e9, 3e-6),
    network=Link(100e9 / 16, 5e-6),
)

# Layers, width, heads, tensor, pipeline, batch, devices, TFLOP/s a device; then the
# sequences of a micro-batch and the chunks of a device, for table 1 from the authors'
# examples/sc21/run_table_1.sh. Vocabulary 51200, context 2048.
MEGATRON_2021 = {
    "table 1": (
        (24, 2304, 24, 1, 1, 512, 32, 137, 16, 1),
        (30, 3072, 32, 2, 1, 512, 64, 138, 16, 1),
        (36, 4096, 32, 4, 1, 512, 128, 142, 16, 1),
        (40, 6144, 48, 8, 1, 1024, 256, 135, 8, 1),
        (48, 8192, 64, 8, 2, 1536, 512, 138, 4, 1),
        (60, 10240, 80, 8, 4, 1792, 1024, 140, 2, 3),
        (80, 12288, 96, 8, 8, 2304, 1536, 148, 2, 2),
        (96, 16384, 128, 8, 16, 2160, 1920, 155, 1, 2),
        (105, 20480, 128, 8, 35, 2520, 2520, 163, 1, 3),
        (128, 25600, 160, 8, 64, 3072, 3072, 163, 1, 1),
    ),
    "table 2": (
        (96, 12288, 96, 8, 12, 1536, 384, 153, 1, 1),
        (96, 12288, 96, 8, 12, 1536, 768, 149, 1, 1),
        (96, 12288, 96, 8, 12, 1536, 1536, 141, 1, 1),
        (105, 20480, 128, 8, 35, 2240, 560, 171, 1, 1),
        (105, 20480, 128, 8, 35, 2240, 1120, 167, 1, 1),
        (105, 20480, 128, 8, 35, 2240, 2240, 159, 1, 1),
    ),
}


def megatron_2021(share, machine=A100):
    """Yield source, name, published and predicted TFLOP/s, and whether it is fitted."""
    machine = dataclasses.replace(machine, matrix_share=share)
    for place, table in MEGATRON_2021.items():
        for *sizes, batch, devices, tflops, sequences, chunks in table:
            layers, width, heads, tensor, pipeline = sizes
            data = devices // tensor // pipeline
            layout = Layout(
                data=data,
                pipeline=pipeline,
                tensor=tensor,
                micro_batches=batch // data // sequences,
                chunks=chunks,
                recompute=True,
                overlap=pipeline == 1,  # the scripts reduce after a pipeline's end
            )
            model = Model(layers, width, heads, 51200, 2048)
            found = predict(model, machine, layout, batch)["hardware_flops"] / 1e12
            source = f"Narayanan et al. 2021, arXiv:2104.04473, {place}"
            name = f"{model.parameters / 1e9:.1f}B, {devices} devices"
            yield source, name, tflops, found, pipeline == 1


def megatron_2019(share):
    """The same for figure 5 and tables 7 and 8, relative to one device."""
    machine = dataclasses.replace(DGX_2H, matrix_share=share)
    shapes = ((40, 1536, 16), (54, 1920, 20), (64, 2304, 24), (72, 3072, 32))
    models = [Model(*shape, 51200, 1024) for shape in shapes]

    def run(model, data, tensor):
        layout = Layout(data=data, tensor=tensor, recompute=True, overlap=False)
        return predict(model, machine, layout, 8 * data)

    one = run(models[0], 1, 1)
    flops, step = one["hardware_flops"], one["step_s"]
    source = "Shoeybi et al. 2019, arXiv:1909.08053"
    yield f"{source}, section 5.1", "1.2B, 1 device", 39, flops / 1e12, True
    for data, percents in {1: (None, 95, 82, 77), 64: (96, 83, 79, 74)}.items():
        for index, percent in enumerate(percents):
            if percent is not None:
                found = run(models[index], data, 2**index)["hardware_flops"] / flops
                name = f"weak, tensor {2**index}, data {data}"
                yield f"{source}, figure 5", name, percent / 100, found, False
    for heads, percent in ((16, 82), (24, 80)):
        model = dataclasses.replace(models[3], num_heads=heads)
        found = run(model, 1, 8)["hardware_flops"] / flops
        name = f"8.3B, {heads} heads, tensor 8"
        yield f"{source}, table 7", name, percent / 100, found, False
    for tensor, speedup in ((2, 1.64), (4, 2.34), (8, 2.98)):
        found = step / run(models[0], 1, tensor)["step_s"]
        yield f"{source}, table 8", f"1.2B, tensor {tensor}", speedup, found, False


def gpipe():
    """The same for GPipe's table 2, relative to 2 stages and 1 part: no constant."""

    def throughput(stages, parts):
        forward = 1 / stages / parts  # and as much again recomputed, twice it backward
        layout = Layout(pipeline=stages, micro_batches=parts, gpipe=True)
        times = (forward,) * stages, (3 * forward,) * stages
        return 1 / max(run_pipeline(layout, *times, 0.0))

    table = {
        1: {4: 1.07, 8: 1.3},
        4: {2: 1.7, 4: 3.2, 8: 4.8},
        32: {2: 1.8, 4: 3.4, 8: 6.3},
    }
    for parts, row in table.items():
        for stages, times in row.items():
            found = throughput(stages, parts) / throughput(2, 1)
            source = "Huang et al. 2019, arXiv:1811.06965, table 2"
            yield source, f"{stages} stages, {parts} parts", times, found, False


def fit_share(rows_of):
    """Find the share of the peak with the least squared error of the fitted rows."""

    def error(share):
        return sum((f / p - 1) ** 2 for _, _, p, f, fitted in rows_of(share) if fitted)

    low, high = 0.05, 1.0
    for _ in range(40):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if error(left) < error(right) else (left, high)
    return (low + high) / 2


def check_published():
    """Return fitted `shares`, all `rows`, and `held_out` errors by source."""
    shares = {"A100": fit_share(megatron_2021), "V100": fit_share(megatron_2019)}
    found = [*megatron_2021(shares["A100"]), *megatron_2019(shares["V100"]), *gpipe()]
    names = ("source", "name", "published", "predicted", "fitted")
    rows = [dict(zip(names, row, strict=True)) for row in found]
    errors = {}
    for row in rows:
        row["error"] = row["predicted"] / row["published"] - 1
        if not row["fitted"]:
            errors.setdefault(row["source"], []).append(abs(row["error"]))
    held_out = {
        source: {"rows": len(e), "mean": float(np.mean(e)), "largest": max(e)}
        for source, e in errors.items()
    }
    return {"shares": shares, "rows": rows, "held_out": held_out}
