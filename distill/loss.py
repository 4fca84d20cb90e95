"""The losses of feature distillation, in float32 whatever the inputs are."""

import torch.nn.functional as F
from torch import Tensor


def feature_loss(
    pred_NC: Tensor, target_NC: Tensor, *, kind: str = "smooth_l1", beta: float = 2.0, weights_N: Tensor | None = None
) -> Tensor:
    """Mean loss over tokens, each of which is the mean over its channels; any leading dimensions.

    Args:
        kind: `smooth_l1` (paper, section 3; authors' code: beta 2), `mse`, or `cosine` (1 - cosine of two tokens).
        beta: where smooth L1 turns from quadratic to linear. A zero prediction scores about 0.247 on unit-variance
            Gaussian targets with beta 2.
        weights_N: of the tokens, 1 in the mean over all that are learnt, though not over those at hand: else a loss
            would depend on which tokens happen to be together. None weighs all the same.
    """
    pred_NC, target_NC = pred_NC.float(), target_NC.float()
    if weights_N is None and kind == "smooth_l1":
        return F.smooth_l1_loss(pred_NC, target_NC, beta=beta)
    loss_N = _token_loss(pred_NC, target_NC, kind, beta)
    return loss_N.mean() if weights_N is None else (loss_N * weights_N).mean()


def _token_loss(pred_NC: Tensor, target_NC: Tensor, kind: str, beta: float) -> Tensor:
    if kind == "cosine":
        return 1 - F.cosine_similarity(pred_NC, target_NC, dim=-1)
    if kind == "mse":
        return F.mse_loss(pred_NC, target_NC, reduction="none").mean(-1)
    return F.smooth_l1_loss(pred_NC, target_NC, beta=beta, reduction="none").mean(-1)
