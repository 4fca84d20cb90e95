"""What a benchmark finds: sections of rows, as written to `bench.json`."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Role = Literal["limit", "ours", "peer", "reference"]
"""A reference is measured to explain the others; it competes with nobody."""


TIE = 1.02
"""Two that are nearer to each other than this are even: another run may order them otherwise."""


@dataclass(frozen=True)
class Row:
    """One measurement."""

    what: str
    role: Role
    value: float | None
    """In `unit`; None where a peer's package is not installed."""
    unit: str
    ratio: float | None = None
    """To the limit; None for what stands for itself, such as a time to open."""
    target: float | None = None
    """Of the ratio; of the value where there is no ratio."""
    limit: str = ""
    is_less_better: bool = False
    rounds: tuple[float, ...] = ()
    """Every round's seconds, in order."""
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        found = self.value if self.ratio is None else self.ratio
        if self.target is None or found is None:
            return None
        return found <= self.target if self.is_less_better else found >= self.target


@dataclass(frozen=True)
class Section:
    """Rows that were measured together."""

    title: str
    method: str
    """What was done, how often, on how much."""
    rows: tuple[Row, ...]

    def winning_peers(self) -> list[Row]:
        """Peers that are clearly ahead of everything of ours that has the same limit."""
        return [row for row in self.rows if row.role == "peer" and row.ratio is not None and self._wins(row)]

    def _wins(self, peer: Row) -> bool:
        ours = [
            row.ratio for row in self.rows if row.role == "ours" and row.limit == peer.limit and row.ratio is not None
        ]
        assert peer.ratio is not None
        if not ours:
            return False
        return peer.ratio * TIE < min(ours) if peer.is_less_better else peer.ratio > TIE * max(ours)


@dataclass(frozen=True)
class Report:
    """One run of the benchmark."""

    machine: dict[str, str]
    versions: dict[str, str]
    sections: tuple[Section, ...]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Report":
        value: dict[str, Any] = json.loads(path.read_text())
        sections = tuple(
            Section(section["title"], section["method"], tuple(map(_row, section["rows"])))
            for section in value["sections"]
        )
        return cls(value["machine"], value["versions"], sections)


def _row(value: dict[str, Any]) -> Row:
    return Row(**value | {"rounds": tuple(value["rounds"])})
