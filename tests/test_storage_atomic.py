"""Publishing files and holding locks, with other threads and processes in the way."""

import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage.atomic import (
    create_file,
    disk_errors,
    nearest_existing,
    private_name,
    read_json,
    to_json_bytes,
    write_file,
    write_json,
    write_private,
)
from storage.errors import DamagedError, DiskError, StoreBusyError
from storage.lock import hold_lock

Fork = Callable[[Callable[[], object]], int]


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def exit_code(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


# Files


def test_the_first_of_many_threads_wins(tmp_path: Path) -> None:
    for round_number in range(20):
        path, start = tmp_path / f"{round_number}", threading.Barrier(8)

        def work(number: int, path: Path = path, start: threading.Barrier = start) -> bool:
            start.wait()
            return create_file(path, b"%d" % number * 1000)

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(work, range(8)))
        assert sum(won) == 1 and path.read_bytes() == b"%d" % won.index(True) * 1000
    assert len(names(tmp_path)) == 20


def test_the_first_of_many_processes_wins(tmp_path: Path, fork: Fork) -> None:
    (tmp_path / "files").mkdir()

    def work(number: int) -> None:
        while not (tmp_path / "start").exists():
            pass
        won = [create_file(tmp_path / "files" / f"{name}", b"%d" % number) for name in range(30)]
        (tmp_path / f"won{number}").write_text(json.dumps(won))

    processes = [fork(lambda number=number: work(number)) for number in range(4)]
    (tmp_path / "start").touch()
    assert [exit_code(process) for process in processes] == [0] * 4
    won = [json.loads((tmp_path / f"won{number}").read_bytes()) for number in range(4)]
    for name in range(30):
        winners = [number for number in range(4) if won[number][name]]
        assert len(winners) == 1 and (tmp_path / "files" / f"{name}").read_bytes() == b"%d" % winners[0]
    assert len(names(tmp_path / "files")) == 30


def test_a_file_that_exists_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    assert create_file(path, b"first") and not create_file(path, b"second")
    assert path.read_bytes() == b"first" and names(path.parent) == ["file"]
    write_file(path, b"third")
    assert path.read_bytes() == b"third" and names(path.parent) == ["file"]


def test_readers_see_the_old_or_the_new_file_and_nothing_between(tmp_path: Path, fork: Fork) -> None:
    path, size = tmp_path / "file", 300_000
    write_file(path, b"a" * size)

    def work() -> None:
        while True:
            for letter in (b"b", b"a"):
                write_file(path, letter * size)

    process = fork(work)
    seen = set()
    until = time.monotonic() + 10
    try:
        for _ in range(1000):
            data = path.read_bytes()
            assert len(data) == size and data in (b"a" * size, b"b" * size)
            seen.add(data[:1])
        while len(seen) < 2 and time.monotonic() < until:
            seen.add(path.read_bytes()[:1])
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    assert seen == {b"a", b"b"}


@pytest.mark.parametrize("most", [None, 1, 700, 100_000])
def test_many_pieces_arrive_whole_and_in_order(
    tmp_path: Path, most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the system takes only `most` bytes at a time, as it may."""
    generator = random.Random(most)
    pieces = [generator.randbytes(generator.choice([0, 1, 30, 900])) for _ in range(1300 if most != 1 else 30)]
    taken = [memoryview(piece) if number % 2 else piece for number, piece in enumerate(pieces)]
    if most is not None:
        write = os.write
        monkeypatch.setattr(os, "write", lambda file, data: write(file, bytes(data[:most])))
        monkeypatch.setattr(os, "writev", lambda file, parts: write(file, b"".join(parts)[:most]))
    write_private(tmp_path / "file", *taken)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    write_private(tmp_path / "empty")
    assert (tmp_path / "empty").read_bytes() == b""


def test_private_names_are_hidden_beside_the_file_and_never_the_same() -> None:
    made = {private_name(Path("folder/file.json")) for _ in range(100)}
    assert len(made) == 100
    assert all(re.fullmatch(r"folder/\.file\.json\.[0-9a-f]{12}\.partial", str(path)) for path in made)


def test_json_comes_back_in_one_form(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": {"é": "ü"}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert to_json_bytes(value) == to_json_bytes(dict(reversed(value.items()))) == (tmp_path / "x.json").read_bytes()
    assert to_json_bytes(value).endswith(b"\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json_bytes({"x": float("nan")})


@pytest.mark.parametrize("data", [b"", b"{", b'{"a": 1', b"\xff\xfe", b"{}{}", bytes(20)])
def test_damaged_json_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=rf"{path} is not readable as JSON .*delete it and give the command again"):
        read_json(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_json(path)


def test_a_full_disk_is_told_with_what_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "not" / "there" / "yet"
    assert nearest_existing(path) == tmp_path
    free = shutil.disk_usage(tmp_path).free / 1e6
    with pytest.raises(DiskError) as error, disk_errors(path, 5_000_000):
        raise OSError(errno.ENOSPC, "")
    found = re.search(r"disk is full \(([\d,.]+) MB free there, 5\.0 MB needed\)", str(error.value))
    assert found and abs(float(found[1].replace(",", "")) - free) < 0.1 * free + 100 and str(path) in str(error.value)
    with pytest.raises(OSError, match="Errno 9"), disk_errors(path):
        raise OSError(errno.EBADF, "")


# Locks


def hold_until_killed(folder: Path) -> None:
    with hold_lock(folder):
        (folder / "held").touch()
        time.sleep(60)


def wait_for(path: Path) -> None:
    until = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path: Path, fork: Fork) -> None:
    for _ in range(5):
        process = fork(lambda: hold_until_killed(tmp_path / "store"))
        wait_for(tmp_path / "store" / "held")
        expected = rf"store is being written by process {process} on {re.escape(socket.gethostname())} since 20\d\d"
        with pytest.raises(StoreBusyError, match=expected), hold_lock(tmp_path / "store"):
            pass
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        (tmp_path / "store" / "held").unlink()
        with hold_lock(tmp_path / "store"):  # and what it wrote into the file does not matter
            assert json.loads((tmp_path / "store" / "LOCK").read_bytes())["pid"] == os.getpid()


def test_a_lock_is_free_after_its_block(tmp_path: Path) -> None:
    with contextlib.suppress(ZeroDivisionError), hold_lock(tmp_path):
        raise ZeroDivisionError
    with hold_lock(tmp_path):
        with pytest.raises(StoreBusyError, match=f"process {os.getpid()} "), hold_lock(tmp_path):
            pass
        (tmp_path / "LOCK").write_text("not JSON")
        with pytest.raises(StoreBusyError, match="being written by another process; wait"), hold_lock(tmp_path):
            pass
    (tmp_path / "LOCK").write_text("x" * 1000)
    with hold_lock(tmp_path):
        assert names(tmp_path) == ["LOCK"] and set(json.loads((tmp_path / "LOCK").read_bytes())) == {
            "host",
            "pid",
            "since",
        }


def test_only_one_process_at_a_time(tmp_path: Path, fork: Fork) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")

    def work() -> None:
        done = 0
        while done < 25:
            with contextlib.suppress(StoreBusyError), hold_lock(tmp_path):
                number = int(counter.read_text())
                time.sleep(0)
                counter.write_text(str(number + 1))
                done += 1

    processes = [fork(work) for _ in range(4)]
    assert [exit_code(process) for process in processes] == [0] * 4
    assert counter.read_text() == "100"


def test_a_full_disk_leaves_the_lock_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DiskError, match=r"cannot write .*LOCK: the disk is full"), hold_lock(tmp_path):
        pass
    monkeypatch.undo()
    with hold_lock(tmp_path):
        pass


def test_errors_inside_the_block_are_not_the_locks(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="inside") as error, hold_lock(tmp_path):
        raise OSError(errno.ENOSPC, "inside")
    assert not isinstance(error.value, DiskError)
