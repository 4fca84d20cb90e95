"""Whitening against the authors' non-affine LayerNorm and against float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from extract.whiten import Whitener
from storage.errors import InputError
from storage.whitening import LayerNorm, MeanStd, NoWhitening, Pca, Whitening
from tests.fixtures.whitenings import MADE_UP

EPS = 1e-5
"""The authors'; written here once more, because a change of it must fail."""
KEYS = ["a/0.png", "a/0.png", "b/1.png"]

whiten = Whitener(LayerNorm())


def make_tokens(scale: float = 1.0, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(KEYS), 5, 48, generator=generator) * scale + offset


def whiten_slowly(tokens: torch.Tensor) -> NDArray[np.float64]:
    """The formula, in float64."""
    raw = tokens.double().numpy()
    white: NDArray[np.float64] = (raw - raw.mean(-1, keepdims=True)) / np.sqrt(raw.var(-1, keepdims=True) + EPS)
    return white


def ulps(found: torch.Tensor, expected: NDArray[np.float64]) -> float:
    """The largest difference, in units of the last place of fp16 at each expected value."""
    gap = np.abs(found.double().numpy() - expected)
    return float((gap / np.spacing(np.abs(expected).astype(np.float16)).astype(np.float64)).max())


def test_it_is_the_authors_layer_norm() -> None:
    tokens = make_tokens(scale=3, offset=1)
    expected = F.layer_norm(tokens, (48,), eps=1e-5)
    found = whiten(tokens, KEYS).tokens_BTC
    assert found.dtype == torch.float16
    assert ulps(found, expected.double().numpy()) <= 1


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 1e4, 1e15])
def test_any_magnitude_is_whitened_to_half_a_unit_of_fp16(scale: float) -> None:
    tokens = make_tokens(scale)
    assert ulps(whiten(tokens, KEYS).tokens_BTC, whiten_slowly(tokens)) <= 0.51


def test_the_raw_tokens_come_back() -> None:
    tokens = make_tokens(scale=20, offset=-7)
    white, mean, std = whiten(tokens, KEYS)
    assert (mean.dtype, std.dtype, mean.shape) == (torch.float32, torch.float32, tokens.shape[:2])
    back = white.float() * std[..., None] + mean[..., None]
    # half a unit of fp16 at the whitened value, times the token's std
    bound = torch.from_numpy(np.spacing(white.abs().numpy())).float() * std[..., None] * 0.51
    assert ((back - tokens).abs() <= bound + 1e-4).all()


def test_constant_tokens_become_zero() -> None:
    tokens = make_tokens()
    tokens[1, 2] = 123.0
    white, mean, std = whiten(tokens, KEYS)
    assert (white[1, 2] == 0).all()
    assert mean[1, 2] == 123
    assert std[1, 2] == pytest.approx(EPS**0.5)


def test_half_precision_tokens_are_whitened_in_float32() -> None:
    tokens = (make_tokens() * 2000).half()  # their variance overflows fp16
    assert ulps(whiten(tokens, KEYS).tokens_BTC, whiten_slowly(tokens)) <= 0.51


def test_rows_do_not_touch_each_other() -> None:
    tokens = make_tokens()
    alone = whiten(tokens[2:], KEYS[2:])
    for part, part_alone in zip(whiten(tokens, KEYS), alone, strict=True):
        assert torch.equal(part[2:], part_alone)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_cannot_be_whitened_is_refused_with_the_image(value: float) -> None:
    """1e30 is finite but its variance is not: it would silently become zero."""
    tokens = make_tokens()
    tokens[2, 4, 7] = value
    with pytest.raises(InputError, match=r"1 of 2 images of a batch \(b/1\.png\)"):
        whiten(tokens, KEYS)


# ---- the other whitenings --------------------------------------------------------------------------------------------


def make_narrow(scale: float = 1.0, offset: float = 0.0) -> torch.Tensor:
    """Tokens of the made-up whitenings' 8 channels."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(KEYS), 5, 8, generator=generator) * scale + offset


def whitener_of(kind: str) -> Whitener:
    return Whitener(*MADE_UP[kind])


def formula(kind: str, tokens: torch.Tensor) -> NDArray[np.float64]:
    raw, statistics = tokens.double().numpy(), MADE_UP[kind][1].astype(np.float64)
    if kind == "mean_std":
        return np.asarray((raw - statistics[0]) / statistics[1])
    return np.asarray((raw - statistics[0]) @ statistics[1:].T) if kind == "pca" else raw


@pytest.mark.parametrize("kind", ["mean_std", "pca", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_each_is_its_formula(kind: str, dtype: torch.dtype) -> None:
    """To half a unit of fp16, but for what float32's sums lose where parts cancel."""
    tokens = make_narrow(scale=3, offset=1).to(dtype)
    white, mean, std = whitener_of(kind)(tokens, KEYS)
    assert (white.dtype, mean.dtype, std.dtype) == (torch.float16, torch.float32, torch.float32)
    expected = formula(kind, tokens)
    half_a_unit = np.spacing(np.abs(expected).astype(np.float16)).astype(np.float64) * 0.51
    assert (np.abs(white.double().numpy() - expected) <= half_a_unit + 1e-5).all()
    assert torch.equal(mean, torch.zeros(3, 5)) and torch.equal(std, torch.ones(3, 5))


@pytest.mark.parametrize("kind", ["mean_std", "pca", "none"])
def test_a_view_does_not_depend_on_its_batch(kind: str) -> None:
    """To the last bit, so that the size of batches is no part of a store."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(9, 50, 96, generator=generator)
    statistics = torch.randn(97 if kind == "pca" else 2, 96, generator=generator).abs().numpy() + 0.1
    whitening: Whitening = {"mean_std": MeanStd, "pca": Pca}.get(kind, NoWhitening)()
    whitener = Whitener(_as_fitted(whitening), statistics)
    together = whitener(tokens, [str(n) for n in range(9)]).tokens_BTC
    for first, last in ((0, 1), (1, 4), (4, 9)):
        part = whitener(tokens[first:last], [str(n) for n in range(first, last)]).tokens_BTC
        assert torch.equal(part, together[first:last])


def _as_fitted(whitening: Whitening) -> Whitening:
    return whitening.model_copy(update={"statistics": "0" * 32}) if not whitening.is_fitted else whitening


@pytest.mark.parametrize("kind", MADE_UP)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_by_all(kind: str, value: float) -> None:
    tokens = make_narrow()
    tokens[0, 0, 0] = value
    with pytest.raises(InputError, match=r"NaN, infinity .* 1 of 2 images of a batch \(a/0\.png\); look at these"):
        whitener_of(kind)(tokens, KEYS)


@pytest.mark.parametrize("kind", ["mean_std", "pca", "none"])
def test_what_float16_cannot_hold_is_refused_with_what_to_do(kind: str) -> None:
    tokens = make_narrow()
    tokens[2, 1] = 1e6
    with pytest.raises(InputError, match=rf"beyond float16 as {kind} leaves them for 1 .* \(b/1\.png\).*=layer_norm\)"):
        whitener_of(kind)(tokens, KEYS)
    whitener_of("layer_norm")(tokens, KEYS)
    tokens[2, 1] = 65504 if kind == "none" else 1e3
    whitener_of(kind)(tokens, KEYS)


def test_nothing_is_whitened_before_it_is_fitted() -> None:
    with pytest.raises(AssertionError, match="pca has not been fitted"):
        Whitener(Pca())


@pytest.mark.parametrize("kind", MADE_UP)
def test_the_store_gives_back_what_was_whitened(kind: str) -> None:
    """`restore` is the inverse; the bound is that of rounding to fp16, spread by `restored_error`, and of float32."""
    whitening, statistics = MADE_UP[kind]
    tokens = make_narrow(scale=5, offset=-2)
    white, mean, std = (part.numpy() for part in whitener_of(kind)(tokens, KEYS))
    back = whitening.restore(white.astype(np.float32) * std[..., None] + mean[..., None], statistics)
    rounding = (np.abs(white.astype(np.float64)) * 2**-11 + 2**-25) * std[..., None]
    bound = whitening.restored_error(rounding, statistics) + 1e-5
    assert (np.abs(back - tokens.numpy()) <= bound).all()


# ---- how large targets are -------------------------------------------------------------------------------------------


def smooth_l1_of_zero(targets: NDArray[np.float64]) -> float:
    """What predicting zero scores (beta 2)."""
    size = np.abs(targets)
    return float(np.where(size < 2, size**2 / 4, size - 1).mean())


def test_predicting_zero_scores_a_quarter_on_gaussian_tokens() -> None:
    tokens = torch.randn(8, 50, 768, generator=torch.Generator().manual_seed(0)) * 7 + 3
    white = whiten(tokens, [str(n) for n in range(8)]).tokens_BTC
    assert smooth_l1_of_zero(white.double().numpy()) == pytest.approx(0.247, abs=1e-3)
