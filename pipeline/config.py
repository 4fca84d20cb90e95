"""All settings of a run, and how the command line changes them."""

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator

from distill.config import DistillConfig
from extract.config import ExtractConfig
from finetune.config import EvaluateConfig, FinetuneConfig
from storage.errors import ConfigError
from storage.schema import Schema


class DataConfig(Schema):
    """Which images."""

    path: str | None = None
    """A folder of class folders, or tars (WebDataset) or Parquet files of images, by path or URL; `train` and `val`
    parts are used if there are any."""
    eval_fraction: float = Field(default=0.2, ge=0, lt=1)
    """Share of each class that is held out for evaluation where the data has no `val` part of its own."""
    split_seed: int = 0
    skip: tuple[Annotated[str, StringConstraints(min_length=1)], ...] = ()
    """Images that are left out of the train part: keys, file names without suffix, or the list `imagenet-27`, which the
    paper's code leaves out where it reads plain folders (not from zips, and not in fine-tuning and linear probes)."""

    @field_validator("skip", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class ReportConfig(Schema):
    """The report has no settings of its own."""

    title: str = "Feature distillation"


class OtherTeacher(Schema):
    """A further teacher that looks at the same views."""

    name: str
    weights: Literal["random"] | Path | None = None
    """As `extract.weights`, which are the first teacher's."""
    loss_weight: float | None = Field(default=None, gt=0)
    """Of its loss, where students learn from it too, with a projector of its own; that of the first teacher is 1. None:
    its store is filled, and no student learns from it."""


class PipelineConfig(Schema):
    """Everything that a run depends on."""

    preset: str
    data: DataConfig = DataConfig()
    extract: ExtractConfig = ExtractConfig()
    also: tuple[OtherTeacher, ...] = ()
    """Teachers beside `extract.teacher` whose stores are filled in the same pass over the images, with the same
    settings. No part of a store's identity: each one is what its teacher alone would have made."""
    distill: DistillConfig = DistillConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()

    @property
    def teachers(self) -> dict[str, Literal["random"] | Path | None]:
        """Every teacher with its weights, the one that students are trained from first."""
        return {self.extract.teacher: self.extract.weights} | {other.name: other.weights for other in self.also}

    @property
    def also_learnt(self) -> tuple[OtherTeacher, ...]:
        """Those of the further teachers that students learn from, too."""
        return tuple(other for other in self.also if other.loss_weight is not None)

    def led_by(self, teacher: str) -> "PipelineConfig":
        """The same settings with another of `teachers` first, from which alone students then learn."""
        if teacher == self.extract.teacher:
            return self
        others = {name: weights for name, weights in self.teachers.items() if name != teacher}
        return self.model_copy(
            update={
                "extract": self.extract.model_copy(update={"teacher": teacher, "weights": self.teachers[teacher]}),
                "also": tuple(OtherTeacher(name=name, weights=weights) for name, weights in others.items()),
            }
        )

    @property
    def online_teacher(self) -> ExtractConfig | None:
        """The teacher that works in every training step, in the place of a store; None where there is one."""
        return self.extract.stored_exactly() if self.distill.online else None

    @property
    def extract_eval(self) -> ExtractConfig:
        """The same teacher on the held-out images: one centred view each, every token exactly as it is, and whitened as
        the student's targets are: by what the store that it learns from has learnt."""
        changes: dict[str, Any] = {"split": "eval", "views": 1, "sampler": self.finetune.eval_sampler}
        if self.distill.store is not None:
            changes["whitening_from"] = self.distill.store
        return self.extract.stored_exactly().model_copy(update=changes)


def apply_overrides(config: PipelineConfig, overrides: Iterable[tuple[str, Any]]) -> PipelineConfig:
    """Change settings by dotted name, as `--set distill.epochs=30` does.

    Raises:
        ConfigError: an unknown name (the nearest is offered), or a value of the wrong kind.
    """
    values = config.to_json()
    for name, value in overrides:
        *groups, last = name.split(".")
        place: Any = values
        for depth, group in enumerate(groups):
            place = _step(place, group, ".".join(groups[:depth]), name)
        _step(place, last, ".".join(groups), name)
        place[last] = value
    return PipelineConfig.checked(values, "settings")


def parse_assignment(text: str) -> tuple[str, Any]:
    """`name=value` to its two parts; the value is read as JSON where it is JSON, else it is text.

    Raises:
        ConfigError: there is no `=`.
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set {text!r} is not of the form name=value, such as distill.epochs=30")
    return name.strip(), _read(value.strip())


def _step(place: Any, key: str, where: str, name: str) -> Any:
    if not isinstance(place, dict):
        raise ConfigError(f"unknown setting {name!r}; {where} is {json.dumps(place)} and has no parts")
    if key not in place:
        near = difflib.get_close_matches(key, sorted(place), n=1, cutoff=0.4)
        prefix = f"{where}." if where else ""
        hint = f"did you mean {prefix}{near[0]}?" if near else f"known there: {', '.join(prefix + k for k in place)}"
        raise ConfigError(f"unknown setting {name!r}; {hint}")
    return place[key]


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def differences(before: Any, after: Any, name: str = "") -> list[str]:
    """What changed between two JSON settings, as `name: before -> after`."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            line
            for key in sorted({*before, *after})
            for line in differences(before.get(key), after.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if before == after else [f"{name}: {json.dumps(before)} -> {json.dumps(after)}"]
