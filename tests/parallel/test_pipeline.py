import dataclasses
import itertools

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

import gpt_tf
from gpt_tf.errors import InputError
from gpt_tf.parallel import pipeline as pipelines
from gpt_tf.parallel.pipeline import Pipeline
from gpt_tf.training.loop import load_model

pytestmark = pytest.mark.usefixtures("eagerly")

SCHEDULES = pipelines.SCHEDULES


@pytest.fixture
def make_pair(make_model):
    """Make a model undivided, and the same in stages."""

    def make(pipeline, **changes):
        whole = make_model(**changes)
        with pipeline.scope():
            return whole, make_model(**changes)

    return make


@pytest.mark.parametrize(
    ("num_stages", "schedule", "jit_compile", "changes"),
    [
        (2, "1f1b", False, {"tie_embeddings": False, "dropout": 0.2}),
        pytest.param(2, "gpipe", False, {}, marks=pytest.mark.slow),
        pytest.param(2, "1f1b", True, {}, marks=pytest.mark.slow),
        # Four stages; the heads are narrower than the model.
        pytest.param(
            *(4, "1f1b", False, {"dropout": 0.2, "num_heads": 5, "num_layers": 4}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_stages_train_as_the_undivided_model_does(
    make_pair,
    windows_of,
    fit,
    assert_same,
    traced,
    num_stages,
    schedule,
    jit_compile,
    changes,
):
    windows = windows_of(24, 8)
    whole, divided = make_pair(Pipeline(num_stages, 4, schedule), **changes)
    whole.compile(jit_compile=jit_compile, gradient_accumulation_steps=4)
    divided.compile(jit_compile=jit_compile)
    before = whole.get_weights()
    expected = fit(whole, windows, validation_data=windows)
    found = fit(divided, windows, validation_data=windows)
    for name, values in expected.items():
        np.testing.assert_allclose(values, found[name], rtol=1e-5, err_msg=name)
    assert_same(whole, divided, atol=1e-5 if jit_compile else 1e-6)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(before[0], whole.get_weights()[0], atol=1e-3)


def test_the_comparison_notices_one_gradient_that_is_off(
    make_pair, windows_of, fit, assert_same, monkeypatch
):
    right = pipelines._Step._gradients

    def off(step):
        first, *others = right(step)
        return [first * 1.01, *others]

    monkeypatch.setattr(pipelines._Step, "_gradients", off)
    whole, divided = make_pair(Pipeline(2, 2))
    # Adam would hide a factor.
    whole.compile(keras.optimizers.SGD(0.1), gradient_accumulation_steps=2)
    divided.compile(keras.optimizers.SGD(0.1))
    for model in (whole, divided):
        fit(model, windows_of(8, 8))
    with pytest.raises(AssertionError):
        assert_same(whole, divided, atol=1e-6)


def test_a_batch_that_micro_batches_do_not_divide_is_filled_up(
    make_pair, windows_of, fit, assert_same
):
    windows = x, _ = windows_of(7, 8)
    whole, divided = make_pair(Pipeline(2, 4))
    logits = whole.predict(x, verbose=0)
    np.testing.assert_allclose(logits, divided.predict(x, verbose=0), atol=1e-6)
    reports = []
    for model in (whole, divided):
        # Metrics of the user's see the logits, without what fills them up.
        top_3 = keras.metrics.SparseTopKCategoricalAccuracy(3, name="top3")
        model.compile(metrics=[top_3])
        history = fit(model, windows, epochs=1, validation_data=windows)
        reports.append([history[name] for name in ("loss", "top3", "val_top3")])
    np.testing.assert_allclose(*reports, rtol=1e-5)
    assert_same(whole, divided, atol=1e-6)


def test_weights_and_what_the_optimiser_keeps_stand_with_their_stage(make_pair):
    _, model = make_pair(Pipeline(2, 2), num_layers=3)  # of two blocks, and one
    model.compile()
    devices = {v.name.partition("/")[0]: v.device[-5:] for v in model.weights}
    first = dict.fromkeys(("embedding", "block_0", "block_1"), "CPU:0")
    last = dict.fromkeys(("block_2", "final_norm"), "CPU:1")
    assert devices == {**first, **last}
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    for variable, moment in zip(
        model.trainable_variables, optimizer._momentums, strict=True
    ):
        assert moment.device == variable.device


def test_generation_flows_through_the_stages(make_pair):
    whole, divided = make_pair(Pipeline(2, 2), num_layers=3)
    prompts = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
    found = gpt_tf.generate(divided, prompts, max_new_tokens=8, temperature=0)
    for prompt, new in zip(prompts, found, strict=True):
        logits = whole(np.array([prompt + new[:-1]])).numpy()[0, -len(new) :]
        assert new == logits.argmax(axis=1).tolist()


def test_what_is_saved_loads_undivided(
    make_pair, windows_of, fit, assert_same, tmp_path
):
    _, model = make_pair(Pipeline(2, 2))
    fit(model, windows_of(8, 8), epochs=1)
    model.save(tmp_path / "gpt.keras")
    loaded = keras.models.load_model(tmp_path / "gpt.keras")
    assert_same(model, loaded, atol=0)
    assert not loaded.plan.is_divided


# The schedule


def simulated(schedule, num_stages, micro_batches):
    """Return when each task runs, if every task takes a unit of time."""
    queues = [
        pipelines.tasks_of(schedule, stage, num_stages, micro_batches)
        for stage in range(num_stages)
    ]
    ends, clocks = {}, [0] * num_stages
    while any(queues):
        for stage in range(num_stages):
            if not queues[stage]:
                continue
            kind, index = queues[stage][0]
            needs = [(stage - 1, kind, index)] if stage else []
            if kind == "backward":
                is_last = stage == num_stages - 1
                needs = [(stage, "forward", index)]
                needs = needs if is_last else [(stage + 1, kind, index)]
            if all(need in ends for need in needs):
                start = max([clocks[stage], *(ends[need] for need in needs)])
                clocks[stage] = ends[stage, kind, index] = start + 1
                queues[stage].pop(0)
                break
        else:
            pytest.fail("the schedule waits for itself")
    return ends


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("num_stages", "micro_batches"), [(1, 1), (2, 4), (3, 7), (4, 1), (4, 7)]
)
def test_a_step_takes_as_long_as_the_theory_says(schedule, num_stages, micro_batches):
    ends = simulated(schedule, num_stages, micro_batches)
    assert max(ends.values()) == 2 * (micro_batches + num_stages - 1)
    assert len(ends) == 2 * num_stages * micro_batches


def test_1f1b_keeps_activations_of_no_more_micro_batches_than_stages():
    def most_kept(schedule, stage):
        tasks = pipelines.tasks_of(schedule, stage, 3, 8)
        return max(np.cumsum([1 if kind == "forward" else -1 for kind, _ in tasks]))

    assert [most_kept("1f1b", stage) for stage in range(3)] == [3, 2, 1]
    assert [most_kept("gpipe", stage) for stage in range(3)] == [8, 8, 8]


@pytest.mark.parametrize(
    ("costs", "num_stages"),
    [
        ([1, 1, 1, 1, 0], 2),
        ([1, 1, 1, 1, 2], 2),
        ([1, 1, 1, 1, 1, 1, 100], 3),
        ([5, 1, 1, 1, 0], 2),
    ],
)
def test_the_costliest_stage_costs_least(costs, num_stages):
    def costliest(division):
        ends = list(itertools.accumulate(division))
        sums = [sum(costs[e - n : e]) for n, e in zip(division, ends, strict=True)]
        return max(*sums[:-1], sums[-1] + costs[-1])

    found = pipelines.balance(costs, num_stages)
    divisions = itertools.product(range(1, len(costs)), repeat=num_stages)
    every = [d for d in divisions if sum(d) == len(costs) - 1]
    assert tuple(found) in every
    assert costliest(found) == min(map(costliest, every))


def test_the_head_counts_in_the_last_stage():
    sizes = {"embedding_dim": 12, "num_layers": 4, "num_heads": 3}
    sizes |= {"feedforward_dim": 48, "context_length": 16}
    plan = Pipeline(2, 2).plan
    assert plan({**sizes, "vocab_size": 31}).blocks == [2, 2]
    assert plan({**sizes, "vocab_size": 2000}).blocks == [3, 1]


# In a run


@pytest.mark.slow
def test_a_run_in_stages_equals_one_on_one_device_and_goes_on_exactly(
    config, run, assert_same, traced, tmp_path, interrupt_after
):
    whole = run(
        config,
        tmp_path / "whole",
        strategy="one_device",
        gradient_accumulation_steps=2,
    )
    config = dataclasses.replace(config, pipeline_stages=2, micro_batches=2)
    divided = run(config, tmp_path / "divided")
    assert_same(whole.model, divided.model, atol=1e-6)
    assert whole.validation_loss == pytest.approx(divided.validation_loss, rel=1e-5)
    model, _ = load_model(tmp_path / "divided")
    assert_same(divided.model, model, atol=0)
    for name, changes in (("again", {}), ("elsewhere", {"pipeline_stages": 1})):
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / name, callbacks=[interrupt_after(13)])
        resumed = run(None, tmp_path / name, resume=True, **changes)
        assert_same(divided.model, resumed.model, atol=0 if not changes else 1e-6)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_stages": 9}, "expect 9 devices. Received: 4 logical CPUs"),
        ({"num_stages": 2, "devices": ["CPU:0", "GPU:7"]}, "Received: 'GPU:7'"),
        ({"num_stages": 2, "devices": ["CPU:0"]}, "Received: 1 of them"),
    ],
)
def test_a_pipeline_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Pipeline(**arguments)


def test_a_strategy_around_a_pipeline_is_refused():
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    with strategy.scope(), pytest.raises(InputError, match="Leave it first"):
        Pipeline(2).scope()


def test_what_does_not_add_up_over_micro_batches_is_refused(make_model):
    with Pipeline(2).scope():
        model = make_model()
    with pytest.raises(InputError, match="NextTokenLoss"):
        model.compile(loss=keras.losses.SparseCategoricalCrossentropy(True))
    with pytest.raises(InputError, match="micro_batches"):
        model.compile(gradient_accumulation_steps=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "mirrored"}, "`strategy` expects a value of auto"),
        ({"gradient_accumulation_steps": 2}, "`gradient_accumulation_steps` expects"),
        ({"mesh": "1x2"}, "`pipeline_stages` expects a value of 1 beside"),
        ({"pipeline_stages": 5}, "5 devices"),
        ({"pipeline_stages": 3}, "3 stages for 2 blocks"),
    ],
)
def test_a_run_that_cannot_be_divided_so_writes_nothing(
    config, run, tmp_path, changes, message
):
    with pytest.raises(InputError, match=message):
        run(config, tmp_path / "run", **{"pipeline_stages": 2, **changes})
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_and_a_pipeline_do_not_go_together(
    config, run, tmp_path, monkeypatch
):
    monkeypatch.setenv("TF_CONFIG", "{}")
    with pytest.raises(InputError, match="TF_CONFIG"):
        run(config, tmp_path / "run", pipeline_stages=2)
