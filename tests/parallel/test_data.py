import dataclasses
import functools
import json

import numpy as np
import pytest
import tensorflow as tf

import gpt_tf
from gpt_tf.errors import InputError
from gpt_tf.parallel import data as strategies
from gpt_tf.training.config import PRESETS
from gpt_tf.training.loop import train


@pytest.fixture
def make_model(make_model):
    """One block: replicas differ in their rows, not in their layers."""
    return functools.partial(make_model, num_layers=1)


def weights_after(make_model, windows_of, replicas, jit_compile, accumulation=1):
    x, y = windows_of(8 * 20, 8)
    sample_weight = np.ones((8 * 20, 8), "float32")
    sample_weight[::3, 4:] = 0  # replicas get parts of unequal weight
    strategies._use_fresh_collective_keys()
    devices = [f"CPU:{index}" for index in range(replicas)]
    with tf.distribute.MirroredStrategy(devices).scope():
        model = make_model()
        model.compile(jit_compile=jit_compile, gradient_accumulation_steps=accumulation)
    model.fit(
        x,
        y,
        sample_weight=sample_weight,
        batch_size=8,
        epochs=1,
        shuffle=False,
        verbose=0,
    )
    assert int(model.optimizer.iterations.numpy()) == 20
    return model.get_weights(), model.evaluate(x, y, batch_size=8, verbose=0)


@pytest.mark.parametrize(
    "jit_compile", [pytest.param(True, marks=pytest.mark.slow), False]
)
def test_weights_do_not_depend_on_the_number_of_replicas(
    make_model, windows_of, jit_compile
):
    one, report = weights_after(make_model, windows_of, 1, jit_compile)
    for replicas in (2, 4):
        many, again = weights_after(make_model, windows_of, replicas, jit_compile)
        for a, b in zip(one, many, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
        np.testing.assert_allclose(report, again, rtol=1e-4)
    untrained = make_model().get_weights()
    assert max(np.abs(a - b).max() for a, b in zip(one, untrained, strict=True)) > 1e-3


@pytest.mark.slow
def test_train_gives_the_same_model_on_two_devices(corpus_folder, tmp_path):
    config = dataclasses.replace(
        PRESETS["tiny"], corpus=str(corpus_folder), vocab_size=270, batch_size=8
    )
    results = [
        train(
            config,
            tmp_path / name,
            strategy=name,
            verbose=False,
        )
        for name in ("one_device", "mirrored")
    ]
    for a, b in zip(*(r.model.get_weights() for r in results), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    losses = [r.validation_loss for r in results]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_auto_takes_all_logical_devices():
    assert strategies.make_strategy("auto").num_replicas_in_sync == 4
    assert strategies.make_strategy("one_device").num_replicas_in_sync == 1


def test_strategies_of_one_process_do_not_disturb_each_other(make_model, windows_of):
    x, y = windows_of(8, 8)
    for width in (12, 15):
        with strategies.make_strategy("mirrored").scope():
            model = make_model(embedding_dim=width, num_layers=1)
            model.compile(jit_compile=False)
        model.fit(x, y, verbose=0)


def test_each_replica_gets_its_part_of_each_batch():
    windows = gpt_tf.Windows(np.arange(400), context_length=4, batch_size=8)
    dataset = strategies.distribute(
        strategies.make_strategy("mirrored"),
        lambda parts, part: windows.dataset(num_shards=parts, shard=part),
    )
    iterator = iter(dataset)
    for step in range(3):
        expected = windows.batch(step)
        for whole, parts in zip(expected, next(iterator), strict=True):
            assert [part.shape[0] for part in parts.values] == [2] * 4
            np.testing.assert_array_equal(whole, tf.concat(parts.values, axis=0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Received: nothing"),
        ("{not json", "JSON"),
        ("[]", "JSON"),
        ('{"cluster": {"worker": ["a:1"]}}', "JSON"),
        (
            '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}',
            "worker 1",
        ),
        (
            '{"cluster": {"worker": ["a:1"]}, "task": {"type": "chief", "index": 0}}',
            "chief 0",
        ),
    ],
)
def test_a_broken_tf_config_is_refused(monkeypatch, text, message):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(InputError, match=message):
        strategies.make_strategy("multi_worker")


def test_a_good_tf_config_is_read(monkeypatch):
    config = {
        "cluster": {"chief": ["a:1"], "worker": ["b:1", "c:1"]},
        "task": {"type": "worker", "index": 1},
    }
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    assert strategies.read_tf_config() == config


def test_a_running_tensorflow_cannot_be_split_otherwise():
    tf.constant(0)  # from now on TensorFlow runs
    strategies.split_cpu(4)  # as it is
    with pytest.raises(InputError, match="already runs with 4"):
        strategies.split_cpu(3)
    with pytest.raises(InputError, match="from 1 to 256"):
        strategies.split_cpu(0)


def test_a_batch_that_cannot_be_divided_is_refused(corpus_folder, tmp_path):
    with pytest.raises(InputError, match="4 replicas"):
        train(
            PRESETS["tiny"],
            tmp_path / "run",
            corpus=str(corpus_folder),
            batch_size=6,
            strategy="mirrored",
        )
    assert not (tmp_path / "run").exists()
