"""Distillation from a store: against the same step on one batch that stays in memory, and against the teacher in the
loop."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distill.config import DistillConfig, DistillRunConfig
from distill.job import Job
from distill.live import LiveSource
from distill.loop import train
from distill.parallel import ALONE
from distill.session import prepare
from distill.stream import DistillBatch
from distill.student_config import BeitStudent, StudentConfig
from extract.config import ExecutionConfig, ExtractConfig
from extract.run import run as extract
from storage.stage import SilentProgress, StopRequest
from storage.views import RandomResizedCrop
from tests.bench.extraction import cores, write_photographs
from tests.bench.results import Row, Section
from tests.bench.timing import Contender, race, wall_seconds

STEP_AIM, WAIT_AIM, ONLINE_AIM, MEMORY_AIM = 1.05, 0.03, 2.0, 1.03


class Pair(NamedTuple):
    """A teacher and a student of it."""

    name: str
    teacher: str
    student: StudentConfig
    images: int
    batch_size: int
    steps: int
    """Of one run."""
    rounds: int


SMALL = Pair("ViT-S/16 -> ViT-S/16", "dino-s", BeitStudent(width=384, heads=6), 64, 8, 4, 3)
LARGE = Pair("CLIP ViT-L/14 -> ViT-B/16", "clip-l", BeitStudent(input_px=256), 8, 4, 2, 2)
"""At 256 px the student has the teacher's grid of 16 x 16."""


class Source(NamedTuple):
    """Where a step's targets come from."""

    name: str
    layout: str = ""
    """Of the store; empty for the teacher in the loop."""
    is_held: bool = False
    """One batch stays in memory."""


HELD = Source("student only: one batch that stays in memory", "zarr", True)
ZARR, TARS = Source("from a Zarr store and the images", "zarr"), Source("from tars with views", "wds")
ONLINE = Source("the teacher in the loop")


def settings(pair: Pair, layout: str) -> ExtractConfig:
    """Of the store; random weights cost what trained ones do."""
    return ExtractConfig(
        teacher=pair.teacher, weights="random", views=1, layout=layout or "zarr", sampler=RandomResizedCrop(),
        records_per_shard=pair.images,
        run=ExecutionConfig(executor="inline", threads=cores(), device="cpu", audit_records=0),
    )  # fmt: skip


def trainer(pair: Pair, source: Source, folder: Path) -> Callable[[], float]:
    """Trains for a few steps when called; returns the share of the time that it waited for data."""
    store = folder / f"{pair.teacher}-{source.layout}"
    cfg = DistillConfig(
        student=pair.student, epochs=10**6, batch_size=pair.batch_size, online=not source.layout,
        run=DistillRunConfig(device="cpu", trackers=(), loaders=2, image_cache_mb=0, checkpoint_seconds=1e9),
    )  # fmt: skip
    live = LiveSource(entry="extract.online:open_live", settings=settings(pair, "").to_json())
    out = folder / "out"
    out.mkdir(exist_ok=True)
    job = Job(cfg=cfg, inputs={"data": folder / "images.bin", "extract": store}, out_dir=out, live=live)
    session = prepare(job, ALONE, torch.device("cpu"), SilentProgress())
    training = dataclasses.replace(session.training, num_steps=pair.steps)
    batches: Iterator[DistillBatch] = session.stream.batches(0)
    if source.is_held:
        batches = itertools.repeat(session.stream.load(0))
    training = dataclasses.replace(training, batches=lambda start: batches)

    def run() -> float:
        log = train(training, SilentProgress(), StopRequest())
        return log.wait_seconds / log.seconds

    return run


def fill(pair: Pair, layouts: set[str], folder: Path) -> None:
    """Photographs, and stores of them."""
    data = write_photographs(folder, pair.images)
    for layout in sorted(layouts - {""}):
        extract(settings(pair, layout), {"data": data}, folder / f"{pair.teacher}-{layout}")


def measure(folder: Path) -> list[Section]:
    """Two sections."""
    torch.set_num_threads(cores())
    try:
        return [
            fed_steps(SMALL, (HELD, ZARR, TARS, ONLINE), folder / "small"),
            fed_steps(LARGE, (HELD, ZARR, ONLINE), folder / "large"),
            memory(LARGE, (HELD, ZARR, ONLINE), folder / "large"),
        ]
    finally:
        torch.set_num_threads(1)


def fed_steps(pair: Pair, sources: tuple[Source, ...], folder: Path) -> Section:
    """Seconds a step, and the share of waiting."""
    folder.mkdir(parents=True)
    fill(pair, {source.layout for source in sources}, folder)
    waits: dict[str, list[float]] = {source.name: [] for source in sources}

    def noting(source: Source) -> Callable[[], None]:
        run = trainer(pair, source, folder)
        return lambda: waits[source.name].append(run())

    contenders = [Contender(source.name, "limit" if source is HELD else "ours", noting(source)) for source in sources]
    seconds = race(contenders, rounds=pair.rounds, clock=wall_seconds)
    best = {name: min(taken) / pair.steps for name, taken in seconds.items()}
    rows = []
    for source in sources:
        is_online = not source.layout
        ratio = best[source.name] / best[HELD.name]
        rows.append(
            Row(
                source.name, "limit" if source is HELD else "reference" if is_online else "ours", best[source.name],
                "s/step", ratio=ratio, target=None if source is HELD or is_online else STEP_AIM, limit=HELD.name,
                is_less_better=True, rounds=tuple(seconds[source.name]),
            )
        )  # fmt: skip
    for source in sources:
        if source.layout and source is not HELD:
            wait = sum(waits[source.name][1:]) / pair.rounds
            rows.append(
                Row(f"share of waiting, {source.name}", "ours", 100 * wait, "%", target=100 * WAIT_AIM,
                    is_less_better=True)
            )  # fmt: skip
    if pair is LARGE:
        rows.append(
            Row("teacher in the loop, to the store", "ours", best[ONLINE.name] / best[ZARR.name], "x its time",
                target=ONLINE_AIM)
        )  # fmt: skip
    method = (
        f"{pair.name}, float32 on {cores()} cores, batches of {pair.batch_size}, the training loop itself for "
        f"{pair.steps} steps a round with 2 loader threads and no image kept decoded; photographs of 500 x 375; wall "
        f"seconds, best of {pair.rounds} rounds that take turns (each source keeps up to 4 batches made ahead, also "
        "while others have their turn)"
    )
    return Section(f"Distillation, {pair.name}", method, tuple(rows))


def memory(pair: Pair, sources: tuple[Source, ...], folder: Path) -> Section:
    """The most that a process had in memory, by source; each in a process of its own, without what Python and the
    libraries take before."""
    found = {source.name: _peak_bytes(pair, source, folder) for source in sources}
    rows = tuple(
        Row(
            source.name, "limit" if source is HELD else "ours" if source.layout else "reference",
            found[source.name] / 1e9, "GB", ratio=found[source.name] / found[HELD.name],
            target=MEMORY_AIM if source is ZARR else None, limit=HELD.name, is_less_better=True,
        )
        for source in sources
    )  # fmt: skip
    method = (
        f"{pair.name}, {pair.steps} steps of batches of {pair.batch_size} on the CPU: the most memory of a process of "
        "its own, less what it had when all libraries were loaded"
    )
    return Section("Memory of a distillation", method, rows)


def _peak_bytes(pair: Pair, source: Source, folder: Path) -> int:
    words = [sys.executable, "-m", "tests.bench.training", pair.teacher, json.dumps(source), str(folder)]
    printed = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": "."})
    return int(printed.stdout)


def main() -> None:
    """Train a few steps and print what that added to the process's largest size."""
    import extract.online  # noqa: F401  # loaded by each, so that it counts for none

    def peak() -> int:
        """VmHWM: ru_maxrss would begin with what the parent had."""
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024

    teacher, source, folder = sys.argv[1:]
    (pair,) = [pair for pair in (SMALL, LARGE) if pair.teacher == teacher]
    values: list[Any] = json.loads(source)
    before = peak()
    torch.set_num_threads(cores())
    trainer(pair, Source(*values), Path(folder))()
    print(peak() - before)


if __name__ == "__main__":
    main()
