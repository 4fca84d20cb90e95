"""Plain ViTs and CLIP: the upstream's network in plain torch, in its own file, gives the tokens of the table."""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from extract.backends import load_teacher
from extract.spec import TeacherSpec
from extract.weights import tensor_fingerprint
from storage.errors import InputError
from tests.fixtures.upstream import (
    CLIP_STATISTICS,
    State,
    assert_same_tokens,
    prefixed,
    resized,
    save,
    small_row,
    with_random_weights,
)  # fmt: skip
from tests.fixtures.upstream_clip import CLIP
from tests.fixtures.upstream_vit import DINOv3, ViT

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::DeprecationWarning")

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 4}


def small_vit(name: str, patch: int = 16, depth: int = 2, **kind: Any) -> tuple[nn.Module, TeacherSpec]:
    """A network of four by four patches, and its row."""
    network = with_random_weights(ViT(4 * patch, patch, 48, depth, 4, **kind))
    return network, small_row(name, network, input_px=4 * patch, channels=48, **SMALL | {"depth": depth})


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(8))


def other(state: State) -> State:
    """A second network of the same shapes, which must not be taken."""
    return {name: tensor + 1 for name, tensor in state.items()}


# ---- DINO, DeiT, MAE -------------------------------------------------------------------------------------------------

DINO_HEAD = {"head.mlp.0.weight": noise(8, 48), "head.mlp.0.bias": noise(8), "head.last_layer.weight_g": noise(8, 1)}
SETTINGS = argparse.Namespace(arch="vit_base", lr=np.float64(5e-4), epochs=100, seed=None)


def dino_checkpoint(state: State) -> Any:
    return {
        "student": prefixed(prefixed(other(state), "backbone.") | DINO_HEAD, "module."),
        "teacher": prefixed(state, "backbone.") | DINO_HEAD, "optimizer": {"state": {0: {"step": 3}}},
        "epoch": 100, "args": SETTINGS, "dino_loss": {"center": noise(1, 8)},
    }  # fmt: skip


MAE_DECODER = {
    "mask_token": noise(1, 1, 16), "decoder_pos_embed": noise(1, 17, 16), "decoder_embed.weight": noise(16, 48),
    "decoder_blocks.0.attn.qkv.weight": noise(48, 16), "decoder_norm.weight": noise(16), "decoder_pred.bias": noise(9),
}  # fmt: skip

FILES: dict[str, tuple[str, Callable[[State], Any]]] = {
    "DINO, backbone": ("dino-b", lambda state: state),
    "DINO, whole checkpoint": ("dino-b", dino_checkpoint),
    "DINO, on several GPUs": ("dino-b", lambda state: {"teacher": prefixed(prefixed(state, "backbone."), "module.")}),
    "DeiT": ("deit-b", lambda state: {"model": state | {"head.weight": noise(10, 48), "head.bias": noise(10)}}),
    "MAE, encoder": ("mae-b", lambda state: {"model": state}),
    "MAE, with its decoder": ("mae-b", lambda state: {"model": state | MAE_DECODER, "args": SETTINGS, "epoch": 1}),
    "in half precision": ("dino-b", lambda state: {name: tensor.half() for name, tensor in state.items()}),
}


@pytest.mark.parametrize("kind", FILES)
def test_plain_vits(kind: str, tmp_path: Path) -> None:
    row, wrap = FILES[kind]
    network, spec = small_vit(row)
    if kind == "in half precision":
        network.half().float()
    path = save(wrap(network.state_dict()), tmp_path / "weights.pth")
    assert_same_tokens(spec, path, copy.deepcopy(network).double())
    assert load_teacher(spec, weights=path, device="cpu").fingerprint == tensor_fingerprint(network.state_dict())


def test_a_vit_of_full_depth(tmp_path: Path) -> None:
    network, spec = small_vit("dino-b", depth=12)
    assert_same_tokens(spec, save(network.state_dict(), tmp_path / "weights.pth"), network.double())


def test_positions_on_another_grid(tmp_path: Path) -> None:
    network, spec = small_vit("dino-b")
    path = save(network.state_dict(), tmp_path / "weights.pth")
    positions = network.pos_embed.data
    network.pos_embed.data = torch.cat([positions[:, :1], resized(positions[:, 1:], 6)], dim=1)
    assert_same_tokens(spec.at(input_px=96), path, network.double())


def test_heads_are_left_out_only_where_the_row_says_so(tmp_path: Path) -> None:
    network, spec = small_vit("dino-b")
    state = network.state_dict()
    for name in ("header.weight", "decoder_pred.weight", "blocks.2.norm1.weight"):
        path = save({"teacher": prefixed(state | {name: noise(2)}, "backbone.")}, tmp_path / "weights.pth")
        with pytest.raises(InputError, match=f"missing none; unexpected 1 \\({name}\\)"):
            load_teacher(spec, weights=path)


# ---- DINOv2, DINOv3 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["dinov2-b", "dinov2-b-reg", "dinov2-g", "dinov2-g-reg"])
def test_dinov2(row: str, tmp_path: Path) -> None:
    """Its position embeddings are for 518 px and its images often of 224."""
    registers, is_giant = (4 if row.endswith("-reg") else 0), "-g" in row
    network, spec = small_vit(row, patch=14, registers=registers, scaled=True, gated=is_giant)
    if is_giant:
        spec = spec.model_copy(update={"options": spec.options | {"mlp_ratio": 2.667 * 2}})
    path = save(network.state_dict(), tmp_path / "weights.pth")
    assert spec.num_prefix_tokens == 1 + registers
    assert_same_tokens(spec, path, copy.deepcopy(network).double())
    positions = network.pos_embed.data
    network.pos_embed.data = torch.cat([positions[:, :1], resized(positions[:, 1:], 3)], dim=1)
    assert_same_tokens(spec.at(input_px=42), path, network.double())


def test_dinov3(tmp_path: Path) -> None:
    """Rotary positions: any grid, and nothing to resample. Most of the published networks have biases of zero, and
    timm's have none; that of a file is not lost without a word."""
    network = with_random_weights(DINOv3(16, 64, 2, 4))
    spec = small_row("dinov3-b", network, input_px=64, channels=64, embed_dim=64, depth=2, num_heads=4)
    state = network.state_dict()
    assert {"rope_embed.periods", "blocks.0.attn.qkv.bias_mask", "storage_tokens"} <= set(state)
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.qkv\.bias.*vit_base_patch16_dinov3_qkvb"):
        load_teacher(spec, weights=save(state, tmp_path / "biased.pth"))
    biased = spec.model_copy(update={"model": "vit_base_patch16_dinov3_qkvb.lvd1689m"})
    assert_same_tokens(biased, tmp_path / "biased.pth", copy.deepcopy(network).double())
    for block in network.blocks:
        block.attn.qkv.bias[:64] = block.attn.qkv.bias[128:] = 0
    path = save(network.state_dict(), tmp_path / "weights.pth")
    network = network.double()
    assert_same_tokens(spec, path, network)
    assert_same_tokens(spec.at(input_px=96), path, network)


# ---- CLIP ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clip() -> CLIP:
    network = CLIP(side=32, patch=8, width=128, layers=2, heads=2, output=512)
    return with_random_weights(network)  # type: ignore[return-value]


@pytest.fixture
def clip_row(clip: CLIP) -> TeacherSpec:
    row = small_row("clip-b", clip, input_px=32, channels=128, width=128, layers=2, patch_size=8, image_size=32)
    return row.model_copy(update={"patch_px": 8})


def save_torchscript(network: CLIP, path: Path) -> Path:
    torch.jit.trace(network, (torch.zeros(1, 3, 32, 32), torch.zeros(1, 5, dtype=torch.long))).save(path)
    return path


def save_half_torchscript(network: CLIP, path: Path) -> Path:
    """As OpenAI publishes it: matrices and convolutions in half precision."""
    half = copy.deepcopy(network)
    for part in half.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
            part.half()
    torch.jit.script(half).save(path)
    network.load_state_dict(half.state_dict())
    return path


def save_safetensors(network: CLIP, path: Path) -> Path:
    safetensors.torch.save_file(network.state_dict(), path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


CLIP_FILES: dict[str, Callable[[CLIP, Path], Path]] = {
    "TorchScript": save_torchscript,
    "TorchScript in half precision": save_half_torchscript,
    "state dict": lambda network, path: save(network.state_dict(), path),
    "state dict of numbers": lambda network, path: save(network.state_dict() | {"input_resolution": 32}, path),
    "safetensors": save_safetensors,
    "image tower": lambda network, path: save(network.visual.state_dict(), path),
    "open_clip's training": lambda network, path: save(
        {"epoch": 3, "name": "run", "state_dict": prefixed(network.state_dict(), "module.")}, path
    ),
}


@pytest.mark.parametrize("kind", CLIP_FILES)
def test_clip(kind: str, clip: CLIP, clip_row: TeacherSpec, tmp_path: Path) -> None:
    path = CLIP_FILES[kind](clip, tmp_path / "ViT-B-16.pt")
    assert_same_tokens(clip_row, path, copy.deepcopy(clip).visual.double().tokens, CLIP_STATISTICS)
    fingerprint = tensor_fingerprint(clip.visual.state_dict())
    assert load_teacher(clip_row, weights=path, device="cpu").fingerprint == fingerprint


def test_clip_on_another_grid_and_projected(clip: CLIP, clip_row: TeacherSpec, tmp_path: Path) -> None:
    path = save_half_torchscript(clip, tmp_path / "ViT-B-16.pt")
    tower = clip.visual
    grid = resized(tower.positional_embedding.data[None, 1:], 6)[0]
    tower.positional_embedding.data = torch.cat([tower.positional_embedding.data[:1], grid])
    tower = tower.double()
    row = clip_row.at(input_px=48)
    assert_same_tokens(row, path, tower.tokens, CLIP_STATISTICS)
    assert_same_tokens(row.at(tap="projected"), path, lambda images: tower.tokens(images) @ tower.proj, CLIP_STATISTICS)
