"""Writing a shard: privately, fsynced, published by rename; then its receipt makes it exist."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from storage.atomic import create_file, make_folder, publish, read_regular, remove_file, write_private
from storage.attempts import private_attempt
from storage.encodings import Fields
from storage.errors import DamagedError
from storage.fingerprint import crc32c
from storage.image_list import ImageList
from storage.layouts import LAYOUTS
from storage.receipts import read_receipt, receipt_path
from storage.records import BadImage, FeatureRecord, FileEntry, ShardEntry, StorePlan
from storage.shards import PackedRecord, Pieces, ShardContent, view_to_row


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
        receipt = receipt_path(self.root, self.index)
        with private_attempt(self.root, self.index) as attempt:
            with ThreadPoolExecutor(1) as pool:  # digests are taken while the disk works
                described = pool.submit(
                    describe_shard, self.index, len(self.keys), self.plan, self._records, contents, self._bad
                )
                for name, pieces in contents.items():
                    write_private(attempt / name.replace("/", "_"), *pieces)
                entry = described.result()
            is_there = receipt.exists()
            earlier = read_receipt(self.root, self.plan, self.index)
            if earlier is None and is_there:
                remove_file(receipt)  # a damaged one
            elif earlier is not None and earlier != entry:
                raise self._not_the_same()
            for name in contents:
                path = self.root / name
                make_folder(path.parent)
                publish(attempt / name.replace("/", "_"), path)
            written = entry.to_file()
            if not create_file(receipt, written, attempt / "receipt") and read_regular(receipt) != written:
                receipt.unlink()  # of another writer, whose files these no longer are
                raise self._not_the_same()
            return entry

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
        store=plan.fingerprint,
        index=index,
        num_images=num_images,
        num_records=num_records,
        files=tuple(FileEntry.describe(name, pieces) for name, pieces in contents.items()),
        record_crc32c=checksums.tobytes().hex(),
        bad_images=tuple(BadImage(key=key, reason=reason) for key, reason in sorted(bad.items())),
    )
