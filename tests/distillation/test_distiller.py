import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from scipy.special import log_softmax

from gpt_tf import Distiller, GPTModel, make_student
from gpt_tf.distillation import losses
from gpt_tf.distillation.distiller import outputs_of
from gpt_tf.distillation.generated_text import continued
from gpt_tf.errors import InputError, InputTypeError
from gpt_tf.models.optimizer import AdamW
from gpt_tf.quantization.qat import activation_ranges, quantize_aware, to_float

# Tests of few steps, which run as they are; those that ask for `traced` run as for
# users.
pytestmark = pytest.mark.usefixtures("eagerly")

METRICS = {
    "loss",
    "student_loss",
    "distillation_loss",
    "perplexity",
    "token_accuracy",
    "teacher_agreement",
    "kl_divergence",
}


@pytest.fixture(scope="module")
def built():
    """A teacher that has opinions, a smaller student, and the weights of both."""
    keras.utils.set_random_seed(1)
    teacher = GPTModel(31, 12, num_layers=2, num_heads=3, context_length=16)
    generator = np.random.default_rng(2)
    teacher.set_weights(
        [w + generator.normal(0, 0.2, w.shape) for w in teacher.get_weights()]
    )
    student = GPTModel(31, 8, num_layers=1, num_heads=2, context_length=16)
    return [(model, model.get_weights()) for model in (teacher, student)]


@pytest.fixture
def pair(built):
    """The same two for every test, which may change their weights."""
    for model, weights in built:
        model.set_weights(weights)
    return tuple(model for model, _ in built)


def distiller_of(pair, **options):
    distiller = Distiller(teacher=pair[0], student=pair[1])
    options.setdefault("optimizer", AdamW(1e-2))
    options.setdefault("jit_compile", False)  # which compiles longer than it trains
    distiller.compile(**options)
    return distiller


def log_probabilities(model, x):
    return log_softmax(model(x).numpy().astype(float), axis=-1)


def stated_loss(teacher, student, x, y, weights, alpha, temperature):
    """The loss in NumPy, from both models' logits."""
    ours, theirs = log_probabilities(student, x), log_probabilities(teacher, x)
    hard = -np.take_along_axis(ours, y[..., None], -1)[..., 0]
    p, q = (log_softmax(logs / temperature, axis=-1) for logs in (theirs, ours))
    soft = temperature**2 * (np.exp(p) * (p - q)).sum(-1)
    both = alpha * hard + (1 - alpha) * soft
    return (both * weights).mean()


# What is trained


def test_the_student_comes_nearer_to_the_teacher_which_stays(pair, windows_of, traced):
    x, y = windows_of(16, 16)
    weights = pair[0].get_weights()
    distiller = distiller_of(pair, alpha=0.0)
    before = distiller.evaluate(x, y, verbose=0, return_dict=True)
    distiller.fit(x, y, batch_size=8, epochs=15, verbose=0)
    after = distiller.evaluate(x, y, verbose=0, return_dict=True)
    assert after["kl_divergence"] < 0.8 * before["kl_divergence"]
    assert after["teacher_agreement"] > before["teacher_agreement"]
    for old, new in zip(weights, pair[0].get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    ("alpha", "temperature", "jit_compile"),
    [
        (0.1, 1.0, False),
        (0.5, 2.0, True),
        pytest.param(0.1, 1.0, True, marks=pytest.mark.slow),
    ],
)
def test_the_loss_is_what_the_formula_says(
    pair, windows_of, request, alpha, temperature, jit_compile
):
    if jit_compile:
        request.getfixturevalue("traced")
    x, y = windows_of(4, 16)
    weights = np.random.default_rng(3).uniform(0, 2, y.shape).astype("float32")
    weights[:, 12:] = 0
    options = {"alpha": alpha, "temperature": temperature}
    distiller = distiller_of(pair, jit_compile=jit_compile, **options)
    found = distiller.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True)
    wanted = stated_loss(*pair, x, y, weights, alpha, temperature)
    assert set(found) == METRICS
    assert found["loss"] == pytest.approx(wanted, rel=1e-4)
    off = stated_loss(*pair, x, y, weights, 0.9 * alpha, temperature)
    assert found["loss"] != pytest.approx(off, rel=1e-4)


def test_padding_has_no_influence_on_the_student(pair, windows_of):
    x, y = windows_of(4, 16)
    weights = np.ones(y.shape, "float32")
    weights[:, 10:] = 0
    start = pair[1].get_weights()
    found = []
    for filling in (0, 7):
        pair[1].set_weights(start)
        padded = x.copy(), y.copy()
        padded[0][:, 11:] = padded[1][:, 10:] = filling
        distiller = distiller_of(pair, distillation_loss="reverse_kl")
        distiller.fit(*padded, sample_weight=weights, verbose=0)
        found.append(pair[1].get_weights())
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def trained_on(strategy, make_model, data, quantized=False, **options):
    with strategy.scope():
        teacher = make_model(seed=1, num_layers=1)
    # As after `train`, whose strategy's scope is closed by then.
    student = make_student(teacher, embedding_dim=9)
    if quantized:
        student = quantize_aware(student)
    distiller = distiller_of((teacher, student), **options)
    for model in (student, distiller):
        assert model.distribute_strategy is strategy
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(8)
    distiller.fit(dataset, epochs=2, verbose=0)
    return student


def mirrored(replicas):
    devices = [f"CPU:{index}" for index in range(replicas)]
    return tf.distribute.MirroredStrategy(devices)


def one_device():
    return tf.distribute.OneDeviceStrategy("CPU:0")


@pytest.mark.parametrize(
    ("replicas", "jit_compile"),
    [(2, False), pytest.param(4, "auto", marks=pytest.mark.slow)],
)
def test_replicas_give_the_student_of_one_device(
    make_model, windows_of, request, replicas, jit_compile
):
    x, y = windows_of(16, 16)
    weights = np.random.default_rng(3).uniform(0, 2, y.shape).astype("float32")
    one = trained_on(one_device(), make_model, (x, y, weights))
    request.getfixturevalue("traced")
    many = trained_on(
        mirrored(replicas), make_model, (x, y, weights), jit_compile=jit_compile
    )
    for a, b in zip(one.get_weights(), many.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    begun = make_student(make_model(seed=1, num_layers=1), embedding_dim=9)
    moved = np.abs(one.get_weights()[0] - begun.get_weights()[0])
    assert moved.max() > 1e-2


@pytest.mark.parametrize(
    "jit_compile", [False, pytest.param("auto", marks=pytest.mark.slow)]
)
def test_a_quantisation_aware_student_learns_and_its_ranges_do_not_depend_on_replicas(
    make_model, windows_of, request, jit_compile
):
    if jit_compile:
        request.getfixturevalue("traced")
    options = {"quantized": True, "jit_compile": jit_compile}
    strategy = mirrored(2)
    one, two = (
        trained_on(strategy, make_model, windows_of(8, 16), **options)
        for strategy in (one_device(), strategy)
    )
    ranges = activation_ranges(two)
    for name, (low, high) in activation_ranges(one).items():
        assert low < high
        np.testing.assert_allclose(ranges[name], (low, high), atol=1e-4)
    for a, b in zip(one.get_weights(), two.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert to_float(two).distribute_strategy is strategy


def test_parts_of_a_batch_give_the_same_student(pair, windows_of):
    data = windows_of(4, 16)
    start, found = pair[1].get_weights(), []
    for parts in (1, 4):
        pair[1].set_weights(start)
        distiller = distiller_of(pair, gradient_accumulation_steps=parts)
        distiller.fit(*data, batch_size=4, epochs=2, verbose=0)
        found.append(pair[1].get_weights())
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4)


def test_it_trains_in_mixed_precision(make_model, windows_of):
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        pair = [make_model(seed=seed, num_layers=1) for seed in (1, 5)]
        found = distiller_of(pair).fit(*windows_of(8, 16), epochs=2, verbose=0)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert found.history["loss"][1] < found.history["loss"][0]
    assert {weight.dtype.name for weight in pair[1].weights} == {"float32"}


@pytest.mark.parametrize("loss", ["universal_logit", keras.losses.KLDivergence()])
def test_losses_of_other_kinds_train(pair, windows_of, loss):
    distiller = distiller_of(pair, distillation_loss=loss, alpha=0.0)
    found = distiller.fit(*windows_of(8, 16), batch_size=8, epochs=4, verbose=0)
    assert found.history["loss"][-1] < found.history["loss"][0]


def test_projections_are_trained_with_the_student(pair, windows_of):
    loss = losses.get(
        [("forward_kl", 1.0), ("hidden_states", 0.5), ("attention_transfer", 0.5)]
    )
    distiller = distiller_of(pair, distillation_loss=loss, alpha=0.0)
    before = [weight.numpy() for weight in loss.trainable_weights]
    assert before
    found = distiller.fit(*windows_of(8, 16), batch_size=8, epochs=4, verbose=0)
    assert found.history["loss"][-1] < found.history["loss"][0]
    for old, new in zip(before, loss.trainable_weights, strict=True):
        assert not np.array_equal(old, new.numpy())


# Keras's customs


def test_user_metrics_and_predict_see_the_students_logits(pair, windows_of):
    x, y = windows_of(4, 16)
    metric = keras.metrics.SparseCategoricalAccuracy(name="own")
    distiller = distiller_of(pair, metrics=[metric])
    found = distiller.evaluate(x, y, verbose=0, return_dict=True)
    assert found["own"] == pytest.approx(found["token_accuracy"])
    logits = distiller.predict(x, verbose=0)
    np.testing.assert_allclose(logits, pair[1](x), atol=1e-6)


def test_a_saved_distiller_goes_on_as_if_nothing_had_happened(
    pair, windows_of, tmp_path
):
    data = windows_of(8, 16)
    options = {"shuffle": False, "verbose": 0}
    loss = [("forward_kl", 1.0), ("hidden_states", 0.5)]
    distiller = distiller_of(pair, distillation_loss=loss, alpha=0.3, temperature=2.0)
    distiller.fit(*data, **options)
    distiller.save(tmp_path / "distiller.keras")
    loaded = keras.models.load_model(tmp_path / "distiller.keras")
    assert loaded.temperature == 2.0
    for model in (distiller, loaded):
        model.fit(*data, **options)
    for one, two in zip(distiller.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy())


# Stored knowledge, and teachers that read other tokens


def stored(teacher, x, k):
    """Token ids with the teacher's k largest probabilities beside them."""
    log_probs = log_probabilities(teacher, x)
    ids = np.argsort(-log_probs, axis=-1)[..., :k]
    largest = np.take_along_axis(log_probs, ids, -1)
    rest = np.log(np.maximum(1 - np.exp(largest).sum(-1, keepdims=True), 1e-30))
    return {
        "tokens": x,
        "teacher_ids": ids.astype("int32"),
        "teacher_log_probs": np.concatenate([largest, rest], -1).astype("float32"),
    }


def test_stored_and_live_knowledge_give_the_same_loss(pair, windows_of):
    x, y = windows_of(4, 16)
    live = distiller_of(pair, alpha=0.0).evaluate(x, y, verbose=0)[0]
    whole, part = (
        distiller_of((None, pair[1]), alpha=0.0).evaluate(
            stored(pair[0], x, k), y, verbose=0
        )[0]
        for k in (31, 8)
    )
    assert whole == pytest.approx(live, rel=1e-4)
    assert live - part > 0.01  # it leaves out how the remaining mass is spread


def test_sorted_knowledge_is_for_losses_across_vocabularies(pair, windows_of):
    x, y = windows_of(2, 8)
    inputs = stored(pair[0], x, 30)
    del inputs["teacher_ids"]
    options = {"distillation_loss": "universal_logit", "alpha": 0.0}
    distiller = distiller_of((None, pair[1]), **options)
    found = distiller.evaluate(inputs, y, verbose=0, return_dict=True)
    live = distiller_of(pair, **options).evaluate(x, y, verbose=0, return_dict=True)
    assert found["loss"] == pytest.approx(live["loss"], rel=1e-4)
    assert found["kl_divergence"] == 0 < live["kl_divergence"]
    with pytest.raises(InputError, match="sorted ones"):
        distiller_of((None, pair[1])).evaluate(inputs, y, verbose=0)


def test_a_student_learns_without_the_teacher_in_memory(pair, windows_of):
    x, y = windows_of(8, 16)
    distiller = distiller_of((None, pair[1]), alpha=0.0)
    found = distiller.fit(stored(pair[0], x, 31), y, epochs=4, verbose=0)
    assert found.history["loss"][-1] < found.history["loss"][0]
    # Validation without knowledge tells the student's own loss.
    measured = distiller.evaluate(x, y, verbose=0, return_dict=True)
    assert measured["student_loss"] > 0
    assert measured["kl_divergence"] == 0


def test_a_distiller_with_neither_teacher_nor_knowledge_says_so(pair, windows_of):
    distiller = distiller_of((None, pair[1]))
    x, y = windows_of(4, 16)
    for data in ((x, y), (tf.data.Dataset.from_tensors((x, y)),)):
        with pytest.raises(InputError, match="stored knowledge"):
            distiller.fit(*data, verbose=0)


# What the student writes


def make_sure(*students):
    """Make sampling and taking the most likely token the same."""
    for student in students:
        table = student.get_layer("embedding").token_table
        table.assign(table * 4000)


def test_the_student_writes_what_it_finds_most_likely(pair, traced):
    student = pair[1]
    make_sure(student)
    prompts = tf.constant([[3, 1, 4], [1, 5, 9]])
    write = tf.function(continued, jit_compile=False)
    text = write(student, prompts, 12, tf.constant([1, 2])).numpy()
    np.testing.assert_array_equal(text[:, :3], prompts)
    top_1 = student(text).numpy().argmax(-1)
    np.testing.assert_array_equal(text[:, 3:], top_1[:, 2:-1])


@pytest.mark.parametrize(
    "policy", [pytest.param("mixed_bfloat16", marks=pytest.mark.slow), "mixed_float16"]
)
def test_a_student_of_16_bits_writes_by_the_same_probabilities(make_model, policy):
    keras.mixed_precision.set_global_policy(policy)
    try:
        teacher, student = (make_model(seed=seed, num_layers=1) for seed in (1, 5))
        distiller = distiller_of((teacher, student), on_policy_fraction=1.0)
        losses_of = distiller.fit(np.ones((4, 8)), np.ones((4, 8)), verbose=0).history
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert np.isfinite(losses_of["loss"]).all()
    wide = make_model(seed=5, num_layers=1)
    wide.set_weights(student.get_weights())
    make_sure(student, wide)
    prompts, seed = tf.constant([[3, 1, 4], [1, 5, 9]]), tf.constant([1, 2])
    found = continued(student, prompts, 12, seed)
    np.testing.assert_array_equal(found, continued(wide, prompts, 12, seed))


def test_a_seed_decides_what_is_written(pair):
    prompts = tf.constant([[3, 1, 4]] * 4)
    texts = [
        continued(pair[1], prompts, 8, tf.constant(seed))
        for seed in ([1, 2], [1, 2], [1, 3])
    ]
    np.testing.assert_array_equal(texts[0], texts[1])
    assert not np.array_equal(texts[0], texts[2])
    assert len({tuple(row) for row in texts[0].numpy().tolist()}) == 4


def test_samples_follow_the_students_distribution(make_model):
    student = make_model(seed=5, vocab_size=5, num_layers=1)
    table = student.get_layer("embedding").token_table
    table.assign(table * 20)
    prompts = tf.ones([4000, 1], tf.int32)
    found = continued(student, prompts, 2, tf.constant([4, 4])).numpy()[:, 1]
    wanted = np.exp(log_probabilities(student, np.ones((1, 1), "int32")))
    shares = np.bincount(found, minlength=5) / 4000
    np.testing.assert_allclose(shares, wanted[0, 0], atol=0.03)


def test_a_share_of_the_steps_learns_from_the_teacher_alone(pair, windows_of, traced):
    x, y = windows_of(4, 16)
    distiller = distiller_of(pair, on_policy_fraction=0.5, alpha=0.5)
    found = [distiller.train_on_batch(x, y, return_dict=True) for _ in range(32)]
    # In these, no label was looked at.
    told = [s["distillation_loss"] for s in found if s["student_loss"] == 0.0]
    assert 6 < len(told) < 26
    assert told[-1] < told[0]


# Observation


def test_observed_logits_are_the_models_own(pair, windows_of):
    x, _ = windows_of(2, 16)
    found = outputs_of(pair[0], x, ("logits", "hidden_states", "attentions"))
    np.testing.assert_allclose(found.logits, pair[0](x), atol=1e-5)
    assert [h.shape for h in found.hidden_states] == [(2, 16, 12)] * 3
    assert [a.shape for a in found.attentions] == [(2, 3, 16, 16)] * 2
    np.testing.assert_allclose(np.sum(found.attentions[1], -1), 1.0, rtol=1e-5)
    assert not np.triu(found.attentions[0][0, 0], 1).any()


def test_attention_that_is_quantised_cannot_be_seen(pair, windows_of):
    student = quantize_aware(pair[1], {"softmax": "int8"})
    distiller = distiller_of((pair[0], student), distillation_loss="hidden_states")
    distiller.fit(*windows_of(4, 16), verbose=0)
    with pytest.raises(InputError, match="show their attention"):
        outputs_of(student, windows_of(2, 16)[0], ("attentions",))


# Bad input


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (lambda big, small, make: (big, big), "two models"),
        (lambda big, small, make: (small, big), "swapped"),
        (
            lambda big, small, make: (
                big,
                make(num_layers=1, embedding_dim=6, context_length=32),
            ),
            "16 and 32 positions",
        ),
        (lambda big, small, make: (keras.Sequential(), small), "`teacher` expects"),
        (lambda big, small, make: (big, keras.Sequential()), "`student` expects"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(pair, make_model, models, message):
    teacher, student = models(*pair, make_model)
    with pytest.raises(InputError, match=message):
        Distiller(teacher=teacher, student=student)


def test_models_under_different_strategies_are_refused(pair, make_model):
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        student = make_model(num_layers=1, embedding_dim=6)
    with pytest.raises(InputError, match="scope"):
        Distiller(teacher=pair[0], student=student)


def test_objects_of_keras_3_are_refused_with_the_repair(pair):
    import keras as keras_3

    loss = keras_3.losses.SparseCategoricalCrossentropy(from_logits=True)
    with pytest.raises(InputTypeError, match=r"`keras\.losses\.SparseCategorical"):
        distiller_of(pair, student_loss=loss)
    network = keras_3.Sequential([keras_3.layers.Dense(2)])
    with pytest.raises(InputTypeError, match=r"a GPT is a `gpt_tf\.GPTModel`"):
        Distiller(teacher=network, student=pair[1])


@pytest.mark.parametrize("name", ["loss", "loss_weights"])
def test_a_loss_that_could_be_either_is_refused(pair, name):
    with pytest.raises(InputError, match=f"`{name}`"):
        distiller_of(pair, **{name: "mse"})


def test_callbacks_and_checkpoints_of_keras_work(pair, windows_of, tmp_path):
    x, y = windows_of(8, 16)
    path = str(tmp_path / "best.weights.h5")
    best = keras.callbacks.ModelCheckpoint(
        path, monitor="val_student_loss", save_best_only=True, save_weights_only=True
    )
    stop = keras.callbacks.EarlyStopping("val_kl_divergence", patience=1)
    distiller = distiller_of(pair)
    found = distiller.fit(
        x, y, validation_data=(x, y), epochs=3, callbacks=[best, stop], verbose=0
    )
    distiller.student.set_weights([w * 0 for w in distiller.student.get_weights()])
    distiller.load_weights(path)
    measured = distiller.evaluate(x, y, verbose=0, return_dict=True)
    wanted = min(found.history["val_student_loss"])
    assert measured["student_loss"] == pytest.approx(wanted, rel=1e-5)
