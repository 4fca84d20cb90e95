"""Which images and views a step sees: a pure function of (seed, step), so resuming needs no loader state.

The epochs' orders are laid end to end and cut into batches: every batch is full, and every epoch covers every image
exactly once. A batch may therefore reach from one epoch into the next.

Disks like long reads and training likes a full shuffle, so an epoch is drawn twice. The *reading order* is what the
disk sees: shards permuted, and blocks of neighbouring images shuffled within windows of shards. The *order* is what the
student sees: the reading order cut into pools, each of them fully shuffled. A pool is announced to the disk block by
block while the student is still at the pool before (`EpochOrder.coming`), and then drawn from the system's page cache.
A data set no larger than a pool is shuffled fully, and so is one whose shards are single images.

How mixed this is: 1,281,167 images in shards of 512, batches of 256, mean over one epoch. The last row is for
images that lie sorted by 1,000 classes.

    in the batch of an image                  blocks without pools    this order    full shuffle
    others of its block of 16                                 14.9          0.46           0.003
    others of its shard                                       15.9          1.4             0.10
    different shards                                          16.2        142             243
    different classes                                         16.4        143             226
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from storage.process_lock import ProcessLock
from storage.views import keyed_generator

BLOCK_IMAGES = 16
"""Neighbours that are read together: some MB, so that a disk is nearly as fast as on one long read."""

POOL_IMAGES = 8192
"""Images that are mixed one by one. Two pools lie in the page cache at a time: 2.5 GB each with ViT-B's tokens."""

WINDOW_SHARDS = 256
"""Shards whose blocks are mixed; about as many files as a reader keeps open."""


class Draw(NamedTuple):
    """What one step sees."""

    positions_B: NDArray[np.int64]
    epochs_B: NDArray[np.int64]

    def part(self, number: int, count: int) -> "Draw":
        """One of `count` equal parts: every count-th image from `number` on."""
        return Draw(self.positions_B[number::count], self.epochs_B[number::count])


class _Epoch(NamedTuple):
    reading_N: NDArray[np.int64]
    order_N: NDArray[np.int64]


class EpochOrder:
    """The endless sequence of images."""

    def __init__(self, positions_N: NDArray[np.int64], images_per_shard: int, seed: int) -> None:
        """`positions_N`: store positions of the usable images, ascending."""
        self.positions_N, self.images_per_shard, self.seed = positions_N, images_per_shard, seed
        self._drawn, self._drawing = lru_cache(maxsize=3)(self._draw_epoch), ProcessLock()

    def __len__(self) -> int:
        return len(self.positions_N)

    def batch(self, step: int, batch_size: int) -> Draw:
        """Images of one step, with the epoch that each belongs to."""
        return self._slice(self.epoch, step * batch_size, batch_size)

    def coming(self, step: int, batch_size: int) -> Draw:
        """Images to announce to the disk at one step: those of the reading order one pool later.

        Over all steps each image comes once an epoch, at its own step at the latest. Those that a training begins with
        do not come: up to two pools from its first step on.
        """
        return self._slice(self.reading, step * batch_size + min(POOL_IMAGES, len(self)), batch_size)

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """The images of one epoch."""
        return self._epoch(epoch).order_N

    def reading(self, epoch: int) -> NDArray[np.int64]:
        """The same images as the disk sees them."""
        return self._epoch(epoch).reading_N

    def _epoch(self, epoch: int) -> _Epoch:
        with self._drawing:  # or every thread that comes to a new epoch would draw it
            return self._drawn(epoch)

    def _slice(self, images_of: Callable[[int], NDArray[np.int64]], first: int, count: int) -> Draw:
        epochs_B, places_B = np.divmod(np.arange(first, first + count), len(self))
        parts = [images_of(int(epoch))[places_B[epochs_B == epoch]] for epoch in np.unique(epochs_B)]
        return Draw(np.concatenate(parts), epochs_B)

    def _draw_epoch(self, epoch: int) -> _Epoch:
        generator = keyed_generator(self.seed, "order", epoch)
        # positions to numbered blocks; a block ends with its shard
        shards_N, places_N = np.divmod(self.positions_N, self.images_per_shard)
        blocks_a_shard = -(-self.images_per_shard // BLOCK_IMAGES)
        blocks_N = shards_N * blocks_a_shard + places_N // BLOCK_IMAGES
        num_shards = int(shards_N.max()) + 1
        # windows and pools are of equal size: a small last one would be a poorly mixed end of every epoch
        num_windows = -(-num_shards // WINDOW_SHARDS)
        windows_S = generator.permutation(num_shards) * num_windows // num_shards
        windows_M = windows_S.repeat(blocks_a_shard)
        ranks_M = np.empty(len(windows_M), np.int64)
        ranks_M[np.lexsort((generator.random(len(windows_M)), windows_M))] = np.arange(len(windows_M))
        reading_N = self.positions_N[ranks_M[blocks_N].argsort(kind="stable")]
        num_pools = -(-len(self) // POOL_IMAGES)
        pools_N = np.arange(len(self)) * num_pools // len(self)
        order_N = reading_N[np.lexsort((generator.random(len(self)), pools_N))]
        return _Epoch(reading_N, order_N)


def num_steps(num_images: int, epochs: int, batch_size: int) -> int:
    """Steps of a whole training; a remainder smaller than a batch is left out at the very end."""
    return max(1, num_images * epochs // batch_size)


class ViewOrder:
    """Epoch e looks at view e mod K of each image, in an order that is shuffled anew for each image and cycle."""

    def __init__(self, num_images: int, num_views: int, seed: int) -> None:
        self.num_images, self.num_views, self.seed = num_images, num_views, seed
        self._drawn, self._drawing = lru_cache(maxsize=3)(self._draw_cycle), ProcessLock()

    def cycle(self, cycle: int) -> NDArray[np.uint16]:
        """The views (N, K) of each image in the order in which K epochs look at them."""
        with self._drawing:
            return self._drawn(cycle)

    def _draw_cycle(self, cycle: int) -> NDArray[np.uint16]:
        generator = keyed_generator(self.seed, "views", cycle)
        return generator.random((self.num_images, self.num_views), np.float32).argsort(axis=1).astype(np.uint16)

    def views(self, draw: Draw) -> NDArray[np.int64]:
        """The view index of each image of a step."""
        cycles_B, places_B = np.divmod(draw.epochs_B, self.num_views)
        views_B = np.empty(len(cycles_B), np.int64)
        for cycle in np.unique(cycles_B):
            these = cycles_B == cycle
            views_B[these] = self.cycle(int(cycle))[draw.positions_B[these], places_B[these]]
        return views_B
