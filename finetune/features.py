"""Tokens of a store, teacher's or student's, pooled to one vector a view."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.prefetch import ImageCache
from distill.student import DistillModel, normalise_images
from storage.errors import BadImageError, InputError
from storage.image_index import ImageList
from storage.store import FeatureReader
from storage.stage import StopRequest
from storage.views import Renderer

BATCH = 64


class ViewBatch(NamedTuple):
    """Consecutive views of a store."""

    positions_B: NDArray[np.int64]
    """Of their images, in the store's list."""
    tokens_BTC: Tensor  # float32, whitened
    statistics_BT2: Tensor  # mean and std of each token before whitening
    images_BHWC: Tensor | None  # uint8


class PooledFeatures(NamedTuple):
    """One vector a view."""

    features_NC: Tensor
    labels_N: Tensor
    positions_N: NDArray[np.int64]


def iter_views(
    reader: FeatureReader, images: ImageList, *, image_px: int | None = None, stop: StopRequest | None = None
) -> Iterator[ViewBatch]:
    """All usable views of a store in order, rendered at `image_px` when given.

    Raises:
        Interrupted: between two batches, because a stop was asked for.
        InputError: an image that the teacher saw is gone or has changed.
    """
    plan = reader.plan
    renderer = Renderer(kernel=plan.renderer["kernel"])
    decoded = ImageCache(images, 256 << 20)
    usable = reader.usable_images()
    records_R = (usable[:, None] * plan.views_per_image + np.arange(plan.views_per_image)).ravel()
    for first in range(0, len(records_R), BATCH):
        if stop is not None:
            stop.check()
        records_B = records_R[first : first + BATCH]
        tokens_BTC = np.empty((len(records_B), *plan.features.shape_TC), np.float16)
        reader.read_batch(records_B, tokens_BTC)
        positions_B = records_B // plan.views_per_image
        pixels = None
        if image_px is not None:
            views = zip(positions_B, reader.views(records_B), strict=True)
            try:
                rendered = [renderer.render_view(decoded.read(int(p)), view, image_px) for p, view in views]
            except BadImageError as error:
                raise InputError(
                    f"an image of {images.location} was readable when its features were extracted and is not now "
                    f"({error}); bring it back, or give the command again: the changed data set gets a store of its own"
                ) from error
            pixels = torch.from_numpy(np.stack(rendered))
        statistics = torch.from_numpy(np.stack(reader.token_statistics(records_B), axis=-1))
        yield ViewBatch(positions_B, torch.from_numpy(tokens_BTC).float(), statistics, pixels)


def pool_teacher(reader: FeatureReader, images: ImageList, stop: StopRequest | None = None) -> PooledFeatures:
    """The teacher's own features: whitening undone, mean over the grid tokens."""
    prefix = reader.plan.features.num_prefix_tokens
    pooled, positions = [], []
    for batch in iter_views(reader, images, stop=stop):
        mean_BT1, std_BT1 = batch.statistics_BT2[..., :1], batch.statistics_BT2[..., 1:]
        pooled.append((batch.tokens_BTC * std_BT1 + mean_BT1)[:, prefix:].mean(1))
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
        tokens_BTC = model.student.forward_features(normalise_images(batch.images_BHWC, device))
        pooled.append(tokens_BTC[:, model.student.num_prefix_tokens :].mean(1).cpu())
        positions.append(batch.positions_B)
    return _gather(pooled, positions, images)


def _gather(pooled: list[Tensor], positions: list[NDArray[np.int64]], images: ImageList) -> PooledFeatures:
    positions_N = np.concatenate(positions)
    labels_N = torch.tensor([images.labels[position] for position in positions_N])
    return PooledFeatures(torch.cat(pooled).float(), labels_N, positions_N)
