"""Is every byte of a store what its receipt says?"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from storage.errors import InputError
from storage.fingerprint import digest_file
from storage.records import ShardEntry
from storage.writer import load_plan, read_receipt, receipt_path


class Damage(NamedTuple):
    """A file that is not what was committed."""

    shard: int
    path: Path
    found: str


def iter_damage(root: Path) -> Iterator[tuple[int, list[Damage]]]:
    """Check shard after shard: sizes and digests of all files. Yields each shard with what is wrong in it.

    Raises:
        InputError: no store there.
    """
    if not (root / "plan.json").exists():
        raise InputError(f"{root} holds no store (no plan.json)")
    for index in range(load_plan(root).num_shards):
        entry = read_receipt(root, index)
        if entry is None:
            path = receipt_path(root, index)
            found = "receipt or file sizes wrong" if path.exists() else "not extracted"
            yield index, [Damage(index, path, found)]
        else:
            yield index, _damaged_files(root, entry)


def _damaged_files(root: Path, entry: ShardEntry) -> list[Damage]:
    digests = ((file, digest_file(root / file.name)) for file in entry.files)
    return [
        Damage(entry.index, root / file.name, f"digest {digest}, committed {file.digest}")
        for file, digest in digests
        if digest != file.digest
    ]


def discard_shard(root: Path, index: int) -> None:
    """Forget a damaged shard, so that the next extraction writes it again."""
    receipt_path(root, index).unlink(missing_ok=True)
    (root / "manifest.json").unlink(missing_ok=True)
