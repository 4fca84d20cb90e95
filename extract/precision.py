"""How far a teacher's fast path is from plain float32, on real views.

Whitening removes a token's mean and length, so what reaches a student is its direction: the cosine between whitened
tokens says how much of that a lower precision, or a compiled forward pass, has changed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from extract.teacher import Teacher


class Agreement(NamedTuple):
    """Cosines between the whitened tokens of the fast path and those of float32, over all tokens of some views."""

    precision: str
    num_views: int
    mean_cosine: float
    worst_cosine: float

    def __str__(self) -> str:
        return (
            f"{self.precision} against float32 on {self.num_views} views: mean cosine of the whitened tokens "
            f"{self.mean_cosine:.6f}, worst token {self.worst_cosine:.6f}"
        )


WORST_COSINE = 0.99
"""A store whose worst token is below this is warned of: int8 storage keeps every token above 0.999."""


def compare_with_float32(teacher: Teacher, pixels_BHWC: Tensor, batch_size: int) -> Agreement:
    """Run views (uint8) through the fast path and through plain float32.

    Returns:
        cosines; NaN where the fast path gave a value that is not finite.
    """
    cosines = [
        _token_cosines(teacher(batch), teacher.in_float32(batch)).flatten() for batch in pixels_BHWC.split(batch_size)
    ]
    cosines_N = torch.cat(cosines)
    return Agreement(
        teacher.precision, len(pixels_BHWC), round(float(cosines_N.mean()), 7), round(float(cosines_N.min()), 7)
    )


def _token_cosines(fast_BTC: Tensor, exact_BTC: Tensor) -> Tensor:
    """Of each token's channels less their mean, (B, T); in float64, or 1 - 1e-7 could not be told from 1."""
    fast_BTC, exact_BTC = (tokens.double() - tokens.double().mean(-1, keepdim=True) for tokens in (fast_BTC, exact_BTC))
    return torch.nn.functional.cosine_similarity(fast_BTC, exact_BTC, dim=-1)
