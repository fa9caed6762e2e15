import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from gpt_tf.export import (
    graph,
    integrity,
    operations,
    reader,
    signatures,
    structure,
    tflite_writer,
    verify,
    weights,
)
from gpt_tf.export.tflite import export_tflite
from gpt_tf.export.tflite_writer import Op
from gpt_tf.export.verify import VerificationError
from tests.export.conftest import FIXED_MODES, PREFILL_LENGTHS

pytestmark = pytest.mark.usefixtures("eagerly")  # models are only called here

NAMES = [
    "decode",
    *map(signatures.prefill, PREFILL_LENGTHS),
    *map(signatures.score, (2, 4, 8, 40)),
]

# Ten times what the small model is measured to have, which is unsure of everything;
# the package's limits are for any model and wider.
MEASURED = {"float32": 1e-9, "int8_full": 2e-3}


@pytest.fixture
def write(tmp_path, model, ranges_of, text_ids):
    """Export where something stands already, and see that a failure leaves it."""
    path = tmp_path / "gpt.tflite"
    path.write_bytes(b"before")

    def write(mode="float32", match="divergence", **options):
        if mode in FIXED_MODES:
            options.setdefault("ranges", ranges_of(model, mode))
        options.setdefault("prefill_lengths", PREFILL_LENGTHS)
        with pytest.raises(VerificationError, match=match) as caught:
            export_tflite(model, path, mode, verify_on=text_ids, **options)
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
        assert path.read_bytes() == b"before"
        return str(caught.value)

    return write


@pytest.fixture
def refuse_trained(python_small, python_ranges, tmp_path):
    """Export a trained model, whose logits are sure, and see that it is refused."""

    def refuse_trained(mode, ranges=python_ranges):
        model, _, ids = python_small
        options = {"verify_on": ids[5000:5128], "prefill_lengths": [1, 8]}
        with pytest.raises(VerificationError, match="divergence"):
            export_tflite(
                model, tmp_path / "gpt.tflite", mode, ranges=ranges, **options
            )
        assert not list(tmp_path.iterdir())

    return refuse_trained


@pytest.fixture
def break_method(monkeypatch):
    """Replace a method by one that is given the old one."""

    def break_method(owner, name, broken):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda self, *a, **k: broken(original, self, *a, **k)
        )

    return break_method


# Graphs that are wrong


def without(part):
    """A sum that leaves its second part out where that is the one named."""

    def add(original, self, a, b, activation=""):
        is_mask = b is self.graph.inputs["mask"]
        is_position = len(a.shape) == len(b.shape) == 2
        found = {"mask": is_mask, "position": is_position}.get(part)
        left_out = activation.endswith(part) if found is None else found
        return a if left_out else original(self, a, b, activation)

    return operations.Operations, "add", add


def relu(original, self, operator, inputs, shapes, *arguments, **options):
    if operator == Op.GELU:
        return original(self, Op.RELU, inputs, shapes)
    return original(self, operator, inputs, shapes, *arguments, **options)


def other_epsilon(original, self, x, prefix):
    sizes = self.constants.sizes
    sizes["layer_norm_epsilon"] += 0.1
    y = original(self, x, prefix)
    sizes["layer_norm_epsilon"] -= 0.1
    return y


def exchanged(original, self, *arguments):
    query, key, value = original(self, *arguments)
    return query, value, key


@pytest.mark.parametrize(
    ("mode", "fault"),
    [
        ("float32", without("position")),
        ("float32", without("attention_residual_activation")),
        ("float32", without("feedforward_residual_activation")),
        ("float32", (tflite_writer.Subgraph, "ops", relu)),
        ("float32", (operations.Operations, "norm", other_epsilon)),
        ("float32", (graph._Graph, "_query_key_value", exchanged)),
        ("dynamic_int8", (graph._Graph, "_query_key_value", exchanged)),
        ("int16x8", (graph._Graph, "_query_key_value", exchanged)),
    ],
)
def test_a_wrong_graph_is_noticed(write, break_method, mode, fault):
    break_method(*fault)
    write(mode)


@pytest.mark.parametrize("mode", ["float32", "int8_full"])
def test_a_mask_that_is_left_out_is_noticed(refuse_trained, break_method, mode):
    break_method(*without("mask"))
    refuse_trained(mode)


def test_queries_without_their_scale_are_noticed(write, monkeypatch):
    monkeypatch.setattr(weights.np, "sqrt", lambda x: 1.0)
    write()


@pytest.mark.parametrize("mode", ["float32", "int8_full"])
@pytest.mark.parametrize("name", NAMES)
def test_a_fault_in_any_one_signature_is_noticed(
    write, monkeypatch, break_method, mode, name
):
    """Each is run, and none hides among the others."""

    def write_rows(original, self, cache, rows):
        if self.graph.signature != name:
            return original(self, cache, rows)
        # Three times minus the rows, which is a fault of the caches alone.
        minus = self.graph.constant(np.full((1,), -3, np.float32))
        rows = self.ops.multiply(self.ops.real(rows), minus)
        into = self.caches[cache]
        if into.quant is not None:
            rows = self.ops.quantize(rows, into.type, into.quant)
        return original(self, cache, rows)

    break_method(graph._Graph, "_write_rows", write_rows)
    monkeypatch.setitem(verify.LARGEST_DIVERGENCE, mode, MEASURED[mode])
    message = write(mode)
    assert name == "decode" or name in message


@pytest.mark.parametrize("mode", ["dynamic_int8", "int8_full"])
def test_the_wide_limits_notice_a_fault_in_a_trained_model(
    refuse_trained, monkeypatch, break_method, mode
):
    def turned(original, self, x):
        options, last = schema.ReverseV2OptionsT(), self.ops.integers([2])
        x = self.ops.real(x)
        x = self.graph.op(Op.REVERSE_V2, [x, last], x.shape, options=options)
        return original(self, x)

    break_method(graph._Graph, "_head", turned)
    monkeypatch.setitem(structure._OPTIONS, schema.ReverseV2OptionsT, {})
    refuse_trained(mode)


def test_logits_that_are_no_numbers_are_noticed(write, monkeypatch, break_method):
    def nan(original, self, x):
        logits = original(self, x)
        zeros = self.ops.multiply(logits, self.graph.constant(np.zeros(1, np.float32)))
        options = schema.DivOptionsT()
        return self.graph.op(Op.DIV, [zeros, zeros], logits.shape, options=options)

    break_method(graph._Graph, "_head", nan)
    monkeypatch.setitem(structure._OPTIONS, schema.DivOptionsT, {0: reader.I8})
    write(match="Received: nan by")


def test_a_second_copy_of_the_weights_is_noticed(build_model, tmp_path, break_method):
    def forgetful(original, self, array):
        if np.asarray(array).nbytes > 4096:
            self._known.clear()
            self._buffer_of.clear()
        return original(self, array)

    break_method(tflite_writer.Model, "buffer", forgetful)
    with pytest.raises(VerificationError, match="a size of at most"):
        export_tflite(
            build_model(embedding_dim=128), tmp_path / "gpt.tflite", "float32"
        )
    assert not list(tmp_path.iterdir())


def test_a_file_that_litert_cannot_open_is_refused(write, monkeypatch):
    original = integrity.seal

    def damage(data):
        original(data)
        data[4:8] = b"XXXX"  # in place of TFL3

    monkeypatch.setattr(integrity, "seal", damage)
    write(match="LiteRT cannot open the exported file")


def test_a_signature_of_another_name_is_noticed(write, break_method):
    def other_name(original, self, index, subgraph):
        kept, subgraph.signature = subgraph.signature, "prefill_5"
        offset = original(self, index, subgraph)
        subgraph.signature = kept
        return offset

    break_method(tflite_writer._Packer, "_signature", other_name)
    write(match="prefill_5")


@pytest.mark.parametrize("mode", ["int8", "int16x8"])
def test_ranges_of_another_model_are_noticed(refuse_trained, python_ranges, mode):
    ranges = python_ranges.items()
    refuse_trained(mode, {name: (low / 50, high / 50) for name, (low, high) in ranges})


def test_a_range_too_narrow_for_litert_is_an_error(write, model, ranges_of):
    """LiteRT ends the process where a product is scaled up too far."""
    narrow = {"block_0/up_activation": (-1e-9, 1e-9)}
    write("int8", "scales", ranges=ranges_of(model, "int8") | narrow)


# What good files are given


def test_what_is_measured_is_what_it_is_called():
    wanted = np.log([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]])
    found = {("way", 0): wanted[0] + 3.0, ("way", 1): wanted[0]}
    report = verify._compare(found, wanted)
    assert report["largest_logit_difference"] == pytest.approx(3.0)
    # Of the second place: 0.25 log(1/2) + 0.5 log(2), a shift of all logits is none.
    assert report["divergence_nats"] == pytest.approx(0.25 * np.log(2) / 2)
    assert report["top1_agreement"] == 0.5
    assert report["positions"] == 2


@pytest.mark.parametrize("length", [1, 2, 60, None])
def test_texts_of_any_length_verify_every_signature(
    tmp_path, model, break_method, length
):
    """Those that are longer than the context are cut; without one, random ids do."""
    ids = None if length is None else np.random.default_rng(1).integers(0, 288, length)
    called = set()

    def call(original, self, name, *arguments):
        called.add(name)
        return original(self, name, *arguments)

    break_method(verify._Runner, "call", call)
    lengths, path = [1, 4, 16, 40], tmp_path / "gpt.tflite"
    manifest = export_tflite(
        model, path, "float32", prefill_lengths=lengths, verify_on=ids
    )
    assert called == {*NAMES, "prefill_40"}
    assert manifest["verification"]["tokens"] == min(length or 40, 40)
