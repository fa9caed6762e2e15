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

SCHEDULES = pipelines.SCHEDULES


def in_stages(make_model, pipeline, jit_compile=False, **changes):
    with pipeline.scope():
        model = make_model(**{"num_layers": 3, **changes})
    model.compile(jit_compile=jit_compile)
    return model


def undivided(make_model, micro_batches, jit_compile=False, **changes):
    model = make_model(**{"num_layers": 3, **changes})
    model.compile(jit_compile=jit_compile, gradient_accumulation_steps=micro_batches)
    return model


def train_on(model, windows, **options):
    x, y = windows
    weights = np.ones(x.shape, "float32")
    weights[::3, 4:] = 0  # micro-batches get parts of unequal weight
    history = model.fit(
        x,
        y,
        sample_weight=weights,
        batch_size=8,
        epochs=2,
        shuffle=False,
        verbose=0,
        **options,
    )
    return history.history


def assert_same(one, other, atol=1e-6):
    for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


@pytest.mark.parametrize(
    ("num_stages", "schedule", "changes"),
    [
        (2, "1f1b", {"tie_embeddings": False, "dropout": 0.2}),
        pytest.param(2, "gpipe", {}, marks=pytest.mark.slow),
        # Four stages; the heads are narrower than the model.
        pytest.param(
            *(4, "1f1b", {"dropout": 0.2, "num_heads": 5, "num_layers": 4}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_stages_train_as_the_undivided_model_does(
    make_model, windows_of, num_stages, schedule, changes
):
    windows = windows_of(24, 8)
    whole = undivided(make_model, 4, **changes)
    divided = in_stages(make_model, Pipeline(num_stages, 4, schedule), **changes)
    before = whole.get_weights()
    expected = train_on(whole, windows, validation_data=windows)
    found = train_on(divided, windows, validation_data=windows)
    for name, values in expected.items():
        np.testing.assert_allclose(values, found[name], rtol=1e-5, err_msg=name)
    assert_same(whole, divided)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(before[0], whole.get_weights()[0], atol=1e-3)


def test_the_comparison_notices_one_gradient_that_is_off(
    make_model, windows_of, monkeypatch
):
    whole = undivided(make_model, 2)
    divided = in_stages(make_model, Pipeline(2, 2))
    right = pipelines._Step._gradients

    def off(step):
        first, *others = right(step)
        return [first * 1.01, *others]

    monkeypatch.setattr(pipelines._Step, "_gradients", off)
    # Adam would hide a factor.
    for model in (whole, divided):
        model.compile(
            keras.optimizers.SGD(0.1),
            jit_compile=False,
            gradient_accumulation_steps=2 if model is whole else 1,
        )
        train_on(model, windows_of(24, 8))
    with pytest.raises(AssertionError):
        assert_same(whole, divided)


@pytest.mark.slow
def test_stages_compiled_by_xla_train_the_same(make_model, windows_of):
    whole = undivided(make_model, 2, jit_compile=True, num_layers=2)
    divided = in_stages(make_model, Pipeline(2, 2), jit_compile=True, num_layers=2)
    for model in (whole, divided):
        train_on(model, windows_of(16, 8))
    assert_same(whole, divided, atol=1e-5)


def test_a_batch_that_micro_batches_do_not_divide_is_filled_up(make_model, windows_of):
    x, y = windows_of(7, 8)
    whole = undivided(make_model, 1)
    divided = in_stages(make_model, Pipeline(2, 4))
    logits = whole.predict(x, batch_size=7, verbose=0)
    np.testing.assert_allclose(
        logits, divided.predict(x, batch_size=7, verbose=0), atol=1e-6
    )
    for model in (whole, divided):
        model.fit(x, y, batch_size=7, verbose=0)
    assert_same(whole, divided)


def test_metrics_of_the_users_see_the_logits(make_model, windows_of):
    x, y = windows_of(7, 8)
    found = []
    for model in (undivided(make_model, 1), in_stages(make_model, Pipeline(2, 4))):
        top_3 = keras.metrics.SparseTopKCategoricalAccuracy(3, name="top3")
        model.compile(metrics=[top_3], jit_compile=False)
        found.append(model.fit(x, y, 8, verbose=0).history["top3"])
        found.append(model.evaluate(x, y, 8, 0, return_dict=True))
    assert found[0] == pytest.approx(found[2])
    assert found[1] == pytest.approx(found[3], rel=1e-5)


def test_weights_and_what_the_optimiser_keeps_stand_with_their_stage(make_model):
    model = in_stages(make_model, Pipeline(2, 2))  # of two blocks, and one
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


def test_generation_flows_through_the_stages(make_model):
    whole = make_model(num_layers=3)
    with Pipeline(3, 2).scope():
        divided = make_model(num_layers=3)
    prompts = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 4}):
        texts = [
            gpt_tf.generate(model, prompts, max_new_tokens=20, **options)
            for model in (whole, divided)
        ]
        assert texts[0] == texts[1]


def test_what_is_saved_loads_undivided(make_model, windows_of, tmp_path):
    model = in_stages(make_model, Pipeline(2, 2))
    train_on(model, windows_of(8, 8))
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


def test_the_head_counts_in_the_last_stage(make_model):
    with Pipeline(2, 2).scope():
        assert make_model(num_layers=4).plan.blocks == [2, 2]
        assert make_model(num_layers=4, vocab_size=2000).plan.blocks == [3, 1]


# In a run


@pytest.mark.slow
def test_a_run_in_stages_equals_one_on_one_device(config, run, tmp_path):
    whole = run(
        config,
        tmp_path / "whole",
        strategy="one_device",
        gradient_accumulation_steps=2,
    )
    divided = run(config, tmp_path / "divided", pipeline_stages=2, micro_batches=2)
    assert_same(whole.model, divided.model)
    assert whole.validation_loss == pytest.approx(divided.validation_loss, rel=1e-5)
    model, _ = load_model(tmp_path / "divided")
    assert_same(divided.model, model, atol=0)


@pytest.mark.slow
def test_a_run_in_stages_goes_on_exactly_and_elsewhere(
    config, run, tmp_path, interrupt_after
):
    config = dataclasses.replace(config, pipeline_stages=2, micro_batches=2)
    straight = run(config, tmp_path / "straight")
    for name, changes in (("again", {}), ("elsewhere", {"pipeline_stages": 1})):
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / name, callbacks=[interrupt_after(13)])
        resumed = run(None, tmp_path / name, resume=True, **changes)
        assert_same(straight.model, resumed.model, atol=0 if not changes else 1e-6)


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
