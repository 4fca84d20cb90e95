"""Where a training's curves go: a file of JSON lines always, and the trackers that are asked for."""

import contextlib
import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from storage.atomic import disk_errors, make_folder, read_regular, write_file
from storage.errors import ConfigError, DamagedError

METRICS_FILE = "metrics.jsonl"
"""One line for each point: `step`, `loss` (mean since the point before), `lr`, `grad_norm`, ..."""
_EXTRAS = {"wandb": "wandb", "trackio": "trackio", "tensorboard": "tensorboard"}


class Tracker(Protocol):
    """Something that takes points of curves."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


def open_trackers(
    names: Sequence[str], out_dir: Path, *, run: str, settings: Mapping[str, Any], start: int
) -> list[Tracker]:
    """The file and the named trackers, going on at a step.

    Args:
        run: identifies the run, so that a tracker continues its curves after a resume.
        start: step that a resumed run goes on from; later points are of a run that was cut off, and are dropped.

    Raises:
        ConfigError: a tracker is not installed.
        DiskError: the folder cannot be written to, or something else is in a file's place.
    """
    trackers: list[Tracker] = [_JsonLines(out_dir / METRICS_FILE, start)]
    for name in names:
        try:
            importlib.import_module(_EXTRAS[name])
        except ImportError as error:
            raise ConfigError(
                f"distill.run.trackers names {name}, which cannot be imported ({error}); pip install {_EXTRAS[name]}, "
                "or leave it out"
            ) from error
        trackers.append(_OPENERS[name](out_dir, run, settings, start))
    return trackers


def close_all(trackers: Iterable[Tracker]) -> None:
    for tracker in trackers:
        tracker.close()


class _JsonLines:
    def __init__(self, path: Path, start: int) -> None:
        kept = [line for line in _whole_lines(path) if line["step"] <= start] if start else []
        write_file(path, "".join(map(_as_line, kept)).encode())
        self.path, self.file = path, path.open("a", buffering=1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        with disk_errors(self.path):
            self.file.write(_as_line({"step": step} | dict(values)))

    def close(self) -> None:
        self.file.close()


def _as_line(point: Mapping[str, Any]) -> str:
    return json.dumps(point, allow_nan=False) + "\n"


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Its lines as far as they are whole: a kill may have cut the last one. None of what is no such file."""
    lines = []
    with contextlib.suppress(DamagedError, OSError, ValueError):
        for text in read_regular(path).decode().splitlines():
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


class _TensorBoard:
    def __init__(self, out_dir: Path, run: str, settings: Mapping[str, Any], start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        make_folder(out_dir / "tensorboard")
        self.writer = SummaryWriter(str(out_dir / "tensorboard"), purge_step=start + 1 if start else None)  # type: ignore[no-untyped-call]
        self.writer.add_text("settings", f"```\n{json.dumps(settings, indent=1)}\n```", start)  # type: ignore[no-untyped-call]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"train/{name}", value, step)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self.writer.close()  # type: ignore[no-untyped-call]


class _Wandb:
    """wandb and trackio, which takes the same calls."""

    def __init__(self, module: str, run: str, settings: Mapping[str, Any], **options: Any) -> None:
        self.library = importlib.import_module(module)
        self.library.init(project="decant", name=run, config=dict(settings), resume="allow", **options)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.library.log(dict(values), step=step)

    def close(self) -> None:
        self.library.finish()


_OPENERS: Mapping[str, Any] = {
    "tensorboard": _TensorBoard,
    "wandb": lambda out_dir, run, settings, start: _Wandb("wandb", run, settings, id=run, dir=str(out_dir)),
    "trackio": lambda out_dir, run, settings, start: _Wandb("trackio", run, settings),
}
