"""What the driver knows about a worker."""

import time
from collections.abc import Callable
from typing import NamedTuple

from extract.jobs import Job

_MOST_ERRORS = 2
"""In a row. Fewer than the attempts that a job has: the last one is another worker's."""


class Held(NamedTuple):
    """A job that a worker has."""

    job: Job
    since: float
    """When it was begun, as far as can be told from here; monotonic."""


class WorkerState:
    def __init__(self) -> None:
        self.held: list[Held] = []
        """In the order in which they were handed out."""
        self.jobs_at_a_time = 0
        """0 until it is up."""
        self.started = time.monotonic()
        self.num_done = self.errors_in_a_row = 0

    @property
    def is_up(self) -> bool:
        return self.jobs_at_a_time > 0

    @property
    def is_unreliable(self) -> bool:
        """Whether the worker may be to blame for what fails, and not its jobs."""
        return self.errors_in_a_row >= _MOST_ERRORS

    @property
    def at_work(self) -> list[Held]:
        return self.held[: self.jobs_at_a_time]

    def let_go(self, job: Job) -> float:
        """Forget a job; returns the seconds that it took."""
        at = next(number for number, held in enumerate(self.held) if held.job == job)
        seconds = time.monotonic() - self.held.pop(at).since
        if self.jobs_at_a_time <= len(self.held):  # one that waited is begun now
            last = self.jobs_at_a_time - 1
            self.held[last] = self.held[last]._replace(since=time.monotonic())
        return seconds

    def late(self, seconds_of: Callable[[Job], float]) -> Job | None:
        """A job that has taken longer than it may."""
        now = time.monotonic()
        return next((held.job for held in self.at_work if now - held.since > seconds_of(held.job)), None)
