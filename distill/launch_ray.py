"""Ray Train as the launcher: the only file here that knows Ray. Nothing is kept in its state; checkpoints are ours."""

import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from distill.config import DistillRunConfig
from distill.device import choose_device
from distill.job import JOB_FILE
from storage.errors import ConfigError, DecantError, first_line

_OBJECT_STORE_BYTES = 100 * 2**20
"""We need almost none, and a large one fails in containers with a small /dev/shm."""
_OUR_PACKAGES = ("distill", "extract", "storage")
"""What a worker imports of ours; sent to the machines of a cluster, which need not have it."""
_MOST_FAILURES = 3
_PATIENCE_SECONDS = 5.0


@contextmanager
def start(run: DistillRunConfig, folder: Path) -> Iterator["_Fit"]:
    """Processes of a local Ray, or of the cluster that `run.ray_address` names; they end with the block.

    Raises:
        DecantError: no Ray can be had.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    is_ours = not ray.is_initialized()
    if is_ours:
        _begin(run)
    with tempfile.TemporaryDirectory(prefix="decant-ray-", ignore_cleanup_errors=True) as records:
        try:
            yield _Fit(_trainer(run, folder, records))
        finally:  # before the folder goes that it writes to
            if is_ours:
                ray.shutdown()


def _begin(run: DistillRunConfig) -> None:
    if run.ray_address and ":" in run.ray_address:
        _check_answers(run.ray_address)
    root = Path(__file__).resolve().parent.parent
    packages = {"py_modules": [str(root / name) for name in _OUR_PACKAGES]}
    here: dict[str, Any] = {
        "num_cpus": max(run.gpus + 1, os.cpu_count() or 1), "object_store_memory": _OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }  # fmt: skip
    try:
        ray.init(
            address=run.ray_address or "local", log_to_driver=False, logging_level="ERROR",
            **({"runtime_env": packages} if run.ray_address else here),
        )  # fmt: skip
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise DecantError(
            f"cannot use {run.ray_address or 'a local Ray'}: {first_line(error)}; LAUNCHER=torchrun needs no Ray"
        ) from error


def _check_answers(address: str) -> None:
    """Ray itself asks a cluster that is not there for minutes.

    Raises:
        ConfigError: nothing answers.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {address}: {first_line(error)}; give RAY=HOST:PORT of one that runs, or leave "
            "it out for a local Ray"
        ) from error


def _trainer(run: DistillRunConfig, folder: Path, records: str) -> TorchTrainer:
    has_gpu = bool(run.ray_address and run.device != "cpu") or choose_device(run.device).type == "cuda"
    return TorchTrainer(
        _work,
        train_loop_config={"job": str(folder / JOB_FILE)},
        scaling_config=ScalingConfig(num_workers=run.gpus, use_gpu=has_gpu),
        run_config=RunConfig(
            name=folder.name, storage_path=records,
            failure_config=FailureConfig(max_failures=_MOST_FAILURES, max_preemption_failures=-1),
        ),
    )  # fmt: skip


def _work(config: dict[str, Any]) -> None:
    from distill.worker import work

    work(Path(config["job"]))


class _Fit:
    """A training under way in a thread of its own, where Ray leaves our signals alone."""

    def __init__(self, trainer: TorchTrainer) -> None:
        self.status: int | None = None
        self.error = ""
        threading.Thread(target=self._run, args=(trainer,), daemon=True, name="decant-ray").start()

    def _run(self, trainer: TorchTrainer) -> None:
        try:
            trainer.fit()
            self.status = 0
        except Exception as error:
            self.error = str(error)
            self.status = 1

    def poll(self) -> int | None:
        return self.status

    def last_words(self) -> str:
        return f"Ray says: {self.error}"
