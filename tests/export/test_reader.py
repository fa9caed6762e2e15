import contextlib

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


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data):
    """Whole files are read in test_structure.py."""
    buffer = Flatbuffer(data, strict=True)
    with contextlib.suppress(BrokenError):
        for table in buffer.table(buffer.follow(0), KINDS).get(5, ()):
            buffer.table(table, KINDS)
