"""A Ray to work on: a local one that lives as long as the command, or a seat on a cluster."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from extract.config import ExecutionConfig
from extract.held_back import sigterm_held_back
from extract.jobs import reason_of
from storage.errors import ConfigError, DecantError, DiskError
from storage.stage import Terminated

_CLUSTER_PATIENCE_SECONDS = 5.0
"""For a cluster to take a connection. Ray itself asks one that is dead for minutes, and hears no signal meanwhile."""
_OBJECT_STORE_BYTES = 100 * 2**20
"""We need almost none, and a large one fails in containers with a small /dev/shm."""
_OUR_PACKAGES = ("extract", "storage")
"""What a worker imports of ours; sent to the machines of a cluster, which need not have it."""


@contextlib.contextmanager
def ray_session(cfg: ExecutionConfig) -> Iterator[None]:
    """Ray for the length of the block; one that the process has already is left as it is.

    Raises:
        ConfigError: an address of a kind that is not supported, or where no cluster answers.
        DecantError: no Ray can be had.
        Terminated: SIGTERM came while Ray began.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = _find_cluster(cfg.ray_address) if cfg.ray_address else "local"
    if not Path.home().is_dir():
        raise DiskError(f"Ray keeps its access token in the home folder, and {Path.home()} does not exist; set HOME")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        if cfg.ray_address:
            _init(address, _on_a_cluster())
        else:
            with sigterm_held_back():
                _init(address, _on_this_machine(cfg))
        yield
    finally:
        ray.shutdown()


def _init(address: str, options: dict[str, Any]) -> None:
    """Begin with Ray, and leave the handler of SIGTERM as it is."""
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
    except SystemExit as error:  # by Ray's own handler, which is there until `ray.init` is over
        raise Terminated from error
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        where = "a local Ray" if address == "local" else f"the cluster at {address}"
        raise DecantError(f"cannot use {where}: {reason_of(error)}; --executor process needs no Ray") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _find_cluster(wanted: str) -> str:
    """`host:port` of a cluster that takes a connection.

    Args:
        wanted: a cluster's address, or `auto` for the one that Ray itself finds: by RAY_ADDRESS, by a process of this
            machine, or in the file that `ray start` wrote.
    """
    from ray._private.services import canonicalize_bootstrap_address

    named = (wanted == "auto" and os.environ.get("RAY_ADDRESS")) or wanted
    if "://" in named:
        raise ConfigError(
            f"{named} is an address of the Ray Client, which loses its workers with the connection; give the "
            "command on a machine of the cluster with --ray-address auto, or by `ray job submit`"
        )
    address: str | None = named
    try:
        address = canonicalize_bootstrap_address(named)
        if address is None:  # RAY_ADDRESS=local
            return "local"
        host, _, port = address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), _CLUSTER_PATIENCE_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        found = f"{address}, which is what {wanted} means here" if address != wanted else wanted
        raise ConfigError(
            f"no Ray cluster answers at {found}: {reason_of(error)}; start one there (`ray start --head`), name one "
            "that runs (--ray-address HOST:PORT), or leave --ray-address out for a local Ray"
        ) from error
    return address


def _on_this_machine(cfg: ExecutionConfig) -> dict[str, Any]:
    return {
        "num_cpus": cfg.workers * cfg.threads or os.cpu_count(),
        "object_store_memory": _OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }


def _on_a_cluster() -> dict[str, Any]:
    root = Path(__file__).resolve().parent.parent
    return {"runtime_env": {"py_modules": [str(root / name) for name in _OUR_PACKAGES]}}
