"""How much memory this process may still take."""

import os
from pathlib import Path

_MEMORY_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Limit and usage of a control group, of version 2 and 1."""


def free_memory_bytes(meminfo: Path = Path("/proc/meminfo"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """What the system could give without swapping, the page cache counted as free; less where a container allows less.

    Args:
        meminfo: the system's own account (Linux).
        groups: where control groups are mounted; inside a container it is the container's own.
    """
    room = _available_bytes(meminfo)
    for folder in (groups, groups / "memory"):
        for limit_name, usage_name in _MEMORY_FILES:
            limit, usage = _number(folder / limit_name), _number(folder / usage_name)
            if limit is not None and usage is not None:
                room = min(room, max(0, limit - usage + _reclaimable_bytes(folder)))
    return room


def _available_bytes(meminfo: Path) -> int:
    try:
        for line in meminfo.read_text().splitlines():
            name, _, rest = line.partition(":")
            if name == "MemAvailable":
                return int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # without the page cache, so too little


def _reclaimable_bytes(folder: Path) -> int:
    """The group's page cache, which its usage includes."""
    try:
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(fields.get("inactive_file", fields.get("total_inactive_file", 0)))
    except (OSError, ValueError):
        return 0


def _number(path: Path) -> int | None:
    """None where there is no such file, or no limit (`max`)."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
