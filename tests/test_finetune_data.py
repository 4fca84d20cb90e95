"""What fine-tuning makes of images that are bad, unlabelled, of one class, or of many."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from distill.checkpoint import load_weights, save_weights
from distill.config import TrainRunConfig
from distill.student import build_student
from distill.student_config import BeitStudent, find_student
from finetune import run as stage
from finetune.config import FinetuneConfig
from storage.errors import ConfigError, InputError

TOY = BeitStudent.model_validate(find_student("toy").to_json())
CFG = FinetuneConfig(epochs=1, batch_size=4, run=TrainRunConfig(threads=1, loaders=1))


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """The folder of a student that nobody distilled."""
    torch.manual_seed(0)
    state = build_student(TOY, drop_path=0.0).state_dict()
    save_weights(tmp_path / "student" / "student.safetensors", state, {"student": TOY.model_dump_json()})
    return tmp_path / "student"


def test_bad_images_are_counted_apart(make_index: Callable[..., Any], make_images: Callable[..., Path],
                                      tmp_path: Path, student: Path) -> None:  # fmt: skip
    """Which image is bad does not change the split: that depends on names alone."""
    root = make_images()
    _, index = make_index(root)
    (root / index.split("eval").keys[0]).write_bytes(b"no picture")
    (root / index.split("train").keys[5]).write_bytes(b"no picture")
    path, _ = make_index(root)
    metrics = stage.run(CFG, {"data": path, "distill": student}, tmp_path / "out")
    assert metrics["num_eval"] == 3
    assert {(member["num_eval"], member["num_bad"]) for member in metrics["members"]} == {(3, 1)}
    assert all(3 * member["accuracy"] == round(3 * member["accuracy"]) for member in metrics["members"])


def test_more_than_ten_classes(make_index: Callable[..., Any], tmp_path: Path, student: Path) -> None:
    path, _ = make_index(classes=tuple(f"kind {n}" for n in range(12)), per_class=3)
    metrics = stage.run(CFG, {"data": path, "distill": student}, tmp_path / "out")
    assert len(metrics["classes"]) == 12
    assert metrics["majority_accuracy"] == 1 / 12
    for start in ("scratch", "distilled"):
        saved = load_weights(tmp_path / "out" / f"{start}-0" / "classifier.safetensors")
        assert saved["head.weight"].shape == (12, TOY.width)


@pytest.mark.parametrize(
    ("images", "error", "said"),
    [
        ({"classes": ("only",)}, ConfigError, r"two classes or more, found 1 class"),
        ({"eval_fraction": 0.0}, InputError, r"no image is held out.*data.eval_fraction"),
    ],
    ids=["one class", "no evaluation images"],
)
def test_data_that_cannot_work_is_refused(
    make_index: Callable[..., Any],
    tmp_path: Path,
    student: Path,
    images: dict[str, Any],
    error: type[Exception],
    said: str,
) -> None:
    path, _ = make_index(**images)
    with pytest.raises(error, match=said):
        stage.run(CFG, {"data": path, "distill": student}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_without_labels_are_refused(make_index: Callable[..., Any], tmp_path: Path, student: Path) -> None:
    (tmp_path / "flat").mkdir()
    for number in range(4):
        Image.new("RGB", (32, 32), (60 * number, 0, 0)).save(tmp_path / "flat" / f"{number}.png")
    path, _ = make_index(tmp_path / "flat")
    with pytest.raises(ConfigError, match=r"two classes or more, found no labels.*one folder a class"):
        stage.run(CFG, {"data": path, "distill": student}, tmp_path / "out")


def test_evaluation_images_without_a_label_are_refused(make_index: Callable[..., Any], make_images: Callable[..., Path],
                                                       tmp_path: Path, student: Path) -> None:  # fmt: skip
    root = tmp_path / "divided"
    make_images("divided/train")
    (root / "val").mkdir()
    Image.new("RGB", (32, 32)).save(root / "val" / "nameless.png")
    path, _ = make_index(root)
    with pytest.raises(ConfigError, match="labelled images"):
        stage.run(CFG, {"data": path, "distill": student}, tmp_path / "out")


def test_no_readable_evaluation_image_is_an_error(make_index: Callable[..., Any], make_images: Callable[..., Path],
                                                  tmp_path: Path, student: Path) -> None:  # fmt: skip
    root = make_images(per_class=3)
    for key in make_index(root)[1].split("eval").keys:
        (root / key).write_bytes(b"no picture")
    path, _ = make_index(root)
    with pytest.raises(InputError, match="none of the evaluation images"):
        stage.run(CFG, {"data": path, "distill": student}, tmp_path / "out")
