"""Writing a store. A shard is written privately, fsynced, published by rename; then its receipt makes it exist.

plan.json          frozen; two plans never share a folder
images.json        ordered keys, labels, digests
zarr.json, tokens/ token_mean/ token_std/ views/
receipts/00017.json
attempts/          private; swept when extraction starts
manifest.json      last
"""

import shutil
import uuid
from pathlib import Path

import numpy as np

from storage import zarr_format
from storage.atomic import (
    create_file,
    disk_errors,
    make_folder,
    publish,
    remove_tree,
    write_file,
    write_private,
)
from storage.errors import ConfigError, DamagedError, DiskError
from storage.image_index import ImageList
from storage.records import BadImage, FeatureRecord, FileEntry, ShardEntry, StoreManifest, StorePlan, refuse_newer

METADATA_FILES = ("plan.json", "images.json", "zarr.json", *(f"{array}/zarr.json" for array in zarr_format.ARRAYS))
"""What a store holds beside its shards and its manifest."""


def create_store(root: Path, plan: StorePlan, images: ImageList) -> None:
    """Make an unfilled store, or accept the one that is there when it has the same plan; what is damaged or missing of
    its metadata is written again.

    Raises:
        ConfigError: the folder holds a store of another plan; names the first differences.
        DamagedError: the folder holds shards of a plan that nothing tells any more.
        DiskError: not enough room for the whole store.
    """
    if images.fingerprint != plan.images_fingerprint:
        raise AssertionError("the plan was made for other images")
    make_folder(root)
    found = _plan_of(root)
    if found is None:
        _check_room(root, plan)
    elif found != plan:
        raise ConfigError(f"{root} holds another store: {found.differences(plan)}; choose another folder")
    image_list = images.model_copy(update={"location": ""})
    metadata = zarr_format.encode_metadata(plan) | {
        "images.json": image_list.to_file(indent=None),
        "plan.json": plan.to_file(),
    }
    for name, data in metadata.items():
        path = root / name
        if not path.exists() or path.read_bytes() != data:
            write_file(path, data)


def _check_room(root: Path, plan: StorePlan) -> None:
    needed = plan.num_records * (plan.features.record_bytes + 8 * plan.features.num_tokens + 64)
    free = shutil.disk_usage(root).free
    if needed > free:
        raise DiskError(
            f"the store needs {needed / 1e9:.1f} GB at {root}, where {free / 1e9:.1f} GB are free; "
            "choose another WORK folder, or fewer VIEWS"
        )


def load_plan(root: Path) -> StorePlan:
    path = root / "plan.json"
    text = path.read_bytes()
    refuse_newer(path, text)
    return StorePlan.from_file(path, text)


def _plan_of(root: Path) -> StorePlan | None:
    """The plan of the store in a folder, from plan.json or, where that is damaged, from its copy; None for no store."""
    try:
        return load_plan(root)
    except (FileNotFoundError, DamagedError):
        plan = zarr_format.read_plan(root)
    if plan is None and any((root / "receipts").glob("*.json")):
        raise DamagedError(
            f"{root} holds shards, but plan.json and zarr.json are both damaged or gone, so nothing tells of what; "
            "delete the folder and give the command again"
        )
    return plan


class ShardWriter:
    """Collects the records of one shard in memory and commits them in one step."""

    def __init__(self, root: Path, plan: StorePlan, index: int, keys: tuple[str, ...]) -> None:
        """`keys` are those of the whole store, in its order."""
        self.root, self.plan, self.index = root, plan, index
        self.keys = [keys[position] for position in plan.images_of_shard(index)]
        self._slot = {key: number * plan.views_per_image for number, key in enumerate(self.keys)}
        records = len(self.keys) * plan.views_per_image
        tokens = plan.features.num_tokens
        self._tokens_RTC = np.zeros((records, *plan.features.shape_TC), np.float16)
        self._mean_RT = np.full((records, tokens), np.nan, np.float32)
        self._std_RT = np.full((records, tokens), np.nan, np.float32)
        self._views_RF = np.zeros((records, len(zarr_format.VIEW_FIELDS)), np.int32)
        self._bad: dict[str, str] = {}

    def append(self, record: FeatureRecord) -> None:
        """Take one record, in any order."""
        if record.tokens_TC.shape != self.plan.features.shape_TC or record.tokens_TC.dtype != np.float16:
            raise AssertionError(f"tokens {record.tokens_TC.dtype} {record.tokens_TC.shape}, plan {self.plan.features}")
        if not 0 <= record.view_index < self.plan.views_per_image:
            raise AssertionError(f"view {record.view_index} of {self.plan.views_per_image}")
        slot = self._slot[record.key] + record.view_index
        self._tokens_RTC[slot] = record.tokens_TC
        self._mean_RT[slot], self._std_RT[slot] = record.token_mean_T, record.token_std_T
        view = record.view
        self._views_RF[slot] = view.top, view.left, view.height, view.width, view.flip

    def mark_bad(self, key: str, reason: str) -> None:
        """Leave holes where this image's records would be."""
        self._bad[key] = reason

    def commit(self) -> ShardEntry:
        """Make the shard durable and complete.

        Raises:
            AssertionError: a record is missing.
            DiskError: no room; nothing of the shard is visible.
        """
        is_present_R = ~zarr_format.is_hole_R(self._views_RF)
        is_expected_R = np.repeat([key not in self._bad for key in self.keys], self.plan.views_per_image)
        if not np.array_equal(is_present_R, is_expected_R):
            raise AssertionError(f"shard {self.index}: {is_present_R.sum()} records, expected {is_expected_R.sum()}")
        capacity = self.plan.records_per_shard
        small = {
            "token_mean": (self._mean_RT, np.nan),
            "token_std": (self._std_RT, np.nan),
            "views": (self._views_RF, 0),
        }
        contents = {
            zarr_format.token_shard_name(self.index): list(
                zarr_format.encode_token_shard(self._tokens_RTC, is_present_R, capacity)
            )
        } | {
            zarr_format.chunk_name(array, self.index): [
                zarr_format.encode_chunk(zarr_format.pad_records(values, capacity, fill))
            ]
            for array, (values, fill) in small.items()
        }
        entry = ShardEntry(
            index=self.index,
            num_images=len(self.keys),
            num_records=int(is_present_R.sum()),
            files=tuple(FileEntry.describe(name, pieces) for name, pieces in contents.items()),
            bad_images=tuple(BadImage(key=key, reason=reason) for key, reason in sorted(self._bad.items())),
        )
        self._publish(entry, contents)
        return entry

    def _publish(self, entry: ShardEntry, contents: dict[str, list[bytes]]) -> None:
        attempt = self.root / "attempts" / f"{self.index:05d}.{uuid.uuid4().hex[:12]}"
        with disk_errors(attempt):
            attempt.mkdir(parents=True)
        try:
            for name, pieces in contents.items():
                write_private(attempt / name.replace("/", "_"), *pieces)
            earlier = read_receipt(self.root, self.index)
            receipt = receipt_path(self.root, self.index)
            if earlier is None:
                receipt.unlink(missing_ok=True)  # a damaged one
            elif earlier != entry:
                raise self._not_the_same()
            for name in contents:
                path = self.root / name
                make_folder(path.parent)
                publish(attempt / name.replace("/", "_"), path)
            if not create_file(receipt, entry.to_file()) and receipt.read_bytes() != entry.to_file():
                receipt.unlink()  # of another writer, whose files these no longer are
                raise self._not_the_same()
        finally:
            remove_tree(attempt)

    def _not_the_same(self) -> DamagedError:
        return DamagedError(
            f"shard {self.index} was committed before with other bytes: the teacher is not deterministic here; "
            "keep the device, library versions and batch size of the first run"
        )


def receipt_path(root: Path, index: int) -> Path:
    return root / "receipts" / f"{index:05d}.json"


def read_receipt(root: Path, index: int) -> ShardEntry | None:
    """The receipt of a committed shard; None when there is none, or when it or the size of a file it names is wrong.

    Contents are not read here: every record carries a crc32c that each read checks, and `iter_damage` checks digests.
    """
    path = receipt_path(root, index)
    try:
        entry = ShardEntry.from_file(path, path.read_bytes())
        if entry.index != index or any((root / f.name).stat().st_size != f.num_bytes for f in entry.files):
            return None
    except (FileNotFoundError, DamagedError):
        return None
    return entry


def committed_shards(root: Path, plan: StorePlan) -> dict[int, ShardEntry]:
    """All shards that exist."""
    receipts = ((index, read_receipt(root, index)) for index in range(plan.num_shards))
    return {index: entry for index, entry in receipts if entry is not None}


def sweep(root: Path, plan: StorePlan) -> None:
    """Remove what interrupted writers left, and receipts whose files are gone. Only while holding the store's lock."""
    remove_tree(root / "attempts")
    committed = committed_shards(root, plan)
    for index in range(plan.num_shards):
        if index not in committed:
            receipt_path(root, index).unlink(missing_ok=True)
    if len(committed) < plan.num_shards:
        (root / "manifest.json").unlink(missing_ok=True)
    for pattern in (".*.partial", "*/.*.partial"):
        for private in root.glob(pattern):
            private.unlink(missing_ok=True)


def finish_store(root: Path) -> StoreManifest:
    """Write the manifest: from now on the folder is a store.

    Raises:
        DamagedError: shards are missing.
    """
    plan = load_plan(root)
    shards = committed_shards(root, plan)
    missing = [index for index in range(plan.num_shards) if index not in shards]
    if missing:
        raise DamagedError(f"{len(missing)} of {plan.num_shards} shards of {root} are missing, first {missing[0]}")
    manifest = StoreManifest(
        plan=plan,
        metadata=tuple(FileEntry.describe(name, [(root / name).read_bytes()]) for name in METADATA_FILES),
        shards=tuple(shards[index] for index in range(plan.num_shards)),
    )
    write_file(root / "manifest.json", manifest.to_file())
    return manifest
