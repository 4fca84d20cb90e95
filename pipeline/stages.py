"""The stage graph, as data."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from pipeline.config import PipelineConfig
from storage.schema import Schema

DataPart = Literal["train", "eval", "all"]


class Stage(NamedTuple):
    """One stage: what it needs, what it is configured by, and where its code is."""

    name: str
    command: str
    """The command that runs it."""
    verb: str
    """What it makes, for the plan."""
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


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "extract", "extract", "teacher tokens of the training images", "extract.run", 1, lambda c: c.extract, (), "train",
            "stores", lambda c: c.extract.teacher,
        ),
        Stage(
            "extract_eval", "evaluate", "teacher tokens of the held-out images", "extract.run", 1, lambda c: c.extract_eval, (),
            "eval", "stores", lambda c: f"{c.extract.teacher}-eval",
        ),
        Stage(
            "distill", "distill", "a student from the store", "distill.run", 1, lambda c: c.distill, ("extract",), None,
            "students", lambda c: f"{c.extract.teacher}-w{c.distill.student.width}-d{c.distill.student.depth}",
        ),
        Stage(
            "finetune", "finetune", "labels, from scratch and from the student", "finetune.run", 1, lambda c: c.finetune,
            ("distill",), "all", "finetune", lambda c: c.extract.teacher,
        ),
        Stage(
            "evaluate", "evaluate", "frozen features, student against teacher", "finetune.evaluate", 1, lambda c: c.evaluate,
            ("extract", "extract_eval", "distill"), "all", "evaluate", lambda c: c.extract.teacher,
        ),
        Stage(
            "report", "report", "a table and a page", "pipeline.report", 1, lambda c: c.report,
            ("extract", "distill", "finetune", "evaluate"), None, "reports", lambda c: c.extract.teacher,
        ),
    )
}  # fmt: skip
"""In an order in which every stage comes after what it needs."""


def upstream(names: tuple[str, ...]) -> list[str]:
    """All stages that some stages depend on, and themselves, in running order."""
    wanted = set(names)
    for stage in reversed(STAGES.values()):
        if stage.name in wanted:
            wanted |= set(stage.needs)
    return [name for name in STAGES if name in wanted]
