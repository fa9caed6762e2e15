"""Layers in parts: every device computes some of the blocks (article 3.1).

A batch is cut into micro-batches. While the second device computes the second part
of the layers for one of them, the first device computes its own for the next. A
stage's forward pass is one XLA computation and its backward pass another; the last
stage, whose gradient can begin at once, does both in one.
"""

import contextlib
import functools
import itertools
from math import prod
from typing import get_args

import tensorflow as tf
import tf_keras as keras

from gpt_tf.errors import InputError
from gpt_tf.models import ops, placement, train_step, xla
from gpt_tf.models.cached_forward import blocks_cached, cached_mask, parts_of
from gpt_tf.models.next_token import counted, token_weights
from gpt_tf.models.sizes import block_shapes, checked_form
from gpt_tf.parallel.config import Schedule
from gpt_tf.parallel.data import devices_for
from gpt_tf.settings import arguments

SCHEDULES = get_args(Schedule)

_FORWARD, _BACKWARD = "forward", "backward"


class Pipeline:
    """A way to train and run a GPT whose layers stand on several devices.

    What is built in its `scope()` is an ordinary `GPTModel`: the same weights, losses
    and files. A step equals that of the undivided model with
    `gradient_accumulation_steps=micro_batches`.

    Args:
        num_stages: Number of parts, at least 1 and at most the model's blocks.
        micro_batches: Parts of a batch, at least 1. Stages are idle for
            `(num_stages - 1) / (micro_batches + num_stages - 1)` of a step.
        schedule: `"gpipe"`: all forward passes, then all backward passes; `"1f1b"`:
            forward and backward by turns as soon as possible, so that a stage keeps
            the activations of at most `num_stages` micro-batches.
        devices: A device per stage. Default: the GPUs of this machine, or logical
            CPUs, into which the CPU is split if TensorFlow has not been used yet.

    Raises:
        InputError: A number is out of its range, or there are too few devices.

    Example:
        >>> pipeline = Pipeline(num_stages=2, micro_batches=4)
        >>> with pipeline.scope():
        ...     model = GPTModel(vocab_size=100, embedding_dim=16, num_layers=4,
        ...                      num_heads=2)
        >>> model.fit(inputs, labels)

    Reference: Huang et al., "GPipe", arXiv:1811.06965; Narayanan et al.,
    "PipeDream", arXiv:1806.03377; article 3.1, layers as independent sub-tasks.
    """

    def __init__(self, num_stages, micro_batches=4, schedule="1f1b", *, devices=None):
        self.num_stages = arguments.integer("num_stages", num_stages, 1)
        self.micro_batches = arguments.integer("micro_batches", micro_batches, 1)
        self.schedule = arguments.one_of("schedule", schedule, SCHEDULES)
        self.devices = devices_for(self.num_stages, devices, "A pipeline's stages")

    def scope(self):
        """Return a context in which the GPTs that are built are pipelines."""
        if tf.distribute.has_strategy():
            raise InputError(
                "A pipeline places the layers itself. Received: the scope of "
                f"{type(tf.distribute.get_strategy()).__name__}. Leave it first."
            )
        return placement.planned_by(self.plan)

    def plan(self, sizes):
        """Divide a model of these sizes among the stages."""
        if self.num_stages > sizes["num_layers"]:
            raise InputError(
                "A pipeline expects at most one stage per block. Received: "
                f"{self.num_stages} stages for {sizes['num_layers']} blocks. Use fewer "
                "stages."
            )
        return _Plan(self, balance(computed_costs(sizes), self.num_stages))


def computed_costs(sizes):
    """Return the multiplications per token of each block and of the head.

    Args:
        sizes: `vocab_size`, `embedding_dim`, `num_layers`, `num_heads`,
            `feedforward_dim` and `context_length` of a GPT.
    """
    form = checked_form(sizes, sizes)
    shapes = block_shapes(sizes)
    block = sum(prod(shapes[name]) for name in shapes if name.endswith("_kernel"))
    # Scores and values, half of each hidden.
    block += sizes["context_length"] * sizes["num_heads"] * form["head_dim"]
    return [block] * sizes["num_layers"] + [
        sizes["embedding_dim"] * sizes["vocab_size"]
    ]


def balance(costs, num_stages):
    """Divide a chain of blocks so that the costliest stage costs least.

    Args:
        costs: Cost of each block, and at the end that of the head, which belongs to
            the last stage.
        num_stages: At most the number of blocks.

    Returns:
        Number of blocks of each stage, at least 1.

    Example:
        >>> balance([1, 1, 1, 1, 1, 1, 2], 2)
        [4, 2]
    """
    *blocks, head = costs
    best = {(0, 0): (0.0, [])}  # stages and blocks so far -> costliest, division
    for stage in range(1, num_stages + 1):
        for end in range(stage, len(blocks) + 1):
            extra = head if stage == num_stages else 0.0
            options = []
            for begin in range(stage - 1, end):
                if (stage - 1, begin) in best:
                    worst, division = best[stage - 1, begin]
                    cost = sum(blocks[begin:end]) + extra
                    options.append((max(worst, cost), [*division, end - begin]))
            best[stage, end] = min(options)
    return best[num_stages, len(blocks)][1]


def tasks_of(schedule, stage, num_stages, micro_batches):
    """Return what a stage does in a step, in order.

    Args:
        schedule: `"gpipe"` or `"1f1b"`.
        stage: Its index from 0.
        num_stages: Number of stages.
        micro_batches: Number of micro-batches.

    Returns:
        Pairs of `"forward"` or `"backward"` and the micro-batch's index.
    """
    forward = [(_FORWARD, index) for index in range(micro_batches)]
    backward = [(_BACKWARD, index) for index in range(micro_batches)]
    if schedule == "gpipe":
        return forward + backward
    # As many forward passes ahead as there are stages after this one.
    ahead = min(num_stages - 1 - stage, micro_batches)
    turns = itertools.zip_longest(forward[ahead:], backward)
    return forward[:ahead] + [task for pair in turns for task in pair if task]


class _Stage:
    """Some of the layers of a model, on one device."""

    def __init__(self, plan, model, index):
        self.model = model
        self.device = plan.devices[index]
        self.parts = parts_of(model)
        self.is_first = index == 0
        self.is_last = index == plan.num_stages - 1
        end = sum(plan.blocks[: index + 1])
        begin = end - plan.blocks[index]
        self.blocks = self.parts.blocks[begin:end]
        self.caches = slice(2 * begin, 2 * end)  # of those of all blocks
        layers = list(self.blocks)
        if self.is_first:
            layers.insert(0, self.parts.embedding)
        if self.is_last:
            layers += [self.parts.norm, self.parts.head]
        self.variables = [v for layer in layers for v in layer.trainable_variables]
        self._functions = {}

    def call(self, x, training):
        """Return what the next stage reads, `(B, T, C)`."""
        if self.is_first:
            x, _ = self.parts.embed(x, training=training)
        for block in self.blocks:
            x = block(x, training=training)
        return x

    def sums(self, x, table, labels, weights, training):
        """Return the sums over tokens of the last stage, and the logits."""
        logits = self.parts.score(self.call(x, training), table, training=training)
        return ops.token_sums(logits, labels, weights), logits

    # The functions that run, each one XLA computation where the model uses XLA.

    def forward(self, x, training=False):
        return self._run(self.call, training)(x)

    def logits(self, x, table):
        def score(x, table, training):
            return self.parts.score(self.call(x, training), table, training=training)

        return self._run(score, False)(x, table)

    def forward_cached(self, x, table, position, starts, caches):
        """Run tokens that follow what is in this stage's caches."""

        def cached(x, table, position, starts, caches, training):
            length, capacity = x.shape[1], caches[0].shape[2]
            mask, positions = cached_mask(position, starts, length, capacity)
            if self.is_first:
                x, _ = self.parts.embed([x, positions])
            x, caches = blocks_cached(self.blocks, x, caches, position, mask, positions)
            return self.parts.score(x, table) if self.is_last else x, caches

        return self._run(cached, False)(x, table, position, starts, caches)

    def measure(self, x, table, labels, weights):
        return self._run(self.sums, False)(x, table, labels, weights)

    def differentiate(self, x, table, labels, weights, scale):
        """Return sums, gradients of x, table and variables, and the logits."""

        def both(x, table, labels, weights, scale, training):
            inputs = [x] if table is None else [x, table]
            if self.is_first:  # token ids have no gradient
                inputs = inputs[1:]
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                sums, logits = self.sums(x, table, labels, weights, training)
                loss = sums[0] * scale
            gradients = tape.gradient(
                loss,
                [*inputs, *self.variables],
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
            gradients = [tf.convert_to_tensor(g) for g in gradients]
            return sums, gradients, logits if self.model.wants_outputs else None

        return self._run(both, True)(x, table, labels, weights, scale)

    def _run(self, function, training):
        key = (function.__name__, training)
        if key not in self._functions:
            # Decoding and `predict` need no `compile` before them.
            has_choice = self.model._is_compiled and function.__name__ != "cached"
            uses_xla = self.model.uses_xla if has_choice else None
            self._functions[key] = xla.compiled(
                functools.partial(function, training=training), uses_xla
            )
        return self._functions[key]


class _Plan:
    """The stages of one model; what `placement.planned_by` asks for."""

    is_divided = True

    def __init__(self, pipeline, blocks):
        self.num_stages = pipeline.num_stages
        self.micro_batches = pipeline.micro_batches
        self.schedule = pipeline.schedule
        self.devices = pipeline.devices
        self.blocks = blocks
        stages = [index for index, count in enumerate(blocks) for _ in range(count)]
        self._places = {f"block_{n}": stage for n, stage in enumerate(stages)}
        self._places["embedding"] = 0
        self._places["final_norm"] = self._places["head"] = self.num_stages - 1
        self._stages = None

    def at(self, layer_name):
        """Return a context that puts a layer's weights on its stage's device."""
        return tf.device(self.devices[self._places[layer_name]])

    def compile(self, model):
        """Forget what was traced; the model's options may have changed."""
        model.check_default_loss("A pipeline")
        if model.gradient_accumulation_steps > 1:
            raise InputError(
                "A pipeline expects its `micro_batches` in the place of "
                "`gradient_accumulation_steps`. Received: "
                f"{model.gradient_accumulation_steps}. Leave it at 1."
            )
        self._stages = None

    def stages(self, model):
        if self._stages is None:
            self._stages = [
                _Stage(self, model, index) for index in range(self.num_stages)
            ]
        return self._stages

    def train_step(self, model, x, y, sample_weight):
        """Compute a training step, all stages at work; return the metrics."""
        model.check_default_loss("A pipeline")
        batch = _tokens_labels_weights(model, x, y, sample_weight)
        count = train_step.add_over_replicas(model.weight_of(y))
        scale = tf.math.reciprocal_no_nan(count)
        if isinstance(model.optimizer, keras.mixed_precision.LossScaleOptimizer):
            scale = model.optimizer.get_scaled_loss(scale)
        sums, gradients, logits = _Step(self, model, scale).run(batch)
        if isinstance(model.optimizer, keras.mixed_precision.LossScaleOptimizer):
            gradients = model.optimizer.get_unscaled_gradients(gradients)
        pairs = zip(gradients, model.trainable_variables, strict=True)
        with ops.graph_owns_gradients():
            model.optimizer.apply_gradients(list(pairs))
        return model.report_sums(sums, x, y, logits, sample_weight)

    def test_step(self, model, x, y, sample_weight):
        """Compute the loss of a batch, and return the metrics."""
        batch = _tokens_labels_weights(model, x, y, sample_weight)
        stages = self.stages(model)
        table = _table_of(stages)
        parts = _micro_batches(batch, self.micro_batches)

        def run(stage, x, index):
            if stage.is_last:
                return stage.measure(x, table, *parts[index][1:])
            return stage.forward(x)

        outputs = self._flow(stages, [tokens for tokens, *_ in parts], run)
        sums = tuple(map(tf.add_n, zip(*(sums for sums, _ in outputs), strict=True)))
        logits = None
        if model.wants_outputs:
            logits = _joined([logits for _, logits in outputs], batch)
        return model.report_sums(sums, x, y, logits, sample_weight)

    def logits(self, model, tokens):
        """Compute logits `(B, T, V)`."""
        stages = self.stages(model)
        table = _table_of(stages)

        def run(stage, x, index):
            return stage.logits(x, table) if stage.is_last else stage.forward(x)

        parts = [part for (part,) in _micro_batches((tokens,), self.micro_batches)]
        return _joined(self._flow(stages, parts, run), (tokens,))

    def forward_cached(self, model, tokens, position, starts, caches):
        """Run tokens that follow a cache; rows flow through the stages in parts."""
        stages = self.stages(model)
        table = _table_of(stages)
        rows = tokens.shape[0]
        parts = max(n for n in range(1, self.micro_batches + 1) if rows % n == 0)
        tokens, starts, *caches = (
            tf.split(x, parts) for x in (tokens, starts, *caches)
        )
        updated = [[] for _ in range(parts)]

        def run(stage, x, part):
            used = [cache[part] for cache in caches[stage.caches]]
            x, used = stage.forward_cached(
                x, table if stage.is_last else None, position, starts[part], used
            )
            updated[part] += used
            return x

        scores = self._flow(stages, tokens, run)
        caches = [tf.concat(pieces, axis=0) for pieces in zip(*updated, strict=True)]
        return tf.concat(scores, axis=0), caches

    def _flow(self, stages, parts, run):
        """Send micro-batches through all stages; return what the last makes of each.

        Args:
            stages: The stages.
            parts: What the first one reads, by micro-batch.
            run: Function of a stage, what it reads, and the micro-batch's index.
        """
        before = [None] * len(stages)
        outputs = []
        for index, x in enumerate(parts):
            for number, stage in enumerate(stages):
                with tf.device(stage.device), _after(before[number]):
                    x = run(stage, x, index)
                before[number] = x
            outputs.append(x)
        return outputs


class _Step:
    """The computation of one training step, task by task."""

    def __init__(self, plan, model, scale):
        self.plan = plan
        self.model = model
        self.scale = scale
        self.stages = plan.stages(model)
        self.table = _table_of(self.stages)
        self.sums = None
        self.logits = []
        self.totals = [None] * len(self.stages)  # gradients of each stage's variables
        self.table_total = None
        self.tapes = {}
        self.outputs = {}
        self.slopes = {}  # gradients from the next stage

    def run(self, batch):
        self.parts = _micro_batches(batch, self.plan.micro_batches)
        queues = [
            tasks_of(
                self.plan.schedule,
                index,
                self.plan.num_stages,
                self.plan.micro_batches,
            )
            for index in range(len(self.stages))
        ]
        before = [None] * len(self.stages)
        # The graph's edges decide when a task runs. Here they are only written down,
        # in an order in which each finds what it needs.
        while any(queues):
            for number, queue in enumerate(queues):
                if queue and self._is_ready(number, *queue[0]):
                    kind, index = queue.pop(0)
                    stage = self.stages[number]
                    with tf.device(stage.device), _after(before[number]):
                        before[number] = getattr(self, f"_{kind}")(number, stage, index)
        logits = None
        if self.model.wants_outputs:
            logits = _joined(self.logits, batch)
        return self.sums, self._gradients(), logits

    def _is_ready(self, number, kind, index):
        if kind == _FORWARD:
            return number == 0 or (number - 1, index) in self.outputs
        return self.stages[number].is_last or (number, index) in self.slopes

    def _forward(self, number, stage, index):
        if stage.is_last:
            return None  # comes with the backward pass
        x = self.outputs[number - 1, index] if number else self.parts[index][0]
        with tf.GradientTape() as tape:
            if number:
                tape.watch(x)
            y = stage.forward(x, training=True)
        self.tapes[number, index] = tape, x, y
        self.outputs[number, index] = y
        return y

    def _backward(self, number, stage, index):
        if stage.is_last:
            gradients = self._last(number, stage, index)
        else:
            tape, x, y = self.tapes.pop((number, index))
            inputs = [x] if number else []
            gradients = tape.gradient(
                y,
                [*inputs, *stage.variables],
                output_gradients=self.slopes.pop((number, index)),
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
        if number:
            self.slopes[number - 1, index] = gradients[0]
            gradients = gradients[1:]
        gradients = [tf.convert_to_tensor(g) for g in gradients]
        self.totals[number] = _sum(self.totals[number], gradients)
        return gradients

    def _last(self, number, stage, index):
        tokens, labels, weights = self.parts[index]
        x = self.outputs[number - 1, index] if number else tokens
        sums, gradients, logits = stage.differentiate(
            x, self.table, labels, weights, self.scale
        )
        self.logits.append(logits)
        self.sums = _sum(self.sums, sums)
        if self.table is not None:
            where = 1 if number else 0
            gradients = list(gradients)
            self.table_total = _sum(self.table_total, [gradients.pop(where)])
        return gradients

    def _gradients(self):
        """Return the gradients in the order of the model's variables."""
        found = {}
        for stage, total in zip(self.stages, self.totals, strict=True):
            for variable, gradient in zip(stage.variables, total, strict=True):
                found[variable.ref()] = gradient
        if self.table is not None:
            embedding = self.stages[0].parts.embedding
            with tf.device(self.stages[0].device):
                found[embedding.token_table.ref()] += self.table_total[0]
        return [found[v.ref()] for v in self.model.trainable_variables]


def _table_of(stages):
    """Return the token table for a tied head, or None."""
    embedding = stages[0].parts.embedding
    if not embedding.share_table:
        return None
    with tf.device(stages[0].device):
        table = tf.convert_to_tensor(embedding.token_table)
        return tf.cast(table, embedding.compute_dtype)


def _sum(total, new):
    if total is None:
        return tuple(new)
    return tuple(a + b for a, b in zip(total, new, strict=True))


def _after(tensors):
    """Return a context whose operations wait for tensors, None for none."""
    tensors = [t for t in tf.nest.flatten(tensors) if t is not None]
    if not tensors or tf.executing_eagerly():
        return contextlib.nullcontext()
    return tf.control_dependencies(tensors[:1])


def _joined(pieces, batch):
    """Put the logits of micro-batches together, without the rows that were added."""
    return tf.concat(pieces, axis=0)[: tf.shape(batch[0])[0]]


def _tokens_labels_weights(model, x, y, sample_weight):
    """Return a batch as ids, labels and weights, each `(B, T)`."""
    (labels,) = tf.nest.flatten(y)
    labels = tf.reshape(labels, tf.shape(labels)[:2])
    weights = token_weights(labels, sample_weight)
    labels = tf.where(counted(labels), labels, 0)
    return tf.cast(model.tokens_of(x), tf.int32), labels, weights


def _micro_batches(tensors, parts):
    """Cut every `(B, ...)` tensor into equal ones; return a tuple of each part.

    Rows of zeros, and so of weight 0, fill the last part where `parts` does not
    divide `B`, as in the last batch of an epoch.
    """

    def cut(x):
        shape = tf.shape(x)
        missing = -shape[0] % parts
        rest = tf.zeros(tf.concat([[missing], shape[1:]], 0), x.dtype)
        sizes = tf.concat([[parts, (shape[0] + missing) // parts], shape[1:]], 0)
        return tf.reshape(tf.concat([x, rest], 0), sizes)

    tensors = [cut(x) for x in tensors]
    return [tuple(x[index] for x in tensors) for index in range(parts)]
