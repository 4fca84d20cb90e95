"""The stage graph, as data."""

import re
from collections.abc import Callable, Mapping
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
    has_needs: Callable[[PipelineConfig], bool] = lambda config: True
    """Whether it depends on `needs` at all."""
    elsewhere: Callable[[PipelineConfig], Mapping[str, str]] = lambda config: {}
    """Stores that were made elsewhere and are used, too: what each is to the stage, and its path or URL."""
    student: Callable[[PipelineConfig], str | None] = lambda config: None
    """The folder of a student that was made elsewhere, where one is taken."""
    teacher: Callable[[PipelineConfig], ExtractConfig | None] = lambda config: None
    """The teacher that works inside the stage, where one does."""
    outputs: tuple[str, ...] = ()
    """Files whose digests go into the result, so that damage is noticed before they are used. A store has receipts."""
    scratch: tuple[str, ...] = ()
    """Folders in which the stage keeps what it would go on from; of no use once the result is there."""


def _whitening_from(cfg: ExtractConfig) -> dict[str, str]:
    """The store whose whitening is taken; none where whitening learns nothing."""
    return {} if cfg.whitening.is_fitted or not cfg.whitening_from else {"store": cfg.whitening_from}


def _learnt_from(config: PipelineConfig) -> dict[str, str]:
    """Stores of other makers that a student learns from; and, for a teacher that works online, the one whose whitening
    it takes."""
    stores = {} if config.online_teacher is None else _whitening_from(config.online_teacher)
    if config.distill.store is not None:
        stores["store"] = config.distill.store
    return stores | {f"store {number}": other.store for number, other in enumerate(config.distill.also, start=2)}


def teacher_label(config: PipelineConfig) -> str:
    """The teacher's name as it can be part of a folder's."""
    return _label(config.extract.teacher)


def _student_label(config: PipelineConfig) -> str:
    teachers = [config.extract.teacher, *(other.name for other in config.also_learnt)]
    return f"{'+'.join(map(_label, teachers))[:80]}-{plain_name(config.distill.student.label)}"


def _finetune_label(config: PipelineConfig) -> str:
    student = config.finetune.student
    return teacher_label(config) if student is None else plain_name(Path(student).name)[:80]


def _label(teacher: str) -> str:
    """`timm:NAME`, `open_clip:NAME/TAG` and paths cannot be part of a folder's name."""
    return plain_name(Path(teacher).name if ".py" in teacher else teacher)[:80]


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
            has_needs=lambda c: not c.extract.whitening.is_fitted and not _whitening_from(c.extract_eval),
            elsewhere=lambda c: _whitening_from(c.extract_eval),
        ),
        Stage(
            name="distill", command="distill", module="distill.run", version=3, config=lambda c: c.distill,
            needs=("extract",), data=None, folder="students", label=_student_label,
            has_needs=lambda c: c.distill.store is None and not c.distill.online, elsewhere=_learnt_from,
            teacher=lambda c: c.online_teacher, outputs=("student.safetensors", "projector.safetensors"),
            scratch=("checkpoints",),
        ),
        Stage(
            name="finetune", command="finetune", module="finetune.run", version=3, config=lambda c: c.finetune,
            needs=("distill",), data="all", folder="finetune", label=_finetune_label,
            has_needs=lambda c: c.finetune.student is None, student=lambda c: c.finetune.student,
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
    return stage.needs if stage.has_needs(config) else ()


def upstream(names: tuple[str, ...], config: PipelineConfig) -> list[str]:
    """All stages that some stages depend on, and themselves, in running order."""
    wanted = set(names)
    for stage in reversed(STAGES.values()):
        if stage.name in wanted:
            wanted |= set(needs(stage, config))
    return [name for name in STAGES if name in wanted]
