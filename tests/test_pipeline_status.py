"""`status` from another terminal: at work, dead, silent, given up; and logs that anybody may have damaged."""

import os
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from extract import events
from extract.events import EventLog, events_path
from pipeline.store_status import runs_of, status_lines
from storage.quarantine import GivenUp, record_given_up

STATE: dict[str, Any] = {
    "shards": 812, "num_shards": 1252, "images": 400_000, "num_images": 640_000, "images_per_second": 85.0,
    "mb_per_second": 12.3, "eta_seconds": 2823, "busy": 0.94, "busy_name": "GPU busy", "workers": 8,
    "workers_lost": 1, "bad": 3, "given_up": 0,
}  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "stores" / "toy-1"
    folder.mkdir(parents=True)
    return folder


def said(store: Path) -> str:
    return "\n".join(status_lines(store))


def test_a_store_at_work(store: Path, decant: Any) -> None:
    EventLog(events_path(store)).write("progress", **STATE)
    assert said(store).splitlines()[0] == f"{store}: at work"
    assert "812/1,252 shards, 400,000/640,000 images  85.0 images/s  12.3 MB/s  eta 47:03  GPU busy 94%" in said(store)
    assert "workers 8 (1 lost so far)  bad images 3" in said(store)
    assert f"process {os.getpid()} on " in said(store) and "which is alive" in said(store)
    assert "812/1,252 shards" in decant("status", "--work", store.parent.parent).out
    assert "at work" in decant("status", store).out, "without a work folder"
    assert not (store / "LOCK").exists() and not list(store.iterdir()), "it looks, and touches nothing"


def test_a_killed_one_is_told_from_one_that_works(store: Path, fork: Callable[[Callable[[], object]], int]) -> None:
    def work() -> None:
        EventLog(events_path(store)).write("progress", **STATE)
        time.sleep(60)

    pid = fork(work)
    end = time.monotonic() + 20
    while not runs_of(store) and time.monotonic() < end:
        time.sleep(0.01)
    assert said(store).startswith(f"{store}: at work")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert said(store).startswith(f"{store}: stopped from outside")
    assert "which is gone" in said(store) and "goes on where it was" in said(store)
    assert "eta" not in said(store)


def test_a_process_number_that_was_given_again_is_not_that_run(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class LongAgo(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(2020, 1, 1, tzinfo=tz)

    with monkeypatch.context() as patched:
        patched.setattr(events, "datetime", LongAgo)
        EventLog(events_path(store)).write("progress", **STATE)
    assert runs_of(store)[0].headline == "stopped from outside"


@pytest.mark.parametrize(("minutes", "headline"), [(0, "at work"), (2, "seems dead")])
def test_of_another_machine_only_silence_tells(store: Path, minutes: int, headline: str) -> None:
    log = EventLog(events_path(store))
    log.run = "elsewhere:7:1"
    log.write("progress", **STATE)
    moment = (datetime.now(UTC) - timedelta(minutes=minutes)).isoformat()
    text = log.path.read_text()
    log.path.write_text(text.replace(text.split('"')[3], moment))
    assert runs_of(store)[0].headline == headline
    assert "process 7 on elsewhere" in said(store)


def test_all_that_fill_a_store_together_are_told(store: Path) -> None:
    for name, kind in (("one:1:1", "end"), ("two:2:2", "progress"), ("three:3:3", "progress")):
        log = EventLog(events_path(store))
        log.run = name
        log.write(kind, outcome="interrupted", **STATE)
    assert [(run.host, run.headline) for run in runs_of(store)] == [("two", "at work"), ("three", "at work")]


def test_how_the_last_run_ended_and_what_was_given_up(store: Path) -> None:
    log = EventLog(events_path(store))
    log.write("progress", **STATE)
    log.write("end", outcome="gave up shards")
    for shard in range(5):
        given_up = GivenUp(shard=shard, reason="OSError: x\x1b[2J", attempts=3, is_deadly=False, host="h", when="w")
        record_given_up(store, given_up)
    assert said(store).startswith(f"{store}: gave up shards")
    assert "5 shards are given up: shard 0 after 3 attempts: OSError: x?[2J; " in said(store)
    assert "and 2 more; --retry-failed tries them again" in said(store) and "\x1b" not in said(store)


@pytest.mark.parametrize(
    "facts",
    [{}, {"shards": "many", "busy": "x", "eta_seconds": None}, {"shards": True, "images": 1e300, "busy": float("nan")},
     {"eta_seconds": -5, "images": [1], "busy_name": {"a": "\x1b"}}, {"eta_seconds": float("inf"), "busy": 0.5}],
)  # fmt: skip
def test_odd_facts_are_shown_as_far_as_they_go(store: Path, facts: dict[str, Any]) -> None:
    EventLog(events_path(store)).write("progress", **facts)
    assert said(store).startswith(f"{store}: at work") and "\x1b" not in said(store)


@pytest.mark.parametrize(
    "damage", ["cut", "noise", "a folder", "a foreign time", "a foreign run", "damaged quarantine"]
)
def test_damage_stops_nothing(store: Path, damage: str, decant: Any) -> None:
    path = events_path(store)
    log = EventLog(path)
    log.run = {"a foreign run": ":::"}.get(damage, log.run)
    log.write("progress", **STATE)
    match damage:
        case "cut":
            path.write_bytes(path.read_bytes()[:-9])
        case "noise":
            path.write_bytes(os.urandom(5000))
        case "a folder":
            path.unlink()
            path.mkdir()
        case "a foreign time":
            text = path.read_text()
            path.write_text(text.replace(text.split('"')[3], "yesterday"))
        case "damaged quarantine":
            (store / "quarantine").mkdir()
            (store / "quarantine" / "00001.json").write_bytes(b"{")
            (store / "quarantine" / "\u0661.json").mkdir()
    assert decant("status", "--work", store.parent.parent).code == 0
    assert decant("status", store).code == 0
