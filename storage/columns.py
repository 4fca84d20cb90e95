"""Columns of a million rows in one sealed file: little-endian arrays one after another, nothing to parse a row.

    bytes        content
    8            DECANTC1
    8            length of the header in bytes, uint64
    ...          header: JSON, then spaces up to a multiple of 8
    ...          each column's bytes, then zeros up to a multiple of 8
    32           the first 32 hex digits of the BLAKE3 digest of all before it, in ASCII

Which columns there are, and how long, follows from the header. A file is untrusted: its digest and its length are
checked before anything in it is used, and no memory is taken for what it claims to hold.
"""

import bisect
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from storage.errors import DamagedError
from storage.fingerprint import FINGERPRINT_CHARS, digest_bytes, digest_pieces

MAGIC = b"DECANTC1"
DIGEST_BYTES = FINGERPRINT_CHARS // 2
_ROWS_AT_ONCE = 1 << 16


def encode_columns(header: bytes, columns: Sequence[NDArray[Any]]) -> bytes:
    """The bytes of a file of columns; `header` is JSON."""
    header += b" " * (-len(header) % 8)
    pieces: list[bytes | memoryview] = [MAGIC, len(header).to_bytes(8, "little"), header]
    for column in columns:
        pieces += [raw_bytes(column), bytes(-column.nbytes % 8)]
    pieces.append(digest_pieces(pieces).encode())
    return b"".join(pieces)


def raw_bytes(column: NDArray[Any]) -> memoryview:
    """The bytes of an array, without a copy where they lie side by side."""
    return np.ascontiguousarray(column).reshape(-1).view(np.uint8).data


def open_columns(path: Path | str, data: bytes) -> tuple[bytes, memoryview]:
    """The header of a file of columns, and the part that holds them.

    Raises:
        DamagedError: a byte of it has changed.
    """
    body, seal = memoryview(data)[:-FINGERPRINT_CHARS], data[-FINGERPRINT_CHARS:]
    if data[: len(MAGIC)] != MAGIC or digest_bytes(body).encode() != seal:
        raise DamagedError(f"{path} does not match its own digest: damaged, or not written by this program")
    start = len(MAGIC) + 8
    end = start + int.from_bytes(body[len(MAGIC) : start], "little")
    if end > len(body):
        raise DamagedError(f"{path} has a header of {end - start:,} bytes in {len(body):,}")
    return bytes(body[start:end]), body[end:]


def cut_columns(
    path: Path | str, body: memoryview, columns: Sequence[tuple[DTypeLike, tuple[int, ...]]]
) -> list[NDArray[Any]]:
    """Read-only arrays of the given types and shapes, without a copy.

    Raises:
        DamagedError: the columns are not exactly as long as the file says.
    """
    sizes = [np.dtype(kind).itemsize * math.prod(shape) for kind, shape in columns]
    needed = sum(size + -size % 8 for size in sizes)
    if needed != len(body):
        raise DamagedError(f"{path} holds {len(body):,} bytes of columns where its header tells of {needed:,}")
    starts = itertools.accumulate((size + -size % 8 for size in sizes), initial=0)
    return [
        np.frombuffer(body[start : start + size], kind).reshape(shape)
        for start, size, (kind, shape) in zip(starts, sizes, columns, strict=False)
    ]


def as_run(is_taken_N: NDArray[np.bool_]) -> slice | NDArray[np.bool_]:
    """Rows that lie side by side, as a slice; others as they are."""
    taken = np.flatnonzero(is_taken_N)
    if not len(taken):
        return slice(0, 0)
    first, end = int(taken[0]), int(taken[-1]) + 1
    return slice(first, end) if end - first == len(taken) else is_taken_N


class Keys(Sequence[str]):
    """Different strings in ascending order: one block of UTF-8 and where each ends, instead of an object a string.

    The order is that of code points, which is that of the UTF-8 bytes too.
    """

    def __init__(self, block: NDArray[np.uint8], lengths_N: NDArray[np.uint32]) -> None:
        """`lengths_N`: bytes of each string; see `problem` for what does not hold by itself."""
        self.block, self.lengths_N = block, lengths_N
        self._text = block.data
        self._starts_N1 = np.concatenate([[0], np.cumsum(lengths_N, dtype=np.int64)])

    @classmethod
    def encode(cls, keys: Iterable[str]) -> "Keys":
        """Raises AssertionError when the keys are not in ascending order."""
        encoded = [key.encode() for key in keys]
        lengths_N = np.fromiter(map(len, encoded), "<u4", len(encoded))
        found = cls(np.frombuffer(b"".join(encoded), np.uint8), lengths_N)
        if problem := found.problem():
            raise AssertionError(problem)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return Keys, (self.block, self.lengths_N)

    def problem(self) -> str:
        """What is wrong with strings from a file; empty for nothing."""
        if self._starts_N1[-1] != len(self.block):
            return f"keys of {self._starts_N1[-1]:,} bytes in a block of {len(self.block):,}"
        try:
            if not all(itertools.starmap(operator.lt, itertools.pairwise(self))):
                return "keys that are not in ascending order"
        except UnicodeDecodeError as error:
            return f"a key that is no text ({error})"
        return ""

    def select(self, rows: slice | NDArray[np.bool_]) -> "Keys":
        """Some of the strings, in the same order; a slice takes no memory."""
        if isinstance(rows, slice):
            first, end, _ = rows.indices(len(self))
            return Keys(self.block[self._starts_N1[first] : self._starts_N1[end]], self.lengths_N[rows])
        return Keys(self.block[np.repeat(rows, self.lengths_N)], self.lengths_N[rows])

    def find(self, key: str) -> int | None:
        """Position of a string; None where it is not there."""
        position = bisect.bisect_left(self, key)
        return position if position < len(self) and self[position] == key else None

    def match(self, others: "Keys") -> NDArray[np.int64]:
        """For each of the others its position here, -1 where it is not here. One pass over both."""
        if np.array_equal(self.lengths_N, others.lengths_N) and np.array_equal(self.block, others.block):
            return np.arange(len(self))
        found_N = np.full(len(others), -1, np.int64)
        mine = enumerate(self)
        position, key = next(mine, (-1, None))
        for number, other in enumerate(others):
            while key is not None and key < other:
                position, key = next(mine, (-1, None))
            if key == other:
                found_N[number] = position
        return found_N

    def __len__(self) -> int:
        return len(self.lengths_N)

    @overload
    def __getitem__(self, where: int) -> str: ...
    @overload
    def __getitem__(self, where: slice) -> tuple[str, ...]: ...
    def __getitem__(self, where: int | slice) -> str | tuple[str, ...]:
        if isinstance(where, slice):
            return tuple(self[position] for position in range(*where.indices(len(self))))
        position = range(len(self))[where]
        return str(self._text[self._starts_N1[position] : self._starts_N1[position + 1]], "utf-8")

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _ROWS_AT_ONCE):
            for start, end in itertools.pairwise(self._starts_N1[first : first + _ROWS_AT_ONCE + 1].tolist()):
                yield str(self._text[start:end], "utf-8")

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.find(key) is not None

    def index(self, key: str, start: int = 0, stop: int | None = None) -> int:
        """Raises ValueError, as a tuple does."""
        position = self.find(key)
        if position is None or position not in range(len(self))[start:stop]:
            raise ValueError(f"{key!r} is not there")
        return position

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self):,} keys, first {next(iter(self), None)!r}>"


class Digests(Sequence[str]):
    """Content digests, 16 bytes each; read as hex."""

    def __init__(self, rows_N16: NDArray[np.uint8]) -> None:
        self.rows_N16 = rows_N16

    @classmethod
    def encode(cls, digests: Iterable[str]) -> "Digests":
        rows = [bytes.fromhex(digest) for digest in digests]
        if any(len(row) != DIGEST_BYTES for row in rows):
            raise AssertionError(f"digests have {FINGERPRINT_CHARS} hex digits")
        return cls(np.frombuffer(b"".join(rows), np.uint8).reshape(-1, DIGEST_BYTES))

    def __len__(self) -> int:
        return len(self.rows_N16)

    @overload
    def __getitem__(self, where: int) -> str: ...
    @overload
    def __getitem__(self, where: slice) -> tuple[str, ...]: ...
    def __getitem__(self, where: int | slice) -> str | tuple[str, ...]:
        if isinstance(where, slice):
            return tuple(self[position] for position in range(*where.indices(len(self))))
        digest: bytes = self.rows_N16[where].tobytes()
        return digest.hex()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]
