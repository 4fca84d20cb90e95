"""What one worker does with a job: parts of a shard, images that are left out, smaller batches, and disks that fail
for a moment."""

import errno
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from extract import worker as working
from extract.config import ExecutionConfig, ExtractConfig
from extract.filling import Filling
from extract.jobs import ENDS_WORKERS, Job
from extract.plan import build_plan
from extract.render import read_patiently
from extract.worker import Worker
from storage import data_files, image_folder
from storage.errors import BadImageError
from storage.image_index import build_index, load_index
from storage.records import BadImage

RUN = ExecutionConfig(executor="inline", batch_size=4, device="cpu")
CFG = ExtractConfig(teacher="toy", views=2, records_per_shard=12, run=RUN)
"""16 training images in 3 shards of 6, 6 and 4."""
MakeWorker = Callable[..., Worker]
TreeBytes = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def make_worker(make_index: Callable[..., tuple[Path, object]], tmp_path: Path) -> MakeWorker:
    """A worker of a store that has begun in `tmp_path / name`."""
    images = load_index(make_index()[0]).split("train")

    def make(name: str = "store", run: ExecutionConfig = RUN) -> Worker:
        root = tmp_path / name
        cfg = CFG.model_copy(update={"run": run})
        Filling.begin(cfg, root, build_plan(cfg, images, root), images)
        return Worker([root], run)

    return make


def batches_of(worker: Worker) -> list[int]:
    """The sizes of batches that the teacher gets from here on."""
    sizes: list[int] = []
    worker.stores[0].teacher.module.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    return sizes


def positions_read(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The images that are read from here on."""
    positions: list[int] = []
    read = worker.images.read_image

    def note(position: int) -> NDArray[np.uint8]:
        positions.append(position)
        return read(position)

    monkeypatch.setattr(worker.images, "read_image", note)
    return positions


def test_a_probe_looks_at_its_images_and_commits_nothing(
    make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch, tree_bytes: TreeBytes, tmp_path: Path
) -> None:
    worker = make_worker()
    read, sizes, before = positions_read(worker, monkeypatch), batches_of(worker), tree_bytes(tmp_path / "store")
    found = worker(Job(1, probed=(2, 5)))
    assert found.entries == ()
    assert read == [8, 9, 10]
    assert sizes == [4, 2]
    assert found.seconds.forward > 0
    assert tree_bytes(tmp_path / "store") == before


def test_images_that_end_workers_are_holes_and_never_read(
    make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker()
    read, keys = positions_read(worker, monkeypatch), worker.images.keys
    [entry] = worker(Job(0, excluded=(keys[1], keys[4]))).entries
    assert read == [0, 2, 3, 5]
    assert entry.num_records == 8
    assert entry.bad_images == (BadImage(key=keys[1], reason=ENDS_WORKERS), BadImage(key=keys[4], reason=ENDS_WORKERS))


@pytest.mark.parametrize(
    ("batch_size", "halvings", "expected"),
    [(0, 0, [8, 4]), (0, 1, [4, 4, 4]), (0, 2, [2] * 6), (0, 9, [1] * 12), (8, 2, [8, 4])],
)
def test_batches_shrink_with_each_death_where_nobody_chose_their_size(
    batch_size: int, halvings: int, expected: list[int], make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working, "choose_batch_size", lambda *_: 8)
    worker = make_worker(run=RUN.model_copy(update={"batch_size": batch_size}))
    sizes = batches_of(worker)
    worker(Job(0, halvings=halvings))
    assert sizes == expected


class StopHere(Exception):
    pass


def test_a_stop_is_looked_for_while_a_shard_is_made(
    make_worker: MakeWorker, tree_bytes: TreeBytes, tmp_path: Path
) -> None:
    worker = make_worker()
    before, left = tree_bytes(tmp_path / "store"), [3]

    def check() -> None:
        left[0] -= 1
        if not left[0]:
            raise StopHere

    worker.check_stop = check
    with pytest.raises(StopHere):
        worker(Job(0))
    assert tree_bytes(tmp_path / "store") == before


# ---- disks -----------------------------------------------------------------------------------------------------------


class Disk:
    """Images that fail some times before they can be read."""

    def __init__(self, number: int, failures: int) -> None:
        self.number, self.failures, self.attempts = number, failures, 0

    def read_image(self, position: int) -> NDArray[np.uint8]:
        self.attempts += 1
        if self.attempts <= self.failures:
            raise BadImageError("cannot be read") from OSError(self.number, "no")
        return np.full((2, 2, 3), position, np.uint8)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    pauses: list[float] = []
    monkeypatch.setattr("extract.render.time.sleep", pauses.append)
    return pauses


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE])
@pytest.mark.parametrize("failures", [0, 1, 3])
def test_a_disk_with_a_bad_moment_is_asked_again(number: int, failures: int, slept: list[float]) -> None:
    disk = Disk(number, failures)
    assert read_patiently(disk, 7)[0, 0, 0] == 7  # type: ignore[arg-type]
    assert len(slept) == failures and slept == sorted(slept)
    assert all(0.1 <= pause <= 7.5 for pause in slept)


def test_a_disk_that_stays_bad_is_given_up(slept: list[float]) -> None:
    disk = Disk(errno.EIO, 99)
    with pytest.raises(BadImageError, match="cannot be read"):
        read_patiently(disk, 0)  # type: ignore[arg-type]
    assert disk.attempts == 4 and sum(slept) < 10


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EISDIR])
def test_what_no_patience_mends_is_said_at_once(number: int, slept: list[float]) -> None:
    disk = Disk(number, 99)
    with pytest.raises(BadImageError):
        read_patiently(disk, 0)  # type: ignore[arg-type]
    assert disk.attempts == 1 and not slept


def test_bad_moments_leave_no_trace_in_a_store(
    make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch, slept: list[float], tree_bytes: TreeBytes, tmp_path: Path
) -> None:
    make_worker("undisturbed")(Job(0))
    worker = make_worker()
    source, failed = worker.images.source, set[str]()
    read_bytes = source.read_bytes

    def fail_once(key: str) -> bytes:
        if key not in failed:
            failed.add(key)
            raise BadImageError(f"cannot read {key}") from OSError(errno.EIO, "Input/output error")
        return read_bytes(key)

    monkeypatch.setattr(source, "read_bytes", fail_once)
    worker(Job(0))
    assert len(slept) == 6
    assert tree_bytes(tmp_path / "store") == tree_bytes(tmp_path / "undisturbed")


def open_badly(monkeypatch: pytest.MonkeyPatch, module: ModuleType, number: int) -> list[int]:
    """Let the next two files that a module opens fail; gives how many are left."""
    left = [2]

    def fail_twice(*arguments: Any, **named: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(number, "no")
        return open(*arguments, **named)

    monkeypatch.setattr(module, "open", fail_twice, raising=False)
    return left


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_folder_of_images_is_asked_again(
    number: int, make_images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slept: list[float]
) -> None:
    """The error that patience looks for is the cause of the one that is raised."""
    images = build_index(str(make_images()), eval_fraction=0.2, seed=0, cache_dir=tmp_path / "cache").split("train")
    left = open_badly(monkeypatch, image_folder, number)
    read_patiently(images, 0)
    assert len(slept) == 2 and not left[0]


def test_a_tar_of_images_is_asked_again(
    make_images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slept: list[float]
) -> None:
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(make_images(), "images")
    images = build_index(str(tmp_path / "images.tar"), eval_fraction=0.2, seed=0, cache_dir=tmp_path / "cache").split(
        "train"
    )
    images.read_image(1)
    left = open_badly(monkeypatch, data_files, errno.EIO)
    read_patiently(images, 0)
    assert len(slept) == 2 and not left[0]
