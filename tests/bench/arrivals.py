"""Batches arriving in a training process: threads that fill reused buffers, against DataLoader workers."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.reader import open_store
from storage.ring import iter_filled
from storage.zarr_format import CRC_BYTES, token_shard_name
from tests.bench.made_up import (
    BATCH,
    RECORD_BYTES,
    SHARD_RECORDS,
    VIT_B,
    WARM_RECORDS,
    check_batch,
    new_batch,
    shuffled_batches,
)
from tests.bench.results import Section
from tests.bench.timing import (
    Contender,
    cpu_seconds,
    cpu_seconds_with,
    is_installed,
    one_core,
    race,
    speed_rows,
    wall_seconds,
)
from tests.bench.warm_reads import plain_zarr

ROUNDS, EPOCHS, DEPTH = 7, 4, 4


def ring(store: Path, batches: list[NDArray[np.int64]], threads: int) -> Callable[[], None]:
    """All epochs through a ring, as a trainer takes them; the buffers stay from run to run."""
    reader, buffers = open_store(store, check="never"), [{"tokens": new_batch()} for _ in range(DEPTH)]

    def fill(step: int, buffer: dict[str, NDArray[Any]]) -> NDArray[np.float16]:
        reader.read_encoded(batches[step % len(batches)], buffer)
        return buffer["tokens"]

    def run() -> None:
        free = iter(buffers)
        steps = EPOCHS * len(batches)
        consume(iter_filled(fill, lambda: next(free), 0, steps, threads=threads, depth=DEPTH), batches)

    return run


def consume(arriving: Iterable[Any], batches: list[NDArray[np.int64]]) -> None:
    """Take every batch; the first one must hold what was asked for."""
    for number, tokens_BTC in enumerate(arriving):
        if number == 0:
            check_batch(batches[0][:2], np.asarray(tokens_BTC))


class PlainDataset:
    """What users write for a DataLoader: one array a record, from a file of records."""

    def __init__(self, store: Path) -> None:
        self.paths = [str(store / token_shard_name(shard)) for shard in range(WARM_RECORDS // SHARD_RECORDS)]
        self.descriptors: list[int] = []

    def __len__(self) -> int:
        return WARM_RECORDS

    def __getitem__(self, record: int) -> NDArray[np.float16]:
        if not self.descriptors:  # in the worker
            self.descriptors = [os.open(path, os.O_RDONLY) for path in self.paths]
        tokens_TC = np.empty(VIT_B.shape_TC, np.float16)
        shard, place = divmod(record, SHARD_RECORDS)
        os.preadv(self.descriptors[shard], [memoryview(tokens_TC).cast("B")], place * (RECORD_BYTES + CRC_BYTES))
        return tokens_TC


def _loader(store: Path, workers: int, batches: list[NDArray[np.int64]]) -> Any:
    from torch.utils.data import DataLoader

    # spawned: libraries of other peers run threads in this process, and do not live through a fork
    start = {"multiprocessing_context": "spawn", "persistent_workers": True} if workers else {}
    dataset: Any = PlainDataset(store)
    return DataLoader(dataset, batch_sampler=[batch.tolist() for batch in batches], num_workers=workers, **start)


def measure(store: Path) -> list[Section]:
    """One section of CPU seconds, one of the speed-up that a second thread gives."""
    batches = shuffled_batches(WARM_RECORDS)
    return [_measure_cpu(store, batches), _measure_threads(store, batches)]


def _measure_cpu(store: Path, batches: list[NDArray[np.int64]]) -> Section:
    read, out_BTC, count = plain_zarr(store), new_batch(), EPOCHS * len(batches)
    gigabytes = count * BATCH * RECORD_BYTES / 1e9

    def plain() -> None:
        for number in range(count):
            read(batches[number % len(batches)], out_BTC)

    contenders = [
        Contender("raw preadv into one buffer", "limit", plain),
        Contender("this store's ring, 1 thread", "ours", ring(store, batches, 1), target=0.85),
        Contender("this store's ring, 2 threads", "ours", ring(store, batches, 2)),
    ]
    with one_core():
        seconds = race(contenders, rounds=ROUNDS, clock=cpu_seconds)
    for workers in (0, 2):
        name = f"DataLoader, {workers} workers, default collate"
        contender = Contender(name, "peer", None)
        if is_installed("torch"):
            contender, taken = _race_loader(name, store, batches, workers)
            seconds |= taken
        else:
            seconds[name] = []
        contenders.append(contender)
    method = (
        f"{EPOCHS} shuffled epochs of {WARM_RECORDS:,} records in the page cache, batches of {BATCH}; CPU seconds of "
        f"all processes, best of {ROUNDS} rounds; the DataLoader gives fresh memory, the others reuse theirs"
    )
    return Section(
        "Batches arriving in a training process",
        method,
        speed_rows(contenders, seconds, gigabytes=gigabytes, unit="GB/CPU-s"),
    )


def _race_loader(
    name: str, store: Path, batches: list[NDArray[np.int64]], workers: int
) -> tuple[Contender, dict[str, list[float]]]:
    """Whole epochs of a DataLoader whose workers run already: what it costs to start them is not counted."""
    loader = _loader(store, workers, batches)

    def epoch() -> None:
        consume(loader, batches)

    epoch()
    pids = [worker.pid for worker in loader._iterator._workers] if workers else []
    contender = Contender(name, "peer", epoch, share=1 / EPOCHS)
    taken = race([contender], rounds=ROUNDS, clock=cpu_seconds_with(pids))
    return contender, taken


def _measure_threads(store: Path, batches: list[NDArray[np.int64]]) -> Section:
    contenders = [
        Contender("this store's ring, 1 thread", "limit", ring(store, batches, 1)),
        Contender("this store's ring, 2 threads", "ours", ring(store, batches, 2), target=1.6),
    ]
    seconds = race(contenders, rounds=ROUNDS, clock=wall_seconds)
    gigabytes = EPOCHS * len(batches) * BATCH * RECORD_BYTES / 1e9
    cores = len(os.sched_getaffinity(0))
    method = f"the same batches by wall time on {cores} cores, best of {ROUNDS} rounds that take turns"
    return Section(
        "Speed-up with a second thread", method, speed_rows(contenders, seconds, gigabytes=gigabytes, unit="GB/s")
    )
