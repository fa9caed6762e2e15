"""What users of Keras's models do, done with a GPTModel.

Most run eagerly: `test_keras_step.py` holds the graphs of the same step.
"""

import functools
import gc
import inspect

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from tensorflow.python.framework.func_graph import FuncGraph

import gpt_tf
from gpt_tf.errors import InputError
from gpt_tf.models import xla
from gpt_tf.models.next_token import NextTokenLoss
from gpt_tf.models.precision import precision
from gpt_tf.parallel import data as strategies

IDS = np.zeros((2, 4), "int32")

pytestmark = [
    pytest.mark.usefixtures("eagerly"),
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5"),
]


@pytest.fixture
def make_model(make_model):
    """One block: none of this depends on their number, and it is traced sooner."""
    return functools.partial(make_model, num_layers=1)


@pytest.fixture(scope="module")
def refusing_model():
    """A model for what is refused before it changes anything."""
    return gpt_tf.GPTModel(31, 12, 1, 3, context_length=16)


def sgd():
    return keras.optimizers.SGD(0.1)


def own_loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def two_replicas():
    strategies._use_fresh_collective_keys()
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def moved(model, start):
    pairs = zip(model.get_weights(), start, strict=True)
    return np.concatenate([np.ravel(a - b) for a, b in pairs])


# compile


@pytest.mark.parametrize("name", ["fit", "evaluate", "train_on_batch", "compile"])
def test_signatures_begin_as_keras_own(name):
    ours = list(inspect.signature(getattr(gpt_tf.GPTModel, name)).parameters)
    theirs = list(inspect.signature(getattr(keras.Model, name)).parameters)
    assert [p for p in ours if p in theirs] == theirs


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"loss": keras.losses.sparse_categorical_crossentropy}, "from_logits=True"),
        ({"loss": keras.losses.SparseCategoricalCrossentropy()}, "from_logits=True"),
        ({"loss": "KLDivergence"}, "KLDivergence"),
        ({"metrics": ["crossentropy"]}, "crossentropy"),
        (
            {"weighted_metrics": [keras.metrics.SparseCategoricalCrossentropy()]},
            "from_logits=True",
        ),
        (
            {"loss": keras.losses.MeanSquaredError("sum")}
            | {"gradient_accumulation_steps": 2},
            "sum",
        ),
    ],
)
def test_what_would_train_wrongly_is_refused(refusing_model, options, named):
    with pytest.raises(InputError, match=named):
        refusing_model.compile("adam", **options)


def recording_loss(seen):
    """Return a loss that notes how many rows it is of, which XLA cannot compile."""

    def loss(labels, logits):
        tf.py_function(lambda x: seen.append(len(x)), [logits], [])
        return keras.losses.sparse_categorical_crossentropy(
            labels, logits, from_logits=True
        )

    return loss


def test_a_loss_that_xla_cannot_compile_switches_it_off(make_model, windows_of, traced):
    seen, model = [], make_model()
    model.compile(sgd(), recording_loss(seen), jit_compile=True)
    with pytest.warns(xla.XlaNotice, match="EagerPyFunc"):
        model.fit(*windows_of(4, 8), verbose=0)
    assert seen and not model.uses_xla


def test_accumulation_computes_parts_whatever_the_loss(make_model, windows_of):
    seen, model = [], make_model()
    model.compile(
        sgd(), recording_loss(seen), gradient_accumulation_steps=4, jit_compile=False
    )
    model.fit(*windows_of(8, 8), batch_size=8, verbose=0)
    assert set(seen) == {2}


def test_xla_is_on_by_default_and_can_be_set_afterwards(
    make_model, windows_of, monkeypatch, traced
):
    monkeypatch.setattr(xla, "ON_BY_DEFAULT", True)
    model, (x, y) = make_model(), windows_of(4, 8)
    model.compile()
    assert model.uses_xla
    loss, *_ = model.evaluate(x, y, verbose=0)
    model.jit_compile = False
    assert not model.uses_xla
    assert model.evaluate(x, y, verbose=0)[0] == pytest.approx(loss, rel=1e-5)


def test_a_batch_trains_and_is_measured_without_compile(make_model, windows_of):
    x, y = windows_of(4, 8)
    model = make_model()
    loss = model.train_on_batch(x, y, return_dict=True)["loss"]
    assert model.test_on_batch(x, y, return_dict=True)["loss"] < loss


# Data


def test_data_come_in_every_structure(make_model, windows_of):
    x, y = windows_of(4, 8)
    model = make_model()
    model.compile(sgd())
    start, found = model.get_weights(), []
    for data in (
        (x, y),
        ({"tokens": x}, y[..., None]),
        (x.tolist(), {"head": y}),
        (tf.data.Dataset.from_tensors(({"tokens": x}, y)),),
    ):
        model.set_weights(start)
        model.fit(*data, verbose=0)
        found.append(moved(model, start))
    assert np.abs(found[0]).max() > 1e-4
    for other in found[1:]:
        np.testing.assert_allclose(found[0], other, atol=1e-7)


@pytest.mark.parametrize(
    ("x", "y", "named"),
    [
        (IDS, None, "inputs only"),
        (IDS[0], IDS[0], r"\(4,\)"),
        (np.array([["a", "b"]]), np.zeros((1, 2), "int32"), "string"),
        ([[1, 2], [3]], [[1, 2], [3]], "several lengths"),
        (*[tf.ragged.constant([[1, 2], [3]])] * 2, "ragged"),
        (tf.data.Dataset.from_tensor_slices((IDS, IDS)), None, "Batch"),
    ],
)
def test_data_that_are_no_windows_are_refused(refusing_model, x, y, named):
    with pytest.raises(InputError, match=named):
        refusing_model.fit(x, y, verbose=0)


def test_class_weights_are_refused(refusing_model):
    with pytest.raises(InputError, match="sample_weight"):
        refusing_model.fit(IDS, IDS, class_weight={0: 2.0}, verbose=0)


def check_bad_ids_are_named(model, windows, role, bad):
    x, y = windows
    (x if role == "inputs" else y)[5, 3] = bad
    start = model.get_weights()
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    for method in (model.fit, model.evaluate):
        with pytest.raises(InputError, match=f"{role}.*Received: {bad}"):
            method(data, verbose=0)
    assert not np.any(moved(model, start))


@pytest.mark.parametrize(("role", "bad"), [("inputs", 31), ("labels", -99)])
def test_ids_that_there_are_none_of_are_named(make_model, windows_of, role, bad):
    check_bad_ids_are_named(make_model(), windows_of(8, 8), role, bad)


@pytest.mark.parametrize(
    ("role", "bad", "jit_compile"),
    [
        ("inputs", -1, True),
        pytest.param("labels", 31, False, marks=pytest.mark.slow),
    ],
)
def test_a_graph_names_ids_that_there_are_none_of(
    make_model, windows_of, traced, role, bad, jit_compile
):
    model = make_model()
    model.compile(jit_compile=jit_compile)
    check_bad_ids_are_named(model, windows_of(8, 8), role, bad)


def test_keras_own_loss_names_labels_that_there_are_none_of(make_model, windows_of):
    x, y = windows_of(8, 8)
    y[5, 3] = -100
    model = make_model()
    model.compile(sgd(), own_loss())
    with pytest.raises(InputError, match=r"labels.*Received: -100"):
        model.fit(x, y, verbose=0)
    ignoring = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=-100
    )
    model.compile(sgd(), ignoring)
    assert np.isfinite(model.fit(x, y, verbose=0).history["loss"]).all()


def test_ignored_labels_in_a_dataset_do_not_count(make_model, windows_of, traced):
    x, y = windows_of(8, 8)
    y[:, 6:] = -100
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    model, short = make_model(), make_model()
    start = model.get_weights()
    model.compile(sgd(), jit_compile=True)
    model.fit(data, verbose=0)
    short.compile(sgd(), run_eagerly=True)
    short.fit(x[:, :6], y[:, :6], batch_size=8, verbose=0)
    np.testing.assert_allclose(moved(model, start), moved(short, start), atol=1e-6)


# The step


def test_a_step_in_float16_is_one_in_float32(make_model, windows_of):
    x, y = windows_of(8, 8)
    found = []
    for policy, parts in (("float32", 1), ("mixed_float16", 1), ("mixed_float16", 2)):
        with precision(policy):
            model = make_model()
            start = model.get_weights()
            model.compile(sgd(), gradient_accumulation_steps=parts)
            model.fit(x, y, batch_size=8, verbose=0)
            found.append(moved(model, start))
    for step in found[1:]:
        np.testing.assert_allclose(step, found[0], atol=0.01 * np.abs(found[0]).max())


def test_a_trained_model_leaves_nothing_in_memory(make_model, windows_of, traced):
    def graphs_after_training():
        with two_replicas().scope():
            model = make_model()
        model.fit(*windows_of(4, 8), batch_size=4, verbose=0)
        del model
        gc.collect()
        return sum(isinstance(thing, FuncGraph) for thing in gc.get_objects())

    assert graphs_after_training() == graphs_after_training()


def test_replicas_of_unequal_work_train_as_one_device(make_model, windows_of, traced):
    x, y = windows_of(3, 8)  # the last batch leaves one of two replicas without a row
    y[0] = y[1, 2:] = -100
    found = []
    for strategy in (tf.distribute.get_strategy(), two_replicas()):
        with strategy.scope():
            model = make_model()
            one_device = strategy.num_replicas_in_sync == 1
            model.compile(sgd(), jit_compile=False, run_eagerly=one_device)
        start = model.get_weights()
        history = model.fit(x, y, batch_size=2, shuffle=False, verbose=0).history
        report = model.evaluate(x, y, batch_size=2, verbose=0)
        found.append((moved(model, start), history["loss"], report))
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


class OwnStep(gpt_tf.GPTModel):
    """The training step of Keras's guide to customising `fit`."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            logits = self(x, training=True)
            loss = self.compute_loss(x, y, logits)
        self.optimizer.minimize(loss, self.trainable_variables, tape=tape)
        return self.compute_metrics(x, y, logits, None)


def functional(*arguments, **options):
    gpt = gpt_tf.GPTModel(*arguments, **options)
    return keras.Model(gpt.input, gpt.output)


@pytest.mark.parametrize(
    ("make", "loss"), [(OwnStep, None), (functional, NextTokenLoss)]
)
def test_the_default_loss_is_right_in_other_steps(make, loss, windows_of, traced):
    x, y = windows_of(8, 8)
    found = []
    for strategy in (tf.distribute.get_strategy(), two_replicas()):
        keras.utils.set_random_seed(0)
        with strategy.scope():
            model = make(31, 12, 1, 2, context_length=8)
            one_device = strategy.num_replicas_in_sync == 1
            model.compile(sgd(), loss and loss(), run_eagerly=one_device)
        start = model.get_weights()
        history = model.fit(x, y, batch_size=8, verbose=0).history
        found.append((moved(model, start), history["loss"][0]))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-6)
    assert found[0][1] == pytest.approx(found[1][1]) == pytest.approx(3.43, abs=0.1)


def test_a_model_on_another_device_trains(make_model, windows_of, traced):
    with tf.device("CPU:1"):
        model = make_model()
        model.compile(sgd(), jit_compile=True)
    model.fit(*windows_of(4, 8), verbose=0)
    assert "CPU:1" in model.weights[0].device


def test_tensors_are_added_to_loss_and_metrics(make_model, windows_of):
    model = make_model()
    model.add_loss(0.0 * tf.reduce_mean(model.output) + 2.0)
    model.add_metric(tf.reduce_mean(model.output), name="mean_logit")
    report = model.evaluate(*windows_of(4, 8), verbose=0, return_dict=True)
    assert "mean_logit" in report
    assert report["loss"] == pytest.approx(2.0 + np.log(report["perplexity"]), rel=1e-5)


# Files


@pytest.mark.parametrize(
    "ending", ["keras", "h5", pytest.param("tf", marks=pytest.mark.slow)]
)
def test_a_saved_model_loads_and_goes_on_the_same(
    make_model, windows_of, tmp_path, ending
):
    x, y = windows_of(4, 8)
    model = make_model()
    model.compile(loss_weights=3.0, gradient_accumulation_steps=2)
    model.train_on_batch(x, y)
    path = str(tmp_path / f"model.{ending}")
    model.save(path)
    again = keras.models.load_model(path)
    assert not np.any(moved(again, model.get_weights()))
    assert isinstance(again.optimizer, gpt_tf.AdamW)
    expected, found = (
        [m.test_on_batch(x, y), m.train_on_batch(x, y), m.test_on_batch(x, y)]
        for m in (model, again)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    if ending == "keras":
        assert type(again) is gpt_tf.GPTModel
        assert again.gradient_accumulation_steps == 2
        np.testing.assert_allclose(moved(again, model.get_weights()), 0, atol=1e-6)
    assert [m.name for m in again.metrics] == [m.name for m in model.metrics]


def test_a_description_in_json_makes_a_model(make_model):
    model = make_model(tie_embeddings=False, dropout=0.1, feedforward_dim=20)
    again = keras.models.model_from_json(model.to_json())
    assert type(again) is gpt_tf.GPTModel
    assert again.get_config() == model.get_config()
    shapes = [[w.shape for w in m.weights] for m in (again, model)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_a_model_on_its_layers_loads(make_model, windows_of, tmp_path, ending):
    gpt = make_model(dropout=0.1, layer_norm_epsilon=1e-3, feedforward_dim=20)
    features = gpt.get_layer("final_norm").output
    model = keras.Model(gpt.input, [gpt.output, keras.layers.Dense(3)(features)])
    path = str(tmp_path / f"model.{ending}")
    model.save(path)
    again = keras.models.load_model(path)
    x, _ = windows_of(2, 8)
    for one, other in zip(again(x), model(x), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    for layer in model.layers:
        assert again.get_layer(layer.name).get_config() == layer.get_config()
        if type(layer).__module__.startswith("gpt_tf."):
            code = type(layer).__init__.__code__
            arguments = code.co_varnames[1 : code.co_argcount]
            assert set(arguments) <= set(layer.get_config())


def test_files_load_inside_a_strategy(make_model, windows_of, tmp_path):
    x, y = windows_of(4, 8)
    model = make_model()
    model.compile(sgd(), jit_compile=False)
    model.train_on_batch(x, y)
    model.save(tmp_path / "model.keras")
    model.save_weights(str(tmp_path / "model.weights.h5"))
    with two_replicas().scope():
        loaded = keras.models.load_model(tmp_path / "model.keras")
        other = make_model(seed=9)
        other.compile(sgd(), jit_compile=False)
        other.load_weights(str(tmp_path / "model.weights.h5"))
    for each in (loaded, other):
        assert not np.any(moved(each, model.get_weights()))
    start = model.get_weights()
    for each in (model, loaded):
        each.fit(x, y, verbose=0)
    np.testing.assert_allclose(moved(model, start), moved(loaded, start), atol=1e-6)


def test_the_model_generates(make_model):
    model = make_model()
    options = {"max_new_tokens": 3, "temperature": 0}
    assert model.generate([1, 2], **options) == gpt_tf.generate(
        model, [1, 2], **options
    )
