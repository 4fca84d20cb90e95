"""Where a store's files are: the few operations that reading one takes, on a local disk or behind a URL.

A local read is one `preadv` into the caller's memory, from a descriptor that is opened at the first use and kept. No
memory map: cold random reads through one are five times slower. Nothing is open before the first read, and an object
travels to another process as its place alone, so stores are safe under fork, spawn and forkserver.
"""

import contextlib
import errno
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from storage.atomic import open_regular, read_regular
from storage.errors import DamagedError, DiskError
from storage.fingerprint import digest_file
from storage.process_lock import ProcessLock

REMEDY = "run `make verify` to find all damage, then `make repair`"
MAX_OPEN_FILES = 256
"""Of one store; far below the usual limit of a process, and about the shards that are mixed at a time."""
HELD_FILES = 32
"""More that a thread may keep open while it reads a batch."""


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
        self.number = open_regular(path)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self.number)


class LocalFiles:
    """A folder on a disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.location = str(root)
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        self._lock = ProcessLock()

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
            return read_regular(self.root / name)

    def read_end(self, name: str, num_bytes: int) -> bytes:
        """The last bytes of a file; fewer when it is shorter."""
        with _missing_is_damage(self.location, name):
            descriptor = self._descriptor(name)  # held, or another thread's 256 files could close it meanwhile
            size = os.fstat(descriptor.number).st_size
            return os.pread(descriptor.number, num_bytes, max(0, size - num_bytes))

    def read_pieces(self, pieces: Iterable[Piece]) -> None:
        """Fill the targets of all pieces.

        Raises:
            DamagedError: a file is missing or ends too early.
        """
        preadv = os.preadv
        held: dict[str, _Descriptor] = {}  # so that none is closed while it is read from
        for name, offset, targets, num_bytes in pieces:
            descriptor = held.get(name)
            if descriptor is None:
                if len(held) == HELD_FILES:
                    held.clear()
                with _missing_is_damage(self.location, name):
                    descriptor = held[name] = self._descriptor(name)
            try:
                got = preadv(descriptor.number, targets, offset)
            except OSError as error:
                raise _unreadable(f"{self.location}/{name}", error) from error
            if got != num_bytes:
                self._read_rest(descriptor, name, offset, targets, got, num_bytes)

    def _read_rest(
        self, descriptor: _Descriptor, name: str, offset: int, targets: Sequence[Any], got: int, num_bytes: int
    ) -> None:
        """Network file systems may give a part at a time; only a read of nothing is the end of a file."""
        places = [memoryview(target).cast("B") for target in targets]
        while got < num_bytes:
            passed, rest = 0, []
            for place in places:
                rest += [place[max(0, got - passed) :]] if passed + len(place) > got else []
                passed += len(place)
            more = os.preadv(descriptor.number, rest, offset + got)
            if not more:
                raise ends_early(f"{self.location}/{name}", offset + num_bytes)
            got += more

    def hint(self, spans: Sequence[tuple[str, int, int]]) -> None:
        """Tell the system that these (name, offset, bytes) will be read soon; returns at once."""
        for name, offset, num_bytes in spans:
            with contextlib.suppress(OSError):  # a hint may fail; the read will say why
                descriptor = self._descriptor(name)
                os.posix_fadvise(descriptor.number, offset, num_bytes, os.POSIX_FADV_WILLNEED)

    def exists(self, name: str) -> bool:
        return (self.root / name).exists()

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when there is no such file, or a link that leads nowhere or back to itself."""
        try:
            return (self.root / name).stat().st_size
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            return None

    def digest(self, name: str) -> str:
        """Content hash of a file of any size."""
        with _missing_is_damage(self.location, name):
            self._descriptor(name)  # it is a file, or this raises
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


def _unreadable(path: str, error: OSError) -> DiskError:
    return DiskError(f"{path} cannot be read: {error.strerror}; see to the disk, then try again")


@contextlib.contextmanager
def _missing_is_damage(location: str, name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedError(f"{location}/{name} is missing; {REMEDY}") from error
    except OSError as error:
        raise _unreadable(f"{location}/{name}", error) from error
