"""The linear probe against a slower truth: plain gradient descent in float64, and the split done by hand."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune import linear_probe as probe_module
from finetune.features import PooledFeatures
from finetune.linear_probe import fit_classifier, linear_probe


def clusters(num_images: int, *, views: int = 2, spread: float = 1.0, seed: int = 0) -> PooledFeatures:
    """Points around the centres of three classes; `views` neighbouring rows belong to one image."""
    generator = torch.Generator().manual_seed(seed)
    centres_KC = 2 * torch.randn(3, 4, generator=torch.Generator().manual_seed(99))
    positions_N = np.repeat(np.arange(num_images), views)
    labels_N = torch.from_numpy(positions_N % 3)
    noise_NC = spread * torch.randn(len(labels_N), 4, generator=generator)
    return PooledFeatures(centres_KC[labels_N] + noise_NC, labels_N, positions_N)


def descend(features_NC: Tensor, labels_N: Tensor, classes: int, penalty: float, steps: int = 6_000) -> Tensor:
    """Plain gradient descent; gives the weights with the bias as last column."""
    features_NC = features_NC.double()
    weight_KC = torch.zeros(classes, features_NC.shape[1], dtype=torch.float64)
    bias_K = torch.zeros(classes, dtype=torch.float64)
    targets_NK = F.one_hot(labels_N, classes).double()
    for _ in range(steps):
        error_NK = (features_NC @ weight_KC.T + bias_K).softmax(1) - targets_NK
        weight_KC -= 0.3 * (error_NK.T @ features_NC / len(labels_N) + penalty * weight_KC)
        bias_K -= 0.3 * error_NK.mean(0)
    return torch.cat([weight_KC, bias_K[:, None]], dim=1)


@pytest.mark.parametrize("penalty", [0.01, 0.3])
def test_fit_reaches_the_optimum_of_plain_gradient_descent(penalty: float) -> None:
    points = clusters(30, spread=1.5)
    features_NC = (points.features_NC - points.features_NC.mean(0)) / points.features_NC.std(0)
    found = fit_classifier(features_NC, points.labels_N, 3, penalty, 200)
    truth = descend(features_NC, points.labels_N, 3, penalty)
    found_KD = torch.cat([found.weight_KC, found.bias_K[:, None]], dim=1).double()
    torch.testing.assert_close(found_KD, truth, rtol=0, atol=2e-3)


def test_bias_is_not_penalised() -> None:
    """Without any feature the optimum is the log of the class shares, whatever the penalty."""
    labels_N = torch.tensor([0] * 6 + [1] * 3 + [2])
    found = fit_classifier(torch.zeros(10, 2), labels_N, 3, 100.0, 100)
    torch.testing.assert_close(found.bias_K.softmax(0), torch.tensor([0.6, 0.3, 0.1]), rtol=0, atol=1e-3)


def test_separable_points_are_separated_and_counted_exactly() -> None:
    train, evaluation = clusters(40, spread=0.05), clusters(7, spread=0.05, seed=1)
    wrong = evaluation._replace(labels_N=evaluation.labels_N.clone())
    wrong.labels_N[:3] = (wrong.labels_N[:3] + 1) % 3
    result = linear_probe(train, wrong, penalties=(1e-3,), iterations=100, seed=0)
    assert result.train_accuracy == 1
    assert result.num_eval == 14
    assert result.accuracy == pytest.approx(11 / 14)


def test_scale_and_shift_of_the_features_do_not_matter() -> None:
    train, evaluation = clusters(60, spread=2.0), clusters(30, spread=2.0, seed=1)
    plain = linear_probe(train, evaluation, penalties=(0.01, 1.0), iterations=100, seed=0)
    scaled = [points._replace(features_NC=points.features_NC * 1000 - 70) for points in (train, evaluation)]
    assert linear_probe(scaled[0], scaled[1], penalties=(0.01, 1.0), iterations=100, seed=0) == plain


def test_constant_features_do_no_harm() -> None:
    train, evaluation = clusters(20), clusters(10, seed=1)
    train.features_NC[:, 1] = evaluation.features_NC[:, 1] = 3.0
    result = linear_probe(train, evaluation, penalties=(0.01,), iterations=50, seed=0)
    assert 0.5 < result.accuracy <= 1


@pytest.fixture
def fitted_rows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, list[int]]]:
    """(penalty, images) of every fit; feature 0 names the image."""
    calls: list[tuple[float, list[int]]] = []
    fit = fit_classifier

    def record(features_NC: Tensor, labels_N: Tensor, num_classes: int, penalty: float, iterations: int) -> object:
        calls.append((penalty, features_NC[:, 0].tolist()))  # standardised, but the same for the views of an image
        return fit(features_NC, labels_N, num_classes, penalty, iterations)

    monkeypatch.setattr(probe_module, "fit_classifier", record)
    return calls


def test_all_views_of_an_image_are_on_one_side(fitted_rows: list[tuple[float, list[int]]]) -> None:
    train, evaluation = clusters(25, views=3), clusters(5, views=3)
    train.features_NC[:, 0] = torch.from_numpy(train.positions_N.astype(np.float32))
    linear_probe(train, evaluation, penalties=(0.1, 1.0), iterations=5, seed=0)
    assert [penalty for penalty, _ in fitted_rows[:2]] == [0.1, 1.0]
    for _, images in fitted_rows[:2]:
        assert len(images) == 60, "a fifth of the 25 images is held out"
        assert {images.count(image) for image in images} == {3}
    assert sorted(fitted_rows[0][1]) == sorted(fitted_rows[1][1]), "every penalty is judged on the same images"
    assert len(fitted_rows[2][1]) == 75, "the chosen one is fitted on all"
    linear_probe(train, evaluation, penalties=(0.1,), iterations=5, seed=1)
    assert set(fitted_rows[3][1]) != set(fitted_rows[0][1])


@pytest.mark.parametrize("spoil", [lambda f: f * -3 + 1, torch.zeros_like, torch.flip], ids=["turned", "zero", "flip"])
def test_penalty_is_chosen_without_the_evaluation_images(spoil: Callable[..., Tensor]) -> None:
    train, evaluation = clusters(40, spread=3.0), clusters(20, spread=3.0, seed=1)
    penalties = (1e-4, 1e-2, 1.0, 100.0)
    plain = linear_probe(train, evaluation, penalties=penalties, iterations=100, seed=0)
    features_NC = spoil(evaluation.features_NC, [0]) if spoil is torch.flip else spoil(evaluation.features_NC)
    spoilt = linear_probe(
        train, evaluation._replace(features_NC=features_NC), penalties=penalties, iterations=100, seed=0
    )
    assert (spoilt.penalty, spoilt.train_accuracy) == (plain.penalty, plain.train_accuracy)


def test_the_best_penalty_on_the_held_out_fifth_wins(fitted_rows: list[tuple[float, list[int]]]) -> None:
    """One row an image, found again by its first feature: the scores are then computed by hand."""
    train, evaluation = clusters(50, views=1, spread=4.0), clusters(10, views=1)
    penalties = (1e-4, 0.3, 1000.0)
    chosen = linear_probe(train, evaluation, penalties=penalties, iterations=200, seed=3).penalty
    features_NC = (train.features_NC - train.features_NC.mean(0)) / train.features_NC.std(0)
    scores = []
    for penalty, rows in fitted_rows[: len(penalties)]:
        is_fitted = torch.isin(features_NC[:, 0], torch.tensor(rows))
        assert int(is_fitted.sum()) == 40
        classifier = fit_classifier(features_NC[is_fitted], train.labels_N[is_fitted], 3, penalty, 200)
        logits_NK = features_NC[~is_fitted] @ classifier.weight_KC.T + classifier.bias_K
        scores.append(float((logits_NK.argmax(1) == train.labels_N[~is_fitted]).float().mean()))
    assert len(set(scores)) > 1, "a choice that any penalty would win tests nothing"
    assert chosen == penalties[int(np.argmax(scores))]


def test_a_class_that_only_the_evaluation_has_counts_as_wrong() -> None:
    train, evaluation = clusters(30, spread=0.1), clusters(10, views=1, spread=0.1, seed=1)
    evaluation.labels_N[:4] = 7
    result = linear_probe(train, evaluation, penalties=(0.01,), iterations=50, seed=0)
    assert result.accuracy == pytest.approx(0.6)
