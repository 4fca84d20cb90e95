"""What every test may use: the fixtures of `fixtures/`, and those of files and processes."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads would only wait for each other
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.pop("RAY_ADDRESS", None)  # never join somebody's cluster

import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("decant", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines are busy
settings.load_profile("decant")

_TOPICS = (
    "images",
    "stores",
    "runs",
    "tars",
    "any_store",
    "whole_store",
    "together",
    "jobs",
    "clock",
    "folder_server",
    "object_server",
    "parquet",
    "saved_students",
)
pytest_plugins = [f"tests.fixtures.{topic}" for topic in _TOPICS]


@pytest.fixture
def tree_bytes() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder with its bytes, leaving out locks, states and logs."""

    def read(root: Path) -> dict[str, bytes]:
        passed_over = {"LOCK", "result.json", "state.json", "metrics.jsonl"}
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file()
            and path.name not in passed_over
            and not path.name.endswith(".events.jsonl")
            and "tensorboard" not in path.parts
        }

    return read


@pytest.fixture
def fork() -> Callable[[Callable[[], object]], int]:
    """Run a function in a process of its own, which exits with 0 when it returns; gives the process id to wait for."""

    def start(work: Callable[[], object]) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # about threads: those of pytest only wait
            pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    return start


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A folder in memory, where the system has that: for tests that write and remove thousands of files."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK | os.X_OK) else None
    with tempfile.TemporaryDirectory(dir=place, prefix="decant-test-") as folder:
        yield Path(folder)
