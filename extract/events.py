"""What happens to a store while it is filled, as JSON lines in a file beside it; `status` reads their end.

Beside, not inside: a store's own bytes do not depend on how often its extraction was interrupted.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from storage.errors import first_line

_LONGEST_TEXT = 500
_LONGEST_LINE_BYTES = 1 << 16
TAIL_BYTES = 1 << 20
"""Of a log that a reader looks at: the end of it."""


LOG_SUFFIX = ".events.jsonl"


def events_path(store: Path) -> Path:
    return store.with_name(f"{store.name}{LOG_SUFFIX}")


class Event(NamedTuple):
    time: str
    """UTC, ISO 8601; for people. Nothing is decided by it."""
    run_seconds: float
    """Since the run began, by a clock that nobody sets."""
    run: str
    """Which run says so: `host:pid:number`."""
    kind: str
    facts: dict[str, Any]


class EventLog:
    """Appends events; several processes may append to the same file, a line each time, and threads may share one. An
    event that cannot be written, for instance on a full disk, is lost and counted: it never stops a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.began = time.monotonic()
        self.run = f"{socket.gethostname()}:{os.getpid()}:{time.time_ns() // 1_000_000:x}"
        self.num_lost = 0
        self.why_lost = ""

    def write(self, kind: str, **facts: object) -> None:
        ours: dict[str, object] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "run_seconds": round(time.monotonic() - self.began, 3),
            "run": self.run,
            "kind": kind,
        }
        event = ours | {name: _short(value) for name, value in facts.items()} | ours
        try:
            self._append(json.dumps(event, default=str).encode() + b"\n")
        except OSError as error:
            self.num_lost += 1
            self.why_lost = first_line(error)

    def _append(self, line: bytes) -> None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        try:
            if not _ends_a_line(descriptor):  # a full disk took half of one
                line = b"\n" + line
            if os.write(descriptor, line) != len(line):
                raise OSError("only a part was written")
        finally:
            os.close(descriptor)


def _ends_a_line(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size == 0 or os.pread(descriptor, 1, size - 1) == b"\n"


def _short(value: object) -> object:
    if isinstance(value, str) and len(value) > _LONGEST_TEXT:
        return value[:_LONGEST_TEXT] + "..."
    return value


def read_tail(path: Path, num_bytes: int = TAIL_BYTES) -> list[Event]:
    """The last events of a log, oldest first. Lines that are no events, such as a torn one, are passed over; a log that
    is not there or cannot be read has none."""
    if not path.is_file():  # a pipe would be waited for
        return []
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - num_bytes))
            data = file.read(num_bytes)
    except OSError:
        return []
    lines = data.split(b"\n")
    return list(_parse(lines[1:] if size > num_bytes else lines))


def _parse(lines: list[bytes]) -> Iterator[Event]:
    for line in lines:
        if not line.startswith(b"{") or len(line) > _LONGEST_LINE_BYTES:
            continue
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            facts = json.loads(line)
            time_, seconds, run, kind = (facts.pop(name) for name in ("time", "run_seconds", "run", "kind"))
            if isinstance(time_, str) and isinstance(run, str) and isinstance(kind, str):
                yield Event(time_, float(seconds), run, kind, facts)
