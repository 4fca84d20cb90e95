"""A store and its images to batches: the same crop that the teacher saw, beside what the teacher said about it."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.config import DistillConfig
from distill.order import EpochOrder, ViewOrder, num_steps
from distill.prefetch import ImageCache, prefetch
from storage.errors import BadImageError, InputError
from storage.store import FeatureReader
from storage.views import Renderer


class DistillBatch(NamedTuple):
    """One step's data."""

    step: int
    images_BHWC: Tensor  # uint8, the student's input size
    targets_BTC: Tensor  # float16, whitened
    keys: list[str]


class DistillStream:
    """Batches of a store, by step."""

    def __init__(self, reader: FeatureReader, location: str, cfg: DistillConfig) -> None:
        """`location`: where the images of the store lie on this machine."""
        self.reader, self.cfg = reader, cfg
        plan = reader.plan
        images = reader.images.at(location)
        images.source.list_images()  # tars: the scan, once, before threads start
        self.images = ImageCache(images, cfg.run.image_cache_mb << 20)
        self.keys = images.keys
        self.order = EpochOrder(reader.usable_images(), plan.images_per_shard, cfg.seed)
        self.view_order = ViewOrder(plan.num_images, plan.views_per_image, cfg.seed)
        self.renderer = Renderer(kernel=plan.renderer["kernel"])
        self.num_steps = num_steps(len(self.order), cfg.epochs, cfg.batch_size)

    def batches(self, start: int) -> Iterator[DistillBatch]:
        """All batches from step `start` on."""
        run = self.cfg.run
        return prefetch(self.load, start, self.num_steps, threads=run.loaders, ahead=run.prefetch)

    def load(self, step: int) -> DistillBatch:
        """The batch of one step.

        Raises:
            InputError: an image that the teacher saw is gone or has changed.
            DamagedError: a stored record is damaged.
        """
        draw = self.order.batch(step, self.cfg.batch_size)
        records_B = draw.positions_B * self.reader.plan.views_per_image + self.view_order.views(draw)
        targets_BTC = np.empty((len(records_B), *self.reader.plan.features.shape_TC), np.float16)
        self.reader.read_batch(records_B, targets_BTC)
        side = self.cfg.student.input_px
        images_BHWC = np.empty((len(records_B), side, side, 3), np.uint8)
        for number, (position, view) in enumerate(zip(draw.positions_B, self.reader.views(records_B), strict=True)):
            try:
                image = self.images.read(int(position))
            except BadImageError as error:
                raise InputError(
                    f"image {self.keys[position]!r} was readable when its features were extracted and is not now "
                    f"({error}); bring it back, or extract again"
                ) from error
            images_BHWC[number] = self.renderer.render_view(image, view, side)
        keys = [self.keys[position] for position in draw.positions_B]
        return DistillBatch(step, torch.from_numpy(images_BHWC), torch.from_numpy(targets_BTC), keys)
