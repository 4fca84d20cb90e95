"""When a job is taken for hung: by a fixed limit, or by what other jobs took; the time that it waits is not its own."""

from collections.abc import Sequence
from unittest.mock import patch

from extract.config import ExecutionConfig
from extract.deadlines import Deadlines
from extract.driver import drive
from extract.jobs import Done, Event, Job, Ready
from storage.stage import StopRequest


def test_deadlines_follow_the_slowest_jobs_and_grow_with_failures() -> None:
    deadlines = Deadlines()
    assert deadlines.limit_seconds() == 3600, "nothing is known yet"
    deadlines.add(2.0)
    assert deadlines.limit_seconds() == 600
    for _ in range(200):
        deadlines.add(300.0)
    assert deadlines.limit_seconds() == 1500
    assert deadlines.limit_seconds(failures=2) == 6000
    deadlines.add(100_000.0)
    assert deadlines.limit_seconds() == 1500, "one that is slow is not what is usual"
    assert Deadlines(7.0).limit_seconds(failures=2) == 7


class SlowWorker:
    """A pool and a clock: each job takes nine seconds, one after the other, and is looked at every three."""

    can_kill, size = True, 1

    def __init__(self) -> None:
        self.now, self.events, self.jobs, self.looks = 0.0, list[Event](), list[Job](), 0
        self.kills = 0

    def monotonic(self) -> float:
        return self.now

    def start(self) -> int:
        self.events.append(Ready(0, 1))
        return 0

    def submit(self, worker: int, job: Job) -> None:
        self.jobs.append(job)

    def wait(self, seconds: float) -> Sequence[Event]:
        if self.events:
            return [self.events.pop()]
        self.now += 3
        self.looks += 1
        if self.looks % 3:
            return []
        job = self.jobs.pop(0)
        return [Done(0, job, job.shard)]

    def kill(self, worker: int) -> None:
        self.kills += 1


def test_the_time_that_a_job_waits_behind_another_is_not_its_own() -> None:
    worker = SlowWorker()
    cfg = ExecutionConfig(job_seconds=10, max_attempts=1)
    with patch("extract.driver.time", worker), patch("extract.worker_state.time", worker):
        outcomes = list(drive(worker, map(Job, range(6)), cfg, find_committed=lambda job: None, stop=StopRequest()))
    assert outcomes == list(range(6))
    assert worker.kills == 1, "at the end"
