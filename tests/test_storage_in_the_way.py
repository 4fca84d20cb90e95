"""A pipe, a folder or a link that leads back, where a file should be: told in one line, and never waited for."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from extract.config import ExecutionConfig, ExtractConfig
from extract.events import EventLog, read_tail
from extract.extraction import load_extraction
from extract.run import run
from pipeline.workspace import read_result, read_state
from storage.atomic import open_regular, read_json, read_regular, remove_file, write_file
from storage.claims import ShardClaims
from storage.errors import DamagedError, DecantError, DiskError, InputError
from storage.lock import hold_lock
from storage.quarantine import find_given_up
from storage.reader import open_store
from storage.verify import iter_damage

pytestmark = pytest.mark.timeout(60, method="thread")
CFG = ExtractConfig(
    teacher="toy", views=2, records_per_shard=6, run=ExecutionConfig(executor="inline", device="cpu", audit_records=0)
)
"""What `toy_store` is made with."""


def put_pipe(path: Path) -> None:
    os.mkfifo(path)


def put_folder(path: Path) -> None:
    path.mkdir()
    (path / "content").touch()


def put_loop(path: Path) -> None:
    path.symlink_to(path)


Put = Callable[[Path], None]
in_the_way = pytest.mark.parametrize("put", [put_pipe, put_folder, put_loop], ids=lambda put: put.__name__)


@in_the_way
def test_a_small_file_is_a_file(put: Put, tmp_path: Path) -> None:
    put(tmp_path / "x")
    for read in (read_regular, read_json):
        with pytest.raises(DamagedError, match=r"x cannot be read: .*; move away what is there"):
            read(tmp_path / "x")
    with pytest.raises(OSError, match=r"pipe|folder|symbolic"):
        open_regular(tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "y")
    (tmp_path / "file").write_bytes(b"content")
    assert read_regular(tmp_path / "file") == b"content"
    assert read_regular(tmp_path / "file", 3) == b"con"
    (tmp_path / "file").chmod(0)
    if os.geteuid():
        with pytest.raises(DiskError, match="Permission denied"):
            read_regular(tmp_path / "file")


def test_what_cannot_be_replaced_or_removed_is_told(tmp_path: Path) -> None:
    put_folder(tmp_path / "x")
    with pytest.raises(DiskError, match=r"cannot write .*x: Is a directory; move away what is there"):
        remove_file(tmp_path / "x")
    remove_file(tmp_path / "nothing")
    with pytest.raises(DiskError, match=r"cannot write .*x: Is a directory; move away what is there"):
        write_file(tmp_path / "x", b"")


@in_the_way
def test_a_lock_and_a_claim_are_files(put: Put, tmp_path: Path) -> None:
    put(tmp_path / "LOCK")
    (tmp_path / "claims").mkdir()
    put(tmp_path / "claims" / "00003")
    with pytest.raises(DiskError, match=r"LOCK.* move"), hold_lock(tmp_path):
        pass
    with pytest.raises(DiskError, match=r"00003.* move"):
        ShardClaims(tmp_path).take(3)


@in_the_way
def test_what_only_tells_is_passed_over(put: Put, tmp_path: Path) -> None:
    (tmp_path / "quarantine").mkdir()
    for name in ("quarantine/00003.json", "result.json", "state.json", "events"):
        put(tmp_path / name)
    assert find_given_up(tmp_path, 3) is None
    assert read_result(tmp_path) is None
    assert read_state(tmp_path) is None
    assert read_tail(tmp_path / "events") == []
    log = EventLog(tmp_path / "events")
    for _ in range(2000):
        log.write("shard", text="x" * 100)
    assert log.num_lost == (0 if put is put_pipe else 2000)


def test_a_pipe_that_is_full_does_not_stop_the_log(tmp_path: Path) -> None:
    put_pipe(tmp_path / "events")
    held = os.open(tmp_path / "events", os.O_RDONLY | os.O_NONBLOCK)
    log = EventLog(tmp_path / "events")
    for _ in range(2000):
        log.write("shard", text="x" * 100)
    assert 0 < log.num_lost < 2000
    os.close(held)


@in_the_way
@pytest.mark.parametrize(
    "name", ["plan.json", "manifest.json", "images.bin", "zarr.json", "receipts/00001.json", "data", "extraction.json"]
)
def test_a_store_with_something_in_the_way_is_never_waited_for(
    name: str, put: Put, toy_store: Callable[..., tuple[Path, Path]], tree_bytes: Callable[[Path], dict[str, bytes]]
) -> None:
    """Reading, verifying and extracting end; what can be made again is."""
    data, root = toy_store()
    whole = tree_bytes(root)
    if name == "data":
        name = next(file for file in whole if "/c/1/" in f"/{file}")
    path = root / name
    path.unlink(missing_ok=True)
    put(path)
    with contextlib.suppress(DamagedError, DiskError, InputError):
        store = open_store(root)
        for key in store.images.keys:
            store.read(key, 0)  # type: ignore[arg-type]
    if name == "extraction.json":
        with pytest.raises(DecantError):
            load_extraction(root)
    else:
        assert any(found.name == name for _, damage in iter_damage(root) for found in damage)
    try:
        run(CFG, {"data": data}, root)
    except (DamagedError, DiskError) as error:
        assert str(path) in str(error)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        run(CFG, {"data": data}, root)
    assert tree_bytes(root) == whole
