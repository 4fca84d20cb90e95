"""How students begin, as in the authors' code; timm begins its networks a little otherwise.

Weights of linear layers and of the patch embedding are normal with deviation 0.02, cut off; their biases are 0. The
last layer of both branches of block n is divided by sqrt(2 n). What the authors' files do not touch stays as timm has
it: LayerScale, zero position tables, the scale of cosine attention.

Source: models/vision_transformer.py, feature_distillation.py and swin_transformer_v2.py.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

STD = 0.02
CUT_OFF = STD
"""Distillation cuts off a ViT's normal distribution at one deviation (`_trunc_normal_` with a=-std, b=std), so that the
real deviation of its weights is 0.0108. Fine-tuning does not, nor does either for SwinV2: they cut at 2, which is a
hundred deviations."""
POST_NORM_GAIN = 1e-5
"""Of the norms that end SwinV2's branches; timm has 0."""


@torch.no_grad()
def begin_beit(student: Beit, *, cut_off: float | None = CUT_OFF) -> None:
    """Give a ViT student the authors' initial weights.

    Args:
        cut_off: largest absolute value of a weight, before the division; None for none.
    """
    _begin_layers(student, cut_off)
    _draw(student.cls_token, cut_off)
    if student.pos_embed is not None:
        _draw(student.pos_embed, cut_off)
    _divide_last_layers(student.blocks)
    if isinstance(student.head, nn.Linear):
        student.head.weight.mul_(student.head_init_scale)


@torch.no_grad()
def begin_swinv2(student: SwinTransformerV2) -> None:
    """Give a SwinV2 student the authors' initial weights: its branches begin as almost nothing."""
    _begin_layers(student, None)
    stages: Any = student.layers
    blocks = [block for stage in stages for block in stage.blocks]
    _divide_last_layers(blocks)
    for block in blocks:
        nn.init.constant_(block.norm1.weight, POST_NORM_GAIN)
        nn.init.constant_(block.norm2.weight, POST_NORM_GAIN)


def _begin_layers(student: nn.Module, cut_off: float | None) -> None:
    for module in student.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            _draw(module.weight, cut_off)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _draw(tensor: Tensor, cut_off: float | None) -> None:
    if cut_off is None:
        tensor.normal_(std=STD)
        return
    share = math.erf(cut_off / STD / math.sqrt(2))  # of a normal distribution that is not cut off
    tensor.uniform_(-share, share).erfinv_().mul_(STD * math.sqrt(2)).clamp_(-cut_off, cut_off)


def _divide_last_layers(blocks: Iterable[Any]) -> None:
    for number, block in enumerate(blocks, start=1):
        block.attn.proj.weight.div_(math.sqrt(2 * number))
        block.mlp.fc2.weight.div_(math.sqrt(2 * number))
