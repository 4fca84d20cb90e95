"""Does anything grow faster than the data? The same steps at 25,000 tiny records and at twice as many, three times."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from tests.bench.results import Row, Section
from tests.bench.scale_data import make_folders, make_tars
from tests.bench.scale_steps import ROUNDS, SHAPES, SHORT_SECONDS, Measured

COUNTS = (25_000, 50_000, 100_000, 200_000)
AIM = 1.15
"""Of the time a record after one doubling; 1 is linear, 2 quadratic."""
MEMORY_DISK, NEEDED_BYTES = Path("/dev/shm"), 4 * 2**30

BySize = Mapping[int, Mapping[str, Measured]]


def measure(folder: Path) -> Section:
    """One section. Each size has a process of its own, so that its memory is its own."""
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=_place(folder), prefix="decant-scale-") as name:
        place = Path(name)
        folders, tars = make_folders(place / "data", list(COUNTS)), make_tars(place / "data", list(COUNTS))
        found = {count: _run(count, folders[count], tars[count], place / "work") for count in COUNTS}
    shapes = " and ".join(f"{-(-COUNTS[-1] // records):,} shards of {records}" for records in SHAPES.values())
    method = (
        f"{COUNTS[-1]:,} JPEGs of a few hundred bytes in a folder of class folders and in one tar, records of 256 "
        f"bytes in {shapes}; one image in a thousand is unusable. Files lie in memory where there is room, and nothing "
        "is synced, since a disk's own moods are larger than what is looked for. CPU seconds of all threads at "
        f"{COUNTS[-1]:,}, of one run, or the best of up to {ROUNDS} within {SHORT_SECONDS:g} s. The ratio is how much "
        f"longer a record takes when there are twice as many, as the mean over the doublings from {COUNTS[0]:,} on (1: "
        "linear, 2: quadratic); then the factor of time of each doubling, records a second, and the process's peak "
        "memory at the smallest and the largest size"
    )
    return Section("Scale", method, rows(found))


def _place(folder: Path) -> Path:
    """A file system in memory where it has room; else the folder itself."""
    has_room = MEMORY_DISK.is_dir() and shutil.disk_usage(MEMORY_DISK).free > NEEDED_BYTES
    return MEMORY_DISK if has_room and os.access(MEMORY_DISK, os.W_OK) else folder


def _run(count: int, images_folder: Path, tar: Path, work: Path) -> dict[str, Measured]:
    work.mkdir()
    command = [sys.executable, "-m", "tests.bench.scale_steps", str(count), str(images_folder), str(tar), str(work)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(work)
    return {name: Measured(*values) for name, values in json.loads(done.stdout).items()}


def rows(found: BySize) -> tuple[Row, ...]:
    """One a step: its time with the most records, and how that has grown."""
    counts = sorted(found)
    return tuple(_row(name, counts, [found[count][name] for count in counts]) for name in found[counts[0]])


def _row(name: str, counts: Sequence[int], steps: Sequence[Measured]) -> Row:
    seconds = [step.seconds for step in steps]
    factors = ", ".join(f"x{after / before:.2f}" for before, after in pairwise(seconds))
    memory = f"{steps[0].peak_bytes / 1e6:,.0f} to {steps[-1].peak_bytes / 1e6:,.0f} MB"
    return Row(
        what=name, role="ours", value=seconds[-1], unit="CPU-s", ratio=growth(counts, seconds), target=AIM,
        limit="linear", is_less_better=True, rounds=tuple(seconds),
        note=f"{factors}; {counts[-1] / seconds[-1]:,.0f} records/CPU-s; {memory}",
    )  # fmt: skip


def growth(counts: Sequence[int], seconds: Sequence[float]) -> float:
    """Time a record after one doubling, as a ratio; counts double from each to the next."""
    doublings = len(counts) - 1
    per_record = (seconds[-1] / counts[-1]) / (seconds[0] / counts[0])
    return float(per_record ** (1 / doublings))
