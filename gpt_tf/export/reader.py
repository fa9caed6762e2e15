"""A flatbuffer's tables and a protobuf's fields, every offset checked.

Native readers follow offsets wherever they lead. Here each is seen to lie within the
bytes, and in a flatbuffer to be aligned, before it is followed.

Reference: https://flatbuffers.dev/internals,
https://protobuf.dev/programming-guides/encoding.
"""

import struct

import numpy as np

U8, I8, BOOL = struct.Struct("<B"), struct.Struct("<b"), struct.Struct("<?")
U16, I32, U32 = struct.Struct("<H"), struct.Struct("<i"), struct.Struct("<I")
F32, U64 = struct.Struct("<f"), struct.Struct("<Q")

_MOST_FIELDS = 64


class BrokenError(Exception):
    """What was read leads nowhere, or is not what it should be."""


class Flatbuffer:
    """Reads tables, each known by its position.

    Args:
        data: The bytes: anything that has a length and can be sliced.
        strict: Whether a table may have those fields only that are asked for.
    """

    def __init__(self, data, strict: bool):
        self._data, self._size, self._strict = data, len(data), strict
        self._layouts = {}
        self._tables = {}

    def read(self, layout: struct.Struct, position: int):
        """Return the number at a position."""
        if position % layout.size or not 0 <= position <= self._size - layout.size:
            raise BrokenError(f"an offset to byte {position} of {self._size}")
        return layout.unpack_from(self._data, position)[0]

    def follow(self, position: int) -> int:
        """Return where an offset leads; that of the whole stands at position 0."""
        return position + self.read(U32, position)

    def table(self, position: int, kinds: dict) -> dict:
        """Return a table's values by their field's index.

        Args:
            position: Where it stands.
            kinds: By index, how to read a field: a `Struct` for a number, or a
                method of this class.
        """
        key = position, id(kinds)
        if key not in self._tables:
            self._tables[key] = self._read_table(position, kinds)
        return self._tables[key]

    def _read_table(self, position, kinds):
        layout = position - self.read(I32, position)
        if layout not in self._layouts:
            count, odd = divmod(self.read(U16, layout) - 4, 2)
            if odd or count > _MOST_FIELDS:
                raise BrokenError(f"a table of {count} fields and {odd} bytes")
            places = self._vector(layout + 4, U16, count)
            self._layouts[layout] = [
                (i, place) for i, place in enumerate(places) if place
            ]
        found = {}
        for index, place in self._layouts[layout]:
            kind = kinds.get(index)
            if isinstance(kind, struct.Struct):
                found[index] = self.read(kind, position + place)
            elif kind is not None:
                found[index] = kind(self, position + place)
            elif self._strict:
                raise BrokenError(f"a table with a field {index}")
        return found

    def _vector(self, begin, layout, count):
        end = begin + count * layout.size
        if begin % layout.size or count < 0 or not 0 <= begin <= end <= self._size:
            raise BrokenError(f"{count} values from byte {begin} of {self._size}")
        return struct.unpack_from(f"<{count}{layout.format[1:]}", self._data, begin)

    def tables(self, position: int) -> list[int]:
        """Return the positions of the tables of a vector."""
        begin = self.follow(position)
        offsets = self._vector(begin + 4, U32, self.read(U32, begin))
        return [begin + 4 * i + offset for i, offset in enumerate(offsets, 1)]

    def integers(self, position: int) -> tuple[int, ...]:
        """Return a vector of int32."""
        begin = self.follow(position)
        return self._vector(begin + 4, I32, self.read(U32, begin))

    def span(self, position: int, item_bytes: int = 1) -> tuple[int, int]:
        """Return where the items of a vector lie: begin and end."""
        begin = self.follow(position)
        end = begin + 4 + item_bytes * self.read(U32, begin)
        if end > self._size:
            raise BrokenError(f"a vector up to byte {end} of {self._size}")
        return begin + 4, end

    def floats(self, position: int) -> np.ndarray:
        """Return a vector of float32."""
        begin, end = self.span(position, 4)
        return np.frombuffer(self._data[begin:end], "<f4")

    def longs(self, position: int) -> np.ndarray:
        """Return a vector of int64."""
        begin, end = self.span(position, 8)
        if begin % 8:
            raise BrokenError(f"a number at byte {begin}")
        return np.frombuffer(self._data[begin:end], "<i8")

    def text(self, position: int) -> bytes:
        """Return a string's bytes; a 0 stands behind them."""
        begin, end = self.span(position)
        if self.read(U8, end):
            raise BrokenError(f"a text without an end at byte {end}")
        return self._data[begin:end]


def protobuf(data: bytes) -> dict[int, list]:
    """Return the fields of a protobuf message: by number, the values in their order.

    Integers are numbers; texts, messages and whatever else has a length are bytes, and
    so are numbers of fixed width.
    """
    found, place = {}, 0
    while place < len(data):
        key, place = _varint(data, place)
        number, kind = divmod(key, 8)
        if kind == 0:
            value, place = _varint(data, place)
        elif kind in (1, 2, 5):
            size = {1: 8, 5: 4}.get(kind)
            if size is None:
                size, place = _varint(data, place)
            if size > len(data) - place:
                raise BrokenError(f"{size} bytes from byte {place} of {len(data)}")
            value, place = data[place : place + size], place + size
        else:
            raise BrokenError(f"a field of kind {kind} before byte {place}")
        found.setdefault(number, []).append(value)
    return found


def packed_integers(data: bytes) -> list[int]:
    """Return the integers of a protobuf's packed field."""
    found, place = [], 0
    while place < len(data):
        value, place = _varint(data, place)
        found.append(value)
    return found


def _varint(data, place):
    """Return an integer of 7 bits a byte, and where it ends."""
    value = 0
    for shift in range(0, 64, 7):
        if place + shift // 7 >= len(data):
            raise BrokenError(f"a number that goes on at the end, byte {len(data)}")
        byte = data[place + shift // 7]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place + shift // 7 + 1
    raise BrokenError(f"a number of more than 64 bits at byte {place}")
