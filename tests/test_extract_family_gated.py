"""AIMv2, EVA-02 and SigLIP: the upstream's network in plain torch, in a file of its own, gives the table's tokens."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.fixtures.upstream import CLIP_STATISTICS, assert_same_tokens, save, small_row, with_random_weights
from tests.fixtures.upstream_gated import EVA02, AIMv2
from tests.fixtures.upstream_vit import ViT

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 4}
HALVES = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def test_aimv2(tmp_path: Path) -> None:
    network = with_random_weights(AIMv2(56, 14, 48, 2, 4, hidden=128))
    spec = small_row("aimv2-l", network, input_px=56, channels=48, **SMALL, mlp_ratio=128 / 48)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "model.safetensors")
    assert_same_tokens(spec, tmp_path / "model.safetensors", network.double(), CLIP_STATISTICS)


@pytest.mark.parametrize("side", [56, 84])
def test_eva02(side: int, tmp_path: Path) -> None:
    """Its pretraining norms every token; timm calls that norm `fc_norm`, as it pools before it."""
    network = with_random_weights(EVA02(side, 14, 48, 2, 4, hidden=128))
    spec = small_row("eva02-b", network, input_px=side, channels=48, **SMALL, mlp_ratio=128 / 48)
    path = save({"module": network.state_dict()}, tmp_path / "eva02_B_pt_in21k_p14.pt")
    assert_same_tokens(spec, path, network.double(), CLIP_STATISTICS)


def test_siglip(tmp_path: Path) -> None:
    """No CLS token; the file's pooling head is left out."""
    network = with_random_weights(ViT(64, 16, 48, 2, 4))
    network.pos_embed.data = network.pos_embed.data[:, 1:]
    spec = small_row("siglip2-b", network, input_px=64, channels=48, **SMALL)
    state = network.state_dict() | {"attn_pool.latent": torch.ones(1, 1, 48), "attn_pool.q.weight": torch.ones(48, 48)}
    del state["cls_token"]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    network = network.double()

    def tokens(images: Tensor) -> Tensor:
        x = network.patch_embed(images) + network.pos_embed
        for block in network.blocks:
            x = block(x, None)
        return network.norm(x)

    assert_same_tokens(spec, tmp_path / "model.safetensors", tokens, HALVES)
