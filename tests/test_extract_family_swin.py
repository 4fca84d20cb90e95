"""EsViT, Swin and SwinV2: the upstream's network in plain torch, in its own file, gives the tokens of the table."""

import argparse
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from extract.backends import load_teacher
from extract.spec import TeacherSpec
from extract.teachers import find_teacher
from extract.weights import tensor_fingerprint
from storage.errors import InputError
from tests.fixtures.upstream import State, assert_same_tokens, prefixed, save, small_row, with_random_weights
from tests.fixtures.upstream_swin import Swin

DEPTHS, HEADS = [2, 2, 2, 2], [1, 2, 4, 8]
SMALL = {"embed_dim": 16, "depths": DEPTHS, "num_heads": HEADS}


def small_swin(row: str, input_px: int, window: int, *, is_v2: bool = False) -> tuple[Any, TeacherSpec]:
    network = with_random_weights(Swin(input_px, 16, DEPTHS, HEADS, window, is_v2=is_v2))
    spec = small_row(row, network, input_px=input_px, channels=128, window_size=window, **SMALL)
    return network, spec


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(8))


def esvit_checkpoint(state: State) -> dict[str, Any]:
    """Of several GPUs, with both heads in both networks; the paper's code takes the student."""
    heads = {
        "head.mlp.0.weight": noise(9, 128),
        "head_dense.mlp.0.weight": noise(9, 128),
        "head.last.weight_g": noise(9),
    }
    other = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    return {
        "student": prefixed(state | heads, "module."), "teacher": prefixed(other | heads, "module."),
        "optimizer": {"state": {}}, "epoch": 300, "args": argparse.Namespace(arch="swin_base"),
        "dino_loss": {"center": noise(1, 9)},
    }  # fmt: skip


@pytest.mark.parametrize(("row", "stage"), [("esvit-b", -1), ("esvit-b-stage3", 2)])
def test_esvit(row: str, stage: int, tmp_path: Path) -> None:
    """Four windows at first, then one; at the last stage a window smaller than the others. Its third stage is tapped
    before it is merged."""
    network, spec = small_swin("esvit-b", 64, window=8)
    if row != "esvit-b":
        spec = spec.at(tap="block", block=stage)
        assert spec.feature_spec().shape_TC == (16, 64)
    state = network.state_dict()
    assert {"layers.0.blocks.1.attn_mask", "layers.0.blocks.0.attn.relative_position_index"} <= set(state)
    path = save(esvit_checkpoint(state), tmp_path / "checkpoint_best.pth")
    network = network.double()
    assert_same_tokens(spec, path, network if stage == -1 else lambda images: network.stage(images, stage))


def test_the_row_of_the_third_stage_is_that_stage() -> None:
    assert find_teacher("esvit-b-stage3").feature_spec() == find_teacher("esvit-b").at(
        tap="block", block=2
    ).feature_spec().model_copy(update={"teacher": "esvit-b-stage3"})


@pytest.mark.parametrize(("row", "is_v2"), [("swin-b", False), ("swinv2-b", True)])
def test_microsofts_files(row: str, is_v2: bool, tmp_path: Path) -> None:
    network, spec = small_swin(row, 96, window=6, is_v2=is_v2)
    head = {"head.weight": noise(10, 128), "head.bias": noise(10)}
    path = save({"model": network.state_dict() | head}, tmp_path / "swin.pth")
    assert_same_tokens(spec, path, copy.deepcopy(network).double())
    plain = save(network.state_dict(), tmp_path / "plain.pth")
    fingerprints = {load_teacher(spec, weights=file, device="cpu").fingerprint for file in (path, plain)}
    assert len(fingerprints) == 1
    assert fingerprints != {tensor_fingerprint(network.state_dict())}, "their names and buffers are not timm's"


def test_swinv2_on_a_larger_image_with_a_larger_window(tmp_path: Path) -> None:
    """The network of biases is asked for new offsets; nothing is resampled. timm is told the window of the training."""
    network, spec = small_swin("swinv2-b", 64, window=4, is_v2=True)
    path = save({"model": network.state_dict()}, tmp_path / "swin.pth")
    larger = Swin(128, 16, DEPTHS, HEADS, 8, is_v2=True).eval().requires_grad_(False)
    for stage in larger.layers:
        for block in stage.blocks:
            offsets = block.attn.relative_coords_table
            window = (offsets.shape[1] + 1) // 2
            steps = torch.stack(torch.meshgrid(*[torch.arange(1 - window, window)] * 2, indexing="ij"), -1)
            scaled = steps / (TRAINED[window] - 1) * 8
            block.attn.relative_coords_table = (scaled.sign() * (scaled.abs() + 1).log2() / 3)[None]
    parameters = dict(network.named_parameters())
    for name, parameter in larger.named_parameters():
        parameter.data = parameters[name].data
    options = spec.options | {"window_size": 8, "pretrained_window_sizes": (4, 4, 4, 2)}
    spec = spec.model_copy(update={"options": options}).at(input_px=128)
    assert_same_tokens(spec, path, nn.Module.double(larger))


TRAINED = {8: 4, 4: 2}
"""Window to that of the training."""


def test_what_does_not_belong_is_named(tmp_path: Path) -> None:
    network, spec = small_swin("esvit-b", 64, window=8)
    path = save({"student": network.state_dict() | {"layers.4.x": noise(3)}}, tmp_path / "swin.pth")
    with pytest.raises(InputError, match=r"missing none; unexpected 1 \(layers\.4\.x\)"):
        load_teacher(spec, weights=path)
    row = find_teacher("dino-s").model_copy(update={"checkpoint_branch": "student"})
    with pytest.raises(InputError, match="patches are 4 x 4 px, expected 16 x 16: it is another network's file"):
        load_teacher(row, weights=path)
