"""Which shards of a store exist: those whose receipt says so, and whose files are as long as it says."""

from pathlib import Path

from storage.atomic import read_regular
from storage.errors import DamagedError
from storage.files import Files, LocalFiles
from storage.records import ShardEntry, StorePlan


def receipt_name(index: int) -> str:
    return f"receipts/{index:05d}.json"


def receipt_path(root: Path, index: int) -> Path:
    return root / receipt_name(index)


def parse_receipt(files: Files, plan: StorePlan, index: int, data: bytes) -> ShardEntry:
    """A receipt from its bytes.

    Raises:
        DamagedError: it is damaged, or the receipt of another shard or store.
    """
    path = f"{files.location}/{receipt_name(index)}"
    entry = ShardEntry.from_file(path, data)
    if entry.index != index:
        raise DamagedError(f"{path} is the receipt of shard {entry.index}; {ShardEntry.remedy}")
    if entry.store != plan.fingerprint:
        raise DamagedError(f"{path} is the receipt of a shard of another store; {ShardEntry.remedy}")
    return entry


def read_receipt(root: Path, plan: StorePlan, index: int) -> ShardEntry | None:
    """The receipt of a committed shard; None when there is none, or when it or the size of a file it names is wrong.

    Contents are not read here: every record carries a crc32c that reads check, and `iter_damage` checks digests.
    """
    files = LocalFiles(root)
    try:
        entry = parse_receipt(files, plan, index, read_regular(receipt_path(root, index)))
    except (FileNotFoundError, DamagedError):
        return None
    return None if any(files.size(file.name) != file.num_bytes for file in entry.files) else entry


def without_receipt(root: Path, plan: StorePlan) -> list[int]:
    """Shards that are still to be made, at a glance: receipts are not read."""
    return [index for index in range(plan.num_shards) if not receipt_path(root, index).exists()]


def committed_shards(root: Path, plan: StorePlan) -> dict[int, ShardEntry]:
    """All shards that exist."""
    receipts = ((index, read_receipt(root, plan, index)) for index in range(plan.num_shards))
    return {index: entry for index, entry in receipts if entry is not None}
