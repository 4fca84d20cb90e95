"""GPUs by Ray: several workers share one, or one has several of the same machine. Ray believes in four; they are not
there."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from extract.config import ExecutionConfig
from storage.errors import ConfigError
from tests.fixtures import jobs
from tests.fixtures.jobs import carry_out, entry_of

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def four_gpus() -> Iterator[None]:
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    ray.init(
        address="local", num_cpus=1, num_gpus=4, include_dashboard=False, object_store_memory=100 * 2**20,
        log_to_driver=False, logging_level="ERROR",
    )  # fmt: skip
    signal.signal(signal.SIGTERM, handler)
    for module in (jobs, sys.modules[__name__]):
        ray.cloudpickle.register_pickle_by_value(module)
    yield
    ray.shutdown()


def note_gpus(job: int, attempt: int, folder: Path) -> None:
    """All jobs meet before one ends, so that each is another worker's."""
    (folder / f"gpus-{job}-{os.environ.get('CUDA_VISIBLE_DEVICES')}").touch()
    deadline = time.monotonic() + 40
    while len(list(folder.glob("gpus-*"))) < int((folder / "expected").read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("each", "workers", "seen"), [(0.5, 3, {"0", "1", "2", "3"}), (2.0, 2, {"0,1", "2,3", "0,2", "1,3", "0,3", "1,2"})]
)
def test_workers_share_gpus_or_have_several(each: float, workers: int, seen: set[str], tmp_path: Path) -> None:
    """With a single CPU: workers with GPUs do not wait for those."""
    import ray
    from ray.util import placement_group_table

    (tmp_path / "expected").write_text(str(workers))
    cfg = ExecutionConfig(executor="ray", gpus_per_worker=each, workers=workers)
    outcomes = carry_out(tmp_path, note_gpus, workers, cfg)
    assert sorted(outcomes, key=str) == [entry_of(job) for job in range(workers)]
    found = [path.name.split("-")[2] for path in tmp_path.glob("gpus-*")]
    assert len(found) == workers
    assert set(found) <= seen
    if each > 1:
        assert not set(found[0].split(",")) & set(found[1].split(",")), "they share none"
    deadline = time.monotonic() + 20
    while ray.available_resources().get("GPU") != 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources()["GPU"] == 4, "all are given back"
    assert {group["state"] for group in placement_group_table().values()} <= {"REMOVED"}


@pytest.mark.parametrize(
    ("each", "workers", "said"),
    [(8.0, 0, "1 workers need 8 GPUs, Ray has 4"), (0.25, 17, r"17 workers need 4\.25 GPUs, Ray has 4")],
)
def test_more_than_the_gpus_have_room_for_is_refused(each: float, workers: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{said}; lower extract\.run\.workers \(or \.gpus_per_worker\)"):
        carry_out(tmp_path, note_gpus, 99, ExecutionConfig(executor="ray", gpus_per_worker=each, workers=workers))


def test_an_address_of_the_ray_client_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(ConfigError, match="--ray-address auto"):
        carry_out(tmp_path, note_gpus, 1, ExecutionConfig(executor="ray", ray_address="ray://head:10001"))
