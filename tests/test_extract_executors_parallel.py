"""Workers that take several jobs at a time, as those on a GPU do: in this process and in others."""

import os
import time
from functools import partial
from pathlib import Path

import pytest

from extract.config import ExecutionConfig
from extract.jobs import FailedJob, Job
from storage.records import ShardEntry
from storage.stage import Interrupted, StopRequest
from tests.fixtures.jobs import Worker, attempts, carry_out, entry_of, fail_sometimes


class Parallel(Worker):
    """Takes three jobs at a time."""

    jobs_at_a_time = 3


def meet_others(job: int, attempt: int, folder: Path) -> None:
    """Wait until three jobs are at work."""
    (folder / f"at-work-{job}").touch()
    deadline = time.monotonic() + 30
    while len(list(folder.glob("at-work-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(list(folder.glob("at-work-*"))) >= 3


def test_a_worker_may_take_several_jobs_at_a_time(tmp_path: Path) -> None:
    cfg = ExecutionConfig(executor="inline")
    outcomes = carry_out(tmp_path, meet_others, 7, cfg, partial(Parallel, act=meet_others))
    assert sorted(outcomes, key=str) == [entry_of(job) for job in range(7)]
    assert attempts(tmp_path) == dict.fromkeys(range(7), 1)


def test_failures_of_jobs_side_by_side_are_told_apart(tmp_path: Path) -> None:
    cfg = ExecutionConfig(executor="inline")
    outcomes = carry_out(tmp_path, fail_sometimes, 5, cfg, partial(Parallel, act=fail_sometimes))
    assert attempts(tmp_path) == {0: 1, 1: 3, 2: 1, 3: 3, 4: 1}
    assert sorted(map(str, outcomes)) == sorted(
        map(str, [entry_of(0), FailedJob(Job(1), "ValueError: no luck with 1"), entry_of(2), entry_of(3), entry_of(4)])
    )


def test_a_stop_ends_jobs_side_by_side(tmp_path: Path) -> None:
    stop, cfg = StopRequest(), ExecutionConfig(executor="inline")

    def ask(job: int, attempt: int, folder: Path) -> None:
        if job == 4:
            stop.signal_name = "SIGTERM"

    with pytest.raises(Interrupted):
        carry_out(tmp_path, ask, 50, cfg, partial(Parallel, act=ask), stop=stop)
    assert len(attempts(tmp_path)) < 12
    assert len(list(tmp_path.glob("done-*"))) == len(attempts(tmp_path)), "what was begun is finished"


# ---- those with processes --------------------------------------------------------------------------------------------


def kill_side_by_side(job: int, attempt: int, folder: Path) -> None:
    """Three are at work; then one of them kills their process whenever it is tried."""
    if job < 3:
        meet_others(job, attempt, folder)
    if job == 2:
        time.sleep(0.3)
        os._exit(139)
    if job < 2 and attempt == 1:
        time.sleep(1.5)


@pytest.mark.parametrize("executor", ["process", pytest.param("ray", marks=pytest.mark.ray)])
def test_of_jobs_side_by_side_on_a_gpu_only_the_one_that_kills_is_given_up(
    executor: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Even with a single attempt: those that were there are tried again one by one."""
    if executor == "ray":
        request.getfixturevalue("ray_session")  # believes in one GPU
    cfg = ExecutionConfig.model_validate({"executor": executor, "max_attempts": 1, "workers": 1})
    outcomes = carry_out(tmp_path, kill_side_by_side, 6, cfg, partial(Parallel, act=kill_side_by_side))
    assert [outcome.job.shard for outcome in outcomes if isinstance(outcome, FailedJob)] == [2]
    entries = [outcome for outcome in outcomes if isinstance(outcome, ShardEntry)]
    assert sorted(entry.index for entry in entries) == [0, 1, 3, 4, 5]
    assert attempts(tmp_path) == {0: 2, 1: 2, 2: 2, 3: 1, 4: 1, 5: 1}
