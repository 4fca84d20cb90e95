"""The student: timm's `Beit`, which equals the authors' ViT student, or any other network of timm's; and the projectors
that are thrown away later.

With the same random weights, timm's ViT-B, ViT-L and SwinV2-B gave what the authors' networks give: at most 2.1e-6,
4.1e-6 and 0 apart in values up to 5 (float32, CPU). Where timm's begin otherwise, `initial_weights` mends it. Left as
they are: timm pads maps that a window of SwinV2 does not divide, where the authors' code refuses them; and only theirs
can share one position MLP in each stage, add absolute positions to SwinV2, or learn a bias of keys (which changes
nothing, see `authors`).
"""

import re
from collections.abc import Sequence
from typing import Any, cast

import timm
import torch
from timm.layers import DropPath
from timm.models.beit import Beit
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from distill.initial_weights import begin_beit, begin_swinv2
from distill.student_config import BeitStudent, StudentConfig, TimmStudent
from distill.token_grid import GridResampler, check_grids
from distill.token_layout import find_layout, student_tokens
from storage.errors import ConfigError, first_line, unknown_name
from storage.records import FeatureSpec

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""The student's input statistics in every stage, whatever the teacher's were."""
_POSITIONS = {
    "shared": {"use_shared_rel_pos_bias": True},
    "per_block": {"use_rel_pos_bias": True},
    "absolute": {"use_abs_pos_emb": True},
}
_UNKNOWN_ARGUMENTS = re.compile(r"(?<=['\"])\w+(?=['\"])")
"""The quoted names in Python's, and timm's, complaint about arguments that a function does not have."""


def build_student(cfg: StudentConfig, *, drop_path: float) -> Any:
    """A student from random weights: timm's own module, so that its tensors have timm's names.

    Raises:
        ConfigError: timm has no such network, or not with these arguments.
    """
    if isinstance(cfg, BeitStudent):
        student = build_beit(cfg, drop_path=drop_path, num_classes=0, global_pool="")
        begin_beit(student)
        return student
    return build_timm(cfg, drop_path=drop_path, num_classes=0, global_pool="")


def build_beit(cfg: BeitStudent, *, drop_path: float, num_classes: int, global_pool: str) -> Beit:
    """A ViT with the positions of `cfg`; whoever asks for it chooses its initial weights."""
    positions = dict.fromkeys(("use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias"), False)
    return Beit(
        img_size=cfg.input_px, patch_size=cfg.patch_px, embed_dim=cfg.width, depth=cfg.depth, num_heads=cfg.heads,
        mlp_ratio=cfg.mlp_ratio, init_values=cfg.layer_scale or None, drop_path_rate=drop_path,
        num_classes=num_classes, global_pool=global_pool, **(positions | _POSITIONS[cfg.positions]),
    )  # fmt: skip


def build_timm(cfg: TimmStudent, *, drop_path: float, num_classes: int, global_pool: str | None) -> nn.Module:
    """Any network of timm's. SwinV2 begins as the authors' does, all others as timm has it.

    Args:
        global_pool: None leaves timm's own.

    Raises:
        ConfigError: timm has no such network, or not with these arguments.
    """
    if not timm.is_model(cfg.model.partition(".")[0]):
        raise unknown_name("timm model", cfg.model, timm.list_models())
    wanted = {"img_size": cfg.input_px, "drop_path_rate": drop_path}
    student = _create(cfg, wanted | ({} if global_pool is None else {"global_pool": global_pool}), num_classes)
    if isinstance(student, SwinTransformerV2):
        begin_swinv2(student)
    return student


def _create(cfg: TimmStudent, wanted: dict[str, Any], num_classes: int) -> nn.Module:
    """`timm.create_model` with those of the wanted arguments that the network takes."""
    arguments = wanted | cfg.arguments
    while True:
        try:
            student: nn.Module = timm.create_model(cfg.model, pretrained=False, num_classes=num_classes, **arguments)
        except TypeError as error:
            unknown = set(_UNKNOWN_ARGUMENTS.findall(str(error)))
            if not unknown or not unknown <= wanted.keys() & arguments.keys():
                raise _refused(cfg, error) from error
            arguments = {name: value for name, value in arguments.items() if name not in unknown}
        except (AssertionError, KeyError, RuntimeError, ValueError) as error:
            if arguments.pop("global_pool", None) is None:  # some networks only know theirs
                raise _refused(cfg, error) from error
        else:
            return student


def _refused(cfg: TimmStudent, error: Exception) -> ConfigError:
    return ConfigError(
        f"timm does not build {cfg.model} at {cfg.input_px} px with {cfg.arguments or 'no further arguments'}: "
        f"{first_line(error)}; change distill.student.arguments or distill.student.input_px"
    )


class DistillModel(nn.Module):
    """A student with one linear layer a teacher, which maps its tokens to that teacher's width (a 1x1 convolution in
    the paper)."""

    def __init__(
        self, cfg: StudentConfig, teachers: Sequence[FeatureSpec], *, drop_path: float, grid: str = "same"
    ) -> None:
        """
        Args:
            grid: `same` refuses grids that differ, `resample` brings the student's predictions to each teacher's.

        Raises:
            ConfigError: timm does not build this student, or the grids differ.
        """
        super().__init__()
        self.student = build_student(cfg, drop_path=drop_path)
        self.layout = find_layout(self.student, cfg.input_px, cfg.label)
        for features in teachers:
            if grid == "same":
                check_grids(cfg, self.layout.grid_hw, features)
        width = self.layout.width
        self.projectors = nn.ModuleList(nn.Linear(width, features.channels) for features in teachers)
        self.resamplers = nn.ModuleList(GridResampler(self.layout.grid_hw, each.grid_hw) for each in teachers)
        self.has_cls = tuple(self.layout.has_cls and features.num_prefix_tokens > 0 for features in teachers)
        """For each teacher: whether its predictions begin with a CLS token, which both must have."""
        self.notes = tuple(self._notes(teachers, drop_path))
        """What the user should know about how this student learns, a line each."""

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Predicted whitened tokens (B, T, C) for each teacher: those that `select_targets` keeps of the teacher's."""
        tokens_BTC = student_tokens(self.student, images_BCHW)
        grid_BTC = tokens_BTC[:, self.layout.num_prefix_tokens :]
        with_cls_BTC = torch.cat([tokens_BTC[:, :1], grid_BTC], dim=1) if any(self.has_cls) else grid_BTC
        return tuple(
            _predict(with_cls_BTC if has_cls else grid_BTC, projector, resampler)
            for projector, resampler, has_cls in zip(self.projectors, self.resamplers, self.has_cls, strict=True)
        )

    def _notes(self, teachers: Sequence[FeatureSpec], drop_path: float) -> list[str]:
        notes = [
            f"the student's {_size(self.layout.grid_hw)} predictions are resampled to the {_size(features.grid_hw)} "
            f"tokens of {features.teacher}"
            for features in teachers
            if features.grid_hw != self.layout.grid_hw
        ]
        notes += [
            f"the student has no CLS token, so that of {features.teacher} is not learnt"
            for features in teachers
            if features.num_prefix_tokens and not self.layout.has_cls
        ]
        if drop_path and not any(isinstance(module, DropPath) for module in self.student.modules()):
            notes.append(f"timm's network has no drop path, so distill.drop_path={drop_path} does nothing")
        return notes


def _predict(tokens_BTC: Tensor, projector: nn.Module, resampler: nn.Module) -> Tensor:
    """Both steps are linear and commute, so the grid is resampled where it has fewer channels."""
    if tokens_BTC.shape[2] <= cast(nn.Linear, projector).out_features:
        return cast(Tensor, projector(resampler(tokens_BTC)))
    return cast(Tensor, resampler(projector(tokens_BTC)))


def _size(grid_hw: tuple[int, int]) -> str:
    return f"{grid_hw[0]}x{grid_hw[1]}"


def checkpoint_activations(student: Any) -> None:
    """Let a student's blocks compute their activations again in the backward pass instead of keeping them.

    Raises:
        ConfigError: timm cannot do that with this network.
    """
    try:
        student.set_grad_checkpointing(True)
    except (AssertionError, AttributeError) as error:
        raise ConfigError(
            f"timm cannot checkpoint the activations of {type(student).__name__}; set "
            "distill.run.checkpoint_activations=false, and distill.run.accumulate above 1 to need less memory"
        ) from error


def normalise_images(pixels_BHWC: Tensor, device: torch.device) -> Tensor:
    """uint8 pixels to the student's input, (B, 3, H, W) float32 on `device`."""
    images_BCHW = pixels_BHWC.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return images_BCHW.sub_(mean).div_(std)
