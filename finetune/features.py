"""Tokens of a store, teacher's or student's, pooled to one vector a view."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.pixels import open_pixels
from distill.student import DistillModel, normalise_images
from distill.token_layout import student_tokens
from storage.image_index import ImageList
from storage.stage import StopRequest
from storage.store import FeatureReader

BATCH = 64


class ViewBatch(NamedTuple):
    """Consecutive views of a store."""

    positions_B: NDArray[np.int64]
    """Of their images, in the store's list."""
    records_B: NDArray[np.int64]
    tokens_BTC: Tensor  # float32, whitened or the teacher's own
    is_grid_BT1: Tensor  # 1 for tokens of the grid, 0 for CLS and registers
    images_BHWC: Tensor | None  # uint8


class PooledFeatures(NamedTuple):
    """One vector a view."""

    features_NC: Tensor
    labels_N: Tensor
    positions_N: NDArray[np.int64]


def iter_views(
    reader: FeatureReader, images: ImageList, *, image_px: int | None = None, stop: StopRequest | None = None,
    is_raw: bool = False,
) -> Iterator[ViewBatch]:  # fmt: skip
    """All usable views of a store in order, rendered at `image_px` when given.

    Args:
        is_raw: the tokens are the teacher's own, whitening undone.

    Raises:
        Interrupted: between two batches, because a stop was asked for.
        InputError: an image that the teacher saw is gone or has changed.
    """
    plan = reader.plan
    source = None
    if image_px is not None:
        source = open_pixels(reader, images.location, image_px, 256 << 20, cache_dir=images.cache_dir)
    usable = reader.usable_images()
    records_R = (usable[:, None] * plan.views_per_image + np.arange(plan.views_per_image)).ravel()
    for first in range(0, len(records_R), BATCH):
        if stop is not None:
            stop.check()
        records_B = records_R[first : first + BATCH]
        tokens_BTC = np.empty((len(records_B), *plan.shape_TC), np.float16)
        reader.read_batch(records_B, tokens_BTC)
        positions_B = records_B // plan.views_per_image
        pixels = None
        if source is not None and image_px is not None:
            pixels_BHWC = np.empty((len(records_B), image_px, image_px, 3), np.uint8)
            source.fill(records_B, pixels_BHWC)
            pixels = torch.from_numpy(pixels_BHWC)
        places_BT = reader.positions(records_B)
        if places_BT is None:
            places_BT = np.broadcast_to(np.arange(plan.features.num_tokens), tokens_BTC.shape[:2])
        is_grid_BT1 = torch.from_numpy(places_BT >= plan.features.num_prefix_tokens).float().unsqueeze(-1)
        wanted_BTC = reader.unwhiten(tokens_BTC, records_B) if is_raw else tokens_BTC.astype(np.float32)
        yield ViewBatch(positions_B, records_B, torch.from_numpy(wanted_BTC), is_grid_BT1, pixels)


def pool_teacher(reader: FeatureReader, images: ImageList, stop: StopRequest | None = None) -> PooledFeatures:
    """The teacher's own features: whitening undone, mean over the grid tokens that the store keeps."""
    pooled, positions = [], []
    for batch in iter_views(reader, images, stop=stop, is_raw=True):
        pooled.append((batch.tokens_BTC * batch.is_grid_BT1).sum(1) / batch.is_grid_BT1.sum(1).clamp(min=1))
        positions.append(batch.positions_B)
    return _gather(pooled, positions, images)


@torch.inference_mode()
def pool_student(
    model: DistillModel, reader: FeatureReader, images: ImageList, image_px: int, device: torch.device,
    stop: StopRequest | None = None,
) -> PooledFeatures:  # fmt: skip
    """The student's frozen features of the same views: mean over its grid tokens, after its final norm."""
    pooled, positions = [], []
    for batch in iter_views(reader, images, image_px=image_px, stop=stop):
        assert batch.images_BHWC is not None
        tokens_BTC = student_tokens(model.student, normalise_images(batch.images_BHWC, device))
        pooled.append(tokens_BTC[:, model.layout.num_prefix_tokens :].mean(1).cpu())
        positions.append(batch.positions_B)
    return _gather(pooled, positions, images)


def _gather(pooled: list[Tensor], positions: list[NDArray[np.int64]], images: ImageList) -> PooledFeatures:
    positions_N = np.concatenate(positions)
    labels_N = torch.tensor([images.labels[position] for position in positions_N])
    return PooledFeatures(torch.cat(pooled).float(), labels_N, positions_N)
