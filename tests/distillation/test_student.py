import numpy as np
import pytest

from gpt_tf import GPTModel
from gpt_tf.distillation import student
from gpt_tf.distillation.student import layer_importance, make_student
from gpt_tf.errors import InputError, InputTypeError
from gpt_tf.models.decoding import parts_of
from gpt_tf.quantization.qat import quantize_aware

ARTICLE = {"embedding_dim": 256, "num_layers": 4, "num_heads": 6, "vocab_size": 5000}


@pytest.fixture
def teacher(make_model):
    """A teacher whose every weight matters."""
    model = make_model(num_layers=4, embedding_dim=12, num_heads=3)
    generator = np.random.default_rng(2)
    model.set_weights(
        [w + generator.normal(0, 0.3, w.shape) for w in model.get_weights()]
    )
    return model


@pytest.fixture
def ids():
    return np.random.default_rng(4).integers(0, 31, (6, 16)).astype("int32")


def silence(model, heads=(), units=(), channels=()):
    """Let heads, units and channels of a GPT do nothing, wherever they stand."""
    parts = parts_of(model)
    silent = list(channels)
    for block in parts.blocks:
        output = block.output_kernel.numpy()
        output.reshape(block.num_heads, block.head_dim, -1)[list(heads)] = 0
        down, up = block.down_kernel.numpy(), block.up_kernel.numpy()
        down[list(units)] = 0
        qkv = block.qkv_kernel.numpy()
        for values in (output.T, down.T, qkv, up):
            values[silent] = 0
        block.output_kernel.assign(output)
        block.down_kernel.assign(down)
        block.qkv_kernel.assign(qkv)
        block.up_kernel.assign(up)


# The whole, and parts that do nothing


@pytest.mark.parametrize("layers", ["evenly", "first", "last", "importance"])
def test_a_student_of_all_is_the_teacher(teacher, ids, layers):
    student = make_student(teacher, layers=layers, inputs=ids)
    np.testing.assert_array_equal(student(ids), teacher(ids))
    weight = parts_of(student).blocks[2].up_bias
    weight.assign(weight + 1e-2)
    assert np.abs(student(ids) - teacher(ids)).max() > 1e-4


@pytest.mark.parametrize("with_inputs", [True, False])
def test_heads_and_units_that_do_nothing_may_go(teacher, ids, with_inputs):
    silence(teacher, heads=[1], units=range(0, 48, 3))
    student = make_student(
        teacher, num_heads=2, feedforward_dim=32, inputs=ids if with_inputs else None
    )
    # Two heads of the same width together are narrower than the model.
    assert parts_of(student).blocks[0].head_dim == 6
    wide = make_student(teacher, feedforward_dim=32, inputs=ids)
    np.testing.assert_allclose(wide(ids), teacher(ids), atol=1e-4)
    np.testing.assert_allclose(student(ids), teacher(ids), atol=1e-4)
    other = make_student(teacher, feedforward_dim=31, inputs=ids)
    assert np.abs(other(ids) - teacher(ids)).max() > 1e-3


def test_dimensions_of_a_head_that_do_nothing_may_go(teacher, ids):
    for block in parts_of(teacher).blocks:
        qkv = block.qkv_kernel.numpy().reshape(12, 3, 3, 4)
        bias = block.qkv_bias.numpy().reshape(3, 3, 4)
        output = block.output_kernel.numpy().reshape(3, 4, 12)
        # Others of the queries and keys than of the values, and others in each head.
        for head in range(3):
            qkv[:, :2, head, head] = bias[:2, head, head] = 0
            output[head, 3 - head] = 0
        block.qkv_kernel.assign(qkv.reshape(12, 36))
        block.qkv_bias.assign(bias.reshape(36))
        block.output_kernel.assign(output.reshape(12, 12))
    # 3 heads of width 3 in a model of width 11: one channel goes too.
    student = make_student(teacher, embedding_dim=11, inputs=ids)
    whole = parts_of(teacher).blocks[0]
    ours = parts_of(student).blocks[0]
    assert ours.head_dim == 3
    kept = np.delete(whole.qkv_kernel.numpy().reshape(12, 3, 3, 4)[:, 0, 2], 2, axis=1)
    found = ours.qkv_kernel.numpy().reshape(11, 3, 3, 3)[:, 0, 2]
    rows = [
        i for i in range(12) if np.isclose(kept[i], found[0] * (4 / 3) ** 0.5).all()
    ]
    assert len(rows) == 1  # scaled, because scores are divided by the head's width
    assert np.abs(ours.output_kernel.numpy()).min() > 0


def test_channels_that_say_nothing_may_go(teacher, ids):
    parts = parts_of(teacher)
    for norm in ("attention_norm", "feedforward_norm"):
        for block in parts.blocks:
            for part in ("gamma", "beta"):
                weight = getattr(block, f"{norm}_{part}")
                weight.assign(np.where(np.arange(12) == 5, 0, weight.numpy()))
    student = make_student(teacher, embedding_dim=11, inputs=ids)
    table = parts.embedding.token_table.numpy()
    np.testing.assert_array_equal(
        parts_of(student).embedding.token_table, np.delete(table, 5, axis=1)
    )


def test_what_is_important_stays(trained, corpus_folder, monkeypatch):
    text = (corpus_folder / "text3.txt").read_text("utf-8")
    ids = np.array(trained.tokenizer.encode(text)[: 33 * 16]).reshape(16, 33)
    inputs, labels = ids[:, :-1], ids[:, 1:]

    def loss(model):
        return model.evaluate(inputs, labels, verbose=0)[0]

    sizes = {"feedforward_dim": 24, "num_heads": 1}
    chosen = loss(make_student(trained.model, inputs=inputs, **sizes))
    monkeypatch.setattr(
        student,
        "_largest",
        lambda values, count: np.sort(np.argsort(values)[:count]),
    )
    assert chosen < loss(make_student(trained.model, inputs=inputs, **sizes))


def test_what_the_teacher_has_not_begins_as_nothing(teacher, ids):
    student = make_student(teacher, feedforward_dim=60)
    np.testing.assert_allclose(student(ids), teacher(ids), atol=1e-5)
    assert np.abs(parts_of(student).blocks[0].up_kernel.numpy()).min() > 0


# Layers


@pytest.mark.parametrize(
    ("layers", "count", "taken"),
    [
        ("evenly", 2, [0, 3]),
        ("evenly", 3, [0, 2, 3]),
        ("evenly", 1, [3]),
        ("every_second", 2, [0, 2]),
        ("first", 2, [0, 1]),
        ("last", 3, [1, 2, 3]),
        ("first_and_last", 3, [0, 1, 3]),
        ([1, 2], 2, [1, 2]),
    ],
)
def test_the_layers_named_are_taken(teacher, layers, count, taken):
    student = make_student(teacher, num_layers=count, layers=layers)
    found = [block.up_kernel.numpy() for block in parts_of(student).blocks]
    wanted = [parts_of(teacher).blocks[i].up_kernel.numpy() for i in taken]
    np.testing.assert_array_equal(found, wanted)


def test_importance_is_the_growth_of_the_loss(teacher, ids):
    labels = np.roll(ids, 1, axis=1)
    found = layer_importance(teacher, ids, labels)
    whole = teacher.evaluate(ids, labels, verbose=0)[0]
    for index, growth in enumerate(found):
        rest = [i for i in range(4) if i != index]
        without = make_student(teacher, num_layers=3, layers=rest)
        loss = without.evaluate(ids, labels, verbose=0)[0]
        assert growth == pytest.approx(loss - whole, abs=1e-4)


def test_the_most_important_layers_are_taken(teacher, ids):
    block = parts_of(teacher).blocks[1]
    for kernel in (block.output_kernel, block.down_kernel):
        kernel.assign(kernel * 0)
    for bias in (block.output_bias, block.down_bias):
        bias.assign(bias * 0)
    assert layer_importance(teacher, ids)[1] == pytest.approx(0, abs=1e-6)
    student = make_student(teacher, num_layers=3, layers=[0, 2, 3])
    np.testing.assert_allclose(student(ids), teacher(ids), atol=1e-5)


# Fresh weights, other vocabularies


def test_fresh_weights_follow_the_seed(teacher):
    students = [
        make_student(teacher, num_layers=2, init="fresh", seed=seed).get_weights()
        for seed in (1, 1, 2)
    ]
    for one, two, other in zip(*students, strict=True):
        np.testing.assert_array_equal(one, two)
        assert one.ndim < 2 or not np.array_equal(one, other)
    down = next(w for w in students[0] if w.shape == (48, 12))
    assert 0.7 * 0.01 < down.std() < 1.3 * 0.01


def test_the_global_random_state_is_left_alone(teacher):
    np.random.seed(5)
    wanted = np.random.default_rng(5).random()
    state = np.random.get_state()[1].copy()
    make_student(teacher, num_layers=1)
    np.testing.assert_array_equal(state, np.random.get_state()[1])
    assert wanted == np.random.default_rng(5).random()


def test_a_smaller_vocabulary_takes_the_rows_of_the_same_tokens(teacher, ids):
    token_ids = np.array([4, 2, -1, 30])
    student = make_student(teacher, vocab_size=4, token_ids=token_ids)
    found = parts_of(student).embedding.token_table.numpy()
    wanted = parts_of(teacher).embedding.token_table.numpy()
    np.testing.assert_array_equal(found[[0, 1, 3]], wanted[[4, 2, 30]])
    assert 0 < np.abs(found[2]).max() < 0.2
    whole = make_student(teacher, vocab_size=31, token_ids=np.arange(31)[::-1])
    logits = whole(30 - ids).numpy()[..., ::-1]
    np.testing.assert_allclose(logits, teacher(ids), atol=1e-5)


def test_the_articles_pair_is_made():
    teacher = GPTModel(10000, 512, 6, 8, context_length=16)
    student = make_student(teacher, token_ids=np.arange(5000), **ARTICLE)
    assert student.get_config()["feedforward_dim"] == 1024
    assert parts_of(student).blocks[0].head_dim == 42
    assert student(np.zeros((1, 16), "int32")).shape == (1, 16, 5000)


def test_the_student_trains_and_the_teacher_stays(teacher, ids, tmp_path):
    before = teacher.get_weights()
    student = make_student(teacher, num_layers=2, embedding_dim=8, inputs=ids)
    student.fit(ids, ids, verbose=0)
    for one, two in zip(before, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    student.save(tmp_path / "student.keras")


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 5}, "`num_layers` of a student expects .* 4. Received: 5"),
        ({"embedding_dim": 16}, "`embedding_dim`"),
        ({"vocab_size": 99}, "`vocab_size`"),
        ({"vocab_size": 20}, "`token_ids`"),
        ({"vocab_size": 3, "token_ids": [1, 2]}, "expects 3 integers"),
        ({"layers": "middle"}, "'middle'"),
        ({"num_layers": 2, "layers": [0, 4]}, "rising numbers from 0 to 3"),
        ({"num_layers": 2, "layers": [2, 1]}, "rising"),
        ({"num_layers": 3, "layers": "every_second"}, "at most half"),
        ({"num_layers": 2, "layers": "importance"}, "`inputs`"),
        ({"init": "random"}, "`init` expects"),
        ({"num_heads": 13}, "num_heads"),
    ],
)
def test_what_cannot_be_cut_is_refused(teacher, options, message):
    with pytest.raises(InputError, match=message):
        make_student(teacher, **options)


def test_only_a_float_gpt_is_cut(teacher):
    with pytest.raises(InputError, match="to_float"):
        make_student(quantize_aware(teacher))
    with pytest.raises(InputTypeError, match="expects a GPTModel"):
        make_student("a teacher")
