"""A tar under construction."""

import tarfile
from functools import lru_cache
from typing import Any

from numpy.typing import NDArray

from storage.fingerprint import crc32c
from storage.npy import npy_header
from storage.shards import Pieces

BLOCK = tarfile.BLOCKSIZE
LARGE_BYTES = 2**14
"""A part that is written from where it lies instead of being copied."""


class TarArchive:
    """A tar under construction, as buffers: large parts as they are, small ones joined."""

    def __init__(self) -> None:
        self.pieces: Pieces = []
        self.num_bytes = 0
        self._small = bytearray()

    def add(self, name: str, *parts: bytes | memoryview) -> int:
        """Add a member; returns where its last part begins."""
        size = sum(map(len, parts))
        padding = bytes(-size % BLOCK)
        self._extend(member_header(name, size), *parts, padding)
        return self.num_bytes - len(padding) - len(parts[-1])

    def add_array(self, name: str, values: NDArray[Any]) -> tuple[int, int]:
        """Add a `.npy` member; returns where its values begin, and their checksum."""
        data = values.tobytes()
        return self.add(name, npy_header(values.dtype.str, values.shape), data), crc32c(data)

    def close(self) -> Pieces:
        """All of it, with the end-of-archive mark."""
        self._extend(bytes(2 * BLOCK))
        self._flush()
        return self.pieces

    def _extend(self, *parts: bytes | memoryview) -> None:
        for part in parts:
            self.num_bytes += len(part)
            if len(part) < LARGE_BYTES:
                self._small += part
            else:
                self._flush()
                self.pieces.append(part)

    def _flush(self) -> None:
        if self._small:
            self.pieces.append(bytes(self._small))
            self._small.clear()


def member_header(name: str, size: int) -> bytes:
    """The tar header of a member that is called by a record's number and a suffix.

    `tarfile` makes one for each suffix and size, which costs as much as writing 50 kB; here only digits change,
    and with them the checksum, which is the sum of all bytes.
    """
    number, dot, suffix = name.partition(".")
    header = bytearray(_header_of_zero(len(number), dot + suffix, size))
    digits = header[: len(number)] = number.encode()
    checksum = int(header[148:154], 8) + sum(digits) - len(digits) * ord("0")
    header[148:154] = b"%06o" % checksum
    return bytes(header)


@lru_cache(maxsize=64)
def _header_of_zero(digits: int, suffix: str, size: int) -> bytes:
    member = tarfile.TarInfo("0" * digits + suffix)
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT)
