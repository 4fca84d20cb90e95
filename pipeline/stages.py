"""The stage graph, as data."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from extract.config import ExtractConfig
from pipeline.config import PipelineConfig
from storage.schema import Schema

DataPart = Literal["train", "eval", "all"]


class Stage(NamedTuple):
    """One stage: what it needs, what it is configured by, and where its code is."""

    name: str
    command: str
    """The command that runs it."""
    module: str
    """Dotted path of the module with its `run`; imported only when the stage runs."""
    version: int
    """Raised when the code's results change, so that old ones are not taken for new ones."""
    config: Callable[[PipelineConfig], Schema]
    needs: tuple[str, ...]
    data: DataPart | None
    """Which images it depends on."""
    folder: str
    label: Callable[[PipelineConfig], str]
    """Readable part of its output folder's name."""
    elsewhere: Callable[[PipelineConfig], str | None] = lambda config: None
    """A store that was made elsewhere, by path or URL, and is used in the place of `needs`."""
    has_needs: Callable[[PipelineConfig], bool] = lambda config: True
    """Whether it depends on `needs` at all."""
    outputs: tuple[str, ...] = ()
    """Files whose digests go into the result, so that damage is noticed before they are used. A store has receipts."""


def _whitening_from(cfg: ExtractConfig) -> str | None:
    """The store whose whitening is taken; none where whitening learns nothing."""
    return None if cfg.whitening.is_fitted else cfg.whitening_from


def teacher_label(config: PipelineConfig) -> str:
    """The teacher's name as it can be part of a folder's: `timm:NAME`, `open_clip:NAME/TAG` and paths are no such."""
    name = config.extract.teacher
    file = Path(name).name if ".py" in name else name
    return plain_name(file)[:80]


def plain_name(text: str) -> str:
    """A text as it can be part of a folder's name."""
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.")


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            name="extract", command="extract", module="extract.run", version=2, config=lambda c: c.extract,
            needs=(), data="train", folder="stores", label=teacher_label,
            elsewhere=lambda c: _whitening_from(c.extract),
        ),
        Stage(
            name="extract_eval", command="evaluate", module="extract.run", version=2, config=lambda c: c.extract_eval,
            needs=("extract",), data="eval", folder="stores", label=lambda c: f"{teacher_label(c)}-eval",
            elsewhere=lambda c: _whitening_from(c.extract_eval), has_needs=lambda c: not c.extract.whitening.is_fitted,
        ),
        Stage(
            name="distill", command="distill", module="distill.run", version=3, config=lambda c: c.distill,
            needs=("extract",), data=None, folder="students",
            label=lambda c: f"{teacher_label(c)}-{plain_name(c.distill.student.label)}",
            outputs=("student.safetensors", "projector.safetensors"), elsewhere=lambda c: c.distill.store,
        ),
        Stage(
            name="finetune", command="finetune", module="finetune.run", version=2, config=lambda c: c.finetune,
            needs=("distill",), data="all", folder="finetune", label=teacher_label,
        ),
        Stage(
            name="evaluate", command="evaluate", module="finetune.evaluate", version=2, config=lambda c: c.evaluate,
            needs=("extract", "extract_eval", "distill"), data="all", folder="evaluate",
            label=teacher_label, outputs=("pictures.npz",),
        ),
        Stage(
            name="report", command="report", module="pipeline.report", version=1, config=lambda c: c.report,
            needs=("extract", "distill", "finetune", "evaluate"), data=None, folder="reports",
            label=teacher_label, outputs=("report.html",),
        ),
    )
}  # fmt: skip
"""In an order in which every stage comes after what it needs."""


def needs(stage: Stage, config: PipelineConfig) -> tuple[str, ...]:
    """The stages that a stage depends on under some settings."""
    return stage.needs if stage.has_needs(config) and not stage.elsewhere(config) else ()


def upstream(names: tuple[str, ...], config: PipelineConfig) -> list[str]:
    """All stages that some stages depend on, and themselves, in running order."""
    wanted = set(names)
    for stage in reversed(STAGES.values()):
        if stage.name in wanted:
            wanted |= set(needs(stage, config))
    return [name for name in STAGES if name in wanted]
