"""The whole path, from images to a report, on every kind of data and as a user starts it."""

import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from pipeline.stages import STAGES
from pipeline.workspace import Workspace
from storage.stage import StageResult

ROOT = Path(__file__).resolve().parent.parent
Decant = Callable[..., Any]
Same = Callable[[Path], dict[str, object]]


def results(work: Path) -> dict[str, StageResult]:
    found = {name: Workspace(work).results(stage) for name, stage in STAGES.items()}
    assert {name: len(made) for name, made in found.items()} == dict.fromkeys(STAGES, 1)
    return {name: made[0][1] for name, made in found.items()}


def write_tars(images: Path, folder: Path, label: Callable[[str], int], *names: str) -> Path:
    """The images as a WebDataset with labels in .cls members, made by the library itself; every name is a tar."""
    folder.mkdir()
    paths = sorted(images.rglob("*.png"))
    for number, name in enumerate(names):
        with webdataset.TarWriter(str(folder / name)) as tar:
            for path in paths[number :: len(names)]:
                key = str(path.relative_to(images).with_suffix(""))
                tar.write({"__key__": key, "png": path.read_bytes(), "cls": label(key)})
    return folder


def unnamed(files: dict[str, object]) -> dict[str, object]:
    """All files but those that tell the names of the classes."""
    return {name: data for name, data in files.items() if not name.endswith(("images.bin", "manifest.json"))}


def test_tars_give_the_store_and_the_student_of_the_folder_they_were_made_from(
    decant: Decant, finished_run: tuple[Path, Path], tmp_path: Path, tree_bytes: Same
) -> None:
    """Same keys, same bytes, same numbers: it is the same data set, whatever holds it."""
    images, reference = finished_run
    names = ("cells-000000.tar", "cells-000001.tar", "cells-000002.tar")
    tars = write_tars(images, tmp_path / "tars", lambda key: int(key.startswith("light")), *names)
    outcome = decant("run", "--preset", "smoke", "--data", tars, "--work", tmp_path / "runs")
    assert outcome.code == 0, outcome.err
    assert "16 images to train on, 4 held out, 2 classes" in outcome.out
    for part in ("stores", "students"):
        assert unnamed(tree_bytes(tmp_path / "runs" / part)) == unnamed(tree_bytes(reference / part))
    found, expected = results(tmp_path / "runs"), results(reference)
    assert found["finetune"].metrics["classes"] == ["0", "1"]
    for name in ("extract", "extract_eval", "distill"):
        assert found[name].fingerprint == expected[name].fingerprint
    for one, other in zip(found["finetune"].metrics["members"], expected["finetune"].metrics["members"], strict=True):
        assert (one["accuracy"], one["history"]) == (other["accuracy"], other["history"])
    assert found["evaluate"].metrics["held_out"] == expected["evaluate"].metrics["held_out"]


def test_other_labels_need_no_new_store(
    decant: Decant, finished_run: tuple[Path, Path], tmp_path: Path, tree_bytes: Same
) -> None:
    """The tokens have seen no label; fine-tuning and probes have. The names of the tars divide them."""
    names = ("cells-train-0.tar", "cells-val-0.tar", "cells-train-1.tar")
    arguments = ("run", "--preset", "smoke", "--work", tmp_path / "runs", "--set", "evaluate.penalties=[10]", "--data")
    write_tars(finished_run[0], tmp_path / "tars", lambda key: int(key.startswith("light")), *names)
    first = decant(*arguments, tmp_path / "tars")
    assert first.code == 0, first.err
    before = tree_bytes(tmp_path / "runs" / "stores")
    shutil.rmtree(tmp_path / "tars")
    write_tars(finished_run[0], tmp_path / "tars", lambda key: int(key[-1]) // 4, *names)
    second = decant(*arguments, tmp_path / "tars")
    assert second.code == 0, second.err
    for name in ("extract", "extract_eval", "distill"):
        assert f"{name} skip up to date" in second.out
    for name in ("finetune", "evaluate"):
        assert f"{name} run data changed" in second.out
    assert tree_bytes(tmp_path / "runs" / "stores") == before
    newest = Workspace(tmp_path / "runs").results(STAGES["evaluate"])[0][1]
    assert newest.metrics["teacher_probe"]["train_accuracy"] < 0.9, "by its tokens, a third label cannot be told"
    assert Workspace(tmp_path / "runs").results(STAGES["finetune"])[0][1].metrics["classes"] == ["0", "1", "2"]


def test_train_and_val_folders_of_mixed_files(decant: Decant, make_images: Callable[..., Path], tmp_path: Path) -> None:
    """The data set's own division is used: `val` is what is held out, and eval_fraction has no say."""
    root = tmp_path / "mixed"
    make_images("mixed/train", per_class=6)
    make_images("mixed/val", per_class=3)
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        if number % 2:
            image = Image.open(path)
            suffix = (".jpg", ".JPEG", ".webp")[number % 3]
            buffer = io.BytesIO()
            image.convert("L" if number % 5 == 0 else "RGB").save(buffer, "WEBP" if suffix == ".webp" else "JPEG")
            path.with_suffix(suffix).write_bytes(buffer.getvalue())
            path.unlink()
    (root / "val" / "notes.txt").write_text("no image")
    outcome = decant("run", "--preset", "smoke", "--data", root, "--work", tmp_path / "runs")
    assert outcome.code == 0, outcome.err
    assert "12 images to train on, 6 held out, 2 classes" in outcome.out
    found = results(tmp_path / "runs")
    assert (found["extract"].metrics["images"], found["extract_eval"].metrics["images"]) == (12, 6)
    assert {member["num_eval"] for member in found["finetune"].metrics["members"]} == {6}
    assert found["extract"].metrics["bad_images"] == []
    outcome = decant("plan", "--work", tmp_path / "runs", "--set", "data.eval_fraction=0.5")
    assert outcome.out.count(" skip ") == len(STAGES)


def test_images_that_moved_are_found_at_their_new_place(
    decant: Decant, copy_run: tuple[Path, Path], tmp_path: Path
) -> None:
    """Everything stays up to date, and what runs next reads the images where they lie now."""
    images, work = copy_run
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(images, tmp_path / "elsewhere" / "images")
    assert decant("run", "--work", work).code == 2, "they are not where the last command found them"
    assert decant("run", "--work", work, "--data", moved).out.count(" skip ") == len(STAGES)
    for command in ("finetune", "evaluate"):
        assert decant(command, "--work", work).code == 0
    assert decant("distill", "--work", work, "--set", "distill.epochs=1").code == 0


def test_more_views_of_more_classes_with_three_seeds(
    decant: Decant, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    root = make_images(classes=tuple(f"kind {number:02d}" for number in range(11)), per_class=3)
    outcome = decant(
        "run", "--preset", "smoke", "--data", root, "--work", tmp_path / "runs", "--views", 3, "--seeds", 3,
        "--set", "finetune.epochs=1", "--set", "distill.epochs=2",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = results(tmp_path / "runs")
    assert found["extract"].metrics["records"] == 22 * 3
    assert len(found["finetune"].metrics["members"]) == 6
    assert found["finetune"].metrics["majority_accuracy"] == pytest.approx(1 / 11)
    assert "mean of 3 seeds" in outcome.out
    assert " ± " in (tmp_path / "runs" / "report.html").read_text()


def test_as_a_program(finished_run: tuple[Path, Path], tmp_path: Path) -> None:
    """Exit codes and streams of the real process, from a fresh checkout's point of view."""

    def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
        words = [sys.executable, "-m", "pipeline", *map(str, arguments)]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)

    images, work = finished_run
    planned = run("plan", "--data", images, "--work", work, "--preset", "smoke")
    assert (planned.returncode, planned.stderr) == (0, "")
    assert planned.stdout.count("  skip ") == len(STAGES)
    assert "\x1b" not in planned.stdout
    refused = run("run", "--data", "/nowhere", "--preset", "smoke", "--work", tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    error, then = refused.stderr.splitlines()
    assert error.startswith("error: no such data: /nowhere")
    assert then == f"then: python -m pipeline run --data /nowhere --preset smoke --work {tmp_path}"
