"""How far the stores are that are being filled, from the ends of their event logs. Locks nothing and fails on nothing:
it is looked at while others write, and when something is wrong."""

import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from extract.events import Event, events_path, read_tail
from extract.watch import BEAT_SECONDS
from pipeline.progress import clock
from storage.errors import DecantError
from storage.quarantine import GivenUp, all_given_up

_SILENT_SECONDS = 6 * BEAT_SECONDS
"""Without a sign of life for so long, something is wrong."""
_LISTED = 3


class RunStatus(NamedTuple):
    """What the log of a store tells about one run that fills it."""

    host: str
    pid: int
    is_alive: bool | None
    """None for a process of another machine."""
    silent_seconds: float
    progress: dict[str, Any]
    """The facts of its last sign of life."""
    outcome: str
    """Empty until it has ended."""

    @property
    def headline(self) -> str:
        """`at work`, or what became of it."""
        if self.outcome:
            return self.outcome
        if self.is_alive is False:
            return "stopped from outside"
        if self.silent_seconds > _SILENT_SECONDS:
            return "silent" if self.is_alive else "seems dead"
        return "at work"

    @property
    def is_at_work(self) -> bool:
        """As far as can be told."""
        return self.headline in ("at work", "silent")


def runs_of(store: Path) -> list[RunStatus]:
    """The runs that the end of a store's log tells of, the newest last: those that have not ended, and the last one."""
    events: dict[str, list[Event]] = {}
    for event in read_tail(events_path(store)):
        events.setdefault(event.run, []).append(event)
    newest_last = sorted(events.values(), key=lambda told: told[-1].time)
    runs = [_run_status(told) for told in newest_last]
    return [run for run in runs[:-1] if run.is_at_work] + runs[-1:]


def _run_status(told: list[Event]) -> RunStatus:
    host, _, rest = told[-1].run.rpartition(":")[0].rpartition(":")
    pid = int(rest) if rest.isdecimal() else 0
    ended = next((str(event.facts.get("outcome")) for event in told if event.kind == "end"), "")
    states = [event.facts for event in told if event.kind in ("progress", "begin")]
    is_here = host == socket.gethostname()
    return RunStatus(
        host,
        pid,
        _is_alive(pid, told[0]) if is_here else None,
        _seconds_since(told[-1].time),
        states[-1] if states else {},
        ended,
    )


def _is_alive(pid: int, first: Event) -> bool:
    """Whether a process of this machine is there, and was before it said something: numbers are given again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        started_seconds_ago = float(Path("/proc/uptime").read_text().split()[0]) - (
            int(fields[19]) / os.sysconf("SC_CLK_TCK")
        )
        return fields[0] != "Z" and started_seconds_ago >= _seconds_since(first.time) - 2
    except (OSError, ValueError, IndexError):
        return False


def _seconds_since(time: str) -> float:
    """By the clocks of two machines, perhaps."""
    try:
        return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def what_became_of_filling(store: Path) -> str:
    """In two words, of the newest run; empty where nothing tells."""
    return "".join(_printable(run.headline) for run in runs_of(store)[-1:])


def status_lines(store: Path) -> Iterator[str]:
    """What there is to say about a store that is not whole."""
    runs = runs_of(store)
    for run in runs:
        yield f"{store}: {_printable(run.headline)}"
        yield from (f"  {line}" for line in _progress_lines(run))
    lost = _given_up(store)
    if lost:
        listed = "; ".join(
            f"shard {each.shard} after {each.attempts} attempts: {each.reason}" for each in lost[:_LISTED]
        )
        more = f"; and {len(lost) - _LISTED} more" if len(lost) > _LISTED else ""
        begin = "" if runs else f"{store}: "
        yield f"  {begin}{len(lost)} shards are given up: {_printable(listed)}{more}; --retry-failed tries them again"


def _given_up(store: Path) -> list[GivenUp]:
    try:
        return all_given_up(store)
    except (DecantError, OSError):
        return []


def _progress_lines(run: RunStatus) -> Iterator[str]:
    facts, whose = run.progress, f"process {run.pid} on {_printable(run.host)}"
    if facts:
        yield (
            f"{_count(facts, 'shards')}/{_count(facts, 'num_shards')} shards, "
            f"{_count(facts, 'images')}/{_count(facts, 'num_images')} images"
            + (f"  {_rates(facts)}" if run.is_at_work else "")
        )
    counted = [f"bad images {_count(facts, 'bad')}", f"shards given up {_count(facts, 'given_up')}"]
    if run.is_at_work:
        counted.insert(0, f"workers {_count(facts, 'workers')} ({_count(facts, 'workers_lost')} lost so far)")
    alive = {True: ", which is alive", False: ", which is gone", None: ""}[run.is_alive]
    yield f"{'  '.join(counted)}  last heard of {clock(run.silent_seconds)} ago from {whose}{alive}"
    if run.headline in ("stopped from outside", "seems dead", "interrupted"):
        yield "what is committed is kept; the command that filled it goes on where it was"


def _rates(facts: dict[str, Any]) -> str:
    eta, busy = _number(facts, "eta_seconds"), _number(facts, "busy")
    rates = [
        f"{_number(facts, 'images_per_second') or 0:,.1f} images/s",
        f"{_number(facts, 'mb_per_second') or 0:,.1f} MB/s",
        f"eta {clock(eta)}",
    ]
    if busy is not None:
        rates.append(f"{_printable(str(facts.get('busy_name', 'busy')))} {busy:.0%}")
    return "  ".join(rates)


def _count(facts: dict[str, Any], name: str) -> str:
    number = _number(facts, name)
    return "?" if number is None else f"{number:,.0f}"


def _number(facts: dict[str, Any], name: str) -> float | None:
    """A fact of a file that anybody may have written."""
    value = facts.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e18:
        return None
    return float(value)


def _printable(text: str) -> str:
    """Without what a terminal would take for a command."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
