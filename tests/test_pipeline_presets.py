"""Presets: the published recipes as explicit numbers, and the table from teachers to recipes."""

from typing import NamedTuple

import pytest

from distill.student_config import STUDENTS
from extract.teachers import TEACHERS, find_teacher
from pipeline.presets import PRESET_OF_TEACHER, PRESETS, load_preset, preset_for_teacher
from storage.errors import ConfigError
from storage.views import CentreCrop, RandomResizedCrop


class Distilling(NamedTuple):
    """A row of the paper's table of distillation runs."""

    epochs: int
    crop_min: float
    drop_path: float
    base_lr: float
    effective_lr: float
    warmup: float
    clip: float


class Finetuning(NamedTuple):
    """A row of the paper's table of fine-tuning runs."""

    epochs: int
    warmup: float
    base_lr: float
    effective_lr: float
    layer_decay: float
    drop_path: float


PAPER: dict[str, tuple[str, str, Distilling, Finetuning]] = {
    "clip-b-100ep": (
        "clip-b", "vit-b", Distilling(100, 0.67, 0.1, 3e-4, 1.2e-3, 10, 3.0),
        Finetuning(100, 20, 1.25e-3, 5e-3, 0.65, 0.1),
    ),
    "clip-b-300ep": (
        "clip-b", "vit-b", Distilling(300, 0.08, 0.2, 3e-4, 1.2e-3, 10, 3.0),
        Finetuning(100, 20, 1.25e-3, 5e-3, 0.60, 0.3),
    ),
    "clip-l-300ep": (
        "clip-l", "vit-l", Distilling(300, 0.08, 0.3, 3e-4, 1.2e-3, 10, 3.0),
        Finetuning(50, 5, 2.5e-4, 1e-3, 0.75, 0.4),
    ),
    "dino-b-300ep": (
        "dino-b", "vit-b", Distilling(300, 0.08, 0.3, 3e-4, 1.2e-3, 10, 3.0),
        Finetuning(100, 20, 1.5e-3, 6e-3, 0.60, 0.2),
    ),
    "deit-b-300ep": (
        "deit-b", "vit-b", Distilling(300, 0.08, 0.3, 3e-4, 1.2e-3, 10, 3.0),
        Finetuning(100, 20, 1.25e-3, 5e-3, 0.65, 0.3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_distillation_is_that_of_the_paper(name: str) -> None:
    teacher, student, row, _ = PAPER[name]
    extract, distill = load_preset(name).extract, load_preset(name).distill
    assert (extract.teacher, distill.student) == (teacher, STUDENTS[student])
    assert extract.sampler == RandomResizedCrop(min_scale=row.crop_min)
    assert (distill.epochs, distill.drop_path, distill.batch_size) == (row.epochs, row.drop_path, 2048)
    optim = distill.optim
    assert (optim.base_lr, optim.warmup_epochs, optim.clip_grad) == (row.base_lr, row.warmup, row.clip)
    assert optim.base_lr * distill.batch_size / 512 == pytest.approx(row.effective_lr)
    assert (optim.weight_decay, optim.min_lr, distill.beta) == (0.05, 2e-6, 2.0)
    assert (extract.renderer.kernel, extract.input_px) == ("bilinear", None)


@pytest.mark.parametrize("name", PAPER)
def test_fine_tuning_is_that_of_the_paper(name: str) -> None:
    _, _, _, row = PAPER[name]
    cfg = load_preset(name).finetune
    assert (cfg.epochs, cfg.layer_decay, cfg.drop_path, cfg.batch_size) == (
        row.epochs, row.layer_decay, row.drop_path, 2048,
    )  # fmt: skip
    assert (cfg.optim.base_lr, cfg.optim.warmup_epochs, cfg.optim.clip_grad) == (row.base_lr, row.warmup, 5.0)
    assert cfg.optim.base_lr * cfg.batch_size / 512 == pytest.approx(row.effective_lr)
    assert (cfg.label_smoothing, cfg.optim.weight_decay, cfg.renderer.kernel) == (0.1, 0.05, "bicubic")
    assert (cfg.sampler, cfg.eval_sampler) == (RandomResizedCrop(min_scale=0.08), CentreCrop(fraction=0.875))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_fits_together(name: str) -> None:
    """Its student has its teacher's grid, and its name is its own."""
    config = load_preset(name)
    assert config.preset == name
    assert config.data.path is None, "a preset says nothing about anybody's data"
    teacher = find_teacher(config.extract.teacher)
    assert config.distill.student.grid_hw == teacher.feature_spec(config.extract.input_px).grid_hw
    assert PRESETS[name].expectation


def test_smoke_derives_from_the_demo() -> None:
    demo, smoke = load_preset("demo"), load_preset("smoke")
    assert smoke.extract.run.executor == "inline", "it must run where Ray does not"
    assert smoke.finetune.model_copy(
        update={name: getattr(demo.finetune, name) for name in ("seeds", "epochs", "batch_size", "run")}
    ) == demo.finetune  # fmt: skip


@pytest.mark.parametrize("teacher", TEACHERS)
def test_every_teacher_has_a_recipe(teacher: str) -> None:
    config = preset_for_teacher(teacher)
    assert config.extract.teacher == teacher
    assert config.preset == PRESET_OF_TEACHER.get(teacher, "clip-b-300ep")
    assert set(PRESET_OF_TEACHER) <= set(TEACHERS)


@pytest.mark.parametrize(
    ("name", "said"),
    [("clip-b", "did you mean 'clip-b-300ep' or"), ("smok", "did you mean 'smoke'"),
     ("zzz", "known: clip-b-100ep, clip-b-300ep")],
)  # fmt: skip
def test_an_unknown_preset_offers_the_nearest(name: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_preset(name)
    assert f"unknown preset {name!r}" in str(caught.value)
    assert said in str(caught.value)
