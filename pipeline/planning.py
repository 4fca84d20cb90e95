"""What a command will do: run, resume or skip each stage, and why.

A stage's fingerprint covers its version, its settings and the fingerprints of its inputs. A finished folder with that
fingerprint is the result; anything else is not.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from distill.config import DistillConfig, OtherStore
from extract.config import ExtractConfig
from extract.resolve import resolve_settings, resolve_teacher, settings_identity
from extract.weights import weights_identity
from pipeline.config import PipelineConfig, differences
from pipeline.stages import STAGES, Stage, needs, upstream
from pipeline.workspace import Workspace, find_damage, finish_exchange, read_result, what_became
from storage.atomic import read_regular, write_file
from storage.errors import ConfigError, InputError
from storage.fingerprint import digest_file, digest_json
from storage.image_index import ImageIndex, build_index
from storage.locations import open_files
from storage.reader import load_manifest, open_store
from storage.schema import Schema
from storage.stage import Progress, StageResult

Action = Literal["run", "resume", "skip"]


class StagePlan(NamedTuple):
    """What will be done about one stage."""

    stage: Stage
    action: Action
    reason: str
    folder: Path
    fingerprint: str
    inputs: dict[str, str]
    settings: Schema
    is_again: bool
    """A finished result exists and is kept until the new one is whole."""
    teacher: ExtractConfig | None
    """The teacher that works inside the stage, where one does."""


class Plan(NamedTuple):
    """What a command will do."""

    config: PipelineConfig
    workspace: Workspace
    images: ImageIndex
    data_path: Path
    stages: dict[str, StagePlan]
    also: dict[str, StagePlan]
    """By the teacher's name: further stores that are filled in the same pass as that of `extract`; or, where none is to
    be filled, those that the student learns from."""

    def stores(self) -> list[StagePlan]:
        """All stores of this folder that `extract` fills, or the student learns from."""
        first = self.stages.get("extract")
        return [*([first] if first else []), *self.also.values()]


def make_plan(
    config: PipelineConfig, workspace: Workspace, names: tuple[str, ...], *, again: Iterable[str] = (),
    progress: Progress | None = None,
) -> Plan:  # fmt: skip
    """Decide about the stages `names` and everything they depend on. Writes nothing but the image list, and finishes
    the exchange of a folder that was cut short.

    Args:
        again: stages to run even if they are up to date.
        progress: hears of the images that are read for the first time.

    Raises:
        ConfigError, InputError: settings or data that cannot work.
    """
    resolved = _resolved(config)
    variants = {name: _resolved(config.led_by(name)) for name in config.teachers if name != config.extract.teacher}
    _check_sources(config)
    if "evaluate" in names:
        _check_whitening(config)
    index = _list_images(config, workspace, progress)
    data_path = workspace.data_path(index.location, index.fingerprint)
    listing = index.to_file()
    if not data_path.exists() or read_regular(data_path) != listing:  # the images may lie elsewhere now
        write_file(data_path, listing)
    wanted, forced = upstream(names, config), set(again)
    also = {
        name: _plan_stage(STAGES["extract"], variants[name], workspace, index, {}, {}, "extract" in forced)
        for name in _further_stores(config, names, wanted)
    }
    plans: dict[str, StagePlan] = {}
    for name in wanted:
        plans[name] = _plan_stage(STAGES[name], resolved, workspace, index, plans, also, name in forced)
    return Plan(config, workspace, index, data_path, plans, also)


def _further_stores(config: PipelineConfig, names: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """The teachers whose stores count beside that of the first: all of those that are to be filled; else those that the
    student learns from."""
    if "extract" in names:
        return [other.name for other in config.also]
    return [other.name for other in config.also_learnt] if "distill" in wanted else []


def _resolved(config: PipelineConfig) -> PipelineConfig:
    return config.model_copy(update={"extract": resolve_settings(config.extract)})


def _check_sources(config: PipelineConfig) -> None:
    """Refuse two first teachers.

    Raises:
        ConfigError: says both.
    """
    if config.distill.online and config.distill.store is not None:
        raise ConfigError(
            f"distill.online asks {config.extract.teacher!r} in every step, and distill.store is "
            f"{config.distill.store!r}; a student learns from the one or the other: leave out ONLINE or STORE"
        )


def _check_whitening(config: PipelineConfig) -> None:
    """Refuse before the first stage a student whose targets are whitened unlike what it is compared with.

    Raises:
        ConfigError: says both.
    """
    store, wanted = config.distill.store, config.extract.whitening
    found = wanted if store is None else load_manifest(open_files(store)).plan.whitening.unfitted()
    if found != wanted:
        raise ConfigError(
            f"the student is trained from {store}, which is whitened by {found.to_json()}, but would be evaluated on a "
            f"store that is whitened by {wanted.to_json()}; give WHITENING={found.kind} (extract.whitening)"
        )


def _list_images(config: PipelineConfig, workspace: Workspace, progress: Progress | None) -> ImageIndex:
    """The images of the data set; without one, those of the store that a student is trained from."""
    if config.data.path is not None:
        return build_index(
            config.data.path, eval_fraction=config.data.eval_fraction, seed=config.data.split_seed,
            cache_dir=workspace.cache_dir, skip=config.data.skip, progress=progress,
        )  # fmt: skip
    if config.distill.store is not None:
        images = open_store(config.distill.store).images.at("")
        return ImageIndex(images, np.zeros(len(images), np.bool_))
    raise ConfigError("no data: give DATA=<folder of class folders, or tars or Parquet files of images> (--data)")


def _plan_stage(
    stage: Stage, config: PipelineConfig, workspace: Workspace, index: ImageIndex, plans: Mapping[str, StagePlan],
    also: Mapping[str, StagePlan], again: bool,
) -> StagePlan:  # fmt: skip
    settings = stage.config(config)
    inputs = {name: plans[name].fingerprint for name in needs(stage, config)}
    for name, store in stage.elsewhere(config).items():
        inputs[name] = load_manifest(open_files(store)).fingerprint
    student = stage.student(config)
    if student is not None:
        inputs["student"] = _student_digest(Path(student))
    if isinstance(settings, DistillConfig):
        settings = _with_stores_of(settings, config, also)
        inputs |= {f"extract of {other.name}": also[other.name].fingerprint for other in config.also_learnt}
    if stage.data:
        inputs["data"] = index.fingerprint if stage.data == "all" else index.split(stage.data).fingerprint
    teacher = stage.teacher(config)
    if teacher is not None:  # what a store of it would depend on
        inputs["data"] = index.split(teacher.split).fingerprint
        inputs["weights"] = weights_identity(resolve_teacher(teacher), teacher.weights)
        inputs["teacher"] = digest_json({"version": STAGES["extract"].version, "settings": settings_identity(teacher)})
    identity = settings.identity()
    if isinstance(settings, ExtractConfig):
        inputs["weights"] = weights_identity(resolve_teacher(settings), settings.weights)
        identity = settings_identity(settings)
    fingerprint = digest_json({"stage": stage.name, "version": stage.version, "settings": identity, "inputs": inputs})
    folder = workspace.stage_dir(stage, stage.label(config), fingerprint)
    finish_exchange(folder)

    def planned(action: Action, reason: str, is_again: bool = False) -> StagePlan:
        return StagePlan(stage, action, reason, folder, fingerprint, inputs, settings, is_again, teacher)

    result = read_result(folder)
    if result is not None and result.fingerprint == fingerprint:
        damage = find_damage(stage, folder, result)
        if damage:
            return planned("resume", damage)
        if again:
            return planned("run", "asked for by name; it was up to date, and stays until the new result is whole", True)
        newer = _newer_inputs(result, plans)
        if newer:
            return planned("run", f"{', '.join(newer)} has a newer result", True)
        return planned("skip", f"up to date (took {result.seconds:,.0f} s)")
    if folder.exists():
        return planned("resume", what_became(folder))
    return planned("run", _why_new(stage, workspace, settings.identity(), inputs))


def _student_digest(folder: Path) -> str:
    """Of the weights of a student that was made elsewhere.

    Raises:
        InputError: there are none.
    """
    weights = folder / "student.safetensors"
    if not weights.is_file():
        raise InputError(
            f"finetune.student is {folder}, which has no {weights.name}; give a folder that `make import` or `make "
            "distill` wrote, or null for the student of this work folder"
        )
    return digest_file(weights)


def _with_stores_of(settings: DistillConfig, config: PipelineConfig, also: Mapping[str, StagePlan]) -> DistillConfig:
    """The settings of a student that learns from the further teachers' stores, too: in front of those that were made
    elsewhere."""
    stores = [
        OtherStore(store=str(also[other.name].folder.absolute()), weight=other.loss_weight)
        for other in config.also_learnt
        if other.loss_weight is not None
    ]
    return settings.model_copy(update={"also": (*stores, *settings.also)})


def _newer_inputs(result: StageResult, plans: Mapping[str, StagePlan]) -> list[str]:
    """Inputs that a stage read and that were made again since (a report reads results, not only what they point to)."""
    read = result.metrics.get("read_results", {})
    return [
        name
        for name, digest in read.items()
        if plans[name].action != "skip" or digest_file(plans[name].folder / "result.json") != digest
    ]


def _why_new(stage: Stage, workspace: Workspace, identity: dict[str, object], inputs: dict[str, str]) -> str:
    earlier = workspace.results(stage)
    if not earlier:
        return "not run before"
    changes = [
        [f"{stage.name}.{line}" for line in differences(result.config, identity)]
        + [f"{name} changed" for name in inputs if result.inputs.get(name) != inputs[name]]
        for _, result in earlier
    ]
    nearest = min(changes, key=len)
    if not nearest:
        return "the program's version of this stage changed"
    more = f" and {len(nearest) - 4} more" if len(nearest) > 4 else ""
    return "; ".join(nearest[:4]) + more
