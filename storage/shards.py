"""A shard in memory, and what every layout must be able to do with one.

Letters: R the slots of a shard (a slot without a record is a hole), T tokens, C channels, F the fields of a view.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from storage.encodings import Fields
from storage.errors import DamagedError
from storage.files import REMEDY, Files
from storage.fingerprint import crc32c, digest_bytes
from storage.process_lock import ProcessLock
from storage.records import ShardEntry, StorePlan
from storage.views import View

VIEW_FIELDS = ("top", "left", "height", "width", "flip")
HEIGHT = VIEW_FIELDS.index("height")

Pieces = list[bytes | memoryview]
"""A file's content as buffers, in order; the large ones are the caller's arrays, not copies."""


class PackedRecord(NamedTuple):
    """One record, encoded; everything that a layout writes of it."""

    key: str
    label: int
    view_index: int
    view_F: NDArray[np.int32]
    tokens: bytes | memoryview
    """The stored bytes: little-endian values, compressed where the encoding says so."""
    crc32c: int
    """Of these bytes."""
    small: Fields
    """`token_mean` and `token_std` (T,), and `token_scale` (T,) where the encoding has one."""
    jpeg: bytes | None


class ShardContent(NamedTuple):
    """All of a shard, ready to be laid out."""

    shard: int
    records: list[PackedRecord | None]
    """One a slot; None is a hole."""
    classes: tuple[str, ...]


class Spans(NamedTuple):
    """Where pieces of one file lie: 12 bytes a record with the checksum; 4 more where lengths differ."""

    name: str
    offsets_R: NDArray[np.int64]
    """-1 for a hole."""
    lengths_R: NDArray[np.uint32]
    crc32c_R: NDArray[np.uint32]


class OpenShard(Protocol):
    """One shard of a store, its index parsed."""

    @property
    def tokens(self) -> Spans: ...
    @property
    def jpegs(self) -> Spans: ...
    def rows(self, name: str, slots: NDArray[np.int64]) -> NDArray[Any]:
        """Rows of one of the small arrays: `views` (n, F) int32, `token_mean`, `token_std`, `token_scale` (n, T)."""


class SmallFiles:
    """The small files of a store, checked against their shards' receipts and kept while a memory budget lasts."""

    def __init__(self, files: Files, budget_bytes: int = 256 * 2**20) -> None:
        self.files = files
        self._left = budget_bytes
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._lock = ProcessLock()

    def read(self, name: str, digest: str, *, keep: bool = True) -> bytes:
        """A whole small file. One that is whole but belongs to another shard is not taken.

        Args:
            digest: as the receipt of its shard has it.
            keep: it will be asked for again.

        Raises:
            DamagedError: it is missing or is not what the receipt says.
        """
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name]
        data = self.files.read(name)
        if digest_bytes(data) != digest:
            raise DamagedError(f"{self.files.location}/{name} is not what its shard's receipt says; {REMEDY}")
        if not keep:
            return data
        with self._lock:
            if name not in self._kept:
                self._kept[name] = data
                self._left -= len(data)
            while self._left < 0:
                self._left += len(self._kept.popitem(last=False)[1])
        return data


class Layout(NamedTuple):
    """How stores of one kind lie on disk."""

    metadata: Callable[[StorePlan], dict[str, bytes]]
    """Files that describe the store to other programs, by path in the store."""
    pack: Callable[[StorePlan, ShardContent], dict[str, Pieces]]
    """The files of one shard."""
    open_shard: Callable[[StorePlan, ShardEntry, SmallFiles], OpenShard]
    find_plan: Callable[[Files], StorePlan | None]
    """The copy of the plan among the metadata, for when plan.json is damaged or gone."""


def small_dtypes(plan: StorePlan) -> dict[str, str]:
    """The small arrays that have a row of T values for each record."""
    scales = {name: field.dtype for name, field in plan.fields.items() if name != "tokens"}
    return {"token_mean": "<f4", "token_std": "<f4"} | scales


def view_to_row(view: View) -> NDArray[np.int32]:
    return np.array([view.top, view.left, view.height, view.width, view.flip], np.int32)


def row_to_view(row_F: NDArray[np.int32]) -> View:
    top, left, height, width, flip = row_F.tolist()
    return View(top=top, left=left, height=height, width=width, flip=bool(flip))


def check_crc32c(data: Any, expected: int, what: str) -> None:
    """Compare bytes with the checksum that was committed.

    Raises:
        DamagedError: they differ.
    """
    if crc32c(data) != expected:
        raise DamagedError(f"{what} does not match its checksum; {REMEDY}")
