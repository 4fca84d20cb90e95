"""The files that hold a data set, each with many images: read by parts, from several threads."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from storage.errors import InputError


class FileStat(NamedTuple):
    """What changes when a file is replaced; only ever compared for equality, but for the size."""

    num_bytes: int
    stamp: int
    """Modification time in ns."""
    inode: int


class DataFile(Protocol):
    """One file of a data set."""

    place: str
    """Where it is, for messages."""
    name: str
    """The last part of its place."""

    def stat(self) -> FileStat: ...
    def read(self, spans: Sequence[tuple[int, int]]) -> list[bytes]: ...


class LocalFile:
    """A file on a disk. Nothing stays open."""

    def __init__(self, path: Path) -> None:
        self.path, self.place, self.name = path, str(path), path.name

    def stat(self) -> FileStat:
        """Raises InputError where there is no such file."""
        try:
            found = self.path.stat()
        except OSError as error:
            raise self._unreadable(error) from error
        return FileStat(found.st_size, found.st_mtime_ns, found.st_ino)

    def read(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, size); fewer where the file ends.

        Raises:
            InputError: it cannot be read.
        """
        try:
            with open(self.path, "rb", buffering=0) as file:
                return [os.pread(file.fileno(), num_bytes, offset) for offset, num_bytes in spans]
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> InputError:
        return InputError(f"{self.place} cannot be read: {os.strerror(error.errno or 0)}; make it readable, or move it")
