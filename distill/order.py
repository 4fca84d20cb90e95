"""Which images and views a step sees: a pure function of (seed, step), so resuming needs no loader state.

The epochs' orders are laid end to end and cut into batches: every batch is full, and every epoch covers every image
exactly once. A batch may therefore reach from one epoch into the next.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from storage.views import keyed_generator

WINDOW_SHARDS = 16
"""Shards that are mixed with each other: near enough to a full shuffle, and reads stay within a few files."""


class Draw(NamedTuple):
    """What one step sees."""

    positions_B: NDArray[np.int64]
    epochs_B: NDArray[np.int64]


class EpochOrder:
    """The endless sequence of images."""

    def __init__(self, positions_N: NDArray[np.int64], images_per_shard: int, seed: int) -> None:
        """`positions_N`: store positions of the usable images."""
        self.positions_N, self.images_per_shard, self.seed = positions_N, images_per_shard, seed
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def __len__(self) -> int:
        return len(self.positions_N)

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        """The images of one epoch: shards permuted, then images within windows of shards."""
        generator = keyed_generator(self.seed, "order", epoch)
        shards_N = self.positions_N // self.images_per_shard
        windows = generator.permutation(int(shards_N.max()) + 1) // WINDOW_SHARDS
        return self.positions_N[np.lexsort((generator.random(len(self)), windows[shards_N]))]

    def batch(self, step: int, batch_size: int) -> Draw:
        """Images of one step, with the epoch that each belongs to."""
        numbers_B = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs_B, places_B = np.divmod(numbers_B, len(self))
        positions_B = np.concatenate(
            [self.epoch(int(epoch))[places_B[epochs_B == epoch]] for epoch in np.unique(epochs_B)]
        )
        return Draw(positions_B, epochs_B)


def num_steps(num_images: int, epochs: int, batch_size: int) -> int:
    """Steps of a whole training; a remainder smaller than a batch is left out at the very end."""
    return max(1, num_images * epochs // batch_size)


class ViewOrder:
    """Epoch e looks at view e mod K of each image, in an order that is shuffled anew for each image and cycle."""

    def __init__(self, num_images: int, num_views: int, seed: int) -> None:
        self.num_images, self.num_views, self.seed = num_images, num_views, seed
        self.cycle = lru_cache(maxsize=2)(self._cycle)

    def _cycle(self, cycle: int) -> NDArray[np.int64]:
        generator = keyed_generator(self.seed, "views", cycle)
        return generator.random((self.num_images, self.num_views), np.float32).argsort(axis=1)

    def views(self, draw: Draw) -> NDArray[np.int64]:
        """The view index of each image of a step."""
        cycles_B, places_B = np.divmod(draw.epochs_B, self.num_views)
        return np.array(
            [
                self.cycle(int(cycle))[position, place]
                for cycle, position, place in zip(cycles_B, draw.positions_B, places_B, strict=True)
            ]
        )
