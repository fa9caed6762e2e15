import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from gpt_tf.errors import InputTypeError
from gpt_tf.models.gpt import GPTModel
from gpt_tf.models.interop import named_variables
from gpt_tf.models.next_token import NextTokenLoss, TokenAccuracy
from tests.oracles import numpy_gpt

pytestmark = pytest.mark.usefixtures("eagerly")


def perturb(model):
    """Give every weight, biases and gains too, a value of its own."""
    generator = np.random.default_rng(11)
    for weight in model.weights:
        weight.assign_add(generator.normal(0, 0.1, weight.shape))


def oracle(model, tokens):
    weights = {name: v.numpy() for name, v in named_variables(model).items()}
    return numpy_gpt.forward(weights, tokens, model.num_layers, model.num_heads)


@pytest.mark.parametrize(
    "shape",
    [
        {"num_heads": 5},  # does not divide the width
        {"tie_embeddings": False, "feedforward_dim": 20},
        {"num_layers": 1, "num_heads": 1},
    ],
)
def test_logits_match_the_numpy_oracle(make_model, windows_of, shape):
    model = make_model(**shape)
    perturb(model)
    tokens, _ = windows_of(2, 9)
    logits = model(tokens).numpy()
    assert logits.shape == (2, 9, 31)
    for row in range(2):
        assert np.abs(logits[row] - oracle(model, tokens[row])).max() < 1e-4


def test_the_oracle_notices_a_change_of_any_weight(make_model, windows_of):
    model = make_model()
    perturb(model)
    tokens, _ = windows_of(1, 9)
    expected = oracle(model, tokens[0])
    assert np.abs(model(tokens).numpy()[0] - expected).max() < 1e-4
    named = named_variables(model)
    assert len(named) == 28
    generator = np.random.default_rng(1)
    for name, weight in named.items():
        before = weight.numpy()
        weight.assign_add(generator.normal(0, 0.02, weight.shape))
        assert np.abs(model(tokens).numpy()[0] - expected).max() > 1e-4, name
        weight.assign(before)


def test_future_tokens_do_not_change_past_logits(make_model, windows_of):
    model = make_model()
    perturb(model)
    tokens, _ = windows_of(1, 10)
    changed = tokens.copy()
    changed[0, 6:] = (changed[0, 6:] + 1) % 31
    before, after = model(tokens).numpy(), model(changed).numpy()
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert np.abs(before[:, 6:] - after[:, 6:]).max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "devices"),
    [
        pytest.param((10000, 512, 6, 8), None, marks=pytest.mark.slow),
        pytest.param((5000, 256, 4, 6), None, marks=pytest.mark.slow),
        # As the one above, but sooner traced.
        ((5000, 256, 1, 6), ["CPU:0", "CPU:1"]),
    ],
)
def test_the_articles_snippets_run_as_written(arguments, devices, traced):
    names = ("vocab_size", "embedding_dim", "num_layers", "num_heads")
    strategy = tf.distribute.MirroredStrategy(devices)
    with strategy.scope():
        model = GPTModel(**dict(zip(names, arguments, strict=True)))
    inputs = np.random.randint(0, 5000, (4, 8))
    labels = np.random.randint(0, 5000, (4, 8))
    history = model.fit(inputs, labels, epochs=10, verbose=0)
    losses = history.history["loss"]
    assert len(losses) == 10
    assert losses[-1] < losses[0]


def test_the_head_width_is_rounded_down(make_model):
    block = make_model(num_heads=5, embedding_dim=12).get_layer("block_0")
    assert block.head_dim == 2
    assert block.qkv_kernel.shape == (12, 30)
    assert block.output_kernel.shape == (10, 12)


def test_reported_loss_and_accuracy_are_the_oracles(make_model, windows_of):
    model = make_model()
    perturb(model)
    x, y = windows_of(3, 8)
    report = model.evaluate(x, y, batch_size=3, verbose=0, return_dict=True)
    logits = np.stack([oracle(model, row) for row in x])
    loss = np.mean(
        [numpy_gpt.mean_loss(lg, lb) for lg, lb in zip(logits, y, strict=True)]
    )
    assert report["loss"] == pytest.approx(loss, abs=1e-5)
    assert report["perplexity"] == pytest.approx(np.exp(loss), rel=1e-4)
    assert report["token_accuracy"] == pytest.approx((logits.argmax(-1) == y).mean())


def gradients_of(model, *batch):
    return model.differentiate(*map(tf.constant, batch))[0]


def test_gradients_match_finite_differences(make_model, windows_of):
    model = make_model()
    perturb(model)
    model.compile(jit_compile=False)
    x, y = windows_of(2, 6)
    gradients = gradients_of(model, x, y, np.ones((2, 6), "float32"))
    names = {v.ref(): name for name, v in named_variables(model).items()}

    def loss(changed):
        return np.mean(
            [
                numpy_gpt.mean_loss(numpy_gpt.forward(changed, row, 2, 3), labels)
                for row, labels in zip(x, y, strict=True)
            ]
        )

    values = {n: v.numpy().astype("float64") for n, v in named_variables(model).items()}
    generator = np.random.default_rng(2)
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        name = names[variable.ref()]
        direction = generator.normal(size=variable.shape)
        direction /= np.linalg.norm(direction)
        step = 1e-4
        up = {**values, name: values[name] + step * direction}
        down = {**values, name: values[name] - step * direction}
        expected = (loss(up) - loss(down)) / (2 * step)
        assert np.sum(gradient.numpy() * direction) == pytest.approx(expected, abs=2e-5)


def test_padding_has_no_influence_on_loss_or_gradient(make_model, windows_of):
    model = make_model()
    perturb(model)
    model.compile(jit_compile=False)
    x, y = windows_of(2, 8)
    y[0, 5:] = -100
    weights = np.ones((2, 8), "float32")
    plain = gradients_of(model, x, y, weights)
    # Other tokens under the padding, and rows that are nothing but padding.
    x2, y2 = np.concatenate([x, x]), np.concatenate([y, np.full_like(y, -100)])
    x2[0, 5:] = 7
    weights2 = np.concatenate([weights, weights])
    padded = gradients_of(model, x2, y2, weights2)
    for one, other in zip(plain, padded, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    loss = model.evaluate(x, y, verbose=0)[0]
    assert model.evaluate(x2, y2, batch_size=3, verbose=0)[0] == (
        pytest.approx(loss, abs=1e-6)
    )
    y2[2:] = 1  # the tolerance notices rows that do count
    different = gradients_of(model, x2, y2, weights2)
    assert (
        max(np.abs(a - b).max() for a, b in zip(plain, different, strict=True)) > 1e-4
    )


def test_perplexity_is_of_the_weighted_mean(make_model, windows_of):
    model, (x, y) = make_model(), windows_of(3, 8)
    weights = np.random.default_rng(0).uniform(0, 2, (3, 8)).astype("float32")
    report = model.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True)
    mean = report["loss"] / weights.mean()  # Keras's loss is divided by the labels
    assert report["perplexity"] == pytest.approx(np.exp(mean), rel=1e-4)


def test_next_token_loss_averages_over_what_counts():
    logits = np.random.default_rng(0).normal(size=(1, 4, 5)).astype("float32")
    labels = np.array([[1, 2, -100, -100]])
    expected = numpy_gpt.mean_loss(logits[0, :2].astype("float64"), labels[0, :2])
    assert float(NextTokenLoss()(labels, logits)) == pytest.approx(expected, abs=1e-6)
    ignoring = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=-100
    )
    weights = np.array([[0.5, 1.0, 3.0, 1.0]], "float32")
    for given in (None, weights, weights[:, 1]):
        ours, theirs = (
            float(loss(labels, logits, given)) for loss in (NextTokenLoss(), ignoring)
        )
        assert ours == pytest.approx(theirs, abs=1e-6)
    assert float(NextTokenLoss()(np.full((1, 4), -100), logits)) == 0.0


def test_equal_logits_are_right_once_and_not_everywhere():
    accuracy = TokenAccuracy()
    accuracy.update_state(np.array([[0, 1, 2, -100]]), np.zeros((1, 4, 5), "float32"))
    assert float(accuracy.result()) == pytest.approx(1 / 3)


def test_keras_3_objects_get_the_teaching_error(make_model):
    import keras as keras_3

    model = make_model(num_layers=1)
    for method, role, value in (
        (model.compile, "optimizer", keras_3.optimizers.Adam()),
        (model.compile, "metrics", [keras_3.metrics.Mean()]),
        (model.compile, "loss", keras_3.losses.MeanSquaredError()),
        (model.fit, "callbacks", [keras_3.callbacks.EarlyStopping()]),
    ):
        with pytest.raises(InputTypeError, match=f"{role}.*import tf_keras as keras"):
            method(**{role: value})


def test_accumulation_trains_and_reports_as_whole_batches_do(make_model, windows_of):
    x, y = windows_of(10, 8)
    sample_weight = np.ones((10, 8), "float32")
    sample_weight[0, 2:] = 0  # parts of unequal weight
    found = []
    for parts in (1, 4):  # batches of 8, and of 2, which 4 does not divide
        model = make_model(num_layers=1)
        hits = keras.metrics.SparseCategoricalAccuracy(name="hits")
        model.compile(weighted_metrics=[hits], gradient_accumulation_steps=parts)
        history = model.fit(x, y, 8, 1, 0, sample_weight=sample_weight, shuffle=False)
        found.append((model.get_weights(), history.history))
    (whole, expected), (in_parts, reported) = found
    for one, other in zip(whole, in_parts, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    for name in ("loss", "hits", "token_accuracy"):
        assert reported[name] == pytest.approx(expected[name], rel=1e-5)
    assert reported["hits"] == pytest.approx(reported["token_accuracy"])


def test_batches_of_unequal_size_count_by_their_tokens(make_model, windows_of):
    model = make_model()
    perturb(model)
    model.compile(jit_compile=False)
    x, y = windows_of(5, 8)
    whole = model.evaluate(x, y, batch_size=5, verbose=0)
    parts = model.evaluate(x, y, batch_size=2, verbose=0)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    alone = [
        model.evaluate(x[i : i + 2], y[i : i + 2], verbose=0)[0] for i in (0, 2, 4)
    ]
    assert abs(np.mean(alone) - whole[0]) > 1e-4  # the mean of means is another
