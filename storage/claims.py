"""Which shards of a store are whose, where several processes fill it together.

A claim is a lock on the file `claims/00017`. Like every lock it is gone with its process, so there are no owners to be
taken for dead: nobody's heart beats, no clock is compared, and a process number that is in use again means nothing.
The files are empty and stay until the store is finished.
"""

import os
from pathlib import Path

from storage.atomic import make_folder, remove_tree
from storage.lock import try_lock

_FOLDER = "claims"


class ShardClaims:
    """The claims of one process on the shards of one store. For one thread."""

    def __init__(self, root: Path) -> None:
        self.folder = root / _FOLDER
        self.held: dict[int, int] = {}
        """Shard to the descriptor that holds its lock."""

    def take(self, index: int) -> bool:
        """Whether the shard is ours now; False while it is another's.

        Raises:
            DiskError: nothing can be written there, or its file system has no locks.
        """
        if index in self.held:
            return True
        make_folder(self.folder)
        descriptor = try_lock(self.folder / f"{index:05d}")
        if descriptor is not None:
            self.held[index] = descriptor
        return descriptor is not None

    def release(self, index: int) -> None:
        """Let others have it; nothing where it is not ours."""
        if index in self.held:
            os.close(self.held.pop(index))

    def close(self) -> None:
        for index in list(self.held):
            self.release(index)


def remove_claims(root: Path) -> None:
    """Of a store that is finished: there is nothing left to claim."""
    remove_tree(root / _FOLDER)
