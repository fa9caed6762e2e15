import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from gpt_tf import GPTModel
from gpt_tf.distillation import student
from gpt_tf.distillation.student import layer_importance, make_student
from gpt_tf.errors import InputError
from gpt_tf.models.cached_forward import parts_of
from gpt_tf.models.next_token import NextTokenLoss
from gpt_tf.quantization.qat import quantize_aware

# The session's trained model comes first, so that its training is not run eagerly.
pytestmark = pytest.mark.usefixtures("trained", "eagerly")


@pytest.fixture(scope="module")
def built():
    """A GPT and weights of which every one matters."""
    keras.utils.set_random_seed(3)
    model = GPTModel(31, 12, num_layers=3, num_heads=3, context_length=16)
    generator = np.random.default_rng(2)
    return model, [w + generator.normal(0, 0.3, w.shape) for w in model.get_weights()]


@pytest.fixture
def teacher(built):
    """The same teacher for every test, which may change its weights."""
    model, weights = built
    model.set_weights(weights)
    return model


@pytest.fixture
def ids():
    return np.random.default_rng(4).integers(0, 31, (6, 16)).astype("int32")


def loss_of(model, inputs, labels):
    """Nats per token, without compiling anything."""
    return float(NextTokenLoss()(labels, model(inputs)))


# The whole, and parts that do nothing


@pytest.mark.parametrize("layers", ["evenly", "importance"])
def test_a_student_of_all_is_the_teacher(teacher, ids, layers):
    student = make_student(teacher, layers=layers, inputs=ids)
    np.testing.assert_array_equal(student(ids), teacher(ids))
    weight = parts_of(student).blocks[2].up_bias
    weight.assign(weight + 1e-2)
    assert np.abs(student(ids) - teacher(ids)).max() > 1e-4


def test_dimensions_of_a_head_that_do_nothing_may_go(teacher, ids, traced):
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
    student = make_student(teacher, num_layers=1, embedding_dim=11, inputs=ids)
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


@pytest.mark.parametrize("with_inputs", [True, False])
def test_channels_that_only_the_head_reads_stay(teacher, ids, with_inputs):
    parts = parts_of(teacher)
    for block in parts.blocks:
        for norm in ("attention_norm", "feedforward_norm"):
            for part in ("gamma", "beta"):
                weight = getattr(block, f"{norm}_{part}")
                weight.assign(weight * 0)
    for weight in (parts.norm.gamma, parts.norm.beta):
        weight.assign(np.where(np.arange(12) == 5, 0, weight.numpy()))
    inputs = ids if with_inputs else None
    student = make_student(teacher, num_layers=1, embedding_dim=11, inputs=inputs)
    table = parts.embedding.token_table.numpy()
    np.testing.assert_array_equal(
        parts_of(student).embedding.token_table, np.delete(table, 5, axis=1)
    )


@pytest.fixture
def teacher_with_gaps(make_model):
    """A GPT in which 3 channels, a head and 16 units are exactly nothing."""
    model = make_model(num_layers=1, layer_norm_epsilon=1e-12)
    generator = np.random.default_rng(7)
    model.set_weights(
        [w + generator.normal(0, 0.3, w.shape) for w in model.get_weights()]
    )
    gone = np.isin(np.arange(12), [2, 7, 8])
    parts = parts_of(model)
    writers = [parts.embedding.token_table, parts.embedding.position_table]
    norms = [parts.norm.gamma, parts.norm.beta]
    for block in parts.blocks:
        output, down = block.output_kernel.numpy(), block.down_kernel.numpy()
        output.reshape(block.num_heads, block.head_dim, -1)[1] = 0
        down[::3] = 0
        block.output_kernel.assign(output)
        block.down_kernel.assign(down)
        writers += [block.output_kernel, block.output_bias]
        writers += [block.down_kernel, block.down_bias]
        norms += [block.attention_norm_gamma, block.attention_norm_beta]
        norms += [block.feedforward_norm_gamma, block.feedforward_norm_beta]
    for weight in writers:
        values = np.where(gone, 0, weight.numpy())
        # A mean of 0 stays one where channels of 0 go.
        mean = values.sum(axis=-1, keepdims=True) / 9
        weight.assign(np.where(gone, 0, values - mean))
    for weight in norms:
        weight.assign(np.where(gone, 0, weight.numpy()))
    return model


@pytest.mark.parametrize("with_inputs", [True, False])
def test_every_tensor_is_cut_to_the_same_parts(teacher_with_gaps, ids, with_inputs):
    student = make_student(
        teacher_with_gaps,
        embedding_dim=9,
        num_heads=2,
        feedforward_dim=32,
        inputs=ids if with_inputs else None,
    )
    parts = parts_of(student)
    # The spread over 9 channels is larger than over 12 of which 3 are 0.
    for norm in (
        *(block.attention_norm_gamma for block in parts.blocks),
        *(block.feedforward_norm_gamma for block in parts.blocks),
        parts.norm.gamma,
    ):
        norm.assign(norm * (12 / 9) ** 0.5)
    wanted = teacher_with_gaps(ids)
    np.testing.assert_allclose(student(ids), wanted, atol=1e-4)
    generator = np.random.default_rng(8)
    for weight in student.weights:
        values = weight.numpy()
        weight.assign(values + generator.normal(0, 0.02, values.shape))
        assert np.abs(student(ids) - wanted).max() > 1e-3, weight.name
        weight.assign(values)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_heads": 1, "feedforward_dim": 24},
        pytest.param({"embedding_dim": 16}, marks=pytest.mark.slow),
    ],
)
def test_what_is_important_stays(trained, corpus_folder, monkeypatch, sizes):
    text = (corpus_folder / "text3.txt").read_text("utf-8")
    ids = np.array(trained.tokenizer.encode(text)[: 33 * 16]).reshape(16, 33)
    inputs, labels = ids[:, :-1], ids[:, 1:]

    def loss_where_stays(choice):
        if choice is not None:
            monkeypatch.setattr(
                student,
                "_largest",
                lambda values, count: choice(len(values))[:count],
            )
        cut = make_student(trained.model, inputs=inputs, **sizes)
        return loss_of(cut, inputs, labels)

    chosen = loss_where_stays(None)
    generator = np.random.default_rng(1)
    assert chosen < loss_where_stays(np.arange)
    assert chosen < loss_where_stays(generator.permutation)


def test_what_begins_as_nothing_learns(teacher, ids):
    """Heads 6 wide from heads 4 wide; 3 heads of 4 from 2 of 6; more units."""
    wide = make_student(teacher, num_layers=1, num_heads=2, feedforward_dim=60)
    many = make_student(wide, num_heads=3)
    for model, added in ((wide, np.s_[:, :, :, 4:]), (many, np.s_[:, :, 2:])):
        block = parts_of(model).blocks[0]
        before = block.qkv_kernel.numpy(), block.up_kernel.numpy()
        model.compile(jit_compile=False)
        model.fit(ids, np.roll(ids, -1, axis=1), epochs=3, verbose=0)
        shape = (12, 3, block.num_heads, block.head_dim)
        moved = (block.qkv_kernel.numpy() - before[0]).reshape(shape)[added]
        assert (np.abs(moved).max(axis=0) > 0).all()
        assert (np.abs(block.up_kernel.numpy() - before[1]).max(axis=0) > 0).all()


# Layers


@pytest.mark.parametrize(
    ("layers", "count", "taken"),
    [
        ("evenly", 2, [0, 2]),
        ("first", 2, [0, 1]),
        ([1, 2], 2, [1, 2]),
    ],
)
def test_the_layers_named_are_taken(teacher, layers, count, taken):
    student = make_student(teacher, num_layers=count, layers=layers)
    found = [block.up_kernel.numpy() for block in parts_of(student).blocks]
    wanted = [parts_of(teacher).blocks[i].up_kernel.numpy() for i in taken]
    np.testing.assert_array_equal(found, wanted)


def test_importance_is_the_growth_of_the_loss(teacher, ids):
    tokens, labels = ids[:, :-1], ids[:, 1:]
    found = layer_importance(teacher, ids)
    whole = loss_of(teacher, tokens, labels)
    for block, growth in zip(parts_of(teacher).blocks, found, strict=True):
        # All that a block adds to what passes it by.
        written = (
            *(block.output_kernel, block.output_bias),
            *(block.down_kernel, block.down_bias),
        )
        values = [weight.numpy() for weight in written]
        for weight in written:
            weight.assign(tf.zeros_like(weight))
        without = loss_of(teacher, tokens, labels)
        assert growth == pytest.approx(without - whole, abs=1e-4)
        for weight, value in zip(written, values, strict=True):
            weight.assign(value)


def test_importance_is_the_same_in_whatever_pieces(teacher, ids, monkeypatch):
    whole = layer_importance(teacher, ids)
    options = {"num_layers": 1, "embedding_dim": 8, "inputs": ids}
    cut = make_student(teacher, **options).get_weights()
    monkeypatch.setattr(student, "_VALUES_AT_ONCE", 1)
    np.testing.assert_allclose(layer_importance(teacher, ids), whole, atol=1e-5)
    again = make_student(teacher, **options).get_weights()
    for one, two in zip(cut, again, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("count", [1, 2])
def test_the_most_important_layers_are_taken(teacher, ids, count):
    growth = layer_importance(teacher, ids)
    wanted = np.flatnonzero(growth >= np.sort(growth)[-count])
    student = make_student(teacher, num_layers=count, layers="importance", inputs=ids)
    for block, index in zip(parts_of(student).blocks, wanted, strict=True):
        theirs = parts_of(teacher).blocks[index].qkv_kernel
        np.testing.assert_array_equal(block.qkv_kernel, theirs)


# Fresh weights, other vocabularies


def test_fresh_weights_follow_the_seed(teacher):
    students = [
        make_student(teacher, num_layers=1, init="fresh", seed=seed).get_weights()
        for seed in (1, 1, 2)
    ]
    for one, two, other in zip(*students, strict=True):
        np.testing.assert_array_equal(one, two)
        assert one.ndim < 2 or not np.array_equal(one, other)
    down = next(w for w in students[0] if w.shape == (48, 12))
    assert down.std() == pytest.approx(0.02 / 2**0.5, rel=0.3)


def test_a_student_does_not_depend_on_the_global_random_state(teacher):
    def cut(seed):
        keras.utils.set_random_seed(seed)
        student = make_student(teacher, num_layers=1, feedforward_dim=60)
        return student.get_weights(), np.random.random()

    (one, after_one), (two, after_two) = cut(5), cut(6)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
    assert [after_one, after_two] == [np.random.RandomState(s).random() for s in (5, 6)]


def test_a_smaller_vocabulary_takes_the_rows_of_the_same_tokens(teacher, ids):
    token_ids = np.array([4, 2, -1, 30])
    student = make_student(teacher, num_layers=1, vocab_size=4, token_ids=token_ids)
    found = parts_of(student).embedding.token_table.numpy()
    wanted = parts_of(teacher).embedding.token_table.numpy()
    np.testing.assert_array_equal(found[[0, 1, 3]], wanted[[4, 2, 30]])
    assert 0 < np.abs(found[2]).max() < 0.2
    whole = make_student(teacher, vocab_size=31, token_ids=np.arange(31)[::-1])
    logits = whole(30 - ids).numpy()[..., ::-1]
    np.testing.assert_allclose(logits, teacher(ids), atol=1e-5)


def test_a_width_need_not_be_a_multiple_of_the_heads(teacher, ids):
    """As in the article's pair: 6 heads in a student 256 wide."""
    student = make_student(teacher, num_layers=1, embedding_dim=11)
    assert student.get_config()["feedforward_dim"] == 44
    assert parts_of(student).blocks[0].head_dim == 3
    assert student(ids).shape == (6, 16, 31)


def test_the_student_trains_and_the_teacher_stays(teacher, ids, tmp_path):
    before = teacher.get_weights()
    student = make_student(teacher, num_layers=1, embedding_dim=8, inputs=ids)
    student.compile(jit_compile=False)
    student.fit(ids, ids, verbose=0)
    for one, two in zip(before, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    student.save(tmp_path / "student.keras")
    loaded = keras.models.load_model(tmp_path / "student.keras")
    np.testing.assert_array_equal(loaded(ids), student(ids))


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 13}, "num_heads"),
        ({"vocab_size": 99}, "`vocab_size`"),
        ({"vocab_size": 20}, "`token_ids`"),
        ({"vocab_size": 3, "token_ids": [1, 2]}, "expects 3 integers"),
        ({"inputs": [[31]]}, "`inputs` expects ids from 0 to 30"),
        ({"inputs": [[0] * 17]}, "windows of at most 16"),
        ({"inputs": [[0.5]]}, r"\(N, T\)"),
        ({"layers": "importance", "inputs": [[1]]}, "of one token"),
        ({"num_layers": 2, "layers": [2, 1]}, "rising"),
        ({"num_layers": 2, "layers": "importance"}, "`inputs`"),
        ({"teacher": "a teacher"}, "expects a GPTModel"),
    ],
)
def test_what_cannot_be_cut_is_refused(teacher, options, message):
    with pytest.raises(InputError, match=message):
        make_student(**{"teacher": teacher, **options})


def test_only_a_float_gpt_is_cut(make_model):
    with pytest.raises(InputError, match="to_float"):
        make_student(quantize_aware(make_model(num_layers=1)))
