"""An extraction that is interrupted, killed or fails in places: the same command ends with the same bytes."""

import functools
import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import extract.worker
from extract import final_audit
from extract.config import ExecutionConfig, ExtractConfig
from extract.driver import drive
from extract.jobs import Job
from extract.pools import open_pool
from extract.run import run
from storage.errors import QuarantineError
from storage.folder import load_plan
from storage.receipts import committed_shards
from storage.records import ShardEntry
from storage.stage import Interrupted, SilentProgress, StopRequest, Terminated, raise_on_sigterm
from storage.verify import iter_damage

CFG = ExtractConfig(
    teacher="toy", views=2, records_per_shard=6, run=ExecutionConfig(executor="inline", batch_size=4, device="cpu")
)
"""16 training images in 6 shards."""
MakeIndex = Callable[..., tuple[Path, object]]
TreeBytes = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def undisturbed(make_index: MakeIndex, tmp_path: Path, tree_bytes: TreeBytes) -> tuple[Path, dict[str, bytes]]:
    """An index file, and the files of a store that was made from it in one go."""
    data, _ = make_index()
    run(CFG, {"data": data}, tmp_path / "undisturbed")
    return data, tree_bytes(tmp_path / "undisturbed")


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The shards that are worked on from here on."""
    shards: list[int] = []
    extract_shard = extract.worker.extract_shard

    def note(job: Job, **arguments: object) -> tuple[ShardEntry, ...]:
        shards.append(job.shard)
        return extract_shard(job, **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(extract.worker, "extract_shard", note)
    return shards


# ---- interruptions ---------------------------------------------------------------------------------------------------


class AfterShards(SilentProgress):
    """Does something after some shards."""

    def __init__(self, count: int, act: Callable[[], object]) -> None:
        self.left, self.act = count, act

    def advance(self, amount: int, **facts: object) -> None:
        self.left -= 1
        if self.left == 0:
            self.act()


def crash() -> None:
    raise ZeroDivisionError("a bug in the middle")


@pytest.mark.parametrize(
    ("count", "act", "expected"),
    [
        (1, lambda: signal.raise_signal(signal.SIGTERM), Interrupted),
        (5, lambda: signal.raise_signal(signal.SIGTERM), Interrupted),
        (6, lambda: signal.raise_signal(signal.SIGTERM), Interrupted),
        (3, lambda: signal.raise_signal(signal.SIGINT), Interrupted),
        (2, crash, ZeroDivisionError),
    ],
    ids=["SIGTERM", "SIGTERM near the end", "SIGTERM at the end", "SIGINT", "bug"],
)
def test_an_interrupted_store_goes_on_where_it_stopped(
    count: int, act: Callable[[], object], expected: type[Exception],
    undisturbed: tuple[Path, dict[str, bytes]], worked: list[int], tree_bytes: TreeBytes, tmp_path: Path,
) -> None:  # fmt: skip
    data, files = undisturbed
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(expected):
        run(CFG, {"data": data}, tmp_path / "store", AfterShards(count, act))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert worked == list(range(count))
    worked.clear()
    run(CFG, {"data": data}, tmp_path / "store")
    assert worked == list(range(count, 6))
    assert tree_bytes(tmp_path / "store") == files


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_during_the_audit_at_the_end_is_heard_at_once(
    number: signal.Signals, expected: type[BaseException], undisturbed: tuple[Path, dict[str, bytes]],
    worked: list[int], tree_bytes: TreeBytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It may take minutes to load a teacher for that."""
    data, files = undisturbed

    def audit(*arguments: object, **options: object) -> None:
        signal.raise_signal(number)
        raise AssertionError("not heard")

    with monkeypatch.context() as patch, raise_on_sigterm(), pytest.raises(expected):
        patch.setattr(final_audit, "audit_as_made", audit)
        run(CFG, {"data": data}, tmp_path / "store")
    assert not (tmp_path / "store" / "manifest.json").exists()
    worked.clear()
    run(CFG, {"data": data}, tmp_path / "store")
    assert worked == []
    assert tree_bytes(tmp_path / "store") == files


def test_a_killed_store_goes_on_and_is_the_same(
    make_index: MakeIndex, fork: Callable[[Callable[[], object]], int], tree_bytes: TreeBytes, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Killed at the n-th file that is given its final name: between two files of a shard, before or after a receipt."""
    data, _ = make_index(per_class=4)
    run(CFG, {"data": data}, tmp_path / "undisturbed")
    files = tree_bytes(tmp_path / "undisturbed")

    def die_at(name_number: int) -> None:
        names = itertools.count(1)
        for function in ("replace", "link"):
            give_name = getattr(os, function)

            def give(source: Path, target: Path, give_name: Callable[[Path, Path], None] = give_name) -> None:
                if next(names) == name_number:
                    os.kill(os.getpid(), signal.SIGKILL)
                give_name(source, target)

            monkeypatch.setattr(os, function, give)
        run(CFG, {"data": data}, tmp_path / f"killed-{name_number}")

    kills = 0
    for at in itertools.count(1, 3):
        _, status = os.waitpid(fork(functools.partial(die_at, at)), 0)
        root = tmp_path / f"killed-{at}"
        if os.WIFSIGNALED(status):
            assert not (root / "manifest.json").exists()
            kills += 1
        run(CFG, {"data": data}, root)
        assert tree_bytes(root) == files
        assert all(not damage for _, damage in iter_damage(root))
        if not os.WIFSIGNALED(status):
            break
    assert kills >= len(files) // 3


# ---- quarantine ------------------------------------------------------------------------------------------------------


def test_a_shard_that_always_fails_is_given_up_and_the_others_finish(
    undisturbed: tuple[Path, dict[str, bytes]], tree_bytes: TreeBytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, files = undisturbed
    extract_shard = extract.worker.extract_shard
    attempts: list[int] = []

    def fail(job: Job, **arguments: object) -> tuple[ShardEntry, ...]:
        attempts.append(job.shard)
        if job.shard == 2 or (job.shard == 4 and attempts.count(4) < 3):
            raise RuntimeError("out of something")
        return extract_shard(job, **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(extract.worker, "extract_shard", fail)
    with pytest.raises(QuarantineError, match=r"1 of 6 shards .*shard 2 after 3 attempts, .*: RuntimeError: out"):
        run(CFG, {"data": data}, tmp_path / "store")
    assert attempts == [0, 1, 2, 2, 2, 3, 4, 4, 4, 5]
    assert sorted(committed_shards(tmp_path / "store", load_plan(tmp_path / "store"))) == [0, 1, 3, 4, 5]
    assert not (tmp_path / "store" / "manifest.json").exists()

    with pytest.raises(QuarantineError, match="tried again with --retry-failed"):
        run(CFG, {"data": data}, tmp_path / "store")
    assert len(attempts) == 10, "not unless it is asked for"
    monkeypatch.setattr(extract.worker, "extract_shard", extract_shard)
    run(CFG, {"data": data}, tmp_path / "store", retry_failed=True)
    assert tree_bytes(tmp_path / "store") == files


# ---- the executor itself ---------------------------------------------------------------------------------------------


def no_worker() -> Callable[[Job], ShardEntry]:
    raise AssertionError("no job, no worker")


def test_no_job_needs_no_worker() -> None:
    cfg, stop = ExecutionConfig(executor="inline"), StopRequest()
    with open_pool(cfg, no_worker, 0, stop) as pool:
        assert list(drive(pool, [], cfg, find_committed=lambda job: None, stop=stop)) == []


def test_a_stop_ends_between_jobs() -> None:
    begun: list[int] = []

    def work(job: Job) -> ShardEntry:
        begun.append(job.shard)
        return ShardEntry(store="", index=job.shard, num_images=1, num_records=1, files=(), record_crc32c="")

    stop, cfg = StopRequest(), ExecutionConfig(executor="inline")
    with open_pool(cfg, lambda: work, 5, stop) as pool:
        outcomes = drive(pool, map(Job, range(5)), cfg, find_committed=lambda job: None, stop=stop)
        assert isinstance(next(outcomes), ShardEntry)
        stop.signal_name = "SIGTERM"
        with pytest.raises(Interrupted):
            next(outcomes)
    assert begun == [0]
