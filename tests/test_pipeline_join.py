"""Two commands at one store: with --join they share the work, and both end with its result."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.fixtures.runs import Outcome

ROOT = Path(__file__).resolve().parent.parent
SLOW = """
import sys, time
from extract.teacher import Teacher
from pipeline import cli
speak = Teacher.__call__
Teacher.__call__ = lambda self, pixels: time.sleep(0.35) or speak(self, pixels)
cli.main()
"""


def start(images: Path, work: Path, *options: str) -> "subprocess.Popen[str]":
    settings = ["--preset", "smoke", "--set", "extract.records_per_shard=2", "--set", "extract.run.batch_size=2"]
    command = ["extract", *settings, "--data", str(images), "--work", str(work), *options]
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_commands_that_join_share_a_store_and_survive_each_other(
    make_images: Callable[..., Path], tmp_path: Path, tree_bytes: Callable[[Path], dict[str, bytes]]
) -> None:
    images = make_images()
    for work, is_killed in ((tmp_path / "together", False), (tmp_path / "killed", True)):
        first = start(images, work, "--join")
        deadline = time.monotonic() + 60
        while not list(work.glob("stores/*/receipts/*.json")) and time.monotonic() < deadline:
            time.sleep(0.01)
        second = start(images, work, "--join")
        if is_killed:
            time.sleep(0.3)
            os.kill(first.pid, signal.SIGKILL)
        said = [process.communicate(timeout=100)[0] for process in (first, second)]
        assert second.returncode == 0, said[1]
        assert first.returncode == (-signal.SIGKILL if is_killed else 0), said[0]
        assert "joining the command that is filling" in said[1] or is_killed
        assert len(list(work.glob("stores/*/result.json"))) == 1
    assert tree_bytes(tmp_path / "together" / "stores") == tree_bytes(tmp_path / "killed" / "stores")


def test_a_store_is_finished_from_its_folder_alone(
    decant: Callable[..., Outcome], make_images: Callable[..., Path], tmp_path: Path,
    tree_bytes: Callable[[Path], dict[str, bytes]],
) -> None:  # fmt: skip
    images, work = make_images(), tmp_path / "runs"
    first = start(images, work)
    deadline = time.monotonic() + 60
    while not list(work.glob("stores/*/receipts/*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    first.kill()
    first.communicate()
    [store] = work.glob("stores/*/")
    outcome = decant("join", store, "--executor", "inline")
    assert outcome.code == 0, outcome.err
    assert "is finished" in outcome.out
    joined = tree_bytes(store)
    again = start(images, work)
    assert again.wait(60) == 0, again.communicate()[0]
    assert tree_bytes(store) == joined
    assert decant("join", tmp_path / "nowhere").code == 2
