"""The words between the driver and its workers: what a job is, what a worker says of it, what a pool of workers can do.

No tensor travels: a job is a few numbers, its result a few kilobytes, whoever the workers are.
"""

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from storage.errors import DecantError, first_line

Result = TypeVar("Result")
"""What a worker says of a job that it has done; travels between processes, so it is small."""


ENDS_WORKERS = "ends the worker that looks at it"
"""Begins the reason of a hole where an image was left out because every worker died of it."""


class Job(NamedTuple):
    """One shard to extract; or a part of it to look at, to learn what in it ends a worker."""

    shard: int
    halvings: int = 0
    """How often the batch size is halved: once for each worker that has died of this job."""
    excluded: tuple[str, ...] = ()
    """Keys of images that end a worker: they become holes."""
    probed: tuple[int, int] | None = None
    """First and last + 1 of the shard's images to run through everything but the commit; None for all, and commit."""


class FailedJob(NamedTuple):
    """A job that was given up."""

    job: Job
    reason: str
    is_deadly: bool = False
    """It ended its workers, or had to be ended with them; errors did not."""


class Ready(NamedTuple):
    """A worker is up."""

    worker: int
    jobs_at_a_time: int
    """It works at so many; more wait."""


class Done(NamedTuple, Generic[Result]):
    worker: int
    job: Job
    result: Result


class Raised(NamedTuple):
    """A job raised; or, without a job, the worker could not be made."""

    worker: int
    job: Job | None
    error: BaseException


class Died(NamedTuple):
    """A worker's process is gone, with all that it was at."""

    worker: int
    reason: str


Event = Ready | Done[Any] | Raised | Died
Work = Callable[[Job], Result]
"""A worker once it is made. One with an attribute `jobs_at_a_time` above 1 is called from so many threads."""
MakeWork = Callable[[], Work[Result]]
"""Called once in each worker process; picklable."""


class Pool(Protocol):
    """Workers, wherever they are. Starts none and repeats nothing by itself."""

    can_kill: bool
    """Whether a worker can be ended without ending the driver."""

    @property
    def size(self) -> int:
        """Workers that there are to be; may change with the machines that there are."""

    def start(self) -> int:
        """Begin a worker; returns its number, new each time. `wait` will tell when it is up."""

    def submit(self, worker: int, job: Job) -> None: ...

    def wait(self, seconds: float) -> Sequence[Event]:
        """What has happened since; waits for something at most so long."""

    def kill(self, worker: int) -> None:
        """End a worker at once; nothing is heard of it any more."""


class Claims(Protocol):
    """Which jobs are ours, where several drivers share a store."""

    def take(self, job: Job) -> bool:
        """False while another driver is at it; True again for one that is ours."""

    def release(self, job: Job) -> None: ...


class OnlyDriver:
    """All jobs are ours."""

    def take(self, job: Job) -> bool:
        return True

    def release(self, job: Job) -> None: ...


Note = Callable[..., None]
"""`note(kind, **facts)` hears what happens to workers and jobs."""


def ignore(kind: str, **facts: object) -> None:
    """A `Note` that nobody reads."""


def reason_of(error: BaseException) -> str:
    """One line; of our own errors all of it, since it says what to do."""
    if isinstance(error, DecantError):
        return f"{type(error).__name__}: {error}"[:1000]
    return f"{type(error).__name__}: {first_line(error)}"[:300]
