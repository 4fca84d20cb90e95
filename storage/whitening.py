"""How a teacher's tokens became the stored ones, and back. A whitening is a frozen record equal to its JSON, as a
store's plan holds it.

    layer_norm  each token by itself over its channels                 the paper's
    mean_std    each channel by its mean and deviation over a sample
    pca         along the principal components of a sample, to unit variance
    none        the tokens as they are

The middle two are fitted: what they learnt of a sample is in the store's `whitening.npy`, whose digest stands in the
plan. Applying a whitening is the business of `extract/whiten.py`; undoing it is here. Letters: T tokens, C channels.
"""

from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field as Setting
from pydantic import StringConstraints

from storage.errors import DamagedError, look_up
from storage.files import REMEDY, Files
from storage.fingerprint import digest_bytes
from storage.npy import npy_bytes, read_npy
from storage.schema import Schema

STATISTICS_FILE = "whitening.npy"
Statistics = NDArray[np.float32]
"""What a fitted whitening learnt: its rows of C numbers. No rows for the others."""


class _Whitening(Schema):
    """What the whitenings have in common that learn nothing."""

    @property
    def is_fitted(self) -> bool:
        """Whether it has all that it learns from a sample."""
        return True

    @property
    def is_per_token(self) -> bool:
        """Whether the mean and deviation beside each token are needed to undo it; else they are 0 and 1."""
        return False

    def num_rows(self, channels: int) -> int:
        """Rows of the statistics."""
        return 0

    def unfitted(self) -> Self:
        """The same without what it learnt."""
        return self

    def restore(self, tokens_BTC: NDArray[np.float32], statistics: Statistics) -> NDArray[np.float32]:
        """Tokens that were multiplied by their own deviation, and their mean added, to the teacher's own."""
        return tokens_BTC

    def restored_error(self, error_BTC: NDArray[np.floating], statistics: Statistics) -> NDArray[np.floating]:
        """How far the result of `restore` may be from the truth, for tokens that are as far as `error_BTC` from it."""
        return error_BTC


class LayerNorm(_Whitening):
    """(token - mean) / sqrt(variance + eps) over the channels of every token; the paper's, and its authors' eps."""

    kind: Literal["layer_norm"] = "layer_norm"
    eps: float = Setting(default=1e-5, gt=0)

    @property
    def is_per_token(self) -> bool:
        return True


class NoWhitening(_Whitening):
    """The teacher's tokens as they are, rounded to float16."""

    kind: Literal["none"] = "none"


class _Fitted(_Whitening):
    """What the whitenings have in common that learn from a sample."""

    eps: float = Setting(default=1e-5, gt=0)
    """Added to every variance, as a part of their mean: no direction is blown up by more than 1 / sqrt(eps)."""
    num_tokens: int = Setting(default=0, ge=0)
    """Tokens of the sample; filled in when a store is planned, as is the digest of the file with the statistics."""
    statistics: Annotated[str, StringConstraints(pattern="^([0-9a-f]{32})?$")] = ""

    @property
    def is_fitted(self) -> bool:
        return bool(self.statistics)

    def unfitted(self) -> Self:
        return self.model_copy(update={"num_tokens": 0, "statistics": ""})


class MeanStd(_Fitted):
    """(token - mean) / std with one mean and std for each channel: `statistics` (2, C)."""

    kind: Literal["mean_std"] = "mean_std"

    def num_rows(self, channels: int) -> int:
        return 2

    def restore(self, tokens_BTC: NDArray[np.float32], statistics: Statistics) -> NDArray[np.float32]:
        restored_BTC: NDArray[np.float32] = tokens_BTC * statistics[1] + statistics[0]
        return restored_BTC

    def restored_error(self, error_BTC: NDArray[np.floating], statistics: Statistics) -> NDArray[np.floating]:
        spread_BTC: NDArray[np.floating] = error_BTC * statistics[1]
        return spread_BTC


class Pca(_Fitted):
    """(token - mean) @ W.T; the rows of W are the principal components, largest variance first, each divided by the
    deviation along it: `statistics` (1 + C, C), the mean and W."""

    kind: Literal["pca"] = "pca"

    def num_rows(self, channels: int) -> int:
        return 1 + channels

    def restore(self, tokens_BTC: NDArray[np.float32], statistics: Statistics) -> NDArray[np.float32]:
        restored_BTC: NDArray[np.float32] = tokens_BTC @ _inverse(statistics[1:]) + statistics[0]
        return restored_BTC

    def restored_error(self, error_BTC: NDArray[np.floating], statistics: Statistics) -> NDArray[np.floating]:
        spread_BTC: NDArray[np.floating] = error_BTC @ np.abs(_inverse(statistics[1:]))
        return spread_BTC


def _inverse(weight_CC: Statistics) -> Statistics:
    """The inverse of W.T: rows of W are orthogonal, so each is divided by its squared length."""
    squared_C1 = np.einsum("jc,jc->j", weight_CC, weight_CC, dtype=np.float64)[:, None]
    return np.asarray(weight_CC / squared_C1, np.float32)


Whitening = LayerNorm | MeanStd | Pca | NoWhitening
WHITENINGS: dict[str, Whitening] = {
    whitening.kind: whitening for whitening in (LayerNorm(), MeanStd(), Pca(), NoWhitening())
}
"""By the name that the command line takes, with their defaults."""
AnyWhitening = Annotated[Whitening, Setting(discriminator="kind")]
NO_STATISTICS: Statistics = np.empty((0, 0), np.float32)


def find_whitening(name: str) -> Whitening:
    """Look a whitening up.

    Raises:
        ConfigError: no such name; offers the nearest ones.
    """
    return look_up("whitening", name, WHITENINGS)


def encode_statistics(statistics: Statistics) -> bytes:
    """The bytes of `whitening.npy`."""
    return npy_bytes(np.ascontiguousarray(statistics, "<f4"))


def statistics_files(whitening: Whitening, statistics: Statistics) -> dict[str, bytes]:
    """The file that a store keeps for its whitening; none where that learns nothing.

    Raises:
        AssertionError: these are not the statistics whose digest the whitening holds.
    """
    if not isinstance(whitening, MeanStd | Pca):
        return {}
    data = encode_statistics(statistics)
    if digest_bytes(data) != whitening.statistics:
        raise AssertionError(f"these are not the statistics of the plan's {whitening.kind} whitening")
    return {STATISTICS_FILE: data}


def load_statistics(files: Files, whitening: Whitening, channels: int) -> Statistics:
    """What a store's whitening learnt; no rows where it learns nothing.

    Raises:
        DamagedError: the file is missing, or is not the one whose digest the plan holds.
    """
    rows = whitening.num_rows(channels)
    if not isinstance(whitening, MeanStd | Pca):
        return NO_STATISTICS
    path = f"{files.location}/{STATISTICS_FILE}"
    size, expected = files.size(STATISTICS_FILE), 4 * rows * channels
    if size is not None and not expected < size < expected + 2**16:  # before memory is taken for it
        raise DamagedError(f"{path} has {size:,} bytes, expected {expected:,} and a header; {REMEDY}")
    return parse_statistics(path, files.read(STATISTICS_FILE), whitening, channels)


def parse_statistics(path: str, data: bytes, whitening: MeanStd | Pca, channels: int) -> Statistics:
    """The statistics from the bytes of their file; raises as `load_statistics` does."""
    if digest_bytes(data) != whitening.statistics:
        raise DamagedError(f"{path} is not the {whitening.kind} whitening that plan.json names; {REMEDY}")
    statistics = read_npy(path, data, np.dtype("<f4"), (whitening.num_rows(channels), channels))
    scale_N1 = statistics[1:] if isinstance(whitening, MeanStd) else np.abs(statistics[1:]).max(axis=1, keepdims=True)
    if not np.isfinite(statistics).all() or not (scale_N1 > 0).all():
        raise DamagedError(f"{path} holds numbers that whiten nothing (not finite, or not above 0); {REMEDY}")
    return statistics
