"""Shards that were given up: `quarantine/00017.json` says why. They are not tried again until somebody asks for it."""

import time
from pathlib import Path

from storage.atomic import read_regular, remove_tree, write_file
from storage.errors import DamagedError
from storage.schema import Sealed

_FOLDER = "quarantine"


class GivenUp(Sealed):
    """Why a shard is not there."""

    shard: int
    reason: str
    attempts: int
    is_deadly: bool
    """It ended the workers that were at it, or had to be ended with them."""
    host: str
    when: str
    """UTC; for people. Nothing is decided by it."""

    @staticmethod
    def now() -> str:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())


def record_given_up(root: Path, given_up: GivenUp) -> None:
    write_file(_path(root, given_up.shard), given_up.to_file())


def find_given_up(root: Path, index: int) -> GivenUp | None:
    """Why a shard was given up; None where it was not, or where nothing tells any more: then it is tried again."""
    path = _path(root, index)
    try:
        found = GivenUp.from_file(path, read_regular(path))
    except (FileNotFoundError, DamagedError):
        return None
    return found if found.shard == index else None


def all_given_up(root: Path) -> list[GivenUp]:
    """Every shard that was given up, in order. For people: nothing is locked."""
    indices = sorted(int(path.stem) for path in root.glob(f"{_FOLDER}/*.json") if path.stem.isdecimal())
    return [found for index in indices if (found := find_given_up(root, index)) is not None]


def forget_given_up(root: Path) -> None:
    """Forget that any shard was given up."""
    remove_tree(root / _FOLDER)


def _path(root: Path, index: int) -> Path:
    return root / _FOLDER / f"{index:05d}.json"
