"""A Ray to work on: a local one that lives as long as the command, or a seat on a cluster."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from extract.config import ExecutionConfig
from extract.jobs import reason_of
from storage.errors import ConfigError, DecantError, DiskError

_OBJECT_STORE_BYTES = 100 * 2**20
"""We need almost none, and a large one fails in containers with a small /dev/shm."""
_OUR_PACKAGES = ("extract", "storage")
"""What a worker imports of ours; sent to the machines of a cluster, which need not have it."""


@contextlib.contextmanager
def ray_session(cfg: ExecutionConfig) -> Iterator[None]:
    """Ray for the length of the block; one that the process has already is left as it is.

    Raises:
        ConfigError: an address of a kind that is not supported.
        DecantError: no Ray can be had.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    if cfg.ray_address and cfg.ray_address.startswith("ray://"):
        raise ConfigError(
            f"{cfg.ray_address} is an address of the Ray Client, which loses its workers with the connection; give the "
            "command on a machine of the cluster with --ray-address auto, or by `ray job submit`"
        )
    if not Path.home().is_dir():
        raise DiskError(f"Ray keeps its access token in the home folder, and {Path.home()} does not exist; set HOME")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=cfg.ray_address or "local", log_to_driver=False, logging_level="ERROR",
            **(_on_a_cluster() if cfg.ray_address else _on_this_machine(cfg)),
        )  # fmt: skip
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        where = f"the cluster at {cfg.ray_address}" if cfg.ray_address else "a local Ray"
        raise DecantError(f"cannot use {where}: {reason_of(error)}; --executor process needs no Ray") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, sigterm)  # ray.init puts its own handler there
    try:
        yield
    finally:
        ray.shutdown()


def _on_this_machine(cfg: ExecutionConfig) -> dict[str, Any]:
    return {
        "num_cpus": cfg.workers * cfg.threads or os.cpu_count(),
        "object_store_memory": _OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }


def _on_a_cluster() -> dict[str, Any]:
    root = Path(__file__).resolve().parent.parent
    return {"runtime_env": {"py_modules": [str(root / name) for name in _OUR_PACKAGES]}}
