"""Progress and stops between the command and the processes that it started, by files in the run's folder: they reach
every process wherever it runs, and outlive any of them."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from storage.stage import Progress, StopRequest

_SECONDS = 0.2
"""Between two reports."""


class FileProgress:
    """Writes what it is told; `Follower` reads it."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", buffering=1)
        self.pending, self.written = 0, 0.0
        self.facts: dict[str, object] = {}

    def start(self, total: int, unit: str, done: int = 0) -> None:
        self.written = time.monotonic()  # a first step that arrived together with this would seem to take no time
        self._write({"start": [total, unit, done]})

    def advance(self, amount: int, **facts: object) -> None:
        self.pending += amount
        self.facts = facts
        if time.monotonic() - self.written > _SECONDS:
            self.flush()

    def say(self, message: str) -> None:
        self._write({"say": message})

    def close(self) -> None:
        self.flush()
        self.file.close()

    def flush(self) -> None:
        if self.pending:
            self._write({"advance": self.pending, "facts": self.facts})
        self.pending, self.written = 0, time.monotonic()

    def _write(self, event: dict[str, Any]) -> None:
        self.file.write(json.dumps(event) + "\n")


class Follower:
    """Passes on what a `FileProgress` wrote since it was last asked."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self.path, self.progress = path, progress
        self.file: IO[str] | None = None
        self.rest = ""

    def follow(self) -> None:
        for event in self._events():
            if "start" in event:
                self.progress.start(*event["start"])
            elif "advance" in event:
                self.progress.advance(event["advance"], **event["facts"])
            else:
                self.progress.say(event["say"])

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def _events(self) -> Iterator[dict[str, Any]]:
        if self.file is None:
            if not self.path.exists():
                return
            self.file = self.path.open()
        *lines, self.rest = (self.rest + self.file.read()).split("\n")
        for line in lines:
            yield json.loads(line)


class FileStop(StopRequest):
    """Set by a file, and by signals as any other."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def __bool__(self) -> bool:
        if not self.signal_name and self.path.exists():
            self.signal_name = self.path.read_text() or "SIGTERM"
        return super().__bool__()
