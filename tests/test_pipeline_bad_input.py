"""What a user gets wrong: an exit code, one line that says what was found, expected, where and what to do, and then
what to run next."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline import planning
from pipeline.stages import STAGES
from pipeline.workspace import Workspace
from storage.errors import QuarantineError
from storage.image_index import load_index
from storage.stage import Interrupted

Decant = Callable[..., Any]
SMOKE = ("--preset", "smoke", "--work", "runs")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(decant: Decant) -> None:
    """`decant` makes `tmp_path` the current folder."""


def check(outcome: Any, code: int, *said: str, then: str | None = None) -> None:
    """One line of error, and a last line with the next command."""
    lines = outcome.err.strip().splitlines()
    assert outcome.code == code, outcome.err
    for part in said:
        assert part in outcome.err
    assert "Traceback" not in outcome.err
    assert lines[-1].startswith(then or "then: decant "), outcome.err
    assert "\x1b" not in outcome.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", *SMOKE), ("no data: give DATA=", "(--data)")),
        (("run", *SMOKE, "--data", "nowhere"), ("no such data: nowhere", "looked in /")),
        (("run", *SMOKE, "--data", "empty"), ("no image in empty", "expected empty/<class>/<image>")),
        (("run", *SMOKE, "--data", "text.txt"), ("text.txt is a file of another kind", "folder of class folders")),
        (("run", *SMOKE, "--data", "{0..3}.tar"), ("no file matches", "range of numbers")),
        (("run", *SMOKE, "--data", "images", "--teacher", "cilp-b"), ("unknown teacher 'cilp-b'", "'clip-b'")),
        (("run", "--preset", "smok", "--work", "runs"), ("unknown preset 'smok'", "'smoke'")),
        (("run", *SMOKE, "--student", "vitb"), ("unknown student 'vitb'", "'vit-b'")),
        (("run", *SMOKE, "--set", "distil.epochs=3"), ("unknown setting 'distil.epochs'", "did you mean distill?")),
        (("run", *SMOKE, "--set", "distill.epochs=x"), ("distill.epochs", "valid integer", "found 'x'")),
        (("run", *SMOKE, "--set", "distill.epochs"), ("'distill.epochs' is not of the form name=value",)),
        (("run", *SMOKE, "--views", "0"), ("extract.views", "greater than or equal to 1", "found 0")),
        (("run", *SMOKE, "--data", "images", "--weights", "w.pt"), ("no weights file w.pt", "WEIGHTS=<file>")),
        (("status", "--work", "text.txt"), ("text.txt is no folder", "choose another with --work")),
        (("run", *SMOKE[:2], "--work", "text.txt/runs", "--data", "images"), ("text.txt is no folder",)),
        (("distill", *SMOKE, "--data", "images"), ("distill needs extract", "run `make extract` first")),
    ],
)  # fmt: skip
def test_settings_and_data(
    decant: Decant, make_images: Decant, tmp_path: Path, arguments: tuple[str, ...], said: tuple[str, ...]
) -> None:
    make_images(per_class=3)
    (tmp_path / "empty" / "dark").mkdir(parents=True)
    (tmp_path / "text.txt").write_text("no folder")
    check(decant(*arguments), 2, *said, then=f"then: decant {arguments[0]}")
    assert not (tmp_path / "runs" / "stores").exists(), "nothing was begun"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "--prset", "smoke"), ("No such option '--prset'", "--preset")),
        (("rum",), ("No such command 'rum'", "run")),
        (("run", "--views", "many"), ("'--views'", "'many' is not a valid integer")),
        (("run", "--executor", "slurm"), ("'--executor'", "'slurm' is not one of 'ray', 'process', 'inline'")),
        (("run", "left over"), ("unexpected extra argument", "left over")),
    ],
)
def test_options_that_do_not_exist(decant: Decant, arguments: tuple[str, ...], said: tuple[str, ...]) -> None:
    outcome = decant(*arguments)
    check(outcome, 2, *said, then="then: ")
    assert outcome.err.strip().endswith("--help")


def test_a_class_with_one_image(decant: Decant, make_images: Decant, tmp_path: Path) -> None:
    root = make_images(per_class=3)
    (root / "lonely").mkdir()
    shutil.copy(root / "dark" / "000.png", root / "lonely" / "only.png")
    outcome = decant("run", *SMOKE, "--data", root)
    check(outcome, 2, "class 'lonely' has one image (lonely/only.png)", "--set data.eval_fraction=0")


def test_no_labels_are_refused_before_the_work(decant: Decant, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for number in range(6):
        Image.new("RGB", (40, 40), (40 * number, 0, 0)).save(tmp_path / "flat" / f"{number}.png")
    outcome = decant("run", *SMOKE, "--data", "flat")
    check(outcome, 2, "fine-tuning needs labelled images of two classes or more, found no labels", "one folder a class")
    assert not (tmp_path / "runs" / "stores").exists()
    for command in ("extract", "distill"):
        assert decant(command, *SMOKE, "--data", "flat").code == 0, "these need no labels"


def test_nothing_held_out_is_refused_before_the_work(decant: Decant, make_images: Decant, tmp_path: Path) -> None:
    outcome = decant("run", *SMOKE, "--data", make_images(), "--set", "data.eval_fraction=0")
    check(
        outcome, 2, "needs images that are held out, found none", "set data.eval_fraction above 0, or add a val folder"
    )
    assert not (tmp_path / "runs" / "stores").exists()


def test_one_unreadable_image_is_counted_and_many_are_refused(
    decant: Decant, make_images: Decant, tmp_path: Path
) -> None:
    root = make_images()
    assert decant("plan", *SMOKE, "--data", root).code == 0
    [listing] = (tmp_path / "runs" / "data").iterdir()
    trained = [root / key for key in load_index(listing).split("train").keys]
    trained[8].write_bytes(b"<html>not found</html>")
    outcome = decant("run", *SMOKE, "--data", root)
    assert outcome.code == 0, outcome.err
    assert "extract: 16/16 images" in outcome.out
    assert "bad 1" in outcome.out
    [(_, result)] = Workspace(tmp_path / "runs").results(STAGES["extract"])
    [bad] = result.metrics["bad_images"]
    assert bad["key"] == str(trained[8].relative_to(root))
    assert result.metrics["records"] == 30
    assert "1 unusable images" in " ".join((tmp_path / "runs" / "report.html").read_text().split())
    for path in trained:
        path.write_bytes(b"<html>not found</html>")
    outcome = decant("run", *SMOKE, "--data", root)
    check(outcome, 2, "images of", "are unusable, 1 are allowed", "dark/0", "raise extract.max_bad_fraction")


def test_another_teacher_asks_for_its_store(decant: Decant, copy_run: tuple[Path, Path]) -> None:
    outcome = decant("distill", "--work", copy_run[1], "--set", "extract.input_px=64")
    check(outcome, 2, "distill needs extract, which is not done (extract.input_px: null -> 64)", "run `make extract`")
    outcome = decant("distill", "--work", copy_run[1], "--teacher", "clip-b")
    check(outcome, 2, 'extract.teacher: "toy" -> "clip-b"', "run `make extract` first")


def test_a_student_whose_grid_does_not_fit(decant: Decant, copy_run: tuple[Path, Path]) -> None:
    outcome = decant("distill", "--work", copy_run[1], "--student", "vit-ti")
    check(outcome, 2, "the student's grid is 14x14", "the store of 'toy' has 4x4", "set distill.student.input_px=64")
    fitting = ("--set", "distill.student.input_px=64", "--set", "distill.student.depth=1")
    assert decant("distill", "--work", copy_run[1], "--student", "vit-ti", *fitting).code == 0


@pytest.mark.parametrize(
    ("command", "folder", "file", "number", "said"),
    [
        ("extract", "stores", "/attempts/", errno.ENOSPC, "the disk is full"),
        ("extract", "stores", "/receipt", errno.EDQUOT, "the disk quota is used up"),
        ("distill", "students", "/.student.safetensors", errno.ENOSPC, "the disk is full"),
        ("distill", "students", "/.projector.safetensors", errno.EROFS, "Read-only file system"),
        ("finetune", "finetune", "/.classifier.safetensors", errno.ENOSPC, "the disk is full"),
        ("evaluate", "evaluate", "/.pictures.npz", errno.ENOSPC, "the disk is full"),
        ("report", "reports", "/.report.html", errno.ENOSPC, "the disk is full"),
        ("report", "reports", "/.result.json", errno.ENOSPC, "the disk is full"),
    ],
)
def test_a_disk_that_takes_no_more(
    decant: Decant, copy_run: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, command: str, folder: str, file: str,
    number: int, said: str,
) -> None:  # fmt: skip
    """Nothing half-written is taken for whole, and with room the same command ends well."""
    images, work = copy_run
    shutil.rmtree(work / folder)
    fsync, met = os.fsync, []

    def full(descriptor: int) -> None:
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if f"/{folder}/" in path and file in path:
            met.append(path)
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    arguments = (command, "--preset", "smoke", "--data", images, "--work", work)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        outcome = decant(*arguments)
    assert met, "the fault was not met"
    check(outcome, 2, "cannot write ", said)
    assert not Workspace(work).results(STAGES[command])
    assert decant(*arguments).code == 0
    assert Workspace(work).results(STAGES[command])


def test_no_room_is_seen_before_the_work(
    decant: Decant, make_images: Decant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    outcome = decant("extract", *SMOKE, "--data", make_images())
    check(outcome, 2, "the store needs 0.0", "where 0.001 MB are free", "smaller stores (fewer VIEWS, ENCODING=int8)")


def test_our_own_bug_is_one_line_and_a_file(
    decant: Decant, copy_run: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(planning, "build_index", lambda *args, **options: {}["no such key"])
    outcome = decant("run", "--work", copy_run[1])
    crash = tmp_path / "decant-crash.txt"
    check(outcome, 1, f"bug: KeyError: 'no such key' (traceback in {crash}); please report it")
    assert len(outcome.err.strip().splitlines()) == 2
    assert "Traceback (most recent call last)" in crash.read_text()
    crash.unlink()
    crash.mkdir()
    outcome = decant("run", "--work", copy_run[1])
    assert outcome.code == 1
    assert "Traceback (most recent call last)" in outcome.err, "no file can be written: then on the screen"
    assert outcome.err.strip().splitlines()[-1].startswith("then: ")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(QuarantineError("2 of 9 shards were given up"), 3, "error: 2 of 9 shards were given up"),
     (Interrupted("SIGTERM"), 143, "Go on with: decant run"), (KeyboardInterrupt(), 130, "Go on with: decant run")],
)  # fmt: skip
def test_other_ends(
    decant: Decant, copy_run: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int,
    said: str,
) -> None:  # fmt: skip
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(planning, "build_index", fail)
    outcome = decant("run", "--work", copy_run[1])
    assert outcome.code == code
    assert said in outcome.err
    assert "decant run --work" in outcome.err.strip().splitlines()[-1]


def test_brackets_in_a_name_are_no_markup(decant: Decant, make_images: Decant, tmp_path: Path) -> None:
    root = make_images("pics [old] [/b] :smile:", per_class=3)
    outcome = decant("run", "--preset", "smoke", "--data", root, "--work", "runs [/x]")
    assert outcome.code == 0, outcome.err
    assert f"data: {root}: " in outcome.out
    assert "report: runs [/x]/report.html" in outcome.out
    outcome = decant("run", "--preset", "smoke", "--data", "[/gone]", "--work", "runs [/x]")
    check(outcome, 2, "no such data: [/gone]")


@pytest.mark.parametrize("arguments", [("--help",), ("run", "-h"), ("--version",), ("teachers",), ("status",)])
def test_asking_is_no_error(decant: Decant, arguments: tuple[str, ...]) -> None:
    outcome = decant(*arguments)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out
