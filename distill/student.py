"""The student: timm's `Beit`, which equals the authors' ViT student, with the projector that is thrown away later."""

from typing import Any

import torch
from timm.models.beit import Beit
from torch import Tensor, nn

from distill.config import StudentConfig
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
    """A student and the linear layer that maps its tokens to the teacher's width (a 1x1 convolution in the paper)."""

    def __init__(self, cfg: StudentConfig, features: FeatureSpec, *, drop_path: float) -> None:
        """
        Raises:
            ConfigError: the grids differ.
        """
        super().__init__()
        check_grids(cfg, features)
        self.student = build_student(cfg, drop_path=drop_path)
        self.projector = nn.Linear(cfg.width, features.channels)
        self.teacher_prefix = features.num_prefix_tokens

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Predicted whitened tokens, (B, T, C): those that `select_targets` keeps of the teacher's."""
        tokens_BTC = self.student.forward_features(images_BCHW)
        if self.teacher_prefix == 0:
            tokens_BTC = tokens_BTC[:, self.student.num_prefix_tokens :]
        pred_BTC: Tensor = self.projector(tokens_BTC)
        return pred_BTC


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
