"""Progress of a stage: a bar on a terminal, a plain line now and then in a log file."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from storage.stage import Progress as ProgressContract

LOG_SECONDS = 15.0
"""Between two lines where nobody watches a bar."""
PATIENCE_SECONDS = 1.0
"""What takes less than that needs no display."""


class _Bar:
    """On a terminal."""

    def __init__(self, name: str, console: Console) -> None:
        self.name, self.console = name, console
        self.bar = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"), TextColumn("{task.fields[facts]}"), TimeElapsedColumn(),
            TextColumn("eta"), TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self.task = self.bar.add_task(name, total=None, rate="", facts="")
        self.unit, self.first, self.began = "", 0, time.monotonic()

    def start(self, total: int, unit: str, done: int = 0) -> None:
        self.unit, self.first, self.began = unit, done, time.monotonic()
        self.bar.reset(self.task, total=total, completed=done, rate="", facts="")

    def advance(self, amount: int, **facts: object) -> None:
        done = self.bar.tasks[0].completed + amount - self.first
        rate = done / max(1e-9, time.monotonic() - self.began)
        self.bar.update(self.task, advance=amount, rate=_rate(rate, self.unit), facts=_facts(facts))

    def say(self, message: str) -> None:
        self.console.print(f"  {message}", highlight=False)


class _Lines:
    """In a log file: the first step, the last one, and one line every few seconds."""

    def __init__(self, name: str, console: Console) -> None:
        self.name, self.console = name, console
        self.total = self.done = self.first = 0
        self.unit, self.began, self.last = "", time.monotonic(), -math.inf

    def start(self, total: int, unit: str, done: int = 0) -> None:
        self.total, self.unit, self.done, self.first = total, unit, done, done
        self.began, self.last = time.monotonic(), -math.inf

    def advance(self, amount: int, **facts: object) -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.last < LOG_SECONDS and self.done < self.total:
            return
        self.last = now
        rate = (self.done - self.first) / max(1e-9, now - self.began)
        left = (self.total - self.done) / rate if rate else 0
        counted = f"{self.name}: {self.done:,}/{self.total:,} {self.unit}"
        text = f"{counted}  {_rate(rate, self.unit)}  {_facts(facts)}  eta {_clock(left)}"
        self.console.print(text, highlight=False, soft_wrap=True)

    def say(self, message: str) -> None:
        self.console.print(f"  {message}", highlight=False, soft_wrap=True)


class _Late:
    """Shows nothing until the work has lasted for a while."""

    def __init__(self, open_display: Callable[[], ProgressContract]) -> None:
        self.open_display = open_display
        self.display: ProgressContract | None = None
        self.total = self.done = 0
        self.unit, self.began = "", time.monotonic()

    def start(self, total: int, unit: str, done: int = 0) -> None:
        self.total, self.unit, self.done, self.began = total, unit, done, time.monotonic()
        if self.display:
            self.display.start(total, unit, done)

    def advance(self, amount: int, **facts: object) -> None:
        if self.display is None:
            self.done += amount
            if time.monotonic() - self.began < PATIENCE_SECONDS:
                return
            self.display = self.open_display()
            self.display.start(self.total, self.unit, self.done)
        else:
            self.display.advance(amount, **facts)

    def say(self, message: str) -> None:
        self.display = self.display or self.open_display()
        self.display.say(message)


@contextlib.contextmanager
def show_when_slow(name: str, console: Console) -> Iterator[ProgressContract]:
    """A display, for the length of the block, that appears when the work takes longer than a second."""
    with contextlib.ExitStack() as stack:
        yield _Late(lambda: stack.enter_context(show_progress(name, console)))


@contextlib.contextmanager
def show_progress(name: str, console: Console) -> Iterator[ProgressContract]:
    """The display of one stage, for the length of the block."""
    if not (console.is_terminal and sys.stdout.isatty()):
        yield _Lines(name, console)
        return
    display = _Bar(name, console)
    with display.bar:
        yield display


def _rate(per_second: float, unit: str) -> str:
    return f"{per_second:,.1f} {unit}/s" if per_second < 100 else f"{per_second:,.0f} {unit}/s"


def _facts(facts: dict[str, object]) -> str:
    return "  ".join(f"{name} {value}" for name, value in facts.items())


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"
