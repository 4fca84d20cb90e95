"""One worker in this process: for debugging, for tests, and where processes cannot be had."""

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from extract.config import ExecutionConfig
from extract.jobs import Done, Event, Job, MakeWork, Raised, Ready, Work
from storage.stage import StopRequest


class InlinePool:
    """A job runs while the driver waits; of a worker that takes several at a time, in threads."""

    size, can_kill = 1, False

    def __init__(self, make_work: MakeWork[Any], stop: StopRequest) -> None:
        self.make_work, self.stop = make_work, stop
        self.events: list[Event] = []
        self.jobs: deque[Job] = deque()
        self.futures: dict[Future[Any], Job] = {}
        self.threads: ThreadPoolExecutor | None = None

    def start(self) -> int:
        """Raises what making the worker raises."""
        self.work: Work[Any] = self.make_work()
        if hasattr(self.work, "check_stop"):  # a job may be long, and cannot be ended from outside
            self.work.check_stop = self.stop.check
        at_a_time = getattr(self.work, "jobs_at_a_time", 1)
        self.threads = ThreadPoolExecutor(at_a_time) if at_a_time > 1 else None
        self.events.append(Ready(0, at_a_time))
        return 0

    def submit(self, worker: int, job: Job) -> None:
        if self.threads is None:
            self.jobs.append(job)
        else:
            self.futures[self.threads.submit(self.work, job)] = job

    def wait(self, seconds: float) -> Sequence[Event]:
        if self.events:
            events, self.events = self.events, []
            return events
        if self.jobs:
            job = self.jobs.popleft()
            try:
                return [Done(0, job, self.work(job))]
            except Exception as error:
                return [Raised(0, job, error)]
        done, _ = wait(self.futures, seconds, FIRST_COMPLETED)
        return [self._event(future) for future in done]

    def _event(self, future: "Future[Any]") -> Event:
        job, error = self.futures.pop(future), future.exception()
        return Done(0, job, future.result()) if error is None else Raised(0, job, error)

    def kill(self, worker: int) -> None:
        """Waits for what is under way."""
        if self.threads is not None:
            self.threads.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def open_inline_pool(
    cfg: ExecutionConfig, make_work: MakeWork[Any], num_jobs: int, stop: StopRequest
) -> Iterator[InlinePool]:
    yield InlinePool(make_work, stop)
