"""Ray that is begun: a cluster that is not there is told at once, and signals meanwhile are ours. And lost."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray._private import services

from extract import ray_pool
from extract.config import ExecutionConfig
from extract.ray_pool import RayPool
from extract.ray_session import ray_session
from storage.errors import ConfigError, DecantError
from storage.stage import Terminated, raise_on_sigterm


@pytest.fixture
def never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself asks a cluster that is dead for minutes, and hears no signal meanwhile."""

    def init(**arguments: object) -> None:
        raise AssertionError("Ray was asked")

    monkeypatch.setattr(ray, "init", init)


@pytest.fixture
def dead_port() -> Iterator[int]:
    """One of this machine, where nobody listens."""
    with socket.socket() as kept:
        kept.bind(("", 0))
        yield kept.getsockname()[1]


def refused(address: str) -> str:
    with (
        pytest.raises(ConfigError) as caught,
        ray_session(ExecutionConfig(executor="ray", ray_address=address)),
    ):
        pass
    return str(caught.value)


@pytest.mark.usefixtures("never_asked")
def test_a_cluster_that_does_not_answer_is_told_at_once(dead_port: int) -> None:
    said = refused(f"127.0.0.1:{dead_port}")
    assert f":{dead_port}" in said
    assert "ConnectionRefusedError" in said
    assert "ray start --head" in said


@pytest.mark.usefixtures("never_asked")
def test_so_is_one_that_is_gone_but_still_written_down(dead_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "find_gcs_addresses", set)
    monkeypatch.setattr(services, "find_bootstrap_address", lambda temp_dir: f"127.0.0.1:{dead_port}")
    assert f":{dead_port}, which is what auto means here: ConnectionRefusedError" in refused("auto")
    monkeypatch.setattr(services, "find_bootstrap_address", lambda temp_dir: None)
    assert "Could not find any running Ray instance" in refused("auto")
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{dead_port}")
    assert f":{dead_port}, which is what auto means here" in refused("auto")


@pytest.mark.usefixtures("never_asked")
@pytest.mark.parametrize("address", ["nonsense", "host:port", "host:99999999"])
def test_what_is_no_address_is_refused(address: str) -> None:
    assert f"no Ray cluster answers at {address}" in refused(address)


@pytest.mark.usefixtures("never_asked")
def test_an_address_of_the_ray_client_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "ray://host:10001 is an address of the Ray Client" in refused("ray://host:10001")
    monkeypatch.setenv("RAY_ADDRESS", "ray://host:10001")
    assert "ray://host:10001 is an address of the Ray Client" in refused("auto")


@pytest.mark.parametrize("address", [None, "host:6379"])
def test_sigterm_while_ray_begins_ends_the_command_as_at_any_other_time(
    address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray has a handler of its own by then, which exits."""

    def init(**arguments: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr("extract.ray_session._find_cluster", str)
    with raise_on_sigterm():
        ours = signal.getsignal(signal.SIGTERM)
        with pytest.raises(Terminated), ray_session(ExecutionConfig(executor="ray", ray_address=address)):
            pass
        assert signal.getsignal(signal.SIGTERM) is ours


STOPPED = """
import sys, time
from pathlib import Path
import ray
from tests.fixtures import jobs
from extract.config import ExecutionConfig
from storage.stage import Interrupted, stop_on_signals

def sleep(job, attempt, folder):
    (folder / f"begun-{job}").touch()
    time.sleep(3)

for module in (jobs, sys.modules["__main__"]):
    ray.cloudpickle.register_pickle_by_value(module)
with stop_on_signals() as stop:
    try:
        jobs.carry_out(Path(sys.argv[1]), sleep, 4, ExecutionConfig(executor="ray", workers=1, device="cpu"), stop=stop)
    except Interrupted:
        sys.exit(77)
"""


@pytest.mark.ray
def test_sigterm_to_the_whole_group_leaves_a_local_ray_alive_until_what_is_under_way_has_ended(tmp_path: Path) -> None:
    """As batch systems send it."""
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(tmp_path)], cwd=Path(__file__).resolve().parent.parent,
        start_new_session=True,
    ) as driver:  # fmt: skip
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("begun-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(driver.pid, signal.SIGTERM)
        assert driver.wait(60) == 77
    assert [path.name for path in tmp_path.glob("done-*")] == ["done-0"]


def no_worker() -> None:
    raise AssertionError("no job, no worker")


def test_machines_may_be_lost_but_not_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The raylet of a local Ray that the system ended would otherwise be waited for in silence."""
    machines = [{"Alive": True, "Resources": {"CPU": 2.0}} for _ in range(2)]
    monkeypatch.setattr(ray, "nodes", lambda: machines)
    monkeypatch.setattr(ray_pool, "_LOOK_SECONDS", -1.0)
    pool = RayPool(ExecutionConfig(executor="ray", device="cpu"), no_worker, 9)  # type: ignore[arg-type]
    assert pool.size == 4
    machines[0]["Alive"] = False
    assert pool.size == 2
    machines[1]["Resources"] = {}  # one without room may get company
    assert pool.size == 1
    machines[1]["Alive"] = False
    with pytest.raises(DecantError, match="Ray has lost all its machines"):
        _ = pool.size
