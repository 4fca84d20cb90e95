"""SwinV2 against its forward pass written out, token by token, and how it begins."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.student import build_student
from distill.token_layout import student_tokens
from tests.fixtures.students import SWINV2, shake, some_images


def swinv2_bias(attention: Any, window: int, query: int, key: int) -> Tensor:
    """The position bias of one pair of tokens in a window: an MLP of the log-spaced distance, between 0 and 16."""
    (y, x), (v, u) = divmod(query, window), divmod(key, window)
    apart = torch.tensor([y - v, x - u]) * 8.0 / (window - 1)
    logarithmic = apart.sign() * (apart.abs() + 1).log2() / 3
    return 16 * torch.sigmoid(attention.cpb_mlp[2].weight @ F.relu(attention.cpb_mlp[0](logarithmic)))


def swinv2_window(attention: Any, tokens_TC: Tensor, window: int, region_T: Tensor) -> Tensor:
    """Cosine attention inside one window, among tokens that are neighbours in the image."""
    count, width = tokens_TC.shape
    heads = len(attention.logit_scale)
    bias = torch.cat([attention.q_bias, torch.zeros(width), attention.v_bias])
    query, key, value = ((tokens_TC @ attention.qkv.weight.T + bias).view(count, 3, heads, -1)).unbind(1)
    bias_TTH = torch.stack([torch.stack([swinv2_bias(attention, window, q, k) for k in range(count)])
                            for q in range(count)])  # fmt: skip
    mixed = []
    for head in range(heads):
        cosine = F.cosine_similarity(query[:, None, head], key[None, :, head], dim=-1)
        scores = cosine * attention.logit_scale[head].exp().clamp(max=100) + bias_TTH[:, :, head]
        scores = scores.masked_fill(region_T[:, None] != region_T[None], float("-inf"))
        mixed.append(scores.softmax(-1) @ value[:, head])
    projected: Tensor = attention.proj(torch.cat(mixed, dim=1))
    return projected


def swinv2_attend(attention: Any, map_HWC: Tensor, window: int, shift: int) -> Tensor:
    """Attention in windows that lie `shift` further down and right; what wraps around the edge is another region."""
    side = len(map_HWC)
    found = torch.empty_like(map_HWC)
    for top in range(shift, side + shift, window):
        for left in range(shift, side + shift, window):
            rows = [row for row in range(top, top + window) for _ in range(window)]
            columns = list(range(left, left + window)) * window
            region = torch.tensor(
                [2 * (row >= side) + (column >= side) for row, column in zip(rows, columns, strict=True)]
            )
            at = [row % side for row in rows], [column % side for column in columns]
            found[at] = swinv2_window(attention, map_HWC[at], window, region)
    return found


def swinv2_plainly(student: Any, image_CHW: Tensor, window: int) -> Tensor:
    """Res-post-norm: each branch ends with a norm. Patches are merged 2 x 2 in front of all stages but the first."""

    def norm(layer: Any, values: Tensor) -> Tensor:
        return F.layer_norm(values, values.shape[-1:], layer.weight, layer.bias, 1e-5)

    map_HWC = norm(student.patch_embed.norm, student.patch_embed.proj(image_CHW[None])[0].permute(1, 2, 0))
    for number, stage in enumerate(student.layers):
        if number:
            quarters = [map_HWC[y::2, x::2] for x in (0, 1) for y in (0, 1)]
            map_HWC = norm(stage.downsample.norm, torch.cat(quarters, dim=-1) @ stage.downsample.reduction.weight.T)
        for index, block in enumerate(stage.blocks):
            own = min(window, len(map_HWC))
            shift = own // 2 if index % 2 and own < len(map_HWC) else 0
            map_HWC = map_HWC + norm(block.norm1, swinv2_attend(block.attn, map_HWC, own, shift))
            map_HWC = map_HWC + norm(block.norm2, block.mlp.fc2(F.gelu(block.mlp.fc1(map_HWC))))
    return norm(student.norm, map_HWC).flatten(0, 1)


def test_swinv2_is_the_authors() -> None:
    """Maps of 16, 8 and 4 with windows of 4: shifted ones in the first two stages, one window in the last."""
    student = shake(build_student(SWINV2, drop_path=0.3)).eval()
    images = some_images()
    with torch.no_grad():
        found = student_tokens(student, images)
        expected = torch.stack([swinv2_plainly(student, image, 4) for image in images])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_how_swinv2_begins() -> None:
    student: Any = build_student(SWINV2, drop_path=0)
    blocks = [block for stage in student.layers for block in stage.blocks]
    for number, block in enumerate(blocks, start=1):
        for norm in (block.norm1, block.norm2):
            assert (norm.weight == 1e-5).all()
            assert (norm.bias == 0).all()
        assert not {"k_bias", "attn.k_bias"} & set(block.state_dict())
        assert torch.allclose(block.attn.logit_scale.exp(), torch.tensor(10.0))
        std = float(block.mlp.fc2.weight.detach().std()) * math.sqrt(2 * number)
        assert std == pytest.approx(0.02, rel=0.2)
    for layer in (student.patch_embed.proj, student.layers[1].downsample.reduction):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.2)
