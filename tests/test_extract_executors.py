"""Who carries out jobs, and what happens to those that fail: in this process, and on Ray with workers that die."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from extract.config import ExecutionConfig
from extract.jobs import FailedJob, Job
from storage.errors import ConfigError, DecantError, InputError
from storage.records import ShardEntry
from storage.stage import Interrupted, StopRequest
from tests.fixtures.jobs import Worker, attempts, carry_out, entry_of, fail_sometimes, on_ray, take_number


def work(job: int, attempt: int, folder: Path) -> None:
    pass


def refuse(job: int, attempt: int, folder: Path) -> None:
    if job == 2:
        raise InputError("image 'a/1.png' has changed")


@pytest.fixture(params=["inline", pytest.param("ray", marks=pytest.mark.ray)])
def cfg(request: pytest.FixtureRequest) -> ExecutionConfig:
    """Either executor, with one worker."""
    if request.param == "ray":
        request.getfixturevalue("ray_session")
    return ExecutionConfig(executor=request.param, workers=1, device="cpu")


# ---- both ------------------------------------------------------------------------------------------------------------


def test_failures_are_tried_again_and_then_given_up(cfg: ExecutionConfig, tmp_path: Path) -> None:
    outcomes = carry_out(tmp_path, fail_sometimes, 5, cfg)
    assert attempts(tmp_path) == {0: 1, 1: 3, 2: 1, 3: 3, 4: 1}
    assert sorted(outcome.index for outcome in outcomes if isinstance(outcome, ShardEntry)) == [0, 2, 3, 4]
    assert [outcome for outcome in outcomes if isinstance(outcome, FailedJob)] == [
        FailedJob(Job(1), "ValueError: no luck with 1")
    ]


def test_an_error_that_no_retry_mends_stops_everything(cfg: ExecutionConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^image 'a/1\.png' has changed$"):
        carry_out(tmp_path, refuse, 9, cfg)
    assert attempts(tmp_path)[2] == 1
    assert 8 not in attempts(tmp_path)


def test_a_worker_that_cannot_be_made_for_a_known_reason_says_so(cfg: ExecutionConfig, tmp_path: Path) -> None:
    def make(folder: Path) -> Worker:
        take_number(folder, "made")
        raise ConfigError("this worker's weights are others")

    with pytest.raises(ConfigError, match=r"^this worker's weights are others$"):
        carry_out(tmp_path, work, 3, cfg, make)
    assert len(list(tmp_path.glob("made.*"))) == 1


# ---- Ray -------------------------------------------------------------------------------------------------------------

RAY = ExecutionConfig(executor="ray", workers=1, device="cpu")


def die(job: int, attempt: int, folder: Path) -> None:
    time.sleep(0.2)  # else the answer about the job before would go down, too
    if job == 1 or (job == 4 and attempt == 1):
        os._exit(139)
    if job == 3:  # the work is done, only nobody was told
        (folder / f"done-{job}").touch()
        os._exit(1)


@on_ray
def test_a_job_that_kills_its_worker_is_given_up_and_no_other_is_blamed(tmp_path: Path) -> None:
    """With one worker, the next job always waits on the worker that dies."""
    outcomes = carry_out(tmp_path, die, 6, RAY)
    assert attempts(tmp_path) == {0: 1, 1: 3, 2: 1, 3: 1, 4: 2, 5: 1}
    failed = [outcome for outcome in outcomes if isinstance(outcome, FailedJob)]
    assert [outcome.job.shard for outcome in failed] == [1]
    assert failed[0].reason.startswith("ActorDiedError: ")
    entries = [outcome for outcome in outcomes if isinstance(outcome, ShardEntry)]
    assert sorted(entry.index for entry in entries) == [0, 2, 3, 4, 5]
    assert all(len(json.dumps(entry.to_json())) < 4096 for entry in entries)


@on_ray
@pytest.mark.parametrize(
    ("end", "reason"), [(os._exit, "ActorDiedError"), (divmod, "TypeError: divmod expected 2 arguments")]
)
def test_workers_that_never_come_up_end_the_run(end: Callable[[int], object], reason: str, tmp_path: Path) -> None:
    def make(folder: Path) -> Worker:
        take_number(folder, "made")
        end(1)
        raise AssertionError

    cfg = RAY.model_copy(update={"max_attempts": 1})
    with pytest.raises(DecantError, match=f"no worker survives; the last one: {reason}"):
        carry_out(tmp_path, work, 5, cfg, make)
    assert len(list(tmp_path.glob("made.*"))) == 3
    assert not attempts(tmp_path)


@on_ray
def test_a_worker_that_dies_while_it_is_made_is_no_fault_of_a_job(tmp_path: Path) -> None:
    def make(folder: Path) -> Worker:
        if take_number(folder, "made") <= 2:
            os._exit(1)
        return Worker(folder, work)

    outcomes = carry_out(tmp_path, work, 3, RAY.model_copy(update={"max_attempts": 1}), make)
    assert sorted(outcomes, key=str) == [entry_of(0), entry_of(1), entry_of(2)]


def meet(job: int, attempt: int, folder: Path) -> None:
    """Wait until another process is at work, too."""
    (folder / f"here-{os.getpid()}").touch()
    deadline = time.monotonic() + 30
    while len(list(folder.glob("here-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)


@on_ray
def test_jobs_are_shared_out_evenly(tmp_path: Path) -> None:
    """Two jobs for two workers: neither waits behind the other, although one worker is up much earlier."""

    def make(folder: Path) -> Worker:
        time.sleep(take_number(folder, "made") - 1)
        return Worker(folder, meet)

    outcomes = carry_out(tmp_path, meet, 2, RAY.model_copy(update={"workers": 2}), make)
    assert len(outcomes) == 2
    assert len(list(tmp_path.glob("here-*"))) == 2


def sleep(job: int, attempt: int, folder: Path) -> None:
    time.sleep(300)


@on_ray
def test_a_stop_does_not_wait_for_jobs(tmp_path: Path) -> None:
    stop = StopRequest()

    def ask_once_at_work() -> None:
        while not attempts(tmp_path):
            time.sleep(0.02)
        stop.signal_name = "SIGINT"

    threading.Thread(target=ask_once_at_work, daemon=True).start()
    with pytest.raises(Interrupted):
        carry_out(tmp_path, sleep, 3, RAY, stop=stop)
    assert not list(tmp_path.glob("done-*"))


def note_gpus(job: int, attempt: int, folder: Path) -> None:
    (folder / f"gpus-{os.environ.get('CUDA_VISIBLE_DEVICES')}").touch()


@on_ray
def test_one_worker_a_gpu(tmp_path: Path) -> None:
    """Where Ray knows of GPUs there are as many workers, and a worker sees no other's."""
    carry_out(tmp_path, note_gpus, 4, ExecutionConfig(executor="ray"))
    assert [path.name for path in tmp_path.glob("gpus-*")] == ["gpus-0"]
    assert len({path.read_text() for path in tmp_path.glob("done-*")}) == 1


@on_ray
@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"workers": 3}, "3 workers need 3 CPUs, Ray has 2"),
        ({"workers": 0, "threads": 4}, "1 workers need 4 CPUs, Ray has 2"),
        ({"workers": 2, "device": "auto"}, "2 workers need 2 GPUs, Ray has 1"),
    ],
)
def test_more_workers_than_fit_are_refused(changes: dict[str, object], found: str, tmp_path: Path) -> None:
    """Ray itself would wait for ever."""
    with pytest.raises(ConfigError, match=rf"{found}; lower extract\.run\.workers"):
        carry_out(tmp_path, work, 5, RAY.model_copy(update=changes))
