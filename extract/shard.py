"""One shard of one or several stores: read, render, forward, whiten, encode, commit."""

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from extract.encode import Int8Encoder
from extract.jobs import Job
from extract.render import Look, RenderedView, UnusableImage, ViewRenderer
from extract.teacher import Teacher
from extract.timing import Meter
from extract.whiten import Whitened, Whitener
from storage.encodings import Int8
from storage.errors import DecantError
from storage.image_list import ImageList
from storage.receipts import read_receipt
from storage.records import FeatureRecord, ShardEntry, StorePlan
from storage.writer import ShardWriter

_BATCHES_AHEAD = 2
"""Rendered before they are asked for."""


class OpenStore(NamedTuple):
    """What a worker needs to fill one store."""

    root: Path
    plan: StorePlan
    teacher: Teacher
    whitener: Whitener
    batch_size: int
    turn: threading.Lock
    """Held during a forward pass, where several shards are under way."""

    @property
    def look(self) -> Look:
        return Look.of(self.plan, self.teacher.spec.input_px)


def extract_shard(
    job: Job, *, stores: Sequence[OpenStore], images: ImageList, render_threads: int, meter: Meter,
    check_stop: Callable[[], None] = lambda: None,
) -> tuple[ShardEntry, ...]:  # fmt: skip
    """Compute and commit one whole shard of every store that does not have it; each image is decoded once for all.

    Unusable images become holes and are listed in the receipts. A store that fails stops no other: what it raised is
    raised when the others have their shard. Memory: the shard's encoded records, and two batches of rendered views.

    Args:
        job: one that only probes some images commits nothing.
        meter: is told where the time goes.
        check_stop: called before each batch; raises where the work is to end.

    Returns:
        The receipts, in the order of the stores; none for a probe.

    Raises:
        InputError: an image changed since it was listed.
        DiskError: no room.
    """
    entries = [None if job.probed else read_receipt(store.root, store.plan, job.shard) for store in stores]
    parts = {n: _ShardPart(store, images, job, meter) for n, store in enumerate(stores) if entries[n] is None}
    failures: list[Exception] = []

    def attempt(number: int, act: Callable[[], ShardEntry | None]) -> None:
        try:
            entries[number] = act()
        except Exception as error:
            failures.append(_named(error, stores[number]) if len(stores) > 1 else error)
            del parts[number]

    if parts:
        plan = stores[0].plan
        renderer = ViewRenderer(plan, images, {part.store.look for part in parts.values()}, job.excluded, meter)
        most_views = _BATCHES_AHEAD * max(part.store.batch_size for part in parts.values())
        first, last = job.probed or (0, None)
        rendered = renderer.iter_rendered(
            plan.images_of_shard(job.shard)[first:last], threads=render_threads,
            ahead=-(-most_views // plan.views_per_image),
        )  # fmt: skip
        with contextlib.closing(rendered):  # type: ignore[type-var]
            for image in meter.iterate("wait", rendered):
                check_stop()
                for number, part in list(parts.items()):
                    attempt(number, lambda part=part, image=image: part.take(image))  # type: ignore[misc]
                if not parts:
                    break
    for number, part in list(parts.items()):
        attempt(number, part.finish)
    if failures:
        raise failures[0]
    return tuple(entry for entry in entries if entry is not None)


def _named(error: Exception, store: OpenStore) -> Exception:
    """The same error, saying whose it is."""
    name = store.plan.features.teacher
    named: Exception = RuntimeError(f"teacher {name!r}: {type(error).__name__}: {error}")
    if isinstance(error, DecantError):
        named = ours = type(error)(f"teacher {name!r}: {error}")
        ours.then = error.then
    named.__cause__ = error
    return named


class _ShardPart:
    """One store's part of a shard. Its batches are its own, whatever other stores do: a store that is filled together
    with others has the same bytes as one that is filled alone."""

    def __init__(self, store: OpenStore, images: ImageList, job: Job, meter: Meter) -> None:
        self.store, self.writer, self.meter = store, ShardWriter(store.root, store.plan, images, job.shard), meter
        self.batch_size = max(1, store.batch_size >> job.halvings)
        self.is_probe = job.probed is not None
        encoding = store.plan.encoding
        self.encoder = Int8Encoder(encoding, store.teacher.device) if isinstance(encoding, Int8) else None
        self.waiting: list[RenderedView] = []

    def take(self, image: list[RenderedView] | UnusableImage) -> None:
        """Run the teacher whenever there is a whole batch."""
        if isinstance(image, UnusableImage):
            self.writer.mark_bad(image.key, image.reason)
            return
        self.waiting += image
        while len(self.waiting) >= self.batch_size:
            batch, self.waiting = self.waiting[: self.batch_size], self.waiting[self.batch_size :]
            self._append(batch)

    def finish(self) -> ShardEntry | None:
        """Run what is left, and commit."""
        if self.waiting:
            self._append(self.waiting)
        if self.is_probe:
            return None
        with self.meter.measure("write"):
            return self.writer.commit()

    def _append(self, batch: list[RenderedView]) -> None:
        arrays = self._computed(batch)
        with self.meter.measure("encode"):
            for number, view in enumerate(batch):
                tokens_SC, mean_S, std_S, *scale_S = (array[number] for array in arrays)
                record = FeatureRecord(
                    view.key, view.view_index, view.view, tokens_SC, mean_S, std_S,
                    view.pictures[self.store.look].jpeg,
                )  # fmt: skip
                if scale_S:
                    self.writer.append_encoded(record, {"tokens": tokens_SC, "token_scale": scale_S[0]})
                else:
                    self.writer.append(record)

    def _computed(self, batch: list[RenderedView]) -> list[NDArray[Any]]:
        """What is stored of a batch, in the host's memory: (B, S, C) tokens, their mean, std and, in int8, scale."""
        pixels_BHWC, keys = _stack(batch, self.store.look), [view.key for view in batch]
        if self.store.teacher.device.type != "cuda":
            with self.store.turn, self.meter.measure("forward"):
                white = self.store.whitener(self.store.teacher(pixels_BHWC), keys)
            with self.meter.measure("encode"):
                return self._stored(white, batch)
        begun, ready = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pixels_BHWC = pixels_BHWC.pin_memory()
        with self.store.turn:
            begun.record()
            white = self.store.whitener(self.store.teacher(pixels_BHWC), keys)
            ready.record()
        ready.synchronize()
        self.meter.add("forward", begun.elapsed_time(ready) / 1000)
        with self.meter.measure("encode"), torch.cuda.stream(_copying_stream()):
            return self._stored(white, batch)

    def _stored(self, white: Whitened, batch: list[RenderedView]) -> list[NDArray[Any]]:
        tokens_BSC, mean_BS, std_BS = _kept(white, self.store.plan, batch)
        stored: tuple[torch.Tensor, ...] = (tokens_BSC, mean_BS, std_BS)
        if self.encoder is not None:
            tokens_BSC, scale_BS = self.encoder(tokens_BSC, [view.key for view in batch])
            stored = (tokens_BSC, mean_BS, std_BS, scale_BS)
        return [part.cpu().numpy() for part in stored]


def _stack(batch: list[RenderedView], look: Look) -> torch.Tensor:
    """(B, H, W, 3) uint8."""
    return torch.from_numpy(np.stack([view.pictures[look].pixels_HWC for view in batch]))


@functools.cache
def _copying_stream() -> torch.cuda.Stream:
    """What leaves the device, beside the next forward pass."""
    return torch.cuda.Stream()


def _kept(white: Whitened, plan: StorePlan, batch: list[RenderedView]) -> Whitened:
    """The tokens that the store keeps of each view."""
    if plan.token_subset is None:
        return white
    tokens, channels = plan.features.shape_TC
    positions = [plan.token_subset.positions(view.key, view.view_index, tokens) for view in batch]
    positions_BS = torch.from_numpy(np.stack(positions)).to(white.tokens_BTC.device)
    return Whitened(
        white.tokens_BTC.gather(1, positions_BS.unsqueeze(-1).expand(-1, -1, channels)),
        white.mean_BT.gather(1, positions_BS),
        white.std_BT.gather(1, positions_BS),
    )
