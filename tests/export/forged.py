"""Files altered on purpose, with right hashes, and what becomes of who opens them.

    python -m tests.export.forged FOLDER

opens every file of a folder, each in a process of its own, and prints a line of JSON
for each: its name and what happened.
"""

import collections
import copy
import functools
import itertools
import json
import multiprocessing
import random
import struct
import sys
from pathlib import Path
from unittest import mock

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from gpt_tf.edge.loader import read_sections
from gpt_tf.export import integrity
from gpt_tf.export.signatures import BUNDLE_PREFIX, SEAL_DIGITS, SEAL_PREFIX

SECONDS = 30
INTEGERS = (0, 1, -1, 2, 3, 5, 64, 127, -128, 255, 10**6, 2**31 - 1, -(2**31), 2**32)
FLOATS = (0.0, -1.0, 1.0, 1e-45, 1e-38, 1e30, 3e38, float("inf"), float("nan"))
FACTORS = (1e-38, 1.2e-38, 1e-30, 1e-12, 1e-6, 1e-3, 0.5, 2.0, 1e3, 1e6, 1e12, 1e30)
VALUES = (None, True, False, "", "int8", "int4", "float16", [], {}, [1], [[]], [1, 2])
VALUES += ([64, 1], [10**9], 10**6, 10**30, 2**31, 1e308, 1.5, 0, 1, -1, 2)

# What a file may say that gpt_tf did not write: nothing that steers a program.
FREE = {
    "weights",
    "fact dropout",
    "fact format",
    "fact layer_norm_epsilon",
    "fact versions",
    "ModelT.description",
    "QuantizationParametersT.scale",
    "QuantizationParametersT.zeroPoint",
}


# Files


def resealed(data, prefix=SEAL_PREFIX):
    """Return bytes with the right hash in their last seal, if they have one."""
    data = bytearray(data)
    place = data.rfind(prefix) + len(prefix)
    if len(prefix) <= place <= len(data) - SEAL_DIGITS:
        data[place : place + SEAL_DIGITS] = b"0" * SEAL_DIGITS
        integrity.seal(data, prefix)
    return bytes(data)


def model_in(data):
    """Return the `.tflite` of a file, which may be one."""
    if data[4:8] == b"TFL3":
        return data
    begin, end = read_sections(data, "the bundle")[3]
    return data[begin:end]


def with_model(data, model):
    """Return a file with another model in it."""
    if data[4:8] == b"TFL3":
        return model
    begin, end = read_sections(data, "the bundle")[3]
    assert end == len(data)
    front = bytearray(data[:begin])
    place = front.index(struct.pack("<Q", end))
    front[place : place + 8] = struct.pack("<Q", begin + len(model))
    return resealed(front + model, BUNDLE_PREFIX)


def unpack(data):
    return schema.ModelT.InitFromPackedBuf(data)


def pack(content):
    """Write the objects of a `.tflite`; buffers are aligned, as LiteRT wants them."""

    def pack_buffer(self, builder):
        vector = None
        if self.data is not None and len(self.data):
            data = np.asarray(self.data, np.uint8).tobytes()
            builder.StartVector(1, len(data), 64)
            builder.head -= len(data)
            builder.Bytes[builder.head : builder.head + len(data)] = data
            vector = builder.EndVector()
        schema.BufferStart(builder)
        if vector is not None:
            schema.BufferAddData(builder, vector)
        schema.BufferAddOffset(builder, self.offset)
        schema.BufferAddSize(builder, self.size)
        return schema.BufferEnd(builder)

    builder = schema.flatbuffers.Builder(1 << 20)
    with mock.patch.object(schema.BufferT, "Pack", pack_buffer):
        builder.Finish(content.Pack(builder), file_identifier=b"TFL3")
    return resealed(builder.Output())


def facts_of(content):
    """Return the seal's buffer, and what it says but for its own format and hash."""
    buffer = content.buffers[content.metadata[0].buffer]
    facts = json.loads(bytes(buffer.data))
    del facts["format"], facts["sha256"]
    return buffer, facts


def state(content, facts):
    """Let the seal say something else."""
    text = integrity.blank_seal(**facts)
    content.buffers[content.metadata[0].buffer].data = np.frombuffer(text, np.uint8)


def parts_of(data):
    """Return all that a `.tflite` says: lists of values by their name."""
    found = collections.defaultdict(list)

    def collect(thing, name=""):
        if hasattr(thing, "Pack"):
            for field, value in vars(thing).items():
                collect(value, f"{type(thing).__name__}.{field}")
        elif isinstance(thing, list) and thing and hasattr(thing[0], "Pack"):
            found[name].append(len(thing))
            for item in thing:
                collect(item, name)
        else:
            is_array = hasattr(thing, "tobytes")
            found[name].append(thing.tobytes() if is_array else repr(thing))

    content = unpack(data)
    steering = {
        tensor.buffer
        for subgraph in content.subgraphs
        for tensor in subgraph.tensors
        if tensor.type == schema.TensorType.INT32 and tensor.quantization is None
    }
    for index, buffer in enumerate(content.buffers):
        name = "indices" if index in steering else "weights"
        if index == content.metadata[0].buffer:
            facts = json.loads(bytes(buffer.data)) | {"sha256": None}
            for key, value in (facts | facts.pop("config")).items():
                found[f"fact {key}"].append(value)
        else:
            found[name].append(b"" if buffer.data is None else bytes(buffer.data))
    # Another buffer of as many bytes is only other weights.
    for subgraph in content.subgraphs:
        for tensor in subgraph.tensors:
            data = content.buffers[tensor.buffer].data
            data = b"" if data is None else bytes(data)
            tensor.buffer = data if tensor.buffer in steering else len(data)
    content.buffers = None
    collect(content)
    return found


def changes(sound, altered):
    """Return the names of what one `.tflite` says differently from another."""
    one, other = parts_of(sound), parts_of(altered)
    return {name for name in one | other if one.get(name) != other.get(name)}


# Ways to alter one


@functools.lru_cache(maxsize=1)
def tables_of(data):
    """Return all even positions but those of weights and other buffers."""
    model = schema.Model.GetRootAs(data)
    taken = np.zeros(len(data), bool)
    for index in range(model.BuffersLength()):
        table = model.Buffers(index)._tab
        field = table.Offset(4)
        if field:
            begin = table.Vector(field)
            taken[begin : begin + table.VectorLen(field)] = True
    return np.flatnonzero(~taken[:-8:2]) * 2


def overwrite(data, generator):
    """Change one number among the tables: an offset, a length, an index, a value."""
    layout = generator.choice("HHIIIQ")
    width = struct.calcsize(layout)
    place = int(generator.choice(tables_of(data)))
    place -= place % min(width, 4)
    data = bytearray(data)
    (value,) = struct.unpack_from(f"<{layout}", data, place)
    others = [*INTEGERS, value + 1, value - 1, value + 4, value - 4, value * 2]
    others += [generator.randrange(2**16), generator.randrange(len(data))]
    value = generator.choice(others) % 2 ** (8 * width)
    struct.pack_into(f"<{layout}", data, place, value)
    return resealed(data), f"{layout} at {place} is {value}"


def another(value, generator):
    """Return another value, of the same kind if it has one."""
    choice = generator.choice
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return choice([*INTEGERS, value + 1, value - 1, generator.randrange(40)])
    if isinstance(value, float):
        return choice([*FLOATS, value * 2, -value])
    if isinstance(value, str | bytes):
        return choice([b"", b"decode", b"kv_cache_k_0", b"\xff\xfe", b"x" * 999, None])
    if value is None:
        return choice([[0], [1.0], b"x", 1, [1, 2, 3, 4], [2**31 - 1]])
    if not isinstance(value, np.ndarray | list) or not len(value):
        return None
    values = list(value)
    place = generator.randrange(len(values))
    way = generator.randrange(6)
    if way == 0:
        del values[place]
    elif way == 1:
        values.insert(place, values[place])
    elif way == 2:
        values = choice([[], values[:1], values[::-1], values * 2])
    elif hasattr(values[place], "Pack"):
        values[place] = copy.copy(choice(values))
    else:
        values[place] = another(values[place], generator)
    return values


def objects_of(thing, found):
    """Collect the objects of a tree by their class."""
    if isinstance(thing, list):
        for item in thing:
            objects_of(item, found)
    elif hasattr(thing, "Pack"):
        found.setdefault(type(thing), []).append(thing)
        for value in vars(thing).values():
            objects_of(value, found)
    return found


def alter_an_object(data, generator):
    """Change one field of one object, any that the schema knows."""
    content = unpack(data)
    kinds = objects_of(content, {})
    thing = generator.choice(kinds[generator.choice(sorted(kinds, key=str))])
    field = generator.choice(sorted(vars(thing)))
    value = another(getattr(thing, field), generator)
    setattr(thing, field, value)
    return pack(content), f"{type(thing).__name__}.{field} is {value!r:.60}"


def alter_a_constant(data, generator):
    """Change one value of a constant, or all of them."""
    content = unpack(data)
    seal, _ = facts_of(content)
    filled = [b for b in content.buffers if b.data is not None and b is not seal]
    buffer = generator.choice(filled)
    patterns = [struct.pack("<I", value % 2**32) for value in INTEGERS]
    patterns += [struct.pack("<f", value) for value in FLOATS]
    pattern = generator.choice([*patterns, b"\xff" * 4, b"\x80" * 4, b"\0|" * 2])
    values, size = np.array(buffer.data, np.uint8), len(buffer.data)
    altered = np.resize(np.frombuffer(pattern, np.uint8), size)
    place = generator.randrange(0, size, 4 if size > 3 else 1)
    span = generator.choice([slice(size), slice(place, place + 4)])
    values[span] = altered[span]
    buffer.data = values
    return pack(content), f"a constant of {size} bytes has {pattern!r}"


def alter_scales(data, generator):
    """Change scales and zero points, alike wherever they are alike."""
    content = unpack(data)
    share = generator.choice([0.02, 0.2, 1])
    factors = FLOATS if generator.random() < 0.2 else FACTORS
    changed = {}
    for quant in objects_of(content, {})[schema.QuantizationParametersT]:
        if quant.scale is None:
            continue
        key = bytes(np.asarray(quant.scale)), bytes(np.asarray(quant.zeroPoint))
        if key not in changed:
            changed[key] = generator.random() < share and (
                generator.choice(factors),
                generator.random() < 0.5,
                generator.choice([None, None, 0, -128, 127, 5]),
            )
        if not changed[key]:
            continue
        factor, times, zero_point = changed[key]
        scales = np.array(quant.scale, np.float32)
        with np.errstate(all="ignore"):
            quant.scale = scales * np.float32(factor) if times else scales * 0 + factor
        if zero_point is not None and len(scales) == 1:
            quant.zeroPoint = np.full(1, zero_point, np.int64)
    return pack(content), f"scales are {[c for c in changed.values() if c][:3]}"


def alter_a_fact(data, generator):
    """Change what the seal says."""
    content = unpack(data)
    _, facts = facts_of(content)
    inner = generator.choice([facts, facts["config"]])
    name = generator.choice(sorted(inner))
    value, others = inner[name], VALUES
    if isinstance(value, int) and generator.random() < 0.5:
        others = [value + 1, value - 1, value * 2, value // 2]
    if generator.random() < 0.1:
        del inner[name]
    else:
        inner[name] = generator.choice(others)
    state(content, facts)
    return pack(content), f"the fact {name} is {inner.get(name)!r:.60}"


WAYS = (
    *(overwrite, alter_an_object) * 3,
    alter_a_constant,
    alter_scales,
    alter_a_fact,
)


def forgeries(data, count, seed, ways=WAYS):
    """Yield descriptions and files, each altered in one way."""
    model, generator = model_in(data), random.Random(seed)
    turns = itertools.cycle(ways)
    while count:
        way = next(turns)
        try:
            altered, what = way(model, generator)
        except Exception:  # the format has no place for such a value: another one
            continue
        if altered != model:
            count -= 1
            yield f"{way.__name__}: {what}", with_model(data, altered)


# Opening them


def use(path):
    """Open a file and run all of its signatures; return what happened."""
    from gpt_tf.edge import EdgeGPT
    from gpt_tf.errors import DamagedFileError, InputError

    try:
        with EdgeGPT(path, num_threads=1) as gpt:
            prompt = [token % gpt.config["vocab_size"] for token in range(1, 14)]
            prompt = prompt[: max(1, gpt.context_length - 5)]
            ids = gpt.generate(prompt, max_new_tokens=4, temperature=0)
            gpt.score(prompt + ids)
            return f"opened {ids}"
    except DamagedFileError as error:
        assert str(path) in str(error)
        return f"refused {error}"
    except InputError as error:
        return f"NaN {error}" if "finite logits" in str(error) else f"refused {error}"
    except BaseException as error:
        return f"traceback {type(error).__name__}: {error}"


def outcome_of(path):
    """Return what becomes of a process that opens a file."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(use(path)[:2000]))
    child.start()
    child.join(SECONDS)
    if child.is_alive():
        child.kill()
        return f"hang of {SECONDS} seconds"
    if child.exitcode:
        return f"crash with status {child.exitcode}"
    return receiver.recv()


def main(folder, *options):
    import gpt_tf.edge  # noqa: F401
    from gpt_tf.export import structure

    if "--unchecked" in options:
        structure.check = lambda *arguments: None
    for path in sorted(Path(folder).iterdir()):
        print(json.dumps([path.name, outcome_of(path)]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
