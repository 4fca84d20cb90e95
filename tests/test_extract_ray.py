"""A whole extraction on a Ray of its own, in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from extract.config import ExecutionConfig, ExtractConfig
from extract.run import run
from storage.folder import load_plan
from storage.receipts import committed_shards

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from extract.config import ExecutionConfig, ExtractConfig
from extract.run import run
from storage.stage import SilentProgress

class Watch(SilentProgress):
    shards = 0
    def advance(self, amount, **facts):
        self.shards += bool(amount)
        if amount and self.shards == 4:
            os.kill(os.getpid(), signal.SIGTERM)  # asks for a stop, unless Ray's own handler ends the process

def mine(number, frame): ...

signal.signal(signal.SIGTERM, mine)
data, root = map(Path, sys.argv[1:])
cfg = ExtractConfig(
    teacher="toy", views=2, records_per_shard=6, run=ExecutionConfig(executor="ray", workers=2, device="cpu")
)
stopped = ""
try:
    run(cfg, {"data": data}, root, Watch())
except Exception as error:
    stopped = type(error).__name__
import ray
print(json.dumps([stopped, ray.is_initialized(), signal.getsignal(signal.SIGTERM) is mine]))
"""


@pytest.mark.ray
def test_ray_makes_the_same_bytes_and_leaves_nothing_behind(
    toy_store: Callable[..., tuple[Path, Path]], tree_bytes: Callable[[Path], dict[str, bytes]], tmp_path: Path
) -> None:
    """Two workers, stopped by SIGTERM after four shards of six; the rest is done without Ray."""
    data, root = toy_store(views=2)
    on_ray = tmp_path / "on-ray"
    command = [sys.executable, "-c", SCRIPT, str(data), str(on_ray)]
    project = Path(__file__).resolve().parent.parent
    found = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False, timeout=150)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout.splitlines()[-1]) == ["Interrupted", False, True]
    assert len(committed_shards(on_ray, load_plan(on_ray))) >= 4
    cfg = ExtractConfig(teacher="toy", views=2, records_per_shard=6, run=ExecutionConfig(executor="inline"))
    assert run(cfg, {"data": data}, on_ray)["records"] == 32
    assert tree_bytes(on_ray) == tree_bytes(root)
