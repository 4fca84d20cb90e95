"""Who carries out jobs, and what happens to those that fail: in this process, and on Ray with workers that die."""

import contextlib
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from extract.cluster import FailedJob, run_jobs
from extract.config import ExecutionConfig
from storage.errors import ConfigError, DecantError, InputError
from storage.records import ShardEntry
from storage.stage import Interrupted, StopRequest

Act = Callable[[int, int, Path], None]
"""What a worker does for (job, attempt, folder) before it returns."""


def entry_of(job: int) -> ShardEntry:
    return ShardEntry(store="", index=job, num_images=1, num_records=1, files=(), record_crc32c="")


class Worker:
    """Notes every attempt in a file of its own, then does as it was told."""

    def __init__(self, folder: Path, act: Act) -> None:
        self.folder, self.act = folder, act

    def __call__(self, job: int) -> ShardEntry:
        attempt = take_number(self.folder, f"job-{job}")
        self.act(job, attempt, self.folder)
        (self.folder / f"done-{job}").write_text(str(os.getpid()))
        return entry_of(job)


def take_number(folder: Path, name: str) -> int:
    """1, then 2, and so on, whichever process asks."""
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            (folder / f"{name}.{number}").touch(exist_ok=False)
            return number
    raise AssertionError


def attempts(folder: Path) -> Counter[int]:
    """How often each job was begun."""
    return Counter(int(path.stem.removeprefix("job-")) for path in folder.glob("job-*.*"))


def find_done(folder: Path, job: int) -> ShardEntry | None:
    return entry_of(job) if (folder / f"done-{job}").exists() else None


def carry_out(
    folder: Path, act: Act, jobs: int, cfg: ExecutionConfig, make: Callable[[Path], Worker] | None = None,
    stop: StopRequest | None = None,
) -> list[ShardEntry | FailedJob]:  # fmt: skip
    make_worker = partial(make or partial(Worker, act=act), folder)
    stop = StopRequest() if stop is None else stop
    return list(run_jobs(range(jobs), make_worker, cfg, find_committed=partial(find_done, folder), stop=stop))


def work(job: int, attempt: int, folder: Path) -> None:
    pass


def fail_sometimes(job: int, attempt: int, folder: Path) -> None:
    if job == 1 or (job == 3 and attempt < 3):
        raise ValueError(f"no luck with {job}\nand a story")


def refuse(job: int, attempt: int, folder: Path) -> None:
    if job == 2:
        raise InputError("image 'a/1.png' has changed")


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """One small Ray for all tests of this file; it believes in a GPU."""
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    ray.init(
        address="local", num_cpus=2, num_gpus=1, include_dashboard=False, object_store_memory=100 * 2**20,
        log_to_driver=False, logging_level="ERROR",
    )  # fmt: skip
    signal.signal(signal.SIGTERM, handler)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.shutdown()


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
        FailedJob(1, "ValueError: no luck with 1")
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


# ---- several at a time -----------------------------------------------------------------------------------------------


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
    assert outcomes == [entry_of(job) for job in range(7)]
    assert attempts(tmp_path) == dict.fromkeys(range(7), 1)


def test_failures_of_jobs_side_by_side_are_told_apart(tmp_path: Path) -> None:
    cfg = ExecutionConfig(executor="inline")
    outcomes = carry_out(tmp_path, fail_sometimes, 5, cfg, partial(Parallel, act=fail_sometimes))
    assert attempts(tmp_path) == {0: 1, 1: 3, 2: 1, 3: 3, 4: 1}
    assert sorted(map(str, outcomes)) == sorted(
        map(str, [entry_of(0), FailedJob(1, "ValueError: no luck with 1"), entry_of(2), entry_of(3), entry_of(4)])
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


# ---- Ray -------------------------------------------------------------------------------------------------------------

RAY = ExecutionConfig(executor="ray", workers=1, device="cpu")


def on_ray(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.ray(pytest.mark.usefixtures("ray_session")(test))


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
    assert [outcome.job for outcome in failed] == [1]
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
    assert outcomes == [entry_of(0), entry_of(1), entry_of(2)]


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


def kill_side_by_side(job: int, attempt: int, folder: Path) -> None:
    """Three are at work; then one of them kills their process whenever it is tried."""
    if job < 3:
        meet_others(job, attempt, folder)
    if job == 2:
        time.sleep(0.3)
        os._exit(139)
    if job < 2:
        time.sleep(1.5)


@on_ray
def test_of_jobs_side_by_side_on_a_gpu_only_the_one_that_kills_is_given_up(tmp_path: Path) -> None:
    """Even with a single attempt: those that were there are tried again one by one."""
    cfg = ExecutionConfig(executor="ray", max_attempts=1)
    outcomes = carry_out(tmp_path, kill_side_by_side, 6, cfg, partial(Parallel, act=kill_side_by_side))
    assert [outcome.job for outcome in outcomes if isinstance(outcome, FailedJob)] == [2]
    entries = [outcome for outcome in outcomes if isinstance(outcome, ShardEntry)]
    assert sorted(entry.index for entry in entries) == [0, 1, 3, 4, 5]
    assert attempts(tmp_path) == {0: 2, 1: 2, 2: 2, 3: 1, 4: 1, 5: 1}


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
