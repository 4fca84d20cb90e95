"""Reads of a store that no page cache holds, by wall time, against the disk's own sequential rate on the same files."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from distill.order import Draw, EpochOrder, ViewOrder
from storage.reader import open_store
from storage.ring import iter_filled
from storage.zarr_format import CRC_BYTES, token_shard_name
from tests.bench.made_up import (
    BATCH,
    COLD_RECORDS,
    RECORD_BYTES,
    SHARD_RECORDS,
    VIT_B,
    check_batch,
    new_batch,
    shuffled_batches,
)
from tests.bench.results import Section
from tests.bench.timing import Contender, race, speed_rows, wall_seconds
from tests.bench.warm_reads import plain_zarr

ROUNDS, SLOW, BLOCK, AHEAD, PART, POOL, TARGET = 10, 2, 16, 2, 8, 1024, 0.85
"""Records that follow each other on disk are read in blocks, hinted at some batches ahead; slow peers read 1/PART."""

PIECE_BYTES = 8 * 2**20
Batches = list[NDArray[np.int64]]


def block_shuffled(num_records: int, seed: int = 2) -> Batches:
    """Blocks of records in random order, as an epoch of a training has them."""
    starts = np.random.default_rng(seed).permutation(num_records // BLOCK) * BLOCK
    order_R = (starts[:, None] + np.arange(BLOCK)).reshape(-1)
    return list(order_R.reshape(-1, BATCH).astype(np.int64))


def drop_from_cache(store: Path) -> None:
    """Ask the system to forget the store's files; only pages that are on disk already can be forgotten."""
    for path in store.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def read_ahead(store: Path) -> str:
    """How much the system reads ahead of a sequential reader on this disk."""
    device = store.stat().st_dev
    path = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    return f"{path.read_text().strip()} kB" if path.exists() else "some"


def sequential(store: Path) -> None:
    """Every shard file from its first byte to its last, in large pieces."""
    buffer = memoryview(new_batch()).cast("B")
    for shard in range(COLD_RECORDS // SHARD_RECORDS):
        with open(store / token_shard_name(shard), "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while file.readinto(buffer):
                pass


def sequential_hinted(store: Path) -> None:
    """The same, with the system told of the next 32 MB: as fast as the disk gives, also beside busy neighbours."""
    buffer = memoryview(bytearray(PIECE_BYTES))
    names = [store / token_shard_name(shard) for shard in range(COLD_RECORDS // SHARD_RECORDS)]
    files = [os.open(name, os.O_RDONLY) for name in names]
    pieces = [
        (file, start)
        for file, name in zip(files, names, strict=True)
        for start in range(0, name.stat().st_size, PIECE_BYTES)
    ]
    for number, (file, start) in enumerate(pieces):
        for coming, first in pieces[number and number + 4 : number + 5]:
            os.posix_fadvise(coming, first, PIECE_BYTES, os.POSIX_FADV_WILLNEED)
        os.preadv(file, [buffer], start)
    for file in files:
        os.close(file)


def with_hints(store: Path, batches: Batches, threads: int) -> Callable[[], None]:
    """This store, told of each batch a little before."""
    return lambda: _through_ring(store, batches, threads, hinted=batches, look_ahead=AHEAD)


def _through_ring(store: Path, batches: Batches, threads: int, *, hinted: Batches, look_ahead: int) -> None:
    """As a trainer reads: a ring, which hints at some records with each step."""
    reader = open_store(store, check="never")

    def fill(step: int, buffer: dict[str, NDArray[Any]]) -> NDArray[np.float16]:
        reader.read_encoded(batches[step], buffer)
        return buffer["tokens"]

    def hint(step: int) -> None:
        if step < len(hinted):
            reader.hint(hinted[step])

    arriving = iter_filled(
        fill, lambda: {"tokens": new_batch()}, 0, len(batches), threads=threads, depth=threads + 1, hint=hint,
        look_ahead=look_ahead,
    )  # fmt: skip
    for step, tokens_BTC in enumerate(arriving):
        if step == 0:
            check_batch(batches[0], tokens_BTC)


class TrainersOrder:
    """An epoch as `distill/order.py` draws it, with smaller pools, as the store is small: what a training reads in the
    middle of its run. The first pool lies in the cache when the time begins; the others are announced a pool ahead, as
    blocks, and then read in full shuffle. With several views an image the store holds fewer images, and an epoch reads
    one view of each."""

    def __init__(self, store: Path, *, views: int = 1) -> None:
        self.store, num_images, pool = store, COLD_RECORDS // views, POOL // views
        self.cached_batches, self.share = pool // BATCH, (1 - pool / num_images) / views
        with mock.patch("distill.order.POOL_IMAGES", pool):
            order = EpochOrder(np.arange(num_images), SHARD_RECORDS // views, seed=3)
            view_order = ViewOrder(num_images, views, seed=3)

            def records(draw: Draw) -> NDArray[np.int64]:
                return draw.positions_B * views + view_order.views(draw)

            steps = range(num_images // BATCH)
            self.batches = [records(order.batch(step, BATCH)) for step in steps]
            self.coming = [records(order.coming(step, BATCH)) for step in steps[: (num_images - pool) // BATCH]]

    def prepare(self) -> None:
        drop_from_cache(self.store)
        read, out_BTC = plain_zarr(self.store, COLD_RECORDS), new_batch()
        for records_B in self.batches[: self.cached_batches]:
            read(np.sort(records_B), out_BTC)

    def run(self) -> None:
        _through_ring(self.store, self.batches, 1, hinted=self.coming, look_ahead=1)


def without_hints(store: Path, batches: Batches) -> Callable[[], None]:
    """`preadv` record by record."""

    def run() -> None:
        read, out_BTC = plain_zarr(store, COLD_RECORDS), new_batch()
        for records_B in batches:
            read(records_B, out_BTC)

    return run


def memory_map(store: Path, batches: Batches) -> Callable[[], None]:
    """Memory maps of the shard files, opened anew: mapped pages cannot be dropped from the cache."""

    def run() -> None:
        stride, out_BTC = RECORD_BYTES + CRC_BYTES, new_batch()
        names = [store / token_shard_name(shard) for shard in range(COLD_RECORDS // SHARD_RECORDS)]
        maps = [np.memmap(name, np.uint8, "r")[: SHARD_RECORDS * stride].reshape(-1, stride) for name in names]
        for records_B in batches:
            for slot, record in enumerate(records_B):
                shard, place = divmod(int(record), SHARD_RECORDS)
                out_BTC[slot] = maps[shard][place, :RECORD_BYTES].view(np.float16).reshape(VIT_B.shape_TC)

    return run


def measure(store: Path) -> Section:
    blocks, singles = block_shuffled(COLD_RECORDS), shuffled_batches(COLD_RECORDS)
    part = len(singles) // PART
    drop: Any = {"prepare": lambda: drop_from_cache(store)}
    slow: Any = drop | {"share": 1 / PART, "every": SLOW}
    trainers, of_four = TrainersOrder(store), TrainersOrder(store, views=4)
    contenders = [
        Contender("the disk, sequential, hinted", "limit", lambda: sequential_hinted(store), **drop),
        Contender("the disk, sequential, no hints", "reference", lambda: sequential(store), **drop),
        Contender(
            "this store, blocks of 16, hints, 1 thread", "ours", with_hints(store, blocks, 1), **drop, target=TARGET
        ),
        Contender("this store, blocks of 16, hints, 2 threads", "ours", with_hints(store, blocks, 2), **drop),
        Contender(
            f"this store, trainer's order, pools of {POOL:,}",
            "ours",
            trainers.run,
            prepare=trainers.prepare,
            share=trainers.share,
            target=TARGET,
            note="a full shuffle of each pool, hints a pool ahead",
        ),
        Contender(
            "the same, one of 4 views of each image",
            "ours",
            of_four.run,
            prepare=of_four.prepare,
            share=of_four.share,
            target=TARGET,
            note="a quarter of the store, in single records",
        ),
        Contender("preadv, blocks of 16, no hints", "peer", without_hints(store, blocks), **drop),
        Contender("preadv, single records, no hints", "peer", without_hints(store, singles[:part]), **slow),
        Contender("np.memmap, blocks of 16", "peer", memory_map(store, blocks[:part]), **slow),
        Contender("np.memmap, single records", "peer", memory_map(store, singles[:part]), **slow),
    ]
    seconds = race(contenders, rounds=ROUNDS, clock=wall_seconds)
    gigabytes = COLD_RECORDS * RECORD_BYTES / 1e9
    method = (
        f"{COLD_RECORDS:,} records, {gigabytes:.2f} GB in {COLD_RECORDS // SHARD_RECORDS} shards, dropped from the "
        "page cache before each run (fsync, posix_fadvise; a host below a virtual disk may still cache); wall seconds "
        f"of the best of {ROUNDS} rounds that take turns (memory maps and single records: {ROUNDS // SLOW}, on an "
        f"eighth), ratios as the median of those within a round; the system reads {read_ahead(store)} ahead by itself"
    )
    return Section(
        "Shuffled reads, cold", method, speed_rows(contenders, seconds, gigabytes=gigabytes, unit="GB/s", by_round=True)
    )
