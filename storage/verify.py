"""Is every byte of a store what was committed?"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from storage.errors import DamagedError, InputError
from storage.fingerprint import digest_file
from storage.image_index import ImageList
from storage.reader import load_manifest
from storage.records import FileEntry, ShardEntry, StoreManifest, StorePlan
from storage.writer import load_plan, receipt_path

STORE = -1
"""Stands for the shard of what belongs to no shard: plan, image list, manifest, Zarr metadata."""


class Damage(NamedTuple):
    """A file that is not what was committed."""

    shard: int
    path: Path
    found: str


def iter_damage(root: Path) -> Iterator[tuple[int, list[Damage]]]:
    """Check sizes and digests of all files. Yields each shard with what is wrong in it; before them, as shard `STORE`,
    what is wrong with the store's other files, if anything is.

    Raises:
        InputError: no store there, or one of a newer format.
    """
    if not any((root / name).exists() for name in ("plan.json", "manifest.json")):
        raise InputError(f"{root} holds no store (no plan.json)")
    plan, manifest, damage = _check_metadata(root)
    if damage:
        yield STORE, damage
    if plan is not None:
        for index in range(plan.num_shards):
            yield index, _check_shard(root, index, manifest)


def _check_metadata(root: Path) -> tuple[StorePlan | None, StoreManifest | None, list[Damage]]:
    """The plan, from wherever it can be read; the manifest of a finished store; what is damaged."""
    plan = manifest = None
    found: dict[str, str] = {}
    try:
        plan = load_plan(root)
    except (FileNotFoundError, DamagedError) as error:
        found["plan.json"] = _reason(error)
    try:
        ImageList.from_file(root / "images.json", (root / "images.json").read_bytes())
    except (FileNotFoundError, DamagedError) as error:
        found["images.json"] = _reason(error)
    if (root / "manifest.json").exists():
        try:
            manifest = load_manifest(root)
            plan = plan or manifest.plan
            found |= {file.name: problem for file in manifest.metadata if (problem := _compare(root, file))}
        except DamagedError as error:
            found["manifest.json"] = _reason(error)
    return plan, manifest, [Damage(STORE, root / name, problem) for name, problem in found.items()]


def _reason(error: FileNotFoundError | DamagedError) -> str:
    return "missing" if isinstance(error, FileNotFoundError) else "does not match its own digest"


def _check_shard(root: Path, index: int, manifest: StoreManifest | None) -> list[Damage]:
    path = receipt_path(root, index)
    try:
        entry = ShardEntry.from_file(path, path.read_bytes())
    except FileNotFoundError:
        return [Damage(index, path, "missing: not extracted yet, or discarded")]
    except DamagedError as error:
        return [Damage(index, path, _reason(error))]
    if entry.index != index or (manifest is not None and manifest.shards[index] != entry):
        return [Damage(index, path, "not the receipt that belongs here")]
    return [Damage(index, root / file.name, found) for file in entry.files if (found := _compare(root, file))]


def _compare(root: Path, file: FileEntry) -> str:
    """What is wrong with a file; empty for nothing."""
    path = root / file.name
    if not path.exists():
        return "missing"
    size = path.stat().st_size
    if size != file.num_bytes:
        return f"{size:,} bytes, committed {file.num_bytes:,}"
    digest = digest_file(path)
    return "" if digest == file.digest else f"digest {digest}, committed {file.digest}"


def discard_shard(root: Path, index: int) -> None:
    """Forget a damaged shard, so that the next extraction writes it again; for `STORE`, only the manifest."""
    if index != STORE:
        receipt_path(root, index).unlink(missing_ok=True)
    (root / "manifest.json").unlink(missing_ok=True)
