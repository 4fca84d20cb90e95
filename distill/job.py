"""One distillation as data: what every process that works on it is told, and what the first one tells afterwards."""

from pathlib import Path
from typing import Any

from distill.config import DistillConfig
from distill.live import LiveSource
from storage.schema import Schema

JOB_FILE = "job.json"
OUTCOME_FILE = "outcome.json"
PROGRESS_FILE = "progress.jsonl"
STOP_FILE = "stop"
"""In the run's folder while several processes work on it: the job; how it ended; what the first one reports on the way;
and, if there is one, the wish that they stop at the next step."""


class Job(Schema):
    """A distillation."""

    cfg: DistillConfig
    inputs: dict[str, Path]
    """`extract`, a finished store, unless `cfg.store` names one or the run is online; `data`, the index that says where
    its images lie."""
    out_dir: Path
    live: LiveSource | None = None
    """With `cfg.online`: the teacher."""


class Outcome(Schema):
    """How it ended."""

    metrics: dict[str, Any] | None = None
    """Of a finished one."""
    interrupted: bool = False
    error: str = ""
    """What was wrong, if the settings, the data or the disk were."""
    exit_code: int = 1
