"""ConvNeXt V2: the upstream's network in plain torch, in its own file, gives the tokens of the table."""

from pathlib import Path

import pytest
import torch

from tests.fixtures.upstream import assert_same_tokens, save, small_row, with_random_weights
from tests.fixtures.upstream_convnext import ConvNeXtV2

DECODER = {
    "mask_token": torch.ones(1, 8, 1, 1), "proj.weight": torch.ones(8, 64, 1, 1), "proj.bias": torch.ones(8),
    "decoder.0.dwconv.weight": torch.ones(8, 1, 7, 7), "decoder.0.pwconv1.weight": torch.ones(32, 8),
    "pred.weight": torch.ones(9, 8, 1, 1),
}  # fmt: skip


@pytest.mark.parametrize("has_decoder", [False, True])
def test_convnext_v2(has_decoder: bool, tmp_path: Path) -> None:
    widths, depths = [8, 16, 32, 64], [1, 1, 2, 1]
    network = with_random_weights(ConvNeXtV2(widths, depths))
    spec = small_row("convnextv2-b", network, input_px=64, channels=64, dims=widths, depths=depths)
    state = network.state_dict() | (DECODER if has_decoder else {})
    assert_same_tokens(spec, save({"model": state}, tmp_path / "fcmae.pt"), network.double())
