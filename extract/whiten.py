"""Whitening: what makes teachers of different magnitude comparable targets (paper, section 3; the authors' code applies
a non-affine LayerNorm over the channels of every token, eps 1e-5, in float32)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from storage.errors import DecantError

EPS = 1e-5
SETTINGS = {"kind": "layer_norm", "eps": EPS}


class Whitened(NamedTuple):
    """`tokens_BTC * std_BT1 + mean_BT1` gives the teacher's tokens back, up to fp16 rounding."""

    tokens_BTC: Tensor  # float16; never above sqrt(channels), so no clipping is needed
    mean_BT: Tensor  # float32
    std_BT: Tensor  # float32, sqrt(variance + eps)


def whiten(tokens_BTC: Tensor, keys: Sequence[str]) -> Whitened:
    """Standardise every token over its channels, in float32.

    Args:
        keys: the image of each row, for the error.

    Raises:
        DecantError: the teacher gave a value that is not finite, or tokens too large for a float32 variance.
    """
    raw_BTC = tokens_BTC.float()
    variance_BT1, mean_BT1 = torch.var_mean(raw_BTC, dim=-1, correction=0, keepdim=True)
    std_BT1 = (variance_BT1 + EPS).sqrt()
    if not torch.isfinite(std_BT1).all():  # one such value among the channels is enough for that
        bad = sorted({keys[row] for row in (~torch.isfinite(std_BT1)).flatten(1).any(1).nonzero().flatten().tolist()})
        raise DecantError(
            f"the teacher gave NaN, infinity or a value beyond float32 for {len(bad)} of {len(set(keys))} images of a "
            f"batch ({', '.join(bad[:5])}); look at these images, and at the teacher's weights and precision"
        )
    return Whitened(((raw_BTC - mean_BT1) / std_BT1).half(), mean_BT1[..., 0], std_BT1[..., 0])
