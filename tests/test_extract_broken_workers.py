"""A worker that cannot work any more but does not die: it is replaced, and no shard is given up for its sake."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import extract.worker
from extract.config import ExecutionConfig, ExtractConfig
from extract.driver import drive
from extract.failures import breaks_worker, is_memory
from extract.jobs import Done, Event, FailedJob, Job, Raised, Ready
from extract.run import run
from storage.errors import DecantError
from storage.folder import load_plan
from storage.receipts import committed_shards
from storage.records import ShardEntry
from storage.stage import StopRequest

CUDA_ERROR = RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ...")


class Workers:
    """Two at a time, of which some only fail. A shard of `poisonous` fails with all of them."""

    can_kill, size = True, 2

    def __init__(
        self, broken: frozenset[int], error: Exception, poisonous: frozenset[int] = frozenset(), at_a_time: int = 1
    ) -> None:
        self.broken, self.error, self.poisonous, self.at_a_time = broken, error, poisonous, at_a_time
        self.numbers, self.jobs = itertools.count(), dict[int, list[Job]]()
        self.coming_up: list[int] = []
        self.num_failed = 0

    def start(self) -> int:
        number = next(self.numbers)
        self.jobs[number] = []
        self.coming_up.append(number)
        return number

    def submit(self, worker: int, job: Job) -> None:
        self.jobs[worker].append(job)

    def wait(self, seconds: float) -> Sequence[Event]:
        ups, self.coming_up = self.coming_up, []
        events: list[Event] = [Ready(number, self.at_a_time) for number in ups]
        for number, jobs in self.jobs.items():
            if not jobs:
                continue
            job = jobs.pop(0)
            if number in self.broken or job.shard in self.poisonous:
                self.num_failed += 1
                return [*events, Raised(number, job, self.error)]  # soon
            events.append(Done(number, job, f"done {job.shard}"))
        return events

    def kill(self, worker: int) -> None:
        del self.jobs[worker]


def outcomes(pool: Workers, num_jobs: int) -> list[str | FailedJob]:
    jobs = map(Job, range(num_jobs))
    return list(drive(pool, jobs, ExecutionConfig(), find_committed=lambda job: None, stop=StopRequest()))


@pytest.mark.parametrize("at_a_time", [1, 2])
@pytest.mark.parametrize("broken", [{0}, {1}, {0, 1}])
def test_a_worker_that_lost_its_gpu_is_replaced_at_once(broken: set[int], at_a_time: int) -> None:
    pool = Workers(frozenset(broken), CUDA_ERROR, at_a_time=at_a_time)
    assert sorted(map(str, outcomes(pool, 30))) == sorted(f"done {shard}" for shard in range(30))
    assert pool.num_failed == len(broken)
    assert next(pool.numbers) == 2 + len(broken)


@pytest.mark.parametrize("at_a_time", [1, 2])
@pytest.mark.parametrize("broken", [0, 1])
def test_a_worker_that_only_fails_is_replaced_before_a_shard_is_given_up_for_it(broken: int, at_a_time: int) -> None:
    pool = Workers(frozenset({broken}), OSError("nobody knows"), at_a_time=at_a_time)
    assert sorted(map(str, outcomes(pool, 30))) == sorted(f"done {shard}" for shard in range(30))
    assert pool.num_failed <= 4
    assert next(pool.numbers) == 3


def test_a_shard_that_fails_everywhere_is_still_given_up() -> None:
    for error in (CUDA_ERROR, ValueError("bad luck")):
        found = outcomes(Workers(frozenset(), error, poisonous=frozenset({3, 11})), 20)
        assert sorted(failed.job.shard for failed in found if isinstance(failed, FailedJob)) == [3, 11]
        assert len(found) == 20


@pytest.mark.parametrize(
    ("error", "is_broken"),
    [
        (CUDA_ERROR, True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), True),
        (RuntimeError("teacher 'toy': AcceleratorError: CUDA error: device-side assert triggered"), True),
        (RuntimeError("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (MemoryError(), False),
        (ValueError("no luck"), False),
    ],
)
def test_errors_after_which_nothing_works_are_known(error: Exception, is_broken: bool) -> None:
    assert breaks_worker(error) == is_broken
    assert is_memory(error) == ("emory" in f"{type(error).__name__} {error}" and not is_broken)


def test_where_nothing_works_any_more_the_run_ends_also_after_a_good_beginning(
    make_index: Callable[..., tuple[Path, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = make_index()
    extract_shard = extract.worker.extract_shard
    tried = []

    def fail_later(job: Job, **arguments: object) -> tuple[ShardEntry, ...]:
        tried.append(job.shard)
        if job.shard >= 3:
            raise OSError("the images are gone")
        return extract_shard(job, **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(extract.worker, "extract_shard", fail_later)
    how = ExecutionConfig(executor="inline", device="cpu", max_attempts=1)
    cfg = ExtractConfig(teacher="toy", views=1, records_per_shard=1, run=how)
    with pytest.raises(
        DecantError, match="10 shards were given up in a row, the last one: OSError: the images are gone"
    ):
        run(cfg, {"data": data}, tmp_path / "store")
    assert tried == list(range(13)), "of 16"
    assert sorted(committed_shards(tmp_path / "store", load_plan(tmp_path / "store"))) == [0, 1, 2]
