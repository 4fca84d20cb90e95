"""What every stage returns, and how it tells the outside how far it is."""

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from storage.schema import Schema


class StageResult(Schema):
    """What a finished stage wrote, as `result.json`; its presence means that the stage is done."""

    stage: str
    fingerprint: str
    """Of the stage's version, settings and inputs."""
    inputs: dict[str, str]
    """Upstream stage to its fingerprint."""
    config: dict[str, Any]
    metrics: dict[str, Any]
    """Measured in this run; plain JSON."""
    seconds: float
    """Wall clock of the run that finished it, in seconds."""
    command: str
    code_version: str
    machine: dict[str, Any]


class Progress(Protocol):
    """Where a stage reports its progress; the command line draws it, tests ignore it."""

    def start(self, total: int, unit: str, done: int = 0) -> None: ...
    def advance(self, amount: int, **facts: object) -> None: ...
    def say(self, message: str) -> None: ...


class SilentProgress:
    """Reports nothing."""

    def start(self, total: int, unit: str, done: int = 0) -> None: ...
    def advance(self, amount: int, **facts: object) -> None: ...
    def say(self, message: str) -> None: ...


class Interrupted(Exception):
    """A stage stopped at a safe point because it was asked to; everything up to there is kept."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, at a moment when there is nothing that should end first."""


class StopRequest:
    """Set by the first SIGINT or SIGTERM; long loops look at it between steps."""

    def __init__(self) -> None:
        self.signal_name = ""

    def __bool__(self) -> bool:
        return bool(self.signal_name)

    def check(self) -> None:
        """Raise `Interrupted` when a stop was asked for."""
        if self:
            raise Interrupted(self.signal_name)

    def agreed(self) -> None:
        """Raise `Interrupted` because somebody was asked to stop: this process, or another that works with it."""
        raise Interrupted(self.signal_name)


@contextlib.contextmanager
def stop_on_signals(request: StopRequest | None = None, *, second_ends: bool = True) -> Iterator[StopRequest]:
    """The first Ctrl-C or SIGTERM asks for a stop at the next safe point, the second stops at once.

    Args:
        second_ends: False for a process that may be told the same by several others: a further signal changes nothing.
    """
    request = StopRequest() if request is None else request
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number: int, frame: object) -> None:
        if request.signal_name and not second_ends:
            return
        if request.signal_name:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
        request.signal_name = signal.Signals(number).name

    previous: Mapping[int, Any] = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """SIGTERM is `Terminated` for the length of the block, wherever no `stop_on_signals` asks for a safe point."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
