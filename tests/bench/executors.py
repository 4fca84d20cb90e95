"""The same extraction by one and by two workers, on each executor, against the bare forward pass on as many cores."""

import time
from pathlib import Path

import torch

from extract.config import ExecutionConfig
from extract.events import events_path, read_tail
from extract.run import run
from tests.bench.extraction import BATCH, SHARD, bare_forward, cores, settings, write_photographs
from tests.bench.results import Row, Section

SHARDS, AIM = 6, 0.85
"""As many for each of two workers."""
EXECUTORS = ("process", "ray")


def measure(folder: Path) -> Section:
    """One section."""
    data = write_photographs(folder, SHARD * SHARDS)
    rows: list[Row] = []
    for workers in range(1, min(2, cores()) + 1):
        limit = SHARD / bare_seconds(workers)
        name = f"bare forward pass on {workers} core{'s' if workers > 1 else ''}"
        rows.append(Row(name, "limit", limit, "images/s", ratio=1.0, limit=name, rounds=()))
        for executor in EXECUTORS:
            found = images_per_second(folder / f"{executor}-{workers}", data, executor, workers)
            what = f"{executor}, {workers} worker{'s' if workers > 1 else ''}"
            rows.append(Row(what, "ours", found, "images/s", ratio=found / limit, target=AIM, limit=name, rounds=()))
    method = (
        f"{SHARD * SHARDS} photographs in {SHARDS} shards, ViT-S/16 at 224 px in float32, batches of {BATCH}, one "
        "thread a worker; the whole extraction as `make extract` does it, from the first worker's being up to the last "
        "shard's commit, one run; without the start of Ray and of Python (5 to 10 s), which it takes once"
    )
    return Section("Extraction by workers", method, tuple(rows))


def bare_seconds(threads: int) -> float:
    """For one shard; best of three."""
    torch.set_num_threads(threads)
    forward = bare_forward()
    forward()
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        forward()
        taken.append(time.perf_counter() - began)
    torch.set_num_threads(1)
    return min(taken)


def images_per_second(root: Path, data: Path, executor: str, workers: int) -> float:
    """As the event log beside the store tells."""
    how = ExecutionConfig.model_validate(
        {
            "executor": executor,
            "workers": workers,
            "threads": 1,
            "batch_size": BATCH,
            "device": "cpu",
            "audit_records": 4,
        }
    )
    metrics = run(settings(run=how), {"data": data}, root)
    assert metrics["records"] == SHARD * SHARDS
    events = read_tail(events_path(root))
    first = next(event.run_seconds for event in events if event.kind == "worker up")
    last = max(event.run_seconds for event in events if event.kind == "shard")
    return SHARD * SHARDS / (last - first)
