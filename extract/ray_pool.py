"""Workers as Ray actors, on this machine or on a cluster.

Ray itself never restarts or repeats anything: the driver owns every such decision.
"""

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from extract.config import ExecutionConfig, sharers_of_a_gpu
from extract.jobs import Died, Done, Event, Job, MakeWork, Raised, Ready, reason_of
from extract.ray_session import ray_session
from extract.turns import Turns
from storage.errors import ConfigError, DecantError
from storage.stage import StopRequest

_MOST_AT_A_TIME = 4
"""Jobs that an actor could work at; how many it does is the worker's to say."""
_LOOK_SECONDS = 10.0
"""Between two looks at which machines there are."""


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
    """One actor a worker. With GPUs an actor has no CPU of its own, or the actors would wait for those; a teacher over
    several GPUs has a placement group, so that they are on one machine."""

    can_kill = True

    def __init__(self, cfg: ExecutionConfig, make_work: MakeWork[Any], num_jobs: int) -> None:
        """
        Raises:
            ConfigError: more workers than there is room for.
        """
        import ray

        self._ray, self._cfg, self._make_work, self._num_jobs = ray, cfg, make_work, num_jobs
        self.unit = "GPU" if cfg.device != "cpu" and self._total("GPU") >= 1 else "CPU"
        self._needs = cfg.gpus_per_worker if self.unit == "GPU" else cfg.threads
        room = self._room()
        if max(1, cfg.workers) > room:  # Ray would wait for ever for the missing ones
            wanted = max(1, cfg.workers)
            raise ConfigError(
                f"{wanted} workers need {wanted * self._needs:g} {self.unit}s, Ray has {self._total(self.unit):g}; "
                f"lower extract.run.workers (or .{'gpus_per_worker' if self.unit == 'GPU' else 'threads'})"
            )
        self._size, self._looked = self._wanted(room), time.monotonic()
        self._numbers = itertools.count()
        self._actors: dict[int, Any] = {}
        self._groups: dict[int, Any] = {}
        """Placement groups of workers that have one."""
        self._num_calls: Counter[int] = Counter()
        self._calls: dict[Any, tuple[int, Job | None]] = {}
        """Under way; no job for the one that makes a worker."""

    @property
    def size(self) -> int:
        """As many as the machines that are there have room for: some may be lost, others come late.

        Raises:
            DecantError: all are lost.
        """
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            if not self._machines():
                raise DecantError(
                    "Ray has lost all its machines (its raylet was ended, by the system, out of memory?); what is "
                    "finished is kept"
                )
            self._size, self._looked = self._wanted(self._room()), time.monotonic()
        return self._size

    def _wanted(self, room: int) -> int:
        most = self._cfg.workers or (room if self.unit == "GPU" else self._cfg.cpu_workers(room * self._cfg.threads))
        return max(1, min(most, room, self._num_jobs))

    def _room(self) -> int:
        """Workers that all machines together have room for."""
        if self.unit == "GPU" and self._needs < 1:
            return int(self._total("GPU")) * sharers_of_a_gpu(self._cfg)
        return sum(int(found // self._needs) for found in self._of_machines(self.unit))

    def _total(self, resource: str) -> float:
        return sum(self._of_machines(resource))

    def _of_machines(self, resource: str) -> list[float]:
        return [machine["Resources"].get(resource, 0.0) for machine in self._machines()]

    def _machines(self) -> list[dict[str, Any]]:
        """Those that are alive."""
        return [node for node in self._ray.nodes() if node["Alive"]]

    def start(self) -> int:
        number = next(self._numbers)
        options: dict[str, Any] = {"num_cpus": self._needs, "scheduling_strategy": "SPREAD"}
        if self.unit == "GPU":
            options |= {"num_cpus": 0, "num_gpus": self._needs}
        if self.unit == "GPU" and self._needs > 1:
            from ray.util.placement_group import placement_group
            from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

            group = self._groups[number] = placement_group([{"GPU": self._needs}], strategy="STRICT_PACK")
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group)
        kind = self._ray.remote(max_restarts=0, max_task_retries=0, max_concurrency=_MOST_AT_A_TIME, **options)(_Actor)
        actor = self._actors[number] = kind.remote()
        self._calls[actor.prepare.remote(self._make_work)] = number, None
        return number

    def submit(self, worker: int, job: Job) -> None:
        self._calls[self._actors[worker].run.remote(self._num_calls[worker], job)] = worker, job
        self._num_calls[worker] += 1

    def wait(self, seconds: float) -> Sequence[Event]:
        if not self._calls:
            time.sleep(seconds)
            return []
        ready, _ = self._ray.wait(list(self._calls), timeout=seconds)
        return [self._event(ref) for ref in ready]

    def _event(self, ref: Any) -> Event:
        from ray.exceptions import RayError, RayTaskError

        worker, job = self._calls.pop(ref)
        try:
            result = self._ray.get(ref)
        except RayTaskError as error:
            return Raised(worker, job, getattr(error, "cause", None) or error)
        except RayError as error:  # an actor that died, cannot be reached, or was never placed
            return Died(worker, reason_of(error))
        return Ready(worker, result) if job is None else Done(worker, job, result)

    def kill(self, worker: int) -> None:
        self._ray.kill(self._actors.pop(worker))
        self._calls = {ref: call for ref, call in self._calls.items() if call[0] != worker}
        if worker in self._groups:
            from ray.util.placement_group import remove_placement_group

            remove_placement_group(self._groups.pop(worker))


@contextlib.contextmanager
def open_ray_pool(
    cfg: ExecutionConfig, make_work: MakeWork[Any], num_jobs: int, stop: StopRequest
) -> Iterator[RayPool]:
    """
    Raises:
        ConfigError: more workers than Ray has room for.
        DecantError: no Ray can be had.
    """
    with ray_session(cfg):
        yield RayPool(cfg, make_work, num_jobs)
