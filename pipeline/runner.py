"""Execute a plan: run what is not up to date, in order."""

import contextlib
import importlib
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from extract.extraction import with_absolute_paths
from pipeline import provenance
from pipeline.planning import Plan, StagePlan
from pipeline.stages import needs
from pipeline.workspace import again_folder, digest_outputs, exchange, read_result, sweep_private, write_state
from storage.atomic import remove_file, remove_tree, write_json
from storage.errors import ConfigError, DecantError, StoreBusyError
from storage.image_index import ImageIndex, require_labels
from storage.lock import hold_lock
from storage.stage import Interrupted, Progress, StageResult

_LIVE_TEACHERS = "extract.online:open_live"
"""What makes a teacher that works inside another stage, as `module:function`."""


def execute(
    plan: Plan, names: Iterable[str], progress: Callable[[str], contextlib.AbstractContextManager[Progress]], *,
    join: bool = False, retry_failed: bool = False,
) -> dict[str, StageResult]:  # fmt: skip
    """Run what is not up to date among `names`, in order; returns all their results.

    Args:
        progress: makes the progress display of a stage.
        join: help where another command is filling a store, instead of giving way to it.
        retry_failed: extract shards again that earlier commands gave up.

    Raises:
        ConfigError: something that a stage needs is not there and was not asked for.
        Interrupted, DecantError: from a stage; what it had finished is kept.
    """
    wanted = set(names)
    _check_needs(plan, wanted)
    _check_labels(plan.images, wanted)
    results = {}
    for name in (name for name in plan.stages if name in wanted):
        items = plan.stores() if name == "extract" else [plan.stages[name]]
        to_do = [item for item in items if item.action != "skip"]
        if to_do:
            with progress(name) as display:
                _execute_or_help(plan, to_do, display, join=join, retry_failed=retry_failed)
        result = read_result(plan.stages[name].folder)
        assert result is not None
        results[name] = result
    return results


def _check_needs(plan: Plan, wanted: set[str]) -> None:
    """Refuse what rests on something that is not there and was not asked for."""
    further = {f"the store of {teacher}": item for teacher, item in plan.also.items()}
    for name, item in (plan.stages | further).items():
        if item.stage.name not in wanted and item.action != "skip":
            verb = "need" if len(wanted) > 1 else "needs"
            remedy = f"run `make {item.stage.command}` first, or `make run` for everything"
            if name in further:
                remedy = f"run `make extract TEACHER={','.join(plan.config.teachers)}` first"
            raise ConfigError(
                f"{' and '.join(sorted(wanted))} {verb} {name}, which is not done ({item.reason}); {remedy}"
            )


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


def _execute_or_help(
    plan: Plan, items: Sequence[StagePlan], progress: Progress, *, join: bool, retry_failed: bool
) -> None:
    """Run a stage. Where another command fills the same stores and `join` allows it, help that one; then see to what it
    left undone."""
    while items:
        try:
            _execute(plan, items, progress, retry_failed=retry_failed)
            return
        except StoreBusyError:
            if not join or items[0].stage.folder != "stores":
                raise
        joining = importlib.import_module("extract.join")
        settings = [item.settings for item in items]
        joining.help_others(
            [item.folder for item in items], settings[0].run, progress,  # type: ignore[attr-defined]
            teachers=[cfg.teacher for cfg in settings],  # type: ignore[attr-defined]
        )  # fmt: skip
        items = _wait_for_results(items, joining.PATIENCE_SECONDS)


def _wait_for_results(items: Sequence[StagePlan], seconds: float) -> list[StagePlan]:
    """Those that have no result although the command that was at them had a moment to write it."""
    deadline = time.monotonic() + seconds
    while True:
        results = [read_result(item.folder) for item in items]
        missing = [
            item for item, result in zip(items, results, strict=True)
            if result is None or result.fingerprint != item.fingerprint
        ]  # fmt: skip
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.1)


def _execute(plan: Plan, items: Sequence[StagePlan], progress: Progress, *, retry_failed: bool) -> None:
    """Run a stage; or, for several stores, the same stage once for all of them. What did not fail has its result even
    where another one failed."""
    stage = items[0].stage
    folders = [again_folder(item.folder) if item.is_again else item.folder for item in items]
    inputs = {name: plan.stages[name].folder for name in needs(stage, plan.config)} | {"data": plan.data_path}
    started = time.monotonic()
    with contextlib.ExitStack() as held:  # nothing is touched where another command is at work
        for folder in folders:
            held.enter_context(hold_lock(folder))
        for folder in folders:
            sweep_private(folder)
            write_state(folder, "running")
            remove_file(folder / "result.json")
    failures = []
    with contextlib.ExitStack() as states:
        for folder in folders:
            states.enter_context(_state(folder))
        outcomes = _outcomes(items, folders, inputs, progress, retry_failed=retry_failed)
        for item, folder, outcome in zip(items, folders, outcomes, strict=True):
            if isinstance(outcome, DecantError):
                failures.append(outcome)
                write_state(folder, "failed", str(outcome))
                continue
            seconds = round(time.monotonic() - started, 2)
            write_json(folder / "result.json", _result(item, folder, outcome, seconds).to_json())
            for name in ("state.json", "traceback.txt"):  # of a run that failed before
                remove_file(folder / name)
            for name in item.stage.scratch:
                remove_tree(folder / name)
            if item.is_again:
                exchange(item.folder)
    if failures:
        raise failures[0]


def _outcomes(
    items: Sequence[StagePlan], folders: Sequence[Path], inputs: dict[str, Path], progress: Progress, *,
    retry_failed: bool,
) -> list[dict[str, Any] | DecantError]:  # fmt: skip
    """The metrics of each item, or why it has none."""
    module = importlib.import_module(items[0].stage.module)
    options: dict[str, Any] = {"retry_failed": True} if retry_failed and items[0].stage.folder == "stores" else {}
    if items[0].teacher is not None:  # a stage that trains imports no teachers: it is told whom to ask
        settings = with_absolute_paths(items[0].teacher).to_json()
        options["live"] = {"entry": _LIVE_TEACHERS, "settings": settings}
    if len(items) == 1:
        return [module.run(items[0].settings, inputs, folders[0], progress, **options)]
    stores = [(item.settings, folder) for item, folder in zip(items, folders, strict=True)]
    outcomes: list[dict[str, Any] | DecantError] = module.run_together(stores, inputs, progress, **options)
    return outcomes


def _result(item: StagePlan, folder: Path, metrics: dict[str, Any], seconds: float) -> StageResult:
    return StageResult(
        stage=item.stage.name,
        fingerprint=item.fingerprint,
        inputs=item.inputs,
        config=item.settings.identity(),
        metrics=metrics | {"outputs": digest_outputs(folder, item.stage.outputs)},
        seconds=seconds,
        command=provenance.command_line(),
        code_version=provenance.code_version(),
        machine=provenance.machine(),
    )


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
