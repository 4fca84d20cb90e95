"""Whitening: what makes teachers of different magnitude comparable targets (paper, section 3; the authors' code applies
a non-affine LayerNorm over the channels of every token, eps 1e-5, in float32). How it is undone is in
storage/whitening.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from storage.errors import BadTokensError
from storage.files import LocalFiles
from storage.records import StorePlan
from storage.whitening import NO_STATISTICS, LayerNorm, MeanStd, Pca, Statistics, Whitening, load_statistics


class Whitened(NamedTuple):
    """`tokens_BTC * std_BT1 + mean_BT1`, then `whitening.restore`, gives the teacher's tokens back, up to rounding."""

    tokens_BTC: Tensor  # float16
    mean_BT: Tensor  # float32; 0 where the whitening is not by token
    std_BT: Tensor  # float32; sqrt(variance + eps), or 1


class Whitener:
    """A whitening with its statistics on the teacher's device."""

    def __init__(
        self, whitening: Whitening, statistics: Statistics = NO_STATISTICS, device: torch.device | str = "cpu"
    ) -> None:
        if not whitening.is_fitted:
            raise AssertionError(f"{whitening.kind} has not been fitted")
        self.whitening, self.of = whitening, ""
        """Whose tokens these are, for errors."""
        self._statistics = torch.tensor(statistics, device=device)

    @classmethod
    def of_store(cls, root: Path, plan: StorePlan, device: torch.device | str) -> Self:
        """The whitening of a store that has begun.

        Raises:
            DamagedError: its statistics are not what the plan names.
        """
        statistics = load_statistics(LocalFiles(root), plan.whitening, plan.features.channels)
        whitener = cls(plan.whitening, statistics, device)
        block = "" if plan.teacher.get("block") is None else f", block {plan.teacher['block']}"
        whitener.of = f" of teacher {plan.features.teacher!r} (extract.tap={plan.teacher.get('tap')}{block})"
        return whitener

    def __call__(self, tokens_BTC: Tensor, keys: Sequence[str]) -> Whitened:
        """Whiten a batch, in float32. Views do not touch each other: their results do not depend on the batch.

        Args:
            tokens_BTC: of any floating-point type.
            keys: the image of each row, for the error.

        Raises:
            BadTokensError: the teacher gave a value that is not finite, or too large: for a float32 variance, or for
                float16 once it is whitened.
        """
        raw_BTC = tokens_BTC.float()
        if isinstance(self.whitening, LayerNorm):
            return _by_token(raw_BTC, self.whitening.eps, keys, self.of)
        refuse_rows(~torch.isfinite(raw_BTC), keys, NOT_FINITE, raw_BTC, self.of)
        white_BTC = self._transform(raw_BTC)
        tokens_fp16_BTC = white_BTC.half()
        what = f"values beyond float16 as {self.whitening.kind} leaves them"
        refuse_rows(~torch.isfinite(tokens_fp16_BTC), keys, what, white_BTC, self.of)
        mean_BT = raw_BTC.new_zeros(raw_BTC.shape[:2])
        return Whitened(tokens_fp16_BTC, mean_BT, torch.ones_like(mean_BT))

    def _transform(self, raw_BTC: Tensor) -> Tensor:
        if isinstance(self.whitening, MeanStd):
            mean_C, std_C = self._statistics
            white_BTC: Tensor = (raw_BTC - mean_C) / std_C
            return white_BTC
        if isinstance(self.whitening, Pca):
            # view by view: the sums of one large product would depend on how many views are in it
            weight_CC = self._statistics[1:].T
            return torch.stack([view_TC @ weight_CC for view_TC in raw_BTC - self._statistics[0]])
        return raw_BTC


NOT_FINITE = "NaN, infinity or a value beyond float32"


def _by_token(raw_BTC: Tensor, eps: float, keys: Sequence[str], of: str) -> Whitened:
    """Standardise every token over its channels. Never above sqrt(channels), so float16 holds it."""
    variance_BT1, mean_BT1 = torch.var_mean(raw_BTC, dim=-1, correction=0, keepdim=True)
    std_BT1 = (variance_BT1 + eps).sqrt()
    # one such value among the channels is enough for that
    refuse_rows(~torch.isfinite(std_BT1), keys, NOT_FINITE, raw_BTC, of)
    return Whitened(((raw_BTC - mean_BT1) / std_BT1).half(), mean_BT1[..., 0], std_BT1[..., 0])


def refuse_rows(is_bad: Tensor, keys: Sequence[str], what: str, values: Tensor, of: str = "") -> None:
    """Refuse a batch in which anything is wrong.

    Args:
        is_bad: (B, ...).
        values: (B, T, C), of which the largest is said.
        of: the teacher.

    Raises:
        BadTokensError: names the images.
    """
    if not is_bad.any():
        return
    rows = is_bad.flatten(1).any(1).nonzero().flatten()
    bad = sorted({keys[row] for row in rows.tolist()})
    largest = float(values[rows].abs().max())  # NaN, where there is one
    remedy = f"look at these images, and at the weights and precision{of}"
    if what != NOT_FINITE:
        remedy = "whiten each token by itself (WHITENING=layer_norm), which any magnitude survives"
    raise BadTokensError(
        f"the teacher gave {what} for {len(bad)} of {len(set(keys))} images of a batch ({', '.join(bad[:5])}); "
        f"{remedy}; the largest value is {largest:.4g}"
    )
