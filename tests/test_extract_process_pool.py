"""Workers as processes: what they say travels, they see their own GPUs only, none outlives the driver."""

import errno
import os
import signal
import subprocess
import sys
import time
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch

from extract.config import ExecutionConfig
from extract.jobs import FailedJob, Job
from extract.process_pool import open_process_pool
from storage.errors import ConfigError, DecantError, StoreBusyError
from storage.records import ShardEntry
from storage.stage import StopRequest
from tests.fixtures.jobs import Worker, attempts, carry_out, entry_of

PROJECT = Path(__file__).resolve().parent.parent
CFG = ExecutionConfig(executor="process", workers=1, device="cpu")


class TwoPartsError(Exception):
    """Cannot be made again from what pickle keeps."""

    def __init__(self, part: str, other: str) -> None:
        super().__init__(f"{part} and {other}")


def raise_what_cannot_travel(job: int, attempt: int, folder: Path) -> None:
    if job == 0:
        raise TwoPartsError("one", "two")
    if job == 1:
        error = ValueError("with a guest")
        error.guest = lambda: None  # type: ignore[attr-defined]
        raise error


def test_errors_that_cannot_travel_arrive_as_text(tmp_path: Path) -> None:
    outcomes = carry_out(tmp_path, raise_what_cannot_travel, 3, CFG)
    assert {found.job.shard: found.reason for found in outcomes if isinstance(found, FailedJob)} == {
        0: "RuntimeError: TwoPartsError: one and two",
        1: "RuntimeError: ValueError: with a guest",
    }
    assert attempts(tmp_path) == {0: 3, 1: 3, 2: 1}


def refuse(job: int, attempt: int, folder: Path) -> None:
    error = StoreBusyError("held by another")
    error.then = "make status"
    raise error


def test_our_own_errors_keep_their_class_and_what_to_do_then(tmp_path: Path) -> None:
    with pytest.raises(StoreBusyError, match=r"^held by another$") as caught:
        carry_out(tmp_path, refuse, 3, CFG)
    assert caught.value.then == "make status"


class NotesHalvings(Worker):
    """Has too little memory for whole batches, and for halves."""

    def __call__(self, job: Job) -> ShardEntry:
        if job.halvings < 2:
            raise MemoryError(f"batches were halved {job.halvings} times")
        return super().__call__(job)


class DiesOfBatches(Worker):
    """The system ends it when it takes too much memory."""

    def __call__(self, job: Job) -> ShardEntry:
        if job.halvings < 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(job)


def work(job: int, attempt: int, folder: Path) -> None:
    pass


@pytest.mark.parametrize("kind", [NotesHalvings, DiesOfBatches])
def test_a_job_for_which_memory_runs_out_is_tried_with_smaller_batches(kind: type[Worker], tmp_path: Path) -> None:
    assert carry_out(tmp_path, work, 1, CFG, partial(kind, act=work)) == [entry_of(0)]


def kill_itself(job: int, attempt: int, folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_the_system_ended_is_told_by_the_signal(tmp_path: Path) -> None:
    [failed] = carry_out(tmp_path, kill_itself, 1, CFG)
    assert isinstance(failed, FailedJob)
    assert failed.reason == "its process was ended by SIGKILL (by the system, out of memory?)"


# ---- the driver's end ------------------------------------------------------------------------------------------------

DRIVER = """
import os, sys, time
from pathlib import Path
from tests.fixtures.jobs import carry_out
from extract.config import ExecutionConfig

def sleep(job, attempt, folder):
    (folder / f"pid-{os.getpid()}").touch()
    time.sleep(300)

if __name__ == "__main__":
    carry_out(Path(sys.argv[1]), sleep, 4, ExecutionConfig(executor="process", workers=2, device="cpu"))
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_no_worker_outlives_a_driver_that_is_killed(tmp_path: Path) -> None:
    script, folder = tmp_path / "driver.py", tmp_path / "folder"
    script.write_text(DRIVER)
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    with subprocess.Popen([sys.executable, str(script), str(folder)], cwd=PROJECT, env=environment) as driver:
        deadline = time.monotonic() + 60
        while len(list(folder.glob("pid-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        driver.kill()
    workers = [int(path.name.removeprefix("pid-")) for path in folder.glob("pid-*")]
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))


STOPPED = """
import sys, time
from pathlib import Path
from tests.fixtures.jobs import carry_out
from extract.config import ExecutionConfig
from storage.stage import Interrupted, stop_on_signals

def sleep(job, attempt, folder):
    (folder / f"begun-{job}").touch()
    time.sleep(2)

if __name__ == "__main__":
    cfg = ExecutionConfig(executor="process", workers=1, device="cpu")
    with stop_on_signals() as stop:
        try:
            carry_out(Path(sys.argv[1]), sleep, 4, cfg, stop=stop)
        except Interrupted:
            sys.exit(77)
"""


def test_sigterm_to_the_whole_group_lets_what_is_under_way_end(tmp_path: Path) -> None:
    """As batch systems send it: to the driver, to the server process and to the workers."""
    script, folder = tmp_path / "driver.py", tmp_path / "folder"
    script.write_text(STOPPED)
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(
        [sys.executable, str(script), str(folder)], cwd=PROJECT, env=environment, start_new_session=True
    ) as driver:
        deadline = time.monotonic() + 60
        while not list(folder.glob("begun-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(driver.pid, signal.SIGTERM)
        assert driver.wait(60) == 77
    assert [path.name for path in folder.glob("done-*")] == ["done-0"]


# ---- processes that cannot be started --------------------------------------------------------------------------------


def test_a_worker_that_cannot_be_started_is_one_that_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server process is lost while it is asked for a new one, or files run out."""
    failures = [EOFError("unexpected EOF"), BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.EMFILE, "files")]
    start = ForkServerProcess.start

    def fail(process: ForkServerProcess) -> None:
        if failures:
            raise failures.pop(0)
        start(process)

    monkeypatch.setattr(ForkServerProcess, "start", fail)
    assert carry_out(tmp_path, work, 2, CFG) == [entry_of(0), entry_of(1)]
    assert not failures

    def always_fail(process: ForkServerProcess) -> None:
        raise EOFError("unexpected EOF")

    monkeypatch.setattr(ForkServerProcess, "start", always_fail)
    with pytest.raises(DecantError, match="the last one: its process could not be started: EOFError: unexpected EOF"):
        carry_out(tmp_path, work, 2, CFG)


def kill_the_server(job: int, attempt: int, folder: Path) -> None:
    if job == 1 and attempt == 1:
        os.kill(os.getppid(), signal.SIGKILL)


def test_a_server_process_that_is_killed_is_started_again(tmp_path: Path) -> None:
    outcomes = carry_out(tmp_path, kill_the_server, 4, CFG)
    assert sorted(outcomes, key=str) == [entry_of(job) for job in range(4)]


# ---- GPUs ------------------------------------------------------------------------------------------------------------


def note_gpus(job: int, attempt: int, folder: Path) -> None:
    (folder / f"gpus-{os.environ.get('CUDA_VISIBLE_DEVICES')}").touch()
    deadline = time.monotonic() + 30
    while len(list(folder.glob("job-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("each", "workers", "seen"),
    [
        (1.0, 4, ["2", "3", "5", "7"]),
        (0.5, 8, ["2", "3", "5", "7", "2", "3", "5", "7"]),
        (0.33, 12, ["2", "3", "5", "7"] * 3),
        (2.0, 2, ["2,3", "5,7"]),
        (3.0, 1, ["2,3,5"]),
    ],
)
def test_shares_of_the_gpus_that_the_driver_sees(each: float, workers: int, seen: list[str]) -> None:
    cfg = ExecutionConfig(executor="process", gpus_per_worker=each)
    with open_process_pool(cfg, partial(Worker, Path(), work), 100, StopRequest()) as pool:
        assert pool.size == workers
        assert pool._free_gpus == seen


@pytest.mark.usefixtures("four_gpus")
def test_a_worker_sees_its_own_gpus_only(tmp_path: Path) -> None:
    carry_out(tmp_path, note_gpus, 2, ExecutionConfig(executor="process", gpus_per_worker=2))
    assert {path.name for path in tmp_path.glob("gpus-*")} == {"gpus-2,3", "gpus-5,7"}


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"workers": 5}, "5 workers with 1 GPUs each are more than this machine's GPUs have room for (4)"),
        ({"gpus_per_worker": 8.0}, "a worker needs 8 GPUs, this process sees 4"),
    ],
)
def test_more_than_the_gpus_have_room_for_is_refused(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    cfg = ExecutionConfig(executor="process").model_copy(update=changes)
    with pytest.raises(ConfigError) as caught:
        carry_out(tmp_path, work, 9, cfg)
    assert said in str(caught.value)


def test_above_one_gpu_a_worker_has_a_whole_number() -> None:
    with pytest.raises(ValueError, match="above 1 it is a whole number of GPUs"):
        ExecutionConfig(gpus_per_worker=1.5)


LOAD = """
import torch

def refuse(*args):
    raise AssertionError("CUDA was asked for")

torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = torch._C._cuda_getDeviceCount = refuse
from extract.process_pool import _SERVER_KNOWS
for name in _SERVER_KNOWS:
    __import__(name)
"""


def test_what_workers_are_forked_from_has_not_looked_for_gpus() -> None:
    """CUDA does not survive a fork, and a worker is yet to be told which GPUs are its own."""
    subprocess.run([sys.executable, "-c", LOAD], cwd=PROJECT, check=True, timeout=60)
