"""The student: timm's `Beit`, which equals the authors' ViT student, with the projector that is thrown away later."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.beit import Beit
from torch import Tensor, nn

from distill.student_config import StudentConfig
from storage.errors import ConfigError
from storage.records import FeatureSpec

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""The student's input statistics in every stage, whatever the teacher's were."""


def build_student(cfg: StudentConfig, *, drop_path: float, **variant: Any) -> Beit:
    """A student from random weights. By default it gives all tokens through its final norm, CLS first.

    Args:
        variant: other arguments of timm's `Beit`, as fine-tuning needs them (classes, pooling, a table in each block).
    """
    arguments: dict[str, Any] = {
        "num_classes": 0, "global_pool": "", "use_shared_rel_pos_bias": True, "use_rel_pos_bias": False,
    } | variant  # fmt: skip
    return Beit(
        img_size=cfg.input_px, patch_size=cfg.patch_px, embed_dim=cfg.width, depth=cfg.depth, num_heads=cfg.heads,
        mlp_ratio=cfg.mlp_ratio, init_values=cfg.layer_scale or None, use_abs_pos_emb=False, drop_path_rate=drop_path,
        **arguments,
    )  # fmt: skip


class DistillModel(nn.Module):
    """A student with one linear layer a teacher, which maps its tokens to that teacher's width (a 1x1 convolution in
    the paper)."""

    def __init__(
        self, cfg: StudentConfig, teachers: Sequence[FeatureSpec], *, drop_path: float, grid: str = "same"
    ) -> None:
        """
        Raises:
            ConfigError: the grids differ.
        """
        super().__init__()
        for features in teachers:
            check_grids(cfg, features)
        self.student = build_student(cfg, drop_path=drop_path)
        self.projectors = nn.ModuleList(nn.Linear(cfg.width, features.channels) for features in teachers)
        self.has_cls = tuple(features.num_prefix_tokens > 0 for features in teachers)
        """For each teacher: whether its predictions begin with a CLS token, which both must have."""

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Predicted whitened tokens (B, T, C) for each teacher: those that `select_targets` keeps of the teacher's."""
        tokens_BTC = self.student.forward_features(images_BCHW)
        return tuple(
            projector(tokens_BTC if has_cls else tokens_BTC[:, self.student.num_prefix_tokens :])
            for projector, has_cls in zip(self.projectors, self.has_cls, strict=True)
        )


def check_grids(cfg: StudentConfig, features: FeatureSpec) -> None:
    """Refuse a student whose token grid is not the teacher's.

    Raises:
        ConfigError: names the input size that would fit.
    """
    if cfg.grid_hw != features.grid_hw:
        fitting = features.grid_hw[0] * cfg.patch_px
        raise ConfigError(
            f"the student's grid is {cfg.grid_hw[0]}x{cfg.grid_hw[1]} ({cfg.input_px} px, patch {cfg.patch_px}), the "
            f"store of {features.teacher!r} has {features.grid_hw[0]}x{features.grid_hw[1]}; "
            f"set distill.student.input_px={fitting}"
        )


def normalise_images(pixels_BHWC: Tensor, device: torch.device) -> Tensor:
    """uint8 pixels to the student's input, (B, 3, H, W) float32 on `device`."""
    images_BCHW = pixels_BHWC.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return images_BCHW.sub_(mean).div_(std)
