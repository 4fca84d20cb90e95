"""The distillation stage: a student from a store.

python -m pipeline distill --student vit-b
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.config import DistillConfig
from distill.job import Job
from distill.launch import launch, sweep
from distill.live import LiveSource
from distill.session import distill
from storage.lock import hold_lock
from storage.stage import Progress, SilentProgress, stop_on_signals


def run(
    cfg: DistillConfig, inputs: Mapping[str, Path], out_dir: Path, progress: Progress | None = None, *,
    live: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train a student on a store and write `student.safetensors`, in this process or in several.

    Args:
        inputs: `extract`, a finished store, unless `cfg.store` names one; `data`, the index that says where its images
            lie.
        live: with `cfg.online`, the fields of a `LiveSource`.

    Returns:
        The stage's metrics.

    Raises:
        ConfigError: the student does not fit the store.
    """
    progress = progress or SilentProgress()
    source = None if live is None else LiveSource.checked(live, "the live teacher")
    job = Job(cfg=cfg, inputs=dict(inputs), out_dir=out_dir, live=source)
    with hold_lock(out_dir), stop_on_signals() as stop:
        sweep(out_dir)
        if cfg.run.processes > 1 or cfg.run.launcher == "ray":
            return launch(job, progress, stop)
        return distill(job, progress, stop)
