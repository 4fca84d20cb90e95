"""Stored tokens to training targets, on the device that trains.

storage/encodings.py and storage/whitening.py say in numpy what the stored numbers mean; this is the same arithmetic in
torch, so that int8 travels to the device as int8. Letters: T all of a teacher's tokens, S those that a store keeps.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from storage.encodings import Encoding, Int8
from storage.records import FeatureSpec
from storage.whitening import LayerNorm, MeanStd, Pca, Statistics, Whitening


def decode_targets(encoded: Mapping[str, Tensor], encoding: Encoding) -> Tensor:
    """Encoded tokens of a batch to whitened tokens (B, S, C): float16 as stored, float32 from int8."""
    if not isinstance(encoding, Int8):
        return encoded["tokens"]
    scale_C = torch.tensor(encoding.channel_scale, device=encoded["tokens"].device)
    return encoded["tokens"] * encoded["token_scale"].float().unsqueeze(-1) * scale_C


def unwhiten(
    tokens_BSC: Tensor, mean_BS: Tensor, std_BS: Tensor, whitening: Whitening, statistics: Statistics
) -> Tensor:
    """Whitened tokens to the teacher's own, float32, by what a store keeps beside them."""
    scaled_BSC = tokens_BSC.float() * std_BS.unsqueeze(-1) + mean_BS.unsqueeze(-1)
    learnt = torch.tensor(statistics, device=scaled_BSC.device)  # a copy: the reader keeps its own
    if isinstance(whitening, MeanStd):
        return scaled_BSC * learnt[1] + learnt[0]
    if isinstance(whitening, Pca):
        weight_CC = learnt[1:]
        inverse_CC = weight_CC / weight_CC.double().square().sum(1, keepdim=True).float()
        return scaled_BSC @ inverse_CC + learnt[0]
    return scaled_BSC


def pool_map(
    tokens_BTC: Tensor, raw_BTC: Tensor | None, whitening: Whitening, num_prefix_tokens: int, *, whiten: bool
) -> Tensor:
    """The mean token of each map (B, C), whitened as the store's tokens are, or not.

    Args:
        tokens_BTC: whitened.
        raw_BTC: the teacher's own, where `needs_raw` says so.
    """
    if raw_BTC is None:  # linear, so the mean of whitened tokens is the whitened mean
        return tokens_BTC[:, num_prefix_tokens:].float().mean(1)
    mean_BC = raw_BTC[:, num_prefix_tokens:].mean(1)
    if whiten and isinstance(whitening, LayerNorm):
        return F.layer_norm(mean_BC, mean_BC.shape[-1:], eps=whitening.eps)
    return mean_BC


def needs_raw(target: str, whitening: Whitening, *, whiten: bool) -> bool:
    """Whether a target is made of the teacher's own tokens, for which the mean and deviation of each are read."""
    return not whiten or (target == "pooled" and isinstance(whitening, LayerNorm))


def select_targets(targets_BTC: Tensor, features: FeatureSpec, *, has_cls: bool = True) -> Tensor:
    """The teacher's tokens that a student has a counterpart for: the grid, CLS where both have one, no registers."""
    prefix = features.num_prefix_tokens
    if prefix == 0 or (prefix == 1 and has_cls):
        return targets_BTC
    grid_BTC = targets_BTC[:, prefix:]
    return torch.cat([targets_BTC[:, :1], grid_BTC], dim=1) if has_cls else grid_BTC


def match_subset(
    pred_BTC: Tensor, targets_BSC: Tensor, positions_BS: Tensor, features: FeatureSpec, *, has_cls: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """A student's predictions and a store's targets for the tokens that the store keeps, as two lists (N, C), and which
    of them are CLS (N).

    The mean loss over them is an unbiased estimate of the mean over all tokens. (With registers, which a student does
    not predict, the number of pairs varies a little from batch to batch, and so does what is divided by.)

    Args:
        pred_BTC: for the tokens that `select_targets` keeps.
        positions_BS: of the stored tokens, among all of the teacher's.
    """
    prefix = features.num_prefix_tokens
    first_matched = 1 if has_cls else 0  # prefix tokens that the student predicts
    is_dropped_BS = (positions_BS >= first_matched) & (positions_BS < prefix)
    num_dropped = max(0, prefix - first_matched)
    places_BS = torch.where(positions_BS < prefix, positions_BS, positions_BS - num_dropped)
    rows_BS = torch.arange(len(places_BS), device=places_BS.device).unsqueeze(1).expand_as(places_BS)
    kept = ~is_dropped_BS
    is_cls_BS = positions_BS < min(prefix, first_matched)
    return pred_BTC[rows_BS[kept], places_BS[kept]], targets_BSC[kept], is_cls_BS[kept]
