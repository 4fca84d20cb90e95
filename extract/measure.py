"""What each precision of a teacher changes, and how fast it is: on some real views, before a long extraction.

python -m pipeline precision --teacher clip-l --data /data/imagenet
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from extract.backends import load_teacher
from extract.batch_size import choose_batch_size
from extract.config import ExtractConfig
from extract.plan import plan_before_fit
from extract.precision import Agreement, compare_with_float32
from extract.resolve import resolve_teacher
from extract.sample import SampleViews, iter_sample_views
from extract.spec import Precision
from extract.teacher import Teacher
from storage.image_index import load_index

_LEAST_SECONDS = 3.0


class Measured(NamedTuple):
    """One precision of a teacher."""

    agreement: Agreement
    views_per_second: float
    """Of the forward pass alone."""
    batch_size: int


def measure(cfg: ExtractConfig, data: Path, precisions: Iterable[Precision], num_views: int) -> Iterator[Measured]:
    """Every precision on the same views.

    Args:
        data: an image index file.

    Raises:
        InputError: no image can be used, or the weights cannot be had.
    """
    spec, images = resolve_teacher(cfg), load_index(data).split(cfg.split)
    torch.set_num_threads(cfg.run.threads)
    views: list[SampleViews] = []
    for precision in precisions:
        teacher = load_teacher(
            spec, weights=cfg.weights, device=cfg.run.device, precision=precision, is_compiled=cfg.run.compile,
            channels_last=cfg.run.channels_last,
        )  # fmt: skip
        views = views or list(
            iter_sample_views(plan_before_fit(cfg, images, teacher), images, spec.input_px, num_views)
        )
        batch_size = choose_batch_size(teacher, cfg.run.batch_size)
        agreement = compare_with_float32(teacher, views)
        yield Measured(agreement, _views_per_second(teacher, views, batch_size), batch_size)
        del teacher  # before the next one is loaded
        torch.cuda.empty_cache()


def _views_per_second(teacher: Teacher, views: Sequence[SampleViews], batch_size: int) -> float:
    """Full batches, which hold the same few views again and again, for some seconds."""
    pixels_BHWC = torch.cat([part.pixels_BHWC for part in views])
    pixels_BHWC = pixels_BHWC.repeat(-(-batch_size // len(pixels_BHWC)), 1, 1, 1)[:batch_size]
    teacher(pixels_BHWC).sum().item()  # warms up
    count, started = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - started < _LEAST_SECONDS:
        teacher(pixels_BHWC).sum().item()  # waits for the GPU
        count += batch_size
    return count / (time.perf_counter() - started)
