"""Batches arriving in a training process: threads that fill reused buffers, against DataLoader workers."""

import itertools
import os
import threading
from collections.abc import Callable, Iterable
from functools import partial
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
    shared_batch,
    shuffled_batches,
)
from tests.bench.results import Section
from tests.bench.timing import (
    Contender,
    cpu_seconds_with,
    is_installed,
    one_core,
    race,
    speed_rows,
    wall_seconds,
)
from tests.bench.warm_reads import plain_zarr

ROUNDS, WALL_ROUNDS, SLOW, EPOCHS, DEPTH = 15, 30, 3, 4, 4
"""A ring of four buffers: 78 MB, more than the processor's caches hold, as in a training."""


def plain(store: Path, batches: list[NDArray[np.int64]], *, threads: int, depth: int = DEPTH) -> Callable[[], None]:
    """The limit: every batch by `preadv` alone, into some buffers by turns."""
    read, buffers = plain_zarr(store), [shared_batch(number) for number in range(depth)]

    def work(number: int) -> None:
        own = itertools.cycle(buffers[number::threads])
        for step in range(number, EPOCHS * len(batches), threads):
            read(batches[step % len(batches)], next(own))

    def run() -> None:
        others = [threading.Thread(target=work, args=(number,)) for number in range(1, threads)]
        for thread in others:
            thread.start()
        work(0)
        for thread in others:
            thread.join()

    return run


def ring(store: Path, batches: list[NDArray[np.int64]], threads: int) -> Callable[[], None]:
    """All epochs through a ring, as a trainer takes them; the buffers stay from run to run."""
    reader, buffers = open_store(store, check="never"), [{"tokens": shared_batch(number)} for number in range(DEPTH)]

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
    loaders, workers = _loaders(store, batches)
    contenders = [
        Contender(f"raw preadv into {DEPTH} buffers by turns", "limit", plain(store, batches, threads=1)),
        Contender("this store's ring, 1 thread", "ours", ring(store, batches, 1), target=0.85),
        Contender("this store's ring, 2 threads", "ours", ring(store, batches, 2)),
        *loaders,
        Contender(
            "raw preadv into one buffer", "reference", plain(store, batches, threads=1, depth=1),
            note="which stays in the processor's cache",
        ),
    ]  # fmt: skip
    with one_core():
        seconds = race(contenders, rounds=ROUNDS, clock=cpu_seconds_with(workers))
    method = (
        f"{EPOCHS} shuffled epochs of {WARM_RECORDS:,} records in the page cache, batches of {BATCH}; one core, CPU "
        f"seconds of all processes, best of {ROUNDS} rounds that take turns (DataLoader: {ROUNDS // SLOW}, one epoch); "
        "the DataLoader hands out fresh memory, the others fill theirs again"
    )
    rows = speed_rows(contenders, seconds, gigabytes=_gigabytes(batches), unit="GB/CPU-s")
    return Section("Batches arriving in a training process", method, rows)


def _loaders(store: Path, batches: list[NDArray[np.int64]]) -> tuple[list[Contender], list[int]]:
    """DataLoaders whose workers run already, as starting them is not what is measured, and the workers' process ids."""
    contenders, workers = [], []
    for count in (0, 2):
        name, run = f"DataLoader, {count} workers, default collate", None
        if is_installed("torch"):
            loader = _loader(store, count, batches)
            run = partial(consume, loader, batches)
            run()
            workers += [worker.pid for worker in loader._iterator._workers] if count else []
        contenders.append(Contender(name, "peer", run, share=1 / EPOCHS, every=SLOW))
    return contenders, workers


def _gigabytes(batches: list[NDArray[np.int64]]) -> float:
    return EPOCHS * len(batches) * BATCH * RECORD_BYTES / 1e9


def _measure_threads(store: Path, batches: list[NDArray[np.int64]]) -> Section:
    contenders = [
        Contender("this store's ring, 1 thread", "limit", ring(store, batches, 1)),
        Contender("this store's ring, 2 threads", "ours", ring(store, batches, 2), target=1.6),
        Contender("raw preadv, 1 thread", "limit", plain(store, batches, threads=1)),
        Contender(
            "raw preadv, 2 threads", "reference", plain(store, batches, threads=2), note="what this machine gives"
        ),
    ]
    seconds = race(contenders, rounds=WALL_ROUNDS, clock=wall_seconds)
    cores = len(os.sched_getaffinity(0))
    method = f"the same batches by wall time on {cores} cores, best of {WALL_ROUNDS} rounds that take turns"
    rows = speed_rows(contenders, seconds, gigabytes=_gigabytes(batches), unit="GB/s")
    return Section("Speed-up with a second thread", method, rows)
