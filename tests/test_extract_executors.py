"""Who carries out jobs, and what happens to those that fail: in this process, and on Ray with workers that die."""

import json
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from extract.config import ExecutionConfig
from extract.driver import drive
from extract.jobs import FailedJob, Job
from extract.pools import open_pool
from storage.errors import ConfigError, DecantError, InputError
from storage.records import ShardEntry
from storage.stage import Interrupted, StopRequest
from tests.fixtures.jobs import Worker, attempts, carry_out, entry_of, fail_sometimes, on_ray, take_number


def work(job: int, attempt: int, folder: Path) -> None:
    pass


def refuse(job: int, attempt: int, folder: Path) -> None:
    if job == 2:
        raise InputError("image 'a/1.png' has changed")


@pytest.fixture(params=["inline", "process", pytest.param("ray", marks=pytest.mark.ray)])
def cfg(request: pytest.FixtureRequest) -> ExecutionConfig:
    """Every executor, with one worker."""
    if request.param == "ray":
        request.getfixturevalue("ray_session")
    return ExecutionConfig(executor=request.param, workers=1, device="cpu")


# ---- all of them -----------------------------------------------------------------------------------------------------


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


def make_none(folder: Path) -> Worker:
    take_number(folder, "made")
    raise ConfigError("this worker's weights are others")


def test_a_worker_that_cannot_be_made_for_a_known_reason_says_so(cfg: ExecutionConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^this worker's weights are others$"):
        carry_out(tmp_path, work, 3, cfg, make_none)
    assert len(list(tmp_path.glob("made.*"))) == 1


# ---- those with processes --------------------------------------------------------------------------------------------

RAY = ExecutionConfig(executor="ray", workers=1, device="cpu")


@pytest.fixture(params=["process", pytest.param("ray", marks=pytest.mark.ray)])
def apart(request: pytest.FixtureRequest) -> ExecutionConfig:
    """Every executor whose worker has a process of its own; one worker."""
    if request.param == "ray":
        request.getfixturevalue("ray_session")
    return ExecutionConfig(executor=request.param, workers=1, device="cpu")


def die(job: int, attempt: int, folder: Path) -> None:
    time.sleep(0.2)  # else the answer about the job before would go down, too
    if job == 1 or (job == 4 and attempt == 1):
        os._exit(139)
    if job == 3:  # the work is done, only nobody was told
        (folder / f"done-{job}").touch()
        os._exit(1)


def test_a_job_that_kills_its_worker_is_given_up_and_no_other_is_blamed(apart: ExecutionConfig, tmp_path: Path) -> None:
    """With one worker, the next job always waits on the worker that dies."""
    outcomes = carry_out(tmp_path, die, 6, apart)
    assert attempts(tmp_path) == {0: 1, 1: 3, 2: 1, 3: 1, 4: 2, 5: 1}
    failed = [outcome for outcome in outcomes if isinstance(outcome, FailedJob)]
    assert [outcome.job.shard for outcome in failed] == [1]
    assert failed[0].is_deadly
    assert failed[0].reason.startswith(("ActorDiedError: ", "its process ended with code 139"))
    entries = [outcome for outcome in outcomes if isinstance(outcome, ShardEntry)]
    assert sorted(entry.index for entry in entries) == [0, 2, 3, 4, 5]
    assert all(len(json.dumps(entry.to_json())) < 4096 for entry in entries)


def make_and_exit(folder: Path) -> Worker:
    take_number(folder, "made")
    os._exit(1)


def make_and_fail(folder: Path) -> Worker:
    take_number(folder, "made")
    raise TypeError("no such thing")


@pytest.mark.parametrize(
    ("make", "reason"),
    [(make_and_exit, "(ActorDiedError|its process ended with code 1)"), (make_and_fail, "TypeError: no such thing")],
)
def test_workers_that_never_come_up_end_the_run(
    apart: ExecutionConfig, make: Callable[[Path], Worker], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(DecantError, match=f"no worker survives; the last one: {reason}"):
        carry_out(tmp_path, work, 5, apart.model_copy(update={"max_attempts": 1}), make)
    assert len(list(tmp_path.glob("made.*"))) == 3
    assert not attempts(tmp_path)


def make_the_third_time(folder: Path) -> Worker:
    if take_number(folder, "made") <= 2:
        os._exit(1)
    return Worker(folder, work)


def test_a_worker_that_dies_while_it_is_made_is_no_fault_of_a_job(apart: ExecutionConfig, tmp_path: Path) -> None:
    outcomes = carry_out(tmp_path, work, 3, apart.model_copy(update={"max_attempts": 1}), make_the_third_time)
    assert sorted(outcomes, key=str) == [entry_of(0), entry_of(1), entry_of(2)]


def meet(job: int, attempt: int, folder: Path) -> None:
    """Wait until another process is at work, too."""
    (folder / f"here-{os.getpid()}").touch()
    deadline = time.monotonic() + 30
    while len(list(folder.glob("here-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)


def make_one_after_the_other(folder: Path) -> Worker:
    time.sleep(take_number(folder, "made") - 1)
    return Worker(folder, meet)


def test_jobs_are_shared_out_evenly(apart: ExecutionConfig, tmp_path: Path) -> None:
    """Two jobs for two workers: neither waits behind the other, although one worker is up much earlier."""
    outcomes = carry_out(tmp_path, meet, 2, apart.model_copy(update={"workers": 2}), make_one_after_the_other)
    assert len(outcomes) == 2
    assert len(list(tmp_path.glob("here-*"))) == 2


def sleep(job: int, attempt: int, folder: Path) -> None:
    time.sleep(300)


def test_a_stop_waits_for_jobs_for_a_while_only(
    apart: ExecutionConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("extract.driver.GRACE_SECONDS", 1.0)
    stop = StopRequest()

    def ask_once_at_work() -> None:
        while not attempts(tmp_path):
            time.sleep(0.02)
        stop.signal_name = "SIGINT"

    threading.Thread(target=ask_once_at_work, daemon=True).start()
    with pytest.raises(Interrupted):
        carry_out(tmp_path, sleep, 3, apart, stop=stop)
    assert not list(tmp_path.glob("done-*"))


def sleep_a_little(job: int, attempt: int, folder: Path) -> None:
    time.sleep(0.5)


def test_what_is_under_way_may_end_after_a_stop_and_nothing_else_is_begun(
    apart: ExecutionConfig, tmp_path: Path
) -> None:
    stop, found = StopRequest(), []
    with open_pool(apart, partial(Worker, tmp_path, sleep_a_little), 9, stop) as pool, pytest.raises(Interrupted):
        for outcome in drive(pool, map(Job, range(9)), apart, find_committed=lambda job: None, stop=stop):
            found.append(outcome)
            stop.signal_name = "SIGTERM"
    assert 2 <= len(found) <= 3, "the one that was at work when the stop came, and at most the one that waited there"
    assert len(attempts(tmp_path)) <= 4


def hang(job: int, attempt: int, folder: Path) -> None:
    if job == 1:
        time.sleep(300)


def test_a_hung_job_is_ended_at_its_deadline_and_given_up(apart: ExecutionConfig, tmp_path: Path) -> None:
    cfg = apart.model_copy(update={"job_seconds": 1.0, "max_attempts": 2})
    outcomes = carry_out(tmp_path, hang, 4, cfg)
    [failed] = [outcome for outcome in outcomes if isinstance(outcome, FailedJob)]
    assert (failed.job.shard, failed.is_deadly) == (1, True)
    assert "hung: the shard took longer than 1 s (extract.run.job_seconds)" in failed.reason
    assert sorted(outcome.index for outcome in outcomes if isinstance(outcome, ShardEntry)) == [0, 2, 3]


def test_workers_are_replaced_after_some_jobs(apart: ExecutionConfig, tmp_path: Path) -> None:
    carry_out(tmp_path, work, 7, apart.model_copy(update={"recycle_after": 3}))
    assert attempts(tmp_path) == dict.fromkeys(range(7), 1)
    assert len({path.read_text() for path in tmp_path.glob("done-*")}) == 3


# ---- Ray -------------------------------------------------------------------------------------------------------------


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
