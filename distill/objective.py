"""What a student is asked for by one teacher: from a batch of that teacher's store to a loss."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from distill.config import DistillConfig
from distill.loss import feature_loss
from distill.targets import decode_targets, match_subset, needs_raw, pool_map, select_targets, unwhiten
from storage.errors import ConfigError
from storage.store import FeatureReader


class Decoded(NamedTuple):
    """A teacher's whitened tokens."""

    tokens_BSC: Tensor
    mean_BS: Tensor | None
    """With `std_BS`: of each token before whitening, where targets are made of the teacher's own tokens."""
    std_BS: Tensor | None


Decode = Callable[[Mapping[str, Tensor]], Decoded]
"""What a stream brings of one store to tokens: decoding, or a live teacher's forward pass."""


class StorePart(NamedTuple):
    """What a batch has of one store."""

    encoded: dict[str, Tensor]
    """The whitened tokens as the store keeps them: `tokens` (B, S, C), and what their encoding needs to decode them;
    `token_mean` and `token_std` (B, S) where the targets are made of the teacher's own tokens."""
    positions_BS: Tensor | None
    """int64, of these tokens among all of a view's; None where the store keeps all."""

    def to(self, device: torch.device) -> "StorePart":
        """The same on the device that trains, which takes it from pinned memory as soon as it can."""
        positions_BS = self.positions_BS
        return StorePart(
            {name: part.to(device, non_blocking=True) for name, part in self.encoded.items()},
            None if positions_BS is None else positions_BS.to(device, non_blocking=True),
        )


class Objective:
    """The loss of a student's predictions for one teacher."""

    def __init__(
        self, reader: FeatureReader, cfg: DistillConfig, *, has_cls: bool, decode: Decode | None = None
    ) -> None:
        """
        Args:
            has_cls: the predictions begin with the teacher's CLS token.
            decode: of a live teacher; None decodes what the store holds.

        Raises:
            ConfigError: the store cannot give what the settings ask for.
        """
        self.plan, self.cfg, self.has_cls = reader.plan, cfg, has_cls
        self.statistics = reader.statistics
        self.needs_raw = needs_raw(cfg.target, self.plan.whitening, whiten=cfg.whiten)
        self.decode: Decode = decode or self._decode_stored
        teacher = self.plan.features.teacher
        if cfg.target == "cls" and not has_cls:
            raise ConfigError(
                f"distill.target=cls needs a CLS token of both, but the student or the teacher {teacher!r} has none; "
                "use distill.target=pooled"
            )
        if cfg.target != "map" and self.plan.token_subset is not None:
            raise ConfigError(
                f"distill.target={cfg.target} needs all tokens, but the store of {teacher!r} keeps "
                f"{self.plan.token_subset.fraction:.0%} of them; use distill.target=map, or another store"
            )

    def __call__(self, pred_BTC: Tensor, part: StorePart) -> Tensor:
        """The mean loss, float32.

        Args:
            pred_BTC: for the tokens that `select_targets` keeps.
        """
        cfg, features = self.cfg, self.plan.features
        targets_BSC, raw_BSC = self._decode(part.encoded)
        if cfg.target == "pooled":
            pooled_BC = pool_map(
                targets_BSC, raw_BSC, self.plan.whitening, features.num_prefix_tokens, whiten=cfg.whiten
            )
            return self._loss(pred_BTC[:, int(self.has_cls) :].mean(1), pooled_BC)
        wanted_BSC = targets_BSC if cfg.whiten or raw_BSC is None else raw_BSC
        if part.positions_BS is not None:
            pred_NC, target_NC, is_cls_N = match_subset(
                pred_BTC, wanted_BSC, part.positions_BS, features, has_cls=self.has_cls
            )
            return self._loss(pred_NC, target_NC, self._weights(is_cls_N, pred_BTC.shape[1]))
        wanted_BTC = select_targets(wanted_BSC, features, has_cls=self.has_cls)
        if cfg.target == "cls":
            return self._loss(pred_BTC[:, 0], wanted_BTC[:, 0])
        is_cls_T = torch.arange(wanted_BTC.shape[1], device=wanted_BTC.device) < int(self.has_cls)
        return self._loss(pred_BTC, wanted_BTC, self._weights(is_cls_T, pred_BTC.shape[1]))

    def _decode(self, encoded: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Whitened tokens, and the teacher's own if they are needed."""
        tokens_BSC, mean_BS, std_BS = self.decode(encoded)
        if not self.needs_raw:
            return tokens_BSC, None
        assert mean_BS is not None and std_BS is not None
        return tokens_BSC, unwhiten(tokens_BSC, mean_BS, std_BS, self.plan.whitening, self.statistics)

    def _decode_stored(self, encoded: Mapping[str, Tensor]) -> Decoded:
        tokens_BSC = decode_targets(encoded, self.plan.encoding)
        return Decoded(tokens_BSC, encoded.get("token_mean"), encoded.get("token_std"))

    def _weights(self, is_cls: Tensor, num_tokens: int) -> Tensor | None:
        """Weights of tokens, which are 1 in the mean over all `num_tokens` of a view. A store that keeps some of them
        keeps each as often, so the mean loss is an unbiased estimate, and that of a batch is the mean of its parts."""
        if self.cfg.cls_weight == 1 or not self.has_cls:
            return None
        mean = (self.cfg.cls_weight + num_tokens - 1) / num_tokens
        return torch.where(is_cls, self.cfg.cls_weight / mean, 1 / mean)

    def _loss(self, pred: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        return feature_loss(pred, target, kind=self.cfg.loss, beta=self.cfg.beta, weights_N=weights)
