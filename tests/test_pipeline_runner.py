"""Run, resume or skip: what a second command does, and what it leaves alone."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune import run as finetuning
from pipeline.presets import load_preset
from pipeline.stages import STAGES, needs
from pipeline.workspace import Workspace, again_folder, read_result, read_state
from storage.errors import DecantError
from storage.lock import hold_lock
from storage.stage import StageResult

Decant = Callable[..., Any]
Run = tuple[Path, Path]
PARTS = ("stores", "students", "finetune", "evaluate", "reports")


def stamps(work: Path, *parts: str) -> dict[Path, tuple[int, bytes]]:
    """Time and bytes of every file below some parts of a work folder."""
    files = [path for part in parts for path in sorted((work / part).rglob("*")) if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def result_of(work: Path, stage: str) -> StageResult:
    """The only result of a stage."""
    [(_, result)] = Workspace(work).results(STAGES[stage])
    return result


def folder_of(work: Path, stage: str) -> Path:
    [(folder, _)] = Workspace(work).results(STAGES[stage])
    return folder


def test_a_second_run_skips_everything_and_says_why(decant: Decant, copy_run: Run) -> None:
    before = stamps(copy_run[1], *PARTS)
    outcome = decant("run", "--work", copy_run[1])
    assert outcome.code == 0
    for name in STAGES:
        assert f"{name} skip up to date (took " in outcome.out
    assert "student after feature distillation" in outcome.out, "the table is shown all the same"
    assert stamps(copy_run[1], *PARTS) == before


def test_two_students_share_one_store(decant: Decant, copy_run: Run) -> None:
    _, work = copy_run
    before = stamps(work, *PARTS)
    outcome = decant("distill", "--work", work, "--set", "distill.epochs=5", "--set", "distill.student.depth=1")
    assert outcome.code == 0
    assert "distill run distill.epochs: 4 -> 5; distill.student.depth: 2 -> 1" in outcome.out
    assert "distill: 10/10 steps" in outcome.out
    after = stamps(work, *PARTS)
    assert {path: after[path] for path in before} == before, "store and first student: not one byte, not one time"
    assert {path.parts[len(work.parts)] for path in set(after) - set(before)} == {"students"}
    students = Workspace(work).results(STAGES["distill"])
    assert len(students) == 2
    assert {result.inputs["extract"] for _, result in students} == {result_of(work, "extract").fingerprint}


def test_finetune_runs_finetune_alone_and_the_report_is_stale_then(decant: Decant, copy_run: Run) -> None:
    _, work = copy_run
    others = [part for part in PARTS if part != "finetune"]
    before, first = stamps(work, *others), result_of(work, "finetune")
    outcome = decant("finetune", "--work", work)
    assert outcome.code == 0
    assert "finetune run asked for by name" in outcome.out
    assert stamps(work, *others) == before
    again = result_of(work, "finetune")
    assert again.machine == first.machine
    assert [m["accuracy"] for m in again.metrics["members"]] == [m["accuracy"] for m in first.metrics["members"]]
    planned = decant("plan", "--work", work)
    assert "report run finetune has a newer result" in planned.out
    assert planned.out.count(" skip ") == 5
    assert decant("run", "--work", work).code == 0
    assert decant("plan", "--work", work).out.count(" skip ") == 6


def test_the_old_result_stays_until_the_new_one_is_whole(
    decant: Decant, copy_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, work = copy_run
    before = stamps(work, *PARTS)
    seen: list[bool] = []

    def fail(*args: object) -> None:
        seen.append(is_kept())
        raise DecantError("made to fail")

    def is_kept() -> bool:
        return all(path.exists() and path.read_bytes() == data for path, (_, data) in before.items())

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "train", fail)
        outcome = decant("finetune", "--work", work)
    assert (outcome.code, seen) == (1, [True])
    assert "error: made to fail" in outcome.err
    assert is_kept()
    assert decant("plan", "--work", work).out.count(" skip ") == 6, "nothing is stale: the old result holds"
    assert decant("finetune", "--work", work).code == 0
    assert not list(work.glob("*/*.again"))
    assert not list(work.glob("*/.*.old"))


def test_a_failed_stage_is_run_again_and_the_others_are_not(
    decant: Decant, copy_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, work = copy_run
    for part in ("finetune", "evaluate", "reports"):
        shutil.rmtree(work / part)
    before = stamps(work, "stores", "students")
    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "train", lambda *args: 1 / 0)
        failed = decant("run", "--preset", "smoke", "--data", images, "--work", work)
    assert failed.code == 1
    assert "bug: ZeroDivisionError: division by zero" in failed.err
    [folder] = (work / "finetune").iterdir()
    state = read_state(folder)
    assert state is not None
    assert (state.state, state.message) == ("failed", "ZeroDivisionError: division by zero")
    assert "1 / 0" in (folder / "traceback.txt").read_text()
    assert not (work / "evaluate").exists()
    again = decant("run", "--preset", "smoke", "--data", images, "--work", work)
    assert again.code == 0
    assert "finetune resume failed last time: ZeroDivisionError: division by zero" in again.out
    assert "distill skip" in again.out
    assert stamps(work, "stores", "students") == before
    assert read_state(folder) is None
    assert not (folder / "traceback.txt").exists()


@pytest.mark.parametrize("command", ["extract", "distill", "evaluate"])
def test_force_makes_the_same_bytes_again(
    decant: Decant, copy_run: Run, tree_bytes: Callable[[Path], dict[str, bytes]], command: str
) -> None:
    _, work = copy_run
    folder = folder_of(work, command)
    before, result, inode = tree_bytes(folder), result_of(work, command), folder.stat().st_ino
    outcome = decant(command, "--work", work, "--force")
    assert outcome.code == 0
    assert f"{command} run asked for by name" in outcome.out
    assert folder.stat().st_ino != inode
    assert tree_bytes(folder) == before
    assert result_of(work, command).fingerprint == result.fingerprint


def test_extract_and_distill_by_name_are_kept_without_force(decant: Decant, copy_run: Run) -> None:
    before = stamps(copy_run[1], *PARTS)
    for command in ("extract", "distill"):
        assert f"{command} skip up to date" in decant(command, "--work", copy_run[1]).out
    assert stamps(copy_run[1], *PARTS) == before


def test_missing_upstream_names_the_command(decant: Decant, make_images: Decant, tmp_path: Path) -> None:
    work = tmp_path / "runs"
    for command, missing, first in (
        ("distill", "extract", "extract"), ("finetune", "extract", "extract"), ("report", "extract", "extract"),
    ):  # fmt: skip
        data = ("--data", tmp_path / "images") if (tmp_path / "images").exists() else ("--data", make_images())
        outcome = decant(command, "--preset", "smoke", *data, "--work", work)
        assert outcome.code == 2
        assert f"{command} needs {missing}, which is not done (not run before); run `make {first}` first" in outcome.err
        assert outcome.err.splitlines()[-1].startswith("then: decant ")
    assert not (work / "students").exists()


def test_a_result_tells_everything_about_itself(copy_run: Run) -> None:
    _, work = copy_run
    for name, stage in STAGES.items():
        folder = folder_of(work, name)
        text = (folder / "result.json").read_text()
        json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
        result = read_result(folder)
        assert result is not None
        assert (result.stage, folder.name[-10:]) == (name, result.fingerprint[:10])
        assert result.command
        assert result.code_version
        assert {"cpu", "cores", "system", "python", "libraries"} <= set(result.machine)
        assert result.machine["libraries"]["torch"][0].isdigit()
        needed = needs(stage, load_preset("smoke"))
        assert {*needed, *(["data"] if stage.data else [])} <= set(result.inputs)
        assert all(result.inputs[need] == result_of(work, need).fingerprint for need in needed)
        assert "run" not in result.config
        assert set(result.metrics["outputs"]) == set(stage.outputs)
        assert result.seconds >= 0
    metrics = result_of(work, "distill").metrics
    assert metrics["steps"] == 8
    assert metrics["history"][-1]["loss"] == metrics["final_loss"]
    assert result_of(work, "distill").config["epochs"] == 4


def test_an_exchange_that_was_killed_half_way_is_finished(
    decant: Decant, copy_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two renames there is neither the old folder nor the new one under its name."""
    _, work = copy_run
    folder, rename, calls = folder_of(work, "distill"), os.rename, []

    def killed(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise SystemExit(137)
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        assert decant("distill", "--work", work, "--force").code == 137
    assert not folder.exists()
    assert again_folder(folder).exists()
    assert "distill skip up to date" in decant("plan", "--work", work).out
    assert sorted(path.name for path in (work / "students").iterdir()) == [folder.name]


def test_a_second_command_at_work_is_left_alone(decant: Decant, copy_run: Run) -> None:
    """The lock is held as by another process: exit 4, and neither its state nor its result are touched."""
    _, work = copy_run
    folder = folder_of(work, "distill")
    (folder / "result.json").unlink()
    (folder / "state.json").write_text('{"state": "running", "message": "", "pid": 1}')
    with hold_lock(folder):
        outcome = decant("distill", "--work", work)
        assert outcome.code == 4
        assert f"{folder} is being written by process {os.getpid()} on" in outcome.err
        assert outcome.err.splitlines()[-1] == f"then: decant distill --work {work}"
        assert (folder / "state.json").read_text() == '{"state": "running", "message": "", "pid": 1}'
    assert decant("distill", "--work", work).code == 0


def test_status_lists_results_and_what_was_begun(decant: Decant, copy_run: Run, tmp_path: Path) -> None:
    _, work = copy_run
    folder = folder_of(work, "evaluate")
    shutil.copytree(folder_of(work, "distill"), again_folder(folder_of(work, "distill")))  # not yet exchanged
    (folder / "result.json").unlink()
    (folder / "state.json").write_text('{"state": "failed", "message": "no luck", "pid": 1}')
    outcome = decant("status", "--work", work)
    assert outcome.code == 0
    assert outcome.out.count("done in") == 5
    assert f"{folder} failed no luck" in outcome.out
    assert "nothing in" in decant("status", "--work", tmp_path / "nothing").out
