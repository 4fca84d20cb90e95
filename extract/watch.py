"""What is said of an extraction while it runs: the progress line, the event log beside each store, the summary."""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from extract.events import EventLog, events_path
from extract.jobs import FailedJob
from extract.summary import summary_lines
from extract.timing import StageSeconds
from storage.errors import first_line
from storage.pace import Pace
from storage.records import ShardEntry
from storage.stage import Interrupted, Progress

DONE_AGAIN = "done again in float32"
"""The note of a shard with views that a lower precision could not hold."""
BEAT_SECONDS = 5.0
"""Between two signs of life in the log."""


class Watch:
    """Hears of everything that an extraction does. For the length of a `with` block, at whose end it says what became
    of the run. Reports from one thread; a second one gives a sign of life every few seconds.

    Args:
        roots: the stores that are filled in one pass, in the order of a shard's receipts.
        busy_name: what is busy while a teacher runs, as the progress line calls it.
    """

    def __init__(self, progress: Progress, roots: Sequence[Path], *, busy_name: str = "teacher busy") -> None:
        self.progress, self.busy_name = progress, busy_name
        self.logs = [EventLog(events_path(root)) for root in roots]
        self.began = time.monotonic()
        self.num_images = self.images_done = self.num_shards = self.shards_done = 0
        self.made = Counter[str]()
        """What this run did: images, records, bytes, shards."""
        self.counts = Counter[str]()
        """How often each kind of note was heard."""
        self.bad: dict[str, str] = {}
        """Key to reason; of this run."""
        self.bad_before = 0
        self.quarantined: dict[int, str] = {}
        """Shard to reason."""
        self.workers: dict[int, float] = {}
        """Those that are up, and since when."""
        self.worker_seconds = 0.0
        """Of those that are not any more."""
        self.seconds = StageSeconds()
        self.images_pace, self.bytes_pace, self.busy_pace = Pace(), Pace(), Pace()
        self.turn = threading.RLock()
        self.is_over = threading.Event()
        self.beats: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Interrupted | KeyboardInterrupt):
            self.end("interrupted")
        elif error is not None:
            self.end(f"failed: {first_line(error)}")
        else:
            self.end("gave up shards" if self.quarantined else "done")

    def begin(self, num_images: int, images_done: int, shards_done: int, shards: int, *, bad: int = 0) -> None:
        """The work is known.

        Args:
            num_images: of the data set; of these, `images_done` are in every store already.
            shards: of all stores together; of these, `shards_done` are committed already.
            bad: unusable images among those that are done.
        """
        self.num_images, self.images_done, self.num_shards, self.shards_done = (
            num_images, images_done, shards, shards_done,
        )  # fmt: skip
        self.bad_before = bad
        if shards_done:
            self.progress.say(f"resuming: {shards_done:,} of {shards:,} shards are done")
        self.progress.start(num_images, "images", done=images_done)
        self._log("begin", **self._state())
        self.beats = threading.Thread(target=self._beat, name="signs of life", daemon=True)
        self.beats.start()

    def note(self, kind: str, **facts: object) -> None:
        """What the driver says of workers and jobs."""
        with self.turn:
            self.counts[kind] += 1
            worker = facts.get("worker")
            if kind == "worker up" and isinstance(worker, int):
                if not self.workers and not self.made:  # until now only workers were started
                    for pace in (self.images_pace, self.bytes_pace, self.busy_pace):
                        pace.begin()
                self.workers[worker] = time.monotonic()
            elif kind in ("worker died", "worker recycled") and isinstance(worker, int) and worker in self.workers:
                self.worker_seconds += time.monotonic() - self.workers.pop(worker)
            if kind == "worker died":
                self.progress.say(f"worker {worker} is lost ({facts.get('reason')}); another one takes its place")
            elif kind == DONE_AGAIN:
                self.made["done again"] += int(str(facts["views"]))
            elif kind == "job failed":
                self.progress.say(f"shard {facts.get('shard')}, attempt {facts.get('attempt')}: {facts.get('reason')}")
            elif kind == "isolating":
                self.progress.say(f"shard {facts.get('shard')} ends its workers; looking for the image that does it")
            elif kind == "survived":
                self.progress.say(f"shard {facts.get('shard')}: none of its images does; it is tried once more")
            elif kind == "isolated":
                self.progress.say(f"shard {facts.get('shard')}: {facts.get('key')} ends every worker, and is left out")
            elif kind == "stopping":
                self.progress.say("stopping: shards that are under way may end; once more stops at once")
            self._log(kind, **facts)

    def shard(
        self, entries: Sequence[ShardEntry | None], seconds: StageSeconds, num_images: int, *, is_ours: bool = True
    ) -> None:
        """A shard is committed.

        Args:
            entries: its receipt in each store; None in one that lacks it still, or had it before.
            num_images: by which the images that are in every store became more.
            is_ours: False for one that another driver committed, which counts as done, not as made.
        """
        with self.turn:
            found = [entry for entry in entries if entry is not None]
            num_bytes = sum(entry.num_bytes for entry in found)
            self.images_done += num_images
            self.shards_done += len(found)
            self.images_pace.add(num_images)
            self.bytes_pace.add(num_bytes)
            for log, entry in zip(self.logs, entries, strict=True):
                if entry is None:
                    continue
                for bad in entry.bad_images:
                    self.bad.setdefault(bad.key, bad.reason)
                    log.write("bad image", key=bad.key, reason=bad.reason, shard=entry.index)
                if is_ours:
                    log.write("shard", **_shard_facts(entry, seconds))
            if is_ours:
                self.made.update(
                    images=num_images, shards=len(found), bytes=num_bytes, records=sum(e.num_records for e in found)
                )
                self.seconds = self.seconds.plus(seconds)
                self.busy_pace.add(seconds.forward)
            self._advance(num_images)

    def given_up(self, failed: FailedJob) -> None:
        with self.turn:
            self.quarantined[failed.job.shard] = failed.reason
            self.progress.say(f"shard {failed.job.shard} is given up: {failed.reason}")
            self._log("given up", shard=failed.job.shard, reason=failed.reason, is_deadly=failed.is_deadly)

    def end(self, outcome: str) -> None:
        """The last word, once: `done`, `interrupted`, or why not."""
        if self.is_over.is_set():
            return
        self.is_over.set()
        if self.beats is not None:
            self.beats.join()
            self._log("progress", **self._state())
        self._log("end", outcome=outcome, **self.summary())
        log = self.logs[0]
        for line in summary_lines(self.summary(), self.bad, str(log.path)):
            self.progress.say(line)
        if log.num_lost:
            self.progress.say(f"{log.num_lost:,} events could not be written to {log.path}: {log.why_lost}")

    def summary(self) -> dict[str, Any]:
        """What this run did, as plain JSON."""
        wall = time.monotonic() - self.began
        worker_seconds = self._worker_seconds()
        return {
            "images": self.made["images"],
            "records": self.made["records"],
            "shards": self.made["shards"],
            "bytes": self.made["bytes"],
            "wall_seconds": round(wall, 2),
            "worker_seconds": round(worker_seconds, 2),
            "images_per_second": round(self.made["images"] / wall, 2) if wall > 0 else None,
            "busy_share": round(self.seconds.forward / worker_seconds, 4) if worker_seconds else None,
            "stage_seconds": {part: round(seconds, 3) for part, seconds in _parts(self.seconds)},
            "done_again": self.made["done again"],
            "retries": self.counts["job failed"],
            "workers_lost": self.counts["worker died"],
            "workers_recycled": self.counts["worker recycled"],
            "bad": self.bad_before + len(self.bad),
            "quarantined": {str(shard): reason for shard, reason in self.quarantined.items()},
        }

    def _worker_seconds(self) -> float:
        return self.worker_seconds + sum(time.monotonic() - since for since in self.workers.values())

    def _advance(self, num_images: int) -> None:
        busy = self._busy()
        facts: dict[str, object] = {
            "shards": f"{self.shards_done:,}/{self.num_shards:,}",
            "MB/s": f"{self.bytes_pace.per_second() / 1e6:,.1f}",
        }
        if busy is not None:
            facts[self.busy_name] = f"{busy:.0%}"
        self.progress.advance(num_images, **facts, bad=self.bad_before + len(self.bad))

    def _busy(self) -> float | None:
        """Share of the workers' time in which the teacher ran; None where nothing tells."""
        if not self.workers or not self.seconds.forward:
            return None
        return min(1.0, self.busy_pace.per_second() / len(self.workers))

    def _state(self) -> dict[str, object]:
        """How far the run is. Everything that one who looks at the log's end needs to know."""
        busy, left = self._busy(), self.images_pace.seconds_for(self.num_images - self.images_done)
        return {
            "shards": self.shards_done,
            "num_shards": self.num_shards,
            "images": self.images_done,
            "num_images": self.num_images,
            "images_per_second": round(self.images_pace.per_second(), 2),
            "mb_per_second": round(self.bytes_pace.per_second() / 1e6, 2),
            "eta_seconds": None if left is None else round(left),
            "busy": None if busy is None else round(busy, 3),
            "busy_name": self.busy_name,
            "workers": len(self.workers),
            "workers_lost": self.counts["worker died"],
            "retries": self.counts["job failed"],
            "bad": self.bad_before + len(self.bad),
            "given_up": len(self.quarantined),
        }

    def _beat(self) -> None:
        while not self.is_over.wait(BEAT_SECONDS):
            with self.turn:
                self._log("progress", **self._state())
                self._advance(0)

    def _log(self, kind: str, **facts: object) -> None:
        for log in self.logs:
            log.write(kind, **facts)


def _shard_facts(entry: ShardEntry, seconds: StageSeconds) -> dict[str, object]:
    return {
        "shard": entry.index,
        "records": entry.num_records,
        "bytes": entry.num_bytes,
        "bad": len(entry.bad_images),
        **{f"{part}_seconds": round(spent, 3) for part, spent in _parts(seconds)},
    }


def _parts(seconds: StageSeconds) -> list[tuple[str, float]]:
    return list(seconds._asdict().items())
