"""Commands that name several teachers: one pass over the images, a store each, and what later commands make of them."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from extract.teacher import Teacher
from pipeline.stages import STAGES
from pipeline.workspace import Workspace, read_result, read_state
from storage.folder import load_plan
from storage.image_list import ImageList
from storage.lock import hold_lock
from storage.receipts import committed_shards

Decant = Callable[..., Any]
TreeBytes = Callable[[Path], dict[str, bytes]]
pytestmark = pytest.mark.usefixtures("toy_large")
BOTH = ("--preset", "smoke", "--teacher", "toy,toy-large")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each image is read and decoded."""
    counts: Counter[str] = Counter()
    read_image = ImageList.read_image

    def note(self: ImageList, position: int) -> Any:
        counts[self.keys[position]] += 1
        return read_image(self, position)

    monkeypatch.setattr(ImageList, "read_image", note)
    return counts


def stores_of(work: Path) -> dict[str, Path]:
    """The folder of each teacher's finished store."""
    found = Workspace(work).results(STAGES["extract"])
    return {result.metrics["teacher"]: folder for folder, result in found}


# ---- the command -----------------------------------------------------------------------------------------------------


def test_one_pass_fills_the_stores_that_each_teacher_alone_would(
    decant: Decant, make_images: Callable[..., Path], decoded: Counter[str], tree_bytes: TreeBytes, tmp_path: Path
) -> None:
    data, work = ("--data", make_images()), tmp_path / "runs"
    outcome = decant("extract", *BOTH, *data, "--work", work, "--set", "extract.run.audit_records=0")
    assert outcome.code == 0, outcome.err
    assert set(decoded.values()) == {1}
    assert "extract toy run not run before extract toy-large run not run before" in outcome.out
    assert "store (toy: zarr, fp16): 16 images x 2 views x 1 kB = 0.00 GB store (toy-large: zarr, fp16)" in outcome.out
    assert "stores together: 0.00 GB; " in outcome.out
    assert "extract: 16/16 images" in outcome.out
    assert " shards 8/8 " in outcome.out
    together = stores_of(work)
    assert sorted(together) == ["toy", "toy-large"]
    for teacher, folder in together.items():
        assert f"extract: {folder} (" in outcome.out
        options = ("--preset", "smoke", "--teacher", teacher, *data, "--work", tmp_path / teacher)
        assert decant("extract", *options).code == 0
        [alone] = stores_of(tmp_path / teacher).values()
        assert alone.name == folder.name
        assert tree_bytes(alone) == tree_bytes(folder)
        one, other = read_result(alone), read_result(folder)
        assert one is not None
        assert other is not None
        assert (one.fingerprint, one.inputs, one.config) == (other.fingerprint, other.inputs, other.config)
        passing = {"together_with", "extracted_views_per_second", "run", "audit"}
        assert {k: v for k, v in one.metrics.items() if k not in passing} == {
            k: v for k, v in other.metrics.items() if k not in passing
        }
        assert other.metrics["together_with"] == [name for name in together if name != teacher]
        assert read_state(folder) is None


def test_what_is_there_is_skipped_while_the_rest_is_made(
    decant: Decant, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    data, work = ("--data", make_images()), tmp_path / "runs"
    assert decant("extract", "--preset", "smoke", *data, "--work", work).code == 0
    [folder] = stores_of(work).values()
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}
    outcome = decant("extract", "--teacher", "toy,toy-large", "--work", work)
    assert outcome.code == 0, outcome.err
    assert "extract toy skip up to date" in outcome.out
    assert 'extract toy-large run extract.teacher: "toy" -> "toy-large"' in outcome.out
    assert "stores together" not in outcome.out
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before
    planned = decant("plan", "--work", work)
    assert "extract toy skip up to date" in planned.out
    assert "extract toy-large skip up to date" in planned.out
    assert "students are trained from the store of toy, the first one named" in planned.out


def test_later_commands_find_the_store_of_either_teacher(
    decant: Decant, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    """With the settings of the common pass, not with the recipe that a newly named teacher brings."""
    work = ("--work", tmp_path / "runs")
    assert decant("extract", *BOTH, "--data", make_images(), "--views", "3", *work).code == 0
    for teacher, px in (("toy-large", 48), ("toy", 32)):
        outcome = decant("distill", "--teacher", teacher, *work)
        assert outcome.code == 0, outcome.err
        assert "settings: those of the last command here" in outcome.out
        [result] = [
            result
            for folder, result in Workspace(tmp_path / "runs").results(STAGES["distill"])
            if folder.name.startswith(f"{teacher}-w")
        ]
        store = stores_of(tmp_path / "runs")[teacher]
        assert result.inputs["extract"].startswith(store.name.rpartition("-")[2])
        assert load_plan(store).teacher["input_px"] == px
    assert len(stores_of(tmp_path / "runs")) == 2
    outcome = decant("extract", *work)
    assert outcome.out.count(" skip up to date") == 2, "both are remembered"


def test_a_whole_run_trains_from_the_first_teacher(
    decant: Decant, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    work = ("--work", tmp_path / "runs")
    outcome = decant("run", "--preset", "smoke", "--teacher", "toy-large,toy", "--data", make_images(), *work)
    assert outcome.code == 0, outcome.err
    assert sorted(stores_of(tmp_path / "runs")) == ["toy", "toy-large"]
    assert [folder.name.startswith("toy-large-w") for folder in (tmp_path / "runs" / "students").iterdir()] == [True]
    assert decant("plan", *work).out.count(" skip ") == len(STAGES) + 1
    status = decant("status", *work)
    assert status.out.count("done in") == len(STAGES) + 1


def test_a_plan_names_every_store_and_runs_nothing(
    decant: Decant, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    outcome = decant("plan", *BOTH, "--data", make_images(), "--work", tmp_path / "runs")
    assert outcome.code == 0, outcome.err
    assert "extract toy run not run before extract toy-large run not run before extract_eval run" in outcome.out
    assert "the images are read once for all of them" in outcome.out
    assert not (tmp_path / "runs" / "stores").exists()


def test_force_makes_both_again_and_keeps_them_until_then(
    decant: Decant, make_images: Callable[..., Path], tree_bytes: TreeBytes, tmp_path: Path
) -> None:
    work = ("--work", tmp_path / "runs")
    assert decant("extract", *BOTH, "--data", make_images(), *work).code == 0
    before = {name: (folder.stat().st_ino, tree_bytes(folder)) for name, folder in stores_of(tmp_path / "runs").items()}
    assert decant("extract", "--force", *work).code == 0
    for name, folder in stores_of(tmp_path / "runs").items():
        assert folder.stat().st_ino != before[name][0]
        assert tree_bytes(folder) == before[name][1]
    assert not list((tmp_path / "runs" / "stores").glob("*.again"))


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_store_that_is_being_written_stops_the_command_before_anything_is_touched(
    decant: Decant, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    work = ("--work", tmp_path / "runs")
    assert decant("extract", *BOTH, "--data", make_images(), *work).code == 0
    folders = stores_of(tmp_path / "runs")
    for folder in folders.values():
        (folder / "manifest.json").unlink()
    with hold_lock(folders["toy-large"]):
        outcome = decant("extract", *work)
        assert outcome.code == 4
        assert f"{folders['toy-large']} is being written by process" in outcome.err
    assert all(read_state(folder) is None and read_result(folder) is not None for folder in folders.values())
    assert decant("extract", *work).code == 0


def test_a_teacher_that_fails_has_no_result_and_the_other_has(
    decant: Decant, make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    work, speak = ("--work", tmp_path / "runs"), Teacher.__call__

    def fail(self: Teacher, pixels: Any) -> Any:
        if self.spec.name == "toy-large":
            raise ValueError("out of something")
        return speak(self, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "__call__", fail)
        outcome = decant("extract", *BOTH, "--data", make_images(), *work)
    assert outcome.code == 3
    assert "4 of 4 shards of" in outcome.err
    assert "teacher 'toy-large': ValueError: out of something" in outcome.err
    assert list(stores_of(tmp_path / "runs")) == ["toy"]
    assert outcome.err.splitlines()[-1].endswith(" --retry-failed")
    assert decant("extract", *work).code == 3, "it is not tried again by itself"
    again = decant("extract", *work, "--retry-failed")
    assert again.code == 0
    assert "extract toy skip up to date" in again.out
    assert "extract toy-large resume failed last time: 4 of 4 shards" in again.out


def test_one_damaged_store_of_two_is_repaired(
    decant: Decant, make_images: Callable[..., Path], tree_bytes: TreeBytes, tmp_path: Path
) -> None:
    work = ("--work", tmp_path / "runs")
    assert decant("extract", *BOTH, "--data", make_images(), *work).code == 0
    folder = stores_of(tmp_path / "runs")["toy-large"]
    before = tree_bytes(folder)
    shutil.rmtree(folder / "receipts")
    (folder / "manifest.json").unlink()
    assert "extract toy-large resume the store's manifest is gone" in decant("plan", *work).out
    (folder / "result.json").unlink()
    outcome = decant("repair", *work)
    assert outcome.code == 0, outcome.err
    assert tree_bytes(folder) == before
    assert len(committed_shards(folder, load_plan(folder))) == 4
