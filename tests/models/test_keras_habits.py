"""What users of Keras's models do, done with a GPTModel."""

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
from gpt_tf.parallel import data as strategies

IDS = np.zeros((2, 4), "int32")


@pytest.fixture
def make_model(make_model):
    """One block: none of this depends on their number, and it is traced sooner."""
    return functools.partial(make_model, num_layers=1)


def sgd():
    return keras.optimizers.SGD(0.1)


def own_loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def mirrored(replicas=2):
    strategies._use_fresh_collective_keys()
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])


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
def test_what_would_train_wrongly_is_refused(make_model, options, named):
    with pytest.raises(InputError, match=named):
        make_model().compile("adam", **options)


def recording_loss(seen):
    """Return a loss that notes how many rows it is of, which XLA cannot compile."""

    def loss(labels, logits):
        tf.py_function(lambda x: seen.append(len(x)), [logits], [])
        return keras.losses.sparse_categorical_crossentropy(
            labels, logits, from_logits=True
        )

    return loss


def test_a_loss_that_xla_cannot_compile_switches_it_off(make_model, windows_of):
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
    make_model, windows_of, monkeypatch
):
    monkeypatch.setattr(xla, "ON_BY_DEFAULT", True)
    model = make_model()
    model.compile()
    assert model.uses_xla
    model.fit(*windows_of(4, 8), verbose=0)
    model.jit_compile = False
    assert not model.uses_xla
    model.fit(*windows_of(4, 8), verbose=0)


def test_a_batch_trains_and_is_measured_without_compile(make_model, windows_of):
    x, y = windows_of(4, 8)
    model = make_model()
    loss = model.train_on_batch(x, y, return_dict=True)["loss"]
    assert model.test_on_batch(x, y, return_dict=True)["loss"] < loss


# Data


@pytest.mark.parametrize(
    "given",
    [
        lambda x, y: ({"tokens": x}, y[..., None]),
        lambda x, y: (x.tolist(), {"head": y}),
        lambda x, y: (tf.data.Dataset.from_tensors(({"tokens": x}, y)), None),
    ],
)
def test_data_come_in_every_structure(make_model, windows_of, given):
    x, y = windows_of(4, 8)
    model = make_model()
    start = model.get_weights()
    found = []
    for data in ((x, y), given(x, y)):
        model.set_weights(start)
        model.compile(sgd(), jit_compile=False)
        model.fit(*data, verbose=0)
        found.append(moved(model, start))
    np.testing.assert_allclose(*found, atol=1e-7)
    assert np.abs(found[0]).max() > 1e-4


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
def test_data_that_are_no_windows_are_refused(make_model, x, y, named):
    with pytest.raises(InputError, match=named):
        make_model().fit(x, y, verbose=0)


def test_class_weights_are_refused(make_model, windows_of):
    with pytest.raises(InputError, match="sample_weight"):
        make_model().fit(*windows_of(4, 8), class_weight={0: 2.0}, verbose=0)


@pytest.mark.parametrize(
    ("role", "bad", "jit_compile"),
    [
        ("inputs", -1, True),
        ("labels", 31, False),
        pytest.param("inputs", 31, False, marks=pytest.mark.slow),
        pytest.param("labels", -99, True, marks=pytest.mark.slow),
    ],
)
def test_ids_that_there_are_none_of_are_named(
    make_model, windows_of, role, bad, jit_compile
):
    x, y = windows_of(8, 8)
    (x if role == "inputs" else y)[5, 3] = bad
    model = make_model()
    model.compile(jit_compile=jit_compile)
    start = model.get_weights()
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    for method in (model.fit, model.evaluate):
        with pytest.raises(InputError, match=f"{role}.*Received: {bad}"):
            method(data, verbose=0)
    assert not np.any(moved(model, start))


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


def test_ignored_labels_in_a_dataset_do_not_count(make_model, windows_of):
    x, y = windows_of(8, 8)
    y[:, 6:] = -100
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    model, short = make_model(), make_model()
    start = model.get_weights()
    for each in (model, short):
        each.compile(sgd(), jit_compile=True)
    model.fit(data, verbose=0)
    short.fit(x[:, :6], y[:, :6], batch_size=8, verbose=0)
    np.testing.assert_allclose(moved(model, start), moved(short, start), atol=1e-6)


# The step


def test_a_step_in_float16_is_one_in_float32(make_model, windows_of):
    x, y = windows_of(8, 8)
    found = {}
    for policy in ("float32", "mixed_float16"):
        keras.mixed_precision.set_global_policy(policy)
        try:
            for parts in (1, 2):
                model = make_model()
                start = model.get_weights()
                model.compile(
                    sgd(), gradient_accumulation_steps=parts, jit_compile=True
                )
                model.fit(x, y, batch_size=8, verbose=0)
                found[policy, parts] = moved(model, start)
        finally:
            keras.mixed_precision.set_global_policy("float32")
    expected = found["float32", 1]
    for step in found.values():
        np.testing.assert_allclose(step, expected, atol=0.01 * np.abs(expected).max())


@pytest.mark.parametrize("devices", [["CPU:0"], ["CPU:0", "CPU:1"]])
def test_a_trained_model_leaves_nothing_in_memory(make_model, windows_of, devices):
    def graphs_after_training():
        with tf.distribute.MirroredStrategy(devices).scope():
            model = make_model()
        model.fit(*windows_of(4, 8), batch_size=4, verbose=0)
        del model
        gc.collect()
        return sum(isinstance(thing, FuncGraph) for thing in gc.get_objects())

    assert graphs_after_training() == graphs_after_training()


def test_replicas_of_unequal_work_train_as_one_device(make_model, windows_of):
    x, y = windows_of(6, 8)  # of four replicas two get two rows
    y[0] = y[1, 2:] = -100
    found = []
    for replicas in (1, 4):
        with mirrored(replicas).scope():
            model = make_model()
            model.compile(sgd(), jit_compile=False)
        start = model.get_weights()
        history = model.fit(x, y, batch_size=6, verbose=0).history
        report = model.evaluate(x, y, batch_size=4, verbose=0)
        found.append((moved(model, start), history["loss"], report))
    for one, four in zip(*found, strict=True):
        np.testing.assert_allclose(one, four, rtol=1e-4, atol=1e-6)


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
def test_the_default_loss_is_right_in_other_steps(make, loss, windows_of):
    x, y = windows_of(8, 8)
    found = []
    for replicas in (1, 2):
        keras.utils.set_random_seed(0)
        with mirrored(replicas).scope():
            model = make(31, 12, 1, 2, context_length=8)
            model.compile(sgd(), loss and loss())
        start = model.get_weights()
        history = model.fit(x, y, batch_size=8, verbose=0).history
        found.append((moved(model, start), history["loss"][0]))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-6)
    assert found[0][1] == pytest.approx(found[1][1]) == pytest.approx(3.43, abs=0.1)


def test_a_model_on_another_device_trains(make_model, windows_of):
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

pytestmark = pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")


@pytest.mark.parametrize("ending", ["keras", "h5", "tf"])
def test_a_saved_model_loads(make_model, windows_of, tmp_path, ending):
    x, y = windows_of(4, 8)
    model = make_model()
    model.compile(sgd(), loss_weights=3.0, gradient_accumulation_steps=2)
    model.fit(x, y, verbose=0)
    path = str(tmp_path / f"model.{ending}")
    model.save(path)
    again = keras.models.load_model(path)
    assert again.evaluate(x, y, verbose=0) == pytest.approx(
        model.evaluate(x, y, verbose=0), rel=1e-6
    )
    if ending == "keras":
        assert again.gradient_accumulation_steps == 2
    assert [m.name for m in again.metrics] == [m.name for m in model.metrics]


def test_a_description_in_json_makes_a_model(make_model):
    model = make_model()
    again = keras.models.model_from_json(model.to_json())
    assert type(again) is gpt_tf.GPTModel
    assert again.get_config() == model.get_config()


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_a_model_on_its_layers_loads(make_model, windows_of, tmp_path, ending):
    gpt = make_model()
    features = gpt.get_layer("final_norm").output
    model = keras.Model(gpt.input, keras.layers.Dense(3)(features))
    path = str(tmp_path / f"model.{ending}")
    model.save(path)
    x, _ = windows_of(2, 8)
    np.testing.assert_allclose(keras.models.load_model(path)(x), model(x), rtol=1e-5)


def test_files_load_inside_a_strategy(make_model, windows_of, tmp_path):
    x, y = windows_of(4, 8)
    model = make_model()
    model.compile(sgd(), jit_compile=False)
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    model.save_weights(str(tmp_path / "model.weights.h5"))
    with mirrored().scope():
        loaded = keras.models.load_model(tmp_path / "model.keras")
        other = make_model(seed=9)
        other.compile(sgd(), jit_compile=False)
        other.load_weights(str(tmp_path / "model.weights.h5"))
    for each in (loaded, other):
        # Each replica computes a part of the rows, and rounds in an order of its own.
        np.testing.assert_allclose(
            each.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6
        )
        each.fit(x, y, verbose=0)


def test_the_model_generates(make_model):
    model = make_model()
    options = {"max_new_tokens": 3, "temperature": 0}
    assert model.generate([1, 2], **options) == gpt_tf.generate(
        model, [1, 2], **options
    )
