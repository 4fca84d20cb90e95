"""Made-up records of the size of ViT-B/16's, and stores of them."""

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.folder import create_store, finish_store
from storage.image_index import ImageList
from storage.records import FeatureRecord, FeatureSpec, ImageKey, StorePlan
from storage.views import CentreCrop, Renderer, View
from storage.whitening import LayerNorm
from storage.writer import ShardWriter

VIT_B = FeatureSpec(teacher="made-up", num_prefix_tokens=1, grid_hw=(14, 14), channels=768)
RECORD_BYTES = VIT_B.record_bytes
BATCH = 64
Tokens = Callable[[int], NDArray[np.float16]]
SHARD_RECORDS = 512
WARM_RECORDS = 2 * SHARD_RECORDS
COLD_RECORDS = 8 * SHARD_RECORDS

_VALUES = np.random.default_rng(0).standard_normal(VIT_B.num_tokens * VIT_B.channels + COLD_RECORDS, np.float32)
_SEQUENCE = _VALUES.astype("<f2")


def tokens_of(record: int) -> NDArray[np.float16]:
    """The (T, C) tokens of a record: a window of one random sequence, so that any two records differ."""
    return _SEQUENCE[record : record + VIT_B.num_tokens * VIT_B.channels].reshape(VIT_B.shape_TC)


def new_batch() -> NDArray[np.float16]:
    """A (64, 197, 768) buffer, every page of it in memory."""
    return np.zeros((BATCH, *VIT_B.shape_TC), np.float16)


@cache
def shared_batch(number: int = 0) -> NDArray[np.float16]:
    """Such a buffer, the same one for all contenders: which pages a buffer got moves a copy's speed by a fifth."""
    return new_batch()


def check_batch(records_B: Iterable[int], out_BTC: NDArray[np.float16]) -> None:
    """What was read is what was written."""
    for slot, record in enumerate(records_B):
        assert np.array_equal(out_BTC[slot], tokens_of(int(record))), f"slot {slot} does not hold record {record}"


def shuffled_batches(num_records: int, seed: int = 1) -> list[NDArray[np.int64]]:
    """Every record once."""
    order_R = np.random.default_rng(seed).permutation(num_records).astype(np.int64)
    return [order_R[first : first + BATCH] for first in range(0, num_records, BATCH)]


def made_up_images(count: int) -> ImageList:
    keys = tuple(f"{number:06d}.jpg" for number in range(count))
    digests = tuple(f"{number:032x}" for number in range(count))
    return ImageList(location="", classes=("all",), keys=keys, labels=(0,) * count, digests=digests)


def made_up_plan(images: ImageList, **changes: Any) -> StorePlan:
    values = {
        "features": VIT_B, "whitening": LayerNorm(), "sampler": CentreCrop().to_json(),
        "renderer": Renderer().describe(), "images_fingerprint": images.fingerprint,
        "teacher_fingerprint": "made-up", "teacher": {},
        "num_images": len(images), "views_per_image": 1, "images_per_shard": SHARD_RECORDS,
    }  # fmt: skip
    return StorePlan.model_validate(values | changes)


def records_of_shard(
    plan: StorePlan, images: ImageList, index: int, tokens: Tokens = tokens_of, jpeg: bytes | None = None
) -> Iterator[FeatureRecord]:
    """The records of one shard; `jpeg` stands for each one's rendered view."""
    statistics_T = np.ones(plan.features.num_tokens, np.float32)
    view = View(top=0, left=0, height=224, width=224)
    for position in plan.images_of_shard(index):
        tokens_TC = tokens(position)[: plan.features.num_tokens, : plan.features.channels]
        yield FeatureRecord(ImageKey(images.keys[position]), 0, view, tokens_TC, statistics_T, statistics_T, jpeg)


def begin_store(root: Path, num_images: int, **changes: Any) -> tuple[StorePlan, ImageList]:
    """A store without shards."""
    images = made_up_images(num_images)
    plan = made_up_plan(images, **changes)
    create_store(root, plan, images)
    return plan, images


def make_store(root: Path, num_images: int, **changes: Any) -> StorePlan:
    """A finished store."""
    plan, images = begin_store(root, num_images, **changes)
    for index in range(plan.num_shards):
        write_shard(root, plan, images, index)
    finish_store(root)
    return plan


def write_shard(root: Path, plan: StorePlan, images: ImageList, index: int, tokens: Tokens = tokens_of) -> None:
    """Append and commit."""
    writer = ShardWriter(root, plan, images, index)
    for record in records_of_shard(plan, images, index, tokens):
        writer.append(record)
    writer.commit()


def bytes_on_disk(root: Path) -> int:
    """Of all files below a folder."""
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
