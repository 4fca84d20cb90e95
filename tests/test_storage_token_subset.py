"""A random part of each view's tokens: which ones is known everywhere, and their mean loss is right on average."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from storage.token_subset import TokenSubset

ROOT = Path(__file__).resolve().parent.parent


@given(st.floats(0.001, 0.999), st.integers(0, 2**63), st.text(max_size=20), st.integers(0, 100), st.integers(1, 300))
def test_positions_are_ascending_and_as_many_as_said(
    fraction: float, seed: int, key: str, view_index: int, num_tokens: int
) -> None:
    subset = TokenSubset(fraction=fraction, seed=seed)
    positions_T = subset.positions(key, view_index, num_tokens)
    assert len(positions_T) == subset.num_kept(num_tokens) == min(num_tokens, -int(-fraction * num_tokens // 1))
    assert (np.diff(positions_T) > 0).all() and positions_T[0] >= 0 and positions_T[-1] < num_tokens


def test_positions_are_the_same_in_every_process_and_release() -> None:
    """They are not stored: another numpy, machine or order of work must draw the same ones. Never change these."""
    code = (
        "from storage.token_subset import TokenSubset\n"
        "print([TokenSubset(fraction=0.1, seed=5).positions(f'n01/{k}.JPEG', v, 50).tolist()"
        " for k in (2, 0, 1) for v in (1, 0)])"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    subset = TokenSubset(fraction=0.1, seed=5)
    mine = [subset.positions(f"n01/{key}.JPEG", view, 50).tolist() for key in (2, 0, 1) for view in (1, 0)]
    assert child.stdout.strip() == str(mine)
    assert mine == [
        [3, 13, 21, 29, 44],
        [8, 15, 19, 31, 41],
        [3, 4, 11, 33, 40],
        [8, 14, 18, 31, 41],
        [7, 23, 38, 42, 46],
        [3, 4, 5, 10, 12],
    ]


def by_hand(seed: int, key: str, view_index: int, num_tokens: int) -> list[int]:
    """Written a second time from the description: tokens ordered by Philox words, the first ones kept."""
    words = hashlib.blake2b(f"{seed}\0{view_index}\0tokens/{key}".encode(), digest_size=16).digest()
    random_T = np.random.Philox(key=np.frombuffer(words, "<u8")).random_raw(num_tokens).tolist()
    return sorted(range(num_tokens), key=lambda token: random_T[token])


@given(st.integers(0, 1000), st.text(max_size=9), st.integers(0, 9), st.integers(1, 60))
def test_positions_by_hand(seed: int, key: str, view_index: int, num_tokens: int) -> None:
    subset = TokenSubset(fraction=0.3, seed=seed)
    expected = by_hand(seed, key, view_index, num_tokens)[: subset.num_kept(num_tokens)]
    assert subset.positions(key, view_index, num_tokens).tolist() == sorted(expected)


def test_seed_key_and_view_each_change_them() -> None:
    drawn = {
        tuple(TokenSubset(fraction=0.25, seed=seed).positions(key, view, 197).tolist())
        for seed in (0, 1) for key in ("a", "b", "a/b") for view in (0, 1)
    }  # fmt: skip
    assert len(drawn) == 12


def test_every_token_is_as_likely_as_any_other() -> None:
    """Chi-square over 4,000 views; each token's count varies by (1 - fraction) less than a Poisson number."""
    subset, tokens, views = TokenSubset(fraction=0.2, seed=1), 50, 4000
    counts_T = np.zeros(tokens)
    together_TT = np.zeros((tokens, tokens))
    for view in range(views):
        kept = subset.positions(f"n{view // 4:05d}/image.JPEG", view % 4, tokens)
        counts_T[kept] += 1
        together_TT[np.ix_(kept, kept)] += 1
    expected = views * 0.2
    chi_square = ((counts_T - expected) ** 2 / (expected * 0.8)).sum() * (tokens - 1) / tokens
    assert 23.98 < chi_square < 85.35  # 0.1 % on either side, of 49 degrees of freedom
    pairs = together_TT[np.triu_indices(tokens, 1)]
    wanted = views * (10 * 9) / (50 * 49)
    assert abs(pairs.mean() - wanted) < 1e-9 and ((pairs - wanted) ** 2 / wanted).mean() == pytest.approx(1, abs=0.2)


def test_the_mean_loss_over_the_kept_tokens_is_unbiased() -> None:
    """Also where the loss depends on the place in the picture, and between neighbours."""
    generator, subset, views = np.random.default_rng(2), TokenSubset(fraction=0.3, seed=9), 3000
    place_T = np.linspace(0, 2, 197) ** 2
    difference_V = np.empty(views)
    for view in range(views):
        loss_T = place_T + generator.normal(size=197).cumsum() ** 2 / 50
        kept = subset.positions(f"{view}.png", 0, 197)
        difference_V[view] = loss_T[kept].mean() - loss_T.mean()
    standard_error = difference_V.std() / np.sqrt(views)
    assert standard_error < 0.01 and abs(difference_V.mean()) < 3.3 * standard_error


def test_all_tokens_are_no_subset() -> None:
    assert TokenSubset.of(1, 7) is None
    assert TokenSubset.of(0.5, 7) == TokenSubset(fraction=0.5, seed=7)
    for fraction in (0.0, 1.0, -0.1, 1.5, float("nan")):
        with pytest.raises(ValidationError):
            TokenSubset(fraction=fraction)
