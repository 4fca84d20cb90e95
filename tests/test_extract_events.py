"""The event log beside a store: whole lines from several processes, and never a reason to stop."""

import errno
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from extract import events
from extract.events import EventLog, events_path, read_tail

Fork = Callable[[Callable[[], object]], int]


def kinds(path: Path) -> list[str]:
    return [event.kind for event in read_tail(path)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = events_path(tmp_path / "store.one")
    assert path == tmp_path / "store.one.events.jsonl"
    log = EventLog(path)
    log.write("worker up", worker=3, seconds=1.5, run="not ours to say", key="a\nb \udcff")
    log.write("end", outcome="x" * 10_000)
    first, last = read_tail(path)
    assert (first.kind, first.run) == ("worker up", log.run)
    assert first.facts == {"worker": 3, "seconds": 1.5, "key": "a\nb \udcff"}
    assert first.run_seconds <= last.run_seconds and first.time.endswith("+00:00")
    assert len(last.facts["outcome"]) < 600, "one event cannot fill a disk"
    assert [json.loads(line)["kind"] for line in path.read_bytes().splitlines()] == ["worker up", "end"]


def test_processes_may_write_at_a_time(fork: Fork, tmp_path: Path) -> None:
    path = tmp_path / "log"

    def write(name: str) -> None:
        log = EventLog(path)
        for number in range(200):
            log.write(name, number=number, filler="z" * (number * 7 % 400))

    pids = [fork(lambda name=name: write(name)) for name in "abc"]  # type: ignore[misc]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    lines = [line for line in path.read_bytes().splitlines() if line]  # an empty one is no event
    assert len(lines) == 600
    for name in "abc":
        assert [e.facts["number"] for e in read_tail(path) if e.kind == name] == list(range(200))


@pytest.mark.parametrize("torn", [b'{"kind": "shard", "ti', b'{"kind"', b"\x00\xff", b"x"])
def test_a_torn_last_line_costs_nothing_else(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "log"
    EventLog(path).write("begin")
    with path.open("ab") as file:
        file.write(torn)
    assert kinds(path) == ["begin"]
    EventLog(path).write("end")
    assert kinds(path) == ["begin", "end"]


@pytest.mark.parametrize(
    "line",
    [
        b"[1, 2]", b"{}", b"null", b'{"time": 1, "run_seconds": 1, "run": "r", "kind": "k"}', b"[" * 100_000,
        b'{"time": "t", "run_seconds": "x", "run": "r", "kind": "k"}', b"{" + b'"a":' * 60_000, b"{" * 70_000, b"",
    ],
    ids=range(9),
)  # fmt: skip
def test_lines_that_are_no_events_are_passed_over(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "log"
    EventLog(path).write("begin")
    with path.open("ab") as file:
        file.write(line + b"\n")
    EventLog(path).write("end")
    assert kinds(path) == ["begin", "end"]


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = EventLog(path)
    for number in range(100):
        log.write("shard", number=number)
    numbers = [event.facts["number"] for event in read_tail(path, num_bytes=1000)]
    assert 3 <= len(numbers) <= 10
    assert numbers == list(range(100))[-len(numbers) :]
    assert read_tail(tmp_path / "none") == read_tail(tmp_path) == []


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(tmp_path / "no" / "log")
    log.write("begin")
    assert (log.num_lost, "No such file" in log.why_lost) == (1, True)

    log = EventLog(tmp_path / "log")
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) > 150:
            return write(descriptor, data[:40])
        raise OSError(errno.ENOSPC, "No space left on device")

    log.write("begin")
    with monkeypatch.context() as patched:
        patched.setattr(events.os, "write", full)
        log.write("shard", filler="z" * 200)
        log.write("shard")
    log.write("end")
    assert kinds(log.path) == ["begin", "end"], "half a line is followed by a whole one"
    assert (log.num_lost, "No space left" in log.why_lost) == (2, True)


def test_a_limit_on_file_sizes_stops_nothing(fork: Fork, tmp_path: Path) -> None:
    path = tmp_path / "log"

    def write() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        log = EventLog(path)
        for _ in range(20):
            log.write("shard", filler="z" * 100)
        assert log.num_lost >= 15

    assert os.waitpid(fork(write), 0)[1] == 0
    assert path.stat().st_size <= 1000
    assert set(kinds(path)) == {"shard"}
