"""How far a teacher's fast path is from plain float32, on real views, and how much faster it is.

Whitening removes a token's mean and length, so what reaches a student is its direction: the cosine between whitened
tokens says how much of that a lower precision, or a compiled forward pass, has changed.
"""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from extract.backends import load_teacher
from extract.batch_size import choose_batch_size
from extract.config import ExtractConfig
from extract.resolve import resolve_teacher
from extract.spec import Precision
from extract.teacher import Teacher
from storage.errors import BadImageError, InputError
from storage.image_index import ImageList, load_index

WORST_COSINE = 0.99
"""A store whose worst token is below this is warned of: storing as int8 keeps every token above 0.999."""


class Agreement(NamedTuple):
    """Cosines between the whitened tokens of the fast path and those of float32, over all tokens of some views."""

    precision: str
    num_views: int
    mean_cosine: float
    worst_cosine: float

    @property
    def is_good(self) -> bool:
        return self.worst_cosine >= WORST_COSINE

    def __str__(self) -> str:
        return (
            f"{self.precision} against float32 on {self.num_views} views: mean cosine of the whitened tokens "
            f"{self.mean_cosine:.6f}, worst token {self.worst_cosine:.6f}"
        )


class Measured(NamedTuple):
    """One precision of a teacher."""

    agreement: Agreement
    views_per_second: float
    """Of the forward pass alone."""
    batch_size: int


def compare_with_float32(teacher: Teacher, pixels_BHWC: Tensor, batch_size: int) -> Agreement:
    """Run views (uint8) through the fast path and through plain float32.

    Returns:
        cosines; NaN where the fast path gave a value that is not finite.
    """
    cosines_N = torch.cat(
        [_token_cosines(teacher(batch), teacher.in_float32(batch)).flatten() for batch in pixels_BHWC.split(batch_size)]
    )
    mean, worst = round(float(cosines_N.mean()), 7), round(float(cosines_N.min()), 7)
    return Agreement(teacher.precision, len(pixels_BHWC), mean, worst)


def _token_cosines(fast_BTC: Tensor, exact_BTC: Tensor) -> Tensor:
    """Of each token's channels less their mean, (B, T); in float64, or 1 - 1e-7 could not be told from 1."""
    fast_BTC, exact_BTC = (tokens.double() - tokens.double().mean(-1, keepdim=True) for tokens in (fast_BTC, exact_BTC))
    return torch.nn.functional.cosine_similarity(fast_BTC, exact_BTC, dim=-1)


def sample_pixels(cfg: ExtractConfig, images: ImageList, input_px: int, num_views: int) -> Tensor:
    """First views of images that are spread evenly over the list, (B, H, W, 3) uint8.

    Raises:
        InputError: none of these images can be used.
    """
    positions = np.unique(np.linspace(0, len(images) - 1, min(num_views, len(images))).astype(np.int64))
    rendered = []
    for position in positions.tolist():
        try:
            image_HWC = images.read_image(position)
        except BadImageError:
            continue  # counted where it is extracted
        view = cfg.sampler.view(images.keys[position], 0, image_HWC.shape[:2])
        rendered.append(torch.from_numpy(np.ascontiguousarray(cfg.renderer.render_view(image_HWC, view, input_px))))
    if not rendered:
        raise InputError(
            f"none of {len(positions)} images of {images.location} can be decoded; is it the right folder?"
        )
    return torch.stack(rendered)


def measure(cfg: ExtractConfig, data: Path, precisions: Iterable[Precision], num_views: int) -> Iterator[Measured]:
    """Every precision of a teacher on the same real views.

    Args:
        data: an image index file.

    Raises:
        InputError: see `sample_pixels` and `load_teacher`.
    """
    spec = resolve_teacher(cfg)
    torch.set_num_threads(cfg.run.threads)
    pixels_BHWC = sample_pixels(cfg, load_index(data).split(cfg.split), spec.input_px, num_views)
    for precision in precisions:
        teacher = load_teacher(
            spec, weights=cfg.weights, device=cfg.run.device, precision=precision, is_compiled=cfg.run.compile,
            channels_last=cfg.run.channels_last,
        )  # fmt: skip
        batch_size = min(choose_batch_size(teacher, cfg.run.batch_size), len(pixels_BHWC))
        agreement = compare_with_float32(teacher, pixels_BHWC, batch_size)  # warms up too
        yield Measured(agreement, _views_per_second(teacher, pixels_BHWC, batch_size), batch_size)


def _views_per_second(teacher: Teacher, pixels_BHWC: Tensor, batch_size: int) -> float:
    started = time.perf_counter()
    for batch in pixels_BHWC.split(batch_size):
        teacher(batch).sum().item()  # waits for the GPU
    return len(pixels_BHWC) / (time.perf_counter() - started)
