"""Thrift's compact protocol, in which Parquet writes its footers and page headers: bytes to plain values.

Written for untrusted bytes: whatever they claim, it ends, and takes no more memory than a few times their length.
"""

from typing import Any

_STOP, _TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(13)
_MAX_DEPTH = 16
_MAX_SHIFT = 63
"""Integers have 64 bits."""

Struct = dict[int, Any]
"""Values by their field's number: int, bool, bytes, lists, and other structs."""


def read_struct(data: bytes, place: int = 0) -> tuple[Struct, int]:
    """The struct that begins at a place, and where it ends.

    Raises:
        ValueError: there is none; says where.
    """
    reader = _Reader(data, place)
    return reader.struct(0), reader.place


class _Reader:
    def __init__(self, data: bytes, place: int) -> None:
        self.data, self.place = data, place

    def struct(self, depth: int) -> Struct:
        if depth > _MAX_DEPTH:
            raise ValueError(f"structs are nested too deep at byte {self.place}")
        fields: Struct = {}
        number = 0
        while kind := self._byte():
            number = number + (kind >> 4) if kind >> 4 else self._signed()
            kind &= 15
            fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (_I16, _I32, _I64):
            return self._signed()
        if kind == _BINARY:
            return self._bytes(self._number())
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind in (_LIST, _SET):
            return self._list(depth + 1)
        if kind in (_BYTE, _TRUE, _FALSE):
            return self._byte()
        if kind == _DOUBLE:
            return self._bytes(8)
        raise ValueError(f"a value of the unknown kind {kind} at byte {self.place}")

    def _list(self, depth: int) -> list[Any]:
        if depth > _MAX_DEPTH:
            raise ValueError(f"lists are nested too deep at byte {self.place}")
        head = self._byte()
        count, kind = head >> 4, head & 15
        if count == 15:
            count = self._number()
        if count > len(self.data) - self.place:  # each takes a byte at least
            raise ValueError(f"a list of {count} values at byte {self.place} of {len(self.data)}")
        return [self._value(kind, depth) for _ in range(count)]

    def _byte(self) -> int:
        if self.place >= len(self.data):
            raise ValueError(f"cut short at byte {len(self.data)}")
        self.place += 1
        return self.data[self.place - 1]

    def _bytes(self, count: int) -> bytes:
        end = self.place + count
        if end > len(self.data):
            raise ValueError(f"{count} bytes at byte {self.place} of {len(self.data)}")
        found, self.place = self.data[self.place : end], end
        return found

    def _number(self) -> int:
        value = shift = 0
        while (byte := self._byte()) > 127:
            value |= (byte & 127) << shift
            shift += 7
            if shift > _MAX_SHIFT:
                raise ValueError(f"a number without end at byte {self.place}")
        return value | byte << shift

    def _signed(self) -> int:
        number = self._number()
        return (number >> 1) ^ -(number & 1)
