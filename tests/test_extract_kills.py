"""Workers that are killed at random, machines that are lost, executors side by side: always the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from extract.config import ExecutionConfig, ExtractConfig
from extract.events import events_path, read_tail
from extract.run import run
from storage.encodings import Int8
from storage.stage import SilentProgress

PROJECT = Path(__file__).resolve().parent.parent
MakeIndex = Callable[..., tuple[Path, object]]
TreeBytes = Callable[[Path], dict[str, bytes]]


def config(executor: str, workers: int = 2, **changes: object) -> ExtractConfig:
    how = ExecutionConfig.model_validate(
        {"executor": executor, "workers": workers, "batch_size": 4, "device": "cpu", "max_attempts": 30}
    )
    return ExtractConfig(teacher="toy", views=2, records_per_shard=4, run=how).model_copy(update=changes)


def workers_of(pid: int) -> list[int]:
    """Worker processes below a driver. Of this module's helpers, only they are children of the fork server."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name = path.with_name("cmdline").read_bytes()
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if b"forkserver" in name:
            found.append((int(path.parent.name), parent))
    servers = {child for child, parent in found if parent == pid}
    return [child for child, parent in found if parent in servers]


class Killer(SilentProgress):
    """Kills a worker now and then, from a thread of its own, until there were enough."""

    def __init__(self, seed: int, kills: int) -> None:
        self.moments, self.left, self.killed = random.Random(seed), kills, 0
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        while self.left and not self.is_over.wait(self.moments.uniform(0.01, 0.12)):
            victims = workers_of(os.getpid())
            if victims:
                os.kill(self.moments.choice(victims), signal.SIGKILL)
                self.left -= 1
                self.killed += 1


def test_twenty_workers_are_killed_and_the_bytes_are_the_same(
    make_index: MakeIndex, tree_bytes: TreeBytes, tmp_path: Path
) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    data, _ = make_index(per_class=20)
    run(config("inline"), {"data": data}, tmp_path / "undisturbed")
    files, killed, number = tree_bytes(tmp_path / "undisturbed"), 0, 0
    while killed < 20:
        killer, root = Killer(seed + number, 20 - killed), tmp_path / f"store-{number}"
        killer.thread.start()
        run(config("process"), {"data": data}, root)
        killer.is_over.set()
        killer.thread.join()
        assert tree_bytes(root) == files
        killed += killer.killed
        number += 1
        assert number < 30, "workers are hardly ever met"


@pytest.mark.parametrize("layout", ["zarr", "wds"])
def test_executors_make_the_same_bytes(
    layout: str, make_index: MakeIndex, tree_bytes: TreeBytes, tmp_path: Path
) -> None:
    data, _ = make_index()
    for executor in ("inline", "process"):
        cfg = config(executor, layout=layout, encoding=Int8())
        run(cfg, {"data": data}, tmp_path / executor)
    assert tree_bytes(tmp_path / "inline") == tree_bytes(tmp_path / "process")


# ---- Ray -------------------------------------------------------------------------------------------------------------

ON_A_CLUSTER = """
import json, os, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from extract import sharing
from extract.config import ExecutionConfig, ExtractConfig
from extract.run import run
from extract.worker import Worker
from storage.stage import SilentProgress

class SlowWorker(Worker):
    def __call__(self, job):
        time.sleep(0.5)
        return super().__call__(job)

class LoseANode(SilentProgress):
    seen, used = 0, 0.0
    def advance(self, amount, **facts):
        self.seen += bool(amount)
        if self.seen == 10 and len(nodes) == 2:
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        total, free = ray.cluster_resources(), ray.available_resources()
        self.used = max(self.used, total["object_store_memory"] - free.get("object_store_memory", 0))

data, root = map(Path, sys.argv[1:])
cluster = Cluster(
    initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
)
nodes = [cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20) for _ in range(2)]
cluster.wait_for_nodes()
os.environ["RAY_DEDUP_LOGS"] = "0"
ray.cloudpickle.register_pickle_by_value(sys.modules["__main__"])
sharing.Worker = SlowWorker
how = ExecutionConfig(
    executor="ray", ray_address=cluster.address, workers=3, batch_size=4, device="cpu", max_attempts=5
)
cfg = ExtractConfig(teacher="toy", views=2, records_per_shard=2, run=how)
watch = LoseANode()
metrics = run(cfg, {"data": data}, root, watch)
found = [metrics["records"], len(nodes), metrics["run"]["workers_lost"], watch.used]
print("found", json.dumps(found))
"""


@pytest.mark.ray
def test_a_cluster_that_loses_a_machine_makes_the_same_bytes_and_moves_no_tensors(
    make_index: MakeIndex, tree_bytes: TreeBytes, tmp_path: Path
) -> None:
    data, _ = make_index(per_class=15)
    run(config("inline", records_per_shard=2), {"data": data}, tmp_path / "undisturbed")
    root = tmp_path / "store"
    found = subprocess.run(
        [sys.executable, "-c", ON_A_CLUSTER, str(data), str(root)],
        cwd=PROJECT, capture_output=True, text=True, check=False, timeout=170,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    [line] = [line for line in found.stdout.splitlines() if line.startswith("found ")]
    records, nodes_left, workers_lost, object_store_bytes = json.loads(line.removeprefix("found "))
    assert (records, nodes_left) == (48, 1)
    assert workers_lost >= 1
    assert object_store_bytes < 10e6
    assert tree_bytes(root) == tree_bytes(tmp_path / "undisturbed")
    kinds = {event.kind for event in read_tail(events_path(root))}
    assert {"worker up", "worker died", "shard", "end"} <= kinds


@pytest.mark.ray
def test_what_a_dead_actor_raises_is_what_we_wait_for() -> None:
    """An upgrade of Ray that changes this must not go unnoticed."""
    from ray import exceptions

    assert issubclass(exceptions.ActorDiedError, exceptions.RayActorError)
    assert issubclass(exceptions.ActorUnavailableError, exceptions.RayActorError)
    assert not issubclass(exceptions.RayActorError, exceptions.RayTaskError)
    assert not issubclass(exceptions.RayTaskError, exceptions.RayActorError)
