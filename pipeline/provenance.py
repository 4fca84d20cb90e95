"""Who made a result: the command, the code's version, the machine."""

import os
import platform
import shlex
import subprocess
import sys
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "torchvision", "timm", "open_clip_torch", "zarr", "numpy", "pillow", "ray")
"""Those whose versions can change numbers."""


def command_line() -> str:
    """The command as it can be given again."""
    name = "decant" if Path(sys.argv[0]).name == "decant" else "python -m pipeline"
    return " ".join([name, *map(shlex.quote, sys.argv[1:])])


@lru_cache(maxsize=1)
def code_version() -> str:
    """The commit of the checkout, with a mark when it was changed; else the installed version."""
    root = Path(__file__).resolve().parent.parent
    try:
        text = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
        if text.returncode == 0 and (root / ".git").exists():
            return text.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        pass
    return version("decant-fd")


def version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, Any]:
    """What a number depends on besides code and settings."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
