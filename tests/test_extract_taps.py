"""What is tapped of each family of timm's networks, against its forward pass written out block by block.

The rows' own networks, made small: the options of a row are those of timm's builder.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from extract.backends import load_teacher
from extract.spec import TeacherSpec
from extract.teacher import Teacher
from extract.teachers import find_teacher
from storage.errors import ConfigError

Written = Callable[[Any, Tensor, int], Tensor]
"""A network, normalised images and a block to that block's tokens, before any norm."""


def small(name: str, input_px: int, channels: int, **options: Any) -> TeacherSpec:
    row = find_teacher(name)
    changes: dict[str, Any] = {"input_px": input_px, "channels": channels, "options": row.options | options}
    if row.stage_channels:
        widths = tuple(channels * width // row.channels for width in row.stage_channels)
        changes |= {"stage_channels": widths}
    return row.model_copy(update=changes)


def load(spec: TeacherSpec, **arguments: Any) -> Teacher:
    """With norms that do something: weights of 1 would hide one that was left out, after whitening at the latest."""
    teacher = load_teacher(spec, weights="random", device="cpu", **arguments)
    torch.manual_seed(5)
    for name, parameter in teacher.module.named_parameters():
        if "norm" in name and parameter.ndim == 1:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    return teacher


def some_pixels(side: int, count: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normalise(pixels: Tensor, spec: TeacherSpec) -> Tensor:
    """uint8 pixels to what a network wants, one channel after the other."""
    planes = [(pixels[..., c].float() / 255 - spec.mean[c]) / spec.std[c] for c in range(3)]
    return torch.stack(planes, dim=1)


# ---- forward passes --------------------------------------------------------------------------------------------------


def vit(model: Any, images: Tensor, block: int) -> Tensor:
    grid = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
    grid = model.patch_embed.norm(grid)
    prefix = [t.expand(len(grid), -1, -1) for t in (model.cls_token, model.reg_token) if t is not None]
    places = model.pos_embed
    if model.no_embed_class:  # places are for the grid alone
        tokens = torch.cat([*prefix, grid + places], dim=1)
    else:
        tokens = torch.cat([*prefix, grid], dim=1) + places
    tokens = model.norm_pre(tokens)
    for layer in model.blocks[: block + 1]:
        tokens = layer(tokens)
    return tokens


def eva(model: Any, images: Tensor, block: int) -> Tensor:
    grid = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
    prefix = [t.expand(len(grid), -1, -1) for t in (model.cls_token, model.reg_token) if t is not None]
    tokens = torch.cat([*prefix, grid], dim=1)
    tokens = tokens if model.pos_embed is None else tokens + model.pos_embed
    side = model.patch_embed.grid_size
    places = model.rope.get_embed(list(side)) if model.rope is not None else None
    for layer in model.norm_pre and model.blocks[: block + 1]:
        tokens = layer(tokens, rope=places)
    return tokens


def swin(model: Any, images: Tensor, block: int) -> Tensor:
    map_BHWC = model.patch_embed.norm(model.patch_embed.proj(images).permute(0, 2, 3, 1))
    for stage in model.layers[: block + 1]:
        map_BHWC = stage(map_BHWC)
    return map_BHWC.flatten(1, 2)


def swin_cr(model: Any, images: Tensor, block: int) -> Tensor:
    map_BCHW = model.patch_embed(images)
    for stage in model.stages[: block + 1]:
        map_BCHW = stage(map_BCHW)
    return map_BCHW.permute(0, 2, 3, 1).flatten(1, 2)


def convnext(model: Any, images: Tensor, block: int) -> Tensor:
    map_BCHW = model.stem(images)
    for stage in model.stages[: block + 1]:
        map_BCHW = stage(map_BCHW)
    return map_BCHW.permute(0, 2, 3, 1).flatten(1, 2)


def efficientnet(model: Any, images: Tensor, block: int) -> Tensor:
    """A stage ends where the next block halves the map: here behind blocks 0, 1, 2, 4 and 6."""
    map_BCHW = model.bn1(model.conv_stem(images))
    for stage in model.blocks[: (1, 2, 3, 5, 7)[block]]:
        map_BCHW = stage(map_BCHW)
    return map_BCHW.permute(0, 2, 3, 1).flatten(1, 2)


def sam(model: Any, images: Tensor, block: int) -> Tensor:
    map_BHWC = model.patch_embed.proj(images).permute(0, 2, 3, 1) + model.pos_embed
    for layer in model.blocks[: block + 1]:
        map_BHWC = layer(map_BHWC)
    return map_BHWC.flatten(1, 2)


_TINY_VIT = {"depth": 3, "embed_dim": 64, "num_heads": 2}
_TINY_SWIN = {"depths": (1, 1, 2, 1), "embed_dim": 16, "num_heads": (1, 2, 4, 8)}
_TINY_CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 128)}

FAMILIES: dict[str, tuple[TeacherSpec, Written]] = {
    "vit": (small("dino-b", 48, 64, **_TINY_VIT), vit),
    "vit with registers": (small("dinov2-b-reg", 42, 64, **_TINY_VIT), vit),
    "siglip": (small("siglip2-b", 48, 64, **_TINY_VIT), vit),
    "aimv2": (small("aimv2-l", 42, 64, **_TINY_VIT), vit),
    "radio": (small("radio-b", 48, 64, **_TINY_VIT), vit),
    "dinov3": (small("dinov3-b", 48, 64, **_TINY_VIT), eva),
    "eva02": (small("eva02-l", 42, 64, **_TINY_VIT), eva),
    "eva02 clip": (small("eva02-clip-l", 42, 64, **_TINY_VIT), eva),
    "swin": (small("swin-b", 64, 128, **_TINY_SWIN), swin),
    "esvit": (small("esvit-b", 224, 128, **_TINY_SWIN), swin),
    "swin v2": (small("swinv2-b", 64, 128, **_TINY_SWIN, window_size=4), swin),
    "swin v2 cr": (small("swinv2-g", 64, 128, **_TINY_SWIN), swin_cr),
    "convnext v2": (small("convnextv2-b", 64, 128, **_TINY_CONVNEXT), convnext),
    "efficientnet": (find_teacher("efficientnet-lite0").at(input_px=64), efficientnet),
    "sam": (small("sam-b", 64, 64, **_TINY_VIT, global_attn_indexes=(1,), window_size=2), sam),
}
"""By name: a small network and its forward pass."""

WITHOUT_FINAL_NORM = {"radio", "swin v2 cr", "convnext v2", "efficientnet", "sam"}


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> tuple[TeacherSpec, Written]:
    return FAMILIES[request.param]


def check(spec: TeacherSpec, written: Written, norm: Callable[[Any], Any] | None = None) -> None:
    """A teacher's tokens are the written ones, through `norm` of its module."""
    teacher, pixels = load(spec), some_pixels(spec.input_px)
    count = len(teacher.module.feature_info)  # type: ignore[arg-type]
    with torch.inference_mode():
        expected = written(teacher.module, normalise(pixels, spec), spec.block % count)
        expected = norm(teacher.module)(expected) if norm else expected
    tokens = teacher(pixels)
    assert tuple(tokens.shape[1:]) == spec.feature_spec().shape_TC
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


def test_the_rows_tap_is_the_last_block_through_the_networks_own_final_norm(
    family: tuple[TeacherSpec, Written],
) -> None:
    spec, written = family
    name = next(name for name, found in FAMILIES.items() if found is family)
    assert (spec.tap == "block") == (name in WITHOUT_FINAL_NORM)
    norm_name = (
        "fc_norm" if name == "eva02" else "norm"
    )  # timm pools before EVA-02's, which upstream has on every token
    check(spec, written, None if spec.tap == "block" else lambda model: getattr(model, norm_name))


@pytest.mark.parametrize("block", [-1, -2, 0])
def test_any_block_as_it_is(family: tuple[TeacherSpec, Written], block: int) -> None:
    spec, written = family
    check(spec.at(tap="block", block=block), written)


def test_an_earlier_block_of_a_vit_goes_through_the_final_norm_too() -> None:
    for name in ("vit", "dinov3"):
        spec, written = FAMILIES[name]
        check(spec.at(block=1), written, lambda model: model.norm)


def test_esvits_third_stage_is_the_same_networks_and_before_its_final_norm() -> None:
    spec, written = FAMILIES["esvit"]
    stage3 = small("esvit-b-stage3", 224, 64, **_TINY_SWIN).model_copy(update={"stage_channels": spec.stage_channels})
    assert stage3.feature_spec().shape_TC == (14 * 14, 64)
    check(stage3, written)
    assert load(stage3).fingerprint == load(spec).fingerprint


def test_swinv2_gs_last_block_ends_in_its_final_norm() -> None:
    """timm has no norm behind the stages; its last block's tokens are what that norm makes of its sum."""
    spec, _ = FAMILIES["swin v2 cr"]
    teacher = load_teacher(spec, weights="random", device="cpu")
    last: Any = teacher.module.stages[-1].blocks[-1]  # type: ignore[index,union-attr]
    assert isinstance(last.norm3, nn.LayerNorm)
    before_norm: list[Tensor] = []
    last.norm3.register_forward_pre_hook(lambda _, inputs: before_norm.append(inputs[0]))
    tokens = teacher(some_pixels(64))
    expected = nn.functional.layer_norm(before_norm[0], (128,), eps=last.norm3.eps).reshape(tokens.shape)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


# ---- nothing that no token depends on --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "dinov3", "swin", "convnext v2", "sam"])
def test_blocks_after_the_tapped_one_are_not_run(name: str) -> None:
    spec, _ = FAMILIES[name]
    teacher = load(spec.at(tap="block", block=1))
    layers: Any = next(getattr(teacher.module, n) for n in ("blocks", "layers", "stages") if hasattr(teacher.module, n))
    ran: list[int] = []
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    teacher(some_pixels(spec.input_px))
    assert ran == [0, 1]


def test_a_head_is_no_part_of_who_a_teacher_is(family: tuple[TeacherSpec, Written]) -> None:
    spec, _ = family
    names = set(load(spec).module.state_dict())
    if spec.state_keys == "by_name":  # EfficientNet-Lite's file is matched as a whole
        assert not [name for name in names if name.startswith(("head.fc", "head.weight", "attn_pool", "classifier"))]


# ---- what cannot be tapped -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(WITHOUT_FINAL_NORM))
def test_a_final_norm_that_is_not_there_is_refused(name: str) -> None:
    spec, _ = FAMILIES[name]
    with pytest.raises(ConfigError, match=rf"teacher '{spec.name}' has no final norm .* use extract\.tap=block"):
        load(spec.at(tap="final_norm"))


@pytest.mark.parametrize("block", [3, -4])
def test_a_block_that_is_not_there_is_refused_with_the_count(block: int) -> None:
    spec, _ = FAMILIES["vit"]
    with pytest.raises(ConfigError, match=rf"has 3 blocks; extract\.block can be 0 to 2, or -1 to -3 .* found {block}"):
        load(spec.at(block=block))


def test_a_size_that_the_patch_does_not_divide_is_refused() -> None:
    spec, _ = FAMILIES["dinov3"]
    with pytest.raises(ConfigError, match=r"patches of 16 px, which do not divide extract\.input_px=50; take 48"):
        spec.at(input_px=50)


# ---- lower precisions ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch's own, about its RMS norm
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_every_family_runs_in_lower_precision(family: tuple[TeacherSpec, Written], precision: str) -> None:
    spec, _ = family
    teacher, pixels = load(spec, precision=precision), some_pixels(spec.input_px)
    fast, exact = teacher(pixels), teacher.in_float32(pixels)
    assert fast.dtype == torch.float32
    similar = nn.functional.cosine_similarity(fast.flatten(1), exact.flatten(1))
    assert similar.min() > 0.99
    assert not torch.equal(fast, exact)


def test_swinv2_g_runs_at_its_full_width_in_bfloat16() -> None:
    """One block a stage of its 2, 2, 42 and 4: 0.28 10^9 parameters."""
    spec = find_teacher("swinv2-g").model_copy(update={"options": {"depths": (1, 1, 1, 1)}})
    teacher = load_teacher(spec, weights="random", device="cpu", precision="bfloat16")
    pixels = some_pixels(224, 1)
    tokens, exact = teacher(pixels), teacher.in_float32(pixels)
    assert tokens.shape == (1, 49, 4096)
    assert nn.functional.cosine_similarity(tokens, exact, dim=-1).min() > 0.99
