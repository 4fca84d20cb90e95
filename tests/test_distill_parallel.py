"""A student that several processes train is the same whatever happens on the way: forked here, talking by gloo."""

import functools
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from distill.config import DistillConfig, DistillRunConfig, OptimConfig
from distill.ema import Ema
from distill.job import Job
from distill.parallel import ALONE, blocks_of
from distill.run import run
from distill.session import distill
from distill.stream import DistillStream, Share
from distill.student_config import BeitStudent
from storage.errors import ConfigError
from storage.image_index import load_index
from storage.reader import open_store
from storage.stage import Interrupted, SilentProgress, StopRequest

ToyStore = Callable[..., tuple[Path, Path]]
Fork = Callable[[Callable[[], object]], int]
CFG = DistillConfig(
    student=BeitStudent(input_px=32, patch_px=8, width=32, depth=2, heads=2), epochs=9, batch_size=12, drop_path=0.2,
    ema_decay=0.9, optim=OptimConfig(base_lr=0.2, warmup_epochs=1),
    run=DistillRunConfig(device="cpu", threads=1, loaders=1, trackers=()),
)  # fmt: skip
"""16 images: 12 steps."""
STEPS = 12


@pytest.fixture
def inputs(toy_store: ToyStore) -> dict[str, Path]:
    data, store = toy_store(views=2)
    return {"data": data, "extract": store}


def with_run(**changes: Any) -> DistillConfig:
    return CFG.model_copy(update={"run": CFG.run.model_copy(update=changes)})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def largest_difference(one: Path, other: Path) -> float:
    found = [safetensors.torch.load_file(folder / "student.safetensors") for folder in (one, other)]
    return max(float((found[0][name] - found[1][name]).abs().max()) for name in found[0])


class StopAt(SilentProgress):
    """Asks one process to stop after some step; or does something worse."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.left, self.act = step, act

    def start(self, total: int, unit: str, done: int = 0) -> None:
        self.left -= done

    def advance(self, amount: int, **facts: object) -> None:
        self.left -= amount
        if self.left == 0:
            self.act()


def work(cfg: DistillConfig, inputs: dict[str, Path], out: Path, rank: int, port: int, step: int, how: str) -> None:
    """One process; it exits with 3 where it was stopped."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(cfg.run.gpus), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    stop = StopRequest()

    def act() -> None:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        stop.signal_name = "SIGTERM"

    try:
        distill(Job(cfg=cfg, inputs=inputs, out_dir=out), StopAt(step if rank == 1 else -1, act), stop)
    except Interrupted:
        os._exit(3)


@pytest.fixture
def train(fork: Fork, inputs: dict[str, Path]) -> Callable[..., list[int]]:
    """Train with some processes; gives their statuses. The second one is stopped, or killed, after `step`."""

    def start(cfg: DistillConfig, out: Path, *, step: int = -1, how: str = "stop") -> list[int]:
        out.mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        pids = [fork(functools.partial(work, cfg, inputs, out, rank, port, step, how)) for rank in range(cfg.run.gpus)]
        statuses = []
        for pid in pids:
            _, status = os.waitpid(pid, 0)
            statuses.append(os.waitstatus_to_exitcode(status))
        return statuses

    return start


@pytest.mark.parametrize(
    ("gpus", "strategy", "accumulate", "steps"),
    [(2, "ddp", 1, [5]), (3, "ddp", 1, [1, 7]), (2, "ddp", 3, [4, 12]), (2, "fsdp", 1, [6]), (3, "fsdp", 2, [2, 3])],
)
def test_stopped_and_continued_it_is_the_same_to_the_bit(
    gpus: int, strategy: str, accumulate: int, steps: list[int], train: Callable[..., list[int]],
    inputs: dict[str, Path], tmp_path: Path,
) -> None:  # fmt: skip
    cfg = with_run(gpus=gpus, strategy=strategy, accumulate=accumulate)
    assert train(cfg, tmp_path / "whole") == [0] * gpus
    for step in steps:
        assert train(cfg, tmp_path / "stopped", step=step) == [3] * gpus, "one was asked, all stopped"
        assert not files(tmp_path / "stopped")
    assert train(cfg, tmp_path / "stopped") == [0] * gpus
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
    run(with_run(accumulate=gpus * accumulate), inputs, tmp_path / "one")
    assert largest_difference(tmp_path / "one", tmp_path / "whole") < 2e-5, "of one process, but for rounding"


def test_killed_and_continued_it_is_the_same_to_the_bit(train: Callable[..., list[int]], tmp_path: Path) -> None:
    cfg = with_run(gpus=2, checkpoint_seconds=1e-9)
    train(cfg, tmp_path / "whole")
    for step in (1, 4, 5):
        first, second = train(cfg, tmp_path / "killed", step=step, how="kill")
        assert (first != 0, second) == (True, -signal.SIGKILL)
    train(cfg, tmp_path / "killed")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_checkpoint_of_many_is_one_for_few(
    train: Callable[..., list[int]], inputs: dict[str, Path], tmp_path: Path
) -> None:
    """Another number of processes, and another way to divide the model, go on with the same steps."""
    for number, cfg in enumerate([with_run(gpus=3, strategy="fsdp"), with_run(gpus=2), with_run(gpus=2, accumulate=3)]):
        train(cfg, tmp_path / "out", step=3 * (number + 1))
    metrics = run(with_run(accumulate=6), inputs, tmp_path / "out")
    assert metrics["resumed_at"] == [3, 6, 9]
    run(with_run(accumulate=6), inputs, tmp_path / "one")
    assert largest_difference(tmp_path / "out", tmp_path / "one") < 0.02, "drop path is drawn for each part"


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (1, 4), (3, 2), (12, 1)])
def test_the_parts_of_all_processes_are_the_step(world_size: int, accumulate: int, inputs: dict[str, Path]) -> None:
    reader, location = open_store(inputs["extract"]), load_index(inputs["data"]).location
    whole = DistillStream([reader], location, CFG)
    seen: dict[str, int] = {}
    for step in range(4):  # 48 images: three epochs
        keys = [
            key
            for rank in range(world_size)
            for part in range(accumulate)
            for key in DistillStream([reader], location, CFG, share=Share(rank, world_size, accumulate))
            .load(step, part).keys
        ]  # fmt: skip
        assert sorted(keys) == sorted(whole.load(step).keys)
        for key in keys:
            seen[key] = seen.get(key, 0) + 1
    assert set(seen.values()) == {3}, "every image once an epoch"


def test_a_batch_that_cannot_be_shared_out_is_refused(inputs: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"12 images .* 5 equal parts .*distill\.batch_size to 10 or 15"):
        Share(0, 5, 1).part_size(12)


def test_the_running_mean_is_its_formula() -> None:
    model = nn.Linear(3, 2)
    ema = Ema(model, 0.75)
    expected = model.weight.detach().clone()
    for step in range(5):
        with torch.no_grad():
            model.weight += step
        ema.update()
        expected = 0.75 * expected + 0.25 * model.weight.detach()
    torch.testing.assert_close(ema.mean["weight"], expected)
    other = Ema(nn.Linear(3, 2), 0.75)
    other.load(ema.mean)
    other.apply()
    assert other.model.get_parameter("weight").equal(ema.mean["weight"])


def test_blocks_are_found_in_networks_of_all_kinds() -> None:
    import timm

    for name, count in [("vit_tiny_patch16_224", 12), ("swin_tiny_patch4_window7_224", 12), ("convnext_atto", 12)]:
        assert len(blocks_of(timm.create_model(name, pretrained=False))) == count
    assert ALONE.total(torch.ones(2)).tolist() == [1, 1]


def test_the_statistics_of_normalisation_have_a_running_mean_too() -> None:
    model = nn.BatchNorm1d(3)
    ema = Ema(model, 0.5)
    model.running_mean = torch.full((3,), 8.0)
    ema.update()
    ema.apply()
    assert model.running_mean is not None
    assert model.running_mean.tolist() == [4, 4, 4]
    assert set(ema.mean) == {"weight", "bias", "running_mean", "running_var"}, "no counter of batches"
