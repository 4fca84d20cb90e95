"""Contenders take turns, round after round, and each one's best round counts: a noisy neighbour then slows all of them,
or none, and does not decide a ratio."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median

from tests.bench.results import Role, Row

Clock = Callable[[], float]

cpu_seconds: Clock = time.process_time
"""User and system time of this process, all its threads."""
wall_seconds: Clock = time.perf_counter


@dataclass(frozen=True)
class Contender:
    """One way to do the work."""

    name: str
    role: Role
    run: Callable[[], object] | None
    """Does the work once; None where a package is missing."""
    prepare: Callable[[], object] = lambda: None
    """Called before each run, outside of the time."""
    share: float = 1.0
    """How much of the work one run does: slow peers do a part, and their seconds are scaled."""
    every: int = 1
    """Takes part in each such round only, where it is slow."""
    target: float | None = None
    """The ratio to the limit that is aimed at."""
    note: str = ""


def race(contenders: Sequence[Contender], *, rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds that the whole work takes each contender, by round. The first round, which is not kept, warms up."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for number in range(rounds + 1):
        for contender in contenders:
            if contender.run is None or number % contender.every:
                continue
            contender.prepare()
            started = clock()
            contender.run()
            if number > 0:
                seconds[contender.name].append((clock() - started) / contender.share)
    return seconds


def speed_rows(
    contenders: Sequence[Contender], seconds: dict[str, list[float]], *, gigabytes: float, unit: str,
    by_round: bool = False,
) -> tuple[Row, ...]:  # fmt: skip
    """Speeds of the best rounds, and ratios to the limit that stands above each contender in the list.

    Args:
        by_round: the ratio is the median of those within each round, for what a disk decides, whose rate drifts;
            otherwise that of the best rounds.
    """
    rows, limit = [], contenders[0]
    for contender in contenders:
        if contender.role == "limit":
            limit = contender
        taken, ratio = seconds[contender.name], None
        if taken and by_round:
            same_rounds = seconds[limit.name][contender.every - 1 :: contender.every]
            ratio = median(least / own for least, own in zip(same_rounds, taken, strict=True))
        elif taken:
            ratio = min(seconds[limit.name]) / min(taken)
        rows.append(
            Row(
                what=contender.name, role=contender.role, unit=unit,
                value=gigabytes / min(taken) if taken else None, ratio=ratio,
                target=contender.target, limit=limit.name, rounds=tuple(taken),
                note=contender.note if taken else "not installed",
            )
        )  # fmt: skip
    return tuple(rows)


def cpu_seconds_with(workers: Iterable[int]) -> Clock:
    """A clock of this process and of others, by process id (Linux: a process's CPU clock has the id ~pid << 3 | 2)."""
    clocks = [(~pid << 3) | 2 for pid in workers]
    return lambda: time.process_time() + sum(time.clock_gettime(clock) for clock in clocks)


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this thread, and the threads that it starts, on one processor."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def is_installed(package: str) -> bool:
    return find_spec(package) is not None
