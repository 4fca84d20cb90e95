"""Where a store's files are: the few operations that reading one takes, on a local disk or behind a URL.

A local read is one `preadv` into the caller's memory, from a descriptor that is opened at the first use and kept. No
memory map: cold random reads through one are five times slower. Nothing is open before the first read, and an object
travels to another process as its place alone, so stores are safe under fork, spawn and forkserver.
"""

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from storage.errors import DamagedError
from storage.fingerprint import digest_file

REMEDY = "run `make verify` to find all damage, then `make repair`"
MAX_OPEN_FILES = 256
"""Of one store; far below the usual limit of a process, and more than the shards that are mixed at a time."""


class Piece(NamedTuple):
    """A part of a file and the memory that it is read into."""

    name: str
    offset: int
    targets: Sequence[Any]
    """Writable buffers, filled one after the other."""
    num_bytes: int


class Files(Protocol):
    """The files of one store. Safe to use from several threads."""

    location: str

    def read(self, name: str) -> bytes: ...
    def read_end(self, name: str, num_bytes: int) -> bytes: ...
    def read_pieces(self, pieces: Iterable[Piece]) -> None: ...
    def hint(self, spans: Sequence[tuple[str, int, int]]) -> None: ...
    def exists(self, name: str) -> bool: ...
    def size(self, name: str) -> int | None: ...
    def digest(self, name: str) -> str: ...
    def names(self, folder: str) -> list[str]: ...


class _Descriptor:
    """Closed when the last thread that reads from it lets go."""

    __slots__ = ("number",)

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self.number)


class LocalFiles:
    """A folder on a disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.location = str(root)
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["root"])  # type: ignore[misc]

    def read(self, name: str) -> bytes:
        """A whole small file.

        Raises:
            DamagedError: it is missing.
        """
        with _missing_is_damage(self.location, name):
            return (self.root / name).read_bytes()

    def read_end(self, name: str, num_bytes: int) -> bytes:
        """The last bytes of a file; fewer when it is shorter."""
        with _missing_is_damage(self.location, name):
            number = self._descriptor(name).number
            return os.pread(number, num_bytes, max(0, os.fstat(number).st_size - num_bytes))

    def read_pieces(self, pieces: Iterable[Piece]) -> None:
        """Fill the targets of all pieces.

        Raises:
            DamagedError: a file is missing or ends too early.
        """
        descriptors: dict[str, _Descriptor] = {}  # kept to the end, so that none is closed meanwhile
        preadv = os.preadv
        for name, offset, targets, num_bytes in pieces:
            descriptor = descriptors.get(name)
            if descriptor is None:
                with _missing_is_damage(self.location, name):
                    descriptor = descriptors[name] = self._descriptor(name)
            if preadv(descriptor.number, targets, offset) != num_bytes:
                raise ends_early(f"{self.location}/{name}", offset + num_bytes)

    def hint(self, spans: Sequence[tuple[str, int, int]]) -> None:
        """Tell the system that these (name, offset, bytes) will be read soon; returns at once."""
        for name, offset, num_bytes in spans:
            with contextlib.suppress(OSError):  # a hint may fail; the read will say why
                os.posix_fadvise(self._descriptor(name).number, offset, num_bytes, os.POSIX_FADV_WILLNEED)

    def exists(self, name: str) -> bool:
        return (self.root / name).exists()

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when there is no such file."""
        try:
            return (self.root / name).stat().st_size
        except FileNotFoundError:
            return None

    def digest(self, name: str) -> str:
        """Content hash of a file of any size."""
        return digest_file(self.root / name)

    def names(self, folder: str) -> list[str]:
        """Sorted names of the files in a folder of the store; none when there is no such folder."""
        place = self.root / folder
        return sorted(entry.name for entry in os.scandir(place) if entry.is_file()) if place.is_dir() else []

    def _descriptor(self, name: str) -> _Descriptor:
        with self._lock:
            found = self._open.pop(name, None) or _Descriptor(os.path.join(self.location, name))
            self._open[name] = found  # newest last
            if len(self._open) > MAX_OPEN_FILES:
                self._open.popitem(last=False)
            return found


def ends_early(path: str, expected: int) -> DamagedError:
    return DamagedError(f"{path} ends before byte {expected:,}, which its index names; {REMEDY}")


@contextlib.contextmanager
def _missing_is_damage(location: str, name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedError(f"{location}/{name} is missing; {REMEDY}") from error
