"""Who made a result: a command that can be given again, the code, the machine."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import provenance

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("program", "name"),
    [("/usr/bin/decant", "decant"), ("/x/pipeline/__main__.py", "python -m pipeline"), ("-c", "python -m pipeline")],
)
def test_a_command_can_be_given_again(monkeypatch: pytest.MonkeyPatch, program: str, name: str) -> None:
    arguments = ["run", "--data", "it's a folder/{0..9}.tar", "--set", 'finetune.starts=["distilled"]', "", "$HOME"]
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    command = provenance.command_line()
    assert command.startswith(f"{name} run --data ")
    assert shlex.split(command)[len(name.split()) :] == arguments


def test_code_version_is_the_commit_or_the_installed_version() -> None:
    found = provenance.code_version()
    asked = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if (ROOT / ".git").exists() and asked.returncode == 0:
        assert asked.stdout.strip() in found
    else:
        assert found == provenance.version("decant-fd")


def test_without_git_the_installed_version_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object, **options: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert provenance.code_version.__wrapped__() == provenance.version("decant-fd")


def test_versions() -> None:
    import numpy

    assert provenance.version("numpy") == numpy.__version__
    assert provenance.version("no-such-distribution") == "not installed"


def test_the_machine_names_what_numbers_depend_on() -> None:
    machine = provenance.machine()
    assert machine["cpu"]
    assert machine["cores"] >= 1
    assert machine["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "not installed" not in machine["libraries"].values()
    assert {"torch", "timm", "numpy", "pillow"} <= set(machine["libraries"])
