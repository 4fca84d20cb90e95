"""A linear classifier on frozen features: multinomial logistic regression, standardised inputs, L-BFGS.

The L2 penalty is chosen on a fifth of the training images (all views of an image on the same side), never on the
evaluation images.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.features import PooledFeatures
from storage.views import keyed_generator


class ProbeResult(NamedTuple):
    accuracy: float
    num_eval: int
    penalty: float
    train_accuracy: float


def linear_probe(
    train: PooledFeatures, evaluation: PooledFeatures, *, penalties: tuple[float, ...], iterations: int, seed: int
) -> ProbeResult:
    """Fit on `train`, report on `evaluation`."""
    mean_C, std_C = train.features_NC.mean(0), train.features_NC.std(0).clamp_min(1e-6)
    features_NC, unseen_NC = ((f.features_NC - mean_C) / std_C for f in (train, evaluation))
    num_classes = int(max(train.labels_N.max(), evaluation.labels_N.max())) + 1

    def fit(rows_N: Tensor, penalty: float) -> "_Classifier":
        return fit_classifier(features_NC[rows_N], train.labels_N[rows_N], num_classes, penalty, iterations)

    is_fit_N = _fitting_rows(train.positions_N, seed)
    scores = {
        penalty: fit(is_fit_N, penalty).accuracy(features_NC[~is_fit_N], train.labels_N[~is_fit_N])
        for penalty in penalties
    }
    best = max(penalties, key=lambda penalty: scores[penalty])
    classifier = fit(torch.ones_like(is_fit_N), best)
    return ProbeResult(
        classifier.accuracy(unseen_NC, evaluation.labels_N), len(unseen_NC), best,
        classifier.accuracy(features_NC, train.labels_N),
    )  # fmt: skip


def _fitting_rows(positions_N: np.ndarray, seed: int) -> Tensor:
    images = np.unique(positions_N)
    held_out = keyed_generator(seed, "probe", 0).permutation(images)[: max(1, len(images) // 5)]
    return torch.from_numpy(~np.isin(positions_N, held_out))


class _Classifier(NamedTuple):
    weight_KC: Tensor
    bias_K: Tensor

    def accuracy(self, features_NC: Tensor, labels_N: Tensor) -> float:
        logits_NK = features_NC @ self.weight_KC.T + self.bias_K
        return float((logits_NK.argmax(1) == labels_N).float().mean())


def fit_classifier(
    features_NC: Tensor, labels_N: Tensor, num_classes: int, penalty: float, iterations: int
) -> _Classifier:
    """Minimise mean cross-entropy + penalty / 2 * |weights|^2; the bias is not penalised."""
    weight_KC = torch.zeros(num_classes, features_NC.shape[1], requires_grad=True)
    bias_K = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_KC, bias_K], max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits_NK = features_NC @ weight_KC.T + bias_K
        objective = F.cross_entropy(logits_NK, labels_N) + 0.5 * penalty * weight_KC.square().sum()
        objective.backward()
        return objective

    optimizer.step(closure)
    return _Classifier(weight_KC.detach(), bias_K.detach())
