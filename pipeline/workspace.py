"""What lies where in a work folder.

runs/current.json            the settings of the last command; the next one starts from them
runs/data/<name>-<id>.json   image lists
runs/stores/<teacher>-<id>/  one folder a stage's result; <id> begins its fingerprint
runs/students/  runs/finetune/  runs/evaluate/  runs/reports/
runs/report.html             the newest report
runs/cache/                  digests of images; may be deleted
"""

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.stages import Stage
from storage.atomic import read_json, remove_tree, write_json
from storage.errors import DamagedError
from storage.fingerprint import short
from storage.schema import Schema
from storage.stage import StageResult

State = Literal["running", "interrupted", "failed"]


class RunState(Schema):
    """`state.json`: what became of a stage that is not done."""

    state: State
    message: str = ""
    pid: int = 0


class Workspace(NamedTuple):
    """A work folder."""

    root: Path

    def stage_dir(self, stage: Stage, label: str, fingerprint: str) -> Path:
        return self.root / stage.folder / f"{label}-{short(fingerprint)}"

    def data_path(self, location: str, fingerprint: str) -> Path:
        return self.root / "data" / f"{Path(location).name or 'data'}-{short(fingerprint)}.json"

    @property
    def cache_dir(self) -> Path:
        return self.root / "cache"

    @property
    def current_path(self) -> Path:
        return self.root / "current.json"

    def results(self, stage: Stage) -> list[tuple[Path, StageResult]]:
        """All finished results of a stage, newest first."""
        paths = sorted((self.root / stage.folder).glob("*/result.json"), key=os.path.getmtime, reverse=True)
        found = [(path.parent, read_result(path.parent)) for path in paths]
        return [(folder, result) for folder, result in found if result is not None and result.stage == stage.name]


def read_result(folder: Path) -> StageResult | None:
    """The result of a finished stage; None when it is not finished, or its result cannot be read."""
    path = folder / "result.json"
    try:
        return StageResult.from_file(path, path.read_bytes())
    except (FileNotFoundError, DamagedError):
        return None


def read_state(folder: Path) -> RunState | None:
    path = folder / "state.json"
    try:
        return RunState.from_file(path, path.read_bytes())
    except (FileNotFoundError, DamagedError):
        return None


def write_state(folder: Path, state: State, message: str = "") -> None:
    write_json(folder / "state.json", RunState(state=state, message=message, pid=os.getpid()).to_json())


def replace_folder(new: Path, old: Path) -> None:
    """Put a finished folder in the place of an older one; the older one stays until the last moment."""
    aside = old.with_name(f".{old.name}.old")
    remove_tree(aside)
    if old.exists():
        os.rename(old, aside)
    os.rename(new, old)
    remove_tree(aside)


def load_current(workspace: Workspace) -> dict[str, Any] | None:
    """The settings of the last command in this work folder."""
    if not workspace.current_path.exists():
        return None
    values = read_json(workspace.current_path)
    return values if isinstance(values, dict) else None
