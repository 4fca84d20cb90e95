"""Where the images lie in a data set's tars: found by reading every header once, then kept in the cache folder.

The cache holds as long as the tars' sizes, modification times and inodes stay; it may be deleted, or damaged, at any
time. Reading it takes a thousandth of the time that the headers take.
"""

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from storage.atomic import read_regular, write_file
from storage.columns import Keys, cut_columns, encode_columns, open_columns
from storage.data_files import DataFile
from storage.errors import DamagedError, DecantError, DiskError
from storage.fingerprint import digest_bytes, digest_json
from storage.schema import Schema

_COLUMNS = ("<i4", "<u4", "<u8", "<u8")


class TarStat(Schema):
    """What changes when a tar is replaced."""

    place: str
    """Digest of its path or URL."""
    num_bytes: int
    stamp: int
    inode: int

    @classmethod
    def of(cls, tar: DataFile) -> "TarStat":
        found = tar.stat()
        return cls(
            place=digest_bytes(tar.identity), num_bytes=found.num_bytes, stamp=found.stamp, inode=found.inode
        )  # fmt: skip


class Member(NamedTuple):
    """One image in a tar."""

    key: str
    tar: int
    """Position in the list of tars."""
    offset: int
    """Of its first byte in the tar."""
    num_bytes: int
    class_name: str | None


class _Header(Schema):
    format: Literal["decant tar members"] = "decant tar members"
    version: Literal[2] = 2
    """1 passed over tars inside tars."""
    tars: tuple[TarStat, ...]
    classes: tuple[str, ...]
    num_images: int = Field(ge=0)
    key_bytes: int = Field(ge=0)


class TarMembers:
    """All images of some tars, ordered by key."""

    def __init__(
        self, tars: Sequence[TarStat], classes: Sequence[str], keys: Keys, columns: Sequence[NDArray[Any]]
    ) -> None:
        """`columns`: label (-1 without), tar, offset and size in bytes of each image."""
        self.tars, self.classes, self.keys, self.columns = tuple(tars), tuple(classes), keys, columns

    @classmethod
    def of(cls, tars: Sequence[TarStat], members: Iterable[Member]) -> "TarMembers":
        """From members in any order, with different keys."""
        members = sorted(members)
        classes = sorted({member.class_name for member in members if member.class_name is not None})
        numbers: dict[str | None, int] = {name: number for number, name in enumerate(classes)} | {None: -1}
        rows = ((numbers[member.class_name], *member[1:4]) for member in members)
        columns = zip(*rows, strict=True) if members else ((), (), (), ())
        return cls(
            tars, classes, Keys.encode(member.key for member in members),
            [np.array(column, kind) for column, kind in zip(columns, _COLUMNS, strict=True)],
        )  # fmt: skip

    def problem(self) -> str:
        """What is wrong with members from a file; empty for nothing."""
        labels_N, tars_N = self.columns[:2]
        is_inside = (labels_N >= -1) & (labels_N < len(self.classes)) & (tars_N < len(self.tars))
        return self.keys.problem() or ("" if is_inside.all() else "a label or a tar that is not there")

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, key: str) -> Member | None:
        position = self.keys.find(key)
        if position is None:
            return None
        label, tar, offset, num_bytes = (int(column[position]) for column in self.columns)
        return Member(key, tar, offset, num_bytes, None if label < 0 else self.classes[label])


def members_path(cache_dir: Path, tars: Sequence[TarStat]) -> Path:
    return cache_dir / f"tars-{digest_json([tar.place for tar in tars])[:16]}.bin"


def load_members(path: Path, tars: Sequence[TarStat]) -> TarMembers | None:
    """What the cache says of these tars; None where there is none, or it is of tars that have changed."""
    try:
        text, body = open_columns(path, read_regular(path))
        header = _Header.from_file(path, text)
        if header.tars != tuple(tars):
            return None
        shape = (header.num_images,)
        lengths_N, block, *columns = cut_columns(
            path, body, [("<u4", shape), ("u1", (header.key_bytes,)), *((kind, shape) for kind in _COLUMNS)]
        )
    except (OSError, DamagedError, DiskError):
        return None
    members = TarMembers(tars, header.classes, Keys(block, lengths_N), columns)
    return None if members.problem() else members


def save_members(path: Path, members: TarMembers) -> None:
    """Where there is no cache folder, or it cannot be written, the headers are read again next time."""
    if not path.parent.is_dir():
        return  # that of another machine
    keys = members.keys
    header = _Header(
        tars=members.tars, classes=members.classes, num_images=len(members), key_bytes=len(keys.block)
    )  # fmt: skip
    columns: list[NDArray[Any]] = [keys.lengths_N, keys.block, *members.columns]
    with contextlib.suppress(DecantError, OSError):
        write_file(path, encode_columns(header.model_dump_json().encode(), columns))
