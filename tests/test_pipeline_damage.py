"""Files that are lost or changed after a stage was done: noticed, named, and repaired by the command that is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.stages import STAGES
from tests.fixtures.runs import folder_of
from tests.fixtures.whole_store import flip

Decant = Callable[..., Any]
Run = tuple[Path, Path]
Read = Callable[[Path], dict[str, object]]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [remove, cut])
@pytest.mark.parametrize("name", ["tokens/c/2/0/0", "views/c/2/0", "receipts/00002.json"])
def test_only_the_lost_shard_is_extracted_again(
    decant: Decant, copy_run: Run, tree_bytes: Read, name: str, damage: Callable[[Path], None]
) -> None:
    _, work = copy_run
    store = folder_of(work, "extract")
    before = tree_bytes(store)
    stamps = {path: path.stat().st_mtime_ns for path in (store / "tokens" / "c").rglob("0") if path.is_file()}
    damage(store / name)
    blocked = decant("distill", "--work", work)
    assert blocked.code == 2
    assert "distill needs extract, which is not done (1 of 4 shards are damaged or gone (first 2)" in blocked.err
    outcome = decant("extract", "--work", work)
    assert outcome.code == 0
    assert "extract resume 1 of 4 shards are damaged or gone (first 2); only that is made again" in outcome.out
    assert "resuming: 3 of 4 shards are done" in outcome.out
    assert tree_bytes(store) == before
    rewritten = {path.parent.parent.name for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert rewritten == {"2"}
    assert "distill skip" in decant("run", "--work", work).out


@pytest.mark.parametrize("damage", [remove, cut, flip])
@pytest.mark.parametrize("name", ["manifest.json", "images.bin", "plan.json"])
def test_what_belongs_to_no_shard_is_written_again(
    decant: Decant, copy_run: Run, tree_bytes: Read, name: str, damage: Callable[[Path], None]
) -> None:
    """A flipped bit outside the manifest shows when the file is read, or to `verify`: the plan looks at sizes."""
    _, work = copy_run
    store = folder_of(work, "extract")
    before = tree_bytes(store)
    damage(store / name)
    if damage is flip and name != "manifest.json":
        found = decant("verify", "--work", work)
        assert found.code == 6
        assert name in found.out
    outcome = decant("extract", "--work", work)
    assert outcome.code == 0
    assert "extract resume the store's " in outcome.out
    assert tree_bytes(store) == before


@pytest.mark.parametrize(
    ("stage", "name", "damage", "said"),
    [
        ("distill", "student.safetensors", flip, "student.safetensors is damaged; it is made again"),
        ("distill", "student.safetensors", remove, "student.safetensors is gone; it is made again"),
        ("distill", "projector.safetensors", cut, "projector.safetensors is damaged; it is made again"),
        ("evaluate", "pictures.npz", cut, "pictures.npz is damaged; it is made again"),
        ("report", "report.html", remove, "report.html is gone; it is made again"),
        ("finetune", "result.json", cut, "its result.json is damaged"),
        ("distill", "result.json", cut, "its result.json is damaged"),
        ("extract", "result.json", cut, "its result.json is damaged"),
    ],
)
def test_a_damaged_output_is_made_again(
    decant: Decant, copy_run: Run, tree_bytes: Read, stage: str, name: str, damage: Callable[[Path], None], said: str
) -> None:
    _, work = copy_run
    folder = folder_of(work, stage)
    before = tree_bytes(folder)
    damage(folder / name)
    outcome = decant("run", "--work", work)
    assert outcome.code == 0, outcome.err
    assert f"{stage} resume {said}" in outcome.out
    if stage != "report":  # a new report may tell other seconds
        assert tree_bytes(folder) == before
    assert decant("plan", "--work", work).out.count(" skip ") == len(STAGES)


def test_a_damaged_student_stops_what_would_use_it(decant: Decant, copy_run: Run) -> None:
    _, work = copy_run
    flip(folder_of(work, "distill") / "student.safetensors")
    outcome = decant("finetune", "--work", work)
    assert outcome.code == 2
    assert "finetune needs distill, which is not done (student.safetensors is damaged" in outcome.err
    assert "run `make distill` first" in outcome.err
    assert decant("distill", "--work", work).code == 0
    assert decant("finetune", "--work", work).code == 0


def test_damaged_settings_say_what_to_do(decant: Decant, copy_run: Run) -> None:
    _, work = copy_run
    cut(work / "current.json")
    outcome = decant("run", "--work", work)
    assert outcome.code == 6
    assert f"{work}/current.json is not readable as JSON" in outcome.err
    assert "delete it and give the command again" in outcome.err


def test_a_deleted_cache_and_image_list_change_nothing(decant: Decant, copy_run: Run) -> None:
    _, work = copy_run
    for path in [*(work / "cache").iterdir(), *(work / "data").iterdir()]:
        path.unlink()
    assert decant("run", "--work", work).out.count(" skip ") == len(STAGES)


def test_what_killed_writers_left_is_swept_when_the_stage_runs_again(decant: Decant, copy_run: Run) -> None:
    """At any depth of the stage's own folder; where other commands may write at this moment nothing is touched."""
    _, work = copy_run
    folder = folder_of(work, "finetune")
    own = [folder / ".result.json.0123.partial", folder / "scratch-0" / ".classifier.safetensors.4567.partial"]
    shared = work / ".current.json.89ab.partial"
    for path in (*own, shared):
        path.write_bytes(b"half of it")
    (folder / "result.json").unlink()
    assert decant("run", "--work", work).code == 0
    assert [path.exists() for path in (*own, shared)] == [False, False, True]


def test_a_state_that_outlived_its_result_is_not_shown(decant: Decant, copy_run: Run) -> None:
    """Killed between publishing the result and removing the state."""
    _, work = copy_run
    (folder_of(work, "distill") / "state.json").write_text('{"state": "running", "message": "", "pid": 1}')
    outcome = decant("status", "--work", work)
    assert outcome.out.count("done in") == len(STAGES)
    assert "running" not in outcome.out
