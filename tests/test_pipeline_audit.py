"""The command `audit`: every store of the work folder, what it says, and when it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.audit import version_changes

Decant = Callable[..., Any]


def test_a_finished_run_passes(decant: Decant, copy_run: tuple[Path, Path]) -> None:
    outcome = decant("audit", "--work", copy_run[1], "--n", "4")
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("audit: 4 random records are as the teacher says: error of whitened values at most") == 2
    assert outcome.out.count("made with the versions that are installed here") == 2


def test_versions_that_differ_are_named(decant: Decant, copy_run: tuple[Path, Path]) -> None:
    for path in (copy_run[1] / "stores").glob("*/result.json"):
        result = json.loads(path.read_text())
        result["machine"]["libraries"]["torch"] = "1.0.0"
        path.write_text(json.dumps(result))
    outcome = decant("audit", "--work", copy_run[1], "--n", "2")
    assert outcome.code == 0
    assert "versions that differ: torch 1.0.0 then, 2." in outcome.out


def test_another_teacher_in_its_place_is_refused(decant: Decant, copy_run: tuple[Path, Path], tmp_path: Path) -> None:
    [store] = (path for path in (copy_run[1] / "stores").iterdir() if path.is_dir() and "eval" not in path.name)
    result = json.loads((store / "result.json").read_text())
    result["config"]["teacher"] = "toy-large"
    (store / "result.json").write_text(json.dumps(result))
    outcome = decant("audit", store, "--work", copy_run[1])
    assert outcome.code == 2
    assert outcome.err.count("\n") == 2


def test_code_that_a_strangers_store_names_is_not_run(
    decant: Decant, copy_run: tuple[Path, Path], tmp_path: Path
) -> None:
    [store] = (path for path in (copy_run[1] / "stores").iterdir() if path.is_dir() and "eval" not in path.name)
    stranger = store.rename(tmp_path / "stranger")
    file = tmp_path / "theirs.py"
    file.write_text("import pathlib; pathlib.Path(__file__).with_suffix('.ran').touch()\n")
    result = json.loads((stranger / "result.json").read_text())
    result["config"]["teacher"] = str(file)
    (stranger / "result.json").write_text(json.dumps(result))
    outcome = decant("audit", stranger, "--work", copy_run[1])
    assert outcome.code == 2
    assert not file.with_suffix(".ran").exists()


@pytest.mark.parametrize("location", ["s3://bucket/store", "https://host/store"])
def test_a_url_is_refused(decant: Decant, location: str) -> None:
    outcome = decant("audit", location)
    assert outcome.code == 2
    assert "is a URL" in outcome.err


def test_nothing_to_audit_is_said(decant: Decant, tmp_path: Path) -> None:
    assert "no store in" in decant("audit", "--work", tmp_path / "empty").out


def test_changes_of_the_machine_are_told() -> None:
    then = {"cpu": "A", "python": "3.11.1", "libraries": {"torch": "2.1", "timm": "1"}}
    assert list(version_changes(then, then)) == ["made with the versions that are installed here"]
    now = {"cpu": "B", "python": "3.12.0", "libraries": {"torch": "2.2", "timm": "1"}}
    assert list(version_changes(then, now)) == [
        "versions that differ: torch 2.1 then, 2.2 now; python 3.11.1 then, 3.12.0 now; cpu A then, B now"
    ]
    assert list(version_changes({}, now)) == ["nothing tells with which versions it was made (no result.json)"]
