"""Everything that is done to a data set and its store, with so many tiny records, in a process of its own.

python -m tests.bench.scale_steps <images> <folder of images> <tar> <folder to work in>

prints JSON: for each step its CPU seconds and the process's peak memory meanwhile, in bytes.
"""

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from storage.folder import create_store, finish_store, load_plan, sweep
from storage.image_index import ImageIndex, ImageList, build_index, load_index, save_index
from storage.reader import open_store
from storage.receipts import committed_shards, receipt_path
from storage.records import FeatureSpec, StorePlan
from storage.verify import check_structure, iter_data_damage
from storage.writer import ShardWriter
from tests.bench.made_up import made_up_plan, records_of_shard
from tests.bench.timing import cpu_seconds
from tests.bench.writes import without_fsync

TINY = FeatureSpec(teacher="made-up", num_prefix_tokens=0, grid_hw=(4, 4), channels=8)
SHAPES = {"512 a shard": 512, "16 a shard": 16}
READ_BATCH = 256
BAD_EVERY = 1000
"""Of so many images, the last one is unusable."""
ROUNDS, SHORT_SECONDS = 3, 1.0
"""What changes nothing is done so often, or until it has taken so long."""


class Measured(NamedTuple):
    """One step of one size."""

    seconds: float
    """Of CPU time, user and system, of all threads."""
    peak_bytes: int


class Clock:
    """Takes time and memory of one step after another."""

    def __init__(self) -> None:
        self.steps: dict[str, Measured] = {}

    def __call__(self, name: str, action: Callable[[], Any], *, is_repeatable: bool = True) -> Any:
        """What the action returns. The best round counts, of several where that is short and changes nothing."""
        _forget_peak()
        taken: list[float] = []
        while not taken or (is_repeatable and len(taken) < ROUNDS and sum(taken) < SHORT_SECONDS):
            started = cpu_seconds()
            result = action()
            taken.append(cpu_seconds() - started)
        self.steps[name] = Measured(min(taken), _peak_bytes())
        return result


def _forget_peak() -> None:
    """The system then counts from what is in use now; where it may not be told so, peaks are those since the start."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def run(count: int, images_folder: Path, tar: Path, work: Path) -> dict[str, Measured]:
    """All steps, in the order in which a user meets them."""
    clock = Clock()
    index = plan_images(clock, "folder", images_folder, work, count)
    plan_images(clock, "tar", tar, work, count)
    index_path = work / "images.bin"
    save_index(index_path, index)
    images = clock("index: load", lambda: load_index(index_path).split("train"))
    with without_fsync():
        for shape, images_per_shard in SHAPES.items():
            fill_and_ask(clock, shape, work / shape.replace(" ", "-"), images, images_per_shard)
    return clock.steps


def plan_images(clock: Clock, kind: str, place: Path, work: Path, count: int) -> ImageIndex:
    """List and digest, with nothing known, then with a cache."""

    def plan() -> ImageIndex:
        return build_index(str(place), eval_fraction=0, seed=0, cache_dir=work / f"cache-{kind}")

    index: ImageIndex = clock(f"{kind}: list and digest", plan, is_repeatable=False)
    assert len(index) == count
    again: ImageIndex = clock(f"{kind}: the same from the cache", plan)
    assert again.fingerprint == index.fingerprint
    return index


def fill_and_ask(clock: Clock, shape: str, root: Path, images: ImageList, images_per_shard: int) -> None:
    """Half of a store, the other half as a resumed run, and all questions that a store is asked."""
    plan = made_up_plan(images, features=TINY, images_per_shard=images_per_shard)
    half = plan.num_shards // 2
    clock(f"{shape}: plan and commit half", lambda: resume(root, plan, images, range(half)), is_repeatable=False)
    clock(f"{shape}: resume, half missing", lambda: resume(root, plan, images), is_repeatable=False)
    receipt_path(root, half).unlink()
    clock(f"{shape}: resume, one missing", lambda: resume(root, plan, images), is_repeatable=False)
    clock(f"{shape}: resume, nothing missing", lambda: resume(root, plan, images))
    done = clock(f"{shape}: which shards are there", lambda: committed_shards(root, load_plan(root)))
    assert len(done) == plan.num_shards
    clock(f"{shape}: open, read a batch", lambda: read_shuffled(root, 1))
    clock(f"{shape}: open, read all shuffled", lambda: read_shuffled(root))
    structure = clock(f"{shape}: verify, structure", lambda: check_structure(root))
    assert not structure.damage
    found = clock(f"{shape}: verify, all data", lambda: list(iter_data_damage(structure, structure.shards)))
    assert not any(damage for _, damage in found)


def resume(root: Path, plan: StorePlan, images: ImageList, wanted: Iterable[int] | None = None) -> None:
    """What an extraction does but for the teacher; it ends early where only some shards are wanted."""
    create_store(root, plan, images)
    sweep(root, plan)
    done = committed_shards(root, plan)
    for index in range(plan.num_shards) if wanted is None else wanted:
        if index not in done:
            write_shard(root, plan, images, index)
    if wanted is None:
        finish_store(root)


def write_shard(root: Path, plan: StorePlan, images: ImageList, index: int) -> None:
    writer = ShardWriter(root, plan, images, index)
    for position, record in zip(
        plan.images_of_shard(index), records_of_shard(plan, images, index, tokens_of), strict=True
    ):
        if position % BAD_EVERY == BAD_EVERY - 1:
            writer.mark_bad(record.key, "made up")
        else:
            writer.append(record)
    writer.commit()


def tokens_of(record: int) -> NDArray[np.float16]:
    """(T, C) tokens that differ from all others."""
    values = np.resize(np.array([record], "<u4").view("<u2"), TINY.shape_TC)
    return (values & 0x3BFF).view(np.float16)  # below 1, so no NaN


def read_shuffled(root: Path, num_batches: int | None = None) -> None:
    """Open a store, find its usable images, read batches of them in any order and compare a record of each."""
    store = open_store(root)
    usable = store.usable_images()
    assert len(store.images) - len(usable) == len(store.images) // BAD_EVERY
    order_R = np.random.default_rng(0).permutation(usable)
    out = store.new_batch(READ_BATCH)
    for first in range(0, len(order_R) - READ_BATCH + 1, READ_BATCH)[:num_batches]:
        records_B = order_R[first : first + READ_BATCH]
        store.read_encoded(records_B, out)
        assert np.array_equal(out["tokens"][-1], tokens_of(int(records_B[-1])))


if __name__ == "__main__":
    count, *places = sys.argv[1:]
    print(json.dumps(run(int(count), *map(Path, places))))
