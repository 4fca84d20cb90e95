"""What whitening learns from a sample, against numpy in float64."""

from collections.abc import Iterator
from pathlib import Path

import elpv_dataset
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from extract.fit import Moments, fit_whitening
from extract.sample import SampleBatch
from extract.whiten import Whitener
from storage.errors import DecantError, InputError
from storage.whitening import NO_STATISTICS, LayerNorm, MeanStd, Pca

CHANNELS = 12


def make_tokens(num_views: int = 40, seed: int = 0, *, tokens: int = 10, channels: int = CHANNELS) -> torch.Tensor:
    """Correlated, and far from zero: (R, T, C)."""
    generator = np.random.default_rng(seed)
    mix = np.linalg.qr(generator.normal(size=(channels, channels)))[0] * np.geomspace(5, 0.2, channels)[:, None]
    values = generator.normal(size=(num_views, tokens, channels)) @ mix + generator.normal(size=channels) * 20
    return torch.from_numpy(values.astype(np.float32))


def in_batches(tokens: torch.Tensor, size: int = 16) -> Iterator[SampleBatch]:
    for first in range(0, len(tokens), size):
        part = tokens[first : first + size]
        yield SampleBatch(part, [f"{first + row}.png" for row in range(len(part))])  # type: ignore[misc]


def whitened(whitening: MeanStd | Pca, tokens: torch.Tensor) -> NDArray[np.float64]:
    """By a fit on the same tokens: (N, C)."""
    fitted = fit_whitening(whitening, in_batches(tokens))
    white = Whitener(*fitted)(tokens, [str(n) for n in range(len(tokens))]).tokens_BTC
    return np.asarray(white.flatten(0, 1).double().numpy())


# ---- the fit ---------------------------------------------------------------------------------------------------------


def test_mean_and_deviation_are_numpys() -> None:
    tokens = make_tokens()
    raw_NC = tokens.flatten(0, 1).double().numpy()
    whitening, statistics = fit_whitening(MeanStd(), in_batches(tokens))
    np.testing.assert_allclose(statistics[0], raw_NC.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics[1], np.sqrt(raw_NC.var(0) + 1e-5 * raw_NC.var(0).mean()), rtol=1e-6)
    assert (whitening.num_tokens, statistics.dtype, statistics.shape) == (400, np.float32, (2, CHANNELS))
    white_NC = whitened(MeanStd(), tokens)
    np.testing.assert_allclose(white_NC.mean(0), 0, atol=2e-3)
    np.testing.assert_allclose(white_NC.std(0), 1, atol=2e-3)


def test_principal_components_are_numpys() -> None:
    tokens = make_tokens()
    raw_NC = tokens.flatten(0, 1).double().numpy()
    whitening, statistics = fit_whitening(Pca(), in_batches(tokens))
    assert (whitening.num_tokens, statistics.dtype, statistics.shape) == (400, np.float32, (1 + CHANNELS, CHANNELS))
    _, singular_C, axes_CC = np.linalg.svd(raw_NC - raw_NC.mean(0), full_matrices=False)  # largest first
    variances_C = singular_C**2 / len(raw_NC)
    expected_CC = axes_CC / np.sqrt(variances_C + 1e-5 * variances_C.mean())[:, None]
    expected_CC *= np.sign(np.take_along_axis(axes_CC, np.abs(axes_CC).argmax(1)[:, None], axis=1))
    np.testing.assert_allclose(statistics[0], raw_NC.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics[1:], expected_CC, rtol=1e-4, atol=1e-5 * np.abs(expected_CC).max())


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 1.0, 1e4]))
def test_the_whitened_sample_has_the_identity_as_covariance(seed: int, scale: float) -> None:
    """And can be undone, whatever the magnitude."""
    tokens = make_tokens(seed=seed) * scale
    white_NC = whitened(Pca(), tokens)
    covariance_CC = np.cov(white_NC.T, bias=True)
    np.testing.assert_allclose(covariance_CC, np.eye(CHANNELS), atol=6e-3)
    np.testing.assert_allclose(white_NC.mean(0), 0, atol=6e-3)
    whitening, statistics = fit_whitening(Pca(), in_batches(tokens))
    raw_NC = tokens.flatten(0, 1).numpy()
    back_NC = whitening.restore(white_NC.astype(np.float32), statistics)
    bound_NC = whitening.restored_error(np.abs(white_NC) * 2**-11 + 2**-25, statistics)
    norm_N1 = np.linalg.norm(raw_NC - statistics[0], axis=1, keepdims=True)
    assert (np.abs(back_NC - raw_NC) <= bound_NC + 2**-20 * CHANNELS**0.5 * norm_N1 + 2**-22 * np.abs(raw_NC)).all()


@settings(max_examples=20)
@given(st.integers(1, 40), st.sampled_from([MeanStd(), Pca()]))
def test_how_the_sample_is_cut_does_not_matter(size: int, whitening: MeanStd | Pca) -> None:
    """But for the last digits of float64; the same batches give the same bits."""
    tokens = make_tokens()
    whole, cut = (fit_whitening(whitening, in_batches(tokens, batch)) for batch in (len(tokens), size))
    np.testing.assert_allclose(cut.statistics, whole.statistics, rtol=1e-5, atol=1e-6)
    assert fit_whitening(whitening, in_batches(tokens, size)).whitening == cut.whitening


def test_sums_do_not_cancel() -> None:
    """A mean a million times the deviation, which E[x^2] - E[x]^2 in float32 would lose altogether."""
    raw_NC = 1e6 + np.random.default_rng(0).normal(size=(1000, 3))
    moments = Moments(3, torch.device("cpu"), with_covariance=True)
    for first in range(0, 1000, 70):
        moments.add(torch.from_numpy(raw_NC[first : first + 70]))
    np.testing.assert_allclose(moments.covariance_CC.numpy(), np.cov(raw_NC.T, bias=True), rtol=1e-8, atol=1e-9)


def test_signs_do_not_depend_on_the_sample() -> None:
    """Two halves of a sample give nearly the same axes, pointing the same way."""
    tokens = make_tokens(num_views=4000)
    one, other = (fit_whitening(Pca(), in_batches(part, 500)).statistics[1:] for part in (tokens[::2], tokens[1::2]))
    cosines_C = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    assert (cosines_C > 0.95).all()
    largest_C1 = np.abs(one).argmax(1)[:, None]
    assert (np.take_along_axis(one, largest_C1, axis=1) > 0).all()


def test_channels_that_never_vary_are_not_blown_up() -> None:
    tokens = make_tokens()
    tokens[..., 3] = 7.0
    for whitening in (MeanStd(), Pca()):
        white_NC = whitened(whitening, tokens)
        assert np.isfinite(white_NC).all() and np.abs(white_NC).max() < 10
        _, statistics = fit_whitening(whitening, in_batches(tokens))
        least = np.sqrt(1e-5 * tokens.flatten(0, 1).double().numpy().var(0).mean())
        scale = statistics[1] if isinstance(whitening, MeanStd) else 1 / np.linalg.norm(statistics[1:], axis=1)
        assert scale.min() == pytest.approx(least, rel=1e-3)


def test_what_nothing_can_be_learnt_from() -> None:
    few, enough = (make_tokens(num_views=views, tokens=2 * CHANNELS) for views in (4, 5))
    message = (
        r"pca whitening of 12 channels needs 120 tokens, found 96 in the 4 views of the sample; raise "
        r"extract\.fit_views to 5 at least \(20 are better\)"
    )
    with pytest.raises(InputError, match=message):
        fit_whitening(Pca(), in_batches(few))
    fit_whitening(MeanStd(), in_batches(few))
    fit_whitening(Pca(), in_batches(enough))
    for whitening in (MeanStd(), Pca()):
        with pytest.raises(InputError, match="all 400 tokens of the sample are the same"):
            fit_whitening(whitening, in_batches(torch.ones(40, 10, CHANNELS)))
        with pytest.raises(InputError, match="cannot be fitted on no views"):
            fit_whitening(whitening, iter(()))
        wrong = make_tokens()
        wrong[17, 3, 2] = float("nan")
        with pytest.raises(DecantError, match=r"NaN.*for 1 of 16 images of a batch \(17\.png\)"):
            fit_whitening(whitening, in_batches(wrong))


# ---- real features ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_tokens() -> torch.Tensor:
    """The demo teacher's tokens of a view of every 20th of its photographs, in random order: (131, 49, 320)."""
    from PIL import Image

    from extract.backends import load_teacher
    from extract.teachers import find_teacher
    from storage.views import RandomResizedCrop, Renderer

    paths = sorted(Path(elpv_dataset.__file__).parent.glob("data/images/*.png"))[::20]
    teacher, sampler, renderer = (
        load_teacher(find_teacher("efficientnet-lite0"), device="cpu"),
        RandomResizedCrop(),
        Renderer(),
    )
    pixels = []
    for path in paths:
        image_HWC = np.asarray(Image.open(path).convert("RGB"))
        pixels.append(renderer.render_view(image_HWC, sampler.view(path.name, 0, image_HWC.shape[:2]), 224))
    batches = [np.stack(pixels[first : first + 16]) for first in range(0, len(pixels), 16)]
    tokens = torch.cat([teacher(torch.from_numpy(batch)) for batch in batches])
    return tokens[torch.from_numpy(np.random.default_rng(0).permutation(len(tokens)))]


def test_predicting_zero_on_real_features(real_tokens: torch.Tensor) -> None:
    """Smooth-L1 (beta 2) of a student that knows nothing, on views that the fit has seen, and that it has not: what a
    covariance of few views takes for directions without variance has some in others."""
    found = {}
    sample, held_out = real_tokens[:100], real_tokens[100:]
    for whitening in (LayerNorm(), MeanStd(), Pca()):
        fitted = (
            (whitening, NO_STATISTICS)
            if isinstance(whitening, LayerNorm)
            else fit_whitening(whitening, in_batches(sample))
        )
        for part, tokens in (("seen", sample), ("unseen", held_out)):
            white = Whitener(*fitted)(tokens, [str(number) for number in range(len(tokens))]).tokens_BTC
            size = np.abs(white.double().numpy())
            found[whitening.kind, part] = float(np.where(size < 2, size**2 / 4, size - 1).mean())
    expected = {
        ("layer_norm", "seen"): 0.247, ("layer_norm", "unseen"): 0.247, ("mean_std", "seen"): 0.245,
        ("mean_std", "unseen"): 0.271, ("pca", "seen"): 0.244, ("pca", "unseen"): 0.417,
    }  # fmt: skip
    assert found == pytest.approx(expected, abs=2e-3)


def test_components_of_real_features_are_uncorrelated_and_can_be_undone(real_tokens: torch.Tensor) -> None:
    whitening, statistics = fit_whitening(Pca(), in_batches(real_tokens))
    white_NC = Whitener(whitening, statistics)(real_tokens, ["x"] * len(real_tokens)).tokens_BTC.flatten(0, 1).numpy()
    covariance_CC = np.cov(white_NC.T.astype(np.float64), bias=True)
    np.testing.assert_allclose(covariance_CC, np.eye(len(covariance_CC)), atol=5e-3)
    raw_NC = real_tokens.flatten(0, 1).numpy()
    back_NC = whitening.restore(white_NC.astype(np.float32), statistics)
    relative = np.linalg.norm(back_NC - raw_NC, axis=1) / np.linalg.norm(raw_NC - statistics[0], axis=1)
    print(f"relative error of a token {relative.mean():.1e}, the largest {relative.max():.1e}")
    assert relative.max() < 2**-11
