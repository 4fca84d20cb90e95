"""The driver: hands out jobs and owns every decision about what fails. Knows nothing of where its workers are.

A failed job goes back in front of the queue, at most `max_attempts` times; whether it was committed after all is looked
at first. What dies with a worker is blamed only if it was alone at work. Waiting jobs are never blamed.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic

from extract.config import ExecutionConfig
from extract.deadlines import Deadlines
from extract.deaths import Deaths
from extract.failures import breaks_worker, is_memory, raise_if_final
from extract.jobs import (
    Claims,
    Died,
    Done,
    Event,
    FailedJob,
    Job,
    Note,
    OnlyDriver,
    Pool,
    Raised,
    Ready,
    Result,
    ignore,
    reason_of,
)
from extract.worker_state import Held, WorkerState
from storage.errors import BadTokensError, DecantError
from storage.stage import StopRequest

JOBS_IN_FLIGHT = 2
"""A worker process: one that it works at, and one that waits there so that it never idles while the driver thinks."""
GRACE_SECONDS = 30.0
"""After a stop was asked for, jobs under way may end for so long."""
_POLL_SECONDS = 0.5
_START_DEADLINE_SECONDS = 1800.0
"""For a worker to come up: the largest teachers take minutes to load."""


def drive(
    pool: Pool, jobs: Iterable[Job], cfg: ExecutionConfig, *,
    find_committed: Callable[[Job], Result | FailedJob | None], stop: StopRequest, claims: Claims | None = None,
    deadlines: Deadlines | None = None, note: Note = ignore,
) -> Iterator[Result | FailedJob]:  # fmt: skip
    """Carry out jobs, in any order, and yield each one's result or why it was given up.

    Args:
        find_committed: the result of a job that did finish although its worker could not say so, or that another driver
            has done; or why another driver has given it up.
        deadlines: that know already how long jobs take.

    Raises:
        Interrupted: a stop was asked for; what was under way had `GRACE_SECONDS` to end.
        DecantError: an error that another attempt cannot mend, or no worker stays alive.
    """
    deadlines = deadlines or Deadlines(cfg.job_seconds)
    yield from _Drive(pool, deque(jobs), cfg, find_committed, stop, claims or OnlyDriver(), deadlines, note).outcomes()


class _Drive(Generic[Result]):
    def __init__(
        self, pool: Pool, queue: deque[Job], cfg: ExecutionConfig,
        find_committed: Callable[[Job], Result | FailedJob | None], stop: StopRequest, claims: Claims,
        deadlines: Deadlines, note: Note,
    ) -> None:  # fmt: skip
        self.pool, self.queue, self.cfg, self.stop, self.claims, self.note = pool, queue, cfg, stop, claims, note
        self.find_committed, self.deadlines = find_committed, deadlines
        self.workers: dict[int, WorkerState] = {}
        self.attempts: Counter[int] = Counter()
        self.suspects: set[int] = set()
        """Shards that were at work side by side when their worker died: each is tried again alone, so that no other is
        blamed."""
        self.elsewhere: list[Job] = []
        """At work with another driver."""
        self.deaths = Deaths(cfg.max_attempts)

    def outcomes(self) -> Iterator[Result | FailedJob]:
        if not self.queue:
            return
        try:
            while self.queue or self.elsewhere or self._is_busy:
                if self.stop:
                    yield from self._wind_up()
                    self.stop.check()
                yield from self._look_elsewhere()
                self._start_missing()
                self._feed()
                for event in self.pool.wait(_POLL_SECONDS):
                    yield from self._handle(event)
                yield from self._end_hung()
        finally:
            for number in self.workers:
                self.pool.kill(number)

    @property
    def _is_busy(self) -> bool:
        return any(worker.held for worker in self.workers.values())

    def _start_missing(self) -> None:
        wanted = min(self.pool.size, len(self.queue) + sum(bool(worker.held) for worker in self.workers.values()))
        for _ in range(wanted - len(self.workers)):
            self.workers[self.pool.start()] = WorkerState()
        not_up = [number for number, worker in self.workers.items() if not worker.is_up]
        for number in not_up[: max(0, len(self.workers) - max(1, self.pool.size))]:  # there is no room for it any more
            self._forget(number)

    def _feed(self) -> None:
        """Hand out jobs to the workers that are up: one to each, and more only when all are up."""
        all_up = all(worker.is_up for worker in self.workers.values())
        deepest = max(map(self._room, self.workers.values()), default=0)
        for depth in range(1, (deepest if all_up else 1) + 1):
            for number, worker in self.workers.items():
                if len(worker.held) >= min(depth, self._room(worker)) or self._is_tired(worker):
                    continue
                if any(held.job.shard in self.suspects for held in worker.held):
                    continue
                job = self._next_job()
                if job is None:
                    return
                if worker.held and job.shard in self.suspects:
                    self.queue.appendleft(job)
                    continue
                worker.held.append(Held(job, time.monotonic()))
                self.pool.submit(number, job)

    def _room(self, worker: WorkerState) -> int:
        """Jobs that a worker may have at a time."""
        if not worker.is_up:
            return 0
        return max(worker.jobs_at_a_time, JOBS_IN_FLIGHT if self.pool.can_kill else 1)

    def _next_job(self) -> Job | None:
        while self.queue:
            job = self.queue.popleft()
            if self.claims.take(job):
                return job
            self.elsewhere.append(job)
        return None

    def _look_elsewhere(self) -> Iterator[Result | FailedJob]:
        """Jobs that other drivers have done are done; those that they have let go are ours again."""
        if self.queue or not self.elsewhere:
            return
        waiting, self.elsewhere = self.elsewhere, []
        for job in waiting:
            found = self.find_committed(job)
            if found is not None:
                yield found
            elif self.claims.take(job):
                self.queue.append(job)
            else:
                self.elsewhere.append(job)
        if self.elsewhere and not self.queue and not self._is_busy:
            time.sleep(_POLL_SECONDS)

    def _handle(self, event: Event) -> Iterator[Result | FailedJob]:
        worker = self.workers.get(event.worker)
        if worker is None:  # a death is told once
            return
        match event:
            case Ready():
                worker.jobs_at_a_time, self.deaths.failed_starts_in_a_row = event.jobs_at_a_time, 0
                self.note("worker up", worker=event.worker, seconds=round(time.monotonic() - worker.started, 1))
            case Done():
                self.deadlines.add(worker.let_go(event.job))
                worker.num_done += 1
                worker.errors_in_a_row = 0
                self.deaths.in_a_row = 0
                self.suspects.discard(event.job.shard)
                yield self._finished(event.job, event.result)
                if self._is_tired(worker) and not worker.held:
                    self.note("worker recycled", worker=event.worker, jobs=worker.num_done)
                    self._forget(event.worker)
            case Raised(job=None):
                raise_if_final(event.error)
                yield from self._bury(event.worker, reason_of(event.error))
            case Raised(job=Job() as job):
                worker.let_go(job)
                worker.errors_in_a_row += 1
                self.deaths.in_a_row = 0
                raise_if_final(event.error)
                if isinstance(event.error, BadTokensError):
                    self.attempts[job.shard] = self.cfg.max_attempts - 1  # another attempt would give the same
                if is_memory(event.error):
                    job = job._replace(halvings=job.halvings + 1)
                yield from self._retry(job, reason_of(event.error), is_deadly=False)
                self._replace_if_broken(event.worker, event.error)
            case Died():
                yield from self._bury(event.worker, event.reason)

    def _finished(self, job: Job, result: Result | FailedJob) -> Result | FailedJob:
        self.claims.release(job)
        return result

    def _bury(self, number: int, reason: str, culprit: Job | None = None) -> Iterator[Result | FailedJob]:
        """A worker is dead, or as good as that: another one takes its place, and its jobs are tried again.

        Args:
            culprit: the job that is to blame, where that is known.
        """
        worker = self._forget(number)
        self.note("worker died", worker=number, reason=reason, shards=[held.job.shard for held in worker.at_work])
        is_alone = not any(other.is_up for other in self.workers.values())
        self.deaths.count(reason, was_up=worker.is_up, is_alone=is_alone, size=self.pool.size)
        at_work = [held.job for held in worker.at_work]
        self.queue.extendleft(held.job for held in reversed(worker.held[len(at_work) :]))
        lost = []
        for job in at_work:
            found = self.find_committed(job)
            if found is None:
                lost.append(job)
            else:
                yield self._finished(job, found)
        blamed = [job for job in lost if job == culprit] or (lost if len(lost) == 1 else [])
        unblamed = [job for job in lost if job not in blamed]
        if not blamed:
            self.suspects.update(job.shard for job in lost)
        self.queue.extendleft(reversed(unblamed))
        for job in blamed:
            yield from self._retry(job._replace(halvings=job.halvings + 1), reason, is_deadly=True)

    def _replace_if_broken(self, number: int, error: BaseException) -> None:
        """Where the worker may be what fails, not its jobs, another one takes its place. What else it has is not
        blamed."""
        worker = self.workers[number]
        is_broken = breaks_worker(error) or (worker.is_unreliable and not worker.held)
        if is_broken and self.pool.can_kill:
            self._forget(number)
            self.note("worker died", worker=number, reason=f"it only fails: {reason_of(error)}")
            self.queue.extendleft(held.job for held in reversed(worker.held))

    def _forget(self, number: int) -> WorkerState:
        self.pool.kill(number)  # one that only cannot be reached would keep its CPU or GPU
        return self.workers.pop(number)

    def _retry(self, job: Job, reason: str, *, is_deadly: bool) -> Iterator[FailedJob]:
        """Put a job back in front of the queue, or give it up."""
        self.attempts[job.shard] += 1
        self.note("job failed", shard=job.shard, attempt=self.attempts[job.shard], reason=reason)
        if self.attempts[job.shard] < self.cfg.max_attempts:
            self.queue.appendleft(job)
            return
        self.claims.release(job)
        self.suspects.discard(job.shard)
        yield FailedJob(job, reason, is_deadly)

    def _is_tired(self, worker: WorkerState) -> bool:
        is_used_up = 0 < self.cfg.recycle_after <= worker.num_done + len(worker.held)
        return self.pool.can_kill and (is_used_up or worker.is_unreliable)

    def _end_hung(self) -> Iterator[Result | FailedJob]:
        if not self.pool.can_kill:
            return
        for number, worker in list(self.workers.items()):
            late = worker.late(self._limit_seconds)
            if late is not None:
                limit = self._limit_seconds(late)
                reason = f"hung: the shard took longer than {limit:,.0f} s (extract.run.job_seconds)"
                yield from self._bury(number, reason, late)
            elif not worker.is_up and time.monotonic() - worker.started > _START_DEADLINE_SECONDS:
                if not any(other.is_up for other in self.workers.values()):
                    raise DecantError(f"no worker came up within {_START_DEADLINE_SECONDS:,.0f} s; are there machines?")
                yield from self._bury(number, f"was not up after {_START_DEADLINE_SECONDS:,.0f} s")

    def _limit_seconds(self, job: Job) -> float:
        return self.deadlines.limit_seconds(self.attempts[job.shard])

    def _wind_up(self) -> Iterator[Result | FailedJob]:
        """Let jobs under way end; nothing new is begun. In this process, workers see to that themselves."""
        if not self.pool.can_kill:
            return
        under_way = {(number, held.job) for number, worker in self.workers.items() for held in worker.at_work}
        if under_way:
            self.note("stopping", at_work=len(under_way), seconds=GRACE_SECONDS)
        until = time.monotonic() + GRACE_SECONDS
        while under_way and time.monotonic() < until:
            for event in self.pool.wait(_POLL_SECONDS):
                if isinstance(event, Done):
                    yield self._finished(event.job, event.result)
                if isinstance(event, Done | Raised):
                    under_way -= {(event.worker, event.job)}
                elif isinstance(event, Died):
                    under_way = {call for call in under_way if call[0] != event.worker}
