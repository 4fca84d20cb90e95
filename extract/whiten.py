"""Whitening: what makes teachers of different magnitude comparable targets (paper, section 3; the authors' code applies
a non-affine LayerNorm over the channels of every token, eps 1e-5, in float32)."""

from typing import NamedTuple

import torch
from torch import Tensor

from storage.errors import DecantError

EPS = 1e-5
SETTINGS = {"kind": "layer_norm", "eps": EPS}
_FP16_MAX = 65504.0


class Whitened(NamedTuple):
    """`tokens_BTC * std_BT1 + mean_BT1` gives the teacher's tokens back, up to fp16 rounding."""

    tokens_BTC: Tensor  # float16
    mean_BT: Tensor  # float32
    std_BT: Tensor  # float32, sqrt(variance + eps)


def whiten(tokens_BTC: Tensor) -> Whitened:
    """Standardise every token over its channels, in float32.

    Raises:
        DecantError: the teacher gave a value that is not finite.
    """
    raw_BTC = tokens_BTC.float()
    if not torch.isfinite(raw_BTC).all():
        bad = (~torch.isfinite(raw_BTC)).flatten(1).any(1).nonzero().flatten().tolist()
        raise DecantError(f"the teacher gave NaN or infinity for views {bad[:8]} of a batch; it may need float32")
    variance_BT1, mean_BT1 = torch.var_mean(raw_BTC, dim=-1, correction=0, keepdim=True)
    std_BT1 = (variance_BT1 + EPS).sqrt()
    white_BTC = (raw_BTC - mean_BT1) / std_BT1
    return Whitened(white_BTC.clamp(-_FP16_MAX, _FP16_MAX).half(), mean_BT1[..., 0], std_BT1[..., 0])
