import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from gpt_tf import Distiller, make_student
from gpt_tf.distillation import losses
from gpt_tf.distillation.distiller import outputs_of
from gpt_tf.distillation.generated_text import continued
from gpt_tf.errors import InputError, InputTypeError
from gpt_tf.models.optimizer import AdamW
from gpt_tf.parallel import data as strategies
from gpt_tf.quantization.qat import activation_ranges, quantize_aware, to_float

METRICS = {
    "loss",
    "student_loss",
    "distillation_loss",
    "perplexity",
    "token_accuracy",
    "teacher_agreement",
    "kl_divergence",
}


@pytest.fixture
def pair(make_model):
    """A teacher that has opinions, and a smaller student."""
    teacher = make_model(seed=1)
    generator = np.random.default_rng(2)
    teacher.set_weights(
        [w + generator.normal(0, 0.2, w.shape) for w in teacher.get_weights()]
    )
    return teacher, make_model(seed=5, num_layers=1, embedding_dim=8, num_heads=2)


def distiller_of(pair, **options):
    distiller = Distiller(teacher=pair[0], student=pair[1])
    options.setdefault("optimizer", AdamW(1e-2))
    options.setdefault("jit_compile", False)  # which compiles longer than it trains
    distiller.compile(**options)
    return distiller


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def stated_loss(teacher, student, x, y, weights, alpha, temperature):
    """The loss in NumPy, from both models' logits."""
    ours, theirs = (model.predict(x, verbose=0) for model in (student, teacher))
    hard = -np.take_along_axis(log_softmax(ours), y[..., None], -1)[..., 0]
    p, q = log_softmax(theirs / temperature), log_softmax(ours / temperature)
    soft = temperature**2 * (np.exp(p) * (p - q)).sum(-1)
    both = alpha * hard + (1 - alpha) * soft
    return (both * weights).mean()


# What is trained


def test_fit_moves_student_and_not_teacher(pair, windows_of):
    before = [model.get_weights() for model in pair]
    distiller = distiller_of(pair)
    distiller.fit(*windows_of(8, 16), batch_size=4, epochs=2, verbose=0)
    for model, weights, moves in zip(pair, before, (False, True), strict=True):
        same = map(np.array_equal, model.get_weights(), weights)
        assert all(same) is not moves


def test_the_student_comes_nearer_to_the_teacher(pair, windows_of):
    x, y = windows_of(16, 16)
    distiller = distiller_of(pair, alpha=0.0)
    before = distiller.evaluate(x, y, verbose=0, return_dict=True)
    distiller.fit(x, y, batch_size=8, epochs=15, verbose=0)
    after = distiller.evaluate(x, y, verbose=0, return_dict=True)
    assert after["kl_divergence"] < 0.8 * before["kl_divergence"]
    assert after["teacher_agreement"] > before["teacher_agreement"]


@pytest.mark.parametrize(
    ("alpha", "temperature", "jit_compile"),
    [
        (0.1, 1.0, False),
        (0.5, 2.0, True),
        pytest.param(0.1, 1.0, True, marks=pytest.mark.slow),
    ],
)
def test_the_loss_is_what_the_formula_says(
    pair, windows_of, alpha, temperature, jit_compile
):
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


def trained_on(replicas, make_model, data, quantized=False, **options):
    strategies._use_fresh_collective_keys()
    devices = [f"CPU:{index}" for index in range(replicas)]
    strategy = tf.distribute.MirroredStrategy(devices)
    with strategy.scope():
        teacher = make_model(seed=1)
        student = make_model(seed=5, num_layers=1)
        if quantized:
            student = quantize_aware(student)
        distiller = distiller_of((teacher, student), **options)
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(8)
    distiller.fit(dataset, epochs=3, verbose=0)
    return student


REPLICAS = pytest.mark.parametrize(
    ("counts", "jit_compile"),
    [((1, 2), False), pytest.param((1, 2, 4), "auto", marks=pytest.mark.slow)],
)


@REPLICAS
def test_replicas_give_the_same_student(make_model, windows_of, counts, jit_compile):
    x, y = windows_of(16, 16)
    weights = np.random.default_rng(3).uniform(0, 2, y.shape).astype("float32")
    students = [
        trained_on(
            replicas, make_model, (x, y, weights), jit_compile=jit_compile
        ).get_weights()
        for replicas in counts
    ]
    for other in students[1:]:
        for one, two in zip(students[0], other, strict=True):
            np.testing.assert_allclose(one, two, atol=1e-4)
    moved = np.abs(students[0][0] - make_model(seed=5, num_layers=1).get_weights()[0])
    assert moved.max() > 1e-2


@REPLICAS
def test_a_quantisation_aware_student_learns_and_its_ranges_do_not_depend_on_replicas(
    make_model, windows_of, counts, jit_compile
):
    options = {"quantized": True, "jit_compile": jit_compile}
    students = [
        trained_on(replicas, make_model, windows_of(16, 16), **options)
        for replicas in counts[:2]
    ]
    ranges = [activation_ranges(student) for student in students]
    for name, (low, high) in ranges[0].items():
        assert low < high
        np.testing.assert_allclose(ranges[1][name], (low, high), atol=1e-4)
    for one, two in zip(*(s.get_weights() for s in students), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4)


def test_parts_of_a_batch_give_the_same_student(pair, windows_of):
    data = windows_of(8, 16)
    start, found = pair[1].get_weights(), []
    for parts in (1, 4):
        pair[1].set_weights(start)
        distiller = distiller_of(pair, gradient_accumulation_steps=parts)
        distiller.fit(*data, batch_size=8, epochs=3, verbose=0)
        found.append(pair[1].get_weights())
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4)


def test_it_trains_in_mixed_precision(make_model, windows_of):
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        pair = make_model(seed=1), make_model(seed=5, num_layers=1)
        found = distiller_of(pair).fit(*windows_of(8, 16), epochs=2, verbose=0)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert found.history["loss"][1] < found.history["loss"][0]
    assert {weight.dtype.name for weight in pair[1].weights} == {"float32"}


@pytest.mark.parametrize(
    "loss",
    [
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                *("reverse_kl", "jensen_shannon", "total_variation"),
                *("skewed_kl", "skewed_reverse_kl"),
            )
        ),
        "universal_logit",
        [("forward_kl", 1.0), ("hidden_states", 0.5), ("attention_transfer", 0.5)],
        keras.losses.KLDivergence(),
    ],
)
def test_every_loss_trains(pair, windows_of, loss):
    distiller = distiller_of(pair, distillation_loss=loss, alpha=0.0)
    found = distiller.fit(*windows_of(8, 16), batch_size=8, epochs=8, verbose=0)
    assert found.history["loss"][-1] < found.history["loss"][0]


def test_projections_are_trained_with_the_student(pair, windows_of):
    loss = losses.HiddenStates()
    distiller = distiller_of(pair, distillation_loss=loss)
    before = [weight.numpy() for weight in loss.trainable_weights]
    assert before
    distiller.fit(*windows_of(8, 16), verbose=0)
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
    np.testing.assert_allclose(logits, pair[1].predict(x, verbose=0), atol=1e-6)


def test_a_saved_distiller_goes_on_as_if_nothing_had_happened(
    pair, windows_of, tmp_path
):
    data = windows_of(8, 16)
    options = {"batch_size": 8, "shuffle": False, "verbose": 0}
    loss = [("forward_kl", 1.0), ("hidden_states", 0.5)]
    distiller = distiller_of(pair, distillation_loss=loss, alpha=0.3, temperature=2.0)
    distiller.fit(*data, epochs=2, **options)
    distiller.save(tmp_path / "distiller.keras")
    loaded = keras.models.load_model(tmp_path / "distiller.keras")
    assert loaded.temperature == 2.0
    for model in (distiller, loaded):
        model.fit(*data, epochs=2, **options)
    for one, two in zip(distiller.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy())


# Stored knowledge, and teachers that read other tokens


def stored(teacher, x, k):
    """Token ids with the teacher's k largest probabilities beside them."""
    log_probs = log_softmax(teacher.predict(x, verbose=0))
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
    with pytest.raises(Exception, match=r"InputError: .* sorted ones"):
        distiller_of((None, pair[1])).evaluate(inputs, y, verbose=0)


def test_a_student_learns_without_the_teacher_in_memory(pair, windows_of):
    x, y = windows_of(8, 16)
    distiller = distiller_of((None, pair[1]), alpha=0.0)
    found = distiller.fit(stored(pair[0], x, 31), y, epochs=8, verbose=0)
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


def test_the_student_writes_what_generate_would(make_model):
    student = make_model(seed=5)
    # So sure of itself that sampling and taking the likeliest are the same.
    weights = student.get_weights()
    student.set_weights([w * 4000 if w.shape == (31, 12) else w for w in weights])
    prompts = np.array([[3, 1, 4], [1, 5, 9]], "int32")
    text = tf.function(
        lambda prompts: continued(student, prompts, 12, tf.constant([1, 2])),
        jit_compile=False,
    )(tf.constant(prompts)).numpy()
    import gpt_tf

    for row, prompt in zip(text, prompts.tolist(), strict=True):
        assert row[:3].tolist() == prompt
        wanted = gpt_tf.generate(student, prompt, max_new_tokens=9, temperature=0)
        assert row[3:].tolist() == wanted


@pytest.mark.parametrize(
    "policy", [pytest.param("mixed_bfloat16", marks=pytest.mark.slow), "mixed_float16"]
)
def test_a_student_of_16_bits_writes_by_the_same_probabilities(make_model, policy):
    keras.mixed_precision.set_global_policy(policy)
    try:
        student = make_model(seed=5)
        distiller = distiller_of((make_model(seed=1), student), on_policy_fraction=1.0)
        losses_of = distiller.fit(np.ones((4, 8)), np.ones((4, 8)), verbose=0).history
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert np.isfinite(losses_of["loss"]).all()
    weights = student.get_weights()
    wide = make_model(seed=5)
    for model in (student, wide):
        model.set_weights([w * 4000 if w.shape == (31, 12) else w for w in weights])
    prompts = tf.constant([[3, 1, 4], [1, 5, 9]])
    found = continued(student, prompts, 12, tf.constant([1, 2]))
    np.testing.assert_array_equal(
        found, continued(wide, prompts, 12, tf.constant([1, 2]))
    )


def test_a_seed_decides_what_is_written(make_model):
    student = make_model(seed=5)
    prompts = tf.constant([[3, 1, 4]] * 4)
    texts = [
        continued(student, prompts, 16, tf.constant(seed))
        for seed in ([1, 2], [1, 2], [1, 3])
    ]
    np.testing.assert_array_equal(texts[0], texts[1])
    assert not np.array_equal(texts[0], texts[2])
    assert len({tuple(row) for row in texts[0].numpy().tolist()}) == 4


def test_samples_follow_the_students_distribution(make_model):
    student = make_model(seed=5, vocab_size=5)
    weights = student.get_weights()
    student.set_weights([w * 20 if w.shape == (5, 12) else w for w in weights])
    prompts = tf.ones([4000, 1], tf.int32)
    found = continued(student, prompts, 2, tf.constant([4, 4])).numpy()[:, 1]
    wanted = np.exp(log_softmax(student.predict(np.ones((1, 1), "int32"), verbose=0)))
    shares = np.bincount(found, minlength=5) / 4000
    np.testing.assert_allclose(shares, wanted[0, 0], atol=0.03)


def test_on_policy_steps_learn_from_the_teacher_alone(pair, windows_of):
    distiller = distiller_of(pair, on_policy_fraction=1.0, alpha=0.5)
    found = distiller.fit(*windows_of(8, 16), batch_size=8, epochs=6, verbose=0)
    assert found.history["student_loss"] == [0.0] * 6  # no label was looked at
    assert (
        found.history["distillation_loss"][-1] < found.history["distillation_loss"][0]
    )


def test_a_share_of_the_steps_is_on_policy(pair, windows_of):
    x, y = windows_of(64, 16)
    distiller = distiller_of(pair, on_policy_fraction=0.5, alpha=1.0)
    found = [
        distiller.train_on_batch(x[i : i + 2], y[i : i + 2], return_dict=True)["loss"]
        for i in range(0, 64, 2)
    ]
    without_labels = sum(loss == 0.0 for loss in found)
    assert 6 < without_labels < 26


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
                make(embedding_dim=24),
                make(context_length=32),
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
        student = make_model(num_layers=1)
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


@pytest.mark.parametrize(
    "make",
    [
        lambda: tf.distribute.OneDeviceStrategy("/cpu:0"),
        lambda: tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"]),
    ],
)
def test_what_is_made_of_a_model_is_built_beside_it(make_model, windows_of, make):
    """As after `train`, whose model belongs to a strategy that is closed by then."""
    strategies._use_fresh_collective_keys()
    strategy = make()
    with strategy.scope():
        teacher = make_model(seed=1)
    student = quantize_aware(make_student(teacher, num_layers=1))
    distiller = Distiller(teacher=teacher, student=student)
    for model in (student, to_float(student), distiller):
        assert model.distribute_strategy is strategy
    distiller.compile(jit_compile=False)
    history = distiller.fit(*windows_of(4, 16), batch_size=4, verbose=0)
    assert np.isfinite(history.history["loss"]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "`alpha` expects a number from 0 to 1"),
        ({"temperature": 0.0}, "temperature"),
        ({"on_policy_fraction": -0.1}, "`on_policy_fraction`"),
        ({"loss": "mse"}, "`loss`"),
        ({"loss_weights": 2.0}, "`loss_weights`"),
        ({"distillation_loss": "no_such_loss"}, "no_such_loss"),
    ],
)
def test_options_out_of_their_range_are_refused(pair, options, message):
    with pytest.raises(InputError, match=message):
        distiller_of(pair, **options)


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
