"""Where a writer keeps a shard that is not published yet: `attempts/00017.<random>/`, locked while its writer lives.

So what a killed writer left can be told from the work of one that is alive, on whatever machine.
"""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from storage.atomic import disk_errors, remove_tree
from storage.lock import try_lock

_FOLDER, _LOCK = "attempts", "lock"


@contextlib.contextmanager
def private_attempt(root: Path, index: int) -> Iterator[Path]:
    """A folder of one's own, for the length of the block.

    Raises:
        DiskError: no room, or nothing can be written there.
    """
    attempt, descriptor = _make_attempt(root, index)
    try:
        yield attempt
    finally:
        remove_tree(attempt)
        os.close(descriptor)


def _make_attempt(root: Path, index: int) -> tuple[Path, int]:
    while True:
        attempt = root / _FOLDER / f"{index:05d}.{uuid.uuid4().hex[:12]}"
        with contextlib.suppress(FileNotFoundError):  # swept before it was locked
            with disk_errors(attempt):
                attempt.mkdir(parents=True)
            descriptor = try_lock(attempt / _LOCK)
            if descriptor is not None and (attempt / _LOCK).exists():
                return attempt, descriptor
            if descriptor is not None:
                os.close(descriptor)


def sweep_attempts(root: Path) -> None:
    """Remove what writers left that are not alive any more."""
    folder = root / _FOLDER
    for attempt in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # its writer has just removed it
            if attempt.is_symlink() or not attempt.is_dir():
                attempt.unlink()
                continue
            descriptor = try_lock(attempt / _LOCK)
            if descriptor is not None:
                remove_tree(attempt)
                os.close(descriptor)
    with contextlib.suppress(OSError):  # empty, unless another writer is at work
        folder.rmdir()
