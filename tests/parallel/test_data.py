import dataclasses

import numpy as np
import pytest
import tensorflow as tf

import gpt_tf
from gpt_tf.errors import InputError
from gpt_tf.parallel import data as strategies


@pytest.mark.parametrize(
    ("replicas", "jit_compile"),
    [(2, False), pytest.param(4, True, marks=pytest.mark.slow)],
)
def test_weights_do_not_depend_on_the_number_of_replicas(
    make_model, windows_of, fit, assert_same, replicas, jit_compile
):
    windows = windows_of(24, 8)
    devices = [f"CPU:{index}" for index in range(replicas)]
    models, reports = [], []
    for strategy in (
        tf.distribute.OneDeviceStrategy("CPU:0"),
        tf.distribute.MirroredStrategy(devices),
    ):
        with strategy.scope():
            # Replicas differ in their rows, not in their layers.
            models.append(make_model(num_layers=1))
            models[-1].compile(jit_compile=jit_compile)
        reports.append(fit(models[-1], windows, validation_data=windows))
    assert_same(*models, atol=1e-5)
    found = [[report[name] for name in reports[0]] for report in reports]
    np.testing.assert_allclose(*found, rtol=1e-4)
    with pytest.raises(AssertionError):
        assert_same(models[0], make_model(num_layers=1), atol=1e-3)


@pytest.mark.slow
def test_train_gives_the_same_model_on_two_devices(config, run, assert_same, tmp_path):
    config = dataclasses.replace(config, batch_size=8, jit_compile="auto")
    one, other = (
        run(config, tmp_path / name, strategy=name)
        for name in ("one_device", "mirrored")
    )
    assert_same(one.model, other.model, atol=1e-4)
    assert one.validation_loss == pytest.approx(other.validation_loss, abs=1e-4)


def test_auto_takes_all_logical_devices():
    assert strategies.make_strategy("auto").num_replicas_in_sync == 4
    assert strategies.make_strategy("one_device").num_replicas_in_sync == 1


def test_strategies_of_one_process_do_not_disturb_each_other():
    for width in (12, 15):
        strategy = strategies.make_strategy("mirrored")

        @tf.function
        def total(width=width):
            replica = tf.distribute.get_replica_context()
            return replica.all_reduce(tf.distribute.ReduceOp.SUM, tf.ones(width))

        found = strategy.experimental_local_results(strategy.run(total))
        np.testing.assert_array_equal(found, np.full((4, width), 4.0))


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


WORKERS = '{"cluster": {"worker": ["a:1"]}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Received: nothing"),
        ("{not json", "JSON"),
        ("[]", "JSON"),
        (WORKERS + "}", "JSON"),
        (WORKERS + ', "task": {"type": "worker", "index": 1}}', "worker 1"),
        (WORKERS + ', "task": {"type": "chief", "index": 0}}', "chief 0"),
    ],
)
def test_a_broken_tf_config_is_refused(monkeypatch, text, message):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(InputError, match=message):
        strategies.make_strategy("multi_worker")


def test_a_running_tensorflow_cannot_be_split_otherwise():
    tf.constant(0)  # from now on TensorFlow runs
    strategies.split_cpu(4)  # as it is
    with pytest.raises(InputError, match="already runs with 4"):
        strategies.split_cpu(3)
    with pytest.raises(InputError, match="from 1 to 256"):
        strategies.split_cpu(0)


def test_a_batch_that_cannot_be_divided_is_refused(config, run, tmp_path):
    with pytest.raises(InputError, match="4 replicas"):
        run(config, tmp_path / "run", batch_size=6, strategy="mirrored")
    assert not (tmp_path / "run").exists()
