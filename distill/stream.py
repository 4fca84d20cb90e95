"""Stores and their images to batches: the same crop that the teachers saw, beside what the teachers said about it.

A step is one batch of the global order, whatever works on it: with W processes that each compute their share in A
parts, one after the other, the batch is cut into W x A equal parts. So which images and views a step sees depends on
nothing but the seed and the step.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from distill.config import DistillConfig
from distill.objective import StorePart
from distill.order import POOL_IMAGES, Draw, EpochOrder, ViewOrder, num_steps
from distill.pixels import open_pixels
from distill.targets import needs_raw
from storage.errors import ConfigError
from storage.ring import iter_filled
from storage.store import FeatureReader

HELD_BATCHES = 2
"""Batches that stay valid: the loop's, and the one before it, whose copy to the device may be under way."""

HINT_STEPS = 2
"""How far ahead of its batches the stream tells the disk what it is going to read."""

_STATISTICS = ("token_mean", "token_std")


class Share(NamedTuple):
    """Which part of each step's batch a process works on, and in how many parts."""

    rank: int = 0
    world_size: int = 1
    accumulate: int = 1

    def part_size(self, batch_size: int) -> int:
        """Images of one part.

        Raises:
            ConfigError: the batch cannot be cut into equal parts; names the sizes that can.
        """
        parts = self.world_size * self.accumulate
        if batch_size % parts:
            near = max(1, batch_size // parts) * parts
            raise ConfigError(
                f"a batch of {batch_size} images cannot be cut into {parts} equal parts ({self.world_size} processes "
                f"x {self.accumulate} parts each); set distill.batch_size to {near} or {near + parts}"
            )
        return batch_size // parts


WHOLE = Share()
"""One process that computes each batch at once."""


class DistillBatch(NamedTuple):
    """A part of one step's batch, in memory that is used again: whoever keeps one over two parts must copy it."""

    step: int
    images_BHWC: Tensor  # uint8, the student's input size
    stores: tuple[StorePart, ...]
    keys: list[str]

    def to(self, device: torch.device) -> "DistillBatch":
        """The same on another device."""
        images_BHWC = self.images_BHWC.to(device, non_blocking=True)
        return self._replace(images_BHWC=images_BHWC, stores=tuple(part.to(device) for part in self.stores))

    def tensors(self) -> Iterator[Tensor]:
        """All of them, as they lie on the device."""
        yield self.images_BHWC
        for part in self.stores:
            yield from part.encoded.values()
            if part.positions_BS is not None:
                yield part.positions_BS


class _Buffer(NamedTuple):
    images_BHWC: NDArray[np.uint8]
    stores: tuple[dict[str, NDArray[Any]], ...]


class DistillStream:
    """Batches of one or several stores with the same views, by step."""

    def __init__(
        self, readers: Sequence[FeatureReader], location: str, cfg: DistillConfig, *, cache_dir: str = "",
        share: Share = WHOLE, is_pinned: bool = False, is_live: bool = False,
    ) -> None:  # fmt: skip
        """
        Args:
            location: of the images, and `cache_dir`, as for `open_pixels`.
            is_pinned: batches lie in memory that a GPU copies from while it computes.
            is_live: the first is a `LiveReader`: what a store keeps of each token its teacher says in the step.

        Raises:
            ConfigError: the stores do not hold the same views of the same images, or batches cannot be shared out.
        """
        self.readers, self.cfg, self.share = readers, cfg, share
        check_same_views(readers)
        first = readers[0]
        plan = first.plan
        self.part_size = share.part_size(cfg.batch_size)
        self.keys = first.images.keys
        self.pixels = open_pixels(
            first, location, cfg.student.input_px, cfg.run.image_cache_mb << 20, cache_dir=cache_dir
        )
        usable_N = first.usable_images()
        for other in readers[1:]:
            usable_N = np.intersect1d(usable_N, other.usable_images(), assume_unique=True)
        self.order = EpochOrder(usable_N, plan.images_per_shard, cfg.seed)
        self.view_order = ViewOrder(plan.num_images, plan.views_per_image, cfg.seed)
        self.num_steps = num_steps(len(self.order), cfg.epochs, cfg.batch_size)
        self._allocate = pinned_empty if is_pinned else np.empty
        self._has_statistics = [
            needs_raw(cfg.target, reader.plan.whitening, whiten=cfg.whiten) and not (is_live and reader is first)
            for reader in readers
        ]

    def batches(self, start: int) -> Iterator[DistillBatch]:
        """This process's parts of all steps from `start` on, in order; of these, the newest `HELD_BATCHES` are valid at
        a time."""
        run, parts = self.cfg.run, self.share.accumulate
        return iter_filled(
            self._fill, self._new_buffer, start * parts, self.num_steps * parts, threads=run.loaders,
            depth=HELD_BATCHES + run.batches_ahead, held=HELD_BATCHES, hint=self._hints_from(start),
            look_ahead=HINT_STEPS,
        )  # fmt: skip

    def load(self, step: int, part: int = 0) -> DistillBatch:
        """A part of one step, in memory of its own.

        Raises:
            InputError: an image that the teacher saw is gone or has changed.
            DamagedError: a stored record is damaged.
        """
        return self._fill(step * self.share.accumulate + part, self._new_buffer())

    def _hints_from(self, start: int) -> Any:
        size = self.cfg.batch_size

        def hint(number: int) -> None:
            step, _ = divmod(number, self.share.accumulate)
            if step * size + min(POOL_IMAGES, len(self.order)) < self.num_steps * size:  # what comes is still read
                self._hint(self._part(self.order.coming(step, size), number))
            if (step - start) * size < 2 * POOL_IMAGES:  # nobody announced these a pool ago
                self._hint(self._part(self.order.batch(step, size), number))

        return hint

    def _hint(self, draw: Draw) -> None:
        records_B = self._records(draw)
        for reader in self.readers:
            reader.hint(records_B, views=self.pixels.are_stored and reader is self.readers[0])

    def _part(self, draw: Draw, number: int) -> Draw:
        """This process's part of a step's images; `number` counts the parts of all steps."""
        share = self.share
        part = number % share.accumulate * share.world_size + share.rank
        return draw.part(part, share.world_size * share.accumulate)

    def _new_buffer(self) -> _Buffer:
        size, side = self.part_size, self.cfg.student.input_px
        images_BHWC = self._allocate((size, side, side, 3), np.uint8)
        return _Buffer(images_BHWC, tuple(reader.new_batch(size, self._allocate) for reader in self.readers))

    def _fill(self, number: int, buffer: _Buffer) -> DistillBatch:
        step = number // self.share.accumulate
        draw = self._part(self.order.batch(step, self.cfg.batch_size), number)
        records_B = self._records(draw)
        stores = tuple(
            self._read(reader, records_B, fields, has_statistics)
            for reader, fields, has_statistics in zip(self.readers, buffer.stores, self._has_statistics, strict=True)
        )
        self.pixels.fill(records_B, buffer.images_BHWC)
        keys = [self.keys[position] for position in draw.positions_B.tolist()]
        return DistillBatch(step, torch.from_numpy(buffer.images_BHWC), stores, keys)

    def _read(
        self, reader: FeatureReader, records_B: NDArray[np.int64], fields: dict[str, NDArray[Any]], has_statistics: bool
    ) -> StorePart:
        reader.read_encoded(records_B, fields)
        encoded = {name: torch.from_numpy(array) for name, array in fields.items()}
        if has_statistics:
            encoded |= {name: torch.from_numpy(reader.rows(name, records_B)) for name in _STATISTICS}
        positions_BS = reader.positions(records_B)
        return StorePart(encoded, None if positions_BS is None else torch.from_numpy(positions_BS))

    def _records(self, draw: Draw) -> NDArray[np.int64]:
        return draw.positions_B * self.readers[0].plan.views_per_image + self.view_order.views(draw)


def check_same_views(readers: Sequence[FeatureReader]) -> None:
    """Refuse stores whose records are not of the same views.

    Raises:
        ConfigError: says what differs.
    """
    first = readers[0]
    for other in readers[1:]:
        for name in ("images_fingerprint", "views_per_image", "sampler"):
            here, there = getattr(first.plan, name), getattr(other.plan, name)
            if here != there:
                raise ConfigError(
                    f"a student learns from several teachers by the same views, but {name} is {here} in "
                    f"{first.location} and {there} in {other.location}; extract them together: "
                    "make extract TEACHER=one,other"
                )


def unlike_pixels(readers: Sequence[FeatureReader]) -> list[str]:
    """Why further teachers may have seen slightly other pixels of the views than the first did."""
    first, *others = readers
    return [
        f"the views of {other.location} were rendered, or kept as JPEGs, otherwise than those of {first.location}"
        for other in others
        if _as_seen(other) != _as_seen(first)
    ]


def _as_seen(reader: FeatureReader) -> tuple[dict[str, Any], bool]:
    """How a teacher's pixels were made, and whether they had been JPEGs."""
    stored = reader.plan.stored_views
    return reader.plan.renderer, stored is not None and stored.seen_by_teacher


def pinned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Memory that is copied to a GPU while the GPU computes."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    flat: NDArray[Any] = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
    return flat.view(dtype).reshape(shape)
