import functools
import shutil

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from tensorflow.experimental import dtensor

import gpt_tf
from gpt_tf.errors import InputError
from gpt_tf.models import layers
from gpt_tf.models.block import normalize
from gpt_tf.parallel.config import parse_mesh
from gpt_tf.parallel.mesh import gather, make_mesh
from gpt_tf.parallel.mesh_gpt import MeshGPT
from gpt_tf.training.loop import load_model

# DTensor divides graphs only: all here is traced.
SIZES = {"vocab_size": 30, "num_heads": 2, "num_layers": 1}  # `model` divides two


@pytest.fixture(scope="module")
def windows():
    ids = np.random.default_rng(0).integers(0, 30, (20, 9)).astype("int32")
    return ids[:, :-1], ids[:, 1:]  # the last batch is not full


@pytest.fixture(scope="module")
def reference(fit, windows):
    """Make a model before training, the model after it and its history."""

    def make(tie_embeddings):
        keras.utils.set_random_seed(3)
        begin = gpt_tf.GPTModel(
            **SIZES,
            embedding_dim=12,
            context_length=16,
            tie_embeddings=tie_embeddings,
        )
        model = gpt_tf.GPTModel.from_config(begin.get_config())
        model.set_weights(begin.get_weights())
        model.compile(jit_compile=False)
        return begin, model, fit(model, windows, validation_data=windows)

    return functools.cache(make)


@pytest.mark.parametrize(
    ("shape", "tie_embeddings"),
    [
        ((2, 2, 1), False),
        pytest.param((1, 2, 1), True, marks=pytest.mark.slow),
        pytest.param((2, 1, 1), True, marks=pytest.mark.slow),
        pytest.param((1, 1, 2), True, marks=pytest.mark.slow),
        pytest.param((1, 2, 2), True, marks=pytest.mark.slow),
    ],
)
def test_a_mesh_trains_as_one_device_does(
    reference, windows, fit, assert_same, shape, tie_embeddings
):
    begin, whole, expected = reference(tie_embeddings)
    divided = MeshGPT(begin, make_mesh(*shape))
    assert_same(begin, divided, atol=0)
    found = fit(divided, windows, validation_data=windows)
    for name, values in expected.items():
        np.testing.assert_allclose(values, found[name], rtol=1e-4, err_msg=name)
    assert_same(whole, divided, atol=2e-6)
    with pytest.raises(AssertionError):
        assert_same(begin, divided, atol=1e-3)


def test_the_comparison_notices_one_layer_that_is_off(
    reference, windows, fit, assert_same, monkeypatch
):
    begin, whole, _ = reference(tie_embeddings=False)
    model = gpt_tf.GPTModel.from_config(begin.get_config())
    model.set_weights(begin.get_weights())
    monkeypatch.setattr(  # of the last normalisation
        layers, "normalize", lambda *given: normalize(*given) * (1 + 1e-3)
    )
    fit(model, windows)
    with pytest.raises(AssertionError):
        assert_same(whole, model, atol=2e-6)


def test_each_device_holds_its_part(make_model):
    divided = MeshGPT(make_model(**SIZES), make_mesh(batch=2, model=2))
    divided.compile()
    parts = {v.name: dtensor.unpack(v.read_value())[0].shape for v in divided.weights}
    assert parts["embedding/token_table:0"] == (15, 12)
    assert parts["block_0/qkv_kernel:0"] == (12, 3, 1, 6)
    assert parts["block_0/output_kernel:0"] == (1, 6, 12)
    assert parts["block_0/up_kernel:0"] == (12, 24)
    assert parts["block_0/down_kernel:0"] == (24, 12)
    assert parts["final_norm/gamma:0"] == (12,)
    for variable, moment in zip(
        divided.trainable_weights, divided.optimizer._momentums, strict=True
    ):
        assert moment.layout == variable.layout


def test_what_the_mesh_does_not_divide_stays_whole_or_is_filled_up(
    make_model, windows_of
):
    model = make_model(num_heads=2)  # 31 tokens, two blocks
    divided = MeshGPT(model, make_mesh(batch=2, model=2))
    x, _ = windows_of(4, 8)
    expected = model(x)
    found = divided.predict(x[:3], verbose=0)
    np.testing.assert_allclose(found, expected[:3], atol=1e-6)
    np.testing.assert_allclose(gather(divided(x)), expected, atol=1e-6)


def test_datasets_arrays_and_single_batches_give_the_same(make_model, windows):
    x, y = windows
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)  # 8, 8 and 4
    model = make_model(**SIZES)
    expected = model.test_on_batch(x[:8], y[:8])
    divided = MeshGPT(model, make_mesh(2, 1, 2))
    divided.compile()
    begin = [divided.read_variable(v) for v in divided.optimizer.variables]

    def again():
        divided.set_weights(model.get_weights())
        for variable, value in zip(divided.optimizer.variables, begin, strict=True):
            divided.write_variable(variable, value)
        return divided

    losses = [
        again().fit(*data, verbose=0, **options).history["loss"]
        for data, options in (
            ((x, y), {"batch_size": 8, "shuffle": False}),
            ((dataset,), {}),
            ((dataset.repeat(),), {"steps_per_epoch": 3}),
        )
    ]
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-6)
    found = again().train_on_batch(x[:8], y[:8])
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_dropout_is_seeded_and_leaves_evaluation_alone(make_model, windows_of):
    x, y = windows_of(8, 8, vocab_size=30)
    losses, logits = [], []
    for rate in (0.0, 0.5, 0.5):
        divided = MeshGPT(make_model(**SIZES, dropout=rate), make_mesh(1, 2, 2))
        logits.append(gather(divided(x)))
        losses.append(divided.fit(x, y, batch_size=8, verbose=0).history["loss"])
    np.testing.assert_array_equal(logits[0], logits[1])
    assert losses[1] == losses[2]
    assert abs(losses[0][0] - losses[1][0]) > 1e-3


def test_what_a_mesh_saved_loads_on_another_and_on_one_device(
    make_model, assert_same, tmp_path
):
    model = make_model(**SIZES)
    MeshGPT(model, make_mesh(1, 2, 1)).save(tmp_path / "gpt.keras")
    loaded = keras.models.load_model(tmp_path / "gpt.keras")
    assert_same(model, loaded, atol=0)
    assert_same(model, MeshGPT(loaded, make_mesh(2, 1, 2)), atol=0)


# In a run


@pytest.mark.slow
def test_a_run_on_a_mesh_goes_on_on_another_mesh_and_on_one_device(
    config, run, assert_same, tmp_path, interrupt_after
):
    whole = run(config, tmp_path / "whole", strategy="one_device")
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "run", mesh="1x2", callbacks=[interrupt_after(13)])
    for name, changes in (
        ("another", {"mesh": "batch=2,sequence=2"}),
        ("plain", {"mesh": None, "strategy": "one_device"}),
        ("same", {}),
    ):
        out = shutil.copytree(tmp_path / "run", tmp_path / name)
        resumed = run(None, out, resume=True, **changes)
        assert_same(whole.model, resumed.model, atol=5e-6)
        assert whole.validation_loss == pytest.approx(resumed.validation_loss, rel=1e-5)
    model, _ = load_model(out)
    assert_same(resumed.model, model, atol=0)


# Bad input


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("2x1", (2, 1, 1)),
        ("1X2x4", (1, 2, 4)),
        ("sequence=2", (1, 1, 2)),
        ("batch=2, model=3", (2, 3, 1)),
    ],
)
def test_a_mesh_is_read(text, sizes):
    assert tuple(parse_mesh(text).values()) == sizes


@pytest.mark.parametrize(
    "text", ["", "two", "2x", "0x2", "-1x2", "1x1x1x1", "rows=2", "batch=1,batch=2"]
)
def test_what_means_no_mesh_is_refused(text):
    with pytest.raises(InputError, match="such as 2x2"):
        parse_mesh(text)


def test_devices_that_do_not_exist_are_refused():
    with pytest.raises(InputError, match=r"expect 8 devices. Received: 4 logical"):
        make_mesh(2, 2, 2)
    with pytest.raises(InputError, match="Received: 'TPU:0'"):
        make_mesh(1, 2, devices=["TPU:0", "TPU:1"])
    with pytest.raises(InputError, match="`batch` expects"):
        make_mesh(batch=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "`num_heads` among 2 devices"),
        ({"num_heads": 2, "feedforward_dim": 7}, "`feedforward_dim` among 2"),
    ],
)
def test_a_mesh_that_does_not_divide_a_model_is_refused(make_model, changes, message):
    with pytest.raises(InputError, match=message):
        MeshGPT(make_model(num_layers=1, **changes), make_mesh(model=2))


def test_what_a_mesh_cannot_compute_is_refused(make_model, windows_of, tmp_path):
    backup = keras.callbacks.BackupAndRestore(tmp_path)
    x, y = windows_of(8, 7, vocab_size=30)
    model = MeshGPT(make_model(**SIZES), make_mesh(2, 1, 2))
    for call, message in (
        (lambda: model.fit(x, y, batch_size=8), "positions of a window among 2"),
        (lambda: model(x[:1, :6]), "windows of a batch among 2"),
        (lambda: model.predict(np.zeros((2, 18), int)), "at most 16 positions"),
        (lambda: model(np.zeros((2, 18), int)), "at most 16 positions"),
        (lambda: model(x), "positions of a window among 2"),
        (lambda: model.fit(x), "labels"),
        (lambda: model.compile(metrics=["accuracy"]), "other metrics"),
        (lambda: model.compile(loss="mse"), "NextTokenLoss"),
        (lambda: model.compile(gradient_accumulation_steps=2), "whole batches"),
        (lambda: model.set_weights([np.zeros(3)]), "1 arrays"),
        (lambda: model.fit(tf.data.Dataset.range(3)), "labels"),
        (lambda: model.fit(x, y, callbacks=[backup]), "BackupAndRestore"),
        (lambda: MeshGPT("gpt", model.mesh), "expects a GPTModel"),
    ):
        with pytest.raises(InputError, match=message):
            call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": "1x3"}, "`num_heads` among 3"),
        ({"mesh": "3x1"}, "windows of a batch among 3"),
        ({"mesh": "sequence=3"}, "positions of a window among 3"),
        ({"mesh": "1x2", "precision": "mixed_bfloat16"}, "float32 beside `mesh`"),
        ({"mesh": "2 by 2"}, "such as 2x2"),
    ],
)
def test_a_run_that_a_mesh_does_not_divide_writes_nothing(
    config, run, tmp_path, changes, message
):
    with pytest.raises(InputError, match=message):
        run(config, tmp_path / "run", **changes)
    assert list(tmp_path.iterdir()) == []
