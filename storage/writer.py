"""Writing a store. A shard is written privately, fsynced, published by rename; then its receipt makes it exist.

plan.json          frozen; two plans never share a folder
images.bin         ordered keys, labels, digests
zarr.json, tokens/ ... or dataset.json, shards/: see zarr_format.py and tar_format.py
receipts/00017.json
attempts/          private; swept when extraction starts
manifest.json      last
"""

import shutil
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from storage.atomic import create_file, disk_errors, make_folder, publish, remove_tree, write_file, write_private
from storage.encodings import Fields
from storage.errors import ConfigError, DamagedError, DiskError
from storage.files import LocalFiles
from storage.fingerprint import crc32c, digest_bytes
from storage.image_index import FILE_NAME as IMAGES_FILE
from storage.image_list import ImageList
from storage.layouts import LAYOUTS
from storage.receipts import committed_shards, read_receipt, receipt_name, receipt_path
from storage.records import (
    BadImage,
    FeatureRecord,
    FileEntry,
    ShardEntry,
    StoreManifest,
    StorePlan,
    refuse_other,
)
from storage.shards import PackedRecord, Pieces, ShardContent, view_to_row


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
    found = find_plan(root)
    if found is None:
        _check_room(root, plan)
    elif found != plan:
        raise ConfigError(f"{root} holds another store: {found.differences(plan)}; choose another folder")
    for name, data in encode_metadata(plan, images).items():
        path = root / name
        if not path.exists() or path.read_bytes() != data:
            write_file(path, data)


def encode_metadata(plan: StorePlan, images: ImageList) -> dict[str, bytes]:
    """The files of a store that belong to no shard, without the manifest."""
    return LAYOUTS[plan.backend].metadata(plan) | {
        IMAGES_FILE: images.at("").to_file(),
        "plan.json": plan.to_file(),
    }


def needed_bytes(plan: StorePlan) -> int:
    """Upper bound of what a store takes on disk, but for its rendered views, of which it is a good guess."""
    per_token = 8 + (6 if plan.token_subset else 0)
    members = 3 + ("token_scale" in plan.fields) + (plan.stored_views is not None)
    framing = 1024 * members + 512 if plan.backend == "wds" else 96  # a tar's headers and the fill of its blocks
    view = 0.5 * plan.stored_views.px**2 if plan.stored_views else 0
    return int(plan.num_records * (plan.record_bytes + per_token * plan.num_kept_tokens + framing + view))


def _check_room(root: Path, plan: StorePlan) -> None:
    needed, free = needed_bytes(plan), shutil.disk_usage(root).free
    if needed > free:
        raise DiskError(
            f"the store needs {needed / 1e9:.1f} GB at {root}, where {free / 1e9:.1f} GB are free; "
            "choose another WORK folder, or fewer VIEWS"
        )


def load_plan(root: Path) -> StorePlan:
    path = root / "plan.json"
    text = path.read_bytes()
    refuse_other(path, text)
    return StorePlan.from_file(path, text)


def find_plan(root: Path) -> StorePlan | None:
    """The plan of the store in a folder, from plan.json or, where that is damaged, from its copy; None for no store.

    Raises:
        DamagedError: there are shards, but nothing tells of what.
    """
    try:
        return load_plan(root)
    except (FileNotFoundError, DamagedError):
        files = LocalFiles(root)
        plan = next(filter(None, (layout.find_plan(files) for layout in LAYOUTS.values())), None)
    if plan is None and any((root / "receipts").glob("*.json")):
        raise DamagedError(
            f"{root} holds shards, but plan.json and its copy are both damaged or gone, so nothing tells of what; "
            "delete the folder and give the command again"
        )
    return plan


class ShardWriter:
    """Collects the records of one shard and commits them in one step."""

    def __init__(self, root: Path, plan: StorePlan, images: ImageList, index: int) -> None:
        """`images` are those of the whole store."""
        self.root, self.plan, self.images, self.index = root, plan, images, index
        self.positions = plan.images_of_shard(index)
        self.keys = [images.keys[position] for position in self.positions]
        self._number = {key: number for number, key in enumerate(self.keys)}
        self._records: list[PackedRecord | None] = [None] * (len(self.keys) * plan.views_per_image)
        self._bad: dict[str, str] = {}

    def append(self, record: FeatureRecord) -> None:
        """Take one record, in any order, and encode it. Its tokens are not copied: leave them as they are until
        `commit`.

        Raises:
            AssertionError: the record is not one of this shard, or its arrays are not those of the plan.
        """
        tokens_TC, plan, shape_TC = record.tokens_TC, self.plan, self.plan.shape_TC
        if tokens_TC.shape != shape_TC or tokens_TC.dtype != np.float16:
            raise AssertionError(f"tokens {tokens_TC.dtype} {tokens_TC.shape}, the plan has float16 {shape_TC}")
        if record.token_mean_T.shape != shape_TC[:1] or record.token_std_T.shape != shape_TC[:1]:
            raise AssertionError(f"statistics of {record.token_mean_T.shape} tokens, the plan has {shape_TC[0]}")
        if not 0 <= record.view_index < plan.views_per_image:
            raise AssertionError(f"view {record.view_index} of {plan.views_per_image}")
        self.append_encoded(record, plan.encoding.encode(tokens_TC))

    def append_encoded(self, record: FeatureRecord, fields: Fields) -> None:
        """Take one record whose tokens are encoded already; `record.tokens_TC` is not looked at."""
        plan, number = self.plan, self._number[record.key]
        if (record.jpeg is None) != (plan.stored_views is None):
            raise AssertionError("a record has a rendered view exactly where the plan says that they are stored")
        stored = _stored_bytes(fields["tokens"], plan.encoding.compressor())
        scales = {name: values for name, values in fields.items() if name != "tokens"}
        self._records[number * plan.views_per_image + record.view_index] = PackedRecord(
            key=record.key,
            label=int(self.images.labels[self.positions[number]]),
            view_index=record.view_index,
            view_F=view_to_row(record.view),
            tokens=stored,
            crc32c=crc32c(stored),
            small={"token_mean": record.token_mean_T, "token_std": record.token_std_T, **scales},
            jpeg=record.jpeg,
        )

    def mark_bad(self, key: str, reason: str) -> None:
        """Leave holes where this image's records would be."""
        self._bad[key] = reason

    def commit(self) -> ShardEntry:
        """Make the shard durable and complete.

        Raises:
            AssertionError: a record is missing.
            DamagedError: the shard was committed before, with other bytes.
            DiskError: no room; nothing of the shard is visible.
        """
        views = self.plan.views_per_image
        wrong = [
            slot for slot, record in enumerate(self._records)
            if (record is None) != (self.keys[slot // views] in self._bad)
        ]  # fmt: skip
        if wrong:
            raise AssertionError(f"shard {self.index}: {len(wrong)} records missing or of bad images, first {wrong[0]}")
        contents = LAYOUTS[self.plan.backend].pack(
            self.plan, ShardContent(self.index, self._records, tuple(self.images.classes))
        )
        return self._publish(contents)

    def _publish(self, contents: dict[str, Pieces]) -> ShardEntry:
        attempt = self.root / "attempts" / f"{self.index:05d}.{uuid.uuid4().hex[:12]}"
        with disk_errors(attempt):
            attempt.mkdir(parents=True)
        try:
            with ThreadPoolExecutor(1) as pool:  # digests are taken while the disk works
                described = pool.submit(
                    describe_shard, self.index, len(self.keys), self.plan, self._records, contents, self._bad
                )
                for name, pieces in contents.items():
                    write_private(attempt / name.replace("/", "_"), *pieces)
                entry = described.result()
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
            return entry
        finally:
            remove_tree(attempt)

    def _not_the_same(self) -> DamagedError:
        return DamagedError(
            f"shard {self.index} was committed before with other bytes: the teacher is not deterministic here; "
            "keep the device, library versions and batch size of the first run"
        )


def _stored_bytes(tokens: Any, compressor: Any | None) -> bytes | memoryview:
    """What is written of one record's tokens: the array's own memory, or a compressed copy."""
    return memoryview(tokens).cast("B") if compressor is None else bytes(compressor.encode(tokens))


def describe_shard(
    index: int, num_images: int, plan: StorePlan, records: Iterable[PackedRecord | None],
    contents: dict[str, Pieces], bad: dict[str, str],
) -> ShardEntry:  # fmt: skip
    """The receipt of a shard."""
    checksums = np.zeros(plan.records_per_shard, "<u4")
    num_records = 0
    for slot, record in enumerate(records):
        if record is not None:
            checksums[slot] = record.crc32c
            num_records += 1
    return ShardEntry(
        index=index,
        num_images=num_images,
        num_records=num_records,
        files=tuple(FileEntry.describe(name, pieces) for name, pieces in contents.items()),
        record_crc32c=checksums.tobytes().hex(),
        bad_images=tuple(BadImage(key=key, reason=reason) for key, reason in sorted(bad.items())),
    )


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
        DamagedError: shards are missing, or the metadata is not what `create_store` wrote.
    """
    plan = load_plan(root)
    shards = committed_shards(root, plan)
    missing = [index for index in range(plan.num_shards) if index not in shards]
    if missing:
        raise DamagedError(f"{len(missing)} of {plan.num_shards} shards of {root} are missing, first {missing[0]}")
    ImageList.from_file(root / IMAGES_FILE, (root / IMAGES_FILE).read_bytes())
    described = LAYOUTS[plan.backend].metadata(plan)
    for name, data in described.items():  # once the manifest holds their digests, nothing would notice
        if (root / name).read_bytes() != data:
            raise DamagedError(f"{root / name} has changed since the store was begun; give the command again")
    names = [IMAGES_FILE, "plan.json", *described]
    manifest = StoreManifest(
        plan=plan,
        metadata=tuple(FileEntry.describe(name, [(root / name).read_bytes()]) for name in sorted(names)),
        receipts=tuple(digest_bytes((root / receipt_name(index)).read_bytes()) for index in range(plan.num_shards)),
        num_records=sum(entry.num_records for entry in shards.values()),
        num_bytes=sum(entry.num_bytes for entry in shards.values()),
        bad_images=tuple(bad for index in range(plan.num_shards) for bad in shards[index].bad_images),
    )
    write_file(root / "manifest.json", manifest.to_file())
    return manifest
