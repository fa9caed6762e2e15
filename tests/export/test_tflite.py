import errno
import os
import resource
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tf_keras as keras
from ai_edge_litert.interpreter import Interpreter

import gpt_tf
from gpt_tf import artifacts
from gpt_tf.errors import InputError, InputTypeError
from gpt_tf.export import integrity, signatures
from gpt_tf.export.tflite import export_tflite
from gpt_tf.quantization.calibration import calibrate
from gpt_tf.quantization.weights import quantize_array
from gpt_tf.text.tokenizer import BPETokenizer, load_tokenizer
from tests.export.conftest import CONTEXT, FIXED_MODES, VOCAB_SIZE
from tests.export.runner import BoundRunner, content_of

MODES = signatures.MODES
# Claims that do not turn on the mode are tried in three of the seven.
SOME = ["float32", "int8_full", "int4"]
OTHERS = ["float16", "dynamic_int8", "int16x8"]

# Mean divergence in nats that the small model was measured to have, times about two.
DIVERGENCE = {
    "float16": 1e-7,
    "dynamic_int8": 1e-4,
    "int8": 3e-4,
    "int8_full": 4e-4,
    "int16x8": 1e-4,
    "int4": 1.5e-2,
}
# Of all modes: heads that do not divide the width (two ways), and an untied head.
UNEVEN = {"num_heads": 5, "tie_embeddings": False, "feedforward_dim": 48}
UNEVEN_BLOCKS = {"embedding_dim": 96, "num_heads": 64, "tie_embeddings": False}
SHAPES = [
    {"num_heads": 5},
    {"tie_embeddings": False, "feedforward_dim": 48},
    {"num_heads": 1, "num_layers": 1},
    {"layer_norm_epsilon": 0.1},
]


@pytest.fixture(scope="module")
def uneven(build_model):
    return build_model(**UNEVEN)


@pytest.fixture(scope="module")
def untied(build_model):
    return build_model(tie_embeddings=False)


@pytest.fixture(scope="module")
def larger(build_model):
    return build_model(vocab_size=1000, context_length=64, embedding_dim=64)


def logits_of(model, ids):
    return model(np.asarray(ids, np.int32)[None]).numpy()[0]


def largest_difference(found, wanted):
    assert found.shape == wanted.shape
    return np.abs(found - wanted).max()


def divergence(found, wanted):
    """Mean Kullback-Leibler divergence from `wanted`, in nats."""
    p, q = (x.astype(np.float64) for x in (wanted, found))
    p, q = (x - x.max(axis=1, keepdims=True) for x in (p, q))
    p, q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (p, q))
    return (np.exp(p) * (p - q)).sum(axis=1).mean()


def every_way(runner, ids):
    """Logits of a text by score, decode, and decode after each prefill."""
    yield "score", 0, runner.score(ids)
    runner.clear()
    yield "decode", 0, runner.decode(ids)
    for length in signatures.lengths_of(runner.names):
        runner.clear()
        assert runner.run(f"prefill_{length}", ids[:length]) is None
        yield f"prefill_{length}", length, runner.decode(ids[length:])


# What is computed


def test_float32_logits_equal_keras(exported, model, text_ids):
    wanted = logits_of(model, text_ids)
    assert wanted.std() > 0.1
    ways = set()
    for way, start, logits in every_way(exported("float32").runner(), text_ids):
        assert largest_difference(logits, wanted[start:]) < 1e-4, way
        ways.add(way)
    assert ways == {"score", "decode", "prefill_1", "prefill_4", "prefill_16"}


@pytest.fixture(scope="module")
def another(build_model):
    """The small model again, to be changed."""
    return build_model()


@pytest.fixture
def changed(another):
    """Change one weight of a model for a test."""
    kept = another.get_weights()

    def changed(weight, by):
        noise = np.random.default_rng(1).normal(0, by, weight.shape)
        weight.assign_add(noise)
        return another

    yield changed
    another.set_weights(kept)


@pytest.fixture(scope="module")
def float32_scores(exported, text_ids):
    return exported("float32").runner().score(text_ids)


@pytest.mark.parametrize("index", range(0, 28, 3))
def test_the_tolerance_notices_a_change_of_any_weight(
    float32_scores, another, changed, text_ids, index
):
    assert largest_difference(float32_scores, logits_of(another, text_ids)) < 1e-4
    assert len(another.weights) == 28
    model = changed(another.weights[index], 0.02)
    assert largest_difference(float32_scores, logits_of(model, text_ids)) > 1e-4


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "float32"])
def test_a_mode_diverges_by_no_more_than_was_measured(exported, model, text_ids, mode):
    wanted = logits_of(model, text_ids)
    for way, start, logits in every_way(exported(mode).runner(), text_ids):
        assert divergence(logits, wanted[start:]) < DIVERGENCE[mode], way


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "float32"])
def test_the_measured_divergence_notices_a_changed_weight(
    exported, another, changed, text_ids, mode
):
    logits = exported(mode).runner().score(text_ids)
    model = changed(another.get_layer("block_1").up_kernel, 0.1)
    assert divergence(logits, logits_of(model, text_ids)) > DIVERGENCE[mode]


@pytest.mark.parametrize("mode", SOME)
def test_prefill_then_decode_equals_score(exported, text_ids, mode):
    runner = exported(mode).runner()
    scored = runner.score(text_ids)
    for lengths in ([16, 16, 4], [4, 1, 16], [1, 1, 1]):
        runner.clear()
        for length in lengths:
            chunk = text_ids[runner.position : runner.position + length]
            runner.run(f"prefill_{length}", chunk)
        start = runner.position
        found = runner.decode(text_ids[start:])
        assert largest_difference(found, scored[start:]) < 1e-5


@pytest.mark.parametrize("mode", OTHERS)
def test_ids_without_a_token_are_ruled_out_and_the_others_stay(
    exported, export, model, tokenizer, text_ids, mode
):
    known = tokenizer.vocab_size
    assert known < VOCAB_SIZE
    plain = exported(mode)
    masked = export(model, mode, tokenizer=tokenizer)
    for call in (lambda run: run.score(text_ids), lambda run: run.decode(text_ids[:5])):
        found, wanted = (call(file.runner()) for file in (masked, plain))
        np.testing.assert_array_equal(found[:, :known], wanted[:, :known])
        assert np.isfinite(found).all() and found[:, known:].max() < -1e8
    measured, before = (
        file.manifest["verification"]["largest_logit_difference"]
        for file in (masked, plain)
    )
    assert measured == pytest.approx(before, rel=0.5)


@pytest.mark.parametrize("mode", OTHERS)
def test_padding_of_a_last_chunk_has_no_influence(exported, text_ids, mode):
    runner = exported(mode).runner()
    plain = runner.score(text_ids)
    for filler in (0, 7, VOCAB_SIZE - 1):
        runner.clear()
        runner.run("prefill_16", [*text_ids[:11], *[filler] * 5], count=11)
        found = runner.decode(text_ids[11:])
        assert largest_difference(found, plain[11:]) < 1e-5
        assert (
            largest_difference(runner.score(text_ids[:33], filler), plain[:33]) < 1e-5
        )


def test_a_filler_in_place_of_a_token_would_be_noticed(exported, text_ids):
    runner = exported("float32").runner()
    plain = runner.score(text_ids)
    runner.clear()
    runner.run("prefill_16", [*text_ids[:10], *[0] * 6], count=11)
    assert largest_difference(runner.decode(text_ids[11:]), plain[11:]) > 1e-3


@pytest.mark.parametrize("mode", SOME)
def test_the_same_memory_may_be_cache_input_and_output(exported, text_ids, mode):
    path = exported(mode).path
    separate = BoundRunner(path).decode(text_ids)
    same = BoundRunner(path, same_memory=True).decode(text_ids)
    np.testing.assert_array_equal(same, separate)
    plain = exported(mode).runner().decode(text_ids)
    assert largest_difference(separate, plain) < 1e-5


@pytest.mark.parametrize("mode", OTHERS)
@pytest.mark.parametrize("capacity", [12, 25])
def test_a_smaller_capacity_gives_the_same_logits(exported, text_ids, mode, capacity):
    ids = text_ids[:capacity]
    runner = BoundRunner(exported(mode).path, same_memory=True, capacity=capacity)
    assert runner.capacity == capacity
    plain = exported(mode).runner().decode(ids)
    assert largest_difference(runner.decode(ids), plain) < 1e-5


@pytest.mark.parametrize("mode", SOME)
def test_every_signature_can_be_resized(exported, text_ids, mode):
    """By the plain interpreter, prefill and score among them."""
    capacity, path = 20, exported(mode).path
    interpreter = Interpreter(model_path=str(path))
    plain = exported(mode).runner()
    for name in plain.names:
        plain.clear()
        length = int(name.rpartition("_")[2]) if "_" in name else 1
        if length > capacity:
            continue
        wanted = plain.run(name, text_ids[:length])
        runner = interpreter.get_signature_runner(name)
        feed = {"tokens": text_ids[None, :length], "input_pos": np.arange(length)}
        feed["input_pos"] = feed["input_pos"].astype(np.int32)
        feed["mask"] = signatures.mask(feed["input_pos"], capacity)
        for cache, blank in plain.blank.items():
            feed[cache] = blank[:, :, :capacity].copy()
        found = runner(**feed)
        if wanted is not None:
            assert largest_difference(found["logits"][0], wanted) < 1e-5
        for cache in plain.blank:
            rows = plain.caches[cache][:, :, :length]
            np.testing.assert_allclose(found[cache][:, :, :length], rows, atol=1e-5)
            assert found[cache].shape[2] == capacity


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_model_is_exported(build_model, export, text_ids, shape):
    model = build_model(**shape)
    scored = export(model).runner().score(text_ids)
    assert largest_difference(scored, logits_of(model, text_ids)) < 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_uneven_heads_and_an_untied_head_are_exported_in_every_mode(
    build_model, uneven, export, text_ids, mode
):
    model = build_model(**UNEVEN_BLOCKS) if mode == "int4" else uneven
    block = model.get_layer("block_0")
    assert block.num_heads * block.head_dim < block.embedding_dim
    runner = export(model, mode).runner()
    wanted = logits_of(model, text_ids)
    scored = runner.score(text_ids)
    if mode == "float32":
        assert largest_difference(scored, wanted) < 1e-4
    assert divergence(scored, wanted) < 8 * DIVERGENCE.get(mode, 1e-8)
    runner.clear()
    assert largest_difference(runner.decode(text_ids), scored) < 1e-5


def test_a_shorter_context_than_the_models_is_kept(export, model, text_ids):
    file = export(model, context_length=18)
    assert file.manifest["capacity"] == 18
    runner = file.runner()
    assert runner.capacity == 18
    assert runner.names == sorted(
        ["decode", "prefill_1", "prefill_4", "prefill_16", "score_18"]
    )
    wanted = logits_of(model, text_ids[:18])
    assert largest_difference(runner.score(text_ids[:18]), wanted) < 1e-4


def test_lengths_of_numpy_are_lengths(export, model):
    file = export(model, prefill_lengths=np.array([4, 2]))
    assert file.manifest["prefill_lengths"] == [1, 2, 4]


def test_prefills_longer_than_the_context_are_left_out(export, model):
    file = export(model, context_length=10, prefill_lengths=[64, 8, 8])
    assert file.runner().names == ["decode", "prefill_1", "prefill_8", "score_10"]
    assert file.manifest["prefill_lengths"] == [1, 8]


# What is stored


def quantised_matrices(model):
    """Yield name, values as (outputs, inputs), of all matrices."""
    embedding = model.get_layer("embedding")
    yield "token_table", embedding.token_table.numpy()
    yield "position_table", embedding.position_table.numpy()
    for index in range(model.num_layers):
        block = model.get_layer(f"block_{index}")
        for name in ("qkv", "output", "up", "down"):
            kernel = getattr(block, f"{name}_kernel").numpy()
            yield f"block_{index}/{name}", np.ascontiguousarray(kernel.T)


@pytest.mark.parametrize("mode", ["dynamic_int8", "int8", "int8_full", "int16x8"])
def test_the_integers_of_the_file_are_those_of_quantize_array(exported, mode):
    """Difference 0: so the scales that were trained against are those that run."""
    data = exported(mode).path.read_bytes()
    for name, values in quantised_matrices(exported(mode).model):
        integers = quantize_array(values, 8, axis=0)[0]
        pieces = [integers]
        if name.endswith("qkv") and mode != "dynamic_int8":
            pieces = np.split(integers, 3)
        for piece in pieces:
            assert data.count(piece.tobytes()) == 1, name


@pytest.mark.parametrize("mode", ["dynamic_int8", "int8"])
def test_a_baked_quantisation_is_recovered(build_model, export, text_ids, mode):
    """Weights that are quantised already stay as they are, bit by bit."""
    model = build_model()
    for layer in model.layers:
        for weight in layer.weights:
            if len(weight.shape) != 2:
                continue
            axis = 0 if "table" in weight.name else 1
            integers, scales = quantize_array(weight.numpy(), 8, axis=axis)
            weight.assign(integers * scales)
    content = content_of(export(model, mode).path)
    stored = {
        bytes(content.buffers[tensor.buffer].data): tensor.quantization.scale
        for graph in content.subgraphs
        for tensor in graph.tensors
        if tensor.buffer and tensor.quantization is not None
    }
    for name, values in quantised_matrices(model):
        integers, _ = quantize_array(values, 8, axis=0)
        pieces = [slice(None)]
        if name.endswith("qkv") and mode == "int8":
            pieces = [slice(0, 32), slice(32, 64), slice(64, 96)]
        for rows in pieces:
            scales = stored[integers[rows].tobytes()]
            expected = values[rows].copy()
            if name.endswith("qkv") and rows.start in (None, 0):
                expected[:32] /= np.sqrt(np.float32(8))
            np.testing.assert_allclose(
                integers[rows] * scales[:, None], expected, rtol=1e-6
            )


@pytest.mark.parametrize("mode", SOME)
def test_the_tied_token_table_is_stored_once(exported, untied, export, mode):
    bits = {"float32": 32, "float16": 16}.get(mode, 8)
    table = VOCAB_SIZE * 32 * bits // 8
    more = export(untied, mode).manifest["size_bytes"]
    more -= exported(mode).manifest["size_bytes"]
    scales = 0 if "float" in mode else VOCAB_SIZE * 12  # and zero points
    assert table < more <= table + scales + 2000


def parameter_bytes(model, mode):
    """What the parameters need, a float32 or float16 per scale included."""
    shapes = {name: values.shape for name, values in quantised_matrices(model)}
    numbers = {name: rows * width for name, (rows, width) in shapes.items()}
    vectors = 4 * (model.count_params() - sum(numbers.values()))
    if mode in ("float32", "float16"):
        return (4 if mode == "float32" else 2) * sum(numbers.values()) + vectors
    rows = sum(rows for rows, _ in shapes.values())
    if mode != "int4":
        return sum(numbers.values()) + 4 * rows + vectors
    tables = [numbers.pop(name) for name in ("token_table", "position_table")]
    scales = 4 * (1000 + 64)
    kernels = sum(numbers.values())
    return sum(tables) + scales + kernels // 2 + 2 * kernels // 32 + vectors


@pytest.mark.parametrize("mode", SOME)
def test_the_file_is_its_parameters_and_its_graphs_whatever_the_signatures(
    export, larger, mode
):
    parameters = parameter_bytes(larger, mode)
    sizes = []
    for lengths in ([1], [1, 2, 4, 8, 16, 32, 64]):
        file = export(larger, mode, prefill_lengths=lengths)
        assert file.manifest["verification"]["parameter_bytes"] == parameters
        sizes.append(file.path.stat().st_size)
        stored = sum(
            len(buffer.data)
            for buffer in content_of(file.path).buffers
            if buffer.data is not None
        )
        # The seal and the small integers of shapes and axes are among the buffers.
        assert stored <= 1.02 * parameters + 2000
    assert sizes[1] - sizes[0] < 6 * 1700 * larger.num_layers
    graphs = 17_000 if "float" in mode else 50_000  # zero points for all channels
    assert sizes[0] <= 1.02 * parameters + graphs


def test_a_second_copy_of_a_table_would_be_noticed(export, build_model, larger):
    untied = build_model(
        vocab_size=1000, context_length=64, embedding_dim=64, tie_embeddings=False
    )
    size = export(untied, prefill_lengths=[1]).path.stat().st_size
    assert size > 1.02 * parameter_bytes(larger, "float32") + 50_000


@pytest.mark.parametrize("mode", OTHERS)
def test_the_file_holds_one_seal_that_says_what_it_is(exported, mode):
    data = exported(mode).path.read_bytes()
    assert data.count(signatures.SEAL_PREFIX) == 1
    facts = integrity.read_seal(data)
    assert facts["mode"] == mode
    assert facts["capacity"] == CONTEXT
    assert facts["config"]["num_layers"] == 2
    assert facts["config"]["head_dim"] == 8
    assert facts["prefill_lengths"] == [1, 4, 16]
    assert facts["score_lengths"] == [CONTEXT]
    assert facts["cache_dtype"] == ("int8" if mode == "int8_full" else "float32")
    assert facts["tokenizer_fingerprint"] is None
    assert facts["versions"] == artifacts.versions()


def test_the_same_model_gives_the_same_bytes(export, model, exported):
    again = export(model, "dynamic_int8")
    assert again.path.read_bytes() == exported("dynamic_int8").path.read_bytes()


def test_calibrating_inside_equals_handing_in_ranges(
    export, exported, model, representative, text_ids
):
    ranges = calibrate(model, representative)
    outside = export(model, "int8", ranges=ranges, verify_on=text_ids)
    assert outside.path.read_bytes() == exported("int8").path.read_bytes()
    halved = {name: (low / 2, high / 2) for name, (low, high) in ranges.items()}
    assert (
        export(model, "int8", ranges=halved).path.read_bytes()
        != outside.path.read_bytes()
    )


@pytest.mark.slow
def test_gpt2_small_needs_124_megabytes_and_little_memory(tmp_path):
    """Measured in a process of its own, so that the peak is that of the export."""
    code = f"""
        import os, resource
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
        import gpt_tf
        from gpt_tf.export.tflite import export_tflite

        model = gpt_tf.GPTModel(
            vocab_size=50257, embedding_dim=768, num_layers=12, num_heads=12,
            context_length=1024,
        )
        manifest = export_tflite(
            model, {str(tmp_path / "gpt2.tflite")!r}, "dynamic_int8",
            prefill_lengths=(1, 8, 64), allow_untrained=True,
        )
        print(manifest["size_bytes"], manifest["verification"]["top1_agreement"])
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    size, agreement = result.stdout.split()
    assert int(size) == (tmp_path / "gpt2.tflite").stat().st_size
    assert 124_000_000 < int(size) <= 127_000_000
    assert float(agreement) > 0.9
    # Of all child processes so far the largest, in KiB.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert peak < 12 * 2**30


# The manifest and what stands beside


def test_the_manifest_says_what_was_written_and_measured(exported, text_ids):
    file = exported("dynamic_int8")
    manifest = file.manifest
    assert artifacts.check_file_manifest(file.path) == manifest
    assert manifest["kind"] == "tflite"
    assert manifest["mode"] == "dynamic_int8"
    assert manifest["config"]["vocab_size"] == VOCAB_SIZE
    assert manifest["size_bytes"] == file.path.stat().st_size
    measured = manifest["verification"]
    assert measured["signatures"] == file.runner().names
    assert measured["size_bytes"] == manifest["size_bytes"]
    assert measured["text"] == "random ids"
    assert measured["tokens"] == CONTEXT
    assert measured["operators"]["SOFTMAX"] == 2 + 2 + 3 * 1
    assert 0 < measured["divergence_nats"] < DIVERGENCE["dynamic_int8"]
    assert 0 <= measured["top1_agreement"] <= 1
    assert 0 < measured["largest_logit_difference"] < 1


def test_the_export_says_what_it_does(export, model, notices):
    export(model, "int8")
    assert [line.partition(" ")[0] for line in notices] == [
        "calibrating:",
        "storing",
        "running",
    ]


def test_a_new_file_replaces_the_old_one_and_its_manifest(tmp_path, model):
    path = tmp_path / "gpt.tflite"
    export_tflite(model, path, "float32")
    manifest = export_tflite(model, path, "dynamic_int8")
    assert artifacts.check_file_manifest(path) == manifest
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "gpt.tflite",
        "gpt.tflite.json",
    ]


def test_folders_are_made_and_names_in_any_alphabet_taken(tmp_path, model):
    path = tmp_path / "new" / "Gr\u00f6\u00dfe \u4e2d.tflite"
    export_tflite(model, str(path), "float32")
    assert Interpreter(model_path=str(path)).get_signature_list()


def test_the_tokenizer_stands_beside_and_is_known_by_the_file(
    tmp_path, model, tokenizer
):
    path = tmp_path / "gpt.tflite"
    for _ in range(2):  # the second time it is there already
        manifest = export_tflite(model, path, tokenizer=tokenizer)
        fingerprint = tokenizer.fingerprint()
        assert manifest["tokenizer_fingerprint"] == fingerprint
        beside = load_tokenizer(tmp_path / "tokenizer.json")
        assert beside.fingerprint() == fingerprint
    facts = integrity.read_seal(path.read_bytes())
    assert facts["tokenizer_fingerprint"] == fingerprint


def test_the_model_is_left_as_it_was(build_model, export, text_ids):
    model = build_model()
    weights, logits = model.get_weights(), logits_of(model, text_ids)
    for mode in ("float32", "int4", "int8_full"):
        export(model, mode)
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(logits_of(model, text_ids), logits)


# What cannot be exported


def refused(tmp_path, match, model, *arguments, error=InputError, **options):
    """Export, expect an error, and see that nothing was left behind."""
    path = tmp_path / "refused" / "gpt.tflite"
    with pytest.raises(error, match=match):
        export_tflite(model, path, *arguments, **options)
    assert not path.parent.exists() or not list(path.parent.iterdir())


@pytest.mark.parametrize(
    ("mode", "match"),
    [
        ("int5", r"expects one of float32, .*, int4\. Received: 'int5'\.$"),
        ("bfloat16", "cannot be had: float16 has the same size"),
        ("int2", "cannot be had"),
        ("int4x8", "cannot be had"),
        ("", "Received: ''"),
    ],
)
def test_an_unknown_mode_is_refused_with_the_reason(tmp_path, model, mode, match):
    refused(tmp_path, match, model, mode)


@pytest.mark.parametrize("name", ["gpt.litertlm", "gpt", "gpt.tflite.gz", ".tflite"])
def test_another_suffix_is_refused(tmp_path, model, name):
    with pytest.raises(InputError, match=r"ends in \.tflite"):
        export_tflite(model, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_objects_of_keras_3_are_refused_with_the_repair(tmp_path):
    import keras as keras_3

    layer = keras_3.layers.Dense(3)
    network = keras_3.Sequential([layer])
    for thing in (layer, network):
        refused(tmp_path, "of Keras 3", thing, error=InputTypeError)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: None,
        lambda model: "gpt.keras",
        lambda model: model.get_layer("block_0"),
        lambda model: keras.Sequential([keras.layers.Dense(2, input_shape=(2,))]),
        lambda model: type(model),
    ],
)
def test_what_is_no_gpt_is_refused(tmp_path, model, make):
    refused(tmp_path, "expects a GPTModel", make(model), error=InputTypeError)


def test_a_model_that_was_never_trained_is_refused(tmp_path):
    fresh = gpt_tf.GPTModel(
        vocab_size=40, embedding_dim=8, num_layers=1, num_heads=1, context_length=8
    )
    refused(tmp_path, r"trained model.*allow_untrained=True", fresh)
    path = tmp_path / "gpt.tflite"
    export_tflite(fresh, path, allow_untrained=True)
    bias = fresh.get_layer("block_0").down_bias
    bias.assign_add(np.full(bias.shape, 1e-6))
    export_tflite(fresh, path)


@pytest.mark.parametrize("mode", FIXED_MODES)
def test_modes_with_fixed_ranges_want_ranges(tmp_path, model, mode):
    refused(tmp_path, "`ranges` nor `representative`", model, mode)
    refused(tmp_path, "without it", model, mode, ranges={})


def test_every_missing_range_is_named(tmp_path, model, representative):
    ranges = calibrate(model, representative)
    needed = set(ranges)
    needed -= {n for n in ranges if n.endswith("probabilities_activation")}
    for name in sorted(needed):
        fewer = {key: value for key, value in ranges.items() if key != name}
        refused(tmp_path, rf"range for .*{name}", model, "int8_full", ranges=fewer)


@pytest.mark.parametrize("limits", [(np.nan, 1.0), (0.0, np.inf), (2.0, -2.0)])
def test_ranges_that_are_none_are_refused(tmp_path, model, representative, limits):
    ranges = calibrate(model, representative)
    ranges["block_1/up_activation"] = limits
    refused(tmp_path, "block_1/up_activation", model, "int8", ranges=ranges)


@pytest.mark.parametrize(
    "ids",
    [
        np.zeros((0, 8), np.int32),
        np.zeros((2, 0), np.int32),
        np.full((2, 8), VOCAB_SIZE),
        np.full((2, 8), -1),
        np.zeros((2, CONTEXT + 1), np.int32),
        np.zeros((2, 8), np.float32),
        [],
    ],
)
def test_texts_to_calibrate_on_that_cannot_be_used_are_refused(tmp_path, model, ids):
    refused(tmp_path, "Received", model, "int8", representative=ids)


@pytest.mark.parametrize("ids", [[], [VOCAB_SIZE], [3, -1]])
def test_a_text_to_verify_on_that_cannot_be_used_is_refused(tmp_path, model, ids):
    refused(tmp_path, r"`verify_on` expects token ids", model, verify_on=ids)


@pytest.mark.parametrize("length", [CONTEXT + 1, 1, 0, -5])
def test_a_context_that_the_model_has_not_is_refused(tmp_path, model, length):
    refused(tmp_path, rf"from 2 to {CONTEXT}", model, context_length=length)


@pytest.mark.parametrize(
    "lengths", [[], [0], [-1, 8], [2.5], ["8", 1], [True], 8, None]
)
def test_prefill_lengths_that_are_none_are_refused(tmp_path, model, lengths):
    refused(tmp_path, "`prefill_lengths` expects", model, prefill_lengths=lengths)


def test_another_tokenizer_beside_is_not_written_over(tmp_path, model, tokenizer):
    other = BPETokenizer.train(["another text " * 50], 260)
    other.save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()
    with pytest.raises(InputError, match=r"another one\. Choose another folder"):
        export_tflite(model, tmp_path / "gpt.tflite", tokenizer=tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    assert (tmp_path / "tokenizer.json").read_bytes() == before


def test_int4_wants_widths_that_are_multiples_of_32(tmp_path, build_model):
    narrow = build_model(embedding_dim=40, num_heads=2)
    refused(tmp_path, r"blocks of 32 inputs.*multiples of 32", narrow, "int4")


@pytest.mark.parametrize("call", ["fsync", "write"])
def test_a_full_disk_leaves_what_was_there(tmp_path, model, monkeypatch, call):
    path = tmp_path / "gpt.tflite"
    export_tflite(model, path, "float32")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        opened = open

        def open_full(name, *arguments, **options):
            file = opened(name, *arguments, **options)
            if str(name).startswith(str(tmp_path)):
                file.write = full
            return file

        monkeypatch.setattr("builtins.open", open_full)
    with pytest.raises(InputError, match=r"gpt\.tflite cannot be written: No space"):
        export_tflite(model, path, "dynamic_int8")
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_place_that_cannot_be_written_is_named(tmp_path, model):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        export_tflite(model, tmp_path / "file" / "gpt.tflite")


@pytest.mark.parametrize("name", ["gamma", "beta"])
def test_a_broken_vector_is_named(tmp_path, build_model, name):
    model = build_model()
    weight = getattr(model.get_layer("final_norm"), name)
    weight.assign(np.where(np.arange(32) == 5, np.nan, weight.numpy()))
    refused(tmp_path, f"NaN or infinity in final_norm/{name}", model, "float32")


def test_a_broken_matrix_is_named(tmp_path, build_model):
    model = build_model()
    weight = model.get_layer("block_1").output_kernel
    weight.assign(np.full(weight.shape, np.inf))
    for mode in ("float32", "float16", "dynamic_int8", "int4"):
        refused(tmp_path, "NaN or infinity in block_1/output", model, mode)
