"""Curves reach a file and the trackers that are asked for; a resumed run goes on with them."""

import contextlib
import json
import math
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.config import DistillConfig, DistillRunConfig, OptimConfig
from distill.run import run
from distill.student_config import BeitStudent
from distill.trackers import METRICS_FILE, close_all, open_trackers
from storage.errors import ConfigError, DiskError
from storage.stage import Interrupted, SilentProgress

ToyStore = Callable[..., tuple[Path, Path]]
CFG = DistillConfig(
    student=BeitStudent(input_px=32, patch_px=8, width=32, depth=1, heads=2), epochs=8, batch_size=8,
    optim=OptimConfig(base_lr=0.2, warmup_epochs=1), run=DistillRunConfig(device="cpu", threads=1),
)  # fmt: skip
"""16 images: 16 steps."""


class Watch(SilentProgress):
    """Notes the facts of each step, and raises after one."""

    def __init__(self, stop_after: int = -1) -> None:
        self.facts: list[dict[str, object]] = []
        self.left = stop_after

    def advance(self, amount: int, **facts: object) -> None:
        self.facts.append(facts)
        self.left -= 1
        if self.left == 0:
            import signal

            signal.raise_signal(signal.SIGTERM)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def test_a_file_and_tensorboard_have_every_point_once(toy_store: ToyStore, tmp_path: Path) -> None:
    data, store = toy_store(views=2)
    out, watch = tmp_path / "out", Watch(stop_after=5)
    with pytest.raises(Interrupted):
        run(CFG, {"data": data, "extract": store}, out, watch)
    with (out / METRICS_FILE).open("a") as file:  # killed after the checkpoint, in the middle of a line
        file.write('{"step": 6, "loss": 9.0}\n{"step": 7, "lo')
    again = Watch()
    metrics = run(CFG, {"data": data, "extract": store}, out, again)
    found = lines(out)
    assert [line["step"] for line in found] == list(range(1, 17))
    assert [line["loss"] for line in found] == [point["loss"] for point in metrics["history"]]
    assert all(
        set(line) == {"step", "loss", "lr", "grad_norm", "images_per_second", "data_wait", "memory_gb"}
        for line in found
    )
    assert all(0 <= line["data_wait"] <= 1 and 0.05 < line["memory_gb"] < 30 for line in found)

    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in found
    ]
    assert len(again.facts) == 11
    assert set(again.facts[0]) == {"loss", "lr", "images/s", "wait", "memory"}


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_other_trackers_are_told_the_same(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    fake = types.ModuleType(library)
    fake.init = lambda **options: calls.append(("init", options))  # type: ignore[attr-defined]
    fake.log = lambda values, step: calls.append(("log", (step, values)))  # type: ignore[attr-defined]
    fake.finish = lambda: calls.append(("finish", None))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, library, fake)
    trackers = open_trackers([library], tmp_path, run="name", settings={"a": 1}, start=3)
    for tracker in trackers:
        tracker.log(4, {"loss": 0.5})
    close_all(trackers)
    (_, options), logged, finished = calls
    assert (options["project"], options["name"], options["config"], options["resume"]) == (
        "decant", "name", {"a": 1}, "allow",
    )  # fmt: skip
    assert (logged, finished) == (("log", (4, {"loss": 0.5})), ("finish", None))


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"trackers names wandb, which cannot be imported.*pip install wandb"):
        open_trackers(["wandb"], tmp_path, run="name", settings={}, start=0)


def test_a_run_that_begins_anew_begins_the_file_anew(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "loss": 1.0}\n')
    close_all(open_trackers([], tmp_path, run="name", settings={}, start=0))
    assert not lines(tmp_path)
    (tmp_path / METRICS_FILE).write_text("noise\n")
    close_all(open_trackers([], tmp_path, run="name", settings={}, start=5))
    assert not lines(tmp_path)


def test_numbers_that_are_not_finite_are_no_json(tmp_path: Path) -> None:
    (tracker,) = open_trackers([], tmp_path, run="name", settings={}, start=0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        tracker.log(1, {"loss": math.nan})
    tracker.close()


def test_a_pipe_in_place_of_the_curve_is_not_waited_for(tmp_path: Path) -> None:
    for start in (0, 5):
        (tmp_path / METRICS_FILE).unlink(missing_ok=True)
        os.mkfifo(tmp_path / METRICS_FILE)
        close_all(open_trackers([], tmp_path, run="name", settings={}, start=start))
        assert (tmp_path / METRICS_FILE).read_bytes() == b""


@pytest.mark.parametrize("start", [0, 5])
def test_what_is_in_the_way_of_a_curve_is_told(start: int, tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).mkdir()
    with pytest.raises(DiskError, match=r"metrics\.jsonl: Is a directory; move away what is there"):
        open_trackers([], tmp_path, run="name", settings={}, start=start)
    (tmp_path / METRICS_FILE).rmdir()
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(DiskError, match="tensorboard: Not a directory"):
        open_trackers(["tensorboard"], tmp_path, run="name", settings={}, start=start)


def test_a_curve_that_finds_no_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tracker,) = open_trackers([], tmp_path, run="name", settings={}, start=0)
    with contextlib.suppress(OSError), Path("/dev/full").open("w", buffering=1) as full:  # its end tries again
        monkeypatch.setattr(tracker, "file", full)
        with pytest.raises(DiskError, match=r"metrics\.jsonl: the disk is full"):
            tracker.log(1, {"loss": 0.5})
