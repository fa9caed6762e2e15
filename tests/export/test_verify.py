import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from gpt_tf.errors import InputError
from gpt_tf.export import (
    graph,
    integrity,
    reader,
    signatures,
    structure,
    tflite_writer,
    verify,
    weights,
)
from gpt_tf.export.tflite import export_tflite
from gpt_tf.export.tflite_writer import Op, Type
from gpt_tf.export.verify import VerificationError
from gpt_tf.quantization.calibration import calibrate
from tests.export.conftest import FIXED_MODES, PREFILL_LENGTHS

NAMES = ["decode", *map(signatures.prefill, PREFILL_LENGTHS), signatures.score(40)]

# Ten times what the small model is measured to have, which is unsure of everything;
# the package's limits are for any model and wider.
MEASURED = {"float32": 1e-9, "dynamic_int8": 1e-3, "int8_full": 2e-3}


@pytest.fixture
def write(tmp_path, model, representative, text_ids):
    """Export where something stands already, and see that a failure leaves it."""
    path = tmp_path / "gpt.tflite"
    export_tflite(model, path, "float32")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert len(before) == 2

    def write(mode="float32", match="divergence", **options):
        if mode in FIXED_MODES:
            options.setdefault("representative", representative)
        options.setdefault("verify_on", text_ids)
        options.setdefault("prefill_lengths", PREFILL_LENGTHS)
        with pytest.raises(VerificationError, match=match) as caught:
            export_tflite(model, path, mode, **options)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
        return str(caught.value)

    return write


def break_method(monkeypatch, name, broken):
    """Replace a method of the graph's builder by one that is given the old one."""
    original = getattr(graph._Graph, name)
    monkeypatch.setattr(
        graph._Graph, name, lambda self, *a, **k: broken(original, self, *a, **k)
    )


# Graphs that are wrong


def test_another_gelu_is_noticed(write, monkeypatch):
    original = tflite_writer.Subgraph.ops

    def relu(self, operator, inputs, shapes, *arguments, **options):
        if operator == Op.GELU:
            arguments, options = (), {}
            operator = Op.RELU
        return original(self, operator, inputs, shapes, *arguments, **options)

    monkeypatch.setattr(tflite_writer.Subgraph, "ops", relu)
    write()


def refuse_trained(python_small, tmp_path, mode, **options):
    model, _, ids = python_small
    with pytest.raises(VerificationError, match="divergence"):
        export_tflite(
            model,
            tmp_path / "gpt.tflite",
            mode,
            representative=ids[: 128 * 8].reshape(8, 128),
            verify_on=ids[5000:5128],
            **options,
        )
    assert not list(tmp_path.iterdir())


def test_another_epsilon_is_noticed(write, monkeypatch):
    def other(original, self, *arguments):
        original(self, *arguments)
        self.epsilon = self.epsilon + np.float32(0.1)

    break_method(monkeypatch, "__init__", other)
    write()


@pytest.mark.parametrize("mode", ["float32", "int8_full"])
def test_a_mask_that_is_left_out_is_noticed(python_small, tmp_path, monkeypatch, mode):
    def add(original, self, a, b, *arguments):
        return a if b is self.mask else original(self, a, b, *arguments)

    break_method(monkeypatch, "_add", add)
    refuse_trained(python_small, tmp_path, mode)


@pytest.mark.parametrize("dropped", ["attended", "down"])
def test_a_residual_that_is_left_out_is_noticed(write, monkeypatch, dropped):
    residual = {"attended": "attention", "down": "feedforward"}[dropped]

    def add(original, self, a, b, activation=None):
        if activation and activation.endswith(f"{residual}_residual_activation"):
            return a
        return original(self, a, b, activation)

    break_method(monkeypatch, "_add", add)
    write()


def test_positions_that_are_left_out_are_noticed(write, monkeypatch):
    def add(original, self, a, b, *arguments):
        looked_up = len(a.shape) == len(b.shape) == 2
        return a if looked_up else original(self, a, b, *arguments)

    break_method(monkeypatch, "_add", add)
    write()


def test_keys_and_values_that_are_exchanged_are_noticed(write, monkeypatch):
    def exchanged(original, self, *arguments):
        query, key, value = original(self, *arguments)
        return query, value, key

    break_method(monkeypatch, "_query_key_value", exchanged)
    for mode in ("float32", "dynamic_int8", "int16x8"):
        write(mode)


def test_queries_without_their_scale_are_noticed(write, monkeypatch):
    monkeypatch.setattr(weights.np, "sqrt", lambda x: 1.0)
    write()


@pytest.mark.parametrize("mode", ["float32", "int8_full"])
@pytest.mark.parametrize("name", NAMES)
def test_a_fault_in_any_one_signature_is_noticed(write, monkeypatch, mode, name):
    """Each is run, and none hides among the others."""

    def rows(original, self, cache, rows):
        if self.graph.signature == name:
            return original(self, cache, original_rows(self, rows))
        return original(self, cache, rows)

    def original_rows(self, rows):
        # Minus the rows, which is a fault of the caches alone.
        rows = self._real(rows)
        minus = self.graph.constant(np.full((1,), -3, np.float32))
        rows = self._multiply(rows, minus)
        cache = next(iter(self.caches.values()))
        if not cache.quant:
            return rows
        quant = cache.quant
        return self._quantize(rows, Type.INT8, quant)

    break_method(monkeypatch, "_write_rows", rows)
    monkeypatch.setitem(verify.LARGEST_DIVERGENCE, mode, MEASURED[mode])
    message = write(mode)
    if name != "decode":
        assert name in message


@pytest.mark.parametrize("mode", ["dynamic_int8", "int8_full"])
def test_the_wide_limits_notice_a_fault_in_a_trained_model(
    python_small, tmp_path, monkeypatch, mode
):
    def turned(original, self, x):
        options, last = schema.ReverseV2OptionsT(), self._integers([2])
        x = self._real(x)
        x = self.graph.op(Op.REVERSE_V2, [x, last], x.shape, options=options)
        return original(self, x)

    break_method(monkeypatch, "_head", turned)
    monkeypatch.setattr(verify, "FLOAT_ISLANDS", (*graph.FLOAT_ISLANDS, "REVERSE_V2"))
    monkeypatch.setitem(structure._OPTIONS, schema.ReverseV2OptionsT, {})
    refuse_trained(python_small, tmp_path, mode)


def test_logits_that_are_no_numbers_are_noticed(write, monkeypatch):
    monkeypatch.setitem(structure._OPTIONS, schema.DivOptionsT, {0: reader.I8})

    def nan(original, self, x):
        logits = original(self, x)
        zero = self.graph.constant(np.zeros(1, np.float32))
        options = schema.DivOptionsT()
        return self.graph.op(
            Op.DIV,
            [self._multiply(logits, zero), self._multiply(logits, zero)],
            logits.shape,
            options=options,
        )

    break_method(monkeypatch, "_head", nan)
    write(match="Received: nan by")


def test_a_float_operation_in_int8_full_is_noticed(write, monkeypatch):
    def in_floats(original, self, name, x, kind=None, quant=None):
        y = original(self, name, self._real(x))
        return y if quant is None else self._quantize(y, kind, quant)

    break_method(monkeypatch, "_product", in_floats)
    write("int8_full", match="expects integer operations. Received: FULLY_CONNECTED")


def test_a_second_copy_of_the_weights_is_noticed(build_model, tmp_path, monkeypatch):
    model = build_model(embedding_dim=128)
    original = tflite_writer.Model.buffer

    def forgetful(self, array):
        if np.asarray(array).nbytes > 4096:
            self._known.clear()
            self._buffer_of.clear()
        return original(self, array)

    monkeypatch.setattr(tflite_writer.Model, "buffer", forgetful)
    with pytest.raises(VerificationError, match="a size of at most"):
        export_tflite(model, tmp_path / "gpt.tflite", "float32")
    assert not list(tmp_path.iterdir())


def test_a_file_that_litert_cannot_open_is_refused(write, monkeypatch):
    original = integrity.seal

    def damage(data):
        original(data)
        data[4:8] = b"XXXX"  # in place of TFL3

    monkeypatch.setattr(integrity, "seal", damage)
    write(match="LiteRT cannot open the exported file")


def test_a_signature_that_is_missing_is_noticed(write, monkeypatch):
    original = tflite_writer._Packer._signature

    def other_name(self, index, subgraph):
        if subgraph.signature == "prefill_4":
            subgraph.signature = "prefill_5"
            offset = original(self, index, subgraph)
            subgraph.signature = "prefill_4"
            return offset
        return original(self, index, subgraph)

    monkeypatch.setattr(tflite_writer._Packer, "_signature", other_name)
    write(match="prefill_5")


@pytest.mark.parametrize("mode", ["int8", "int16x8"])
def test_ranges_of_another_model_are_noticed(python_small, tmp_path, mode):
    model, _, ids = python_small
    ranges = calibrate(model, ids[:1024].reshape(8, 128))
    ranges = {name: (low / 50, high / 50) for name, (low, high) in ranges.items()}
    refuse_trained(python_small, tmp_path, mode, ranges=ranges)


# What good files are given


def test_each_way_has_a_divergence_of_its_own():
    wanted = np.random.default_rng(0).normal(size=(4, 9))
    found = {("good", place): wanted[place] for place in range(4)}
    found |= {("bad", place): wanted[place][::-1] for place in range(2)}
    ways = verify._divergences(found, wanted)
    assert ways["good"] == 0.0
    assert ways["bad"] > 0.1
    found["bad", 0] = np.full(9, np.nan)
    assert np.isnan(verify._divergences(found, wanted)["bad"])


def test_what_is_measured_is_what_it_is_called():
    wanted = np.log([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]])
    found = {("way", 0): wanted[0] + 3.0, ("way", 1): wanted[0]}
    report = verify._compare(found, wanted)
    assert report["largest_logit_difference"] == pytest.approx(3.0)
    # Of the second place: 0.25 log(1/2) + 0.5 log(2), a shift of all logits is none.
    assert report["divergence_nats"] == pytest.approx(0.25 * np.log(2) / 2)
    assert report["top1_agreement"] == 0.5
    assert report["positions"] == 2


def test_a_refusal_is_an_error_that_the_user_can_mend():
    assert issubclass(VerificationError, InputError)


@pytest.mark.parametrize("length", [1, 2, 3, 17, 40, 60])
def test_texts_of_any_length_verify_every_signature(tmp_path, model, length):
    """Those that are longer than the context are cut."""
    ids = np.random.default_rng(1).integers(0, 288, length)
    called = []
    original = verify._Runner.call

    def call(self, name, *arguments):
        called.append(name)
        return original(self, name, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify._Runner, "call", call)
        manifest = export_tflite(
            model,
            tmp_path / "gpt.tflite",
            "float32",
            prefill_lengths=[1, 4, 16, 40],
            verify_on=ids,
        )
    assert set(called) == {*NAMES, "prefill_40"}
    assert manifest["verification"]["tokens"] == min(length, 40)
    assert manifest["verification"]["text"] == "given text"


def test_without_a_text_every_signature_is_verified_too(tmp_path, build_model):
    model = build_model(context_length=160)
    called = []
    original = verify._Runner.call

    def call(self, name, *arguments):
        called.append(name)
        return original(self, name, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify._Runner, "call", call)
        export_tflite(model, tmp_path / "gpt.tflite", prefill_lengths=[1, 64, 160])
    assert set(called) == {
        "decode",
        "prefill_1",
        "prefill_64",
        "prefill_160",
        "score_64",
    }


def test_a_range_too_narrow_for_litert_is_an_error(write, model, representative):
    """LiteRT ends the process where a product is scaled up too far."""
    ranges = calibrate(model, representative)
    ranges["block_0/up_activation"] = (-1e-9, 1e-9)
    assert "scales" in write("int8", "scales", ranges=ranges, representative=None)
