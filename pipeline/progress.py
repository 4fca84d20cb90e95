"""Progress of a stage: a bar on a terminal, a plain line now and then in a log file."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from storage.pace import Pace
from storage.stage import Progress as ProgressContract

LOG_SECONDS = 15.0
"""Between two lines where nobody watches a bar."""
PATIENCE_SECONDS = 1.0
"""What takes less than that needs no display."""


class _Bar:
    """On a terminal."""

    def __init__(self, name: str, console: Console) -> None:
        self.name, self.console = name, console
        whole = Column(no_wrap=True)  # on a narrow terminal the facts give way, not the count
        self.bar = Progress(
            TextColumn("[bold]{task.description}", table_column=whole), BarColumn(bar_width=12),
            MofNCompleteColumn(table_column=whole), TextColumn("{task.fields[rate]}", table_column=whole),
            TextColumn("{task.fields[facts]}", table_column=Column()), TimeElapsedColumn(table_column=whole),
            TextColumn("eta {task.fields[eta]}", table_column=whole), console=console,
        )  # fmt: skip
        self.task = self.bar.add_task(name, total=None, rate="", facts="", eta="-")
        self.unit, self.pace = "", Pace()

    def start(self, total: int, unit: str, done: int = 0) -> None:
        self.unit, self.pace = unit, Pace()
        self.bar.reset(self.task, total=total, completed=done, rate="", facts="", eta="-")

    def advance(self, amount: int, **facts: object) -> None:
        self.pace.add(amount)
        task = self.bar.tasks[0]
        left = (task.total or 0) - task.completed - amount
        rate, eta = _rate(self.pace.per_second(), self.unit), clock(self.pace.seconds_for(left))
        self.bar.update(self.task, advance=amount, rate=rate, facts=_facts(facts), eta=eta)

    def say(self, message: str) -> None:
        self.console.print(f"  {message}", highlight=False)


class _Lines:
    """In a log file: the first step, the last one, and one line every few seconds."""

    def __init__(self, name: str, console: Console) -> None:
        self.name, self.console = name, console
        self.total = self.done = 0
        self.unit, self.pace, self.last = "", Pace(), -math.inf

    def start(self, total: int, unit: str, done: int = 0) -> None:
        self.total, self.unit, self.done = total, unit, done
        self.pace, self.last = Pace(), -math.inf

    def advance(self, amount: int, **facts: object) -> None:
        self.done += amount
        self.pace.add(amount)
        now = time.monotonic()
        if now - self.last < LOG_SECONDS and self.done < self.total:
            return
        self.last = now
        counted = f"{self.name}: {self.done:,}/{self.total:,} {self.unit}"
        rate, eta = _rate(self.pace.per_second(), self.unit), clock(self.pace.seconds_for(self.total - self.done))
        text = f"{counted}  {rate}  {_facts(facts)}  eta {eta}"
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


def clock(seconds: float | None) -> str:
    """`1:39`, `2:01:39`; `-` where nothing tells."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
