"""Predict the time of a GPT training step on 8 to 512 accelerators.

    python benchmarks/scaling_model.py

A simulation from model size, batch, layout and data sheets: roofline products,
ring collectives on two levels of network, and pipelines run event by event. It is
checked against published measurements, and against this machine's own where
`results/parallel.json` holds them. Formulas and limits: docs/scaling.md.
"""

import dataclasses
import functools
import itertools
import json
import math
import os

import numpy as np
from harness import RESULTS, console, print_table, save
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SCHEDULES = ("gpipe", "1f1b", "interleaved")
KINDS = ("data", "pipeline", "tensor", "sequence")


class LayoutError(ValueError):
    """A layout that cannot run, with the reason and the repair in one line."""


# What is trained, on what, and how it is laid out


@dataclasses.dataclass(frozen=True)
class Model:
    """A GPT-2-like model: pre-norm blocks, a feed-forward part 4 times as wide.

    Example:
        >>> round(Model(24, 2304, 24, 51200, 2048).parameters / 1e9, 1)
        1.7
    """

    num_layers: int
    embedding_dim: int
    num_heads: int
    vocab_size: int
    context_length: int

    @property
    def block_parameters(self):
        return 12 * self.embedding_dim**2 + 13 * self.embedding_dim

    @property
    def embedding_parameters(self):
        """The token table, which is also the head, and the position table."""
        return (self.vocab_size + self.context_length) * self.embedding_dim

    @property
    def parameters(self):
        return self.num_layers * self.block_parameters + self.embedding_parameters

    def step_flops(self, batch, recompute=False):
        """Count a step's floating-point operations in matrix products.

        Forward and twice that backward; attention counts the whole square. With
        `recompute`, the blocks run forward twice and this is the formula of
        Narayanan et al. 2021, equation 3.
        """
        width, length = self.embedding_dim, self.context_length
        block = 24 * width**2 + 4 * length * width
        head = 2 * self.vocab_size * width
        passes = 4 if recompute else 3
        return batch * length * (passes * self.num_layers * block + 3 * head)


@dataclasses.dataclass(frozen=True)
class Link:
    """A connection as one device sees it.

    Args:
        bandwidth: Bytes per second in one direction.
        latency_s: Seconds before the first byte.
    """

    bandwidth: float
    latency_s: float = 0.0

    def ring_s(self, size_bytes, members):
        """Time a ring all-reduce: 2(k-1) messages of a k-th each."""
        if members == 1:
            return 0.0
        steps = 2 * (members - 1)
        return steps * (size_bytes / members / self.bandwidth + self.latency_s)

    def send_s(self, size_bytes):
        return size_bytes / self.bandwidth + self.latency_s


@dataclasses.dataclass(frozen=True)
class Machine:
    """Accelerators in nodes. All but `matrix_share` comes from data sheets.

    Args:
        name: As it stands in tables.
        peak_flops: Of one device, per second, in the precision of training.
        memory_bandwidth: Of one device, bytes per second.
        memory_bytes: Of one device.
        devices_per_node: Devices that `node` connects.
        node: The link inside a node.
        network: The link between nodes, each device's part of it.
        matrix_share: Share of the peak that a large matrix product reaches, in
            (0, 1]. Smaller products reach less: their operands must be read.
        call_overhead_s: Seconds per call of a stage, once forward, once backward.
        value_bytes: Of a weight, a gradient and an activation.
        optimizer_bytes: Of the optimizer's state per parameter; Adam in mixed
            precision keeps a float32 copy and two moments.
        fused_attention: Whether scores never reach memory.
        memory_share: Of the memory that tensors may fill, in (0, 1].
        shared: Whether the devices are parts of one processor that computes for
            whichever is busy, so that an idle device costs nothing.
    """

    name: str
    peak_flops: float
    memory_bandwidth: float
    memory_bytes: float
    devices_per_node: int
    node: Link
    network: Link
    matrix_share: float = 1.0
    call_overhead_s: float = 0.0
    value_bytes: int = 2
    optimizer_bytes: int = 12
    fused_attention: bool = False
    memory_share: float = 0.9
    shared: bool = False

    def product_s(self, rows, inner, columns):
        """Time a matrix product `(rows, inner) x (inner, columns)`."""
        values = rows * inner + inner * columns + rows * columns
        flops = 2 * rows * inner * columns
        return flops / self.reached_flops + self.traffic_s(values * self.value_bytes)

    @property
    def reached_flops(self):
        return self.peak_flops * self.matrix_share

    def traffic_s(self, size_bytes):
        return size_bytes / self.memory_bandwidth

    def levels(self, members, stride):
        """Split a group of devices `stride` apart: members in a node, and nodes."""
        inside = max(1, min(members, self.devices_per_node // stride))
        return inside, math.ceil(members / inside)

    def all_reduce_s(self, size_bytes, members, stride=1):
        """Time an all-reduce: in the node, then between nodes, each its part."""
        inside, nodes = self.levels(members, stride)
        within = self.node.ring_s(size_bytes, inside)
        return within + self.network.ring_s(size_bytes / inside, nodes)

    def link(self, members, stride):
        """The slowest link of a group whose members are `stride` apart."""
        inside = members * stride <= self.devices_per_node
        return self.node if inside else self.network


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh of devices, innermost first: tensor, sequence, data, pipeline.

    Args:
        data: Replicas of the model.
        pipeline: Stages, each some of the blocks; the last has the head.
        tensor: Devices that share every block's heads and feed-forward part.
        sequence: Devices that share every sequence's positions.
        micro_batches: Parts of a replica's batch that run one after the other.
        schedule: "gpipe", "1f1b" or "interleaved".
        chunks: Pieces of the model a device has, above 1 when interleaved.
        recompute: Whether blocks keep their input only and run forward again.
        overlap: Whether gradients travel during the last micro-batch's backward.
        ring: Whether keys and values travel while attention is computed.
        balance: Whether the last stage has fewer blocks, since it has the head.
    """

    data: int = 1
    pipeline: int = 1
    tensor: int = 1
    sequence: int = 1
    micro_batches: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    recompute: bool = False
    overlap: bool = True
    ring: bool = False
    balance: bool = False

    @property
    def devices(self):
        return self.data * self.pipeline * self.tensor * self.sequence

    @property
    def stages(self):
        return self.pipeline * self.chunks

    def __str__(self):
        parts = [
            f"{kind} {getattr(self, kind)}" for kind in KINDS if getattr(self, kind) > 1
        ]
        if self.pipeline > 1:
            parts.append(self.schedule)
        if self.chunks > 1:
            parts.append(f"{self.chunks} chunks")
        if self.micro_batches > 1:
            parts.append(f"{self.micro_batches} micro-batches")
        return ", ".join(parts + ["recompute"] * self.recompute) or "one device"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A step, as the device sees it that is last to end.

    Attributes:
        step_s: The whole; the sum of the parts that follow.
        compute_s: Products and traffic of activations.
        overhead_s: Calls of stages.
        tensor_s: All-reduces of tensor parallelism.
        sequence_s: Keys and values that travel and are not hidden by attention.
        bubble_s: Waiting in the pipeline, sending included.
        data_s: Gradients' all-reduce that no backward hides.
        optimizer_s: The update.
        data_total_s: Gradients' all-reduce, hidden or not.
        flops_share: Of the peak, without recomputed operations.
        hardware_flops: Per device and second, recomputed operations included.
        memory: Bytes of the fullest device by use.
    """

    step_s: float
    compute_s: float
    overhead_s: float
    tensor_s: float
    sequence_s: float
    bubble_s: float
    data_s: float
    optimizer_s: float
    data_total_s: float
    flops_share: float
    hardware_flops: float
    memory: dict

    @property
    def memory_bytes(self):
        return sum(self.memory.values())

    @property
    def communication_s(self):
        return self.tensor_s + self.sequence_s + self.data_s

    def as_dict(self):
        return {**dataclasses.asdict(self), "memory_bytes": self.memory_bytes}


# What cannot run


def check_layout(model, layout, batch):
    """Refuse a layout that does not divide.

    Raises:
        LayoutError: One line: expected, received and repair.
    """
    for name in (*KINDS, "micro_batches", "chunks"):
        if getattr(layout, name) < 1:
            _refuse(f"`{name}` of at least 1", getattr(layout, name), "Give 1 or more")
    if layout.schedule not in SCHEDULES:
        _refuse(f"a schedule of {SCHEDULES}", layout.schedule, "Choose one of them")
    if model.num_heads % layout.tensor:
        _divide("tensor", layout.tensor, "heads", model.num_heads)
    if model.context_length % layout.sequence:
        _divide("sequence", layout.sequence, "positions", model.context_length)
    if layout.stages > model.num_layers:
        _refuse(
            f"at most {model.num_layers} stages, one a layer",
            f"{layout.stages}",
            "Take fewer stages or chunks",
        )
    if batch % layout.data:
        _divide("data", layout.data, "sequences of the batch", batch)
    if batch // layout.data % layout.micro_batches:
        _divide(
            "micro_batches",
            layout.micro_batches,
            "sequences of a replica",
            batch // layout.data,
        )
    if layout.chunks > 1 and layout.schedule != "interleaved":
        _refuse("1 chunk", layout.chunks, 'Choose schedule="interleaved"')
    if layout.schedule == "interleaved" and layout.micro_batches % layout.pipeline:
        _divide("pipeline", layout.pipeline, "micro-batches", layout.micro_batches)


def _divide(name, value, of, count):
    fits = [d for d in range(1, count + 1) if count % d == 0]
    near = sorted(fits, key=lambda d: abs(d - value))[:2]
    _refuse(
        f"`{name}` that divides {count} {of}",
        value,
        f"Take {' or '.join(map(str, sorted(near)))}",
    )


def _refuse(expected, received, repair):
    raise LayoutError(f"Expected {expected}. Received: {received}. {repair}.")


# Pipelines, event by event


def device_order(schedule, device, pipeline, micro_batches, chunks=1):
    """List a device's work in order: `(is_forward, micro_batch, chunk)`.

    Reference: GPipe, Huang et al. 2019; 1F1B and interleaved 1F1B, Narayanan et al.
    2021, section 2.2.
    """
    total = micro_batches * chunks
    if schedule == "interleaved":
        forward = [_interleaved(k, pipeline, chunks) for k in range(total)]
        backward = [(m, chunks - 1 - c) for m, c in forward]
        ahead = 2 * (pipeline - device - 1) + (chunks - 1) * pipeline
    else:
        forward = [(m, 0) for m in range(micro_batches)]
        backward = forward
        ahead = total if schedule == "gpipe" else pipeline - device - 1
    ahead = min(ahead, total)
    order = [(True, *work) for work in forward[:ahead]]
    for index in range(total - ahead):
        order.append((True, *forward[ahead + index]))
        order.append((False, *backward[index]))
    return order + [(False, *work) for work in backward[total - ahead :]]


def _interleaved(k, pipeline, chunks):
    """Return the k-th micro-batch and chunk: `pipeline` of a chunk, then the next."""
    group, place = divmod(k, pipeline * chunks)
    return group * pipeline + place % pipeline, place // pipeline


@functools.lru_cache(maxsize=4096)
def in_flight(schedule, device, pipeline, micro_batches, chunks=1):
    """Count the most micro-batches, times chunks, that a device keeps at once."""
    kept = most = 0
    for is_forward, _, _ in device_order(
        schedule, device, pipeline, micro_batches, chunks
    ):
        kept += 1 if is_forward else -1
        most = max(most, kept)
    return most


@functools.lru_cache(maxsize=512)
def run_pipeline(forward_s, backward_s, send_s, micro_batches, schedule, chunks=1):
    """Run a schedule and return when each device ends.

    Args:
        forward_s: Seconds of a micro-batch in each stage; stage `i` is on device
            `i % (stages // chunks)`.
        backward_s: The same, backward.
        send_s: Seconds from a stage's end to the next one's earliest begin.
        micro_batches: Their number.
        schedule: "gpipe", "1f1b" or "interleaved".
        chunks: Stages a device has.

    Returns:
        A tuple of seconds, one per device.
    """
    stages = len(forward_s)
    pipeline = stages // chunks
    orders = [
        device_order(schedule, d, pipeline, micro_batches, chunks)
        for d in range(pipeline)
    ]
    ended = {}
    clock, place = [0.0] * pipeline, [0] * pipeline
    waiting = True
    while waiting:
        waiting = False
        for device, order in enumerate(orders):
            while place[device] < len(order):
                is_forward, micro_batch, chunk = order[place[device]]
                stage = chunk * pipeline + device
                before = _needed(is_forward, micro_batch, stage, stages)
                if before is not None and before not in ended:
                    waiting = True
                    break
                ready = 0.0 if before is None else ended[before]
                if before is not None and before[2] != stage and pipeline > 1:
                    ready += send_s
                cost = (forward_s if is_forward else backward_s)[stage]
                clock[device] = max(clock[device], ready) + cost
                ended[is_forward, micro_batch, stage] = clock[device]
                place[device] += 1
    return tuple(clock)


def _needed(is_forward, micro_batch, stage, stages):
    """Return what has to end first, or None for the first stage's forward."""
    if is_forward:
        return (True, micro_batch, stage - 1) if stage else None
    if stage == stages - 1:
        return True, micro_batch, stage
    return False, micro_batch, stage + 1


# A step


@dataclasses.dataclass(frozen=True)
class StageCost:
    """Seconds of one micro-batch in one stage, in one direction."""

    compute_s: float = 0.0
    tensor_s: float = 0.0
    sequence_s: float = 0.0
    overhead_s: float = 0.0

    @property
    def total_s(self):
        return self.compute_s + self.tensor_s + self.sequence_s + self.overhead_s

    def __add__(self, other):
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return StageCost(*(a + b for a, b in pairs))

    def times(self, count):
        return StageCost(*(count * value for value in dataclasses.astuple(self)))


@functools.lru_cache(maxsize=4096)
def split_layers(model, stages, balance=False):
    """Spread blocks over stages, the ones left over to the first.

    With `balance`, the last stage has as many as make the slowest stage fastest.
    """
    last = model.num_layers // stages
    if balance and stages > 1:
        head = model.vocab_size / (12 * model.embedding_dim + 2 * model.context_length)
        last = min(
            range(1, last + 1),
            key=lambda n: max(
                math.ceil((model.num_layers - n) / (stages - 1)), n + head
            ),
        )
    if stages == 1:
        return (model.num_layers,)
    least, more = divmod(model.num_layers - last, stages - 1)
    return (*(least + (stage < more) for stage in range(stages - 1)), last)


@functools.lru_cache(maxsize=65536)
def block_cost(model, machine, layout, sequences):
    """Cost a block of `sequences` sequences: forward and backward `StageCost`."""
    width, length = model.embedding_dim, model.context_length
    rows = sequences * length // layout.sequence
    part, wide = width / layout.tensor, 4 * width / layout.tensor
    products = (
        machine.product_s(rows, width, 3 * part)
        + machine.product_s(rows, part, width)
        + machine.product_s(rows, width, wide)
        + machine.product_s(rows, wide, width)
    )
    # The scores' traffic is among the activations below.
    attention = 4 * rows * length * part / machine.reached_flops
    # What the backward pass needs is written once and read once.
    traffic = machine.traffic_s(2 * block_activations(model, machine, layout, rows))
    compute = products + attention + traffic
    reduce_bytes = rows * width * machine.value_bytes
    tensor = 2 * machine.all_reduce_s(reduce_bytes, layout.tensor)
    gather, back = _sequence_costs(model, machine, layout, sequences, attention)
    forward = StageCost(compute, tensor, gather)
    backward = StageCost(2 * compute, tensor, back)
    return forward, backward + forward if layout.recompute else backward


def _sequence_costs(model, machine, layout, sequences, attention_s):
    """Time keys and values: gathered forward; again, and their gradients, backward."""
    if layout.sequence == 1:
        return 0.0, 0.0
    values = 2 * sequences * model.context_length * model.embedding_dim
    size_bytes = values / layout.tensor * machine.value_bytes
    whole = machine.all_reduce_s(size_bytes, layout.sequence, layout.tensor)
    gather, back = whole / 2, 1.5 * whole
    if layout.ring:
        hidden = attention_s * (1 - 1 / layout.sequence)
        gather, back = max(0.0, gather - hidden), max(0.0, back - 2 * hidden)
    return gather, back


def block_activations(model, machine, layout, rows):
    """Count the bytes a block keeps of `rows` positions for its backward pass.

    Reference: Korthikanti et al. 2022, section 4.1 and equation 2, for 2-byte values.
    """
    width = model.embedding_dim
    scores = 5 * model.num_heads * model.context_length / width
    split = 24 + (0 if machine.fused_attention else scores)
    return rows * width * (10 + split / layout.tensor) * machine.value_bytes / 2


@functools.lru_cache(maxsize=65536)
def head_cost(model, machine, layout, sequences):
    """Cost the head and the loss: forward and backward `StageCost`."""
    rows = sequences * model.context_length // layout.sequence
    width, vocab = model.embedding_dim, model.vocab_size / layout.tensor
    product = machine.product_s(rows, width, vocab)
    compute = product + machine.traffic_s(2 * 4 * rows * vocab)  # float32 logits
    reduce_bytes = rows * width * machine.value_bytes
    tensor = machine.all_reduce_s(reduce_bytes, layout.tensor)
    return StageCost(compute), StageCost(2 * compute, tensor)


def stage_costs(model, machine, layout, batch):
    """Cost a micro-batch in each stage: lists of `StageCost`, forward and backward."""
    sequences = batch // layout.data // layout.micro_batches
    blocks = block_cost(model, machine, layout, sequences)
    heads = head_cost(model, machine, layout, sequences)
    call = StageCost(overhead_s=machine.call_overhead_s)
    layers = split_layers(model, layout.stages, layout.balance)
    both = [
        [block.times(count) + call for count in layers] for block in blocks
    ]  # forward, backward
    for costs, head in zip(both, heads, strict=True):
        costs[-1] = costs[-1] + head
    return both


def device_layers(model, layout):
    """Count each device's blocks."""
    layers = split_layers(model, layout.stages, layout.balance)
    return [sum(layers[d :: layout.pipeline]) for d in range(layout.pipeline)]


def device_parameters(model, layout):
    """Count each pipeline device's parameters, the tied table on first and last."""
    counts = [n * model.block_parameters for n in device_layers(model, layout)]
    counts[0] += model.embedding_parameters
    if layout.pipeline > 1:
        counts[-1] += model.vocab_size * model.embedding_dim
    return [count / layout.tensor for count in counts]


def memory_use(model, machine, layout, batch):
    """Return the fullest device's memory in bytes by use."""
    sequences = batch // layout.data // layout.micro_batches
    rows = sequences * model.context_length // layout.sequence
    block = block_activations(model, machine, layout, rows)
    kept = rows * model.embedding_dim * machine.value_bytes
    parameters = device_parameters(model, layout)
    layers = device_layers(model, layout)
    uses = []
    for device, count in enumerate(parameters):
        flights = in_flight(
            layout.schedule,
            device,
            layout.pipeline,
            layout.micro_batches,
            layout.chunks,
        )
        at_once = flights * layers[device] / layout.chunks
        activations = at_once * kept + block if layout.recompute else at_once * block
        if device == layout.pipeline - 1:
            activations += 4 * rows * model.vocab_size / layout.tensor
        uses.append(
            {
                "weights": count * machine.value_bytes,
                "gradients": count * machine.value_bytes,
                "optimizer": count * machine.optimizer_bytes,
                "activations": activations,
            }
        )
    return max(uses, key=lambda use: sum(use.values()))


def check_memory(machine, use):
    needed = sum(use.values())
    limit = machine.memory_bytes * machine.memory_share
    if needed > limit:
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in use.items())
        _refuse(
            f"at most {limit / 1e9:.0f} GB a device",
            f"{needed / 1e9:.1f} GB ({parts})",
            "Split the model further, recompute, or take smaller micro-batches",
        )


def gradient_costs(model, machine, layout, backward):
    """Time each device's gradients: the whole all-reduce, and what shows of it."""
    layers = device_layers(model, layout)
    whole, shown = [], []
    for device, count in enumerate(device_parameters(model, layout)):
        total = machine.all_reduce_s(
            count * machine.value_bytes, layout.data * layout.sequence, layout.tensor
        )
        hidden = 0.0
        if layout.overlap:
            # The last block's gradients are ready when there is nothing to hide them.
            window = sum(cost.total_s for cost in backward[device :: layout.pipeline])
            hidden = min(total, window) * (1 - 1 / max(layers[device], 1))
        if layout.pipeline > 1 and device in (0, layout.pipeline - 1):
            total += _tied_table_s(model, machine, layout)
        whole.append(total)
        shown.append(total - hidden)
    return whole, shown


def _tied_table_s(model, machine, layout):
    """Time the sum of the token table's gradients of the first and last stage."""
    table = model.vocab_size * model.embedding_dim / layout.tensor
    stride = layout.devices // layout.pipeline
    link = machine.link(layout.pipeline, stride)
    return link.ring_s(table * machine.value_bytes, 2)


def optimizer_s(machine, parameters):
    """Time the update, which reads gradients and state and writes state and weights."""
    each = 2 * machine.optimizer_bytes + 2 * machine.value_bytes
    return machine.traffic_s(parameters * each)


def predict(model, machine, layout, batch):
    """Predict a training step.

    Args:
        model: A `Model`.
        machine: A `Machine`; the layout's devices fill its nodes one by one.
        layout: A `Layout`.
        batch: Sequences of a step over all devices.

    Returns:
        A `Prediction`.

    Raises:
        LayoutError: The layout does not divide or does not fit.

    Example:
        >>> small = Model(24, 1024, 16, 51200, 1024)
        >>> predict(small, A100, Layout(data=8), 64).flops_share > 0.2
        True
    """
    check_layout(model, layout, batch)
    use = memory_use(model, machine, layout, batch)
    check_memory(machine, use)
    forward, backward = stage_costs(model, machine, layout, batch)
    ends = _pipeline_ends(model, machine, layout, batch, forward, backward)
    whole, shown = gradient_costs(model, machine, layout, backward)
    updates = [optimizer_s(machine, n) for n in device_parameters(model, layout)]
    steps = [sum(parts) for parts in zip(ends, shown, updates, strict=True)]
    last = int(np.argmax(steps))
    busy = _busy(layout, forward, backward, last)
    step = steps[last]
    done = model.step_flops(batch) / layout.devices
    with_recompute = model.step_flops(batch, layout.recompute) / layout.devices
    return Prediction(
        step_s=step,
        compute_s=busy.compute_s,
        overhead_s=busy.overhead_s,
        tensor_s=busy.tensor_s,
        sequence_s=busy.sequence_s,
        bubble_s=max(0.0, ends[last] - busy.total_s),
        data_s=shown[last],
        optimizer_s=updates[last],
        data_total_s=whole[last],
        flops_share=done / step / machine.peak_flops,
        hardware_flops=with_recompute / step,
        memory=use,
    )


def _busy(layout, forward, backward, device):
    """Sum a device's work of all micro-batches."""
    own = [c for costs in (forward, backward) for c in costs[device :: layout.pipeline]]
    return functools.reduce(StageCost.__add__, own).times(layout.micro_batches)


def _pipeline_ends(model, machine, layout, batch, forward, backward):
    if machine.shared:
        work = [
            _busy(layout, forward, backward, d).total_s for d in range(layout.pipeline)
        ]
        return [sum(work) / layout.pipeline] * layout.pipeline
    sequences = batch // layout.data // layout.micro_batches
    values = sequences * model.context_length * model.embedding_dim
    # Each device of a tensor group sends its part: "scatter/gather", section 4.1.
    part = values * machine.value_bytes / layout.sequence / layout.tensor
    stride = layout.devices // layout.pipeline
    send = machine.link(layout.pipeline, stride).send_s(part)
    return run_pipeline(
        tuple(cost.total_s for cost in forward),
        tuple(cost.total_s for cost in backward),
        send,
        layout.micro_batches,
        layout.schedule,
        layout.chunks,
    )


def least_step_s(model, machine, layout, batch):
    """Return a time that `predict` cannot beat, without running the pipeline."""
    forward, backward = stage_costs(model, machine, layout, batch)
    _, shown = gradient_costs(model, machine, layout, backward)
    return max(
        _busy(layout, forward, backward, device).total_s
        + shown[device]
        + optimizer_s(machine, count)
        for device, count in enumerate(device_parameters(model, layout))
    )


# The best layout


def all_layouts(devices, batch, kinds=KINDS, chunks=(1, 2, 4)):
    """Yield layouts of so many devices that use these kinds only."""
    sizes = [d for d in range(1, devices + 1) if devices % d == 0]
    for data, pipeline, tensor in itertools.product(sizes, repeat=3):
        sequence, left = divmod(devices, data * pipeline * tensor)
        mesh = dict(zip(KINDS, (data, pipeline, tensor, sequence), strict=True))
        if left or any(mesh[kind] > 1 for kind in KINDS if kind not in kinds):
            continue
        replica = batch // data
        parts = [m for m in range(1, replica + 1) if replica % m == 0]
        for micro_batches, recompute in itertools.product(parts, (False, True)):
            for ring in (False, True)[: 1 + (sequence > 1)]:
                for chunk in chunks if pipeline > 1 else (1,):
                    yield Layout(
                        **mesh,
                        micro_batches=micro_batches,
                        schedule="interleaved" if chunk > 1 else "1f1b",
                        chunks=chunk,
                        recompute=recompute,
                        ring=ring,
                        balance=pipeline > 1,
                    )


def best_layout(model, machine, devices, batch, kinds=KINDS):
    """Search all mixes of these kinds of parallelism for the fastest step.

    1F1B stands for GPipe, whose time it has with less memory.

    Returns:
        `(Layout, Prediction)`.

    Raises:
        LayoutError: Nothing fits; the message is the last layout's.
    """
    reason = LayoutError("Expected a layout to try. Received: none. Name more kinds.")
    bounds = []
    for layout in all_layouts(devices, batch, kinds):
        try:
            check_layout(model, layout, batch)
            check_memory(machine, memory_use(model, machine, layout, batch))
        except LayoutError as error:
            reason = error
            continue
        bounds.append((least_step_s(model, machine, layout, batch), layout))
    best = None
    for bound, layout in sorted(bounds, key=lambda pair: pair[0]):
        if best and bound >= best[1].step_s:
            break
        found = predict(model, machine, layout, batch)
        if best is None or found.step_s < best[1].step_s:
            best = layout, found
    if best is None:
        raise reason
    return best


# Machines, from data sheets; latencies and call overheads are assumptions

NVLINK_3, HDR = Link(300e9, 3e-6), Link(25e9, 5e-6)
ETHERNET = Link(100e9 / 8 / 8, 30e-6)

A100 = Machine(
    name="A100 80 GB, NVLink, InfiniBand 200 Gbit/s a device",
    peak_flops=312e12,
    memory_bandwidth=2.039e12,
    memory_bytes=80e9,
    devices_per_node=8,
    node=NVLINK_3,
    network=HDR,
    call_overhead_s=50e-6,
)
A100_ETHERNET = dataclasses.replace(
    A100, name="A100 80 GB, NVLink, Ethernet 100 Gbit/s a node", network=ETHERNET
)
DGX_2H = Machine(
    name="V100 32 GB, NVSwitch, InfiniBand 100 GB/s a node of 16",
    peak_flops=130e12,
    memory_bandwidth=0.9e12,
    memory_bytes=32e9,
    devices_per_node=16,
    node=Link(150e9, 3e-6),
    network=Link(100e9 / 16, 5e-6),
    call_overhead_s=50e-6,
)

# Published measurements


@dataclasses.dataclass(frozen=True)
class Published:
    """A published number and what it was measured on.

    Args:
        source: Where it stands.
        name: Of the row.
        value: The number, in `unit`.
        unit: "TFLOP/s" a device, "of linear" or "times".
        run: `(model, machine, layout, batch)`.
        baseline: The same of what `value` is relative to, or None.
        fitted: Whether a constant is fitted on it.
    """

    source: str
    name: str
    value: float
    unit: str
    run: tuple
    baseline: tuple | None = None
    fitted: bool = False


MEGATRON_2021 = "Narayanan et al. 2021, arXiv:2104.04473"
MEGATRON_2019 = "Shoeybi et al. 2019, arXiv:1909.08053"
GPIPE = "Huang et al. 2019, arXiv:1811.06965"

# Table 1: layers, width, heads, tensor, pipeline, batch, devices, TFLOP/s a device;
# then the sequences of a micro-batch and the chunks of a device, from the authors'
# examples/sc21/run_table_1.sh in NVIDIA/Megatron-LM. Vocabulary 51200, context 2048.
TABLE_1 = (
    ("1.7B", 24, 2304, 24, 1, 1, 512, 32, 137, 16, 1),
    ("3.6B", 30, 3072, 32, 2, 1, 512, 64, 138, 16, 1),
    ("7.5B", 36, 4096, 32, 4, 1, 512, 128, 142, 16, 1),
    ("18.4B", 40, 6144, 48, 8, 1, 1024, 256, 135, 8, 1),
    ("39.1B", 48, 8192, 64, 8, 2, 1536, 512, 138, 4, 1),
    ("76.1B", 60, 10240, 80, 8, 4, 1792, 1024, 140, 2, 3),
    ("145.6B", 80, 12288, 96, 8, 8, 2304, 1536, 148, 2, 2),
    ("310.1B", 96, 16384, 128, 8, 16, 2160, 1920, 155, 1, 2),
    ("529.6B", 105, 20480, 128, 8, 35, 2520, 2520, 163, 1, 3),
    ("1008B", 128, 25600, 160, 8, 64, 3072, 3072, 163, 1, 1),
)

# Table 2, its rows with tensor and pipeline parallelism: the same batch on more
# devices. Its schedule is not told; 1F1B is taken.
TABLE_2 = (
    ("174.6B", 96, 12288, 96, 8, 12, 1536, 384, 153, 1, 1),
    ("174.6B", 96, 12288, 96, 8, 12, 1536, 768, 149, 1, 1),
    ("174.6B", 96, 12288, 96, 8, 12, 1536, 1536, 141, 1, 1),
    ("529.6B", 105, 20480, 128, 8, 35, 2240, 560, 171, 1, 1),
    ("529.6B", 105, 20480, 128, 8, 35, 2240, 1120, 167, 1, 1),
    ("529.6B", 105, 20480, 128, 8, 35, 2240, 2240, 159, 1, 1),
)


def megatron_2021(machine=A100):
    """Rows of tables 1 and 2. Those of table 1 without a pipeline are fitted on."""
    rows = []
    for table, entries in (("table 1", TABLE_1), ("table 2", TABLE_2)):
        for name, *sizes, batch, devices, tflops, sequences, chunks in entries:
            layers, width, heads, tensor, pipeline = sizes
            data = devices // tensor // pipeline
            layout = Layout(
                data=data,
                pipeline=pipeline,
                tensor=tensor,
                micro_batches=batch // data // sequences,
                schedule="interleaved" if chunks > 1 else "1f1b",
                chunks=chunks,
                recompute=True,
                # The scripts reduce gradients after the backward pass of a pipeline.
                overlap=pipeline == 1,
            )
            model = Model(layers, width, heads, 51200, 2048)
            rows.append(
                Published(
                    source=f"{MEGATRON_2021}, {table}",
                    name=f"{name}, {devices} devices",
                    value=tflops,
                    unit="TFLOP/s",
                    run=(model, machine, layout, batch),
                    fitted=pipeline == 1,
                )
            )
    return rows


def megatron_2019():
    """Rows of figure 5 (weak scaling) and tables 7 (heads) and 8 (strong scaling)."""
    shapes = ((40, 1536, 16), (54, 1920, 20), (64, 2304, 24), (72, 3072, 32))
    models = [Model(*shape, 51200, 1024) for shape in shapes]
    one = (models[0], DGX_2H, _megatron_2019_layout(1, 1), 8)
    source = MEGATRON_2019
    rows = [
        Published(
            f"{source}, section 5.1",
            "1.2B, 1 device",
            39,
            "TFLOP/s",
            one,
            fitted=True,
        )
    ]
    weak = {1: (None, 95, 82, 77), 64: (96, 83, 79, 74)}
    for data, percents in weak.items():
        for index, percent in enumerate(percents):
            if percent is None:
                continue
            run = (models[index], DGX_2H, _megatron_2019_layout(data, 2**index))
            rows.append(
                Published(
                    f"{source}, figure 5",
                    f"weak, tensor {2**index}, data {data}",
                    percent / 100,
                    "of linear",
                    (*run, 8 * data),
                    one,
                )
            )
    for heads, percent in ((16, 82), (24, 80)):
        model = dataclasses.replace(models[3], num_heads=heads)
        rows.append(
            Published(
                f"{source}, table 7",
                f"8.3B, {heads} heads, tensor 8",
                percent / 100,
                "of linear",
                (model, DGX_2H, _megatron_2019_layout(1, 8), 8),
                one,
            )
        )
    for tensor, speedup in ((2, 1.64), (4, 2.34), (8, 2.98)):
        rows.append(
            Published(
                f"{source}, table 8",
                f"1.2B, tensor {tensor}, batch 8",
                speedup,
                "times",
                (models[0], DGX_2H, _megatron_2019_layout(1, tensor), 8),
                one,
            )
        )
    return rows


def _megatron_2019_layout(data, tensor):
    return Layout(data=data, tensor=tensor, recompute=True, overlap=False)


def gpipe():
    """Rows of table 2, the Transformer of 48 layers, relative to K=2, M=1.

    No constant of a machine enters: the schedule alone gives the ratios.
    """
    table = {
        1: {4: 1.07, 8: 1.3},
        4: {2: 1.7, 4: 3.2, 8: 4.8},
        32: {2: 1.8, 4: 3.4, 8: 6.3},
    }
    return [
        Published(
            f"{GPIPE}, table 2",
            f"{stages} stages, {parts} parts",
            times,
            "times",
            (stages, parts),
            (2, 1),
        )
        for parts, row in table.items()
        for stages, times in row.items()
    ]


def gpipe_throughput(stages, micro_batches):
    """Return a batch's throughput, equal stages, blocks run forward again."""
    forward = 1 / stages / micro_batches
    ends = run_pipeline(
        (forward,) * stages, (3 * forward,) * stages, 0.0, micro_batches, "gpipe"
    )
    return 1 / max(ends)


def expected(row, share):
    """Predict a published row, with this share of the peak reached by products."""
    if row.source.startswith(GPIPE):
        return gpipe_throughput(*row.run) / gpipe_throughput(*row.baseline)
    flops, step = _rate(row.run, share)
    if row.baseline is None:
        return flops / 1e12
    base_flops, base_step = _rate(row.baseline, share)
    return base_step / step if row.unit == "times" else flops / base_flops


def _rate(run, share):
    model, machine, layout, batch = run
    machine = dataclasses.replace(machine, matrix_share=share)
    found = predict(model, machine, layout, batch)
    return found.hardware_flops, found.step_s


def fit_share(rows):
    """Find the share of the peak with the least squared relative error."""
    low, high = 0.05, 1.0
    for _ in range(40):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if _squared_error(rows, left) < _squared_error(rows, right):
            high = right
        else:
            low = left
    return (low + high) / 2


def _squared_error(rows, share):
    return sum((expected(row, share) / row.value - 1) ** 2 for row in rows)


def check_published():
    """Compare the model with published numbers.

    One constant per machine, the share of the peak, is fitted on the rows so
    marked; all others are held out.

    Returns:
        A dict of `shares`, `rows`, `held_out` errors and `ablations`.
    """
    groups = {
        "A100": megatron_2021(),
        "V100": megatron_2019(),
        "any": gpipe(),
    }
    shares, told = {}, []
    for machine, rows in groups.items():
        fitted = [row for row in rows if row.fitted]
        share = fit_share(fitted) if fitted else None
        if share:
            shares[machine] = share
        for row in rows:
            value = expected(row, share)
            told.append(
                {
                    "source": row.source,
                    "name": row.name,
                    "unit": row.unit,
                    "published": row.value,
                    "predicted": value,
                    "error": value / row.value - 1,
                    "fitted": row.fitted,
                }
            )
    return {
        "shares": shares,
        "rows": told,
        "held_out": held_out_errors(told),
        "ablations": ablate(),
    }


def ablate():
    """Leave parts of the model out, or change what is assumed, and fit again.

    Returns:
        A dict of errors on the 12 held-out rows of Megatron 2021: `mean`, absolute,
        and `scaling`, what the same model and batch lose on twice and four times the
        devices, published less predicted in mean points of per cent. "one number"
        answers each row with the mean of the fitted ones.
    """
    slower = {
        "node": Link(0.7 * NVLINK_3.bandwidth, NVLINK_3.latency_s),
        "network": Link(0.7 * HDR.bandwidth, HDR.latency_s),
    }
    later = {
        "node": Link(NVLINK_3.bandwidth, 4 * NVLINK_3.latency_s),
        "network": Link(HDR.bandwidth, 4 * HDR.latency_s),
    }
    changes = {
        "the model": {},
        "no traffic of memory": {"memory_bandwidth": math.inf},
        "no communication": {"node": Link(math.inf), "network": Link(math.inf)},
        "no bubble": {"shared": True},
        "links at 70 % of their data sheets": slower,
        "4 times the latency": later,
        "4 times the overhead of a call": {"call_overhead_s": 200e-6},
    }
    errors = {}
    for name, change in changes.items():
        rows = megatron_2021(dataclasses.replace(A100, **change))
        share = fit_share([row for row in rows if row.fitted])
        errors[name] = _row_errors(rows, [expected(row, share) for row in rows])
    mean = float(np.mean([row.value for row in rows if row.fitted]))
    errors["one number"] = _row_errors(rows, [mean] * len(rows))
    return errors


def _row_errors(rows, answers):
    both = list(zip(rows, answers, strict=True))
    held_out = [abs(a / row.value - 1) for row, a in both if not row.fitted]
    table_2 = [(row.value, a) for row, a in both if row.source.endswith("table 2")]
    lost = [
        abs(more[0] / fewest[0] - more[1] / fewest[1])
        for fewest, *others in (table_2[:3], table_2[3:])
        for more in others
    ]
    return {"mean": float(np.mean(held_out)), "scaling": 100 * float(np.mean(lost))}


def held_out_errors(rows):
    """Return mean and largest absolute relative error per source, fits left out."""
    errors = {}
    for row in rows:
        if not row["fitted"]:
            errors.setdefault(row["source"], []).append(abs(row["error"]))
    return {
        source: {"rows": len(e), "mean": float(np.mean(e)), "largest": max(e)}
        for source, e in errors.items()
    }


def _short(source):
    """Shorten "Name et al. year, arXiv:number, place" to "Name year, place"."""
    paper, _, place = source.split(", ")
    return f"{paper.replace(' et al.', '')}, {place}"


def print_published(report):
    rows = [
        (
            row["name"],
            _short(row["source"]),
            f"{row['published']:.3g}",
            f"{row['predicted']:.3g}",
            row["unit"],
            f"{row['error']:+.1%}" + (" fitted" if row["fitted"] else ""),
        )
        for row in report["rows"]
    ]
    shares = ", ".join(f"{n} {s:.3f}" for n, s in report["shares"].items())
    print_table(
        f"Published and predicted; share of the peak fitted: {shares}",
        ("", "source", "published", "predicted", "unit", "error"),
        rows,
    )
    for source, error in report["held_out"].items():
        console.print(
            f"held out, {source}: {error['rows']} rows, mean error "
            f"{error['mean']:.1%}, largest {error['largest']:.1%}"
        )
    print_table(
        "Narayanan 2021, 12 rows held out, parts changed",
        ("", "mean error", "scaling, points"),
        [
            (name, f"{error['mean']:.1%}", f"{error['scaling']:.1f}")
            for name, error in report["ablations"].items()
        ],
    )


# This machine


@dataclasses.dataclass(frozen=True)
class Calibration:
    """This machine's constants, from `results/parallel.json`.

    Args:
        matrix_share: Share of the measured matrix rate that a step reaches.
        call_overhead_s: Per call of a stage.
        node: All-reduce between logical devices of one process.
        network: All-reduce between processes.
        shared: Whether logical devices compute as one processor, see `Machine`.
    """

    matrix_share: float
    call_overhead_s: float
    node: Link
    network: Link
    shared: bool


def fit_link(entries):
    """Fit an all-reduce's latency and bandwidth: least squares, relative errors.

    Args:
        entries: Dicts with "bytes", "seconds" and "devices".

    Returns:
        A `Link`; one that costs nothing where there is no entry.
    """
    entries = [entry for entry in entries if entry["devices"] > 1]
    if not entries:
        return Link(math.inf)
    members = np.array([entry["devices"] for entry in entries], float)
    size = np.array([entry["bytes"] for entry in entries], float)
    seconds = np.array([entry["seconds"] for entry in entries], float)
    steps = 2 * (members - 1)
    columns = np.stack([steps, steps / members * size], axis=1)
    latency, per_byte = _least_squares(columns, seconds)
    return Link(1 / per_byte if per_byte else math.inf, latency)


def _least_squares(columns, values):
    """Fit two factors of at least 0, each value weighing by its relative error."""
    weighted = columns / values[:, None]
    ones = np.ones(len(values))
    factors = np.linalg.lstsq(weighted, ones, rcond=None)[0]
    if (factors >= 0).all():
        return [float(factor) for factor in factors]
    alone = [
        max(0.0, float(column @ ones / (column @ column))) if column.any() else 0.0
        for column in weighted.T
    ]
    left = [np.sum((c * a - 1) ** 2) for c, a in zip(weighted.T, alone, strict=True)]
    kept = int(np.argmin(left))
    return [factor if i == kept else 0.0 for i, factor in enumerate(alone)]


# Which devices a measured way of training multiplies.
WAY_KINDS = {
    "one_device": None,
    "mirrored": "data",
    "batch": "data",
    "multi_worker": "data",
    "pipeline": "pipeline",
    "tensor": "tensor",
    "sequence": "sequence",
}


def row_layout(row):
    """Return a measured row's `Layout`."""
    devices = max(row.get("devices") or 1, row.get("workers") or 1)
    if row["way"] not in WAY_KINDS:
        _refuse(f"a way of {', '.join(WAY_KINDS)}", row["way"], "Name its kind here")
    kind = WAY_KINDS[row["way"]]
    return Layout(
        **({kind: devices} if kind else {}),
        micro_batches=row.get("micro_batches") or 1,
        schedule=row.get("schedule") or "1f1b",
        overlap=False,
        balance=True,
    )


def row_machine(report, row, calibration):
    """Describe this machine as the row's devices see it."""
    rates, devices = report["rates"], row_layout(row).devices
    cores = report["machine"].get("cores") or os.cpu_count() or 1
    whole = rates["matrix_product_gflops"] * 1e9
    own = rates.get("matrix_product_gflops_1_core", whole / cores / 1e9) * 1e9
    alone = not calibration.shared and 1 < devices <= cores
    return Machine(
        name="this machine",
        peak_flops=own if alone else whole / devices,
        memory_bandwidth=math.inf,
        memory_bytes=math.inf,
        devices_per_node=max(1, devices // (row.get("workers") or 1)),
        node=calibration.node,
        network=calibration.network,
        matrix_share=calibration.matrix_share,
        call_overhead_s=calibration.call_overhead_s,
        value_bytes=4,
        optimizer_bytes=8,
        shared=calibration.shared,
    )


def row_step_s(report, row, calibration):
    """Predict a measured row's step."""
    shape = dict(report["shape"])
    batch = shape.pop("batch_size")
    names = [field.name for field in dataclasses.fields(Model)]
    model = Model(**{name: shape[name] for name in names})
    machine = row_machine(report, row, calibration)
    return predict(model, machine, row_layout(row), batch).step_s


def fit_rows(report, rows, node, network, shared):
    """Fit the matrix share and the overhead of a call on measured rows."""
    measured = np.array([row["step_ms"] / 1e3 for row in rows])
    guess = Calibration(0.5, 1e-4, node, network, shared)
    for _ in range(5):  # one is enough where no critical path changes
        now = np.array([row_step_s(report, row, guess) for row in rows])
        twice = dataclasses.replace(guess, matrix_share=guess.matrix_share / 2)
        later = dataclasses.replace(guess, call_overhead_s=guess.call_overhead_s + 1e-4)
        product = [
            row_step_s(report, r, twice) - t for r, t in zip(rows, now, strict=True)
        ]
        call = [
            row_step_s(report, r, later) - t for r, t in zip(rows, now, strict=True)
        ]
        columns = np.stack([product, np.array(call) / 1e-4], axis=1)
        rest = now - columns @ [1, guess.call_overhead_s]
        target = np.maximum(measured - rest, 1e-9)
        factor, overhead = _least_squares(columns, target)
        share = guess.matrix_share / max(factor, 1e-3)
        guess = dataclasses.replace(guess, matrix_share=share, call_overhead_s=overhead)
    return guess


def calibrate(report):
    """Fit this machine's constants; leave each row out in turn to see what they tell.

    Args:
        report: The content of `results/parallel.json`.

    Returns:
        A dict of the constants, rows with `predicted_ms`, `error` and
        `left_out_error`, and the mean absolute errors of both readings of a
        machine whose devices share cores.

    Raises:
        ValueError: Fewer than 3 rows can be laid out.
    """
    rows, refused = [], []
    probe = Calibration(0.5, 0.0, Link(math.inf), Link(math.inf), True)
    for row in report["rows"]:
        if not row.get("step_ms"):
            refused.append({"row": row, "reason": "it has no time"})
            continue
        try:
            row_step_s(report, row, probe)
            rows.append(row)
        except LayoutError as error:
            refused.append({"row": row, "reason": str(error)})
    if len(rows) < 3:
        raise ValueError(
            "Expected at least 3 measured rows to calibrate with. Received: "
            f"{len(rows)}. Run benchmarks/parallel.py to its end."
        )
    reduces = report["rates"].get("all_reduce") or []
    node, network = (
        fit_link([entry for entry in reduces if entry["between"] == between])
        for between in ("logical devices", "processes")
    )
    found = [
        _fit_and_leave_out(report, rows, node, network, shared)
        for shared in (True, False)
    ]
    best = min(found, key=lambda reading: reading["left_out_error"])
    errors = {
        "shared cores": found[0]["left_out_error"],
        "own cores": found[1]["left_out_error"],
    }
    return {**best, "left_out_error_by_reading": errors, "refused": refused}


def _fit_and_leave_out(report, rows, node, network, shared):
    fitted = fit_rows(report, rows, node, network, shared)
    told = []
    for index, row in enumerate(rows):
        others = rows[:index] + rows[index + 1 :]
        without = fit_rows(report, others, node, network, shared)
        step_s, blind_s = (
            row_step_s(report, row, constants) for constants in (fitted, without)
        )
        measured_s = row["step_ms"] / 1e3
        told.append(
            {
                **{k: row.get(k) for k in ("way", "devices", "workers")},
                **{k: row.get(k) for k in ("micro_batches", "schedule")},
                "measured_ms": row["step_ms"],
                "predicted_ms": step_s * 1e3,
                "error": step_s / measured_s - 1,
                "left_out_error": blind_s / measured_s - 1,
            }
        )
    mean = {
        name: float(np.mean([abs(row[name]) for row in told]))
        for name in ("error", "left_out_error")
    }
    return {"constants": dataclasses.asdict(fitted), "rows": told, **mean}


def read_measured():
    """Return this machine's measurements, or None with a line that says so."""
    path = RESULTS / "parallel.json"
    if not path.is_file():
        console.print(
            "Expected results/parallel.json to calibrate on this machine. Received: "
            "no file. Run benchmarks/parallel.py; all else works without."
        )
        return None
    return json.loads(path.read_text("utf-8"))


def print_calibration(report):
    constants = report["constants"]
    rows = [
        (
            row["way"],
            f"{row['devices'] or 1}",
            f"{row['micro_batches'] or 1}",
            row["schedule"] or "",
            f"{row['measured_ms']:.1f}",
            f"{row['predicted_ms']:.1f}",
            f"{row['error']:+.0%}",
            f"{row['left_out_error']:+.0%}",
        )
        for row in report["rows"]
    ]
    columns = ("", "devices", "micro-batches", "schedule", "measured ms")
    print_table(
        "This machine: measured and predicted",
        (*columns, "predicted ms", "error", "left out"),
        rows,
    )
    console.print(
        f"share of the matrix rate {constants['matrix_share']:.2f}, "
        f"{constants['call_overhead_s'] * 1e3:.2f} ms a call; mean error "
        f"{report['error']:.0%}, left out {report['left_out_error']:.0%}"
    )
    for reading, error in report["left_out_error_by_reading"].items():
        console.print(f"  read as {reading}: left out {error:.0%}")
    for refused in report["refused"]:
        console.print(f"  not laid out: {refused['row']['way']}: {refused['reason']}")


# What it says of 8 to 512 accelerators

STUDIED = Model(32, 2560, 32, 51200, 2048)  # 2.7 billion parameters
STUDIED_BATCH = 512
DEVICES = (8, 16, 32, 64, 128, 256, 512)
WAYS = {**{kind: (kind,) for kind in KINDS}, "best mix": KINDS}


def study(share):
    """Predict each kind alone and the best mix, on two networks.

    Args:
        share: Share of the peak that products reach.

    Returns:
        A dict of `networks`, each a dict of ways, each a list of points; a point
        that cannot run has a `reason` for its numbers.
    """
    networks = {}
    for machine in (A100, A100_ETHERNET):
        machine = dataclasses.replace(machine, matrix_share=share)
        networks[machine.name] = {
            way: [_point(machine, devices, kinds) for devices in DEVICES]
            for way, kinds in WAYS.items()
        }
    return {
        "model": dataclasses.asdict(STUDIED),
        "parameters": STUDIED.parameters,
        "batch": STUDIED_BATCH,
        "networks": networks,
    }


def _point(machine, devices, kinds):
    try:
        layout, found = best_layout(STUDIED, machine, devices, STUDIED_BATCH, kinds)
    except LayoutError as error:
        return {"devices": devices, "reason": str(error)}
    return {
        "devices": devices,
        "layout": str(layout),
        "mesh": dataclasses.asdict(layout),
        **found.as_dict(),
    }


def print_study(report):
    for name, ways in report["networks"].items():
        rows = []
        for way, points in ways.items():
            for point in points:
                if "reason" in point:
                    rows.append((way, str(point["devices"]), *[""] * 7))
                    continue
                rows.append(
                    (
                        way,
                        str(point["devices"]),
                        f"{point['step_s']:.2f}",
                        f"{point['flops_share']:.0%}",
                        *(
                            f"{point[part] / point['step_s']:.0%}"
                            for part in ("tensor_s", "sequence_s", "bubble_s", "data_s")
                        ),
                        f"{point['memory_bytes'] / 1e9:.0f}",
                    )
                )
        columns = ("", "devices", "step s", "of peak")
        parts = ("tensor", "sequence", "bubble", "data", "GB")
        print_table(name, (*columns, *parts), rows)
        for point in ways["best mix"]:
            console.print(f"  {point['devices']}: {point['layout']}")


COLOURS = {
    "data": "#2563a8",
    "pipeline": "#7b5ea7",
    "tensor": "#2f7d4f",
    "sequence": "#a8862a",
    "best mix": "#c2410c",
}


def draw(published, studied):
    """Draw both networks and the published check as `results/scaling_model.png`."""
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    titles = ("InfiniBand, 25 GB/s a device", "Ethernet, 1.6 GB/s a device")
    networks = studied["networks"].values()
    for one, title, ways in zip(axes, titles, networks, strict=False):
        _draw_network(one, title, ways)
    axes[0].set_ylabel("share of the peak that trains the model, per cent")
    _draw_published(axes[2], published["rows"])
    for one in axes:
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
        one.tick_params(labelsize=9)
    billions = studied["parameters"] / 1e9
    figure.suptitle(
        f"Predicted: GPT of {billions:.1f} billion parameters, {studied['batch']} "
        "sequences of 2048 a step, A100 80 GB, 8 a node",
        fontsize=10,
    )
    path = RESULTS / "scaling_model.png"
    figure.savefig(path, dpi=110)
    console.print(f"wrote {path.relative_to(RESULTS.parent.parent)}")


def _draw_network(axes, title, ways):
    ends = []
    for way, points in ways.items():
        points = [point for point in points if "reason" not in point]
        if not points:
            continue
        devices = [point["devices"] for point in points]
        shares = [100 * point["flops_share"] for point in points]
        axes.plot(
            devices,
            shares,
            color=COLOURS[way],
            linewidth=2.4 if way == "best mix" else 1.5,
            marker="o",
            markersize=3.5,
            zorder=3 if way == "best mix" else 2,
        )
        if devices[-1] < DEVICES[-1]:
            _label_stop(axes, devices[-1], shares[-1], way)
        else:
            ends.append((shares[-1], way))
    _label_ends(axes, ends)
    axes.set_xscale("log", base=2)
    axes.set_xticks(DEVICES, [str(count) for count in DEVICES])
    axes.set_xlim(7, 1400)
    axes.set_ylim(0, 48)
    axes.minorticks_off()
    axes.set_xlabel("accelerators")
    axes.set_title(title, fontsize=10, loc="left")


def _label_stop(axes, devices, share, way):
    """Name a line that stops early, and what stops it."""
    what = {"pipeline": "layers", "tensor": "heads"}.get(way)
    label = f"{way} ({devices} {what})" if what else f"{way}, to {devices}"
    # The lines below keep away from these places.
    align, place = "right", (devices * 1.3, share - 2.6)
    if way == "pipeline" or place[1] < 5:
        align, place = "left", (devices * 1.15, max(share, 5))
    axes.text(*place, label, color=COLOURS[way], fontsize=9, va="center", ha=align)


def _label_ends(axes, ends, gap=2.4):
    """Name lines where they end, pushed apart where they would overlap."""
    height = -gap
    for share, way in sorted(ends):
        height = max(share, height + gap, 1.2)
        axes.text(
            DEVICES[-1] * 1.15, height, way, color=COLOURS[way], fontsize=9, va="center"
        )


def _draw_published(axes, rows):
    rows = [row for row in rows if row["unit"] == "TFLOP/s" and row["published"] > 100]
    axes.plot([125, 180], [125, 180], color="#555555", linewidth=0.8)
    axes.text(174, 175.5, "equal", fontsize=8, color="#555555", ha="right")
    for fitted, colour in ((True, "#8fa8c8"), (False, "#c2410c")):
        some = [row for row in rows if row["fitted"] == fitted]
        axes.scatter(
            [row["published"] for row in some],
            [row["predicted"] for row in some],
            color=colour,
            s=26,
            zorder=3,
        )
    held = [abs(row["error"]) for row in rows if not row["fitted"]]
    axes.text(128, 171, "4 rows fitted, one constant", color="#5f7ea6", fontsize=9)
    axes.text(
        128,
        167,
        f"{len(held)} rows held out, {np.mean(held):.0%} off on average",
        color="#c2410c",
        fontsize=9,
    )
    axes.set_xlim(125, 180)
    axes.set_ylim(125, 180)
    axes.set_aspect("equal")
    axes.set_xlabel("published TFLOP/s a device (arXiv:2104.04473)")
    axes.set_ylabel("predicted")
    axes.set_title("32 to 3072 A100, 1.7 to 1008 billion", fontsize=10, loc="left")


def main():
    published = check_published()
    print_published(published)
    measured = read_measured()
    calibration = calibrate(measured) if measured else None
    if calibration:
        print_calibration(calibration)
    studied = study(published["shares"]["A100"])
    print_study(studied)
    save(
        "scaling_model",
        {
            "published": published,
            "this_machine": calibration,
            "study": studied,
            "machines": [
                dataclasses.asdict(machine) for machine in (A100, A100_ETHERNET, DGX_2H)
            ],
        },
    )
    draw(published, studied)


if __name__ == "__main__":
    main()
