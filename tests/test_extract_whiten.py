"""Whitening against the authors' non-affine LayerNorm and against float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from extract.whiten import whiten
from storage.errors import DecantError

EPS = 1e-5
"""The authors'; written here once more, because a change of it must fail."""
KEYS = ["a/0.png", "a/0.png", "b/1.png"]


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
    with pytest.raises(DecantError, match=r"1 of 2 images of a batch \(b/1\.png\)"):
        whiten(tokens, KEYS)
