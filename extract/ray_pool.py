"""Workers as Ray actors, on this machine or on a cluster. The only file that imports ray.

Ray itself never restarts or repeats anything: the driver owns every such decision.
"""

import contextlib
import itertools
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from extract.config import ExecutionConfig
from extract.driver import reason_of
from extract.jobs import Died, Done, Event, Job, MakeWork, Raised, Ready
from extract.turns import Turns
from storage.errors import ConfigError, DecantError, DiskError
from storage.stage import StopRequest

_MOST_AT_A_TIME = 4
"""Jobs that an actor could work at; how many it does is the worker's to say."""
_OBJECT_STORE_BYTES = 100 * 2**20
"""We need almost none, and a large one fails in containers with a small /dev/shm."""


class _Actor:
    """Wraps a worker in a process of its own. The worker is made by a call of its own, not by the constructor: Ray
    would hide why it failed, and blame the first job for it."""

    def prepare(self, make_work: MakeWork[Any]) -> int:
        self.work = make_work()
        self.turns = Turns(int(getattr(self.work, "jobs_at_a_time", 1)))
        return self.turns.at_a_time

    def run(self, number: int, job: Job) -> Any:
        """Ray begins calls in any order, and more at a time than the worker takes."""
        with self.turns.take(number):
            return self.work(job)


class RayPool:
    can_kill = True

    def __init__(self, cfg: ExecutionConfig, make_work: MakeWork[Any], num_jobs: int) -> None:
        import ray

        self._ray, self._make_work = ray, make_work
        gpus = int(ray.cluster_resources().get("GPU", 0)) if cfg.device != "cpu" else 0
        cpus = int(ray.cluster_resources().get("CPU", 1))
        size = cfg.workers or gpus or cfg.cpu_workers(cpus)
        unit, each, found = ("GPU", 1, gpus) if gpus else ("CPU", cfg.threads, cpus)
        if size * each > found:  # Ray would wait for ever for the missing ones
            raise ConfigError(
                f"{size} workers need {size * each} {unit}s, Ray has {found}; lower extract.run.workers (or .threads)"
            )
        self.size = min(size, num_jobs)
        resources = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": cfg.threads}
        self._class = ray.remote(
            max_restarts=0, max_task_retries=0, max_concurrency=_MOST_AT_A_TIME, **resources
        )(_Actor)  # fmt: skip
        self._numbers = itertools.count()
        self._actors: dict[int, Any] = {}
        self._num_calls: Counter[int] = Counter()
        self._calls: dict[Any, tuple[int, Job | None]] = {}
        """Under way; no job for the one that makes a worker."""

    def start(self) -> int:
        number = next(self._numbers)
        actor = self._actors[number] = self._class.remote()
        self._calls[actor.prepare.remote(self._make_work)] = number, None
        return number

    def submit(self, worker: int, job: Job) -> None:
        self._calls[self._actors[worker].run.remote(self._num_calls[worker], job)] = worker, job
        self._num_calls[worker] += 1

    def wait(self, seconds: float) -> Sequence[Event]:
        ready, _ = self._ray.wait(list(self._calls), timeout=seconds)
        return [self._event(ref) for ref in ready]

    def _event(self, ref: Any) -> Event:
        from ray.exceptions import RayActorError, RayTaskError

        worker, job = self._calls.pop(ref)
        try:
            result = self._ray.get(ref)
        except RayTaskError as error:
            return Raised(worker, job, getattr(error, "cause", None) or error)
        except RayActorError as error:
            return Died(worker, reason_of(error))
        return Ready(worker, result) if job is None else Done(worker, job, result)

    def kill(self, worker: int) -> None:
        self._ray.kill(self._actors.pop(worker))
        self._calls = {ref: call for ref, call in self._calls.items() if call[0] != worker}


@contextlib.contextmanager
def open_ray_pool(
    cfg: ExecutionConfig, make_work: MakeWork[Any], num_jobs: int, stop: StopRequest
) -> Iterator[RayPool]:
    """
    Raises:
        ConfigError: more workers than Ray has room for.
        DecantError: no Ray can be had.
    """
    with _ray_session(cfg):
        yield RayPool(cfg, make_work, num_jobs)


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
        raise DecantError(f"cannot use {where}: {reason_of(error)}; --executor inline needs no Ray") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, sigterm)  # ray.init puts its own handler there
    try:
        yield
    finally:
        ray.shutdown()
