"""The training loop: however often it is stopped, killed or damaged, it ends with the same bytes."""

import dataclasses
import functools
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import distill.gauges
from distill.config import OptimConfig
from distill.loop import Training, TrainingLog, finish, train
from distill.optim import build_optimizer, set_learning_rate
from distill.state import TrainState
from storage.errors import DecantError
from storage.stage import Interrupted, SilentProgress, StopRequest

STEPS = 12
Fork = Callable[[Callable[[], object]], int]


class Batch(NamedTuple):
    step: int
    keys: list[str]
    inputs: Tensor


def make_training(
    out_dir: Path, *, digest: str = "run", checkpoint_seconds: float = 1e9, poison: int | None = None
) -> Training:
    """A small network with dropout that learns to add. `poison`: a step whose batch holds a NaN."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 1))
    optimizer = build_optimizer(model, OptimConfig(base_lr=0.01))

    def batches(start: int) -> Iterator[Batch]:
        for step in range(start, STEPS):
            inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            if step == poison:
                inputs[3, 2] = float("nan")
            yield Batch(step, [f"image-{step}-{row}" for row in range(8)], inputs)

    def set_lr(step: int) -> float:
        set_learning_rate(optimizer, 0.05 * (1 - step / STEPS))
        return 0.05 * (1 - step / STEPS)

    def loss(batch: Batch) -> Tensor:
        return nn.functional.mse_loss(model(batch.inputs), batch.inputs.sum(1, keepdim=True))

    return Training(
        state=TrainState(model, optimizer), set_lr=set_lr, batches=batches, loss=loss, num_steps=STEPS,
        images_per_step=8, clip_grad=1.0,
        seed=3, out_dir=out_dir, run_digest=digest, checkpoint_seconds=checkpoint_seconds,
    )  # fmt: skip


class Watch(SilentProgress):
    """Notes what is said and does something at some steps."""

    def __init__(self, acts: dict[int, Callable[[], object]] | None = None) -> None:
        self.step, self.acts = 0, acts or {}
        self.said: list[str] = []

    def start(self, total: int, unit: str, done: int = 0) -> None:
        assert (total, unit) == (STEPS, "steps")
        self.step = done

    def advance(self, amount: int, **facts: object) -> None:
        self.step += amount
        if self.step in self.acts:
            self.acts[self.step]()

    def say(self, message: str) -> None:
        self.said.append(message)


def go(run: Training, watch: Watch | None = None, stop: StopRequest | None = None) -> TrainingLog:
    torch.manual_seed(os.getpid())  # what happened before must not matter
    return train(run, watch or Watch(), StopRequest() if stop is None else stop)


def ask(stop: StopRequest) -> None:
    stop.signal_name = "SIGTERM"


def stop_at(out_dir: Path, step: int) -> None:
    stop = StopRequest()
    with pytest.raises(Interrupted):
        go(make_training(out_dir), Watch({step: functools.partial(ask, stop)}), stop)


def weights(run: Training) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in run.state.model.state_dict().items()}


@pytest.fixture
def undisturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, bytes], list[dict[str, float]]]:
    """Weights and history of a run in one go, with a point of the curve every six steps."""
    monkeypatch.setattr(distill.gauges, "HISTORY_POINTS", 2)
    return weights_after(make_training(tmp_path / "undisturbed"))


def weights_after(run: Training, watch: Watch | None = None) -> tuple[dict[str, bytes], list[dict[str, float]]]:
    log = go(run, watch)
    return weights(run), log.history


Truth = tuple[dict[str, bytes], list[dict[str, float]]]


@pytest.mark.parametrize("steps", [[1], [5], [11], [12], [2, 3, 9], [4, 8, 12]])
def test_a_stopped_run_ends_as_if_it_had_not_been(steps: list[int], undisturbed: Truth, tmp_path: Path) -> None:
    for step in steps:
        stop_at(tmp_path / "run", step)
    run, watch = make_training(tmp_path / "run"), Watch()
    log = go(run, watch)
    assert watch.said == [f"resuming at step {steps[-1]} of {STEPS}"]
    assert log.resumed_at == steps
    assert (weights(run), log.history) == undisturbed
    assert [point["step"] for point in log.history] == [6, 12]
    finish(run)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_killed_run_ends_as_if_it_had_not_been(
    undisturbed: Truth, fork: Fork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed eight times: between steps, and between the files of a checkpoint. It saves after every step."""

    def die(what: str, number: int) -> None:
        kill = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
        acts: dict[int, Callable[[], object]] = {number: kill} if what == "step" else {}
        replace, calls = os.replace, iter(range(1, 1000))

        def count(source: Path, target: Path) -> None:
            if what == "file" and next(calls) == number:
                kill()
            replace(source, target)

        monkeypatch.setattr(os, "replace", count)
        go(make_training(tmp_path / "run", checkpoint_seconds=-1), Watch(acts))

    resumed = []
    for what, number in [
        ("step", 1), ("file", 1), ("file", 2), ("file", 3), ("step", 4), ("file", 5), ("step", 9), ("file", 4),
    ]:  # fmt: skip
        _, status = os.waitpid(fork(functools.partial(die, what, number)), 0)
        assert os.WIFSIGNALED(status), "it was not killed"
        heads = sorted((tmp_path / "run" / "checkpoints").glob("*.json"))
        resumed.append(json.loads(heads[-1].read_text())["step"] if heads else 0)
    run = make_training(tmp_path / "run")
    assert weights_after(run) == undisturbed
    assert resumed == [0, 0, 0, 1, 3, 5, 8, 9]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("damage", [flip, lambda path: os.truncate(path, 40), Path.unlink], ids=["flip", "cut", "gone"])
def test_a_damaged_checkpoint_costs_time_but_no_truth(
    damage: Callable[[Path], None], suffix: str, undisturbed: Truth, tmp_path: Path
) -> None:
    for step in (4, 7):
        stop_at(tmp_path / "run", step)
    damage(tmp_path / "run" / "checkpoints" / f"step-00000007{suffix}")
    run, watch = make_training(tmp_path / "run"), Watch()
    assert weights_after(run, watch) == undisturbed
    assert watch.said[-1] == f"resuming at step 4 of {STEPS}"
    if damage is not Path.unlink or suffix != ".json":  # without its head it is no checkpoint
        assert "step-00000007.json is damaged" in watch.said[0]


def test_a_checkpoint_of_other_settings_is_not_continued(undisturbed: Truth, tmp_path: Path) -> None:
    stop_at(tmp_path / "run", 7)
    run, watch = make_training(tmp_path / "run", digest="other settings"), Watch()
    assert weights_after(run, watch) == undisturbed
    assert not watch.said


def test_saving_often_changes_nothing(undisturbed: Truth, tmp_path: Path) -> None:
    run = make_training(tmp_path / "run", checkpoint_seconds=-1)
    assert weights_after(run) == undisturbed
    kept = sorted(path.stem for path in (tmp_path / "run" / "checkpoints").glob("*.json"))
    assert kept == ["step-00000011", "step-00000012"]


def test_the_curve_is_the_mean_of_the_losses_between_its_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = go(make_training(tmp_path / "fine")).history
    assert [point["step"] for point in whole] == list(range(1, 13))
    assert [point["lr"] for point in whole] == [0.05 * (1 - step / STEPS) for step in range(12)]
    monkeypatch.setattr(distill.gauges, "HISTORY_POINTS", 2)
    coarse = go(make_training(tmp_path / "coarse")).history
    expected = [sum(point["loss"] for point in whole[start : start + 6]) / 6 for start in (0, 6)]
    assert [point["loss"] for point in coarse] == pytest.approx(expected)
    assert whole[-1]["loss"] < 0.5 * whole[0]["loss"], "it learns"


def test_steps_have_random_numbers_of_their_own(tmp_path: Path) -> None:
    """Dropout differs from step to step, and does not depend on what ran before."""
    drawn = []
    for seed in (1, 2):
        run = make_training(tmp_path / str(seed))
        run.state.model.register_forward_hook(lambda *_: drawn.append(float(torch.rand(1))))
        torch.manual_seed(seed)
        train(run, Watch(), StopRequest())
    assert drawn[:STEPS] == drawn[STEPS:]
    assert len(set(drawn)) == STEPS


def test_gradients_are_clipped_and_the_rate_is_the_steps(tmp_path: Path) -> None:
    run = make_training(tmp_path / "run")
    norms, rates = [], []

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))
        rates.append(optimizer.param_groups[0]["lr"])

    run.state.optimizer.register_step_pre_hook(note)
    go(run)
    assert max(norms) <= 1.0 + 1e-5
    assert sum(norm > 0.999 for norm in norms) >= 3, "some were longer"
    assert rates == [0.05 * (1 - step / STEPS) for step in range(STEPS)]


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    good = make_training(tmp_path / "good")
    good.state.optimizer.register_step_post_hook(lambda *_: states.append(weights(good)))
    states: list[dict[str, bytes]] = []
    go(good)
    (tmp_path / "bad").mkdir()
    bad = make_training(tmp_path / "bad", poison=5)
    with pytest.raises(DecantError, match="loss nan and gradient norm nan at step 5: stopped before the update"):
        go(bad)
    assert weights(bad) == states[4]
    found = json.loads((tmp_path / "bad" / "non-finite-step-5.json").read_text())
    assert found["keys"] == [f"image-5-{row}" for row in range(8)]
    assert found["step"] == 5


class Curve:
    """Takes the points of a run."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []
        self.is_closed = False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.points.append((step, values["loss"]))

    def close(self) -> None:
        self.is_closed = True


def test_a_tracked_point_is_the_mean_since_the_one_before_wherever_a_run_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill.gauges, "TRACKED_POINTS", 3)  # every 4 steps
    whole, rest = Curve(), Curve()
    go(dataclasses.replace(make_training(tmp_path / "whole"), trackers=lambda start: [whole]))
    assert [step for step, _ in whole.points] == [4, 8, 12]
    stop_at(tmp_path / "cut", 6)
    go(dataclasses.replace(make_training(tmp_path / "cut"), trackers=lambda start: [rest]))
    assert rest.points == whole.points[1:]


def test_trackers_have_all_points_before_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    curve = Curve()
    with pytest.raises(DecantError, match="at step 7"):
        go(dataclasses.replace(make_training(tmp_path, poison=7), trackers=lambda start: [curve]))
    assert (len(curve.points), curve.is_closed) == (7, True)
