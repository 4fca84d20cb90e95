"""How far a teacher's fast path is from plain float32, on real views.

Whitening removes a token's mean and length, so what reaches a student is its direction: the cosine between whitened
tokens says how much of that a lower precision, or a compiled forward pass, has changed.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from extract.sample import SampleViews
from extract.teacher import Teacher

WORST_COSINE = 0.99
"""A store whose worst token is below this is warned of: storing as int8 keeps every token above 0.999."""


class Agreement(NamedTuple):
    """Cosines between the whitened tokens of the fast path and those of float32, over all tokens of some views."""

    precision: str
    num_views: int
    mean_cosine: float
    worst_cosine: float
    """Both are NaN where the fast path gave a value that is not finite."""

    @property
    def is_good(self) -> bool:
        return self.worst_cosine >= WORST_COSINE

    def __str__(self) -> str:
        warning = "" if self.is_good else "warning: "
        remedy = "" if self.is_good else "; set extract.precision=bfloat16 or float32"
        return (
            f"{warning}{self.precision} against plain float32 on {self.num_views} views: mean cosine of the whitened "
            f"tokens {self.mean_cosine:.6f}, worst token {self.worst_cosine:.6f}{remedy}"
        )

    def to_json(self) -> dict[str, float | int | str | None]:
        """NaN, which JSON does not have, as null."""
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in self._asdict().items()
        }


def compare_with_float32(teacher: Teacher, sample: Iterable[SampleViews]) -> Agreement:
    """Run views through the fast path and through plain float32."""
    cosines = [
        _token_cosines(teacher(views.pixels_BHWC), teacher.in_float32(views.pixels_BHWC)).cpu() for views in sample
    ]
    cosines_N = torch.cat([part.flatten() for part in cosines])
    return Agreement(
        teacher.precision,
        sum(map(len, cosines)),
        round(float(cosines_N.mean()), 7),
        round(float(cosines_N.min()), 7),
    )


def _token_cosines(fast_BTC: Tensor, exact_BTC: Tensor) -> Tensor:
    """Of each token's channels less their mean, (B, T); in float64, or 1 - 1e-7 could not be told from 1."""
    fast_BTC, exact_BTC = (tokens.double() - tokens.double().mean(-1, keepdim=True) for tokens in (fast_BTC, exact_BTC))
    return torch.nn.functional.cosine_similarity(fast_BTC, exact_BTC, dim=-1)
