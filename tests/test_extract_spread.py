"""A network over several GPUs that do not exist: torch's fake tensors have shapes and devices, and operations on
tensors of different devices fail as they do on real ones."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from extract.spread import spread
from storage.errors import ConfigError

GPUS = [torch.device("cuda", number) for number in range(3)]


def clip_tower() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no pretrained weights
        tower: nn.Module = open_clip.create_model("ViT-B-32").visual
    return tower


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=0),
    "rotary vit": lambda: timm.create_model("vit_small_patch16_dinov3", num_classes=0, depth=5),
    "eva": lambda: timm.create_model("eva02_tiny_patch14_224", num_classes=0, depth=4),
    "swin v2": lambda: timm.create_model(
        "swinv2_tiny_window8_256", num_classes=0, embed_dim=12, num_heads=(1, 2, 4, 8)
    ),
    "convnext": lambda: timm.create_model("convnext_atto", num_classes=0),
    "clip": clip_tower,
}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Modules move among devices that do not exist."""
    mode = FakeTensorMode()

    def move(module: nn.Module, device: torch.device) -> nn.Module:
        for part in module.modules():
            for owned in (part._parameters, part._buffers):
                for name, tensor in owned.items():
                    if tensor is not None:
                        owned[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)  # type: ignore[assignment]
        return module

    monkeypatch.setattr(nn.Module, "to", move)
    yield mode


def devices_of(module: nn.Module) -> list[str]:
    return sorted({str(tensor.device) for tensor in module.parameters()})


def last_tokens(module: Any, images: torch.Tensor) -> torch.Tensor:
    found = module.forward_intermediates(images, indices=[-1], intermediates_only=True, **_form(module))
    if isinstance(found, dict):
        return module.ln_post(found["image_intermediates"][0]) @ module.proj  # type: ignore[no-any-return]
    return found[0]  # type: ignore[no-any-return]


def _form(module: Any) -> dict[str, Any]:
    return {"output_fmt": "NLC"} if isinstance(module, open_clip.transformer.VisionTransformer) else {}


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_are_spread_and_tokens_come_out(name: str, fake: FakeTensorMode) -> None:
    module = NETWORKS[name]().eval()
    expected = last_tokens(module, torch.zeros(2, 3, *_size(module)))
    with fake, torch.inference_mode():
        spread(module, GPUS)
        assert devices_of(module) == ["cuda:0", "cuda:1", "cuda:2"]
        tokens = last_tokens(module, torch.zeros(2, 3, *_size(module), device=GPUS[0]))
    assert tokens.shape == expected.shape


def _size(module: Any) -> tuple[int, int]:
    size = getattr(module, "image_size", None) or module.pretrained_cfg["input_size"][1:]
    return tuple(size)


def test_shares_are_even(fake: FakeTensorMode) -> None:
    module = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    with fake:
        spread(module, GPUS)
    homes = [devices_of(block) for block in module.blocks]
    assert homes == [["cuda:0"]] * 4 + [["cuda:1"]] * 4 + [["cuda:2"]] * 4
    assert devices_of(module.patch_embed) == devices_of(module.norm) == ["cuda:0"]


def test_every_gpu_has_a_block_however_unequal_they_are(fake: FakeTensorMode) -> None:
    module = nn.Module()
    module.blocks = nn.ModuleList([nn.Linear(1000, 1000), nn.Linear(2, 2), nn.Linear(2, 2)])
    with fake:
        spread(module, GPUS)
    assert [devices_of(block) for block in module.blocks] == [["cuda:0"], ["cuda:1"], ["cuda:2"]]


def test_fewer_blocks_than_gpus_are_refused() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(ConfigError, match=r"has 0 blocks that could be spread over 3 GPUs; lower .*gpus_per_worker"):
        spread(module, GPUS)


def test_on_one_device_nothing_changes() -> None:
    module = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=3).eval()
    images = torch.rand(2, 3, 224, 224)
    with torch.inference_mode():
        expected = module(images)
        spread(module, [torch.device("cpu")] * 3)
        assert torch.equal(module(images), expected)
