"""What a command shows: the plan before the work, the table after it."""

import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from extract.config import ExtractConfig
from extract.resolve import needed_view_bytes, resolve_teacher
from extract.teachers import TEACHERS
from pipeline.config import PipelineConfig
from pipeline.planning import Plan, StagePlan
from pipeline.stages import STAGES
from pipeline.store_status import status_lines, what_became_of_filling
from pipeline.tables import Row, findings, result_rows
from pipeline.teacher_table import teacher_lines
from pipeline.workspace import RunState, Workspace, read_result, read_state
from storage.atomic import nearest_existing
from storage.fingerprint import short
from storage.stage import StageResult

console = Console(highlight=False, markup=False, emoji=False)
"""Paths and messages are printed as they are: `[x]` in a folder's name is no markup."""


def show_plan(plan: Plan, stages: tuple[str, ...]) -> None:
    """One line a stage: what will be done, and why."""
    index = plan.images
    counts = {split: len(index.split(split)) for split in ("train", "eval")}
    where = plan.config.data.path or plan.config.distill.store
    console.print(
        f"data: {where}: {counts['train']:,} images to train on, {counts['eval']:,} held out, "
        f"{len(index.classes)} classes"
    )
    table = Table(box=None, pad_edge=False, show_header=False)
    for name in stages:
        several = plan.stores() if name == "extract" and plan.also else []
        for title, item in [(f"{name} {_teacher(item)}", item) for item in several] or [(name, plan.stages[name])]:
            style = {"skip": "dim", "run": "bold", "resume": "bold"}[item.action]
            table.add_row(title, item.action, item.reason, style=style)
    console.print(table)
    if "distill" in stages:
        _show_sources(plan.config)
    if "extract" in stages:
        _show_sizes(plan, counts["train"])


def _show_sources(config: PipelineConfig) -> None:
    """Which teachers a student learns from, where that is not plain."""
    first, learnt = config.extract.teacher, [other.name for other in config.also_learnt]
    if config.distill.online:
        console.print(
            f"distill asks the teacher {first} in every step (ONLINE=1, distill.online): it needs no store of it"
        )
    if learnt:
        console.print(f"students learn from {first}, {', '.join(learnt)}: a projector and a loss for each")
    elif config.also and not config.distill.online and config.distill.store is None:
        console.print(f"students are trained from the store of {first}, the first one named")


def _teacher(store: StagePlan) -> str:
    assert isinstance(store.settings, ExtractConfig)
    return store.settings.teacher


def _show_sizes(plan: Plan, images: int) -> None:
    """What the stores that are not there need, and what is free."""
    stores = [item for item in plan.stores() if item.action != "skip"]
    free_bytes = shutil.disk_usage(nearest_existing(plan.workspace.root)).free
    free = f"{free_bytes / 1e9:,.0f} GB are free"
    total, costs = 0, []
    for item in stores:
        cfg = item.settings
        assert isinstance(cfg, ExtractConfig)
        spec = resolve_teacher(cfg)
        each = needed_view_bytes(cfg)
        needed = images * cfg.views * each
        total += needed
        whose = f"{cfg.teacher}: " if plan.also else ""
        needs = f"{images:,} images x {cfg.views} views x {each / 1e3:,.0f} kB = {needed / 1e9:,.2f} GB"
        tail = "" if len(stores) > 1 else f"; {free}"
        console.print(f"store ({whose}{cfg.layout}, {cfg.encoding.kind}): {needs}{tail}")
        if spec.gflops and cfg.input_px is None and cfg.block is None:  # they were counted so
            petaflops = images * cfg.views * spec.gflops / 1e6
            costs.append(
                f"teacher ({spec.name}): {spec.million_parameters:,.0f} M parameters, {spec.gflops:,.0f} GFLOP a view, "
                f"{petaflops:,.3g} PFLOP in all"
            )
    if len(stores) > 1:
        console.print(f"stores together: {total / 1e9:,.2f} GB; {free}; the images are read once for all of them")
    if total > free_bytes:
        console.print(
            "this does not fit: choose another --work, fewer VIEWS, ENCODING=int8 or a smaller teacher",
            style="bold red",
        )
    for cost in costs:
        console.print(cost)


def show_results(plan: Plan, results: dict[str, StageResult]) -> None:
    """The table a run ends with, or the facts of the stages that ran."""
    for name, result in results.items():
        if name in ("extract", "distill"):
            console.print(f"{name}: {plan.stages[name].folder} ({short(result.fingerprint)})", soft_wrap=True)
        for item in plan.also.values() if name == "extract" else ():
            console.print(f"{name}: {item.folder} ({short(item.fingerprint)})", soft_wrap=True)
    rows = result_rows(results)
    if rows:
        console.print(_results_table(rows))
    for sentence in findings(results):
        console.print(sentence)
    if "report" in results:
        console.print(f"report: {plan.workspace.root / 'report.html'}")


def _results_table(rows: list[Row]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title, justify in (
        ("", "left"),
        ("accuracy %", "right"),
        ("n", "right"),
        ("seeds", "right"),
        ("seconds", "right"),
    ):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(row.name, row.accuracy_text, str(row.n), str(len(row.accuracies)), f"{row.seconds:,.0f}")
    return table


def show_status(workspace: Workspace, stores: tuple[str, ...] = ()) -> None:
    """Every finished result, every folder where something was begun, and how far stores are that are being filled; or
    only the latter, of named stores."""
    if stores:
        for store in map(Path, stores):
            for line in list(status_lines(store)) or [f"{store}: nothing tells that it was ever filled here"]:
                console.print(line, soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False)
    for title in ("stage", "folder", "state", "made by"):
        table.add_column(title, overflow="fold")
    for stage in STAGES.values():
        for folder, result in workspace.results(stage):
            table.add_row(stage.name, str(folder), f"done in {result.seconds:,.0f} s", result.command)
    for path in sorted(workspace.root.glob("*/*/state.json")):
        state = read_state(path.parent)
        if state is not None and read_result(path.parent) is None:  # a kill may come between the two files
            table.add_row("", str(path.parent), _what_became(path.parent, state), state.message)
    if table.row_count:
        console.print(table)
    else:
        console.print(
            f"nothing in {workspace.root} yet; start with `make demo`, or `make extract TEACHER=... DATA=...`"
        )
    for store in workspace.unfinished_stores():
        for line in status_lines(store):
            console.print(line, soft_wrap=True)


def _what_became(folder: Path, state: RunState) -> str:
    """A killed command could not write down that it was."""
    return (what_became_of_filling(folder) if state.state == "running" else "") or state.state


def show_teachers() -> None:
    """The teachers that have a row, and how others are named."""
    for line in teacher_lines(TEACHERS.values(), console.width if console.is_terminal else None):
        console.print(line, soft_wrap=True)
