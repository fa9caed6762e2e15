"""The time of a GPT training step on many accelerators, from sizes and data sheets.

Roofline products, ring all-reduces on two levels of network, and pipelines that run
event by event. The formulas stand in README.md. A cost is an array of four
numbers of seconds: compute, tensor parallelism, sequence parallelism, calls.
"""

import dataclasses
import functools
import itertools
import math

import numpy as np

KINDS = ("data", "pipeline", "tensor", "sequence")


class LayoutError(ValueError):
    """A layout that does not divide, or does not fit into memory."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A GPT-2-like model: pre-norm blocks, a feed-forward part 4 times as wide."""

    num_layers: int
    embedding_dim: int
    num_heads: int
    vocab_size: int
    context_length: int

    @property
    def block_parameters(self):
        return 12 * self.embedding_dim**2 + 13 * self.embedding_dim

    @property
    def parameters(self):
        tables = (self.vocab_size + self.context_length) * self.embedding_dim
        return self.num_layers * self.block_parameters + tables

    def step_flops(self, batch, recompute=False):
        """Forward and twice that backward: Narayanan et al. 2021, equation 3."""
        width, length = self.embedding_dim, self.context_length
        block = 24 * width**2 + 4 * length * width
        passes = 4 if recompute else 3
        head = 2 * self.vocab_size * width
        return batch * length * (passes * self.num_layers * block + 3 * head)


@dataclasses.dataclass(frozen=True)
class Link:
    """A connection as one device sees it: bytes per second, seconds of latency."""

    bandwidth: float
    latency_s: float = 0.0

    def ring_s(self, size_bytes, members):
        """Time a ring all-reduce: 2(k-1) messages of a k-th each."""
        each = size_bytes / members / self.bandwidth + self.latency_s
        return 2 * (members - 1) * each


@dataclasses.dataclass(frozen=True)
class Machine:
    """Accelerators in nodes; all but `matrix_share` comes from data sheets."""

    name: str
    peak_flops: float
    memory_bandwidth: float
    memory_bytes: float
    devices_per_node: int
    node: Link
    network: Link
    matrix_share: float = 1.0  # of the peak, that a large matrix product reaches
    call_overhead_s: float = 50e-6
    value_bytes: int = 2
    optimizer_bytes: int = 12  # per parameter: a float32 copy and two moments
    has_bubble: bool = True  # to see what the simulated pipeline adds

    def product_s(self, rows, inner, columns):
        """Time a matrix product: its operations, and its operands' way from memory."""
        values = rows * inner + inner * columns + rows * columns
        traffic = values * self.value_bytes / self.memory_bandwidth
        return 2 * rows * inner * columns / self.reached_flops + traffic

    @property
    def reached_flops(self):
        return self.peak_flops * self.matrix_share

    def all_reduce_s(self, size_bytes, members, stride=1):
        """Time an all-reduce of devices `stride` apart: in nodes, then between."""
        inside = max(1, min(members, self.devices_per_node // stride))
        between = self.network.ring_s(size_bytes / inside, math.ceil(members / inside))
        return self.node.ring_s(size_bytes, inside) + between

    def link(self, members, stride):
        inside = members * stride <= self.devices_per_node
        return self.node if inside else self.network


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh of devices, innermost first: tensor, sequence, data, pipeline."""

    data: int = 1
    pipeline: int = 1
    tensor: int = 1
    sequence: int = 1
    micro_batches: int = 1
    chunks: int = 1  # of a device; more than 1 are interleaved
    gpipe: bool = False  # all forward passes first, else 1F1B
    recompute: bool = False  # blocks keep their input only, and run forward again
    overlap: bool = True  # gradients travel during the last backward pass
    ring: bool = False  # keys and values travel while attention is computed
    balance: bool = False  # the last stage, which has the head, has fewer blocks

    @property
    def devices(self):
        return self.data * self.pipeline * self.tensor * self.sequence

    @property
    def stages(self):
        return self.pipeline * self.chunks

    def __str__(self):
        sizes = {kind: getattr(self, kind) for kind in KINDS}
        sizes |= {"chunks": self.chunks, "micro-batches": self.micro_batches}
        parts = [f"{name} {size}" for name, size in sizes.items() if size > 1]
        return ", ".join(parts + ["recompute"] * self.recompute) or "one device"


def device_order(layout, device):
    """List a device's work in order: `(is_forward, micro_batch, chunk)`.

    Reference: GPipe, Huang et al. 2019; 1F1B and interleaved 1F1B, Narayanan et al.
    2021, section 2.2.
    """
    pipeline, chunks = layout.pipeline, layout.chunks
    total = layout.micro_batches * chunks
    forward = []
    for k in range(total):  # `pipeline` micro-batches of a chunk, then the next chunk
        group, place = divmod(k, pipeline * chunks)
        if chunks == 1:
            forward.append((k, 0))
        else:
            forward.append((group * pipeline + place % pipeline, place // pipeline))
    backward = [(m, chunks - 1 - c) for m, c in forward]
    ahead = total if layout.gpipe else pipeline - device - 1
    if chunks > 1:
        ahead = 2 * (pipeline - device - 1) + (chunks - 1) * pipeline
    ahead = min(ahead, total)
    order = [(True, *work) for work in forward[:ahead]]
    for index in range(total - ahead):
        order += [(True, *forward[ahead + index]), (False, *backward[index])]
    return order + [(False, *work) for work in backward[total - ahead :]]


@functools.lru_cache(maxsize=4096)
def in_flight(layout, device):
    """Count the most micro-batches, times chunks, that a device keeps at once."""
    order = device_order(layout, device)
    return int(max(np.cumsum([1 if is_forward else -1 for is_forward, *_ in order])))


@functools.lru_cache(maxsize=512)
def run_pipeline(layout, forward_s, backward_s, send_s):
    """Run a schedule event by event; return when each device ends."""
    stages, pipeline = layout.stages, layout.pipeline
    orders = [device_order(layout, device) for device in range(pipeline)]
    ended, clock, place = {}, [0.0] * pipeline, [0] * pipeline
    while any(p < len(order) for p, order in zip(place, orders, strict=True)):
        for device, order in enumerate(orders):
            while place[device] < len(order):
                is_forward, micro_batch, chunk = order[place[device]]
                stage = chunk * pipeline + device
                if is_forward:
                    before = (True, micro_batch, stage - 1)
                elif stage == stages - 1:
                    before = (True, micro_batch, stage)
                else:
                    before = (False, micro_batch, stage + 1)
                ready = 0.0
                if before[2] >= 0:
                    if before not in ended:
                        break
                    sent = before[2] != stage and pipeline > 1
                    ready = ended[before] + sent * send_s
                cost = (forward_s if is_forward else backward_s)[stage]
                clock[device] = max(clock[device], ready) + cost
                ended[is_forward, micro_batch, stage] = clock[device]
                place[device] += 1
    return tuple(clock)


@functools.lru_cache(maxsize=4096)
def split_layers(model, stages, balance):
    """Spread blocks over stages; balanced, the last has fewer, for it has the head."""
    if stages == 1:
        return (model.num_layers,)

    def slowest(n):
        others = math.ceil((model.num_layers - n) / (stages - 1))
        return max(others, n + head)

    head = model.vocab_size / (12 * model.embedding_dim + 2 * model.context_length)
    last = model.num_layers // stages
    if balance:
        last = min(range(1, last + 1), key=slowest)
    least, more = divmod(model.num_layers - last, stages - 1)
    return (*(least + (stage < more) for stage in range(stages - 1)), last)


def block_activations(model, machine, layout, rows):
    """Bytes kept of `rows` positions: Korthikanti et al. 2022, equation 2."""
    width = model.embedding_dim
    split = 24 + 5 * model.num_heads * model.context_length / width
    return rows * width * (10 + split / layout.tensor) * machine.value_bytes / 2


@functools.lru_cache(maxsize=65536)
def block_costs(model, machine, layout, sequences):
    """Cost a block's forward and backward pass of a micro-batch."""
    width, length = model.embedding_dim, model.context_length
    rows = sequences * length // layout.sequence
    part, wide = width / layout.tensor, 4 * width / layout.tensor
    attention = 4 * rows * length * part / machine.reached_flops
    kept = block_activations(model, machine, layout, rows)
    compute = attention + 2 * kept / machine.memory_bandwidth
    for inner, columns in (
        *((width, 3 * part), (part, width)),
        *((width, wide), (wide, width)),
    ):
        compute += machine.product_s(rows, inner, columns)
    summed = rows * width * machine.value_bytes
    tensor = 2 * machine.all_reduce_s(summed, layout.tensor)
    # Keys and values are gathered; backward again, and their gradients scattered.
    values = 2 * sequences * length * part * machine.value_bytes
    whole = machine.all_reduce_s(values, layout.sequence, layout.tensor)
    gather, back = whole / 2, 1.5 * whole
    if layout.ring:
        hidden = attention * (1 - 1 / layout.sequence)
        gather, back = max(0.0, gather - hidden), max(0.0, back - 2 * hidden)
    forward = np.array([compute, tensor, gather, 0.0])
    backward = np.array([2 * compute, tensor, back, 0.0])
    return forward, backward + forward if layout.recompute else backward


@functools.lru_cache(maxsize=65536)
def stage_costs(model, machine, layout, sequences):
    """Cost each stage's forward and backward pass of a micro-batch: two lists."""
    rows = sequences * model.context_length // layout.sequence
    width, vocab = model.embedding_dim, model.vocab_size / layout.tensor
    logits = 2 * 4 * rows * vocab / machine.memory_bandwidth  # float32
    compute = machine.product_s(rows, width, vocab) + logits
    tensor = machine.all_reduce_s(rows * width * machine.value_bytes, layout.tensor)
    heads = np.array([[compute, 0, 0, 0], [2 * compute, tensor, 0, 0]])
    call = np.array([0, 0, 0, machine.call_overhead_s])
    layers = split_layers(model, layout.stages, layout.balance)
    costs = []
    for block, head in zip(
        block_costs(model, machine, layout, sequences), heads, strict=True
    ):
        stages = [count * block + call for count in layers]
        costs.append([*stages[:-1], stages[-1] + head])
    return costs


def device_sizes(model, layout):
    """Return each pipeline device's blocks and parameters."""
    split = split_layers(model, layout.stages, layout.balance)
    layers = [
        sum(split[device :: layout.pipeline]) for device in range(layout.pipeline)
    ]
    counts = [count * model.block_parameters for count in layers]
    counts[0] += (model.vocab_size + model.context_length) * model.embedding_dim
    if layout.pipeline > 1:  # the tied table stands on the first and the last
        counts[-1] += model.vocab_size * model.embedding_dim
    return layers, [count / layout.tensor for count in counts]


def memory_bytes(model, machine, layout, batch):
    """Return the fullest device's bytes: weights, gradients, Adam, activations."""
    sequences = batch // layout.data // layout.micro_batches
    rows = sequences * model.context_length // layout.sequence
    block = block_activations(model, machine, layout, rows)
    kept = rows * model.embedding_dim * machine.value_bytes
    most = 0
    for device, (layers, count) in enumerate(
        zip(*device_sizes(model, layout), strict=True)
    ):
        at_once = in_flight(_schedule(layout), device) * layers / layout.chunks
        used = at_once * kept + block if layout.recompute else at_once * block
        if device == layout.pipeline - 1:
            used += 4 * rows * model.vocab_size / layout.tensor
        used += count * (2 * machine.value_bytes + machine.optimizer_bytes)
        most = max(most, used)
    return most


def _schedule(layout):
    """Return the part of a layout that its pipeline's order depends on."""
    names = ("pipeline", "micro_batches", "chunks", "gpipe")
    return Layout(**{name: getattr(layout, name) for name in names})


def check(model, machine, layout, batch):
    """Raise a LayoutError for what does not divide or does not fit."""
    parts = batch // layout.data
    if (
        model.num_heads % layout.tensor
        or model.context_length % layout.sequence
        or layout.stages > model.num_layers
        or batch % layout.data
        or parts % layout.micro_batches
        or (layout.chunks > 1 and layout.micro_batches % layout.pipeline)
    ):
        raise LayoutError(f"{layout} does not divide {model} and {batch} sequences.")
    needed = memory_bytes(model, machine, layout, batch)
    if needed > 0.9 * machine.memory_bytes:
        raise LayoutError(f"{layout} needs {needed / 1e9:.0f} GB a device.")


def predict(model, machine, layout, batch, bound_only=False):
    """Predict a step of `batch` sequences, as the device sees it that ends last.

    Returns:
        A dict of seconds, whose parts add up to `step_s`, of `flops_share` of the
        peak, of `hardware_flops` with what is recomputed, and of `memory_bytes`.
        With `bound_only`, seconds that the step cannot be shorter than.

    Raises:
        LayoutError: The layout does not divide or does not fit.
    """
    check(model, machine, layout, batch)
    sequences = batch // layout.data // layout.micro_batches
    forward, backward = stage_costs(model, machine, layout, sequences)
    layers, parameters = device_sizes(model, layout)
    stride = layout.devices // layout.pipeline
    link = machine.link(layout.pipeline, stride)
    table = model.vocab_size * model.embedding_dim / layout.tensor * machine.value_bytes
    busy, shown, updates = [], [], []
    for device, count in enumerate(parameters):
        own = [
            *forward[device :: layout.pipeline],
            *backward[device :: layout.pipeline],
        ]
        busy.append(layout.micro_batches * sum(own))
        gradients = machine.all_reduce_s(
            count * machine.value_bytes, layout.data * layout.sequence, layout.tensor
        )
        if layout.overlap:
            # The last block's gradients are ready when there is nothing to hide them.
            window = sum(cost.sum() for cost in backward[device :: layout.pipeline])
            gradients -= min(gradients, window) * (1 - 1 / max(layers[device], 1))
        if layout.pipeline > 1 and device in (0, layout.pipeline - 1):
            gradients += link.ring_s(table, 2)
        shown.append(gradients)
        # The update reads gradients and state, and writes state and weights.
        moved = count * 2 * (machine.optimizer_bytes + machine.value_bytes)
        updates.append(moved / machine.memory_bandwidth)
    works = [work.sum() for work in busy]
    if bound_only:
        return max(map(sum, zip(works, shown, updates, strict=True)))
    ends = [sum(works) / layout.pipeline] * layout.pipeline
    if machine.has_bubble:
        values = sequences * model.context_length * model.embedding_dim
        # Each device of a tensor group sends its part: "scatter/gather", section 4.1.
        part = values * machine.value_bytes / layout.sequence / layout.tensor
        ends = run_pipeline(
            _schedule(layout),
            tuple(float(cost.sum()) for cost in forward),
            tuple(float(cost.sum()) for cost in backward),
            part / link.bandwidth + link.latency_s,
        )
    steps = [sum(parts) for parts in zip(ends, shown, updates, strict=True)]
    last = int(np.argmax(steps))
    names = ("compute_s", "tensor_s", "sequence_s", "overhead_s")
    done = model.step_flops(batch) / layout.devices / steps[last]
    return {
        "step_s": steps[last],
        **dict(zip(names, map(float, busy[last]), strict=True)),
        "bubble_s": max(0.0, ends[last] - works[last]),
        "data_s": shown[last],
        "optimizer_s": updates[last],
        "flops_share": done / machine.peak_flops,
        "hardware_flops": model.step_flops(batch, layout.recompute)
        / layout.devices
        / steps[last],
        "memory_bytes": memory_bytes(model, machine, layout, batch),
    }


def all_layouts(devices, batch, kinds=KINDS):
    """Yield layouts of so many devices that use these kinds only.

    1F1B stands for GPipe, whose time it has with less memory.
    """
    sizes = [d for d in range(1, devices + 1) if devices % d == 0]
    for data, pipeline, tensor in itertools.product(sizes, repeat=3):
        sequence, left = divmod(devices, data * pipeline * tensor)
        mesh = dict(zip(KINDS, (data, pipeline, tensor, sequence), strict=True))
        if left or any(mesh[kind] > 1 for kind in KINDS if kind not in kinds):
            continue
        parts = [m for m in range(1, batch // data + 1) if batch // data % m == 0]
        for micro_batches, recompute, ring, chunks in itertools.product(
            parts,
            (False, True),
            (False, True) if sequence > 1 else (False,),
            (1, 2, 4) if pipeline > 1 else (1,),
        ):
            yield Layout(
                **mesh,
                micro_batches=micro_batches,
                chunks=chunks,
                recompute=recompute,
                ring=ring,
                balance=pipeline > 1,
            )


def best_layout(model, machine, devices, batch, kinds=KINDS):
    """Return the fastest layout and its prediction, or None where nothing fits."""
    bounds = []
    for layout in all_layouts(devices, batch, kinds):
        try:
            bounds.append((predict(model, machine, layout, batch, True), layout))
        except LayoutError:
            continue
    best = None
    for bound, layout in sorted(bounds, key=lambda pair: pair[0]):
        if best and bound >= best[1]["step_s"]:
            break
        found = predict(model, machine, layout, batch)
        if best is None or found["step_s"] < best[1]["step_s"]:
            best = layout, found
    return best
