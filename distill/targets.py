"""Stored tokens to training targets, on the device that trains.

storage/encodings.py says in numpy what the stored numbers mean; this is the same arithmetic in torch, so that int8
travels to the device as int8.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from storage.encodings import Encoding, Int8
from storage.records import FeatureSpec


def decode_targets(encoded: Mapping[str, Tensor], encoding: Encoding) -> Tensor:
    """Encoded tokens of a batch to whitened tokens (B, T, C): float16 as stored, float32 from int8."""
    if not isinstance(encoding, Int8):
        return encoded["tokens"]
    scale_C = torch.tensor(encoding.channel_scale, device=encoded["tokens"].device)
    return encoded["tokens"] * encoded["token_scale"].float().unsqueeze(-1) * scale_C


def select_targets(targets_BTC: Tensor, features: FeatureSpec) -> Tensor:
    """The teacher's tokens that a student with one CLS token has a counterpart for: CLS and grid, no registers."""
    prefix = features.num_prefix_tokens
    if prefix <= 1:
        return targets_BTC
    return torch.cat([targets_BTC[:, :1], targets_BTC[:, prefix:]], dim=1)


def match_subset(
    pred_BTC: Tensor, targets_BSC: Tensor, positions_BS: Tensor, features: FeatureSpec
) -> tuple[Tensor, Tensor]:
    """A student's predictions and a store's targets for the tokens that the store keeps, as two lists (N, C).

    The mean loss over them is an unbiased estimate of the mean over all tokens. (With registers, which a student does
    not predict, the number of pairs varies a little from batch to batch, and so does what is divided by.)

    Args:
        pred_BTC: for the tokens that `select_targets` keeps.
        positions_BS: of the stored tokens, among all of the teacher's.
    """
    prefix = features.num_prefix_tokens
    is_register_BS = (positions_BS >= 1) & (positions_BS < prefix)
    num_registers = max(0, prefix - 1)
    places_BS = torch.where(positions_BS < prefix, positions_BS, positions_BS - num_registers)
    rows_BS = torch.arange(len(places_BS), device=places_BS.device).unsqueeze(1).expand_as(places_BS)
    kept = ~is_register_BS
    return pred_BTC[rows_BS[kept], places_BS[kept]], targets_BSC[kept]
