"""Full disks, refusing disks, killed processes: going on afterwards gives the bytes of an undisturbed store."""

import errno
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from storage.errors import DiskError, InputError
from storage.folder import create_store, finish_store, sweep
from storage.image_index import ImageList
from storage.layouts import LAYOUTS
from storage.lock import hold_lock
from storage.reader import open_store
from storage.receipts import committed_shards
from storage.records import StorePlan
from storage.verify import iter_damage

LEAST_STEPS = {"zarr": 100, "wds": 50}
"""That a store of two shards takes: more files for Zarr."""

Fill = Callable[[Path], None]
Fork = Callable[[Callable[[], object]], int]
TreeBytes = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


@pytest.fixture(params=["zarr", "wds"])
def small(
    request: pytest.FixtureRequest, image_list: Callable[[int], ImageList], store_plan: Callable[..., StorePlan]
) -> tuple[StorePlan, ImageList]:
    images = image_list(3)
    return store_plan(images, views_per_image=1, images_per_shard=2, backend=request.param, view_px=8), images


@pytest.fixture
def fill(small: tuple[StorePlan, ImageList], fill_shard: Any, monkeypatch: pytest.MonkeyPatch) -> Fill:
    """What extraction does: begin or go on, commit what is missing, finish."""
    plan, images = small
    layout = LAYOUTS[plan.backend]
    metadata = layout.metadata(plan)
    monkeypatch.setitem(LAYOUTS, plan.backend, layout._replace(metadata=lambda plan: dict(metadata)))  # slow for Zarr

    def work(root: Path) -> None:
        create_store(root, plan, images)
        sweep(root, plan)
        done = committed_shards(root, plan)
        for index in range(plan.num_shards):
            if index not in done:
                fill_shard(root, plan, images, index, bad=images.keys[1:2]).commit()
        finish_store(root)

    return work


class Steps:
    """Calls `stop` in the place of step number `at` of all that changes a disk: write, fsync, rename, link, new folder.
    Of a write, half is done before."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, stop: Callable[[], object]) -> None:
        self.count, self.at, self.stop = 0, at, stop
        for name in ("replace", "link", "mkdir"):
            patch.setattr(os, name, self.counted(getattr(os, name)))
        patch.setattr(os, "fsync", self.counted(lambda descriptor: None))
        patch.setattr(os, "writev", self.halved(os.writev))

    def halved(self, function: Callable[[int, Sequence[Any]], int]) -> Callable[[int, Sequence[Any]], int]:
        def write(descriptor: int, chunks: Sequence[Any]) -> int:
            self.count += 1
            if self.count == self.at:
                data = b"".join(chunks)
                os.write(descriptor, data[: len(data) // 2])
                self.stop()
            return function(descriptor, chunks)

        return write

    def counted(self, function: Callable[..., object]) -> Callable[..., object]:
        def step(*arguments: Any, **options: Any) -> object:
            self.count += 1
            if self.count == self.at:
                self.stop()
            return function(*arguments, **options)

        return step


def raise_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def assert_honest(root: Path) -> None:
    """What a stopped writer left is either not there for a reader, or whole."""
    if (root / "manifest.json").exists():
        assert not any(damage for _, damage in iter_damage(root))
    else:
        with pytest.raises(InputError):
            open_store(root)
    if (root / "plan.json").exists():
        found = [problem for _, damage in iter_damage(root) for problem in damage]
        honest = ("missing: not extracted", "missing: all shards are there")
        assert all(problem.found.startswith(honest) for problem in found), found


@pytest.fixture
def undisturbed(tmp_path: Path, fill: Fill, tree_bytes: TreeBytes) -> dict[str, bytes]:
    fill(tmp_path / "undisturbed")
    return tree_bytes(tmp_path / "undisturbed")


def test_a_full_disk_at_every_single_step(
    tmp_path: Path, small: Any, fill: Fill, undisturbed: Any, tree_bytes: TreeBytes
) -> None:
    at, is_over = 0, False
    while not is_over:
        at += 1
        root = tmp_path / "store"
        shutil.rmtree(root, ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            steps = Steps(patch, at, raise_full)
            try:
                fill(root)
                is_over = steps.count < at  # otherwise a new folder was refused that is there already
            except DiskError as error:
                assert "the disk is full" in str(error) and "give the same command again" in str(error)
            assert not list(root.rglob("*.partial")), f"step {at}"
            assert_honest(root)
            fill(root)
        assert tree_bytes(root) == undisturbed, f"step {at}"
    assert at > LEAST_STEPS[small[0].backend]


def test_sudden_death_at_every_single_step(
    tmp_path: Path, small: Any, fill: Fill, undisturbed: Any, tree_bytes: TreeBytes, fork: Fork
) -> None:
    at, status = 0, 1
    while status:
        at += 1
        root = tmp_path / "store"
        shutil.rmtree(root, ignore_errors=True)

        def work(root: Path = root, at: int = at) -> None:
            with pytest.MonkeyPatch.context() as patch:
                Steps(patch, at, lambda: os._exit(137))
                fill(root)

        status = os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1])
        assert status in (0, 137)
        assert_honest(root)
        with pytest.MonkeyPatch.context() as patch:
            Steps(patch, 0, raise_full)  # for its `fsync`, which does nothing
            fill(root)
        assert tree_bytes(root) == undisturbed, f"step {at}"
    assert at > LEAST_STEPS[small[0].backend]


def test_kills_at_random_moments(tmp_path: Path, fill: Fill, tree_bytes: TreeBytes, fork: Fork) -> None:
    """Each store is killed again and again until it is finished in spite of that."""
    seed = time.time_ns() % 2**32
    print(f"seed {seed}")
    chance = random.Random(seed)
    started = time.monotonic()
    fill(tmp_path / "undisturbed")
    seconds = time.monotonic() - started
    undisturbed = tree_bytes(tmp_path / "undisturbed")
    kills, number = 0, 0
    while kills < 60:
        number += 1
        root = tmp_path / f"store{number}"
        for _ in range(5):
            process = fork(lambda root=root: fill(root))
            time.sleep(chance.uniform(0, seconds))
            os.kill(process, signal.SIGKILL)
            if not os.WIFSIGNALED(os.waitpid(process, 0)[1]):
                break
            kills += 1
            assert_honest(root)
        fill(root)
        assert tree_bytes(root) == undisturbed, f"seed {seed}, store {number}"
        assert not list(root.rglob("*.partial")) and not list((root / "attempts").glob("*"))


@pytest.mark.parametrize("limit", [100, 300, 2000])
def test_a_real_limit_of_file_sizes(
    limit: int, tmp_path: Path, small: Any, fill: Fill, undisturbed: Any, tree_bytes: TreeBytes, fork: Fork
) -> None:
    root = tmp_path / "store"

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        advice = r"raise the limit \(`ulimit -f`\), then give the same command again"
        with pytest.raises(DiskError, match=rf"file-size limit.*{advice}"):
            fill(root)

    if limit == 300:
        fill(root)
        shutil.rmtree(root / "receipts")
    assert os.waitpid(fork(work), 0)[1] == 0
    assert_honest(root)
    fill(root)
    assert tree_bytes(root) == undisturbed


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.EIO])
@pytest.mark.parametrize("at", [1, 2, 4, 5, 6])
def test_other_refusals_of_the_system(number: int, at: int, tmp_path: Path, fill: Fill) -> None:
    def refuse() -> None:
        raise OSError(number, os.strerror(number))

    with pytest.MonkeyPatch.context() as patch:
        Steps(patch, at, refuse)
        with pytest.raises(DiskError, match=f"cannot write {tmp_path}") as error:
            fill(tmp_path / "store")
    is_full = number in (errno.EDQUOT, errno.EFBIG)
    room = "raise the limit" if number == errno.EFBIG else "make room"
    assert (room if is_full else f"{os.strerror(number)}; choose another folder") in str(error.value)
    assert_honest(tmp_path / "store")


def test_a_file_in_the_place_of_a_folder(tmp_path: Path, fill: Fill) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(DiskError, match="Not a directory; choose another folder"):
            fill(root)
        with pytest.raises(DiskError, match="Not a directory; choose another folder"), hold_lock(root):
            pass


def test_a_store_that_may_only_be_read(small: Any, fill: Fill, fork: Fork) -> None:
    plan, images = small
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "store"
        fill(root)
        for path in (Path(folder), root, *root.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)

        def work() -> None:
            if os.getuid() == 0:
                os.setuid(65534)  # root may write anywhere
            assert len(list(open_store(root).iter_shard(0))) == 1
            assert not any(damage for _, damage in iter_damage(root))
            create_store(root, plan, images)  # nothing to write
            for refused in (lambda: hold_lock(root).__enter__(), lambda: finish_store(root), lambda: fill(root.parent)):
                with pytest.raises(DiskError, match="Permission denied; choose another folder"):
                    refused()

        assert os.waitpid(fork(work), 0)[1] == 0
        for path in (Path(folder), root, *root.rglob("*")):
            path.chmod(0o755)
