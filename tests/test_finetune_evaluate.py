"""The evaluation stage: its numbers are those of its parts, and labels come from the data, not from the store."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distill.checkpoint import load_facts, load_weights, save_weights
from distill.config import TrainRunConfig
from distill.student import DistillModel, normalise_images
from distill.student_config import find_student
from finetune import evaluate as stage
from finetune import run as finetuning
from finetune.config import EvaluateConfig
from finetune.features import pool_student, pool_teacher
from finetune.linear_probe import linear_probe
from storage.errors import ConfigError, DamagedError, InputError
from storage.image_index import ImageIndex, load_index, save_index
from storage.reader import open_store
from storage.stage import Interrupted, SilentProgress

CFG = EvaluateConfig(penalties=(0.1, 10.0), iterations=15, pictures=3, run=TrainRunConfig(threads=1))
CPU = torch.device("cpu")


@pytest.fixture
def inputs(finished_run: tuple[Path, Path], tmp_path: Path) -> dict[str, Path]:
    """Stores and a student from a finished run; an image list of one's own."""
    work = finished_run[1]
    stores = {("eval" in path.name): path for path in (work / "stores").iterdir() if path.is_dir()}
    data = shutil.copy(next((work / "data").iterdir()), tmp_path / "data.json")
    student = next((work / "students").iterdir())
    return {"data": Path(data), "extract": stores[False], "extract_eval": stores[True], "distill": student}


def load_model(inputs: dict[str, Path]) -> DistillModel:
    model = DistillModel(find_student("toy"), [open_store(inputs["extract"]).plan.features], drop_path=0.0)
    model.student.load_state_dict(load_weights(inputs["distill"] / "student.safetensors"))
    model.projectors.load_state_dict(load_weights(inputs["distill"] / "projector.safetensors"))
    return model.eval()


def relabel(
    inputs: dict[str, Path], change: Callable[[int, int], int], classes: tuple[str, ...] | None = None
) -> ImageIndex:
    """Another label for each image, by position; names, contents and split stay."""
    index = load_index(inputs["data"])
    rows = [row._replace(label=change(number, row.label)) for number, row in enumerate(index.rows)]
    changed = ImageIndex.of_rows(index.location, index.classes if classes is None else classes, rows)
    save_index(inputs["data"], changed)
    return changed


def test_probes_are_those_of_the_pooled_features(inputs: dict[str, Path], tmp_path: Path) -> None:
    metrics = stage.run(CFG, inputs, tmp_path / "out")
    index = load_index(inputs["data"])
    stores = [(open_store(inputs[name]), index.split(split)) for name, split in
              (("extract", "train"), ("extract_eval", "eval"))]  # fmt: skip
    model = load_model(inputs)
    for name, pooled in (
        ("teacher_probe", [pool_teacher(*pair) for pair in stores]),
        ("student_probe", [pool_student(model, *pair, 32, CPU) for pair in stores]),
    ):
        truth = linear_probe(*pooled, penalties=CFG.penalties, iterations=CFG.iterations, seed=CFG.seed)._asdict()
        assert {key: value for key, value in metrics[name].items() if key != "seconds"} == truth
        assert metrics[name]["num_eval"] == 4, "the held-out store has one view an image"
    assert metrics["held_out"] == stage.compare_tokens(model, *stores[1], 32, CPU)


def test_a_student_of_the_teachers_own_tokens_is_compared_with_those(inputs: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(inputs["distill"], tmp_path / "student"))
    path = folder / "student.safetensors"
    assert load_facts(path)["whiten"] == "true"
    save_weights(path, load_weights(path), load_facts(path) | {"whiten": "false"})
    metrics = stage.run(CFG, inputs | {"distill": folder}, tmp_path / "out")
    store, images = open_store(inputs["extract_eval"]), load_index(inputs["data"]).split("eval")
    records_R = np.arange(store.plan.num_records)
    raw_BTC = torch.from_numpy(store.raw_tokens(records_R))
    zero = float(F.smooth_l1_loss(torch.zeros_like(raw_BTC), raw_BTC, beta=2.0))
    assert metrics["held_out"]["zero_loss"] == pytest.approx(zero, rel=1e-5)
    assert metrics["held_out"] == stage.compare_tokens(load_model(inputs), store, images, 32, CPU, is_raw=True)
    assert metrics["held_out"] != stage.compare_tokens(load_model(inputs), store, images, 32, CPU)


def test_labels_come_from_the_data_not_from_the_store(inputs: dict[str, Path], tmp_path: Path) -> None:
    """Dark and light are easy to tell apart; with labels at random, they are not, though no token has changed."""
    plain = stage.run(CFG, inputs, tmp_path / "plain")
    assert plain["teacher_probe"]["accuracy"] == 1
    relabel(inputs, lambda _, label: 1 - label)
    assert stage.run(CFG, inputs, tmp_path / "swapped")["teacher_probe"]["accuracy"] == 1
    relabel(inputs, lambda number, _: number // 2 % 2)
    mixed = stage.run(CFG.model_copy(update={"penalties": (10.0,)}), inputs, tmp_path / "mixed")
    assert mixed["teacher_probe"]["train_accuracy"] < 0.9


def test_pictures_hold_spread_views_with_both_sides_tokens(inputs: dict[str, Path], tmp_path: Path) -> None:
    stage.run(CFG, inputs, tmp_path / "out")
    kept = np.load(tmp_path / "out" / "pictures.npz")
    store, images = open_store(inputs["extract_eval"]), load_index(inputs["data"]).split("eval")
    assert kept["keys"].tolist() == [images.keys[position] for position in (0, 1, 3)]
    assert kept["grid_hw"].tolist() == [4, 4]
    model = load_model(inputs)
    for number, key in enumerate(kept["keys"].tolist()):
        np.testing.assert_array_equal(kept["teacher_BTC"][number], store.read(key, 0).tokens_TC[1:])
        pixels = torch.from_numpy(kept["images_BHWC"][number])[None]
        with torch.inference_mode():
            pred_TC = model(normalise_images(pixels, CPU))[0][0, 1:]
        np.testing.assert_allclose(kept["student_BTC"][number], pred_TC, atol=1e-5)


@pytest.mark.parametrize(("asked", "kept"), [(0, 0), (1, 1), (100, 4)])
def test_as_many_pictures_as_asked_for_and_there_are(
    inputs: dict[str, Path], tmp_path: Path, asked: int, kept: int
) -> None:
    stage.run(CFG.model_copy(update={"pictures": asked}), inputs, tmp_path / "out")
    path = tmp_path / "out" / "pictures.npz"
    assert (len(np.load(path)["keys"]) if path.exists() else 0) == kept


def test_stores_of_other_images_are_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    index = load_index(inputs["data"])
    first, *others = index.rows
    changed = [first._replace(digest=first.digest[::-1]), *others]
    save_index(inputs["data"], ImageIndex.of_rows(index.location, index.classes, changed))
    with pytest.raises(InputError, match=r"tokens of other images.*make evaluate"):
        stage.run(CFG, inputs, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "other"),
    [(lambda number, label: 0, {"classes": ("dark",)}), (lambda number, label: -1, {"classes": ()}),
     (lambda number, label: -1 if number == 3 else label, {})],
    ids=["one class", "no labels", "one image without a label"],
)  # fmt: skip
def test_labels_are_needed(
    inputs: dict[str, Path], tmp_path: Path, change: Callable[[int, int], int], other: dict[str, tuple[str, ...]]
) -> None:
    relabel(inputs, change, **other)
    with pytest.raises(ConfigError, match=r"a linear probe needs labelled images"):
        stage.run(CFG, inputs, tmp_path / "out")


@pytest.mark.parametrize("damaged", ["student.safetensors", "projector.safetensors"])
def test_a_damaged_student_is_refused(inputs: dict[str, Path], tmp_path: Path, damaged: str) -> None:
    inputs["distill"] = shutil.copytree(inputs["distill"], tmp_path / "student")
    path = inputs["distill"] / damaged
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DamagedError, match=damaged):
        stage.run(CFG, inputs, tmp_path / "out")


@pytest.mark.parametrize("message", ["linear probe on the teacher", "linear probe on the student", "student against"])
def test_a_stop_is_heard_in_every_part(inputs: dict[str, Path], tmp_path: Path, message: str) -> None:
    class Stopper(SilentProgress):
        def say(self, text: str) -> None:
            if text.startswith(message):
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="SIGINT"):
        stage.run(CFG, inputs, tmp_path / "out", Stopper())
    assert not (tmp_path / "out" / "pictures.npz").exists()


def test_student_shape_is_that_of_the_file(inputs: dict[str, Path]) -> None:
    assert finetuning.student_shape(inputs["distill"] / "student.safetensors") == find_student("toy")
