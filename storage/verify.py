"""Is a store what was committed? Its structure in seconds, its bytes fully or by sample. Nothing is changed here."""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from storage.atomic import remove_file
from storage.errors import DamagedError, DiskError, InputError
from storage.files import Files
from storage.fingerprint import digest_bytes
from storage.image_index import FILE_NAME as IMAGES_FILE
from storage.image_list import ImageList
from storage.layouts import LAYOUTS
from storage.locations import open_files
from storage.reader import load_manifest
from storage.receipts import receipt_name, receipt_path
from storage.records import FileEntry, ShardEntry, StoreManifest, StorePlan, refuse_other
from storage.shards import SmallFiles
from storage.whitening import STATISTICS_FILE, load_statistics

STORE = -1
"""Stands for the shard of what belongs to no shard: plan, image list, manifest, metadata."""


class Damage(NamedTuple):
    """A file that is not what was committed."""

    shard: int
    name: str
    """Path in the store."""
    found: str
    """The kind of damage, in words: missing, emptied, cut short, too long, changed, swapped, damaged."""


class Structure(NamedTuple):
    """What a store is made of, as far as can be told without reading its data."""

    files: Files
    plan: StorePlan | None
    metadata: tuple[FileEntry, ...]
    shards: dict[int, ShardEntry]
    """Those whose receipts, indexes and file sizes are right."""
    damage: list[Damage]


def check_structure(root: Path | str) -> Structure:
    """Manifest, plan, image list, receipts, shard indexes, and the presence and size of every file.

    Raises:
        InputError: no store there, or one of another format.
    """
    files = open_files(root)
    if not any(files.exists(name) for name in ("plan.json", "manifest.json")):
        raise InputError(f"{root} holds no store (no plan.json)")
    plan, manifest, damage = _check_metadata(files)
    receipts: dict[int, ShardEntry] = {}
    for index in range(plan.num_shards if plan else 0):
        assert plan is not None
        found = _check_receipt(files, plan, index, manifest)
        if isinstance(found, ShardEntry):
            receipts[index] = found
        else:
            damage.append(found)
    shards: dict[int, ShardEntry] = {}
    owners = _owners(receipts)
    for index, entry in receipts.items():
        assert plan is not None
        wrong = _check_shard(files, plan, entry, owners)
        damage += wrong
        if not wrong:
            shards[index] = entry
    if plan and len(shards) == plan.num_shards and not files.exists("manifest.json"):
        damage.append(Damage(STORE, "manifest.json", "missing: all shards are there, but extraction did not end"))
    return Structure(files, plan, manifest.metadata if manifest else (), shards, damage)


def iter_data_damage(structure: Structure, shards: Iterable[int]) -> Iterator[tuple[int, list[Damage]]]:
    """Compare every byte of the metadata (as shard `STORE`) and of some shards with their digests."""
    files = structure.files
    known = {damage.name for damage in structure.damage if damage.shard == STORE}
    whole = [file for file in structure.metadata if file.name not in known]
    yield STORE, [damage for file in whole for damage in _compare(files, STORE, file, {})]
    owners = _owners(structure.shards)
    for index in shards:
        if index in structure.shards:
            entry = structure.shards[index]
            yield index, [damage for file in entry.files for damage in _compare(files, index, file, owners)]


def sample_shards(shards: Iterable[int], fraction: float, seed: int) -> list[int]:
    """A random part of the shards, at least one of them unless `fraction` is 0; in order."""
    every = sorted(shards)
    count = min(len(every), -int(-fraction * len(every) // 1))
    return sorted(random.Random(seed).sample(every, count))


def iter_damage(root: Path | str) -> Iterator[tuple[int, list[Damage]]]:
    """All damage of a store, shard by shard, as shard `STORE` for what belongs to none. Reads everything.

    Raises:
        InputError: no store there, or one of another format.
    """
    structure = check_structure(root)
    by_shard: dict[int, list[Damage]] = {STORE: []}
    for damage in structure.damage:
        by_shard.setdefault(damage.shard, []).append(damage)
    for index, found in iter_data_damage(structure, structure.shards):
        by_shard.setdefault(index, []).extend(found)
    for index in sorted(by_shard):
        if index != STORE or by_shard[index]:
            yield index, by_shard[index]


def _check_metadata(files: Files) -> tuple[StorePlan | None, StoreManifest | None, list[Damage]]:
    """The plan, from wherever it can be read; the manifest of a finished store; what is damaged."""
    plan = manifest = None
    found: dict[str, str] = {}
    try:
        text = files.read("plan.json")
        refuse_other(f"{files.location}/plan.json", text)
        plan = StorePlan.from_file(f"{files.location}/plan.json", text)
    except (DamagedError, DiskError) as error:
        found["plan.json"] = _reason(files, "plan.json", error)
    if files.exists("manifest.json"):
        try:
            manifest = load_manifest(files)
        except (DamagedError, DiskError) as error:
            found["manifest.json"] = _reason(files, "manifest.json", error)
    if plan is None or manifest is None or plan != manifest.plan:
        copy = next(filter(None, (layout.find_plan(files) for layout in LAYOUTS.values())), None)
        if plan and manifest:  # both are whole, so one of them is not from here
            found["manifest.json" if copy == plan else "plan.json"] = "swapped: of another store"
            plan, manifest = (plan, None) if copy == plan else (manifest.plan, manifest)
        plan = plan or (manifest.plan if manifest else copy)
    try:
        images = ImageList.from_file(f"{files.location}/{IMAGES_FILE}", files.read(IMAGES_FILE))
        if plan and images.fingerprint != plan.images_fingerprint:
            found[IMAGES_FILE] = "swapped: the images of another store"
    except (DamagedError, DiskError) as error:
        found[IMAGES_FILE] = _reason(files, IMAGES_FILE, error)
    if plan is not None:
        try:
            load_statistics(files, plan.whitening, plan.features.channels)
        except (DamagedError, DiskError) as error:
            found[STATISTICS_FILE] = _reason(files, STATISTICS_FILE, error)
    for file in manifest.metadata if manifest else ():
        if not found.get(file.name, "").startswith("swapped") and (wrong := _wrong_size(files, file)):
            found[file.name] = wrong
    return plan, manifest, [Damage(STORE, name, problem) for name, problem in found.items()]


def _reason(files: Files, name: str, error: DamagedError | DiskError) -> str:
    """What is wrong with a file that ends with its own digest."""
    size = files.size(name)
    return f"damaged: {error}" if size else "missing" if size is None else "emptied"


def _check_receipt(files: Files, plan: StorePlan, index: int, manifest: StoreManifest | None) -> ShardEntry | Damage:
    name = receipt_name(index)
    if not files.exists(name):
        return Damage(index, name, "missing: not extracted yet, or discarded")
    try:
        data = files.read(name)
        entry = ShardEntry.from_file(f"{files.location}/{name}", data)
    except (DamagedError, DiskError) as error:
        return Damage(index, name, _reason(files, name, error))
    if entry.index != index:
        return Damage(index, name, f"swapped: the receipt of shard {entry.index}")
    if entry.store != plan.fingerprint:
        return Damage(index, name, "swapped: the receipt of another store")
    if manifest is not None and manifest.receipts[index] != digest_bytes(data):
        return Damage(index, name, "swapped: not the receipt that the manifest names")
    return entry


def _check_shard(files: Files, plan: StorePlan, entry: ShardEntry, owners: dict[str, int]) -> list[Damage]:
    """What can be told from sizes and from the shard's index. Of a damaged shard the files are read, to tell how."""
    problem = ""
    if not any(_wrong_size(files, file) for file in entry.files):
        try:
            LAYOUTS[plan.backend].open_shard(plan, entry, SmallFiles(files))
            return []
        except (DamagedError, DiskError) as error:
            problem = str(error)
    damage = [wrong for file in entry.files for wrong in _compare(files, entry.index, file, owners)]
    if problem and not damage:  # every file is what the receipt says
        damage = [Damage(entry.index, receipt_name(entry.index), f"damaged: {problem}")]
    return damage


def _owners(shards: dict[int, ShardEntry]) -> dict[str, int]:
    """Digests of all files, and the shards that they belong to."""
    return {file.digest: index for index, entry in shards.items() for file in entry.files}


def _wrong_size(files: Files, file: FileEntry) -> str:
    """What is wrong with a file's presence and length; empty for nothing."""
    size = files.size(file.name)
    if size is None:
        return "missing"
    if size == file.num_bytes:
        return ""
    kind = "emptied" if size == 0 else "cut short" if size < file.num_bytes else "too long"
    return f"{kind}: {size:,} bytes, committed {file.num_bytes:,}"


def _compare(files: Files, shard: int, file: FileEntry, owners: dict[str, int]) -> list[Damage]:
    """What is wrong with a file, read from its first byte to its last."""
    wrong = _wrong_size(files, file)
    if wrong != "missing":
        try:
            digest = files.digest(file.name)
        except (DamagedError, DiskError) as error:
            return [Damage(shard, file.name, f"unreadable: {error}")]
        if digest == file.digest:
            return []
        if (owner := owners.get(digest, shard)) != shard:
            wrong = f"swapped: holds the bytes of shard {owner}"
        wrong = wrong or f"changed: digest {digest}, committed {file.digest}"
    return [Damage(shard, file.name, wrong)]


def discard_shard(root: Path, index: int) -> None:
    """Forget a damaged shard, so that the next extraction writes it again; for `STORE`, only the manifest."""
    if index != STORE:
        remove_file(receipt_path(root, index))
    remove_file(root / "manifest.json")
