"""What was given up is tried again on demand; what others are writing is left alone; places that cannot be used."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import storage.atomic
from extract.config import ExecutionConfig, ExtractConfig
from extract.run import run
from storage.attempts import private_attempt, sweep_attempts
from storage.errors import BadImageError, DiskError, InputError
from storage.image_list import ImageList
from storage.quarantine import GivenUp, find_given_up, forget_given_up, record_given_up
from storage.verify import iter_damage

CFG = ExtractConfig(
    teacher="toy", views=2, records_per_shard=6, max_bad_fraction=1.0,
    run=ExecutionConfig(executor="inline", batch_size=4, device="cpu", audit_records=0),
)  # fmt: skip
"""16 training images in 6 shards."""
MakeIndex = Callable[..., tuple[Path, object]]
TreeBytes = Callable[[Path], dict[str, bytes]]
Fork = Callable[[Callable[[], object]], int]


# ---- once more -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("cannot be read: Input/output error", "mend or remove them, and try 2 of them again with --retry-failed"),
        ("truncated or damaged", "mend or remove them, or raise extract.max_bad_fraction"),
    ],
)
def test_too_many_unusable_images_are_told_with_what_may_help(
    reason: str, said: str, make_index: MakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = make_index()
    read_image = ImageList.read_image

    def read_badly(self: ImageList, position: int) -> Any:
        if position in (4, 8):
            raise BadImageError(reason)
        return read_image(self, position)

    monkeypatch.setattr(ImageList, "read_image", read_badly)
    with pytest.raises(InputError) as caught:
        run(CFG.model_copy(update={"max_bad_fraction": 0.1}), {"data": data}, tmp_path / "store")
    assert said in str(caught.value)


def test_images_that_could_not_be_read_are_tried_again_and_damaged_ones_are_not(
    make_index: MakeIndex, tmp_path: Path, tree_bytes: TreeBytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is unfinished, since another shard was given up."""
    data, _ = make_index()
    read_image, read = ImageList.read_image, list[int]()

    def read_badly(self: ImageList, position: int) -> Any:
        read.append(position)
        if position == 4:
            raise BadImageError("cannot be read: Input/output error")
        if position == 8:
            raise BadImageError("truncated or damaged: not all there")
        if position == 11:
            raise RuntimeError("out of something")
        return read_image(self, position)

    def read_damaged(self: ImageList, position: int) -> Any:
        read.append(position)
        if position == 8:
            raise BadImageError("truncated or damaged: not all there")
        return read_image(self, position)

    monkeypatch.setattr(ImageList, "read_image", read_damaged)
    run(CFG, {"data": data}, tmp_path / "undisturbed")
    monkeypatch.setattr(ImageList, "read_image", read_badly)
    with pytest.raises(Exception, match=r"1 of 6 shards .*--retry-failed"):
        run(CFG, {"data": data}, tmp_path / "store")
    monkeypatch.setattr(ImageList, "read_image", read_damaged)
    read.clear()
    run(CFG, {"data": data}, tmp_path / "store", retry_failed=True)
    assert set(read) == {3, 4, 5, 9, 10, 11}, "the shard that was given up, and the one of the image that was not read"
    assert tree_bytes(tmp_path / "store") == tree_bytes(tmp_path / "undisturbed")


def test_a_quarantine_that_is_damaged_tries_again(tmp_path: Path) -> None:
    known = GivenUp(shard=7, reason="why", attempts=3, is_deadly=True, host="here", when=GivenUp.now())
    record_given_up(tmp_path, known)
    assert find_given_up(tmp_path, 7) == known
    [path] = (tmp_path / "quarantine").iterdir()
    path.rename(path.with_name("00008.json"))
    assert find_given_up(tmp_path, 8) is None, "it is another shard's"
    path.write_bytes(known.to_file().replace(b"why", b"who"))
    assert find_given_up(tmp_path, 7) is None
    forget_given_up(tmp_path)
    assert not (tmp_path / "quarantine").exists()


# ---- attempts --------------------------------------------------------------------------------------------------------


def test_what_a_living_writer_has_is_not_swept(tmp_path: Path, fork: Fork) -> None:
    def write_and_wait() -> None:
        with private_attempt(tmp_path, 1) as attempt:
            (attempt / "half").touch()
            time.sleep(60)

    pid = fork(write_and_wait)
    while not list(tmp_path.glob("attempts/*/half")):
        time.sleep(0.005)
    (tmp_path / "attempts" / "00002.of_an_older_program").mkdir()
    (tmp_path / "attempts" / "a file").touch()
    sweep_attempts(tmp_path)
    [left] = (tmp_path / "attempts").iterdir()
    assert left.name.startswith("00001.")
    with private_attempt(tmp_path, 1) as other:
        assert other != left
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    sweep_attempts(tmp_path)
    assert not (tmp_path / "attempts").exists()


# ---- places ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", [8, 17, 29])
def test_a_disk_that_fails_in_the_middle_leaves_nothing_half_published(
    make_index: MakeIndex,
    tmp_path: Path,
    tree_bytes: TreeBytes,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    call: int,
) -> None:
    data, _ = make_index()
    run(CFG, {"data": data}, tmp_path / "undisturbed")
    writev, calls = os.writev, 0

    def fail(descriptor: int, chunks: Any) -> int:
        nonlocal calls
        calls += 1
        if calls >= call:
            os.write(descriptor, bytes(chunks[0])[:7])  # a part of it
            raise OSError(number, os.strerror(number))
        return writev(descriptor, chunks)

    root = tmp_path / "store"
    with monkeypatch.context() as patch:
        patch.setattr(storage.atomic.os, "writev", fail)
        with pytest.raises(DiskError, match="cannot write"):
            run(CFG, {"data": data}, root)
    assert not (root / "manifest.json").exists()
    run(CFG, {"data": data}, root)
    assert tree_bytes(root) == tree_bytes(tmp_path / "undisturbed")
    assert all(not damage for _, damage in iter_damage(root))


def test_a_place_that_cannot_be_written_is_refused_before_a_teacher_is_loaded(
    make_index: MakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = make_index()

    def never(*words: object, **options: object) -> None:
        raise AssertionError("a teacher is loaded")

    monkeypatch.setattr("extract.run.build_plan", never)
    real_open = os.open

    def refuse(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if str(path).startswith(str(tmp_path / "store")) and flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real_open(path, flags, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        began = time.monotonic()
        with pytest.raises(DiskError, match="Read-only file system; choose another folder"):
            run(CFG, {"data": data}, tmp_path / "store")
        assert time.monotonic() - began < 1
    usage = storage.atomic.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(DiskError, match=r"the store needs 0\.0\d+ MB and more at .*, where 0\.001 MB are free"):
        run(CFG, {"data": data}, tmp_path / "store")
