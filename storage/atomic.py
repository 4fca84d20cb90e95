"""The only place that publishes files: write privately, fsync, rename, fsync the folder; and how they are opened again.

A reader therefore never sees half a file, also after a power cut.
"""

import contextlib
import errno
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from storage.errors import DamagedError, DiskError

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "file-size limit"}
_CHUNKS_A_CALL = 512
"""The system's limit for one `writev` is 1,024."""
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOTDIR}
_IN_THE_WAY = {errno.EISDIR, errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.ESPIPE}
"""Something else is there, or on the way there, than a file: a folder, a link that leads back, a socket, a pipe."""


@contextlib.contextmanager
def disk_errors(path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turn the operating system's "no room" and "cannot be done here" into a `DiskError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            free = shutil.disk_usage(nearest_existing(path)).free
            mend = "raise the limit (`ulimit -f`)" if error.errno == errno.EFBIG else "make room"
            raise DiskError(
                f"cannot write {path}: {_FULL[error.errno]} ({free / 1e6:,.1f} MB free there"
                + (f", {needed_bytes / 1e6:,.1f} MB needed" if needed_bytes else "")
                + f"); finished work is safe: {mend}, then give the same command again"
            ) from error
        if error.errno in _REFUSED:
            raise DiskError(f"cannot write {path}: {os.strerror(error.errno)}; choose another folder") from error
        if error.errno in _IN_THE_WAY:
            raise DiskError(f"cannot write {path}: {os.strerror(error.errno)}; move away what is there") from error
        raise


def nearest_existing(path: Path) -> Path:
    """The path itself or its nearest parent that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents so that they, too, are there after a power cut."""
    with disk_errors(folder):
        missing = [made for made in (folder, *folder.parents) if not made.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a file") from error
        for made in missing:
            fsync_folder(made.parent)


def private_name(path: Path) -> Path:
    """A name beside `path` that no other writer uses; `.partial` files are never read."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")


def write_private(path: Path, *chunks: bytes | memoryview) -> None:
    """Write and fsync a file that is not published yet. The chunks go to the system as they are, many in one call."""
    with disk_errors(path, sum(len(chunk) for chunk in chunks)), open(path, "wb", buffering=0) as file:
        for first in range(0, len(chunks), _CHUNKS_A_CALL):
            _write_all(file.fileno(), chunks[first : first + _CHUNKS_A_CALL])
        os.fsync(file.fileno())


def _write_all(descriptor: int, chunks: Sequence[bytes | memoryview]) -> None:
    """`writev`, repeated as long as the system takes a part only."""
    written = os.writev(descriptor, chunks)
    for chunk in chunks:
        rest = memoryview(chunk)[written:]
        written = max(0, written - len(chunk))
        while len(rest):
            rest = rest[os.write(descriptor, rest) :]


def publish(private: Path, path: Path) -> None:
    """Give a finished, fsynced file its final name, replacing an earlier one."""
    with disk_errors(path):
        os.replace(private, path)
        fsync_folder(path.parent)


def write_file(path: Path, data: bytes) -> None:
    """Create or replace a file in one step."""
    make_folder(path.parent)
    private = private_name(path)
    try:
        write_private(private, data)
        publish(private, path)
    finally:
        private.unlink(missing_ok=True)


def create_file(path: Path, data: bytes, private: Path | None = None) -> bool:
    """Create a file; False, and nothing changed, when it exists already. The first writer wins.

    Args:
        private: where it is written first; otherwise beside `path`.
    """
    make_folder(path.parent)
    private = private or private_name(path)
    try:
        write_private(private, data)
        try:
            with disk_errors(path):
                os.link(private, path)
                fsync_folder(path.parent)
        except FileExistsError:
            return False
        return True
    finally:
        private.unlink(missing_ok=True)


def to_json_bytes(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def write_json(path: Path, value: Any) -> None:
    write_file(path, to_json_bytes(value))


def open_regular(path: Path | str) -> int:
    """Open a file to read from; returns its descriptor. A pipe in its place is not waited for, a device not read.

    Raises:
        OSError: it cannot be opened, or is no file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        os.set_blocking(descriptor, True)
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    raise OSError(errno.ESPIPE, "it is a pipe or a device", str(path))


def read_regular(path: Path, most_bytes: int | None = None) -> bytes:
    """A small file that this program wrote.

    Args:
        most_bytes: that are read of it; all by default.

    Raises:
        FileNotFoundError: there is none.
        DamagedError: something else is in its place.
        DiskError: it cannot be read.
    """
    try:
        with open(open_regular(path), "rb") as file:
            return file.read(-1 if most_bytes is None else most_bytes)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in _IN_THE_WAY:
            raise DamagedError(
                f"{path} cannot be read: {error.strerror}; move away what is there, then give the command again"
            ) from error
        raise DiskError(f"{path} cannot be read: {error.strerror}; see to the disk, or to who may read it") from error


def read_json(path: Path) -> Any:
    """Read JSON that this program wrote.

    Raises:
        DamagedError: the file is not JSON any more.
    """
    try:
        return json.loads(read_regular(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path} is not readable as JSON ({error}); delete it and give the command again") from error


def remove_file(path: Path) -> None:
    """Remove a file that nobody needs any more; missing is fine.

    Raises:
        DiskError: it cannot be removed, or a folder is in its place.
    """
    with disk_errors(path):
        path.unlink(missing_ok=True)


def remove_tree(folder: Path) -> None:
    """Remove a folder whose content nobody needs any more; missing is fine."""
    shutil.rmtree(folder, ignore_errors=True)
