"""Threads, processes and users who may only read share a store in a bucket or on a disk."""

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.reader import open_store
from storage.upload import upload_store
from storage.verify import iter_damage
from tests.fixtures.stores import everything

ROOT = Path(__file__).resolve().parent.parent


def test_readers_in_threads_and_processes(
    make_store: Any, bucket: str, bucket_environment: str, fork: Callable[[Callable[[], object]], int]
) -> None:
    """The parent has connections open when it forks; parent and children read on, at the same time."""
    root, _, _ = make_store(num_images=8)
    upload_store(root, f"s3://{bucket}/store")
    expected, reader = everything(open_store(root)), open_store(f"s3://{bucket}/store")

    def read_all() -> None:
        assert everything(reader) == expected

    read_all()
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(everything, [reader, reader, open_store(f"s3://{bucket}/store"), reader]):
            assert found == expected
    children = [fork(read_all) for _ in range(2)]
    read_all()
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    read_all()
    code = (
        "import pickle, sys, numpy; reader = pickle.load(sys.stdin.buffer); out = reader.new_batch(16)\n"
        "reader.read_encoded(numpy.arange(16), out); sys.stdout.buffer.write(out['tokens'].tobytes())"
    )
    spawned = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, input=pickle.dumps(reader), capture_output=True, check=True
    )
    out = open_store(root).new_batch(16)
    open_store(root).read_encoded(np.arange(16), out)
    assert spawned.stdout == out["tokens"].tobytes()


@pytest.mark.skipif(not hasattr(os, "setuid") or os.getuid() != 0, reason="becoming other users takes root")
def test_a_local_store_is_shared_by_users_who_may_only_read(
    make_store: Any, tmp_path: Path, fork: Callable[[Callable[[], object]], int]
) -> None:
    """Several other users read a folder at once in which they may write nothing; nothing in it changes."""
    root, _, _ = make_store(view_px=16, backend="wds")
    shared = Path("/tmp") / f"decant-shared-{os.getpid()}"  # below folders that every user may pass
    try:
        shutil.copytree(root, shared)
        for path in [shared, *shared.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = {path: path.stat().st_mtime_ns for path in [shared, *shared.rglob("*")]}
        expected = everything(open_store(root))

        def read_as(user: int) -> None:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            with pytest.raises(PermissionError):
                (shared / "made").write_bytes(b"")
            assert everything(open_store(shared)) == expected
            assert not [damage for _, found in iter_damage(shared) for damage in found]

        for child in [fork(lambda user=user: read_as(user)) for user in (65_534, 54_321)]:  # type: ignore[misc]
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert before == {path: path.stat().st_mtime_ns for path in [shared, *shared.rglob("*")]}
    finally:
        shutil.rmtree(shared, ignore_errors=True)
