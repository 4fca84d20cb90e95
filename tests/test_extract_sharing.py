"""Several processes at one store: who gives way, who helps, and what is left when any of them is killed."""

import functools
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from extract.config import ExecutionConfig, ExtractConfig
from extract.events import events_path, read_tail
from extract.extraction import FILE_NAME
from extract.jobs import Job
from extract.join import join_store
from extract.run import run
from extract.teacher import Teacher
from storage.claims import ShardClaims
from storage.errors import ConfigError, InputError, QuarantineError, StoreBusyError
from storage.lock import hold_lock
from storage.quarantine import all_given_up
from storage.verify import iter_damage

RUN = ExecutionConfig(executor="inline", batch_size=4, device="cpu")
CFG = ExtractConfig(teacher="toy", views=2, records_per_shard=2, run=RUN)
"""16 training images in 16 shards."""
MakeIndex = Callable[..., tuple[Path, object]]
TreeBytes = Callable[[Path], dict[str, bytes]]
Fork = Callable[[Callable[[], object]], int]


@pytest.fixture
def undisturbed(make_index: MakeIndex, tmp_path: Path, tree_bytes: TreeBytes) -> tuple[Path, dict[str, bytes]]:
    """An index file, and the files of a store that one process made from it."""
    data, _ = make_index()
    run(CFG, {"data": data}, tmp_path / "undisturbed")
    return data, tree_bytes(tmp_path / "undisturbed")


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher that takes its time, in this process and in those that are forked from it."""
    speak = Teacher.__call__

    def speak_slowly(self: Teacher, pixels: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return speak(self, pixels)

    monkeypatch.setattr(Teacher, "__call__", speak_slowly)


@pytest.fixture
def seed() -> Iterator[int]:
    number = random.randrange(10**6)
    print(f"seed {number}")
    yield number


def end(pid: int) -> int:
    """Exit code, or minus the signal's number."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---- kills -----------------------------------------------------------------------------------------------------------


def test_a_driver_that_is_killed_twenty_times_ends_with_the_same_bytes(
    undisturbed: tuple[Path, dict[str, bytes]], slow: None, fork: Fork, tree_bytes: TreeBytes, tmp_path: Path, seed: int
) -> None:
    data, files = undisturbed
    moments, kills, stores = random.Random(seed), 0, 0
    while kills < 20:
        root = tmp_path / f"store-{stores}"
        stores += 1
        while True:
            pid = fork(functools.partial(run, CFG, {"data": data}, root))
            time.sleep(moments.uniform(0.02, 0.5))
            os.kill(pid, signal.SIGKILL)
            code = end(pid)
            assert code in (0, -signal.SIGKILL)
            if code == 0:
                break
            kills += 1
            if (root / "manifest.json").exists():  # what is not the store's may still lie about
                assert tree_bytes(root).items() >= files.items()
        run(CFG, {"data": data}, root)
        assert tree_bytes(root) == files


def test_of_three_that_share_a_store_any_may_be_killed(
    undisturbed: tuple[Path, dict[str, bytes]], slow: None, fork: Fork, tree_bytes: TreeBytes, tmp_path: Path, seed: int
) -> None:
    """A holder and two that joined; one or two of them die somewhere, the others finish."""
    data, files = undisturbed
    moments = random.Random(seed)
    for number in range(4):
        root = tmp_path / f"store-{number}"
        pids = [fork(functools.partial(run, CFG, {"data": data}, root))]
        wait_for((root / FILE_NAME).exists)
        pids += [fork(functools.partial(join_store, root, RUN)) for _ in range(2)]
        victims = moments.sample(range(3), 1 + number % 2) if number else [0, 1]
        for victim in victims:
            time.sleep(moments.uniform(0, 0.15))
            os.kill(pids[victim], signal.SIGKILL)
        codes = [end(pid) for pid in pids]
        assert all(code == 0 for n, code in enumerate(codes) if n not in victims), codes
        assert tree_bytes(root) == files
        assert all(not damage for _, damage in iter_damage(root))


# ---- joining ---------------------------------------------------------------------------------------------------------


def test_those_that_join_share_the_work(
    undisturbed: tuple[Path, dict[str, bytes]], slow: None, fork: Fork, tree_bytes: TreeBytes, tmp_path: Path
) -> None:
    data, files = undisturbed
    root = tmp_path / "store"
    holder = fork(functools.partial(run, CFG, {"data": data}, root))
    wait_for((root / FILE_NAME).exists)
    did = join_store(root, RUN)
    assert end(holder) == 0
    assert tree_bytes(root) == files
    made = [event.facts["shard"] for event in read_tail(events_path(root)) if event.kind == "shard"]
    assert sorted(made) == list(range(16)), "each shard once"
    assert 0 < did["shards"] < 16
    assert join_store(root, RUN) == {}, "a finished store needs no help"


def test_without_join_the_second_gives_way(
    undisturbed: tuple[Path, dict[str, bytes]], fork: Fork, tree_bytes: TreeBytes, tmp_path: Path
) -> None:
    """Two processes at a barrier, ten times: one of them fills the store, or one after the other."""
    data, files = undisturbed
    busy = 0
    for number in range(10):
        root, go = tmp_path / f"store-{number}", tmp_path / f"go-{number}"

        def start(name: str, root: Path = root, go: Path = go) -> None:
            wait_for(go.exists)
            try:
                run(CFG, {"data": data}, root)
            except StoreBusyError as error:
                assert "is being written by process" in str(error)
                (root.parent / f"{root.name}-{name}-gave-way").touch()

        pids = [fork(functools.partial(start, name)) for name in ("a", "b")]
        go.touch()
        assert [end(pid) for pid in pids] == [0, 0]
        assert tree_bytes(root) == files
        gave_way = list(tmp_path.glob(f"{root.name}-*-gave-way"))
        assert len(gave_way) <= 1
        busy += len(gave_way)
    assert busy > 0


def test_one_that_joins_needs_a_store_that_is_being_filled(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        join_store(tmp_path / "nowhere", RUN)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="not one that is being filled"):
        join_store(tmp_path / "empty", RUN)


TEACHER_FILE = """
import pathlib, torch
from extract.spec import TeacherSpec
pathlib.Path(__file__).with_suffix(".ran").touch()

class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 8, 16, 16)
    def forward(self, images):
        return self.patches(images).flatten(2).transpose(1, 2)

def teacher():
    return Network(), TeacherSpec(name="mine", input_px=32, patch_px=16, channels=8)
"""


def test_code_that_a_store_names_is_not_run_by_one_that_joins(
    make_index: MakeIndex, slow: None, fork: Fork, tmp_path: Path
) -> None:
    """A store's folder may come from anybody."""
    data, _ = make_index()
    file, root = tmp_path / "mine.py", tmp_path / "store"
    file.write_text(TEACHER_FILE)
    pid = fork(functools.partial(run, CFG.model_copy(update={"teacher": str(file)}), {"data": data}, root))
    wait_for((root / FILE_NAME).exists)
    os.kill(pid, signal.SIGKILL)
    end(pid)
    ran = file.with_suffix(".ran")
    ran.unlink()
    with pytest.raises(ConfigError, match=r"is made by the Python file .*mine\.py, which joining would run"):
        join_store(root, RUN)
    assert not ran.exists()
    join_store(root, RUN, teacher=str(file))
    assert (root / "manifest.json").exists()


def test_what_one_gave_up_is_known_to_the_other(
    undisturbed: tuple[Path, dict[str, bytes]], slow: None, fork: Fork, monkeypatch: pytest.MonkeyPatch,
    tree_bytes: TreeBytes, tmp_path: Path,
) -> None:  # fmt: skip
    import extract.worker

    data, files = undisturbed
    root, attempts = tmp_path / "store", tmp_path / "attempts.txt"
    extract_shard = extract.worker.extract_shard

    def fail(job: Job, **arguments: object) -> object:
        if job.shard == 9:
            with attempts.open("a") as file:
                file.write("x")
            raise RuntimeError("out of something")
        return extract_shard(job, **arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(extract.worker, "extract_shard", fail)
        holder = fork(functools.partial(run, CFG, {"data": data}, root))
        wait_for((root / FILE_NAME).exists)
        with pytest.raises(QuarantineError, match="out of something"):
            join_store(root, RUN)
        assert end(holder) == 1
        assert attempts.read_text() == "xxx", "tried by one of them alone"
        assert [known.shard for known in all_given_up(root)] == [9]
    run(CFG, {"data": data}, root, retry_failed=True)
    assert tree_bytes(root) == files


# ---- claims ----------------------------------------------------------------------------------------------------------


def test_a_shard_is_never_claimed_twice_at_a_time(tmp_path: Path) -> None:
    """Eight that want the same six shards, again and again."""
    held: dict[int, int] = {}
    taken = [0] * 8
    check = threading.Lock()

    def want(me: int) -> None:
        claims, choose = ShardClaims(tmp_path), random.Random(me)
        for _ in range(300):
            shard = choose.randrange(6)
            if claims.take(shard):
                with check:
                    assert held.setdefault(shard, me) == me
                    taken[me] += 1
                assert claims.take(shard), "again for one that is ours"
                time.sleep(0)
                with check:
                    del held[shard]
                claims.release(shard)
        claims.close()

    threads = [threading.Thread(target=want, args=(me,)) for me in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not held
    assert min(taken) > 0


def test_the_claims_of_a_dead_process_are_free_whatever_the_clocks_say(fork: Fork, tmp_path: Path) -> None:
    """No heartbeat, no clock, no process number: files from the future change nothing."""

    def die() -> None:
        claims = ShardClaims(tmp_path)
        assert claims.take(3)
        (tmp_path / "taken").touch()
        time.sleep(60)

    pid = fork(die)
    wait_for((tmp_path / "taken").exists)
    ours = ShardClaims(tmp_path)
    assert not ours.take(3)
    for path in tmp_path.rglob("*"):
        os.utime(path, (4e9, 4e9))  # in the year 2096
    assert not ours.take(3)
    os.kill(pid, signal.SIGKILL)
    end(pid)
    assert ours.take(3)


def test_a_lock_names_a_holder_that_decides_nothing(fork: Fork, tmp_path: Path) -> None:
    """A lock file of a dead process whose number is in use again, or with no sense in it, is no lock."""
    for left in (
        json.dumps({"host": os.uname().nodename, "pid": os.getpid(), "since": "2099-01-01 00:00:00"}),
        "\0{",
        "",
    ):
        (tmp_path / "LOCK").write_text(left)
        with hold_lock(tmp_path), pytest.raises(StoreBusyError, match=f"process {os.getpid()} on"), hold_lock(tmp_path):
            pass
