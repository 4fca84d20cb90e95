"""Batches made ahead by threads, and decoded images kept in memory where they fit.

Decoders and `pread` release the interpreter lock, so threads serve here; worker processes would copy every batch.
"""

import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from storage.image_list import ImageList
from storage.ring import iter_filled

Batch = TypeVar("Batch")


def prefetch(load: Callable[[int], Batch], first: int, last: int, *, threads: int, ahead: int) -> Iterator[Batch]:
    """Yield `load(first)` ... `load(last - 1)` in order, with up to `ahead` of them under way: a ring for batches that
    differ in size, each in memory of its own."""
    return iter_filled(lambda step, _: load(step), lambda: None, first, last, threads=threads, depth=ahead + 1)


class ImageCache:
    """Decodes images, keeping them as long as a memory budget lasts."""

    def __init__(self, images: ImageList, budget_bytes: int) -> None:
        self.images = images
        self._left = budget_bytes
        self._kept: dict[int, NDArray[np.uint8]] = {}
        self._lock = threading.Lock()

    def read(self, position: int) -> NDArray[np.uint8]:
        """The decoded image at a position of the list.

        Raises:
            BadImageError: it cannot be decoded.
        """
        kept = self._kept.get(position)
        if kept is not None:
            return kept
        image = self.images.read_image(position)
        with self._lock:
            if image.nbytes <= self._left and position not in self._kept:
                self._left -= image.nbytes
                self._kept[position] = image
        return image
