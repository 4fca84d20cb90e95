"""A random subset of each view's tokens, for stores of very many views.

Which tokens are kept is a function of (seed, key, view index): positions are drawn again instead of being stored. Every
token has the same chance, so the mean loss over the kept ones is an unbiased estimate of the loss over all.
"""

from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from storage.schema import Schema
from storage.views import keyed_generator


class TokenSubset(Schema):
    """Keep `ceil(fraction * tokens)` tokens of each view."""

    fraction: float = Field(gt=0, lt=1)
    seed: int = 0

    @classmethod
    def of(cls, fraction: float, seed: int) -> Self | None:
        """A subset; None for all tokens."""
        return None if fraction == 1 else cls(fraction=fraction, seed=seed)

    def num_kept(self, num_tokens: int) -> int:
        return int(np.ceil(self.fraction * num_tokens))

    def positions(self, key: str, view_index: int, num_tokens: int) -> NDArray[np.int64]:
        """Ascending positions, among all tokens of the view, of the kept ones."""
        # raw words, because the streams of numpy's bit generators never change; `permutation` may, between releases
        bits = keyed_generator(self.seed, f"tokens/{key}", view_index).bit_generator
        order = np.argsort(bits.random_raw(num_tokens), kind="stable")
        return np.sort(order[: self.num_kept(num_tokens)])
