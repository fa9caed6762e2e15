"""`fit` and `evaluate` against the same layers in a plain `keras.Model`.

Every two values of the variants below meet in some cell, but for what is too slow. Each
cell trains as the plain model does on one device, eagerly. By default only so many
cells run that every value is in one of them, but for the four replicas.
"""

import functools
import itertools

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

import gpt_tf
from gpt_tf.models.precision import precision
from gpt_tf.parallel import data as strategies

SIZES = {"vocab_size": 31, "embedding_dim": 12, "num_layers": 1, "num_heads": 2}
LENGTH, BATCH = 8, 8
ROWS = {"whole": 16, "short": 12}  # of two batches


def cross_entropy(labels, logits):
    return keras.losses.sparse_categorical_crossentropy(
        labels, logits, from_logits=True
    )


class Scce(keras.losses.Loss):
    def call(self, labels, logits):
        return cross_entropy(labels, logits)


VARIANTS = {
    "loss": ["default", "keras", "function", "class"],
    "optimizer": ["sgd", "adam", "gpt_tf", "legacy"],
    "jit_compile": [True, False],
    "steps": ["one", "two at once", "eager", "in parts"],
    "loss_weights": [None, 3.0],
    "metrics": [None, "accuracy", "weighted"],
    "data": ["arrays", "dataset", "generator"],
    "weights": [None, "(B,)", "(B, T)"],
    "precision": ["float32", "mixed_bfloat16", "mixed_float16"],
    "strategy": ["none", "second device", "two", "four"],
    "added": [None, "regulariser"],
    "last_batch": ["whole", "short"],
}

LOSSES = {
    "default": lambda: None,
    "keras": lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    "function": lambda: cross_entropy,
    "class": Scce,
}
OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.5, momentum=0.9),
    # An epsilon at which a gradient's rounding does not decide the step.
    "adam": lambda: keras.optimizers.Adam(0.01, epsilon=1e-3),
    "gpt_tf": lambda: gpt_tf.AdamW(0.01, epsilon=1e-3, global_clipnorm=0.5),
    "legacy": lambda: keras.optimizers.legacy.SGD(0.5, momentum=0.9),
}


def is_possible(cell):
    # Eager steps on several devices take a minute, and XLA's executables for four of
    # them hundreds of megabytes.
    is_eager, has_xla = cell["steps"] == "eager", cell["jit_compile"]
    many = {"two": is_eager, "four": is_eager or has_xla}
    return not many.get(cell["strategy"], False)


def cost_of(cell):
    """Return about how long a cell takes: XLA compiles each replica and shape."""
    replicas = {"two": 2, "four": 4}.get(cell["strategy"], 1)
    compiled = {"whole": 3, "short": 6}[cell["last_batch"]]
    return 3 + replicas * (compiled if cell["jit_compile"] else 1)


def few(cells, values_of):
    """Return few cells, cheap ones, in which everything is that is in any cell."""
    missing, found = set().union(*map(values_of, cells)), []
    while missing:
        best = max(cells, key=lambda c: len(values_of(c) & missing) / cost_of(c))
        missing -= values_of(best)
        found.append(best)
    return found


def drawn_cells():
    random = np.random.default_rng(1)
    drawn = [
        {name: these[random.integers(len(these))] for name, these in VARIANTS.items()}
        for _ in range(1000)
    ]
    return [cell for cell in drawn if is_possible(cell)]


def pairs_of(cell):
    return {frozenset(pair) for pair in itertools.combinations(cell.items(), 2)}


CELLS = few(drawn_cells(), pairs_of)
DEFAULT = few(
    [cell for cell in CELLS if cell["strategy"] != "four"],
    lambda cell: set(cell.items()),
)


def strategy_of(name):
    strategies._use_fresh_collective_keys()
    return {
        "none": tf.distribute.get_strategy,
        "second device": lambda: tf.distribute.OneDeviceStrategy("CPU:1"),
        "two": lambda: tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]),
        "four": lambda: tf.distribute.MirroredStrategy(
            [f"CPU:{index}" for index in range(4)]
        ),
    }[name]()


@functools.cache
def start():
    keras.utils.set_random_seed(3)
    weights = gpt_tf.GPTModel(**SIZES, context_length=LENGTH).get_weights()
    random = np.random.default_rng(1)
    return [w + random.normal(0, 0.1, w.shape).astype("float32") for w in weights]


def data_of(cell):
    random, rows = np.random.default_rng(0), ROWS[cell["last_batch"]]
    x, y = random.integers(0, SIZES["vocab_size"], (2, rows, LENGTH), "int32")
    shape = {"(B,)": (rows,), "(B, T)": (rows, LENGTH), None: None}[cell["weights"]]
    weights = shape and random.uniform(0, 2, shape).astype("float32")
    given = (x, y) if weights is None else (x, y, weights)
    if cell["data"] == "arrays":
        return {"x": x, "y": y, "sample_weight": weights, "batch_size": BATCH}
    if cell["data"] == "dataset":
        return {"x": tf.data.Dataset.from_tensor_slices(given).batch(BATCH)}

    class Batches(keras.utils.Sequence):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return tuple(a[index * BATCH : (index + 1) * BATCH] for a in given)

    return {"x": Batches()}


def trained(cell, plain):
    """Train a model; return its weights, its history and what it evaluates to."""
    options = {"loss_weights": cell["loss_weights"]}
    if cell["metrics"] == "accuracy":
        options["metrics"] = ["accuracy"]
    if cell["metrics"] == "weighted":
        options["weighted_metrics"] = [keras.metrics.SparseCategoricalAccuracy("hits")]
    loss = LOSSES["keras" if plain else cell["loss"]]()
    options["run_eagerly"] = plain or cell["steps"] == "eager"
    if not plain:
        options["jit_compile"] = cell["jit_compile"] and cell["steps"] != "eager"
        if cell["steps"] == "in parts":
            options["gradient_accumulation_steps"] = 2
        if cell["steps"] == "two at once":
            options["steps_per_execution"] = 2
    with (
        precision(cell["precision"]),
        strategy_of("none" if plain else cell["strategy"]).scope(),
    ):
        model = gpt_tf.GPTModel(**SIZES, context_length=LENGTH)
        if cell["added"]:
            table = model.get_layer("embedding").token_table
            penalty = functools.partial(penalty_of, table)
            model.get_layer("embedding").add_loss(penalty)
        if plain:
            model = keras.Model(model.input, model.output)
            options.setdefault("weighted_metrics", [])
        model.set_weights(start())
        model.compile(OPTIMIZERS[cell["optimizer"]](), loss, **options)
        data = data_of(cell)
        history = model.fit(**data, shuffle=False, verbose=0).history
        report = model.evaluate(**data, verbose=0, return_dict=True)
    return model.get_weights(), history, report


def penalty_of(table):
    return 0.05 * tf.reduce_sum(tf.square(table))


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(
            cell,
            id="|".join(map(str, cell.values())),
            marks=[] if cell in DEFAULT else pytest.mark.slow,
        )
        for cell in CELLS
    ],
)
def test_a_step_trains_as_keras_does(cell):
    weights, history, report = trained(cell, plain=False)
    expected = trained(cell, plain=True)
    # 16-bit products are rounded in another order by XLA.
    tolerance = 1e-4 if cell["precision"] == "float32" else 0.05
    moves = [np.abs(a - b).max() for a, b in zip(expected[0], start(), strict=True)]
    assert max(moves) > 0.01
    for ours, theirs in zip(weights, expected[0], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=tolerance * max(moves))
    for ours, theirs in ((history, expected[1]), (report, expected[2])):
        for name in theirs if tolerance == 1e-4 else ["loss"]:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=tolerance)


def test_the_tolerance_notices_a_weight_of_the_loss():
    found = []
    for weight in (None, 1.01):
        cell = dict.fromkeys(VARIANTS) | {"optimizer": "sgd", "data": "arrays"}
        cell |= {"precision": "float32", "last_batch": "whole", "loss_weights": weight}
        found.append(trained(cell, plain=True)[0])
    moved = max(np.abs(a - b).max() for a, b in zip(found[0], start(), strict=True))
    off = max(np.abs(a - b).max() for a, b in zip(*found, strict=True))
    assert off > 10 * 1e-4 * moved
