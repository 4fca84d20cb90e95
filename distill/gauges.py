"""What a training shows while it runs: loss, speed, waiting, memory; and the alarm when a loss is not finite."""

import contextlib
import math
import resource
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from distill.trackers import close_all
from storage.atomic import write_json
from storage.errors import ConfigError
from storage.pace import Pace
from storage.stage import Progress

if TYPE_CHECKING:
    from distill.loop import Training, TrainingLog

HISTORY_POINTS = 200
"""Points of a training curve in the results, at most."""
TRACKED_POINTS = 2000
"""Points of it that trackers get, at most."""


class Gauges:
    """Clocks and curves of one process's run; the first process tells of all."""

    def __init__(self, run: "Training", start: int, log: "TrainingLog", progress: Progress) -> None:
        self.run, self.log, self.progress = run, log, progress
        self.history_every = max(1, run.num_steps // HISTORY_POINTS)
        self.tracked_every = max(1, run.num_steps // TRACKED_POINTS)
        self.trackers = run.trackers(start) if run.team.is_first else ()
        self.pace = Pace()
        self.device = next(run.state.model.parameters()).device
        self._began = self._counted = self._saved = time.monotonic()
        self._waited = 0.0
        progress.start(run.num_steps, "steps", done=start)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The block waits for data."""
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self._waited += seconds
        self.log.wait_seconds += seconds

    @property
    def seconds_since_save(self) -> float:
        return time.monotonic() - self._saved

    def before_save(self) -> None:
        """The log is about to be saved: it holds all seconds up to here."""
        self._count()
        self._saved = time.monotonic()

    def step_done(self, done: int, loss: float, lr: float, grad_norm: float) -> None:
        run, log = self.run, self.log
        self.pace.add(run.images_per_step)
        log.recent.append(loss)
        log.tracked.append(loss)
        if done % self.history_every == 0 or done == run.num_steps:
            log.history.append({"step": done, "loss": sum(log.recent) / len(log.recent), "lr": lr})
            log.recent.clear()
        wait = self._waited / max(1e-9, time.monotonic() - self._began)
        memory = memory_bytes(self.device)
        if done % self.tracked_every == 0 or done == run.num_steps:
            values = {
                "loss": sum(log.tracked) / len(log.tracked), "lr": lr, "grad_norm": grad_norm,
                "images_per_second": self.pace.per_second(), "data_wait": wait, "memory_gb": memory / 1e9,
            }  # fmt: skip
            log.tracked.clear()
            for tracker in self.trackers:
                tracker.log(done, values)
        self.progress.advance(
            1, loss=f"{loss:.4f}", lr=f"{lr:.1e}", **{"images/s": f"{self.pace.per_second():,.0f}"},
            wait=f"{wait:.0%}", memory=f"{memory / 1e9:.1f}GB",
        )  # fmt: skip

    def close(self) -> None:
        self._count()
        close_all(self.trackers)

    def _count(self) -> None:
        now = time.monotonic()
        self.log.seconds += now - self._counted
        self._counted = now


def memory_bytes(device: torch.device) -> int:
    """The most that was in use so far: of the GPU's memory by torch, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def refuse_non_finite(run: "Training", step: int, keys: Sequence[str], loss: float, grad_norm: float) -> None:
    """Stop before an update that would destroy the weights.

    Raises:
        ConfigError: loss or gradient is not finite; the images of this process's batch are listed in a file.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    of_process = f"-process-{run.team.rank}" if run.team.size > 1 else ""
    path = run.out_dir / f"non-finite-step-{step}{of_process}.json"
    write_json(
        path, {"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "seed": run.seed, "keys": list(keys)}
    )
    raise ConfigError(
        f"loss {loss} and gradient norm {grad_norm} at step {step}: stopped before the update; its images "
        f"are listed in {path}; lower optim.base_lr, or look at these images"
    )
