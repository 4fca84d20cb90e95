"""One writer a folder. A lock belongs to the process: it is gone the moment the process is, however it ended.

Locks are the operating system's (`flock`), so no clock, host name or process number decides anything. Machines that
share a folder must share its locks too: NFSv4, Lustre with `flock`, CephFS, GPFS do. Where a machine is lost, the
server of the file system frees its locks after a minute or two.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from storage.atomic import disk_errors, make_folder, read_regular
from storage.errors import DecantError, DiskError, StoreBusyError

_LOOKS, _PAUSE_SECONDS = 5, 0.01
"""Another process may hold a lock for a moment, to see whether it is free."""
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


@contextlib.contextmanager
def hold_lock(folder: Path) -> Iterator[None]:
    """Hold `folder/LOCK` for the length of the block.

    Raises:
        StoreBusyError: another process holds it; the message says which.
        DiskError: nothing can be written there, or its file system has no locks.
    """
    path = folder / "LOCK"
    make_folder(folder)
    descriptor = _try_often(path)
    if descriptor is None:
        raise StoreBusyError(
            f"{folder} is being written by {_holder(path)}; wait for it to end, or stop it, then try again"
        )
    try:
        with disk_errors(path):
            _write_holder(descriptor)
        yield
    finally:
        os.close(descriptor)


def is_held(folder: Path) -> bool:
    """Whether a process holds the folder's lock."""
    descriptor = try_lock(folder / "LOCK")
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None


def try_lock(path: Path) -> int | None:
    """Lock a file, which is made where there is none; None while another holds it. Not waited for.

    Returns:
        A descriptor; closing it unlocks.

    Raises:
        DiskError: the file cannot be written, or its file system has no locks.
    """
    with disk_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DiskError(f"{path} is a pipe or a device, expected a file to lock; move it away, then try again")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        os.close(descriptor)
        if error.errno not in _NO_LOCKS:
            raise
        raise DiskError(
            f"the file system of {path} has no locks ({os.strerror(error.errno)}), so nothing would keep two commands "
            "from writing there; mount it with locks, or choose another folder"
        ) from error
    return descriptor


def _try_often(path: Path) -> int | None:
    for _ in range(_LOOKS - 1):
        descriptor = try_lock(path)
        if descriptor is not None:
            return descriptor
        time.sleep(_PAUSE_SECONDS)
    return try_lock(path)


def _write_holder(descriptor: int) -> None:
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(owner).encode(), 0)


def _holder(path: Path) -> str:
    """For people; nothing is decided by it."""
    try:
        owner = json.loads(read_regular(path))
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (DecantError, OSError, ValueError, KeyError, TypeError):
        return "another process"
