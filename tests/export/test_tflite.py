import functools
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
from gpt_tf.text.tokenizer import BPETokenizer, load_tokenizer
from tests.export.conftest import CONTEXT, FIXED_MODES, VOCAB_SIZE, with_four_bits

# Models are called here and not trained: tracing would take longer.
pytestmark = pytest.mark.usefixtures("eagerly")

MODES = signatures.MODES
# Claims that do not turn on the mode are tried in a few of the seven.
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
SHAPES = {
    "plain": {"num_heads": 1, "layer_norm_epsilon": 0.1},
    "uneven": {"num_heads": 5, "tie_embeddings": False, "feedforward_dim": 48},
    "uneven blocks": {"embedding_dim": 96, "num_heads": 64, "tie_embeddings": False},
}


def logits_of(model, ids):
    return model(np.asarray(ids, np.int32)[None]).numpy()[0]


def largest_difference(found, wanted):
    assert found.shape == wanted.shape
    return np.abs(found - wanted).max()


def divergence(found, wanted):
    """Mean Kullback-Leibler divergence from `wanted`, in nats."""
    p, q = (x.astype(np.float64) for x in (wanted, found))
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


@pytest.fixture
def changed(build_model, text_ids):
    """The small model's logits, where a weight of it was changed."""
    model = build_model()

    def changed(weight, by):
        kept = weight.numpy()
        weight.assign_add(np.random.default_rng(1).normal(0, by, kept.shape))
        logits = logits_of(model, text_ids)
        weight.assign(kept)
        return logits

    changed.model = model
    return changed


# What is computed


def test_float32_logits_equal_keras(exported, model, text_ids):
    wanted = logits_of(model, text_ids)
    assert wanted.std() > 0.1
    ways = set()
    for way, start, logits in every_way(exported("float32").runner(), text_ids):
        assert largest_difference(logits, wanted[start:]) < 1e-4, way
        ways.add(way)
    assert ways == {"score", "decode", "prefill_1", "prefill_4", "prefill_16"}


def test_the_tolerance_notices_a_change_of_any_weight(exported, changed, text_ids):
    scores = exported("float32").runner().score(text_ids)
    assert len(changed.model.weights) == 28
    for weight in changed.model.weights[::3]:
        logits = changed(weight, 0.02)
        assert largest_difference(scores, logits) > 1e-4, weight.name


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "float32"])
def test_a_mode_diverges_by_no_more_than_was_measured(
    exported, model, changed, text_ids, mode
):
    wanted = logits_of(model, text_ids)
    other = changed(changed.model.get_layer("block_1").up_kernel, 0.1)
    for way, start, logits in every_way(exported(mode).runner(), text_ids):
        assert divergence(logits, wanted[start:]) < DIVERGENCE[mode], way
        assert way != "score" or divergence(logits, other) > DIVERGENCE[mode]


@pytest.mark.parametrize("mode", SOME)
def test_padding_of_a_last_chunk_has_no_influence(exported, text_ids, mode):
    runner = exported(mode).runner()
    plain = runner.score(text_ids)

    def after(count, filler):
        """Decode after a prefill of eleven tokens, of which some are real ones."""
        runner.clear()
        filled = [*text_ids[:count], *[filler] * (16 - count)]
        runner.run("prefill_16", filled, count=11)
        return largest_difference(runner.decode(text_ids[11:]), plain[11:])

    for filler in (0, VOCAB_SIZE - 1):
        assert after(11, filler) < 1e-5
        scored = runner.score(text_ids[:33], filler)
        assert largest_difference(scored, plain[:33]) < 1e-5
    assert after(10, 0) > 1e-3


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


@pytest.fixture
def with_outliers(build_model):
    """A model of which two channels of the last normalisation stand out."""
    model = build_model(num_layers=1, embedding_dim=64)
    large = np.where(np.isin(np.arange(64), [9, 40]), 30, 1).astype(np.float32)
    gamma = model.get_layer("final_norm").gamma
    gamma.assign(gamma * large)
    # As in a trained model, the head reads little of them.
    table = model.get_layer("embedding").token_table
    table.assign(table / large)
    return model


@pytest.mark.parametrize("mode", ["dynamic_int8", "int4"])
def test_outliers_that_the_head_multiplies_apart_do_not_coarsen_the_rest(
    with_outliers, export, text_ids, mode
):
    wanted = logits_of(with_outliers, text_ids)
    whole = export(with_outliers, mode)
    apart = export(with_outliers, mode, head_outliers=[9, 40])
    assert apart.manifest["head_outliers"] == 2 and not whole.manifest["head_outliers"]
    ways = (every_way(file.runner(), text_ids) for file in (apart, whole))
    for (way, first, found), (_, _, before) in zip(*ways, strict=True):
        errors = [np.square(x - wanted[first:]).mean() for x in (found, before)]
        # The weights' own rounding is in both, and most of it in int4.
        assert errors[0] < errors[1] * (0.5 if mode == "dynamic_int8" else 0.98), way


def test_modes_that_quantise_no_rows_do_without_outliers(with_outliers, export):
    manifest = export(with_outliers, "float32", head_outliers=[9]).manifest
    assert manifest["head_outliers"] == 0
    with pytest.raises(InputError, match=r"head_outliers.*63"):
        export(with_outliers, "dynamic_int8", head_outliers=[64])


def test_weights_of_4_bits_stay_as_they_are(build_model, export, text_ids):
    model = with_four_bits(build_model(embedding_dim=64))
    wanted = logits_of(model, text_ids)
    rounded, kept, eight = (
        divergence(export(model, mode, **options).runner().score(text_ids), wanted)
        for mode, options in (
            ("int4", {}),
            ("int4", {"has_offsets": True}),
            ("dynamic_int8", {}),
        )
    )
    assert kept < 3 * eight and kept < rounded / 10
    file = export(model, "int4", has_offsets=True)
    for way, first, found in every_way(file.runner(), text_ids):
        assert divergence(found, wanted[first:]) < 3 * eight, way
    manifest = export(model, "dynamic_int8", has_offsets=True).manifest
    assert manifest["has_offsets"] is False


@pytest.fixture(scope="module")
def shaped(build_model):
    """A model of one block by the name of its shape, made once."""
    return functools.cache(lambda name: build_model(num_layers=1, **SHAPES[name]))


@pytest.mark.parametrize(
    ("mode", "shape"),
    [
        ("float32", "plain"),
        ("int4", "uneven blocks"),
        *((mode, "uneven") for mode in MODES if "4" not in mode),
    ],
)
def test_every_shape_of_model_is_exported(shaped, export, text_ids, mode, shape):
    model = shaped(shape)
    runner = export(model, mode).runner()
    scored, wanted = runner.score(text_ids), logits_of(model, text_ids)
    if mode == "float32":
        assert largest_difference(scored, wanted) < 1e-4
    assert divergence(scored, wanted) < 8 * DIVERGENCE.get(mode, 1e-8)
    runner.clear()
    assert largest_difference(runner.decode(text_ids), scored) < 1e-5


def test_capacity_and_prefill_lengths_are_kept(export, model, text_ids):
    lengths = np.array([64, 8, 8])
    file = export(model, context_length=18, prefill_lengths=lengths)
    assert file.manifest["capacity"] == 18
    assert file.manifest["prefill_lengths"] == [1, 8]  # longer ones have no room
    runner = file.runner()
    assert runner.capacity == 18
    scores = ["score_18", "score_2", "score_4", "score_8"]
    assert runner.names == ["decode", "prefill_1", "prefill_8", *scores]
    wanted = logits_of(model, text_ids[:18])
    assert largest_difference(runner.score(text_ids[:18]), wanted) < 1e-4


# What is stored


@pytest.mark.parametrize("mode", SOME)
def test_the_file_is_its_parameters_and_its_graphs_whatever_the_signatures(
    export, build_model, mode
):
    sizes = {"vocab_size": 1000, "embedding_dim": 64}
    tied, untied = build_model(**sizes), build_model(**sizes, tie_embeddings=False)
    few, many, copied = (
        export(model, mode, prefill_lengths=lengths).manifest
        for model, lengths in ((tied, [1]), (tied, [1, 2, 4, 8]), (untied, [1]))
    )
    parameters = few["verification"]["parameter_bytes"]
    graphs = 33_000 if "float" in mode else 57_000  # zero points for all channels
    assert parameters < few["size_bytes"] <= 1.02 * parameters + graphs
    assert many["verification"]["parameter_bytes"] == parameters
    # Measured: 1.0 KB per block and signature in real numbers, 1.6 KB in integers, and
    # half a KB around the blocks.
    block = 1700 if mode == "int8_full" else 1100
    most_bytes = 3 * (500 + tied.num_layers * block)
    assert 0 < many["size_bytes"] - few["size_bytes"] <= most_bytes
    # The tied table is in it once.
    table = 1000 * 64 * (4 if mode == "float32" else 1)
    assert copied["size_bytes"] > few["size_bytes"] + table


def test_the_manifest_and_the_seal_say_what_was_written_and_measured(exported):
    file = exported("dynamic_int8")
    manifest, data = file.manifest, file.path.read_bytes()
    assert artifacts.check_file_manifest(file.path) == manifest
    assert manifest["kind"] == "tflite"
    assert manifest["size_bytes"] == len(data)
    assert data.count(signatures.SEAL_PREFIX) == 1
    facts = integrity.read_seal(data)
    assert facts["mode"] == manifest["mode"] == "dynamic_int8"
    assert facts["capacity"] == CONTEXT
    config = {**file.model.get_config(), "head_dim": 8}
    del config["name"]
    assert facts["config"] == config
    assert facts["prefill_lengths"] == [1, 4, 16]
    assert facts["score_lengths"] == [2, 4, 8, CONTEXT]
    assert facts["cache_dtype"] == "float32"
    assert facts["tokenizer_fingerprint"] is None
    assert facts["versions"] == artifacts.versions()
    measured = manifest["verification"]
    assert measured["signatures"] == file.runner().names
    assert measured["size_bytes"] == manifest["size_bytes"]
    assert measured["text"] == "random ids"
    assert measured["tokens"] == CONTEXT
    # Two blocks; a prefill does without the last one's, and a short score has a softmax
    # a position.
    assert measured["operators"]["SOFTMAX"] == 2 * (1 + 2 + 4 + 8 + 1) + 3 * 1
    assert 0 < measured["divergence_nats"] < DIVERGENCE["dynamic_int8"]
    assert 0 <= measured["top1_agreement"] <= 1
    assert 0 < measured["largest_logit_difference"] < 1


def test_the_same_model_gives_the_same_bytes(export, model, exported):
    again = export(model, "dynamic_int8")
    assert again.path.read_bytes() == exported("dynamic_int8").path.read_bytes()


def test_calibrating_inside_equals_handing_in_ranges(export, model, representative):
    ranges = calibrate(model, representative)
    halved = {name: (low / 2, high / 2) for name, (low, high) in ranges.items()}
    inside, outside, other = (
        export(model, "int8", **options).path.read_bytes()
        for options in (
            {"ranges": None, "representative": representative},
            {"ranges": ranges},
            {"ranges": halved},
        )
    )
    assert inside == outside != other


@pytest.mark.slow
def test_gpt2_small_needs_124_megabytes_and_little_memory(tmp_path):
    """Measured in a process of its own, so that the peak is that of the export."""
    code = f"""
        import os
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
        import gpt_tf

        model = gpt_tf.GPTModel(
            vocab_size=50257, embedding_dim=768, num_layers=12, num_heads=12,
            context_length=1024,
        )
        manifest = gpt_tf.export_tflite(
            model, {str(tmp_path / "gpt2.tflite")!r}, allow_untrained=True
        )
        print(manifest["size_bytes"], manifest["verification"]["top1_agreement"])
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "INFO: [" not in result.stderr  # how LiteRT ends
    size, agreement = result.stdout.split()
    assert 124_000_000 < int(size) <= 127_000_000
    assert float(agreement) > 0.9
    # Of all child processes so far the largest, in KiB.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert peak < 3 * 2**30  # one packed copy of the weights for all signatures


# What stands beside


def test_a_new_file_replaces_the_old_one_and_its_manifest(tmp_path, model):
    path = tmp_path / "new" / "Gr\u00f6\u00dfe \u4e2d.tflite"
    export_tflite(model, str(path), "float32", prefill_lengths=[1])
    manifest = export_tflite(model, path, "dynamic_int8", prefill_lengths=[1])
    assert artifacts.check_file_manifest(path) == manifest
    assert Interpreter(model_path=str(path)).get_signature_list()
    beside = sorted(p.name for p in path.parent.iterdir())
    assert beside == [path.name, f"{path.name}.json"]


def test_the_tokenizer_stands_beside_and_is_known_by_the_file(
    tmp_path, model, tokenizer
):
    path = tmp_path / "gpt.tflite"
    fingerprint = tokenizer.fingerprint()
    for _ in range(2):  # the second time it is there already
        manifest = export_tflite(model, path, tokenizer=tokenizer)
        assert manifest["tokenizer_fingerprint"] == fingerprint
        beside = load_tokenizer(tmp_path / "tokenizer.json")
        assert beside.fingerprint() == fingerprint
    facts = integrity.read_seal(path.read_bytes())
    assert facts["tokenizer_fingerprint"] == fingerprint


def test_another_tokenizer_beside_is_not_written_over(tmp_path, model, tokenizer):
    BPETokenizer.train(["another text " * 50], 260).save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()
    with pytest.raises(InputError, match="another one"):
        export_tflite(model, tmp_path / "gpt.tflite", tokenizer=tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    assert (tmp_path / "tokenizer.json").read_bytes() == before


def test_the_model_is_left_as_it_was(build_model, exported):
    fresh = build_model().get_weights()
    for mode in SOME:
        for wanted, weight in zip(fresh, exported(mode).model.weights, strict=True):
            np.testing.assert_array_equal(wanted, weight)


# What cannot be exported


def refused(tmp_path, match, model, *arguments, error=InputError, **options):
    """Export, expect an error, and see that nothing was left behind."""
    path = tmp_path / "refused" / "gpt.tflite"
    with pytest.raises(error, match=match):
        export_tflite(model, path, *arguments, **options)
    assert not path.parent.exists() or not list(path.parent.iterdir())


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("`mode` expects", {"mode": "int2"}),
        *(("`verify_on`", {"verify_on": ids}) for ids in ([], [VOCAB_SIZE], [3, -1])),
        *((f"2 to {CONTEXT}", {"context_length": n}) for n in (CONTEXT + 1, 1)),
        *(
            ("`prefill_lengths`", {"prefill_lengths": lengths})
            for lengths in ([], [0], [-1, 8], [2.5], 8, None)
        ),
        *(("`ranges` nor `representative`", {"mode": mode}) for mode in FIXED_MODES),
        *(("without it", {"mode": mode, "ranges": {}}) for mode in FIXED_MODES),
        *(
            ("Received", {"mode": "int8", "representative": ids})
            for ids in (np.full((2, 8), VOCAB_SIZE), np.zeros((2, 8), np.float32), [])
        ),
    ],
)
def test_options_that_cannot_be_used_are_refused(tmp_path, model, match, options):
    refused(tmp_path, match, model, **options)


def test_what_is_no_gpt_is_refused(tmp_path, model):
    import keras as keras_3

    other = keras.Sequential([keras.layers.Dense(2, input_shape=(2,))])
    for thing in (None, "gpt.keras", model.get_layer("block_0"), other, type(model)):
        refused(tmp_path, "expects a GPTModel", thing, error=InputTypeError)
    layer = keras_3.layers.Dense(3)
    refused(tmp_path, "of Keras 3", layer, error=InputTypeError)


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


def test_every_missing_range_is_named(tmp_path, model, ranges_of):
    ranges = ranges_of(model, "int8_full")
    for name in sorted(ranges):
        if name.startswith("block_0") or name.endswith("probabilities_activation"):
            continue
        fewer = {key: value for key, value in ranges.items() if key != name}
        refused(tmp_path, rf"range for .*{name}", model, "int8_full", ranges=fewer)


def test_a_place_that_cannot_be_written_is_named(tmp_path, model):
    (tmp_path / "file").write_text("")
    for name, match in (
        ("file/gpt.tflite", "cannot be written"),
        ("gpt.litertlm", r"ends in \.tflite"),
        (".tflite", r"ends in \.tflite"),
    ):
        with pytest.raises(InputError, match=match):
            export_tflite(model, tmp_path / name)
