"""The training loop, read from top to bottom; distillation and fine-tuning both run it.

Every step is a function of (seed, step): the batch, and the generator behind drop path. So a run that was killed and
resumed from a checkpoint ends with the same bytes as one that was not. A step's batch is computed in parts, over
processes and one after the other; what a part sees and draws depends on its number alone, not on who computes it.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distill.checkpoint import load_checkpoint, remove_checkpoints, save_checkpoint
from distill.gauges import Gauges, refuse_non_finite
from distill.parallel import ALONE, Team, whole, without_exchange
from distill.state import TrainState
from distill.trackers import Tracker
from storage.fingerprint import digest_json
from storage.stage import Progress, StopRequest


class Batch(Protocol):
    """What the loop asks of a part of a step's batch; the loss function knows the rest."""

    @property
    def step(self) -> int: ...
    @property
    def keys(self) -> list[str]: ...


@dataclass(frozen=True, kw_only=True)
class Training:
    """What to train and on what."""

    state: TrainState
    forward: nn.Module | None = None
    """What the loss calls: the model itself, or what exchanges its gradients with other processes."""
    set_lr: Callable[[int], float]
    """Puts the learning rate of a step into the optimiser, and returns it."""
    batches: Callable[[int], Iterator[Any]]
    """This process's parts of all steps from a step on."""
    loss: Callable[[Any], Tensor]
    """The mean loss of a part."""
    num_steps: int
    images_per_step: int
    parts: int = 1
    """Of each step's batch, for this process."""
    clip_grad: float
    seed: int
    out_dir: Path
    """Checkpoints live here while the run does."""
    run_digest: str
    """Of everything that must be the same for a checkpoint to be continued."""
    checkpoint_seconds: float
    team: Team = ALONE
    trackers: Callable[[int], Sequence[Tracker]] = lambda start: ()
    """Opened at the step that the run goes on from; by the first process alone."""


@dataclass
class TrainingLog:
    """What happened; kept inside checkpoints, so a resumed run's log is whole."""

    seconds: float = 0.0
    wait_seconds: float = 0.0
    """Of them, waiting for data."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Mean loss since the point before, and the learning rate."""
    recent: list[float] = field(default_factory=list)
    """Losses since the newest point; kept, so that the curve does not depend on where a run was cut."""
    tracked: list[float] = field(default_factory=list)
    """The same for the points that trackers get."""
    resumed_at: list[int] = field(default_factory=list)


def train(run: Training, progress: Progress, stop: StopRequest) -> TrainingLog:
    """Train to the last step, going on from the newest valid checkpoint.

    Raises:
        Interrupted: after saving a checkpoint, because a stop was asked for.
        ConfigError: the loss is not finite; the weights were not touched and the batch's keys are on disk.
    """
    model, optimizer, ema = run.state
    forward, team = run.forward or model, run.team
    device = next(model.parameters()).device

    # ---- resume ------------------------------------------------------------------------------------------------------
    log, start = _resume(run, progress)

    # ---- loop --------------------------------------------------------------------------------------------------------
    model.train()
    batches = run.batches(start)
    with contextlib.closing(Gauges(run, start, log, progress)) as gauges:
        for step in range(start, run.num_steps):
            lr = run.set_lr(step)
            optimizer.zero_grad(set_to_none=True)
            loss, keys = torch.zeros((), device=device), []
            for part in range(run.parts):
                with gauges.waiting():
                    batch = next(batches)
                torch.manual_seed(part_seed(run.seed, step, part * team.size + team.rank))
                with without_exchange(forward, wanted=part < run.parts - 1):
                    part_loss = run.loss(batch) / run.parts
                    part_loss.backward()
                loss += part_loss.detach()
                keys += batch.keys
            grad_norm = whole(nn.utils.clip_grad_norm_(model.parameters(), run.clip_grad))

            mean_loss, norm = (team.total(torch.stack([loss, grad_norm])) / team.size).tolist()
            refuse_non_finite(run, step, keys, mean_loss, norm)
            optimizer.step()
            if ema is not None:
                ema.update()

            gauges.step_done(step + 1, mean_loss, lr, norm)
            is_stopped, is_due = team.any(bool(stop), gauges.seconds_since_save > run.checkpoint_seconds)
            if is_stopped or is_due:
                gauges.before_save()
                tensors = run.state.tensors(wanted=team.is_first)
                if team.is_first:
                    save_checkpoint(run.out_dir / "checkpoints", step + 1, tensors, run.run_digest, vars(log))
            if is_stopped:
                stop.agreed()
    return log


def _resume(run: Training, progress: Progress) -> tuple[TrainingLog, int]:
    """The log and the step to go on from; all processes take the checkpoint that the first one finds valid."""
    folder = run.out_dir / "checkpoints"
    found = load_checkpoint(folder, run.run_digest, progress.say) if run.team.is_first else None
    step = run.team.agree(found.step if found else None)
    if step is None:
        return TrainingLog(), 0
    found = found or load_checkpoint(folder, run.run_digest, progress.say, at=step)
    assert found is not None, f"step {step} is in {folder} of the first process, not in that of {run.team.rank}"
    run.state.load(found.tensors)
    log = TrainingLog(**found.facts)
    log.resumed_at.append(step)
    progress.say(f"resuming at step {step} of {run.num_steps}")
    return log, step


def finish(run: Training) -> None:
    """Drop the checkpoints, after the results are on disk."""
    remove_checkpoints(run.out_dir / "checkpoints")


def part_seed(seed: int, step: int, part: int) -> int:
    """Of the generator behind one part of a step."""
    return int(digest_json([seed, step, part])[:15], 16)
