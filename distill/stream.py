"""A store and its images to batches: the same crop that the teacher saw, beside what the teacher said about it."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from distill.config import DistillConfig
from distill.loop import choose_device
from distill.order import POOL_IMAGES, Draw, EpochOrder, ViewOrder, num_steps
from distill.pixels import open_pixels
from storage.ring import iter_filled
from storage.store import FeatureReader

HELD_BATCHES = 2
"""Batches that stay valid: the loop's, and the one before it, whose copy to the device may be under way."""

HINT_STEPS = 2
"""How far ahead of its batches the stream tells the disk what it is going to read."""


class DistillBatch(NamedTuple):
    """One step's data, in memory that is used again: whoever keeps a batch over two steps must copy it."""

    step: int
    images_BHWC: Tensor  # uint8, the student's input size
    encoded: dict[str, Tensor]
    """The whitened tokens as the store keeps them: `tokens` (B, T, C), and what their encoding needs to decode them."""
    positions_BT: Tensor | None
    """int64, of these tokens among all of a view's; None where the store keeps all."""
    keys: list[str]

    @property
    def targets_BTC(self) -> Tensor:
        """The tokens, where their encoding needs nothing else to decode them."""
        (tokens_BTC,) = self.encoded.values()
        return tokens_BTC


class _Buffer(NamedTuple):
    images_BHWC: NDArray[np.uint8]
    encoded: dict[str, NDArray[Any]]


class DistillStream:
    """Batches of a store, by step."""

    def __init__(self, reader: FeatureReader, location: str, cfg: DistillConfig, *, cache_dir: str = "") -> None:
        """`location` and `cache_dir`: as for `open_pixels`."""
        self.reader, self.cfg = reader, cfg
        plan = reader.plan
        self.keys = reader.images.keys
        self.pixels = open_pixels(
            reader, location, cfg.student.input_px, cfg.run.image_cache_mb << 20, cache_dir=cache_dir
        )
        self.order = EpochOrder(reader.usable_images(), plan.images_per_shard, cfg.seed)
        self.view_order = ViewOrder(plan.num_images, plan.views_per_image, cfg.seed)
        self.num_steps = num_steps(len(self.order), cfg.epochs, cfg.batch_size)

    def batches(self, start: int) -> Iterator[DistillBatch]:
        """All batches from step `start` on; of these, the newest `HELD_BATCHES` are valid at a time."""

        size, views = self.cfg.batch_size, self.pixels.are_stored

        def hint(step: int) -> None:
            if step * size + min(POOL_IMAGES, len(self.order)) < self.num_steps * size:  # what comes is still read
                self.reader.hint(self._records(self.order.coming(step, size)), views=views)
            if (step - start) * size < 2 * POOL_IMAGES:  # nobody announced these a pool ago
                self.reader.hint(self._records(self.order.batch(step, size)), views=views)

        run = self.cfg.run
        return iter_filled(
            self._fill, self._new_buffer, start, self.num_steps, threads=run.loaders,
            depth=HELD_BATCHES + run.batches_ahead, held=HELD_BATCHES, hint=hint, look_ahead=HINT_STEPS,
        )  # fmt: skip

    def load(self, step: int) -> DistillBatch:
        """The batch of one step, in memory of its own.

        Raises:
            InputError: an image that the teacher saw is gone or has changed.
            DamagedError: a stored record is damaged.
        """
        return self._fill(step, self._new_buffer())

    def _new_buffer(self) -> _Buffer:
        allocate = pinned_empty if choose_device(self.cfg.run.device).type == "cuda" else np.empty
        size, side = self.cfg.batch_size, self.cfg.student.input_px
        return _Buffer(allocate((size, side, side, 3), np.uint8), self.reader.new_batch(size, allocate))

    def _fill(self, step: int, buffer: _Buffer) -> DistillBatch:
        draw = self.order.batch(step, self.cfg.batch_size)
        records_B = self._records(draw)
        self.reader.read_encoded(records_B, buffer.encoded)
        self.pixels.fill(records_B, buffer.images_BHWC)
        positions_BT = self.reader.positions(records_B)
        return DistillBatch(
            step,
            images_BHWC=torch.from_numpy(buffer.images_BHWC),
            encoded={name: torch.from_numpy(array) for name, array in buffer.encoded.items()},
            positions_BT=None if positions_BT is None else torch.from_numpy(positions_BT),
            keys=[self.keys[position] for position in draw.positions_B.tolist()],
        )

    def _records(self, draw: Draw) -> NDArray[np.int64]:
        return draw.positions_B * self.reader.plan.views_per_image + self.view_order.views(draw)


def pinned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Memory that is copied to a GPU while the GPU computes."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    flat: NDArray[Any] = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
    return flat.view(dtype).reshape(shape)
