"""The files that hold a data set, each with many images: read by parts, from several threads."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar

from storage.atomic import open_regular
from storage.errors import InputError

Answer = TypeVar("Answer")

_THREADS = 16
"""Most of them wait for a server."""


class LostFileError(InputError):
    """A file is not there, or may not be read; `reason` says so without its place."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(f"{place} {reason}; put it there, or make it readable")
        self.reason = reason


class FileStat(NamedTuple):
    """What changes when a file is replaced; only ever compared for equality, but for the size."""

    num_bytes: int
    stamp: int
    """Modification time in ns; behind a URL a number for its tag, or its time."""
    inode: int
    """0 behind a URL."""


class DataFile(Protocol):
    """One file of a data set."""

    place: str
    """Where it is, for messages."""
    name: str
    """The last part of its place."""
    identity: bytes
    """Its place as bytes, for a digest: names of files need not be text."""

    def stat(self) -> FileStat: ...
    def open(self) -> BinaryIO: ...
    def read(self, spans: Sequence[tuple[int, int]]) -> list[bytes]: ...


class LocalFile:
    """A file on a disk. Nothing stays open."""

    def __init__(self, path: Path) -> None:
        self.path, self.place, self.name = path, str(path), path.name
        self.identity = os.fsencode(path.absolute())

    def stat(self) -> FileStat:
        """Raises LostFileError where there is no such file."""
        try:
            found = self.path.stat()
        except OSError as error:
            raise self._lost(error) from error
        return FileStat(found.st_size, found.st_mtime_ns, found.st_ino)

    def open(self) -> BinaryIO:
        """To be read from place to place."""
        return open(open_regular(self.path), "rb")

    def read(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, size); fewer where the file ends.

        Raises:
            LostFileError: it is gone, or cannot be read.
        """
        try:
            with open(open_regular(self.path), "rb", buffering=0) as file:
                return [os.pread(file.fileno(), num_bytes, offset) for offset, num_bytes in spans]
        except OSError as error:
            raise self._lost(error) from error

    def _lost(self, error: OSError) -> LostFileError:
        return LostFileError(self.place, f"cannot be read: {error.strerror}")


def for_each(question: Callable[..., Answer], files: Sequence[DataFile], *others: Iterable[Any]) -> list[Answer]:
    """`map` over the files of a data set: several at a time behind a URL, where each answer takes its time."""
    if all(isinstance(file, LocalFile) for file in files):
        return list(map(question, files, *others))
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(question, files, *others))
