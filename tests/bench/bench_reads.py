"""Shuffled reads of ViT-B/16 records from a store, against plain `preadv` of the same bytes and against zarr-python.

    make bench

Every read ends in a buffer that the caller owns. Files are warm (page cache); seconds are CPU seconds of this process,
the best of several rounds that take turns, so a noisy neighbour does not decide the ratio.
"""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from storage.image_index import ImageList
from storage.reader import open_store
from storage.records import FeatureRecord, FeatureSpec, ImageKey, StorePlan
from storage.views import CentreCrop, Renderer, View
from storage.writer import ShardWriter, create_store, finish_store
from storage.zarr_format import token_shard_name

NUM_IMAGES, BATCH, ROUNDS = 1024, 64, 7
VIT_B = FeatureSpec(teacher="made-up", num_prefix_tokens=1, grid_hw=(14, 14), channels=768)


@pytest.fixture(scope="module")
def store_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,024 records of 302,592 bytes in two shards."""
    root = tmp_path_factory.mktemp("bench") / "store"
    keys = tuple(f"{number:05d}.jpg" for number in range(NUM_IMAGES))
    images = ImageList(location="", classes=(), keys=keys, labels=(-1,) * NUM_IMAGES, digests=keys)
    plan = StorePlan(
        features=VIT_B, whitening={}, sampler=CentreCrop().to_json(), renderer=Renderer().describe(),
        images_fingerprint=images.fingerprint, teacher_fingerprint="made-up", teacher={}, num_images=NUM_IMAGES,
        views_per_image=1, images_per_shard=512,
    )  # fmt: skip
    create_store(root, plan, images)
    generator = np.random.default_rng(0)
    statistics_T = np.ones(VIT_B.num_tokens, np.float32)
    for index in range(plan.num_shards):
        writer = ShardWriter(root, plan, index, keys)
        for key in writer.keys:
            tokens_TC = generator.standard_normal(VIT_B.shape_TC, np.float32).astype(np.float16)
            view = View(top=0, left=0, height=224, width=224)
            writer.append(FeatureRecord(ImageKey(key), 0, view, tokens_TC, statistics_T, statistics_T))
        writer.commit()
    finish_store(root)
    return root


def test_shuffled_reads(store_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order_R = np.random.default_rng(1).permutation(NUM_IMAGES).astype(np.int64)
    reader, array = open_store(store_root), zarr.open_group(str(store_root), mode="r")["tokens"]
    files = [os.open(store_root / token_shard_name(shard), os.O_RDONLY) for shard in range(2)]
    out_BTC = np.empty((BATCH, *VIT_B.shape_TC), np.float16)

    def plain(batch_B: NDArray[np.int64]) -> None:
        for slot, record in enumerate(batch_B):
            shard, place = divmod(int(record), 512)
            os.preadv(files[shard], [memoryview(out_BTC[slot]).cast("B")], place * (VIT_B.record_bytes + 4))

    def zarr_python(batch_B: NDArray[np.int64]) -> None:
        for slot, record in enumerate(batch_B):
            out_BTC[slot] = array[int(record)]

    readers: dict[str, Callable[[NDArray[np.int64]], None]] = {
        "plain preadv": plain,
        "this store, crc32c checked": lambda batch_B: reader.read_batch(batch_B, out_BTC),
        "zarr-python, one record a call": zarr_python,
    }
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(ROUNDS):
        for name, read in readers.items():
            started = time.process_time()
            for first in range(0, NUM_IMAGES, BATCH):
                read(order_R[first : first + BATCH])
            seconds[name].append(time.process_time() - started)
    best = {name: min(values) for name, values in seconds.items()}
    gigabytes = NUM_IMAGES * VIT_B.record_bytes / 1e9
    with capsys.disabled():
        print(
            f"\n{NUM_IMAGES} records of {VIT_B.record_bytes:,} bytes, shuffled, warm, best of {ROUNDS} rounds;", end=" "
        )
        print(f"{platform.machine()}, Python {platform.python_version()}, zarr {zarr.__version__}")
        for name, value in best.items():
            print(
                f"  {name:32} {gigabytes / value:6.2f} GB/CPU-s   {best['plain preadv'] / value:5.2f} of plain preadv"
            )
