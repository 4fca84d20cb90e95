"""The exceptions a user can meet.

    DecantError                 exit code
    +-- ConfigError             2   an option, a name, a combination of settings
    +-- InputError              2   data or weights that are missing or unusable
    +-- DiskError               2   disk full, read-only, no permission
    +-- QuarantineError         3   finished, but some jobs were given up
    +-- StoreBusyError          4   another process is writing here
    +-- DamagedError            6   bytes on disk are not what was committed
    BadImageError                   one image cannot be used; caught, counted and listed by the stages

Every message says what was found, what was expected, where, and what to do.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

Row = TypeVar("Row")


class DecantError(Exception):
    """Base of everything that is reported as one line instead of a traceback."""

    exit_code = 1
    then = ""
    """The command to give next, where it is another one than the one that failed."""


class ConfigError(DecantError, ValueError):
    exit_code = 2


class InputError(DecantError):
    exit_code = 2


class DiskError(DecantError):
    exit_code = 2


class BadTokensError(InputError):
    """A teacher gives something for an image that cannot be stored. Another attempt gives the same."""


class OwnTeacherError(ConfigError):
    """A user's own teacher fails on a batch: perhaps on this one only."""


class QuarantineError(DecantError):
    exit_code = 3


class StoreBusyError(DecantError):
    exit_code = 4


class DamagedError(DecantError):
    exit_code = 6


class BadImageError(Exception):
    """One image cannot be decoded; `str(error)` is the reason."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that is not in a table; offers the nearest ones."""
    hint = did_you_mean(name, known) or f"known: {', '.join(sorted(known))}"
    return ConfigError(f"unknown {kind} {name!r}; {hint}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The question that offers the names nearest to one; empty where none is near."""
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else ""


def look_up(kind: str, name: str, table: Mapping[str, Row]) -> Row:
    """A row of a table by the name that a user gave.

    Raises:
        ConfigError: no such row; offers the nearest names.
    """
    if name not in table:
        raise unknown_name(kind, name, table)
    return table[name]


def first_line(error: BaseException) -> str:
    """What another library's error says, short enough to stand in ours; its class where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
