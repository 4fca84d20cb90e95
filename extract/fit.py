"""What whitening learns from a sample of views. Its sums are in float64 and grow batch by batch, so the sample itself
is never in memory as a whole."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from extract.sample import SampleBatch
from extract.whiten import NOT_FINITE, refuse_rows
from storage.errors import InputError
from storage.fingerprint import digest_bytes
from storage.whitening import MeanStd, Pca, Statistics, encode_statistics

_LEAST_TOKENS, _GOOD_TOKENS = 10, 40
"""A channel, for principal components. Tokens of one view are alike, so a covariance takes many: on the 320 channels
of EfficientNet-Lite0, the mean square of whitened tokens of 64 unseen views was 502, 4.8, 2.3, 1.2 and 1.1 with 1, 5,
10, 40 and 70 tokens a channel, instead of 1."""


class Fitted(NamedTuple):
    """A whitening and what it learnt."""

    whitening: MeanStd | Pca
    statistics: Statistics


def fit_whitening(whitening: MeanStd | Pca, sample: Iterable[SampleBatch]) -> Fitted:
    """Learn a whitening from a sample.

    Raises:
        InputError: too few tokens, or tokens that are all the same, or a value that is not finite.
    """
    moments, num_views = None, 0
    for tokens_BTC, keys in sample:
        refuse_rows(~torch.isfinite(tokens_BTC), keys, NOT_FINITE, tokens_BTC)
        if moments is None:
            moments = Moments(tokens_BTC.shape[-1], tokens_BTC.device, with_covariance=isinstance(whitening, Pca))
        moments.add(tokens_BTC.flatten(0, 1))
        num_views += len(tokens_BTC)
    if moments is None:
        raise InputError(f"{whitening.kind} whitening cannot be fitted on no views")
    if isinstance(whitening, Pca) and moments.count < _LEAST_TOKENS * len(moments.mean_C):
        raise _too_few(moments, num_views)
    spread = moments.variances_C.mean().item()
    if spread == 0:
        raise InputError(f"all {moments.count} tokens of the sample are the same, so they cannot be whitened")
    mean_1C = moments.mean_C.cpu()[None]
    if isinstance(whitening, Pca):
        scale = _principal_components(moments.covariance_CC, whitening.eps * spread)
    else:
        scale = (moments.variances_C.cpu()[None] + whitening.eps * spread).sqrt()
    statistics = torch.cat([mean_1C, scale]).float().numpy()
    digest = digest_bytes(encode_statistics(statistics))
    fitted = whitening.model_copy(update={"num_tokens": moments.count, "statistics": digest})
    return Fitted(fitted, statistics)


class Moments:
    """Mean and scatter of all tokens so far, in float64. Parts are joined around their own means, so no large numbers
    are subtracted. Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm"."""

    def __init__(self, channels: int, device: torch.device, *, with_covariance: bool) -> None:
        self.count, self._with_covariance = 0, with_covariance
        self.mean_C = torch.zeros(channels, dtype=torch.float64, device=device)
        shape = (channels, channels) if with_covariance else (channels,)
        self._scatter = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, tokens_NC: Tensor) -> None:
        added = len(tokens_NC)
        total = self.count + added
        tokens_NC = tokens_NC.double()
        mean_C = tokens_NC.mean(0)
        centred_NC, step_C = tokens_NC - mean_C, mean_C - self.mean_C
        share = self.count * added / total
        if self._with_covariance:
            self._scatter += centred_NC.T @ centred_NC + share * torch.outer(step_C, step_C)
        else:
            self._scatter += centred_NC.square().sum(0) + share * step_C.square()
        self.mean_C += step_C * (added / total)
        self.count = total

    @property
    def variances_C(self) -> Tensor:
        """Divided by the number of tokens."""
        return (self._scatter.diagonal() if self._with_covariance else self._scatter) / self.count

    @property
    def covariance_CC(self) -> Tensor:
        return self._scatter / self.count


def _principal_components(covariance_CC: Tensor, least: float) -> Tensor:
    """Rows: eigenvectors, that of the largest eigenvalue first, each divided by sqrt(eigenvalue + least). Of the two
    signs that each could have it gets the one that makes its largest part positive."""
    variances_C, vectors_CC = torch.linalg.eigh(covariance_CC.cpu())
    variances_C, rows_CC = variances_C.flip(0).clamp(min=0), vectors_CC.T.flip(0)
    largest_C1 = rows_CC.abs().argmax(dim=1, keepdim=True)
    signed_CC = rows_CC * rows_CC.gather(1, largest_C1).sign()
    weight_CC: Tensor = signed_CC / (variances_C + least).sqrt()[:, None]
    return weight_CC


def _too_few(moments: Moments, num_views: int) -> InputError:
    channels, tokens_a_view = len(moments.mean_C), moments.count // num_views
    least = _LEAST_TOKENS * channels
    needed, good = (-(-each * channels // tokens_a_view) for each in (_LEAST_TOKENS, _GOOD_TOKENS))
    return InputError(
        f"pca whitening of {channels} channels needs {least:,} tokens, found {moments.count:,} in the "
        f"{num_views} views of the sample; raise extract.fit_views to {needed} at least ({good} are better) and give "
        "as many images, or whiten by WHITENING=mean_std or layer_norm"
    )
