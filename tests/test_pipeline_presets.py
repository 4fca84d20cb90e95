"""Presets: the published recipes as explicit numbers, and the table from teachers to recipes."""

from typing import NamedTuple

import pytest
import torch

from distill.config import OptimConfig
from distill.optim import REFERENCE_BATCH
from distill.student import build_student
from distill.student_config import STUDENTS, BeitStudent, StudentConfig, TimmStudent
from distill.token_layout import find_layout
from extract.teachers import TEACHERS, find_teacher
from pipeline.presets import PRESET_OF_TEACHER, PRESETS, load_preset, preset_for_teacher
from storage.errors import ConfigError
from storage.views import CentreCrop, RandomResizedCrop
from storage.whitening import LayerNorm


class Distilling(NamedTuple):
    """A file of the authors' configs/pretrain, with the defaults of their config.py. All take 16 x 128 images a step,
    and AdamW with a weight decay of 0.05."""

    teacher: str
    student: StudentConfig
    epochs: int
    crop_min: float
    drop_path: float
    base_lr: float
    effective_lr: float
    warmup_lr: float
    min_lr: float
    warmup: float
    clip: float


class Finetuning(NamedTuple):
    """A file of the authors' configs/finetune."""

    epochs: int
    warmup: float
    batch: int
    base_lr: float
    effective_lr: float
    warmup_lr: float
    min_lr: float
    layer_decay: float
    drop_path: float


BASE = BeitStudent(
    input_px=224, patch_px=16, width=768, depth=12, heads=12, mlp_ratio=4.0, layer_scale=0.1, positions="shared"
)
LARGE = BeitStudent(
    input_px=224, patch_px=14, width=1024, depth=24, heads=16, mlp_ratio=4.0, layer_scale=0.1, positions="shared"
)
SWINV2 = TimmStudent(input_px=224, model="swinv2_base_window8_256", arguments={"window_size": 14})

AUTHORS: dict[str, tuple[Distilling, Finetuning]] = {
    "clip-b-100ep": (
        Distilling("clip-b", BASE, 100, 0.67, 0.1, 3e-4, 1.2e-3, 5e-7, 5e-6, 10, 3.0),
        Finetuning(100, 20, 2048, 1.25e-3, 5e-3, 2.5e-7, 2.5e-7, 0.65, 0.1),
    ),
    "clip-b-300ep": (
        Distilling("clip-b", BASE, 300, 0.08, 0.2, 3e-4, 1.2e-3, 5e-7, 5e-6, 10, 3.0),
        Finetuning(100, 20, 2048, 1.25e-3, 5e-3, 2.5e-7, 2.5e-7, 0.60, 0.3),
    ),
    "clip-l-300ep": (
        Distilling("clip-l", LARGE, 300, 0.08, 0.3, 3e-4, 1.2e-3, 5e-7, 5e-6, 10, 3.0),
        Finetuning(50, 5, 2048, 2.5e-4, 1e-3, 5e-7, 5e-7, 0.75, 0.4),
    ),
    "dino-b-300ep": (
        Distilling("dino-b", BASE, 300, 0.08, 0.3, 3e-4, 1.2e-3, 5e-7, 5e-6, 10, 3.0),
        Finetuning(100, 20, 2048, 1.5e-3, 6e-3, 2.5e-7, 2.5e-7, 0.60, 0.2),
    ),
    "deit-b-300ep": (
        Distilling("deit-b", BASE, 300, 0.08, 0.3, 3e-4, 1.2e-3, 5e-7, 5e-6, 10, 3.0),
        Finetuning(100, 20, 2048, 1.25e-3, 5e-3, 2.5e-7, 2.5e-7, 0.65, 0.3),
    ),
    "esvit-b-300ep": (
        Distilling("esvit-b", SWINV2, 300, 0.08, 0.3, 2e-4, 8e-4, 1e-6, 1e-5, 10, 3.0),
        Finetuning(100, 20, 1024, 1.25e-3, 2.5e-3, 2.5e-7, 2.5e-7, 0.80, 0.4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AUTHORS)
def test_distillation_is_that_of_the_authors(name: str) -> None:
    row, _ = AUTHORS[name]
    extract, distill = load_preset(name).extract, load_preset(name).distill
    assert (extract.teacher, distill.student) == (row.teacher, row.student)
    assert extract.sampler == RandomResizedCrop(min_scale=row.crop_min)
    assert (extract.renderer.kernel, extract.input_px) == ("bilinear", None)
    assert (distill.epochs, distill.drop_path, distill.batch_size) == (row.epochs, row.drop_path, 16 * 128)
    assert distill.optim == OptimConfig(
        base_lr=row.base_lr, warmup_lr=row.warmup_lr, min_lr=row.min_lr, warmup_epochs=row.warmup, weight_decay=0.05,
        clip_grad=row.clip,
    )  # fmt: skip
    assert distill.optim.base_lr * distill.batch_size / REFERENCE_BATCH == pytest.approx(row.effective_lr)
    assert (distill.loss, distill.beta, distill.target, distill.whiten) == ("smooth_l1", 2.0, "map", True)
    assert (distill.cls_weight, distill.ema_decay, distill.also) == (1.0, 0.0, ())
    assert extract.whitening == LayerNorm()


@pytest.mark.parametrize("name", AUTHORS)
def test_fine_tuning_is_that_of_the_authors(name: str) -> None:
    _, row = AUTHORS[name]
    cfg = load_preset(name).finetune
    assert (cfg.epochs, cfg.layer_decay, cfg.drop_path, cfg.batch_size) == (
        row.epochs, row.layer_decay, row.drop_path, row.batch,
    )  # fmt: skip
    assert cfg.optim == OptimConfig(
        base_lr=row.base_lr, warmup_lr=row.warmup_lr, min_lr=row.min_lr, warmup_epochs=row.warmup, weight_decay=0.05,
        clip_grad=5.0,
    )  # fmt: skip
    assert cfg.optim.base_lr * cfg.batch_size / REFERENCE_BATCH == pytest.approx(row.effective_lr)
    assert (cfg.label_smoothing, cfg.renderer.kernel) == (0.1, "bicubic")
    assert (cfg.sampler, cfg.eval_sampler) == (RandomResizedCrop(min_scale=0.08), CentreCrop(fraction=0.875))


def test_swinv2_g_is_esvit_with_another_network_on_both_sides() -> None:
    """Its recipe is not published; what is assumed is one step from one that is."""
    esvit, giant = load_preset("esvit-b-300ep"), load_preset("swinv2-g-300ep")
    assert (giant.extract.teacher, giant.distill.student) == ("swinv2-g", STUDENTS["swinv2-g"])
    assert giant.finetune == esvit.finetune
    assert giant.extract.model_copy(update={"teacher": "esvit-b"}) == esvit.extract
    same = {"student": esvit.distill.student, "run": esvit.distill.run}
    assert giant.distill.model_copy(update=same) == esvit.distill
    assert (giant.distill.run.strategy, giant.distill.run.checkpoint_activations) == ("fsdp", True)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_fits_together(name: str) -> None:
    """Its student has its teacher's grid, and its name is its own."""
    config = load_preset(name)
    assert config.preset == name
    assert config.data.path is None, "a preset says nothing about anybody's data"
    teacher = find_teacher(config.extract.teacher)
    student = config.distill.student
    with torch.device("meta"):
        layout = find_layout(build_student(student, drop_path=0.1), student.input_px, name)
    features = teacher.feature_spec(config.extract.input_px)
    assert layout.grid_hw == features.grid_hw
    assert layout.has_cls or not features.num_prefix_tokens, "no token of the teacher's is left out"
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
