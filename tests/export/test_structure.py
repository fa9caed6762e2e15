import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from gpt_tf.errors import DamagedFileError
from gpt_tf.export import integrity, structure
from gpt_tf.export.litertlm import export_litertlm
from gpt_tf.export.reader import BrokenError
from gpt_tf.export.signatures import MODES
from tests.export import forged
from tests.export.conftest import FIXED_MODES

ROOT = Path(__file__).parents[2]
Op, Type = schema.BuiltinOperator, schema.TensorType


def check(data):
    structure.check(data, integrity.read_seal(data))


@pytest.fixture(scope="module")
def written():
    """A `.tflite` of a mode, with random weights."""
    files = {}

    def written(mode):
        if mode not in files:
            files[mode] = forged.written(mode)
        return files[mode]

    return written


# Sound files


@pytest.mark.parametrize("mode", MODES)
def test_what_gpt_tf_writes_is_the_graph_of_its_facts(written, mode):
    data = written(mode)
    check(data)
    # How the tables are laid out is free.
    check(forged.pack(forged.unpack(data)))


@pytest.mark.parametrize(
    "sizes",
    [
        {"width": 1, "heads": 1, "capacity": 1, "lengths": ()},
        {"width": 6, "heads": 3, "layers": 3, "capacity": 65, "lengths": (1, 2, 65)},
    ],
)
def test_graphs_of_all_sizes_are_known(sizes):
    data = forged.written("int8", **sizes)
    check(data)


@pytest.mark.parametrize("name", ["python-small", "python-student"])
def test_the_files_that_come_along_are_known(name):
    data = (ROOT / "saved_models" / f"{name}.litertlm").read_bytes()
    check(forged.model_in(data))


# Altered ones


def constant_of(content, kind, shape):
    """Return the buffer of a constant."""
    for tensor in content.subgraphs[0].tensors:
        if tensor.buffer and tensor.type == kind and list(tensor.shape) == shape:
            return content.buffers[tensor.buffer]
    raise AssertionError(f"no constant of the shape {shape}")


def operation_of(content, operator, integer=False):
    subgraph = content.subgraphs[0]
    for operation in subgraph.operators:
        quant = subgraph.tensors[operation.outputs[0]].quantization
        code = content.operatorCodes[operation.opcodeIndex].builtinCode
        if code == operator and (quant is not None or not integer):
            return operation
    raise AssertionError(f"no operator {operator}")


def first_params(content, integer=Type.INT8):
    for tensor in content.subgraphs[0].tensors:
        if not tensor.buffer and tensor.type == integer:
            return tensor.quantization
    raise AssertionError("not quantised")


def more_scales(content):
    quant = first_params(content)
    quant.scale = np.repeat(quant.scale, 2)
    quant.zeroPoint = np.repeat(quant.zeroPoint, 2)


def rescale(content, operator, scale):
    """Change the scale of an operation's output wherever a tensor has it."""
    (place,) = operation_of(content, operator, integer=True).outputs
    before = bytes(content.subgraphs[0].tensors[place].quantization.scale)
    for quant in forged.objects_of(content, {})[schema.QuantizationParametersT]:
        if quant.scale is not None and bytes(quant.scale) == before:
            quant.scale = np.array([scale], np.float32)


def other_facts(content, **facts):
    buffer = content.buffers[content.metadata[0].buffer]
    before = json.loads(bytes(buffer.data))
    del before["format"], before["sha256"]
    config = before.pop("config") | facts.pop("config", {})
    text = integrity.blank_seal(config=config, **(before | facts))
    buffer.data = np.frombuffer(text, np.uint8)


def put(thing, **fields):
    for name, value in fields.items():
        assert hasattr(thing, name)
        setattr(thing, name, value)


ALTERATIONS = {
    "TensorT.shape": lambda c: put(c.subgraphs[0].tensors[2], shape=[1, 1, 1, 2**30]),
    "TensorT.type": lambda c: put(c.subgraphs[0].tensors[0], type=Type.INT64),
    "TensorT.buffer": lambda c: put(c.subgraphs[0].tensors[0], buffer=2**31),
    "TensorT.name": lambda c: put(c.subgraphs[0].tensors[3], name="tokens"),
    "TensorT.isVariable": lambda c: put(c.subgraphs[0].tensors[3], isVariable=True),
    "TensorT.shapeSignature": lambda c: put(
        c.subgraphs[0].tensors[0], shapeSignature=[-1, -1]
    ),
    "SubGraphT.inputs": lambda c: put(c.subgraphs[0], inputs=[0, 1, 2, 3, 3]),
    "SubGraphT.outputs": lambda c: put(c.subgraphs[0], outputs=[0, 1, 2]),
    "SubGraphT.tensors": lambda c: c.subgraphs[0].tensors.append(
        c.subgraphs[0].tensors[0]
    ),
    "SubGraphT.operators": lambda c: c.subgraphs[0].operators.pop(),
    "OperatorT.opcodeIndex": lambda c: put(operation_of(c, Op.MEAN), opcodeIndex=2**31),
    "OperatorT.inputs": lambda c: put(operation_of(c, Op.MEAN), inputs=[10**6, 0]),
    "OperatorT.outputs": lambda c: put(operation_of(c, Op.MEAN), outputs=[0]),
    "OperatorT.customOptions": lambda c: put(
        operation_of(c, Op.MEAN), customOptions=[1]
    ),
    "OperatorCodeT.builtinCode": lambda c: put(
        c.operatorCodes[0], builtinCode=Op.CUSTOM, deprecatedBuiltinCode=Op.CUSTOM
    ),
    "OperatorCodeT.customCode": lambda c: put(c.operatorCodes[0], customCode="x"),
    "OperatorCodeT.version": lambda c: put(c.operatorCodes[0], version=99),
    "SoftmaxOptionsT.beta": lambda c: put(
        operation_of(c, Op.SOFTMAX).builtinOptions, beta=float("nan")
    ),
    "ReshapeOptionsT.newShape": lambda c: put(
        operation_of(c, Op.RESHAPE).builtinOptions, newShape=[-1, -1]
    ),
    "indices": lambda c: put(constant_of(c, Type.INT32, [2]), data=[255] * 8),
    "SignatureDefT.signatureKey": lambda c: put(
        c.signatureDefs[0], signatureKey="decode2"
    ),
    "SignatureDefT.subgraphIndex": lambda c: put(c.signatureDefs[0], subgraphIndex=1),
    "TensorMapT.name": lambda c: put(c.signatureDefs[0].inputs[0], name="mask"),
    "TensorMapT.tensorIndex": lambda c: put(
        c.signatureDefs[0].inputs[0], tensorIndex=10**6
    ),
    "QuantizationParametersT.quantizedDimension": lambda c: put(
        first_params(c), quantizedDimension=7
    ),
    "QuantizationParametersT.min": lambda c: put(first_params(c), min=[0.0]),
    "ModelT.version": lambda c: put(c, version=4),
    "MetadataT.name": lambda c: put(c.metadata[0], name="min_runtime_version"),
    "fact num_heads": lambda c: other_facts(c, config={"num_heads": 4, "head_dim": 8}),
    "fact capacity": lambda c: other_facts(c, capacity=23),
    "fact prefill_lengths": lambda c: other_facts(c, prefill_lengths=[4]),
    "fact mode": lambda c: other_facts(c, mode="int16x8"),
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_what_steers_the_runtime_cannot_be_altered(written, name):
    content = forged.unpack(written("int8"))
    ALTERATIONS[name](content)
    data = forged.pack(content)
    assert name in forged.changes(written("int8"), data)
    with pytest.raises(BrokenError):
        check(data)


WITHIN_LIMITS = {
    "more scales than channels": more_scales,
    "a scale of 0": lambda c: put(first_params(c), scale=[0.0]),
    "a scale that is NaN": lambda c: put(first_params(c), scale=[float("nan")]),
    "two scales for one tensor": lambda c: put(first_params(c), scale=[0.123]),
    "a product that is scaled up": lambda c: rescale(c, Op.FULLY_CONNECTED, 1e-6),
    "a sum that is scaled up": lambda c: rescale(c, Op.ADD, 1e-6),
    "a product of activations": lambda c: rescale(c, Op.BATCH_MATMUL, 1e-9),
    "a scale below normal numbers": lambda c: put(first_params(c), scale=[1e-42]),
    "a zero point beyond int8": lambda c: put(first_params(c), zeroPoint=[128]),
    "a buffer too short": lambda c: put(
        constant_of(c, Type.FLOAT32, [32]), data=[0] * 124
    ),
}


@pytest.mark.parametrize("name", WITHIN_LIMITS)
def test_scales_zero_points_and_sizes_have_limits(written, name):
    content = forged.unpack(written("int8_full"))
    WITHIN_LIMITS[name](content)
    with pytest.raises(BrokenError):
        check(forged.pack(content))


def test_scales_of_blocks_are_numbers_above_0(written):
    for value in (0.0, -1.0, np.inf, np.nan):
        content = forged.unpack(written("int4"))
        buffer = constant_of(content, Type.FLOAT16, [96, 1])
        scales = np.full(96, 0.1, np.float16)
        scales[40] = value
        buffer.data = scales.view(np.uint8)
        with pytest.raises(BrokenError, match="block"):
            check(forged.pack(content))


def test_weights_are_free(written):
    content = forged.unpack(written("float32"))
    buffer = constant_of(content, Type.FLOAT32, [32])
    buffer.data = np.full(32, np.nan, np.float32).view(np.uint8)
    data = forged.pack(content)
    assert forged.changes(written("float32"), data) == {"weights"}
    check(data)


BAD_FACTS = [
    {"mode": "int2"},
    {"mode": ["int8"]},
    {"config": {"num_layers": 10**9}},
    {"config": {"num_layers": 1.0}},
    {"config": {"vocab_size": True}},
    {"config": {"embedding_dim": 10**30}},
    {"config": {"head_dim": 0}},
    {"config": {"num_heads": -2}},
    {"config": {"tie_embeddings": 1}},
    {"config": {"layer_norm_epsilon": "0"}},
    {"config": {"layer_norm_epsilon": 10**400}},
    {"capacity": 25},
    {"capacity": None},
    {"per_channel": None},
    {"cache_dtype": "int8"},
    {"cache_dtype": "object"},
    {"prefill_lengths": [4, 1]},
    {"prefill_lengths": [1, 1]},
    {"prefill_lengths": [10**9]},
    {"prefill_lengths": 4},
    {"score_lengths": [[]]},
    {"tokenizer_fingerprint": 7},
]


@pytest.mark.parametrize("facts", BAD_FACTS, ids=str)
def test_facts_of_a_wrong_type_or_range_are_named(written, facts):
    content = forged.unpack(written("int8"))
    other_facts(content, **facts)
    name, value = next(iter(facts.items()))
    name = next(iter(value)) if name == "config" else name
    with pytest.raises(BrokenError, match=name):
        check(forged.pack(content))


@pytest.mark.parametrize("missing", ["config", "mode", "per_channel", "capacity"])
def test_a_fact_that_is_missing_is_named(written, missing):
    facts = integrity.read_seal(written("int8"))
    del facts[missing]
    with pytest.raises(BrokenError, match=missing):
        structure.check(written("int8"), facts)


@pytest.mark.parametrize("mode", MODES)
def test_a_number_overwritten_is_refused_or_steers_nothing(written, mode):
    sound = written(mode)
    refused = 0
    for what, data in forged.forgeries(sound, 25, 1, [forged.overwrite]):
        try:
            check(data)
        except (BrokenError, DamagedFileError):
            refused += 1
        else:
            assert forged.changes(sound, data) <= forged.FREE, what
    assert refused > 12


# Who opens them


def outcomes_of(files, folder, *options):
    """Open files, each in a process of its own; return what happened by name."""
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    program = [sys.executable, "-m", "tests.export.forged", str(folder), *options]
    result = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return dict(map(json.loads, result.stdout.splitlines()))


def campaign(sound, count, seed, folder, suffix):
    """See that nobody dies, hangs or stumbles who opens altered files."""
    names = {f"{0:04}.{suffix}": "unaltered"}
    files = {f"{0:04}.{suffix}": sound}
    for index, (what, data) in enumerate(forged.forgeries(sound, count, seed), 1):
        names[f"{index:04}.{suffix}"] = what
        files[f"{index:04}.{suffix}"] = data
    outcomes = outcomes_of(files, folder)
    assert outcomes.keys() == files.keys()
    assert outcomes[f"{0:04}.{suffix}"].startswith("opened")
    counts = {"opened": 0, "NaN": 0, "refused": 0}
    for name, outcome in outcomes.items():
        kind = outcome.partition(" ")[0]
        assert kind in counts, (names[name], outcome)
        counts[kind] += 1
        if kind != "refused":
            models = forged.model_in(sound), forged.model_in(files[name])
            assert forged.changes(*models) <= forged.FREE, names[name]
    assert counts["refused"] > count // 2
    return counts


def test_forged_files_end_no_process(written, tmp_path):
    campaign(written("int8"), 45, 2, tmp_path / "forged", "tflite")


def test_unchecked_they_end_it(written, tmp_path):
    content = forged.unpack(written("int4"))
    for tensor in content.subgraphs[0].tensors:
        if tensor.type == Type.INT4:
            tensor.quantization.details.scales = 0  # where the tokens come in
    files = {"blocks.tflite": forged.pack(content)}
    content = forged.unpack(written("int8"))
    other_facts(content, capacity="24")
    files["words.tflite"] = forged.pack(content)
    outcomes = outcomes_of(files, tmp_path / "forged", "--unchecked")
    assert outcomes["blocks.tflite"].startswith("crash")
    assert outcomes["words.tflite"].startswith("traceback TypeError")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_thousand_forged_bundles_end_no_process(
    mode, model, tokenizer, representative, tmp_path
):
    """143 of each of the seven modes; prints what became of them."""
    path = tmp_path / "small.litertlm"
    options = {"representative": representative} if mode in FIXED_MODES else {}
    export_litertlm(model, tokenizer, path, mode, **options)
    print(mode, campaign(path.read_bytes(), 143, 3, tmp_path / "forged", "litertlm"))
