"""The training loop, read from top to bottom; distillation and fine-tuning both run it.

Every step is a function of (seed, step): the batch, and the generator behind drop path. So a run that was killed and
resumed from a checkpoint ends with the same bytes as one that was not.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distill.checkpoint import load_checkpoint, remove_checkpoints, restore, save_checkpoint
from storage.errors import DecantError
from storage.fingerprint import digest_json
from storage.stage import Progress, StopRequest

HISTORY_POINTS = 200
"""Points of a training curve, at most."""


class Batch(Protocol):
    """What the loop asks of a batch; the loss function knows the rest."""

    @property
    def step(self) -> int: ...
    @property
    def keys(self) -> list[str]: ...


@dataclass(frozen=True, kw_only=True)
class Training:
    """What to train and on what."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    set_lr: Callable[[int], float]
    """Puts the learning rate of a step into the optimiser, and returns it."""
    batches: Callable[[int], Iterator[Any]]
    """All batches from a step on."""
    loss: Callable[[Any], Tensor]
    num_steps: int
    clip_grad: float
    seed: int
    out_dir: Path
    """Checkpoints live here while the run does."""
    run_digest: str
    """Of everything that must be the same for a checkpoint to be continued."""
    checkpoint_seconds: float


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
    resumed_at: list[int] = field(default_factory=list)


def train(run: Training, progress: Progress, stop: StopRequest) -> TrainingLog:
    """Train to the last step, going on from the newest valid checkpoint.

    Raises:
        Interrupted: after saving a checkpoint, because a stop was asked for.
        DecantError: the loss is not finite; the weights were not touched and the batch's keys are on disk.
    """
    # ---- resume ------------------------------------------------------------------------------------------------------
    checkpoint_dir = run.out_dir / "checkpoints"
    log, start = TrainingLog(), 0
    checkpoint = load_checkpoint(checkpoint_dir, run.run_digest, progress.say)
    if checkpoint is not None:
        restore(checkpoint, run.model, run.optimizer)
        log, start = TrainingLog(**checkpoint.facts), checkpoint.step
        log.resumed_at.append(start)
        progress.say(f"resuming at step {start} of {run.num_steps}")
    progress.start(run.num_steps, "steps", done=start)

    def save(step: int) -> None:
        log.seconds += time.monotonic() - clock.saved
        clock.saved = time.monotonic()
        save_checkpoint(checkpoint_dir, step, run.model, run.optimizer, run.run_digest, vars(log))

    # ---- loop --------------------------------------------------------------------------------------------------------
    run.model.train()
    clock = _Clock()
    every = max(1, run.num_steps // HISTORY_POINTS)
    for batch in run.batches(start):
        step = batch.step
        log.wait_seconds += clock.waited()
        torch.manual_seed(_step_seed(run.seed, step))
        lr = run.set_lr(step)

        loss = run.loss(batch)
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.clip_grad)
        log.recent.append(loss.item())
        _refuse_non_finite(run, batch, log.recent[-1], float(grad_norm))
        run.optimizer.step()

        done = step + 1
        if done % every == 0 or done == run.num_steps:
            log.history.append({"step": done, "loss": sum(log.recent) / len(log.recent), "lr": lr})
            log.recent.clear()
        progress.advance(1, loss=f"{loss.item():.4f}", lr=f"{lr:.1e}")
        if stop or time.monotonic() - clock.saved > run.checkpoint_seconds:
            save(done)
            stop.check()
        clock.tick()
    log.seconds += time.monotonic() - clock.saved
    return log


def finish(run: Training) -> None:
    """Drop the checkpoints, after the results are on disk."""
    remove_checkpoints(run.out_dir / "checkpoints")


class _Clock:
    def __init__(self) -> None:
        self.saved = self._ticked = time.monotonic()

    def tick(self) -> None:
        self._ticked = time.monotonic()

    def waited(self) -> float:
        return time.monotonic() - self._ticked


def _step_seed(seed: int, step: int) -> int:
    return int(digest_json([seed, step])[:15], 16)


def _refuse_non_finite(run: Training, batch: Batch, loss: float, grad_norm: float) -> None:
    if grad_norm == grad_norm and abs(loss) < float("inf") and grad_norm < float("inf") and loss == loss:
        return
    path = run.out_dir / f"non-finite-step-{batch.step}.json"
    path.write_text(
        json.dumps({"step": batch.step, "loss": str(loss), "grad_norm": str(grad_norm), "keys": batch.keys})
    )
    raise DecantError(
        f"loss {loss} and gradient norm {grad_norm} at step {batch.step}: stopped before the update; its images "
        f"are listed in {path}; lower optim.base_lr, or look at these images"
    )


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one."""
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
