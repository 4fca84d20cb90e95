"""A sample of views: what whitening and encodings learn from, and what a teacher's fast path is judged by."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from extract.render import Look, UnusableImage, ViewRenderer
from extract.teacher import Teacher
from storage.errors import InputError
from storage.image_list import ImageList
from storage.records import ImageKey, StorePlan

_BATCH = 16
"""Views at a time, whatever memory is free: the same machine learns the same again."""


class SampleViews(NamedTuple):
    """Some views as a teacher looks at them."""

    pixels_BHWC: Tensor  # uint8
    keys: Sequence[ImageKey]
    """The image of each row."""


class SampleBatch(NamedTuple):
    """The teacher's own tokens of some views."""

    tokens_BTC: Tensor
    keys: Sequence[ImageKey]


def iter_sample(plan: StorePlan, images: ImageList, teacher: Teacher, num_views: int) -> Iterator[SampleBatch]:
    """Tokens of `iter_sample_views`. Raises what that does."""
    for views in iter_sample_views(plan, images, teacher.spec.input_px, num_views):
        yield SampleBatch(teacher(views.pixels_BHWC), views.keys)


def iter_sample_views(plan: StorePlan, images: ImageList, input_px: int, num_views: int) -> Iterator[SampleViews]:
    """About `num_views` views of images that are spread evenly over the list: one view each, or more where there are
    fewer images.

    Raises:
        InputError: none of these images can be used.
    """
    look = Look.of(plan, input_px)
    renderer = ViewRenderer(plan, images, [look])
    positions = np.unique(np.linspace(0, len(images) - 1, min(num_views, len(images))).astype(np.int64))
    views_each = min(plan.views_per_image, max(1, num_views // len(images)))
    keys: list[ImageKey] = []
    pixels = []
    num_found = 0
    for position in positions.tolist():
        rendered = renderer.render(position, num_views=views_each)
        if isinstance(rendered, UnusableImage):
            continue
        for view in rendered:
            keys.append(view.key)
            pixels.append(view.pictures[look].pixels_HWC)
            num_found += 1
            if len(keys) == _BATCH:
                yield SampleViews(torch.from_numpy(np.stack(pixels)), keys)
                keys, pixels = [], []
    if keys:
        yield SampleViews(torch.from_numpy(np.stack(pixels)), keys)
    if not num_found:
        raise InputError(
            f"none of {len(positions)} images of {images.location} can be decoded; is it the right folder?"
        )
