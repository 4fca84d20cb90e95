"""Many shards: in this process, or on Ray. The only file that imports ray.

No tensor travels: a job is a shard's number, its result what the worker says of it in a few kilobytes. The driver owns
every retry decision; Ray itself never restarts or repeats anything.
"""

import contextlib
import functools
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from extract.config import ExecutionConfig
from storage.errors import ConfigError, DecantError, DiskError
from storage.stage import Interrupted, StopRequest

Job = int
Result = TypeVar("Result")
"""What a worker says of a job that it has done; travels between processes, so it is small."""
Worker = Callable[[Job], Result]
"""One that has an attribute `jobs_at_a_time` above 1 is called from so many threads."""

_JOBS_ON_A_GPU = 3
"""At work in one actor at a time. In any case one more waits there, so that no actor idles while the driver thinks."""
_OBJECT_STORE_BYTES = 100 * 2**20
"""We need almost none, and a large one fails in containers with a small /dev/shm."""


class FailedJob(NamedTuple):
    """A job that was given up."""

    job: Job
    reason: str


class _Attempts:
    """Decides, for every executor alike, whether a failed job is tried again."""

    def __init__(self, queue: deque[Job], limit: int) -> None:
        self.queue, self.limit = queue, limit
        self.counts: Counter[Job] = Counter()

    def retry(self, job: Job, error: BaseException) -> FailedJob | None:
        """Put a job back in front of the queue, or give it up."""
        self.counts[job] += 1
        if self.counts[job] >= self.limit:
            return FailedJob(job, _reason(error))
        self.queue.appendleft(job)
        return None


def run_jobs(
    jobs: Iterable[Job],
    make_worker: Callable[[], Worker[Result]],
    cfg: ExecutionConfig,
    *,
    find_committed: Callable[[Job], Result | None],
    stop: StopRequest,
) -> Iterator[Result | FailedJob]:
    """Carry out jobs in any order and yield each one's result, or why it was given up after `cfg.max_attempts`.

    Args:
        make_worker: called once in each worker process; must be picklable for Ray.
        find_committed: the result of a job that did finish although its worker died before it could say so.

    Raises:
        Interrupted: a stop was asked for; jobs at work are dropped, committed ones are safe.
        DecantError: an error that another attempt cannot mend.
    """
    executors = {"inline": _run_inline, "ray": _run_on_ray}
    yield from executors[cfg.executor](deque(jobs), make_worker, cfg, find_committed, stop)


def _run_inline(
    queue: deque[Job],
    make_worker: Callable[[], Worker[Result]],
    cfg: ExecutionConfig,
    find_committed: Callable[[Job], Result | None],
    stop: StopRequest,
) -> Iterator[Result | FailedJob]:
    if not queue:
        return
    worker, attempts = make_worker(), _Attempts(queue, cfg.max_attempts)
    at_a_time = getattr(worker, "jobs_at_a_time", 1)
    under_way: deque[tuple[Job, Callable[[], Result]]] = deque()
    with contextlib.ExitStack() as ending:
        pool = ending.enter_context(ThreadPoolExecutor(at_a_time)) if at_a_time > 1 else None
        while queue or under_way:
            stop.check()
            while queue and len(under_way) < at_a_time:
                job = queue.popleft()
                under_way.append((job, pool.submit(worker, job).result if pool else functools.partial(worker, job)))
            job, finish = under_way.popleft()
            try:
                yield finish()
            except (DecantError, Interrupted):
                raise
            except Exception as error:
                failed = attempts.retry(job, error)
                if failed is not None:
                    yield failed


class _Actors(Generic[Result]):
    """The actor pool: who is alive, and who works on what."""

    def __init__(self, make_worker: Callable[[], Worker[Result]], cfg: ExecutionConfig, num_jobs: int) -> None:
        import ray

        self._ray = ray
        gpus = int(ray.cluster_resources().get("GPU", 0)) if cfg.device != "cpu" else 0
        cpus = int(ray.cluster_resources().get("CPU", 1))
        size = cfg.workers or gpus or cfg.cpu_workers(cpus)
        unit, each, found = ("GPU", 1, gpus) if gpus else ("CPU", cfg.threads, cpus)
        if size * each > found:  # Ray would wait for ever for the missing ones
            raise ConfigError(
                f"{size} workers need {size * each} {unit}s, Ray has {found}; lower extract.run.workers (or .threads)"
            )
        self.size = min(size, num_jobs)
        self.at_a_time = _JOBS_ON_A_GPU if gpus else 1
        options: dict[str, Any] = {"num_cpus": cfg.threads}
        if gpus:
            options = {"num_gpus": 1, "num_cpus": 0, "max_concurrency": self.at_a_time}
        self._class = ray.remote(max_restarts=0, max_task_retries=0, **options)(_Actor)
        self._make_worker = make_worker
        self.running: dict[Any, tuple[Any, Job | None]] = {}
        """Calls under way, each actor's in order; no job for the one that makes its worker."""
        self.suspects: set[Job] = set()
        """Were at work side by side when their actor died: each is tried again alone, so that no other is blamed."""
        self.handles = [self._start() for _ in range(self.size)]

    def _start(self) -> Any:
        handle = self._class.remote()
        self.running[handle.prepare.remote(self._make_worker)] = (handle, None)
        return handle

    @property
    def is_busy(self) -> bool:
        return any(job is not None for _, job in self.running.values())

    def feed(self, queue: deque[Job]) -> None:
        """Hand out jobs to the actors that are up: one to each, and more only when all are up."""
        all_up = all(job is not None for _, job in self.running.values())
        for depth in range(1, (self.at_a_time + 1 if all_up else 1) + 1):
            for handle in self.handles:
                held = [job for actor, job in self.running.values() if actor is handle]
                must_wait = bool(held) and not self.suspects.isdisjoint([*held, *islice(queue, 1)])
                if queue and len(held) < depth and not must_wait:
                    job = queue.popleft()
                    self.running[handle.run.remote(job)] = (handle, job)

    def replace(self, dead: Any) -> tuple[list[Job], list[Job]]:
        """Start a new actor for a dead one; returns the jobs that it was at, and those that waited."""
        held = [job for actor, job in self.running.values() if actor is dead and job is not None]
        self.running = {ref: call for ref, call in self.running.items() if call[0] is not dead}
        self._ray.kill(dead)  # one that only cannot be reached would keep its CPU or GPU
        self.handles = [self._start() if handle is dead else handle for handle in self.handles]
        at_work, waiting = held[: self.at_a_time], held[self.at_a_time :]
        if len(at_work) > 1:
            self.suspects.update(at_work)
        return at_work, waiting

    def kill(self) -> None:
        for handle in self.handles:
            self._ray.kill(handle)


class _Actor(Generic[Result]):
    """Wraps a worker in a process of its own. The worker is made by a call of its own, not by the constructor: Ray
    would hide why it failed, and blame the first job for it."""

    def prepare(self, make_worker: Callable[[], Worker[Result]]) -> None:
        self.worker = make_worker()

    def run(self, job: Job) -> Result:
        return self.worker(job)


def _run_on_ray(
    queue: deque[Job],
    make_worker: Callable[[], Worker[Result]],
    cfg: ExecutionConfig,
    find_committed: Callable[[Job], Result | None],
    stop: StopRequest,
) -> Iterator[Result | FailedJob]:
    if not queue:
        return
    with _ray_session(cfg):
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        actors, attempts = _Actors(make_worker, cfg, len(queue)), _Attempts(queue, cfg.max_attempts)
        deaths_in_a_row, max_deaths = 0, 2 * cfg.max_attempts * actors.size
        try:
            while queue or actors.is_busy:
                stop.check()
                actors.feed(queue)
                ready, _ = ray.wait(list(actors.running), timeout=0.5)
                for ref in ready:  # one at most
                    handle, job = actors.running[ref]
                    outcome: Result | FailedJob | None = None
                    try:
                        outcome = ray.get(ref)
                    except (RayTaskError, RayActorError) as error:
                        cause = getattr(error, "cause", None) or error
                        if isinstance(cause, DecantError):
                            raise cause from None
                        if isinstance(error, RayTaskError) and job is not None:
                            del actors.running[ref]
                            outcome = attempts.retry(job, cause)
                        else:
                            deaths_in_a_row += 1
                            if deaths_in_a_row > max_deaths:
                                raise DecantError(f"no worker survives; the last one: {_reason(cause)}") from error
                            at_work, waiting = actors.replace(handle)
                            queue.extendleft(reversed(waiting))
                            if len(at_work) > 1:
                                queue.extendleft(reversed(at_work))
                            elif at_work:
                                found = find_committed(at_work[0])
                                outcome = attempts.retry(at_work[0], cause) if found is None else found
                    else:
                        del actors.running[ref]
                        if job is not None:
                            deaths_in_a_row = 0
                            actors.suspects.discard(job)
                    if outcome is not None:
                        yield outcome
        finally:
            actors.kill()


def _reason(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


@contextlib.contextmanager
def _ray_session(cfg: ExecutionConfig) -> Iterator[None]:
    """A local Ray for the length of the block, or a seat on the cluster at `cfg.ray_address`."""
    import ray

    if ray.is_initialized():
        yield
        return
    if not Path.home().is_dir():
        raise DiskError(f"Ray keeps its access token in the home folder, and {Path.home()} does not exist; set HOME")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    sigterm = signal.getsignal(signal.SIGTERM)
    local: dict[str, Any] = {
        "num_cpus": cfg.workers * cfg.threads or os.cpu_count(),
        "object_store_memory": _OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    try:
        ray.init(
            address=cfg.ray_address or "local", log_to_driver=False, logging_level="ERROR",
            **({} if cfg.ray_address else local),
        )  # fmt: skip
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        where = f"the cluster at {cfg.ray_address}" if cfg.ray_address else "a local Ray"
        raise DecantError(f"cannot use {where}: {_reason(error)}; --executor inline needs no Ray") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, sigterm)  # ray.init puts its own handler there
    try:
        yield
    finally:
        ray.shutdown()
