"""The driver against workers that do the worst: whatever happens in whatever order, no job is lost, none is handed out
twice at a time, none is blamed for another."""

import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extract.config import ExecutionConfig
from extract.driver import drive
from extract.jobs import Died, Done, Event, FailedJob, Job, Raised, Ready
from storage.errors import DecantError
from storage.stage import Interrupted, StopRequest

FATES = ["is done", "is done", "raises", "ends its worker", "hangs"]
"""What a job does whenever it is tried."""
DEADLY = {"ends its worker", "hangs"}
JOB_SECONDS, ATTEMPTS = 10.0, 3


class Clock:
    """Stands in for the module `time`."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class FakeWorker:
    def __init__(self) -> None:
        self.is_up = self.is_dead = False
        self.jobs: list[Job] = []


class World:
    """Workers, other drivers and a store: what happens next is drawn, and each call of the driver is checked."""

    can_kill = True

    def __init__(self, data: st.DataObject, clock: Clock) -> None:
        self.clock, self.stop = clock, StopRequest()
        self.fates = data.draw(st.lists(st.sampled_from(FATES), min_size=1, max_size=8), "fates")
        self.size, self.at_a_time = data.draw(st.integers(1, 3), "size"), data.draw(st.integers(1, 3), "at a time")
        self.accidents, self.accidents_left = 0, data.draw(st.integers(0, ATTEMPTS - 1), "accidents")
        self.failed_starts_left = data.draw(st.integers(0, 6), "failed starts")
        self.waits_to_stop = data.draw(st.none() | st.integers(1, 30), "waits to stop")
        shards = st.integers(0, len(self.fates) - 1)
        self.looks_left = data.draw(st.dictionaries(shards, st.integers(1, 4), max_size=3), "taken by another driver")
        self.done_elsewhere = {shard for shard in self.looks_left if data.draw(st.booleans(), "done there")}
        self.order = random.Random(data.draw(st.integers(0, 2**32), "order"))
        """Of events: a seed; drawn one by one, an endless run would pass for an invalid case."""
        self.numbers, self.workers = itertools.count(), dict[int, FakeWorker]()
        self.committed, self.claimed, self.tries = set[int](), set[int](), [0] * len(self.fates)

    # ---- of the store and other drivers

    def find_committed(self, job: Job) -> str | None:
        if job.shard in self.done_elsewhere and not self.looks_left[job.shard]:
            self.committed.add(job.shard)
        return f"done {job.shard}" if job.shard in self.committed else None

    def take(self, job: Job) -> bool:
        if self.looks_left.get(job.shard):
            self.looks_left[job.shard] -= 1
            return False
        self.claimed.add(job.shard)
        return True

    def release(self, job: Job) -> None:
        self.claimed.discard(job.shard)

    # ---- of a pool

    def start(self) -> int:
        number = next(self.numbers)
        self.workers[number] = FakeWorker()
        assert len(self.workers) <= self.size
        return number

    def submit(self, worker: int, job: Job) -> None:
        assert not self.stop, "nothing is begun after a stop"
        assert job.shard in self.claimed, "it is another driver's"
        assert job.shard not in self.committed, "it is done"
        assert job.shard not in {held.shard for found in self.workers.values() for held in found.jobs}
        found = self.workers[worker]
        assert found.is_up
        found.jobs.append(job)
        assert len(found.jobs) <= max(2, self.at_a_time)

    def kill(self, worker: int) -> None:
        found = self.workers.pop(worker)
        for job in found.jobs[: 0 if found.is_dead or self.stop else self.at_a_time]:
            self.tries[job.shard] += self.fates[job.shard] == "hangs"
        under_way = [self.fates[job.shard] for job in found.jobs[: self.at_a_time]]
        assert found.is_dead or self.stop or not under_way or "hangs" in under_way, "a healthy worker was ended"

    def wait(self, seconds: float) -> Sequence[Event]:
        if self.waits_to_stop is not None:
            self.waits_to_stop -= 1
            if self.waits_to_stop == 0:
                self.stop.signal_name = "SIGINT"
        possible = [event for number, found in self.workers.items() for event in self._possible(number, found)]
        if not possible:
            self.clock.sleep(seconds)
            return []
        event = self.order.choice(possible)
        self._happens(event)
        return [event, event] if isinstance(event, Died) and self.order.random() < 0.5 else [event]

    def _possible(self, number: int, found: FakeWorker) -> Iterator[Event]:
        if found.is_dead:
            return
        if not found.is_up:
            yield Ready(number, self.at_a_time)
            if self.failed_starts_left:
                yield Died(number, "while it was made")
                yield Raised(number, None, TypeError("cannot be made"))
            return
        for job in found.jobs[: self.at_a_time]:
            match self.fates[job.shard]:
                case "is done":
                    yield Done(number, job, f"done {job.shard}")
                    if self.accidents_left:
                        yield Died(number, f"after it committed {job.shard}")
                case "raises":
                    yield Raised(number, job, ValueError("no luck"))
                case "ends its worker":
                    yield Died(number, f"of {job.shard}")
        if self.accidents_left:
            yield Died(number, "by accident")

    def _happens(self, event: Event) -> None:
        found = self.workers[event.worker]
        match event:
            case Ready():
                found.is_up = True
            case Done():
                found.jobs.remove(event.job)
                self.committed.add(event.job.shard)
            case Raised(job=Job() as job):
                found.jobs.remove(job)
                self.tries[job.shard] += 1
            case _:
                found.is_dead = True
                self.failed_starts_left -= not found.is_up
                reason = event.reason if isinstance(event, Died) else ""
                is_accident = found.is_up and not reason.startswith("of ")
                self.accidents_left -= is_accident
                self.accidents += is_accident
                if reason.startswith("of "):
                    self.tries[int(reason.removeprefix("of "))] += 1
                if reason.startswith("after it committed "):
                    self.committed.add(int(reason.rpartition(" ")[2]))


def carry_out(world: World, clock: Clock, recycle_after: int) -> list[str | FailedJob]:
    cfg = ExecutionConfig(max_attempts=ATTEMPTS, job_seconds=JOB_SECONDS, recycle_after=recycle_after)
    outcomes: list[str | FailedJob] = []
    with ExitStack() as stack:
        for module in ("driver", "worker_state"):
            stack.enter_context(patch(f"extract.{module}.time", clock))
        jobs = map(Job, range(len(world.fates)))
        for outcome in drive(
            world, jobs, cfg, find_committed=world.find_committed, stop=world.stop, claims=world
        ):  # fmt: skip
            outcomes.append(outcome)
            assert len(outcomes) <= len(world.fates)
    return outcomes


@given(st.data(), st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_every_job_ends_once_and_as_it_deserves(data: st.DataObject, recycle_after: int) -> None:
    """Accidents are fewer than attempts, so that they alone never give a job up."""
    clock = Clock()
    world = World(data, clock)
    try:
        outcomes = carry_out(world, clock, recycle_after)
    except Interrupted:
        assert world.stop
        assert clock.now < 10_000
    else:
        done = {outcome for outcome in outcomes if isinstance(outcome, str)}
        failed = {outcome.job.shard: outcome for outcome in outcomes if isinstance(outcome, FailedJob)}
        fates = {
            shard: "is done" if shard in world.done_elsewhere else fate for shard, fate in enumerate(world.fates)
        }  # fmt: skip
        assert len(outcomes) == len(fates)
        assert done == {f"done {shard}" for shard, fate in fates.items() if fate == "is done"}
        assert set(failed) == {shard for shard, fate in fates.items() if fate != "is done"}
        for shard, found in failed.items():
            if fates[shard] in DEADLY:
                assert found.is_deadly
                assert found.job.halvings == ATTEMPTS
                if not world.accidents:
                    assert found.reason.startswith("hung" if fates[shard] == "hangs" else f"of {shard}")
            if world.at_a_time == 1 and not world.accidents:
                assert world.tries[shard] == ATTEMPTS, "one that only waited was not to blame"
        assert not world.claimed, "claims of what is over are given back"
    assert not world.workers, "no worker outlives the drive"


class Doomed:
    """Workers that die of everything, or before they are up."""

    can_kill, size = True, 2

    def __init__(self, *, dies_of: range, is_up: bool = True) -> None:
        self.dies_of, self.is_up = dies_of, is_up
        self.numbers, self.jobs = itertools.count(), dict[int, list[Job]]()
        self.events: list[Event] = []

    def start(self) -> int:
        number = next(self.numbers)
        self.jobs[number] = []
        self.events.append(Ready(number, 1) if self.is_up else Died(number, "never came up"))
        return number

    def submit(self, worker: int, job: Job) -> None:
        self.jobs[worker].append(job)

    def wait(self, seconds: float) -> Sequence[Event]:
        events, self.events = self.events, []
        for number, jobs in self.jobs.items():
            if jobs and jobs[0].shard in self.dies_of:
                events.append(Died(number, "segmentation fault"))
            elif jobs:
                job = jobs.pop(0)
                events.append(Done(number, job, f"done {job.shard}"))
        return events

    def kill(self, worker: int) -> None:
        del self.jobs[worker]


def drive_doomed(pool: Doomed, num_jobs: int) -> list[str | FailedJob]:
    cfg = ExecutionConfig(max_attempts=ATTEMPTS)
    return list(drive(pool, map(Job, range(num_jobs)), cfg, find_committed=lambda job: None, stop=StopRequest()))


def test_a_few_jobs_that_end_workers_in_a_row_do_not_end_the_run() -> None:
    outcomes = drive_doomed(Doomed(dies_of=range(3, 18)), 30)
    assert sorted(found.job.shard for found in outcomes if isinstance(found, FailedJob)) == list(range(3, 18))
    assert len(outcomes) == 30


def test_workers_that_die_of_everything_end_the_run() -> None:
    pool = Doomed(dies_of=range(1000))
    with pytest.raises(DecantError, match="no worker survives; the last one: segmentation fault"):
        drive_doomed(pool, 1000)
    assert next(pool.numbers) < 100


def test_workers_that_never_come_up_end_the_run_soon() -> None:
    pool = Doomed(dies_of=range(0), is_up=False)
    with pytest.raises(DecantError, match="no worker survives; the last one: never came up"):
        drive_doomed(pool, 1000)
    assert next(pool.numbers) < 20
