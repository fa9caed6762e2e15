"""A student cut out of its teacher: fewer layers, narrower ones, fewer tokens.

Which layers, heads, units and channels stay is measured on data where data is given:
layers by how much the loss grows without them, everything narrower by how large its
activations are, as in Muralidharan et al., "Compact Language Models via Pruning and
Knowledge Distillation" (Minitron), arXiv:2407.14679. Without data, by the norms of
weights. What the student has and the teacher has not begins as nothing, or as noise
of the size that a new model begins with.
"""

import itertools

import numpy as np
import tensorflow as tf

from gpt_tf.errors import InputError, InputTypeError
from gpt_tf.models.decoding import parts_of
from gpt_tf.models.gpt import GPTModel
from gpt_tf.models.language_model import LanguageModel, refuse_keras_3
from gpt_tf.models.layers import observed

LAYER_CHOICES = (
    *("evenly", "every_second", "first", "last", "first_and_last"),
    "importance",
)
_SPREAD = 0.02


def make_student(
    teacher,
    *,
    num_layers=None,
    embedding_dim=None,
    num_heads=None,
    feedforward_dim=None,
    vocab_size=None,
    layers="evenly",
    init="teacher",
    inputs=None,
    token_ids=None,
    dropout=None,
    seed=0,
    name="student",
):
    """Make a smaller GPT out of a trained one.

    Args:
        teacher: A `GPTModel`; it is not changed.
        num_layers: At most the teacher's. This and the following sizes are the
            teacher's where they are not given.
        embedding_dim: At most the teacher's.
        num_heads: From 1 to `embedding_dim`. Heads may be narrower or wider than the
            teacher's; their width is `embedding_dim // num_heads`.
        feedforward_dim: In the teacher's ratio to `embedding_dim` unless given.
        vocab_size: At most the teacher's; a smaller one needs `token_ids`.
        layers: Which blocks are taken, in their order: `"evenly"` spaced, the first
            and the last among them; `"every_second"`, from the first on, which needs
            at most half of them; `"first"`, `"last"`, or `"first_and_last"`, half from
            either end; `"importance"`, which needs `inputs`; or a list of numbers.
        init: `"teacher"` takes the teacher's weights; `"fresh"` begins anew.
        inputs: Token ids `(N, T)` like those that the student will see, to measure
            importance on; a few thousand tokens do.
        token_ids: `(vocab_size,)`: the teacher's id of each token of the student, or
            -1 for tokens that the teacher does not know.
        dropout: Rate in training; the teacher's unless given.
        seed: Of weights that are fresh.
        name: The student's name.

    Returns:
        A `GPTModel` of the teacher's context length.

    Raises:
        InputError: A size is larger than the teacher's, a layer does not exist, or
            something needed is not given.
        InputTypeError: The teacher is no GPTModel.

    Example:
        >>> student = make_student(teacher, num_layers=3, feedforward_dim=1024)
    """
    _check_teacher(teacher)
    config = teacher.get_config()
    sizes = _sizes(config, num_layers, embedding_dim, num_heads, feedforward_dim)
    sizes["vocab_size"] = vocab_size or config["vocab_size"]
    _check_sizes(config, sizes)
    token_ids = _checked_token_ids(config, sizes, token_ids, init)
    if init not in ("teacher", "fresh"):
        raise InputError(f"`init` expects teacher or fresh. Received: {init!r}.")
    student = GPTModel(
        **{
            **config,
            **sizes,
            "dropout": config["dropout"] if dropout is None else dropout,
            "name": name,
        }
    )
    generator = np.random.default_rng(seed)
    _begin_anew(student, generator)
    if init == "teacher":
        chosen = _choose_layers(layers, teacher, sizes["num_layers"], inputs)
        _take_over(teacher, student, chosen, inputs, token_ids)
    return student


def layer_importance(teacher, inputs, labels=None, batch_size=8):
    """Return by how much the loss grows if a block is left out.

    Args:
        teacher: A `GPTModel`.
        inputs: Token ids `(N, T)`.
        labels: The next tokens `(N, T)`; those of `inputs` unless given.
        batch_size: Windows computed at once.

    Returns:
        `(L,)` float64, nats per token; a block that does harm has a negative one.
    """
    inputs = np.asarray(inputs)
    if labels is None:
        inputs, labels = inputs[:, :-1], inputs[:, 1:]
    parts = parts_of(teacher)
    count = len(parts.blocks)

    @tf.function
    def losses(tokens, labels):
        x, table = parts.embed(tokens)
        outputs = [x]
        for block in parts.blocks:
            outputs.append(block(outputs[-1], training=False))
        found = []
        for left_out in range(count + 1):
            x = outputs[min(left_out, count)]
            for block in parts.blocks[left_out + 1 :]:
                x = block(x, training=False)
            logits = parts.score(x, table)
            found.append(
                tf.reduce_sum(
                    tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
                )
            )
        return tf.stack(found)

    sums = np.zeros(count + 1)
    for start in range(0, len(inputs), batch_size):
        piece = slice(start, start + batch_size)
        tokens, wanted = (
            tf.cast(ids[piece], tf.int32) for ids in (inputs, np.asarray(labels))
        )
        sums += losses(tokens, wanted).numpy()
    return (sums[:-1] - sums[-1]) / inputs.size


# Sizes


def _check_teacher(teacher):
    refuse_keras_3(teacher, "teacher")
    if isinstance(teacher, LanguageModel) and not isinstance(teacher, GPTModel):
        raise InputError(
            "`make_student` expects a float GPTModel. Received: a model that is "
            "quantisation-aware. Hand in `gpt_tf.to_float(teacher)`."
        )
    if not isinstance(teacher, GPTModel):
        raise InputTypeError(
            "`make_student` expects a GPTModel built on tf_keras. "
            f"Received: {type(teacher).__module__}.{type(teacher).__name__}. "
            "Build it with `gpt_tf.GPTModel(...)`."
        )


def _sizes(config, num_layers, embedding_dim, num_heads, feedforward_dim):
    width = embedding_dim or config["embedding_dim"]
    if feedforward_dim is None:
        share = config["feedforward_dim"] / config["embedding_dim"]
        feedforward_dim = max(1, round(width * share))
    return {
        "num_layers": num_layers or config["num_layers"],
        "embedding_dim": width,
        "num_heads": num_heads or min(config["num_heads"], width),
        "feedforward_dim": feedforward_dim,
    }


def _check_sizes(config, sizes):
    for name in ("num_layers", "embedding_dim", "vocab_size"):
        if not 1 <= sizes[name] <= config[name]:
            raise InputError(
                f"`{name}` of a student expects a number from 1 to the teacher's, "
                f"{config[name]}. Received: {sizes[name]}. A larger one is a new "
                "model: `GPTModel(...)`."
            )


def _checked_token_ids(config, sizes, token_ids, init):
    if token_ids is None:
        if sizes["vocab_size"] != config["vocab_size"] and init == "teacher":
            raise InputError(
                "A student of another vocabulary expects `token_ids`, the teacher's id "
                "of each of its tokens. Received: none. Take them from `gpt_tf."
                "distillation.vocabulary.shared_tokens(teacher's, student's)`."
            )
        return np.arange(sizes["vocab_size"])
    token_ids = np.asarray(token_ids)
    sound = token_ids.shape == (sizes["vocab_size"],) and token_ids.dtype.kind in "iu"
    if not sound or token_ids.min() < -1 or token_ids.max() >= config["vocab_size"]:
        raise InputError(
            f"`token_ids` expects {sizes['vocab_size']} integers from -1 to "
            f"{config['vocab_size'] - 1}. Received: {token_ids.dtype} of shape "
            f"{token_ids.shape}."
        )
    return token_ids


# Layers


def _choose_layers(layers, teacher, count, inputs):
    """Return the numbers of the blocks to take, rising."""
    total = teacher.num_layers
    if not isinstance(layers, str):
        return _checked_layers(list(layers), total, count)
    if layers == "evenly":
        places = np.linspace(0, total - 1, count) if count > 1 else [total - 1]
        return [int(place + 0.5) for place in places]
    if layers == "every_second":
        if 2 * count > total + 1:
            raise InputError(
                "`layers='every_second'` expects at most half of the teacher's "
                f"{total} layers. Received: num_layers={count}. Use 'evenly'."
            )
        return list(range(0, 2 * count, 2))
    if layers == "first":
        return list(range(count))
    if layers == "last":
        return list(range(total - count, total))
    if layers == "first_and_last":
        front = (count + 1) // 2
        return [*range(front), *range(total - (count - front), total)]
    if layers == "importance":
        if inputs is None:
            raise InputError(
                "`layers='importance'` expects `inputs` to measure it on. "
                "Received: none. Pass token ids (N, T)."
            )
        growth = layer_importance(teacher, inputs)
        return sorted(np.argsort(-growth, kind="stable")[:count].tolist())
    raise InputError(
        f"`layers` expects one of {', '.join(LAYER_CHOICES)}, or a list of numbers. "
        f"Received: {layers!r}."
    )


def _checked_layers(layers, total, count):
    rising = all(a < b for a, b in itertools.pairwise(layers))
    if len(layers) != count or not rising or not 0 <= layers[0] <= layers[-1] < total:
        raise InputError(
            f"`layers` expects {count} rising numbers from 0 to {total - 1}. "
            f"Received: {layers}."
        )
    return layers


# Weights


def _begin_anew(student, generator):
    """Give a model fresh weights that a seed decides, and no global random state."""
    depth = (2 * student.num_layers) ** -0.5
    for layer in student.layers:
        for weight in layer.weights:
            own = weight.name.split("/")[-1].split(":")[0]
            if weight.shape.rank < 2:
                continue  # gains of 1 and biases of 0, and dropout's counters
            spread = _SPREAD
            if own in ("output_kernel", "down_kernel"):
                spread *= depth
            weight.assign(generator.normal(0.0, spread, weight.shape))


def _take_over(teacher, student, chosen, inputs, token_ids):
    ours, theirs = parts_of(student), parts_of(teacher)
    importance = _Importance(theirs, [theirs.blocks[i] for i in chosen], inputs)
    channels = importance.channels(student.embedding_dim)
    _copy_embedding(ours, theirs, channels, token_ids)
    for index, (block, number) in enumerate(zip(ours.blocks, chosen, strict=True)):
        _copy_block(block, theirs.blocks[number], channels, importance, index)
    ours.norm.gamma.assign(theirs.norm.gamma.numpy()[channels])
    ours.norm.beta.assign(theirs.norm.beta.numpy()[channels])


def _copy_embedding(ours, theirs, channels, token_ids):
    known = token_ids >= 0
    tables = [(ours.embedding.token_table, theirs.embedding.token_table)]
    if theirs.head.kernel is not None:
        tables.append((ours.head.kernel, theirs.head.kernel))
    for mine, other in tables:
        values = mine.numpy()
        values[known] = other.numpy()[np.ix_(token_ids[known], channels)]
        mine.assign(values)
    positions = theirs.embedding.position_table.numpy()
    ours.embedding.position_table.assign(positions[:, channels])


def _copy_block(ours, theirs, channels, importance, index):
    """Copy a block's weights, of the channels, heads and units that stay."""
    for name in ("attention_norm", "feedforward_norm"):
        for part in ("gamma", "beta"):
            values = getattr(theirs, f"{name}_{part}").numpy()
            getattr(ours, f"{name}_{part}").assign(values[channels])
    for part in ("output_bias", "down_bias"):
        getattr(ours, part).assign(getattr(theirs, part).numpy()[channels])
    _copy_attention(ours, theirs, channels, importance, index)
    units = importance.units(index, ours.feedforward_dim)
    count = len(units)
    up, bias, down = (
        weight.numpy() for weight in (ours.up_kernel, ours.up_bias, ours.down_kernel)
    )
    up[:, :count] = theirs.up_kernel.numpy()[np.ix_(channels, units)]
    bias[:count] = theirs.up_bias.numpy()[units]
    down[:count] = theirs.down_kernel.numpy()[np.ix_(units, channels)]
    down[count:] = 0.0  # what the teacher has not begins as nothing
    ours.up_kernel.assign(up)
    ours.up_bias.assign(bias)
    ours.down_kernel.assign(down)


def _copy_attention(ours, theirs, channels, importance, index):
    wide, narrow = theirs.head_dim, ours.head_dim
    heads = importance.heads(index, ours.num_heads)
    kernel = ours.qkv_kernel.numpy().reshape(-1, 3, ours.num_heads, narrow)
    bias = ours.qkv_bias.numpy().reshape(3, ours.num_heads, narrow)
    output = ours.output_kernel.numpy().reshape(ours.num_heads, narrow, -1)
    source = theirs.qkv_kernel.numpy().reshape(-1, 3, theirs.num_heads, wide)
    source_bias = theirs.qkv_bias.numpy().reshape(3, theirs.num_heads, wide)
    source_output = theirs.output_kernel.numpy().reshape(theirs.num_heads, wide, -1)
    output[:] = 0.0
    for mine, other in enumerate(heads):
        scored, valued = importance.dimensions(index, other, narrow)
        count = len(scored)
        for part, places in enumerate((scored, scored, valued)):
            taken = source[channels, part, other][:, places]
            # Scores are divided by the root of the head width, which has changed.
            scale = (narrow / wide) ** 0.5 if part == 0 else 1.0
            kernel[:, part, mine, :count] = taken * scale
            bias[part, mine, :count] = source_bias[part, other, places] * scale
            if part < 2:
                kernel[:, part, mine, count:] = 0.0
                bias[part, mine, count:] = 0.0
        output[mine, :count] = source_output[other][np.ix_(valued, channels)]
    ours.qkv_kernel.assign(kernel.reshape(ours.qkv_kernel.shape))
    ours.qkv_bias.assign(bias.reshape(ours.qkv_bias.shape))
    ours.output_kernel.assign(output.reshape(ours.output_kernel.shape))


class _Importance:
    """What stays where a student is narrower, measured once for all blocks.

    Args:
        parts: The teacher's layers.
        blocks: Those of its blocks that stay.
        inputs: Token ids `(N, T)`, or None for the norms of weights.
    """

    def __init__(self, parts, blocks, inputs):
        self._blocks = blocks
        self._measured = None
        if inputs is not None:
            self._measured = _mean_sizes(parts, blocks, np.asarray(inputs))

    def channels(self, count):
        """Numbers of the channels to keep, rising; the same in all layers."""
        total = int(self._blocks[0].attention_norm_gamma.shape[0])
        if count == total:
            return np.arange(total)
        if self._measured is not None:
            sizes = self._measured["channels"]
        else:
            sizes = sum(
                np.abs(getattr(block, f"{name}_gamma").numpy())
                * np.linalg.norm(getattr(block, kernel).numpy(), axis=1)
                for block in self._blocks
                for name, kernel in (
                    ("attention_norm", "qkv_kernel"),
                    ("feedforward_norm", "up_kernel"),
                )
            )
        return _largest(sizes, count)

    def units(self, index, count):
        """Numbers of the feed-forward units to keep, rising."""
        block = self._blocks[index]
        sizes = np.linalg.norm(block.down_kernel.numpy(), axis=1)
        if self._measured is not None:
            sizes = sizes * self._measured["hidden"][index]
        else:
            sizes = sizes * np.linalg.norm(block.up_kernel.numpy(), axis=0)
        return _largest(sizes, count)

    def heads(self, index, count):
        """Numbers of the heads to keep, rising."""
        block = self._blocks[index]
        value = self._value_sizes(index)  # (H, D)
        return _largest(np.sqrt((value**2).sum(axis=1)), min(count, block.num_heads))

    def dimensions(self, index, head, count):
        """Which of a head's dimensions to keep, for scores and for values."""
        block = self._blocks[index]
        if self._measured is not None:
            query, key = self._measured["query"][index], self._measured["key"][index]
        else:
            shape = (-1, 3, block.num_heads, block.head_dim)
            norms = np.linalg.norm(block.qkv_kernel.numpy().reshape(shape), axis=0)
            query, key = norms[0], norms[1]
        scores = query[head] * key[head]
        return _largest(scores, count), _largest(self._value_sizes(index)[head], count)

    def _value_sizes(self, index):
        """How much each dimension of each head adds to the residual, `(H, D)`."""
        block = self._blocks[index]
        shape = (block.num_heads, block.head_dim)
        rows = np.linalg.norm(block.output_kernel.numpy(), axis=1).reshape(shape)
        if self._measured is not None:
            return rows * self._measured["context"][index].reshape(shape)
        kernel = block.qkv_kernel.numpy().reshape(-1, 3, *shape)
        return rows * np.linalg.norm(kernel[:, 2], axis=0)


def _largest(sizes, count):
    count = min(count, len(sizes))
    return np.sort(np.argsort(-np.asarray(sizes), kind="stable")[:count])


def _mean_sizes(parts, blocks, inputs, batch_size=8):
    """Measure mean magnitudes of activations in the blocks that stay."""
    wanted = (
        *("attention_norm_activation", "feedforward_norm_activation"),
        *("qkv_activation", "context_activation", "hidden_activation"),
    )

    numbers = {block.name: index for index, block in enumerate(blocks)}

    def run(tokens):
        seen = {}

        def add_up(block, name, x):
            sums = tf.reduce_sum(tf.abs(tf.cast(x, tf.float32)), axis=0)
            seen[numbers[block.name], name] = sums

        with observed(blocks, add_up, wanted):
            x, _ = parts.embed(tokens)
            for block in parts.blocks:
                x = block(x, training=False)
        return seen

    compiled, sums = tf.function(run), {}
    for start in range(0, len(inputs), batch_size):
        tokens = tf.cast(inputs[start : start + batch_size], tf.int32)
        for key, value in compiled(tokens).items():
            sums[key] = sums.get(key, 0.0) + value.numpy()

    def of(name):
        return [sums[index, name] / inputs.size for index in range(len(blocks))]

    norms = of("attention_norm_activation") + of("feedforward_norm_activation")
    qkv = [
        sizes.reshape(3, block.num_heads, block.head_dim)
        for sizes, block in zip(of("qkv_activation"), blocks, strict=True)
    ]
    return {
        "channels": np.sum(norms, axis=0),
        "query": [sizes[0] for sizes in qkv],
        "key": [sizes[1] for sizes in qkv],
        "context": of("context_activation"),
        "hidden": of("hidden_activation"),
    }
