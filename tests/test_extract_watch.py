"""What is said of an extraction while it runs: the line, the log, the summary."""

import time
from pathlib import Path
from typing import Any

import pytest

from extract import watch as watching
from extract.events import Event, events_path, read_tail
from extract.jobs import FailedJob, Job
from extract.timing import StageSeconds
from extract.watch import Watch
from storage.records import BadImage, FileEntry, ShardEntry
from storage.stage import Interrupted


class Heard:
    """A display that only listens."""

    def __init__(self) -> None:
        self.said, self.lines, self.started = list[str](), list[tuple[int, dict[str, object]]](), list[Any]()

    def start(self, total: int, unit: str, done: int = 0) -> None:
        self.started.append((total, unit, done))

    def advance(self, amount: int, **facts: object) -> None:
        self.lines.append((amount, facts))

    def say(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture
def heard() -> Heard:
    return Heard()


def entry(index: int, num_bytes: int = 1_000_000, bad: tuple[str, ...] = ()) -> ShardEntry:
    return ShardEntry(
        store="s", index=index, num_images=4, num_records=8 - 2 * len(bad), record_crc32c="",
        files=(FileEntry(name="t", num_bytes=num_bytes, digest="d"),),
        bad_images=tuple(BadImage(key=key, reason="cut short") for key in bad),
    )  # fmt: skip


def log_of(root: Path) -> list[Event]:
    return read_tail(events_path(root))


def test_a_run_is_told_from_begin_to_end(heard: Heard, tmp_path: Path) -> None:
    root = tmp_path / "store"
    with Watch(heard, [root]) as watch:
        watch.begin(20, 4, 1, 5, bad=1)
        watch.note("worker up", worker=0, seconds=2.0)
        watch.shard([entry(1)], StageSeconds(decode=3, wait=0.5, forward=1.5, write=0.1), 4)
        watch.shard([entry(2, bad=("a/b.jpg",))], StageSeconds(forward=1.0), 4)
        watch.note("worker died", worker=0, reason="killed", shards=[3])
        watch.note("job failed", shard=3, attempt=1, reason="killed")
        watch.note("worker up", worker=1, seconds=0.1)
        watch.shard([entry(3)], StageSeconds(), 4)
        watch.given_up(FailedJob(Job(4), "OSError: no", False))
        summary = watch.summary()
    assert heard.started == [(20, "images", 4)]
    assert [(amount, facts["shards"], facts["bad"]) for amount, facts in heard.lines] == [
        (4, "2/5", 1), (4, "3/5", 2), (4, "4/5", 2),
    ]  # fmt: skip
    assert heard.said[0] == "resuming: 1 of 5 shards are done"
    assert "worker 0 is lost (killed); another one takes its place" in heard.said
    assert "shard 4 is given up: OSError: no" in heard.said
    told = "\n".join(heard.said)
    assert "12 images, 22 records, 3.0 MB in" in told and "1 image is unusable" in told
    assert "  a/b.jpg: cut short" in heard.said
    assert [event.kind for event in log_of(root)] == [
        "begin", "worker up", "shard", "bad image", "shard", "worker died", "job failed", "worker up", "shard",
        "given up", "progress", "end",
    ]  # fmt: skip
    end = log_of(root)[-1].facts
    assert end["outcome"] == "gave up shards"
    for name, expected in {
        "images": 12, "records": 22, "shards": 3, "bytes": 3_000_000, "retries": 1, "workers_lost": 1, "bad": 2,
        "quarantined": {"4": "OSError: no"},
    }.items():  # fmt: skip
        assert end[name] == summary[name] == expected
    assert summary["stage_seconds"] == {"decode": 3, "wait": 0.5, "forward": 2.5, "encode": 0, "write": 0.1}
    progress = log_of(root)[-2].facts
    assert (progress["shards"], progress["num_shards"], progress["images"], progress["bad"]) == (4, 5, 16, 2)


def test_each_store_has_its_own_log(heard: Heard, tmp_path: Path) -> None:
    roots = [tmp_path / "one", tmp_path / "two"]
    with Watch(heard, roots) as watch:
        watch.begin(8, 0, 1, 4)
        watch.shard([entry(0, 10), None], StageSeconds(), 4)
        watch.shard([entry(1, 20), entry(1, 30)], StageSeconds(), 4)
    shards = [[event.facts["bytes"] for event in log_of(root) if event.kind == "shard"] for root in roots]
    assert shards == [[10, 20], [30]]
    assert [facts["shards"] for _, facts in heard.lines] == ["2/4", "4/4"], "a store that had it before is not counted"
    assert watch.summary()["bytes"] == 60


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(Interrupted("SIGTERM"), "interrupted"), (KeyboardInterrupt(), "interrupted"), (ValueError("odd"), "failed: odd")],
)
def test_the_log_says_how_it_ended(error: BaseException, outcome: str, heard: Heard, tmp_path: Path) -> None:
    with pytest.raises(type(error)), Watch(heard, [tmp_path / "s"]) as watch:
        watch.begin(8, 0, 0, 4)
        raise error
    assert (log_of(tmp_path / "s")[-1].kind, log_of(tmp_path / "s")[-1].facts["outcome"]) == ("end", outcome)
    assert not watch.beats or not watch.beats.is_alive()


def test_there_is_a_sign_of_life_also_when_nothing_ends(
    heard: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "BEAT_SECONDS", 0.01)
    with Watch(heard, [tmp_path / "s"]) as watch:
        watch.begin(8, 0, 0, 4)
        end = time.monotonic() + 20
        while len(log_of(tmp_path / "s")) < 4 and time.monotonic() < end:
            time.sleep(0.01)
    assert [event.kind for event in log_of(tmp_path / "s")][:4] == ["begin", "progress", "progress", "progress"]


def test_how_busy_the_teacher_is(heard: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch = Watch(heard, [tmp_path / "s"], busy_name="GPU busy")
    now[0] += 30  # loading; no work yet
    watch.note("worker up", worker=0)
    watch.note("worker up", worker=1)
    for index in range(20):
        now[0] += 2
        watch.shard([entry(index)], StageSeconds(forward=3.0), 4)
    _, facts = heard.lines[-1]
    assert (facts["GPU busy"], facts["MB/s"]) == ("75%", "0.5"), "3 of 4 seconds of two workers"
    assert watch.summary()["busy_share"] == pytest.approx(0.75)
    watch.note("worker died", worker=1)
    now[0] += 2
    watch.shard([entry(21)], StageSeconds(forward=2.0), 4)
    assert watch.summary()["worker_seconds"] == pytest.approx(82)


def test_a_full_disk_is_said_once_at_the_end(heard: Heard, tmp_path: Path) -> None:
    with Watch(heard, [tmp_path / "gone" / "s"]) as watch:
        watch.begin(8, 0, 0, 4)
        watch.shard([entry(0)], StageSeconds(), 4)
    assert [line for line in heard.said if "could not be written" in line] == [
        f"4 events could not be written to {tmp_path}/gone/s.events.jsonl: [Errno 2] No such file or directory: "
        f"'{tmp_path}/gone/s.events.jsonl'"
    ]
