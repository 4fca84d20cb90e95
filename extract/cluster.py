"""Many shards: in this process, or on Ray. The only file that imports ray.

No tensor travels: a job is a shard's number, its result a receipt of a few hundred bytes. The driver owns every retry
decision; Ray itself never restarts or repeats anything.
"""

import contextlib
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from extract.config import ExecutionConfig
from storage.errors import DecantError, DiskError
from storage.records import ShardEntry
from storage.stage import Interrupted, StopRequest

Job = int
Worker = Callable[[Job], ShardEntry]

_JOBS_IN_FLIGHT = 2
"""Per actor: one at work, one waiting, so that an actor never idles while the driver thinks."""
_OBJECT_STORE_BYTES = 100 * 2**20
"""We need almost none, and a large one fails in containers with a small /dev/shm."""


class FailedJob(NamedTuple):
    """A job that was given up."""

    job: Job
    reason: str


class _Attempts:
    """Decides, for every executor alike, whether a failed job is tried again."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.counts: Counter[Job] = Counter()

    def give_up(self, job: Job) -> bool:
        self.counts[job] += 1
        return self.counts[job] >= self.limit


def run_jobs(
    jobs: Iterable[Job],
    make_worker: Callable[[], Worker],
    cfg: ExecutionConfig,
    *,
    find_committed: Callable[[Job], ShardEntry | None],
    stop: StopRequest,
) -> Iterator[ShardEntry | FailedJob]:
    """Carry out jobs in any order and yield each one's receipt, or why it was given up after `cfg.max_attempts`.

    Args:
        make_worker: called once in each worker process; must be picklable for Ray.
        find_committed: the receipt of a job that did finish although its worker died before it could say so.

    Raises:
        Interrupted: a stop was asked for; jobs at work are dropped, committed ones are safe.
        DecantError: an error that another attempt cannot mend.
    """
    executors = {"inline": _run_inline, "ray": _run_on_ray}
    yield from executors[cfg.executor](deque(jobs), make_worker, cfg, find_committed, stop)


def _run_inline(
    queue: deque[Job],
    make_worker: Callable[[], Worker],
    cfg: ExecutionConfig,
    find_committed: Callable[[Job], ShardEntry | None],
    stop: StopRequest,
) -> Iterator[ShardEntry | FailedJob]:
    if not queue:
        return
    worker, attempts = make_worker(), _Attempts(cfg.max_attempts)
    while queue:
        stop.check()
        job = queue.popleft()
        try:
            yield worker(job)
        except (DecantError, Interrupted):
            raise
        except Exception as error:
            if attempts.give_up(job):
                yield FailedJob(job, _reason(error))
            else:
                queue.appendleft(job)


class _Actors:
    """The actor pool: who is alive, and who works on what."""

    def __init__(self, make_worker: Callable[[], Worker], cfg: ExecutionConfig) -> None:
        import ray

        self._ray = ray
        gpus = int(ray.cluster_resources().get("GPU", 0)) if cfg.device != "cpu" else 0
        cpus = int(ray.cluster_resources().get("CPU", 1))
        self.size = cfg.workers or gpus or max(1, min(8, cpus // cfg.threads))
        options: dict[str, Any] = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": cfg.threads}
        if not gpus and self.size * cfg.threads > cpus:
            raise DecantError(
                f"{self.size} workers of {cfg.threads} threads need {self.size * cfg.threads} CPUs, Ray has {cpus}; "
                "lower extract.run.workers"
            )
        self._class = ray.remote(max_restarts=0, max_task_retries=0, **options)(_Actor)
        self._make_worker = make_worker
        self.handles = [self._start() for _ in range(self.size)]
        self.running: dict[Any, tuple[Any, Job]] = {}

    def _start(self) -> Any:
        return self._class.remote(self._make_worker)

    def feed(self, queue: deque[Job]) -> None:
        for handle in self.handles:
            while queue and sum(actor is handle for actor, _ in self.running.values()) < _JOBS_IN_FLIGHT:
                job = queue.popleft()
                self.running[handle.run.remote(job)] = (handle, job)

    def replace(self, dead: Any) -> list[Job]:
        """Start a new actor for a dead one; returns the jobs the dead one held, the one at work first."""
        held = [(ref, job) for ref, (actor, job) in self.running.items() if actor is dead]
        for ref, _ in held:
            del self.running[ref]
        self.handles = [self._start() if handle is dead else handle for handle in self.handles]
        return [job for _, job in held]

    def kill(self) -> None:
        for handle in self.handles:
            self._ray.kill(handle)


class _Actor:
    """Wraps a worker in a process of its own."""

    def __init__(self, make_worker: Callable[[], Worker]) -> None:
        self.worker = make_worker()

    def run(self, job: Job) -> ShardEntry:
        return self.worker(job)


def _run_on_ray(
    queue: deque[Job],
    make_worker: Callable[[], Worker],
    cfg: ExecutionConfig,
    find_committed: Callable[[Job], ShardEntry | None],
    stop: StopRequest,
) -> Iterator[ShardEntry | FailedJob]:
    if not queue:
        return
    with _ray_session(cfg):
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        actors, attempts = _Actors(make_worker, cfg), _Attempts(cfg.max_attempts)
        deaths_in_a_row, max_deaths = 0, 2 * cfg.max_attempts * actors.size
        try:
            while queue or actors.running:
                stop.check()
                actors.feed(queue)
                ready, _ = ray.wait(list(actors.running), timeout=0.5)
                for ref in ready:
                    if ref not in actors.running:
                        continue  # belonged to an actor that was replaced a moment ago
                    handle, job = actors.running[ref]
                    try:
                        entry = ray.get(ref)
                    except RayTaskError as error:
                        del actors.running[ref]
                        if isinstance(error.cause, DecantError):
                            raise error.cause from None
                        outcome: ShardEntry | FailedJob | None = _retry(job, error.cause or error, queue, attempts)
                    except RayActorError as error:
                        deaths_in_a_row += 1
                        if deaths_in_a_row > max_deaths:
                            raise DecantError(f"no worker survives; the last one: {_reason(error)}") from error
                        at_work, *waiting = actors.replace(handle)
                        queue.extendleft(reversed(waiting))
                        outcome = find_committed(at_work) or _retry(at_work, error, queue, attempts)
                    else:
                        del actors.running[ref]
                        deaths_in_a_row = 0
                        outcome = entry
                    if outcome is not None:
                        yield outcome
        finally:
            actors.kill()


def _retry(job: Job, error: BaseException, queue: deque[Job], attempts: _Attempts) -> FailedJob | None:
    """Put a job back in front of the queue, or give it up."""
    if attempts.give_up(job):
        return FailedJob(job, _reason(error))
    queue.appendleft(job)
    return None


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
    is_main = threading.current_thread() is threading.main_thread()
    sigterm = signal.getsignal(signal.SIGTERM)
    local: dict[str, Any] = {
        "num_cpus": (cfg.workers or os.cpu_count() or 1) * cfg.threads if cfg.workers else os.cpu_count(),
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
    if is_main:
        signal.signal(signal.SIGTERM, sigterm)  # ray.init puts its own handler there
    try:
        yield
    finally:
        ray.shutdown()
