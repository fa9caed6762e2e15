"""Claims about benchmarks/scaling_model.py."""

import dataclasses
import importlib
import itertools
import math
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def _load():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("scaling_model")
    finally:
        sys.path.remove(str(BENCHMARKS))


scaling = _load()
Layout, Link, Model = scaling.Layout, scaling.Link, scaling.Model
predict = scaling.predict

SMALL = Model(8, 1024, 16, 51200, 1024)
FITTED = dataclasses.replace(scaling.A100, matrix_share=0.65)
MACHINE = dataclasses.replace(FITTED, memory_bytes=math.inf)
PARTS = "compute overhead tensor sequence bubble data optimizer".split()
BATCH = 64


def step(layout, machine=MACHINE, model=SMALL, batch=BATCH):
    return predict(model, machine, layout, batch)


def without_head(model=SMALL):
    """The model with a head that costs nothing, so that stages are equal."""
    return dataclasses.replace(model, vocab_size=0)


layouts = some.builds(
    Layout,
    data=some.sampled_from((1, 2, 4, 8)),
    pipeline=some.sampled_from((1, 2, 4, 8)),
    tensor=some.sampled_from((1, 2, 8, 16)),
    sequence=some.sampled_from((1, 2, 4)),
    micro_batches=some.sampled_from((1, 2, 8)),
    schedule=some.sampled_from(("gpipe", "1f1b")),
    recompute=some.booleans(),
    overlap=some.booleans(),
    ring=some.booleans(),
    balance=some.booleans(),
)


# A step's parts


def test_one_device_has_no_communication_and_no_bubble():
    found = step(Layout())
    assert found.communication_s == 0
    assert found.bubble_s == 0
    assert found.data_total_s == 0


@given(layouts)
def test_a_step_is_the_sum_of_its_parts(layout):
    found = step(layout)
    parts = sum(getattr(found, f"{part}_s") for part in PARTS)
    assert parts == pytest.approx(found.step_s)


@given(layouts)
def test_no_step_beats_its_bound_or_the_peak(layout):
    found = step(layout)
    bound = scaling.least_step_s(SMALL, MACHINE, layout, BATCH)
    assert bound <= found.step_s * (1 + 1e-9)
    assert 0 < found.flops_share < MACHINE.matrix_share


@given(layouts, some.sampled_from(("node", "network")), some.floats(1.01, 100))
def test_a_faster_link_never_makes_a_step_slower(layout, which, factor):
    link = getattr(MACHINE, which)
    faster = Link(link.bandwidth * factor, link.latency_s / factor)
    improved = dataclasses.replace(MACHINE, **{which: faster})
    assert step(layout, improved).step_s <= step(layout).step_s * (1 + 1e-9)


def test_operations_are_those_of_the_published_formula():
    model, batch = Model(24, 2304, 24, 51200, 2048), 512
    length, width, layers = 2048, 2304, 24
    published = (
        96
        * batch
        * length
        * layers
        * width**2
        * (1 + length / (6 * width) + 51200 / (16 * layers * width))
    )
    assert model.step_flops(batch, recompute=True) == pytest.approx(published)


# Collectives


@pytest.mark.parametrize("members", [1, 2, 3, 8, 64])
def test_a_ring_moves_two_parts_in_k_less_one_of_the_bytes(members):
    link = Link(bandwidth=1.0)
    assert link.ring_s(1000, members) == pytest.approx(
        2 * (members - 1) / members * 1000
    )


def test_a_ring_waits_for_two_latencies_per_other_member():
    assert Link(math.inf, 0.5).ring_s(1000, 8) == pytest.approx(7.0)


def test_an_all_reduce_between_nodes_carries_the_share_of_one_device():
    machine = dataclasses.replace(MACHINE, node=Link(math.inf), network=Link(1.0))
    assert machine.all_reduce_s(800, 16) == pytest.approx(2 * (1 / 2) * 800 / 8)


def test_tensor_parallelism_beyond_a_node_is_slower():
    inside, beyond = step(Layout(tensor=8)), step(Layout(tensor=16))
    assert beyond.tensor_s > inside.tensor_s
    slow = dataclasses.replace(MACHINE, network=scaling.ETHERNET)
    assert step(Layout(tensor=16), slow).step_s > step(Layout(tensor=8), slow).step_s


def test_overlap_hides_gradients_but_those_of_the_last_block():
    shown = step(Layout(data=8, overlap=False))
    hidden = step(Layout(data=8))
    assert shown.data_s == pytest.approx(shown.data_total_s)
    assert hidden.data_s < shown.data_s
    assert hidden.data_s >= shown.data_total_s / SMALL.num_layers * (1 - 1e-9)


def test_a_ring_of_keys_hides_what_gathering_shows():
    assert (
        step(Layout(sequence=8, ring=True)).sequence_s
        < step(Layout(sequence=8)).sequence_s
    )


# Pipelines


@pytest.mark.parametrize(
    "pipeline, micro_batches", [(1, 1), (2, 1), (2, 4), (4, 4), (8, 32)]
)
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_equal_stages_take_the_formula_s_time(schedule, pipeline, micro_batches):
    ends = scaling.run_pipeline(
        (1.0,) * pipeline, (2.0,) * pipeline, 0.0, micro_batches, schedule
    )
    assert max(ends) == pytest.approx(3 * (micro_batches + pipeline - 1))


@pytest.mark.parametrize("chunks", [2, 4])
def test_interleaving_divides_the_bubble_by_its_chunks(chunks):
    pipeline, micro_batches = 4, 8
    stages = pipeline * chunks
    ends = scaling.run_pipeline(
        (1.0 / chunks,) * stages,
        (2.0 / chunks,) * stages,
        0.0,
        micro_batches,
        "interleaved",
        chunks,
    )
    assert max(ends) == pytest.approx(3 * (micro_batches + (pipeline - 1) / chunks))


def test_1f1b_has_the_bubble_of_gpipe_and_less_memory():
    shape = {"pipeline": 4, "micro_batches": 16}
    gpipe = step(Layout(**shape, schedule="gpipe"), model=without_head())
    one_f = step(Layout(**shape, schedule="1f1b"), model=without_head())
    send = MACHINE.link(4, 1).send_s(4 * 1024 * 1024 * 2)
    assert one_f.bubble_s == pytest.approx(gpipe.bubble_s, abs=60 * send)
    assert one_f.memory["activations"] < gpipe.memory["activations"]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_device_keeps_as_many_micro_batches_as_its_schedule_says(schedule):
    kept = [scaling.in_flight(schedule, device, 4, 16) for device in range(4)]
    assert kept == ([16] * 4 if schedule == "gpipe" else [4, 3, 2, 1])


@pytest.mark.parametrize("schedule, chunks", [("gpipe", 1), ("interleaved", 3)])
def test_every_device_works_once_forward_and_once_backward(schedule, chunks):
    for device in range(4):
        order = scaling.device_order(schedule, device, 4, 8, chunks)
        assert sorted(order) == sorted(
            itertools.product((False, True), range(8), range(chunks))
        )


def test_a_head_unbalances_the_last_stage_and_balancing_helps():
    layout = Layout(pipeline=4, micro_batches=16)
    forward, _ = scaling.stage_costs(SMALL, MACHINE, layout, BATCH)
    assert forward[-1].total_s > 1.5 * forward[0].total_s
    balanced = dataclasses.replace(layout, balance=True)
    assert step(balanced).step_s < step(layout).step_s


def test_devices_that_share_a_processor_have_no_bubble():
    shared = dataclasses.replace(MACHINE, shared=True)
    layout, model = Layout(pipeline=4), without_head()
    shared_step, own_step = step(layout, shared, model), step(layout, MACHINE, model)
    assert shared_step.bubble_s < 0.01 * shared_step.step_s
    assert own_step.bubble_s > 0.5 * own_step.step_s


# Memory and refusals


def test_recomputing_saves_memory_and_costs_time():
    kept, again = step(Layout()), step(Layout(recompute=True))
    assert again.memory["activations"] < kept.memory["activations"]
    assert again.step_s > kept.step_s


@pytest.mark.parametrize(
    "layout, reason",
    [
        (Layout(tensor=3), "`tensor` that divides 16 heads. Received: 3. Take 2 or 4."),
        (Layout(sequence=3), "`sequence` that divides 1024 positions"),
        (Layout(pipeline=16), "at most 8 stages"),
        (Layout(data=3), "`data` that divides 64 sequences"),
        (Layout(data=16, micro_batches=8), "`micro_batches` that divides 4"),
        (Layout(micro_batches=0), "`micro_batches` of at least 1"),
        (Layout(schedule="zigzag"), "a schedule of"),
        (Layout(pipeline=2, chunks=2), "1 chunk"),
        (
            Layout(
                pipeline=4, chunks=2, schedule="interleaved", micro_batches=2, data=1
            ),
            "`pipeline` that divides 2 micro-batches",
        ),
    ],
)
def test_a_layout_that_does_not_divide_is_refused_in_one_line(layout, reason):
    with pytest.raises(scaling.LayoutError) as caught:
        step(layout)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_layout_that_does_not_fit_is_refused():
    large = Model(96, 12288, 96, 51200, 2048)
    with pytest.raises(scaling.LayoutError, match="at most 72 GB a device"):
        predict(large, FITTED, Layout(data=8), 64)
    split = Layout(pipeline=12, tensor=8, micro_batches=64, recompute=True)
    assert predict(large, FITTED, split, 64).memory_bytes < 72e9


# Search


def test_the_search_finds_what_trying_everything_finds():
    model = Model(4, 256, 4, 1000, 128)
    tried = []
    for layout in scaling.all_layouts(8, 8):
        try:
            tried.append(predict(model, MACHINE, layout, 8).step_s)
        except scaling.LayoutError:
            continue
    _, found = scaling.best_layout(model, MACHINE, 8, 8)
    assert len(tried) > 50
    assert found.step_s == min(tried)


def test_the_search_says_why_nothing_fits():
    with pytest.raises(scaling.LayoutError, match="divides 4 heads"):
        scaling.best_layout(Model(4, 256, 4, 1000, 128), MACHINE, 8, 8, ("tensor",))


def test_a_mix_is_never_slower_than_a_kind_alone():
    _, mix = scaling.best_layout(SMALL, MACHINE, 16, BATCH)
    for kind in ("data", "tensor", "sequence"):
        _, alone = scaling.best_layout(SMALL, MACHINE, 16, BATCH, (kind,))
        assert mix.step_s <= alone.step_s


# Published and measured


def test_held_out_rows_of_megatron_are_predicted_within_a_tenth():
    rows = scaling.megatron_2021()
    share = scaling.fit_share([row for row in rows if row.fitted])
    held_out = [row for row in rows if not row.fitted]
    assert len(held_out) == 12
    for row in held_out:
        assert scaling.expected(row, share) == pytest.approx(row.value, rel=0.1)
    # Another share than the fitted one does not do as well.
    assert any(
        scaling.expected(row, share / 1.2) != pytest.approx(row.value, rel=0.1)
        for row in held_out
    )


def test_full_pipelines_of_gpipe_are_predicted_within_a_tenth():
    for row in scaling.gpipe():
        if row.run[1] == 32:
            assert scaling.expected(row, None) == pytest.approx(row.value, rel=0.1)


def test_a_link_is_found_again_from_its_times():
    link = Link(2e9, 1e-4)
    entries = [
        {"bytes": size, "devices": devices, "seconds": link.ring_s(size, devices)}
        for size in (1e3, 1e5, 1e7)
        for devices in (2, 4)
    ]
    found = scaling.fit_link(entries)
    assert found.bandwidth == pytest.approx(link.bandwidth)
    assert found.latency_s == pytest.approx(link.latency_s)


def made_up_report(constants):
    rows = [
        {"way": "one_device", "devices": 1},
        {"way": "mirrored", "devices": 2},
        {"way": "tensor", "devices": 4},
        {"way": "sequence", "devices": 2},
        {"way": "multi_worker", "devices": 2, "workers": 2},
        *(
            {"way": "pipeline", "devices": 2, "micro_batches": m, "schedule": s}
            for m in (1, 4)
            for s in ("gpipe", "1f1b")
        ),
    ]
    sizes = {"num_layers": 4, "embedding_dim": 128, "num_heads": 4, "vocab_size": 65}
    reduces = [
        {
            "bytes": size,
            "devices": 2,
            "between": between,
            "seconds": link.ring_s(size, 2),
        }
        for size in (1e4, 1e7)
        for between, link in (
            ("logical devices", constants.node),
            ("processes", constants.network),
        )
    ]
    report = {
        "machine": {"cores": 2},
        "shape": {**sizes, "context_length": 64, "batch_size": 16},
        "rates": {
            "matrix_product_gflops_1_core": 50.0,
            "matrix_product_gflops": 90.0,
            "all_reduce": reduces,
        },
        "rows": rows,
    }
    for row in rows:
        row["step_ms"] = scaling.row_step_s(report, row, constants) * 1e3
    return report


@pytest.mark.parametrize("shared", [True, False])
def test_calibration_finds_the_constants_that_made_the_rows(shared):
    constants = scaling.Calibration(0.4, 2e-3, Link(5e9, 1e-5), Link(1e9, 2e-4), shared)
    report = made_up_report(constants)
    found = scaling.calibrate(report)
    assert found["constants"]["shared"] == shared
    assert found["constants"]["matrix_share"] == pytest.approx(0.4, rel=1e-3)
    assert found["constants"]["call_overhead_s"] == pytest.approx(2e-3, rel=1e-3)
    assert found["left_out_error"] < 1e-3
    report["rows"][2]["step_ms"] *= 1.5
    assert scaling.calibrate(report)["left_out_error"] > 0.02


def test_rows_that_cannot_be_laid_out_are_told_and_left_out():
    report = made_up_report(
        scaling.Calibration(0.4, 2e-3, Link(5e9, 1e-5), Link(1e9, 2e-4), True)
    )
    report["rows"] += [
        {"way": "tensor", "devices": 3, "step_ms": 1.0},
        {"way": "by hand", "devices": 2, "step_ms": 1.0},
        {"way": "mirrored", "devices": 2, "step_ms": None},
    ]
    found = scaling.calibrate(report)
    reasons = [refused["reason"] for refused in found["refused"]]
    assert len(reasons) == 3
    assert len(found["rows"]) == len(report["rows"]) - 3
    del report["rows"][2:]
    with pytest.raises(ValueError, match="at least 3 measured rows"):
        scaling.calibrate(report)


def test_a_missing_measurement_is_told_and_not_fatal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "RESULTS", tmp_path)
    assert scaling.read_measured() is None
    assert "Run benchmarks/parallel.py" in " ".join(capsys.readouterr().out.split())
