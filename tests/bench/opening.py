"""Opening a store: time, and the memory that parsed indexes take."""

import gc
import shutil
import time
import tracemalloc
from pathlib import Path

import numpy as np

from storage.atomic import write_file
from storage.fingerprint import digest_bytes
from storage.reader import open_store
from storage.receipts import read_receipt
from storage.records import FeatureSpec, StoreManifest
from tests.bench.made_up import SHARD_RECORDS, begin_store, new_batch, tokens_of, write_shard
from tests.bench.results import Row, Section

MANY_SHARDS, ROUNDS = 10_000, 9
TINY = FeatureSpec(teacher="made-up", num_prefix_tokens=0, grid_hw=(1, 1), channels=8)


def measure(folder: Path, store: Path, small_store: Path) -> Section:
    """`store` has eight Zarr shards of full size, `small_store` two tars."""
    many = folder / "many"
    make_many_shards(many)
    rows = (
        _opening("open a store of 2 shards", small_store, 0.005),
        _first_batch("the same, and read a first batch of 64", small_store),
        _opening(f"open a store of {MANY_SHARDS:,} shards", many, 0.1),
        _memory("parsed indexes in memory, Zarr", store),
        _memory("parsed indexes in memory, WebDataset", small_store),
    )
    method = (
        f"files in the page cache, libraries loaded; wall milliseconds, best of {ROUNDS}. Memory: "
        f"allocations that stay after one record of each shard of {SHARD_RECORDS} was read (tracemalloc)"
    )
    shutil.rmtree(many)
    return Section("Opening", method, rows)


def make_many_shards(root: Path) -> None:
    """The manifest of a whole store, of which only the first shard is there: opening looks at no shard."""
    plan, images = begin_store(root, MANY_SHARDS, features=TINY, images_per_shard=1)
    write_shard(root, plan, images, 0, lambda _: tokens_of(0))
    entry = read_receipt(root, plan, 0)
    assert entry is not None
    entries = (entry.model_copy(update={"index": index}) for index in range(MANY_SHARDS))
    manifest = StoreManifest(
        plan=plan, metadata=(), receipts=tuple(digest_bytes(entry.to_file()) for entry in entries),
        num_records=MANY_SHARDS, num_bytes=MANY_SHARDS * entry.num_bytes,
    )  # fmt: skip
    write_file(root / "manifest.json", manifest.to_file())
    reader = open_store(root)
    out = reader.new_batch(1)
    reader.read_encoded(np.array([0]), out)
    assert np.array_equal(out["tokens"][0], tokens_of(0)[:1, :8])


def _best_ms(action: object, rounds: int = ROUNDS) -> tuple[float, tuple[float, ...]]:
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        action()  # type: ignore[operator]
        taken.append(time.perf_counter() - started)
    return min(taken) * 1e3, tuple(taken)


def _opening(what: str, root: Path, target_seconds: float) -> Row:
    value, rounds = _best_ms(lambda: open_store(root))
    return Row(what, "ours", value, "ms", target=target_seconds * 1e3, is_less_better=True, rounds=rounds)


def _first_batch(what: str, root: Path) -> Row:
    out, records_B = {"tokens": new_batch()}, np.arange(0, 1024, 16)
    value, rounds = _best_ms(lambda: open_store(root).read_encoded(records_B, out))
    return Row(what, "ours", value, "ms", is_less_better=True, rounds=rounds, note="with both shards' indexes")


def _memory(what: str, root: Path) -> Row:
    """Bytes a record of all that a reader keeps once it has seen every shard."""
    reader, out = open_store(root, check="never"), {"tokens": new_batch()[:1]}
    reader.read_encoded(np.array([0]), out)  # what the first read imports and keeps is not the index's
    reader = open_store(root, check="never")
    firsts = np.arange(0, reader.plan.num_records, SHARD_RECORDS)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for first in firsts:
        reader.read_encoded(np.array([first]), out)
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    value = (after - before) / reader.plan.num_records
    return Row(what, "ours", value, "bytes a record", target=20, is_less_better=True)
