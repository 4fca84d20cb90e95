"""Workers by the name of their executor."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from extract.config import ExecutionConfig
from extract.inline_pool import open_inline_pool
from extract.jobs import MakeWork, Pool
from extract.process_pool import open_process_pool
from extract.ray_pool import open_ray_pool
from storage.stage import StopRequest

Open = Callable[[ExecutionConfig, MakeWork[Any], int, StopRequest], AbstractContextManager[Pool]]

POOLS: dict[str, Open] = {"inline": open_inline_pool, "process": open_process_pool, "ray": open_ray_pool}


def open_pool(
    cfg: ExecutionConfig, make_work: MakeWork[Any], num_jobs: int, stop: StopRequest
) -> AbstractContextManager[Pool]:
    """The workers that settings ask for, for the length of the block; no more than there are jobs.

    Raises:
        ConfigError: more workers than there are CPUs or GPUs.
    """
    return POOLS[cfg.executor](cfg, make_work, num_jobs, stop)
