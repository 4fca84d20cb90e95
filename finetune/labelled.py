"""Labelled images to batches: a fresh crop of each image in every epoch for training, one centred view for evaluation.

Every crop is a function of (seed, key, epoch), so any thread or process makes the same one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.order import EpochOrder, num_steps
from distill.prefetch import ImageCache, prefetch
from finetune.config import FinetuneConfig
from storage.errors import BadImageError
from storage.views import View, keyed_generator


class LabelledBatch(NamedTuple):
    """One step's data; unusable images are left out."""

    step: int
    images_BHWC: Tensor  # uint8
    labels_B: Tensor  # int64
    keys: list[str]


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """Batches of one split."""

    images: ImageCache
    cfg: FinetuneConfig
    input_px: int
    seed: int

    @property
    def steps(self) -> int:
        return num_steps(len(self.images.images), self.cfg.epochs, self.cfg.batch_size)

    def train_batches(self, start: int) -> Iterator[LabelledBatch]:
        """Batches of step `start` and later, by (seed, step)."""
        order = EpochOrder(np.arange(len(self.images.images)), 1, self.seed)

        def load(step: int) -> LabelledBatch:
            draw = order.batch(step, self.cfg.batch_size)
            return self._load(step, draw.positions_B.tolist(), draw.epochs_B.tolist())

        run = self.cfg.run
        return prefetch(load, start, self.steps, threads=run.loaders, ahead=run.batches_ahead)

    def eval_batches(self) -> Iterator[LabelledBatch]:
        """Every image once, in order, in its centred view."""
        count, size = len(self.images.images), self.cfg.batch_size

        def load(step: int) -> LabelledBatch:
            return self._load(step, list(range(step * size, min(count, (step + 1) * size))), None)

        run = self.cfg.run
        return prefetch(load, 0, -(-count // size), threads=run.loaders, ahead=run.batches_ahead)

    def _load(self, step: int, positions: list[int], epochs: list[int] | None) -> LabelledBatch:
        listing = self.images.images
        pixels, kept = [], []
        for number, position in enumerate(positions):
            try:
                image = self.images.read(position)
            except BadImageError:
                continue
            key, image_hw = listing.keys[position], (image.shape[0], image.shape[1])
            if epochs is None:
                view, is_upside_down = self.cfg.eval_sampler.view(key, 0, image_hw), False
            else:
                view, is_upside_down = self._draw(key, epochs[number], image_hw)
            rendered_HWC = self.cfg.renderer.render_view(image, view, self.input_px)
            pixels.append(rendered_HWC[::-1] if is_upside_down else rendered_HWC)
            kept.append(position)
        shape = (0, self.input_px, self.input_px, 3)
        return LabelledBatch(
            step,
            torch.from_numpy(np.stack(pixels) if pixels else np.empty(shape, np.uint8)),
            torch.tensor([listing.labels[position] for position in kept], dtype=torch.long),
            [listing.keys[position] for position in kept],
        )

    def _draw(self, key: str, epoch: int, image_hw: tuple[int, int]) -> tuple[View, bool]:
        number = self.seed * 1_000_003 + epoch
        view = self.cfg.sampler.view(key, number, image_hw)
        is_upside_down = (
            self.cfg.vertical_flip and keyed_generator(self.seed, f"upside-down/{key}", epoch).random() < 0.5
        )
        return view, is_upside_down
