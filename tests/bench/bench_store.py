"""Extraction beside the bare teacher, the store beside plain reads and writes and what others do: one run, one table.

    make bench

Nothing here asserts a time; what is asserted is that every contender reads the right bytes. `bench.json` and
`bench.png` go to the folder that BENCH_FOLDER names (runs/bench).
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bench import (
    arrivals,
    cold_reads,
    executors,
    extraction,
    opening,
    picture,
    scale,
    sizes,
    training,
    warm_reads,
    writes,
)
from tests.bench.made_up import COLD_RECORDS, WARM_RECORDS, make_store
from tests.bench.report import as_text, describe_machine, installed_versions
from tests.bench.results import Report, Row, Section
from tests.bench.write_docs import write_docs


@pytest.mark.timeout(0)
def test_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(os.environ.get("BENCH_FOLDER", "runs/bench"))
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def say(what: str) -> None:
        with capsys.disabled():
            print(f"bench: {time.monotonic() - started:5.0f} s  {what}", flush=True)

    machine = describe_machine()
    with tempfile.TemporaryDirectory(dir=folder, prefix="work-") as work:  # on a disk, where /tmp may be memory
        sections = measure(Path(work), say)
    machine["duration"] = f"{time.monotonic() - started:.0f} s"
    report = Report(machine, installed_versions(), sections)
    report.save(folder / "bench.json")
    picture.draw(report, folder / "bench.png")
    if os.environ.get("BENCH_DOCS"):
        write_docs(report)
    say(f"{folder}/bench.json, {folder}/bench.png\n\n{as_text(report)}")
    assert Report.load(folder / "bench.json") == report


def measure(work: Path, say: Callable[[str], None]) -> tuple[Section, ...]:
    """All sections."""
    zarr_store, wds_store = work / "zarr", work / "wds"
    say(f"writing stores of {COLD_RECORDS:,} and {WARM_RECORDS:,} records")
    make_store(zarr_store, COLD_RECORDS)
    make_store(wds_store, WARM_RECORDS, backend="wds")
    sections: list[Section] = []
    say("shuffled reads")
    sections.append(warm_reads.measure(zarr_store, wds_store, work / "peers"))
    say("batches arriving in a training process")
    sections += arrivals.measure(zarr_store)
    say("cold reads")
    sections.append(cold_reads.measure(zarr_store))
    say("writing shards")
    sections += writes.measure(work / "writes")
    say("pixels")
    sections += pixels()
    say("extraction")
    sections.append(extraction.measure(work / "extraction"))
    say("extraction by workers")
    sections.append(executors.measure(work / "executors"))
    say("distillation")
    sections += training.measure(work / "training")
    say("sizes and opening")
    sections.append(sizes.measure(work / "sizes"))
    sections.append(opening.measure(work / "opening", zarr_store, wds_store))
    say("scale")
    sections.append(scale.measure(work / "scale"))
    return tuple(sections)


def pixels() -> list[Section]:
    """Decoding and cutting, which has a file of its own."""
    from tests.bench import bench_pixels

    rows = tuple(_pixel_row(row) for row in bench_pixels.measure())
    method = (
        f"{bench_pixels.NUM_PHOTOGRAPHS} photographs of {bench_pixels.WIDTH} x {bench_pixels.HEIGHT}, views of "
        f"{bench_pixels.VIEW_PX} px; one core, CPU seconds, best of {bench_pixels.ROUNDS} rounds that take turns"
    )
    return [Section("Pixels", method, rows)]


def _pixel_row(row: dict[str, Any]) -> Row:
    return Row(
        row["what"].strip(), row["role"], row["images_per_second"], "images/CPU-s", ratio=row["ratio"],
        target=row["target"], limit=row["limit_name"], rounds=tuple(row["seconds"]),
    )  # fmt: skip
