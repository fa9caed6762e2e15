import contextlib

import flatbuffers
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_tf.export.reader import F32, U8, U32, U64, BrokenError, Flatbuffer

KINDS = {
    0: U32,
    1: Flatbuffer.text,
    2: Flatbuffer.integers,
    3: Flatbuffer.floats,
    4: Flatbuffer.longs,
    5: Flatbuffer.tables,
    6: Flatbuffer.span,
    7: F32,
    8: U8,
    9: U64,
}


def sample():
    """A table with a field of each kind, written by Google's own builder."""
    builder = flatbuffers.Builder(0)
    text = builder.CreateString("caf\u00e9")
    vectors = [
        builder.CreateNumpyVector(np.array([1, -2, 3], dtype))
        for dtype in (np.int32, np.float32, np.int64)
    ]
    builder.StartObject(1)
    builder.PrependUint32Slot(0, 7, 0)
    inner = builder.EndObject()
    builder.StartVector(4, 1, 4)
    builder.PrependUOffsetTRelative(inner)
    tables = builder.EndVector()
    content = builder.CreateByteVector(b"bytes")
    builder.StartObject(10)
    builder.PrependUint32Slot(0, 5, 0)
    for index, offset in enumerate([text, *vectors, tables, content], 1):
        builder.PrependUOffsetTRelativeSlot(index, offset, 0)
    builder.PrependFloat32Slot(7, 0.5, 0)
    builder.PrependUint8Slot(8, 255, 0)
    builder.PrependUint64Slot(9, 2**40, 0)
    builder.Finish(builder.EndObject())
    return bytes(builder.Output())


def read(data):
    buffer = Flatbuffer(data, strict=True)
    found = buffer.table(buffer.follow(0), KINDS)
    return found, [buffer.table(one, KINDS) for one in found.get(5, ())]


def test_what_the_builder_wrote_is_read():
    found, tables = read(sample())
    begin, end = found.pop(6)
    assert sample()[begin:end] == b"bytes"
    assert found.pop(3).tolist() == found.pop(4).tolist() == [1, -2, 3]
    found.pop(5)
    assert found == {
        0: 5,
        1: "caf\u00e9".encode(),
        2: (1, -2, 3),
        7: 0.5,
        8: 255,
        9: 2**40,
    }
    assert tables == [{0: 7}]


def test_a_field_that_is_not_asked_for_is_refused_or_ignored():
    buffer = Flatbuffer(sample(), strict=False)
    assert buffer.table(buffer.follow(0), {0: U32}) == {0: 5}
    buffer = Flatbuffer(sample(), strict=True)
    with pytest.raises(BrokenError, match="a field"):
        buffer.table(buffer.follow(0), {0: U32})


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data):
    with contextlib.suppress(BrokenError):
        read(data)
