"""Plan (run, resume or skip, and why), then execute.

A stage's fingerprint covers its version, its settings and the fingerprints of its inputs. A finished folder with that
fingerprint is the result; anything else is not.
"""

import contextlib
import importlib
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from extract.config import ExtractConfig
from extract.resolve import resolve_teacher
from extract.weights import weights_identity
from pipeline import provenance
from pipeline.config import PipelineConfig, differences
from pipeline.stages import STAGES, Stage, needs, upstream
from pipeline.workspace import (
    Workspace,
    again_folder,
    digest_outputs,
    exchange,
    find_damage,
    finish_exchange,
    read_result,
    sweep_private,
    what_became,
    write_state,
)
from storage.atomic import write_file, write_json
from storage.errors import ConfigError, DecantError, StoreBusyError
from storage.fingerprint import digest_file, digest_json
from storage.image_index import ImageIndex, build_index, require_labels
from storage.locations import open_files
from storage.lock import hold_lock
from storage.reader import load_manifest, open_store
from storage.stage import Interrupted, Progress, StageResult

Action = Literal["run", "resume", "skip"]


class StagePlan(NamedTuple):
    """What will be done about one stage."""

    stage: Stage
    action: Action
    reason: str
    folder: Path
    fingerprint: str
    inputs: dict[str, str]
    is_again: bool
    """A finished result exists and is kept until the new one is whole."""


class Plan(NamedTuple):
    """What a command will do."""

    config: PipelineConfig
    workspace: Workspace
    images: ImageIndex
    data_path: Path
    stages: dict[str, StagePlan]


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
    resolve_teacher(config.extract)
    index = _list_images(config, workspace, progress)
    data_path = workspace.data_path(index.location, index.fingerprint)
    listing = index.to_file()
    if not data_path.exists() or data_path.read_bytes() != listing:  # the images may lie elsewhere now
        write_file(data_path, listing)
    plans: dict[str, StagePlan] = {}
    for name in upstream(names, config):
        plans[name] = _plan_stage(STAGES[name], config, workspace, index, plans, name in set(again))
    return Plan(config, workspace, index, data_path, plans)


def _list_images(config: PipelineConfig, workspace: Workspace, progress: Progress | None) -> ImageIndex:
    """The images of the data set; without one, those of the store that a student is trained from."""
    if config.data.path is not None:
        return build_index(
            config.data.path, eval_fraction=config.data.eval_fraction, seed=config.data.split_seed,
            cache_dir=workspace.cache_dir, progress=progress,
        )  # fmt: skip
    if config.distill.store is not None:
        images = open_store(config.distill.store).images.at("")
        return ImageIndex(images, np.zeros(len(images), np.bool_))
    raise ConfigError("no data: give DATA=<folder of class folders, or tars of images> (--data)")


def _plan_stage(
    stage: Stage, config: PipelineConfig, workspace: Workspace, index: ImageIndex, plans: dict[str, StagePlan],
    again: bool,
) -> StagePlan:  # fmt: skip
    settings = stage.config(config)
    inputs = {name: plans[name].fingerprint for name in needs(stage, config)}
    store = stage.elsewhere(config)
    if store:
        inputs["store"] = load_manifest(open_files(store)).fingerprint
    if stage.data:
        inputs["data"] = index.fingerprint if stage.data == "all" else index.split(stage.data).fingerprint
    if isinstance(settings, ExtractConfig):
        inputs["weights"] = weights_identity(resolve_teacher(settings), settings.weights)
    fingerprint = digest_json(
        {"stage": stage.name, "version": stage.version, "settings": settings.identity(), "inputs": inputs}
    )
    folder = workspace.stage_dir(stage, stage.label(config), fingerprint)
    finish_exchange(folder)

    def planned(action: Action, reason: str, is_again: bool = False) -> StagePlan:
        return StagePlan(stage, action, reason, folder, fingerprint, inputs, is_again)

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


def _newer_inputs(result: StageResult, plans: dict[str, StagePlan]) -> list[str]:
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


def execute(
    plan: Plan, names: Iterable[str], progress: Callable[[str], contextlib.AbstractContextManager[Progress]]
) -> dict[str, StageResult]:
    """Run what is not up to date among `names`, in order; returns all their results.

    Args:
        progress: makes the progress display of a stage.

    Raises:
        ConfigError: something that a stage needs is not there and was not asked for.
        Interrupted, DecantError: from a stage; what it had finished is kept.
    """
    wanted = set(names)
    for name, item in plan.stages.items():
        if name not in wanted and item.action != "skip":
            verb = "need" if len(wanted) > 1 else "needs"
            raise ConfigError(
                f"{' and '.join(sorted(wanted))} {verb} {name}, which is not done ({item.reason}); "
                f"run `make {item.stage.command}` first, or `make run` for everything"
            )
    _check_labels(plan.images, wanted)
    results = {}
    for name in (name for name in plan.stages if name in wanted):
        item = plan.stages[name]
        if item.action == "skip":
            result = read_result(item.folder)
            assert result is not None
            results[name] = result
        else:
            with progress(name) as display:
                results[name] = _execute_stage(plan, item, display)
    return results


def _check_labels(images: ImageIndex, wanted: set[str]) -> None:
    """Refuse before the first stage what the last ones would refuse after days."""
    for name, purpose in (("finetune", "fine-tuning"), ("evaluate", "a linear probe")):
        if name in wanted:
            require_labels(images.split("train"), purpose)
            if not len(images.split("eval")):
                raise ConfigError(
                    f"{purpose} needs images that are held out, found none in {images.location}; "
                    "set data.eval_fraction above 0, or add a val folder"
                )


def _execute_stage(plan: Plan, item: StagePlan, progress: Progress) -> StageResult:
    stage = item.stage
    folder = again_folder(item.folder) if item.is_again else item.folder
    settings = stage.config(plan.config)
    inputs = {name: plan.stages[name].folder for name in needs(stage, plan.config)} | {"data": plan.data_path}
    started = time.monotonic()
    with hold_lock(folder):  # nothing is touched where another command is at work
        sweep_private(folder)
        write_state(folder, "running")
        (folder / "result.json").unlink(missing_ok=True)
    with _state(folder):
        metrics = importlib.import_module(stage.module).run(settings, inputs, folder, progress)
        result = StageResult(
            stage=stage.name,
            fingerprint=item.fingerprint,
            inputs=item.inputs,
            config=settings.identity(),
            metrics=metrics | {"outputs": digest_outputs(folder, stage.outputs)},
            seconds=round(time.monotonic() - started, 2),
            command=provenance.command_line(),
            code_version=provenance.code_version(),
            machine=provenance.machine(),
        )
        write_json(folder / "result.json", result.to_json())
    (folder / "state.json").unlink(missing_ok=True)
    if item.is_again:
        exchange(item.folder)
    return result


@contextlib.contextmanager
def _state(folder: Path) -> Iterator[None]:
    """Leave a word in the folder about what became of a run that did not finish."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        write_state(folder, "interrupted")
        raise
    except StoreBusyError:  # the state is that of the command that is at work there
        raise
    except DecantError as error:
        with contextlib.suppress(DecantError, OSError):
            write_state(folder, "failed", str(error))
        raise
    except Exception as error:
        with contextlib.suppress(DecantError, OSError):
            write_state(folder, "failed", f"{type(error).__name__}: {error}")
            (folder / "traceback.txt").write_text(traceback.format_exc())
        raise
