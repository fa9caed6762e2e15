"""A student cut out of its teacher: fewer layers, narrower ones, fewer tokens.

Which layers, heads, units and channels stay is measured where data is given: layers by
how much the loss grows without them, everything narrower by how large its activations
are, as in Muralidharan et al., "Compact Language Models via Pruning and Knowledge
Distillation" (Minitron), arXiv:2407.14679. Without data, by the norms of weights.
"""

import itertools
from typing import NamedTuple, get_args

import numpy as np
import tensorflow as tf

from gpt_tf.distillation.config import LayerChoice
from gpt_tf.distillation.losses import evenly_spaced
from gpt_tf.errors import InputError, InputTypeError
from gpt_tf.models import ops
from gpt_tf.models.cached_forward import parts_of
from gpt_tf.models.checks import refuse_keras_3
from gpt_tf.models.gpt import GPTModel
from gpt_tf.models.language_model import LanguageModel, strategy_scope
from gpt_tf.models.layers import observed
from gpt_tf.settings import arguments

_SPREAD = 0.02

# Logits that are in memory at once while importance is measured: 128 MiB.
_VALUES_AT_ONCE = 1 << 25


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
            teacher's; their width is `embedding_dim // num_heads`. Of a teacher of
            another form than GPT-2's, heads are kept whole, and all of them.
        feedforward_dim: In the teacher's ratio to `embedding_dim` unless given.
        vocab_size: At most the teacher's; a smaller one needs `token_ids`.
        layers: Which blocks are taken, in their order: `"evenly"` spaced, the first
            and the last among them, or the first alone; `"first"`; `"importance"`,
            which needs `inputs`; or a list of numbers.
        init: `"teacher"` takes the teacher's weights; `"fresh"` begins anew.
        inputs: Token ids `(N, T)` like those that the student will see, to measure
            importance on; a few thousand tokens do. Without them the norms of
            weights decide, which is much worse for channels and feed-forward units.
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
    if inputs is not None:
        inputs = _checked_ids(inputs, teacher)
    config = teacher.get_config()
    sizes = _sizes(
        config,
        num_layers=num_layers,
        embedding_dim=embedding_dim,
        num_heads=num_heads,
        feedforward_dim=feedforward_dim,
        vocab_size=vocab_size,
    )
    seed = arguments.integer("seed", seed, most=arguments.LARGEST_SEED)
    token_ids = _checked_token_ids(config, sizes, token_ids, init)
    arguments.one_of("init", init, ("teacher", "fresh"))
    if isinstance(layers, str):
        arguments.one_of("layers", layers, get_args(LayerChoice))
    else:
        layers = arguments.integers("layers", layers, 0, teacher.num_layers - 1)
    dropout = config["dropout"] if dropout is None else dropout
    if teacher.stated_form:
        _check_heads(sizes, teacher)
        config["head_dim"] = teacher.head_dim
    with strategy_scope(teacher):
        student = GPTModel(**{**config, **sizes, "dropout": dropout, "name": name})
        _begin_anew(student, np.random.default_rng(seed))
        if init == "teacher":
            chosen = _choose_layers(layers, teacher, sizes["num_layers"], inputs)
            _take_over(teacher, student, chosen, inputs, token_ids)
    return student


def layer_importance(teacher, inputs):
    """Measure by how much the loss grows if a block is left out, in nats per token.

    Of token ids `(N, T)`, all but the first of which are labels; `(L,)` float64. A
    block that does harm has a negative one.
    """
    tokens, labels = inputs[:, :-1], inputs[:, 1:]
    parts = parts_of(teacher)
    sums = sum(
        _losses_without_each(parts, tokens[rows], labels[rows])
        for rows in _pieces(tokens, teacher.vocab_size)
    )
    return (sums[:-1] - sums[-1]) / labels.size


def _losses_without_each(parts, tokens, labels):
    """Sum the loss of a GPT without each of its blocks, and of all, `(L + 1,)`.

    Eagerly, so that the logits of only one of them are in memory.
    """
    x, table = parts.embed(tokens)
    found = []
    for left_out in range(len(parts.blocks) + 1):
        rest = x
        for block in parts.blocks[left_out + 1 :]:
            rest = block(rest, training=False)
        logits = parts.score(rest, table)
        ones = tf.ones(labels.shape)
        found.append(ops.token_sums(logits, labels, ones)[0].numpy())
        if left_out < len(parts.blocks):
            x = parts.blocks[left_out](x, training=False)
    return np.array(found, np.float64)


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


def _sizes(teacher, **given):
    """Return the sizes of a student, those that were not given after the teacher's."""
    sizes = {}
    for name in ("num_layers", "embedding_dim", "vocab_size"):
        size = teacher[name] if given[name] is None else given[name]
        sizes[name] = arguments.integer(
            name,
            size,
            1,
            teacher[name],
            repair="A student has at most what its teacher has; a larger one is a new "
            "model: `GPTModel(...)`.",
        )
    width = sizes["embedding_dim"]
    share = teacher["feedforward_dim"] / teacher["embedding_dim"]
    others = {
        "num_heads": min(teacher["num_heads"], width),
        "feedforward_dim": max(1, round(width * share)),
    }
    for name, size in others.items():
        sizes[name] = size if given[name] is None else given[name]
    return sizes


def _check_heads(sizes, teacher):
    if sizes["num_heads"] != teacher.num_heads:
        raise InputError(
            "A student of a teacher whose form is not GPT-2's expects its "
            f"{teacher.num_heads} heads. Received: num_heads={sizes['num_heads']}. "
            "Make it smaller by `num_layers`, `feedforward_dim` or `embedding_dim`."
        )


def _checked_token_ids(config, sizes, token_ids, init):
    if token_ids is None:
        if sizes["vocab_size"] != config["vocab_size"] and init == "teacher":
            raise InputError(
                "A student of another vocabulary expects `token_ids`, the teacher's id "
                "of each of its tokens. Received: none. Take them from `gpt_tf."
                "distillation.tokenizer_alignment.shared_tokens(teacher's, student's)`."
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


def _checked_ids(ids, teacher):
    ids = np.asarray(ids)
    if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
        raise InputError(
            "`inputs` expects token ids (N, T), more than none. Received: "
            f"{ids.dtype} of shape {ids.shape}. Cut the ids of a text into windows."
        )
    last, length = teacher.vocab_size - 1, teacher.context_length
    if not 0 <= ids.min() <= ids.max() <= last or ids.shape[1] > length:
        raise InputError(
            f"`inputs` expects ids from 0 to {last} in windows of at most {length}. "
            f"Received: ids from {ids.min()} to {ids.max()} in windows of "
            f"{ids.shape[1]}. Encode with the teacher's tokenizer, and cut."
        )
    return ids.astype(np.int32)


# Layers


def _choose_layers(layers, teacher, count, inputs):
    """Return the numbers of the blocks to take, rising."""
    total = teacher.num_layers
    if layers == "evenly":
        return evenly_spaced(total, count)
    if layers == "first":
        return list(range(count))
    if layers == "importance":
        if inputs is None or inputs.shape[1] < 2:
            raise InputError(
                "`layers='importance'` expects `inputs` to measure it on. Received: "
                "none, or windows of one token. Pass token ids (N, T)."
            )
        growth = layer_importance(teacher, inputs)
        return sorted(np.argsort(-growth, kind="stable")[:count].tolist())
    if len(layers) != count or any(a >= b for a, b in itertools.pairwise(layers)):
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
    kept = [theirs.blocks[number] for number in chosen]
    is_as_wide = (
        student.embedding_dim == teacher.embedding_dim
        and student.num_heads == teacher.num_heads
        and student.feedforward_dim >= teacher.feedforward_dim
    )
    if is_as_wide or inputs is None:
        sizes = _norms(theirs, kept)
    else:
        sizes = _mean_activations(theirs, kept, inputs)
    channels = _largest(sizes.channels, student.embedding_dim)
    _copy_embedding(ours, theirs, channels, token_ids)
    for index, (block, other) in enumerate(zip(ours.blocks, kept, strict=True)):
        for name in block.weight_names:
            if name in ("query_norm_gamma", "key_norm_gamma"):
                getattr(block, name).assign(getattr(other, name).numpy())
            elif "norm" in name or name in ("output_bias", "down_bias"):
                getattr(block, name).assign(getattr(other, name).numpy()[channels])
        if teacher.stated_form:
            _copy_heads(block, other, channels)
        else:
            _copy_attention(block, other, channels, sizes.heads[index])
        _copy_feedforward(block, other, channels, sizes.hidden[index])
    for name in ours.norm.weight_names:
        getattr(ours.norm, name).assign(getattr(theirs.norm, name).numpy()[channels])


def _copy_embedding(ours, theirs, channels, token_ids):
    known = token_ids >= 0
    tables = [(ours.embedding.token_table, theirs.embedding.token_table)]
    if theirs.head.kernel is not None:
        tables.append((ours.head.kernel, theirs.head.kernel))
    for mine, other in tables:
        values = mine.numpy()
        values[known] = other.numpy()[np.ix_(token_ids[known], channels)]
        mine.assign(values)
    if theirs.embedding.position_table is not None:
        positions = theirs.embedding.position_table.numpy()
        ours.embedding.position_table.assign(positions[:, channels])


def _copy_feedforward(ours, theirs, channels, hidden):
    rows = np.linalg.norm(theirs.down_kernel.numpy(), axis=1)
    units = _largest(rows * hidden, ours.feedforward_dim)
    count = len(units)
    for name in ("up_kernel", "up_bias"):
        if name in ours.weight_names:
            weight = getattr(ours, name)
            mine, other = (
                _by_unit(weight.numpy(), ours),
                _by_unit(getattr(theirs, name).numpy(), theirs),
            )
            taken = other[..., units]
            mine[..., :count] = taken[channels] if name == "up_kernel" else taken
            weight.assign(mine.reshape(weight.shape))
    down = ours.down_kernel.numpy()
    down[:count] = theirs.down_kernel.numpy()[np.ix_(units, channels)]
    down[count:] = 0.0  # what the teacher has not begins as nothing
    ours.down_kernel.assign(down)


def _by_unit(values, block):
    """Return `(..., n, F)`: of each feed-forward unit what it has, a gate perhaps."""
    return values.reshape(*values.shape[:-1], -1, block.feedforward_dim)


def _copy_heads(ours, theirs, channels):
    """Copy attention whose heads stay as they are."""
    ours.qkv_kernel.assign(theirs.qkv_kernel.numpy()[channels])
    if "qkv_bias" in ours.weight_names:
        ours.qkv_bias.assign(theirs.qkv_bias.numpy())
    ours.output_kernel.assign(theirs.output_kernel.numpy()[:, channels])


def _copy_attention(ours, theirs, channels, sizes):
    wide, narrow = theirs.head_dim, ours.head_dim
    kernel = ours.qkv_kernel.numpy().reshape(-1, 3, ours.num_heads, narrow)
    bias = ours.qkv_bias.numpy().reshape(3, ours.num_heads, narrow)
    output = ours.output_kernel.numpy().reshape(ours.num_heads, narrow, -1)
    source = theirs.qkv_kernel.numpy().reshape(-1, 3, theirs.num_heads, wide)
    source_bias = theirs.qkv_bias.numpy().reshape(3, theirs.num_heads, wide)
    source_output = theirs.output_kernel.numpy().reshape(theirs.num_heads, wide, -1)
    query, key, context = sizes
    # How much each dimension of each head adds to scores, and to the residual.
    scores = query * key  # (H, D)
    values = np.linalg.norm(source_output, axis=2) * context  # (H, D)
    heads = _largest(np.sqrt((values**2).sum(axis=1)), ours.num_heads)
    output[:] = 0.0
    for mine, other in enumerate(heads):
        scored, valued = (_largest(x[other], narrow) for x in (scores, values))
        count = len(scored)
        for part, places in enumerate((scored, scored, valued)):
            taken = source[channels, part, other][:, places]
            # Scores are divided by the root of the head width, which has changed.
            scale = (narrow / wide) ** 0.5 if part == 0 else 1.0
            kernel[:, part, mine, :count] = taken * scale
            bias[part, mine, :count] = source_bias[part, other, places] * scale
        # Added dimensions score nothing while their keys are 0. Their queries are
        # not, or neither would ever have a gradient.
        kernel[:, 1, mine, count:] = 0.0
        output[mine, :count] = source_output[other][np.ix_(valued, channels)]
    ours.qkv_kernel.assign(kernel.reshape(ours.qkv_kernel.shape))
    ours.qkv_bias.assign(bias.reshape(ours.qkv_bias.shape))
    ours.output_kernel.assign(output.reshape(ours.output_kernel.shape))


# Importance


class _Sizes(NamedTuple):
    """How large what a GPT computes is, by which it is decided what stays."""

    channels: np.ndarray  # behind the norms, (C,)
    heads: list[np.ndarray]  # of each block's queries, keys and context, (3, H, D)
    hidden: list[np.ndarray]  # of each block's feed-forward units, (F,)


def _largest(sizes, count):
    count = min(count, len(sizes))
    return np.sort(np.argsort(-np.asarray(sizes), kind="stable")[:count])


def _norms(parts, blocks):
    """Take the norms of weights for the sizes of what they compute."""
    table = parts.head.kernel
    if table is None:
        table = parts.embedding.token_table
    # Each norm's scale and the kernel (C, ...) that reads behind it.
    readers = [
        pair
        for block in blocks
        for pair in (
            (block.attention_norm_gamma, block.qkv_kernel.numpy()),
            (block.feedforward_norm_gamma, block.up_kernel.numpy()),
        )
    ]
    readers.append((parts.norm.gamma, table.numpy().T))
    columns = [
        _by_head(np.linalg.norm(block.qkv_kernel.numpy(), axis=0), block)
        for block in blocks
    ]
    return _Sizes(
        sum(
            np.abs(gamma.numpy()) * np.linalg.norm(kernel, axis=1)
            for gamma, kernel in readers
        ),
        columns,
        [
            _by_unit(np.linalg.norm(block.up_kernel.numpy(), axis=0), block).prod(0)
            for block in blocks
        ],
    )


def _by_head(values, block):
    """Return query's, key's and value's part, each `(H, D)`, or `(G, D)`."""
    inner, shared = (
        heads * block.head_dim for heads in (block.num_heads, block.num_kv_heads)
    )
    parts = np.split(values, [inner, inner + shared])
    return [part.reshape(-1, block.head_dim) for part in parts]


def _mean_activations(parts, blocks, inputs):
    """Measure mean magnitudes of activations in the blocks that stay."""
    wanted = (
        *("attention_norm_activation", "feedforward_norm_activation"),
        *("qkv_activation", "context_activation", "hidden_activation"),
    )
    final = (len(blocks), "norm_activation")
    numbers_of = {block.name: index for index, block in enumerate(blocks)}

    def run(tokens):
        seen = {}

        def add_up(layer, name, x):
            index = numbers_of.get(layer.name, len(blocks))
            sizes = tf.abs(tf.cast(tf.reshape(x, [-1, x.shape[-1]]), tf.float32))
            seen[index, name] = tf.reduce_sum(sizes, axis=0)

        with observed([*blocks, parts.norm], add_up, (*wanted, final[1])):
            x, _ = parts.embed(tokens)
            for block in parts.blocks:
                x = block(x, training=False)
            parts.norm(x)
        return seen

    compiled, sums = tf.function(run), {}
    for rows in _pieces(inputs, 1):
        for key, value in compiled(tf.constant(inputs[rows])).items():
            sums[key] = sums.get(key, 0.0) + value.numpy()

    def of(name):
        return [sums[index, name] / inputs.size for index in range(len(blocks))]

    norms = of("attention_norm_activation") + of("feedforward_norm_activation")
    heads = []
    for block, qkv, context in zip(
        blocks, of("qkv_activation"), of("context_activation"), strict=True
    ):
        query, key, _ = _by_head(qkv, block)
        heads.append([query, key, context.reshape(query.shape)])
    return _Sizes(
        np.sum([*norms, sums[final] / inputs.size], axis=0),
        heads,
        of("hidden_activation"),
    )


def _pieces(inputs, width):
    """Yield slices of a few windows each, of bounded `width` values per token."""
    count = _VALUES_AT_ONCE // (inputs.shape[1] * width)
    count = min(max(count, 1), 8)
    for start in range(0, len(inputs), count):
        yield slice(start, start + count)
