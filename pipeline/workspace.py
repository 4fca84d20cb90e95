"""What lies where in a work folder.

runs/current.json            the settings of the last command; the next one starts from them
runs/data/<name>-<id>.bin    image lists
runs/stores/<teacher>-<id>/  one folder a stage's result; <id> begins its fingerprint
runs/students/  runs/finetune/  runs/evaluate/  runs/reports/
runs/report.html             the newest report
runs/cache/                  digests of images; may be deleted
"""

import contextlib
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

from extract.events import LOG_SUFFIX, events_path
from pipeline.stages import Stage, plain_name
from storage.atomic import nearest_existing, read_json, read_regular, remove_tree, write_json
from storage.errors import ConfigError, DamagedError
from storage.fingerprint import digest_file, short
from storage.schema import Schema
from storage.stage import StageResult
from storage.verify import STORE, check_structure

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
        """A result's folder. Teachers that are named by a path or a library have slashes and colons in their names."""
        return self.root / stage.folder / f"{plain_name(label)}-{short(fingerprint)}"

    def data_path(self, location: str, fingerprint: str) -> Path:
        return self.root / "data" / f"{Path(location).name or 'data'}-{short(fingerprint)}.bin"

    @property
    def cache_dir(self) -> Path:
        return self.root / "cache"

    @property
    def current_path(self) -> Path:
        return self.root / "current.json"

    def results(self, stage: Stage) -> list[tuple[Path, StageResult]]:
        """All finished results of a stage, newest first."""
        paths = sorted((self.root / stage.folder).glob("*/result.json"), key=os.path.getmtime, reverse=True)
        found = [(path.parent, read_result(path.parent)) for path in paths if path.parent.suffix not in _EXCHANGED]
        return [(folder, result) for folder, result in found if result is not None and result.stage == stage.name]

    def stores(self) -> list[Path]:
        """All stores, finished or not, also those that have lost a part."""
        found = {path.parent for name in ("plan.json", "manifest.json") for path in self.root.glob(f"stores/*/{name}")}
        return sorted(folder for folder in found if folder.suffix not in _EXCHANGED)

    def unfinished_stores(self) -> list[Path]:
        """Stores that something was written into, or that are made again, and that have no result yet."""
        logged = {path.name.removesuffix(LOG_SUFFIX) for path in self.root.glob(f"stores/*{LOG_SUFFIX}")}
        folders = sorted(self.root / "stores" / name for name in logged)
        return [folder for folder in folders if folder.is_dir() and read_result(folder) is None]


def open_workspace(root: Path) -> Workspace:
    """A work folder, which need not exist yet.

    Raises:
        ConfigError: there is something else in its place.
    """
    found = nearest_existing(root)
    if not found.is_dir():
        raise ConfigError(f"the work folder {root} cannot be made: {found} is no folder; choose another with --work")
    return Workspace(root)


def read_result(folder: Path) -> StageResult | None:
    """The result of a finished stage; None when it is not finished, or its result cannot be read."""
    path = folder / "result.json"
    try:
        return StageResult.from_file(path, read_regular(path))
    except (FileNotFoundError, DamagedError):
        return None


def read_state(folder: Path) -> RunState | None:
    path = folder / "state.json"
    try:
        return RunState.from_file(path, read_regular(path))
    except (FileNotFoundError, DamagedError):
        return None


def write_state(folder: Path, state: State, message: str = "") -> None:
    write_json(folder / "state.json", RunState(state=state, message=message, pid=os.getpid()).to_json())


def what_became(folder: Path) -> str:
    """Why a stage's folder holds no result."""
    if (folder / "result.json").exists():
        return "its result.json is damaged"
    state = read_state(folder)
    if state is None or state.state == "running":
        return "was stopped from outside last time"
    return "was interrupted last time" if state.state == "interrupted" else f"failed last time: {state.message}"


def digest_outputs(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    return {name: digest_file(folder / name) for name in names if (folder / name).exists()}


def find_damage(stage: Stage, folder: Path, result: StageResult) -> str:
    """What a finished stage has lost since; empty when nothing. Of a store only sizes are looked at: its contents are
    checked when they are read."""
    for name, digest in result.metrics.get("outputs", {}).items():
        path = folder / name
        if not path.exists() or digest_file(path) != digest:
            return f"{name} is {'damaged' if path.exists() else 'gone'}; it is made again"
    return _find_store_damage(folder) if stage.folder == "stores" else ""


def _find_store_damage(folder: Path) -> str:
    if not (folder / "manifest.json").exists():
        return "the store's manifest is gone; only that is made again"
    structure = check_structure(folder)
    for damage in structure.damage:
        if damage.shard == STORE:
            return f"the store's {damage.name} is {damage.found.split(':')[0]}; only that is made again"
    lost = sorted({damage.shard for damage in structure.damage})
    found = f"{len(lost)} of {len(lost) + len(structure.shards)} shards are damaged or gone"
    return f"{found} (first {lost[0]}); only that is made again" if lost else ""


def sweep_private(folder: Path) -> None:
    """Remove what killed writers left. Only while holding the folder's lock."""
    for private in folder.rglob(".*.partial"):
        private.unlink(missing_ok=True)


_EXCHANGED = (".again", ".old")


def again_folder(folder: Path) -> Path:
    """Where a stage that has a result is run again; the older one stays until the new one is whole."""
    return folder.with_name(f"{folder.name}.again")


def exchange(folder: Path) -> None:
    """Put the finished `again_folder` in the place of the older one."""
    aside = _aside(folder)
    remove_tree(aside)
    with contextlib.suppress(FileNotFoundError):
        os.replace(events_path(again_folder(folder)), events_path(folder))
    os.rename(folder, aside)
    finish_exchange(folder)


def finish_exchange(folder: Path) -> None:
    """The second half of `exchange`, also of one that was killed in between; otherwise nothing."""
    aside = _aside(folder)
    if not aside.exists():
        return
    if not folder.exists():
        with contextlib.suppress(FileNotFoundError):  # another command did it a moment ago
            os.rename(again_folder(folder), folder)
    remove_tree(aside)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def load_current(workspace: Workspace) -> dict[str, Any] | None:
    """The settings of the last command in this work folder."""
    if not workspace.current_path.exists():
        return None
    values = read_json(workspace.current_path)
    return values if isinstance(values, dict) else None
