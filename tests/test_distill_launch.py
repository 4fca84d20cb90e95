"""Several processes train the same student as one does, whoever starts them; and whatever becomes of them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from distill.config import DistillConfig, DistillRunConfig, OptimConfig
from distill.relay import FileProgress, Follower
from distill.run import run
from distill.student_config import BeitStudent
from storage.errors import ConfigError, DecantError
from storage.stage import Interrupted, SilentProgress

ToyStore = Callable[..., tuple[Path, Path]]
CFG = DistillConfig(
    student=BeitStudent(input_px=32, patch_px=8, width=32, depth=2, heads=2), epochs=8, batch_size=8,
    optim=OptimConfig(base_lr=0.2, warmup_epochs=1), run=DistillRunConfig(device="cpu", threads=1, loaders=1),
)  # fmt: skip
"""16 images: 16 steps."""


@pytest.fixture
def inputs(toy_store: ToyStore) -> dict[str, Path]:
    data, store = toy_store(views=2)
    return {"data": data, "extract": store}


def with_run(**changes: Any) -> DistillConfig:
    return CFG.model_copy(update={"run": CFG.run.model_copy(update=changes)})


def weights(folder: Path) -> dict[str, Any]:
    return {name: value.numpy() for name, value in safetensors.torch.load_file(folder / "student.safetensors").items()}


def largest_difference(one: Path, other: Path) -> float:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return max(float(abs(a[name] - b[name]).max()) for name in a)


class Watch(SilentProgress):
    def __init__(self, at: int = -1, act: Callable[[], object] = lambda: None) -> None:
        self.done, self.at, self.act = 0, at, act
        self.said: list[str] = []

    def start(self, total: int, unit: str, done: int = 0) -> None:
        self.done = done

    def advance(self, amount: int, **facts: object) -> None:
        before, self.done = self.done, self.done + amount
        if before < self.at <= self.done:
            self.act()

    def say(self, message: str) -> None:
        self.said.append(message)


def test_reports_come_with_their_facts_and_not_all_at_once(tmp_path: Path) -> None:
    class Told(SilentProgress):
        def advance(self, amount: int, **facts: object) -> None:
            told.append((amount, facts))

    told: list[tuple[int, dict[str, object]]] = []
    reports, follower = FileProgress(tmp_path / "progress"), Follower(tmp_path / "progress", Told())
    reports.start(3, "steps")
    for loss in (3, 2, 1):
        reports.advance(1, loss=loss)
    follower.follow()
    assert not told, "a step that is told of with the start would seem to take no time"
    reports.close()
    follower.follow()
    follower.close()
    assert told == [(3, {"loss": 1})]


def test_torchrun_starts_them_and_all_stop_when_one_is_asked(inputs: dict[str, Path], tmp_path: Path) -> None:
    """The parts of a step are the same, whether two processes take one each or one takes both: but for rounding."""
    cfg = with_run(gpus=2)
    watch = Watch(5, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match="SIGTERM"):
        run(cfg.model_copy(update={"epochs": 800}), inputs, tmp_path / "two", watch)
    heads = sorted((tmp_path / "two" / "checkpoints").glob("*.json"))
    assert json.loads(heads[-1].read_text())["step"] == watch.done < 1600
    assert not [name for name in ("stop", "job.json", "outcome.json") if (tmp_path / "two" / name).exists()]


def test_a_signal_to_all_processes_is_one_stop(inputs: dict[str, Path], tmp_path: Path) -> None:
    """As a scheduler sends it, which knows nothing of who started whom; torchrun passes it on once more."""
    out = tmp_path / "two"

    def tell_all() -> None:
        ranks = workers(out, rank=0) + workers(out, rank=1)
        for process in (*ranks, parent_of(ranks[0]), os.getpid()):
            os.kill(process, signal.SIGTERM)

    with pytest.raises(Interrupted, match="SIGTERM"):
        run(with_run(gpus=2).model_copy(update={"epochs": 10**6}), inputs, out, Watch(5, tell_all))
    assert list((out / "checkpoints").glob("*.json"))


def test_a_process_that_is_killed_costs_nothing_but_time(inputs: dict[str, Path], tmp_path: Path) -> None:
    """All begin again from the newest checkpoint, which is written after every step here."""
    cfg = with_run(gpus=2, checkpoint_seconds=1e-9).model_copy(update={"epochs": 32})

    def kill() -> None:
        (victim,) = workers(tmp_path / "two", rank=1)
        os.kill(victim, signal.SIGKILL)

    watch = Watch(20, kill)
    metrics = run(cfg, inputs, tmp_path / "two", watch)
    assert (metrics["processes"], metrics["steps"], watch.done) == (2, 64, 64)
    (resumed,) = metrics["resumed_at"]
    assert 1 <= resumed <= 64
    assert f"resuming at step {resumed} of 64" in watch.said
    assert {path.name for path in (tmp_path / "two").iterdir()} == {
        "student.safetensors", "projector.safetensors", "metrics.jsonl", "tensorboard", "checkpoints", "LOCK",
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 65)), "every step once"
    run(cfg.model_copy(update={"run": with_run(accumulate=2).run}), inputs, tmp_path / "one")
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-4


def workers(folder: Path, *, rank: int) -> list[int]:
    """The processes of a rank that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text().split("\0")
            environment = (process / "environ").read_text().split("\0")
        except OSError:
            continue
        if "distill.worker" in command and str(folder / "job.json") in command and f"RANK={rank}" in environment:
            found.append(int(process.name))
    return found


def test_what_is_wrong_in_a_process_is_said_by_the_command(inputs: dict[str, Path], tmp_path: Path) -> None:
    student = CFG.student.model_copy(update={"input_px": 64})
    with pytest.raises(DecantError, match=r"8x8 \(64 px, patch 8\).*'toy' has 4x4") as found:
        run(with_run(gpus=2).model_copy(update={"student": student}), inputs, tmp_path / "out")
    assert found.value.exit_code == ConfigError.exit_code


@pytest.mark.parametrize("victim", ["command", "torchrun"])
def test_processes_end_with_those_that_started_them(victim: str, inputs: dict[str, Path], tmp_path: Path) -> None:
    """Whoever gives the command again would find them at work in the same folder."""
    code = (
        "import sys, json, pathlib; sys.path.insert(0, sys.argv[1])\n"
        "from distill.config import DistillConfig\nfrom distill.run import run\n"
        "cfg = DistillConfig.model_validate_json(sys.argv[2])\n"
        "run(cfg, {k: pathlib.Path(v) for k, v in json.loads(sys.argv[3]).items()}, pathlib.Path(sys.argv[4]))\n"
    )
    cfg, out = with_run(gpus=2).model_copy(update={"epochs": 10**6}), tmp_path / "out"
    root = str(Path(__file__).resolve().parent.parent)
    texts = [root, cfg.model_dump_json(), json.dumps({name: str(path) for name, path in inputs.items()}), str(out)]
    command = subprocess.Popen([sys.executable, "-c", code, *texts])
    wait_until(lambda: len(workers(out, rank=0)) + len(workers(out, rank=1)) == 2)
    wait_until((out / "progress.jsonl").exists)
    left = workers(out, rank=0) + workers(out, rank=1)
    os.kill(command.pid if victim == "command" else parent_of(left[0]), signal.SIGKILL)
    assert command.wait(20) != 0
    wait_until(lambda: not workers(out, rank=0) and not workers(out, rank=1), seconds=5)


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("gpus", [1, 2])
def test_what_a_killed_command_left_is_neither_believed_nor_kept(
    gpus: int, inputs: dict[str, Path], tmp_path: Path
) -> None:
    left = {"job.json": "", "outcome.json": '{"interrupted": true}', "progress.jsonl": "x", "stop": "SIGTERM"}
    for name, text in (left | {"processes.log": "x"}).items():
        (tmp_path / name).write_text(text)
    assert run(with_run(gpus=gpus), inputs, tmp_path)["processes"] == gpus
    assert not [name for name in (*left, "processes.log") if (tmp_path / name).exists()]


def wait_until(is_so: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_ray_is_asked_for_a_single_process_too(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may find a GPU on another machine."""
    monkeypatch.setattr("distill.run.launch", lambda job, progress, stop: {"launcher": job.cfg.run.launcher})
    assert run(with_run(gpus=1, launcher="ray"), inputs, tmp_path / "ray") == {"launcher": "ray"}
    assert run(with_run(gpus=1), inputs, tmp_path / "here")["processes"] == 1


@pytest.mark.ray
def test_ray_train_starts_them_too(inputs: dict[str, Path], tmp_path: Path) -> None:
    """On a Ray of its own, which is gone afterwards; the student is torchrun's."""
    watch = Watch()
    metrics = run(with_run(gpus=2, launcher="ray"), inputs, tmp_path / "ray", watch)
    assert (metrics["processes"], watch.done) == (2, 16)
    run(with_run(accumulate=2), inputs, tmp_path / "one")
    assert largest_difference(tmp_path / "one", tmp_path / "ray") < 2e-5
