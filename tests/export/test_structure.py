import contextlib
import copy
import functools
import json
import random
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


pytestmark = pytest.mark.usefixtures("eagerly")  # models are only calibrated here


def check(data):
    structure.check(data, integrity.read_seal(data))


@pytest.fixture(scope="module")
def written(build_model, export):
    """The bytes of a mode's `.tflite` of few parts; its export has checked them."""
    model = build_model(num_layers=1)

    @functools.cache
    def written(mode):
        return export(model, mode, prefill_lengths=[4]).path.read_bytes()

    return written


# Sound files


@pytest.mark.parametrize("mode", MODES)
def test_how_the_tables_are_laid_out_is_free(written, mode):
    check(forged.pack(forged.unpack(written(mode))))


@pytest.mark.parametrize("name", ["python-small", "python-student"])
def test_the_files_that_come_along_are_known(name):
    data = (ROOT / "saved_models" / f"{name}.litertlm").read_bytes()
    check(forged.model_in(data))


def test_weights_are_free(written):
    content = forged.unpack(written("float32"))
    buffer = constant_of(content, Type.FLOAT32, [32])
    buffer.data = np.full(32, np.nan, np.float32).view(np.uint8)
    data = forged.pack(content)
    assert forged.changes(written("float32"), data) == {"weights"}
    check(data)


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


def first_params(content):
    return next(
        tensor.quantization
        for tensor in content.subgraphs[0].tensors
        if not tensor.buffer and tensor.type == Type.INT8
    )


def rescale(content, operator, scale):
    """Change the scale of an operation's output wherever a tensor has it."""
    (place,) = operation_of(content, operator, integer=True).outputs
    before = bytes(content.subgraphs[0].tensors[place].quantization.scale)
    for quant in forged.objects_of(content, {})[schema.QuantizationParametersT]:
        if quant.scale is not None and bytes(quant.scale) == before:
            quant.scale = np.array([scale], np.float32)


def test_no_field_that_the_schema_knows_steers_the_runtime_otherwise(written):
    """Each is altered; what is not refused says nothing that steers."""
    sound, generator, refused = written("int8"), random.Random(4), set()
    content = forged.unpack(sound)
    things = {kind: every[0] for kind, every in forged.objects_of(content, {}).items()}
    fields = [(thing, name) for thing in things.values() for name in vars(thing)]
    for thing, name in fields:
        before, data = getattr(thing, name), None
        for _ in range(5):  # the format may have no place for a value
            setattr(thing, name, forged.another(before, generator))
            with contextlib.suppress(Exception):
                data = forged.pack(content)
                break
        setattr(thing, name, before)
        if data is None:
            continue
        try:
            check(data)
        except (BrokenError, DamagedFileError):
            refused.add(f"{type(thing).__name__}.{name}")
        else:
            assert forged.changes(sound, data) <= forged.FREE, (thing, name)
    assert {"TensorT.type", "OperatorT.inputs", "SubGraphT.outputs"} <= refused
    assert len(refused) > len(fields) * 2 / 3


def params(**fields):
    return lambda content: vars(first_params(content)).update(fields)


@pytest.mark.parametrize(
    "alter",
    [
        params(scale=[0.1, 0.1], zeroPoint=[0, 0]),  # more than channels
        params(scale=[0.0]),
        params(scale=[float("nan")]),
        params(scale=[1e-42]),  # below normal numbers
        params(scale=[0.123]),  # two for one tensor
        params(zeroPoint=[128]),
        lambda c: rescale(c, Op.FULLY_CONNECTED, 1e-12),  # scaled up too far
        lambda c: rescale(c, Op.ADD, 1e-12),
        lambda c: rescale(c, Op.BATCH_MATMUL, 1e-12),
        lambda c: vars(constant_of(c, Type.FLOAT32, [32])).update(data=[0] * 124),
        # Indices and numbers of things.
        lambda c: vars(constant_of(c, Type.INT32, [2])).update(data=[255] * 8),
        lambda c: c.subgraphs[0].tensors.append(c.subgraphs[0].tensors[0]),
        lambda c: c.subgraphs[0].operators.pop(),
    ],
)
def test_scales_indices_and_numbers_of_things_have_limits(written, alter):
    content = forged.unpack(written("int8_full"))
    alter(content)
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


@pytest.mark.parametrize("part", [None, "config"])
def test_no_fact_may_be_another_one_or_missing(written, part):
    data, missing = written("int8"), object()
    sound = integrity.read_seal(data)
    for name, before in (sound[part] if part else sound).items():
        is_free = f"fact {name}" in forged.FREE | {"fact sha256"}
        values = (missing, 10**400, *forged.VALUES, 41, [4, 1], [1, 1])
        for value in values[: 4 if is_free else None]:
            facts = copy.deepcopy(sound)
            inner = facts[part] if part else facts
            inner[name] = value
            if value is missing:
                del inner[name]
            # A tokenizer's is compared later; two equal tables are one in the file.
            kind = {"tokenizer_fingerprint": str, "tie_embeddings": bool}.get(name, ())
            # Files of older versions have none of these and do not say so.
            none = {"batch_sizes": [], "has_offsets": False, "head_outliers": 0}
            none["attends_by_row"] = False
            stated = none.get(name, value) if value is missing else value
            is_same = repr(stated) == repr(before)
            if is_free or isinstance(value, kind) or is_same:
                with contextlib.suppress(BrokenError):
                    structure.check(data, facts)
            else:
                with pytest.raises(BrokenError):
                    structure.check(data, facts)
                    pytest.fail(f"{name}: {value!r:.80}")


@pytest.mark.parametrize("mode", ["float32", "int8_full", "int4"])
def test_a_number_overwritten_is_refused_or_steers_nothing(written, mode):
    sound = written(mode)
    refused = 0
    for what, data in forged.forgeries(sound, 30, 1, [forged.overwrite]):
        try:
            check(data)
        except (BrokenError, DamagedFileError):
            refused += 1
        else:
            assert forged.changes(sound, data) <= forged.FREE, what
    assert refused > 15


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
    found = [("unaltered", sound), *forged.forgeries(sound, count, seed)]
    files = {f"{i:04}.{suffix}": data for i, (_, data) in enumerate(found)}
    outcomes = outcomes_of(files, folder)
    assert outcomes.keys() == files.keys()
    counts = {"opened": 0, "NaN": 0, "refused": 0}
    for name, (what, data) in zip(files, found, strict=True):
        kind = outcomes[name].partition(" ")[0]
        assert kind in counts, (what, outcomes[name])
        assert kind == "opened" or what != "unaltered"
        counts[kind] += 1
        if kind != "refused":
            models = forged.model_in(sound), forged.model_in(data)
            assert forged.changes(*models) <= forged.FREE, what
    assert counts["refused"] > count // 2
    return counts


def test_forged_files_end_no_process(written, tmp_path):
    campaign(written("int8"), 36, 2, tmp_path / "forged", "tflite")


def test_unchecked_they_end_it(written, tmp_path):
    content = forged.unpack(written("int4"))
    for tensor in content.subgraphs[0].tensors:
        if tensor.type == Type.INT4:
            tensor.quantization.details.scales = 0  # where the tokens come in
    files = {"blocks.tflite": forged.pack(content)}
    content = forged.unpack(written("int8"))
    forged.state(content, forged.facts_of(content)[1] | {"capacity": "40"})
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
