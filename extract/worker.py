"""One shard of one or several stores: read, render, forward, whiten, commit. Runs in one process and knows nothing of
Ray."""

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from extract.backends import load_teacher
from extract.batch_size import choose_batch_size
from extract.config import ExecutionConfig, ExtractConfig
from extract.extraction import load_extraction
from extract.jobs import Job
from extract.render import Look, RenderedView, UnusableImage, ViewRenderer
from extract.resolve import resolve_teacher
from extract.teacher import Teacher
from extract.timing import StageSeconds
from extract.whiten import Whitened, Whitener
from storage.errors import BadImageError, ConfigError, DecantError
from storage.folder import load_plan
from storage.image_list import ImageList
from storage.receipts import read_receipt
from storage.records import FeatureRecord, ShardEntry, StorePlan
from storage.writer import ShardWriter

_BATCHES_AHEAD = 2
"""Rendered before they are asked for."""
_MOST_RENDER_THREADS = 16
_SHARDS_AT_A_TIME = {"cpu": 1, "cuda": 3}
"""A GPU is not to wait while a shard is rendered or committed: another one has its turn then."""


class Extracted(NamedTuple):
    """What a worker says of a job."""

    entries: tuple[ShardEntry, ...]
    """The receipts, in the order of the stores; none for a shard that was only probed."""
    seconds: StageSeconds = StageSeconds()
    is_ours: bool = True
    """False where the shards were found committed: by another driver, or by a worker that could not say so."""


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
    index: int, *, stores: Sequence[OpenStore], images: ImageList, render_threads: int = 1
) -> tuple[ShardEntry, ...]:
    """Compute and commit one whole shard of every store that does not have it; each image is decoded once for all.

    Unusable images become holes and are listed in the receipts. A store that fails stops no other: what it raised is
    raised when the others have their shard.

    Returns:
        The receipts, in the order of the stores.

    Raises:
        InputError: an image changed since it was listed.
        DiskError: no room.
    """
    entries = [read_receipt(store.root, store.plan, index) for store in stores]
    parts = {n: _ShardPart(store, images, index) for n, store in enumerate(stores) if entries[n] is None}
    failures: list[Exception] = []

    def attempt(number: int, act: Callable[[], ShardEntry | None]) -> None:
        try:
            entries[number] = act()
        except Exception as error:
            failures.append(_named(error, stores[number]) if len(stores) > 1 else error)
            del parts[number]

    if parts:
        plan = stores[0].plan
        renderer = ViewRenderer(plan, images, {part.store.look for part in parts.values()})
        most_views = _BATCHES_AHEAD * max(part.store.batch_size for part in parts.values())
        rendered = renderer.iter_rendered(
            plan.images_of_shard(index), threads=render_threads, ahead=-(-most_views // plan.views_per_image)
        )
        with contextlib.closing(rendered):  # type: ignore[type-var]
            for image in rendered:
                for number, part in list(parts.items()):
                    attempt(number, lambda part=part, image=image: part.take(image))  # type: ignore[misc]
                if not parts:
                    break
    for number, part in list(parts.items()):
        attempt(number, part.commit)
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

    def __init__(self, store: OpenStore, images: ImageList, index: int) -> None:
        self.store, self.writer = store, ShardWriter(store.root, store.plan, images, index)
        self.waiting: list[RenderedView] = []

    def take(self, image: list[RenderedView] | UnusableImage) -> None:
        """Run the teacher whenever there is a whole batch."""
        if isinstance(image, UnusableImage):
            self.writer.mark_bad(image.key, image.reason)
            return
        self.waiting += image
        size = self.store.batch_size
        while len(self.waiting) >= size:
            batch, self.waiting = self.waiting[:size], self.waiting[size:]
            self._append(batch)

    def commit(self) -> ShardEntry:
        if self.waiting:
            self._append(self.waiting)
        return self.writer.commit()

    def _append(self, batch: list[RenderedView]) -> None:
        plan, look, pixels_BHWC = self.store.plan, self.store.look, _stack(batch, self.store.look)
        with self.store.turn:
            white = self.store.whitener(self.store.teacher(pixels_BHWC), [view.key for view in batch])
            ready = torch.cuda.current_stream().record_event() if white.tokens_BTC.is_cuda else None
        tokens_BTC, mean_BT, std_BT = _to_host(white, ready)
        for number, view in enumerate(batch):
            kept = _kept_tokens(plan, view)
            self.writer.append(
                FeatureRecord(
                    view.key, view.view_index, view.view, tokens_BTC[number][kept], mean_BT[number][kept],
                    std_BT[number][kept], view.pictures[look].jpeg,
                )
            )  # fmt: skip


def _stack(batch: list[RenderedView], look: Look) -> torch.Tensor:
    """(B, H, W, 3) uint8."""
    return torch.from_numpy(np.stack([view.pictures[look].pixels_HWC for view in batch]))


def _to_host(white: Whitened, ready: torch.cuda.Event | None) -> list[NDArray[Any]]:
    """Copies in the host's memory; from a GPU in a stream of their own, beside the next forward pass."""
    if ready is None:
        return [part.numpy() for part in white]
    stream = torch.cuda.Stream()
    stream.wait_event(ready)
    with torch.cuda.stream(stream):
        return [part.cpu().numpy() for part in white]


def _kept_tokens(plan: StorePlan, view: RenderedView) -> NDArray[np.int64] | slice:
    if plan.token_subset is None:
        return slice(None)
    return plan.token_subset.positions(view.key, view.view_index, plan.features.num_tokens)


class Worker:
    """Loaded teachers and open stores; `worker(job)` extracts a shard of those that do not have it. Several
    threads may call it at a time."""

    def __init__(self, roots: Sequence[Path], run: ExecutionConfig) -> None:
        """
        Args:
            roots: of stores that have begun and agree in their images and views; each says itself how it is filled.
            run: how this worker is to work.
        """
        torch.set_num_threads(run.threads)
        extractions = [load_extraction(root) for root in roots]
        self.images = extractions[0].load_images(roots[0])
        opened = [
            (root, load_plan(root), extraction.settings_for(run))
            for root, extraction in zip(roots, extractions, strict=True)
        ]
        loaded = [(root, plan, cfg, _load(cfg, plan)) for root, plan, cfg in opened]
        turn = threading.Lock()
        self.stores = [  # batch sizes are chosen when all teachers have their memory
            OpenStore(
                root, plan, teacher, Whitener.of_store(root, plan, teacher.device),
                choose_batch_size(teacher, cfg.run.batch_size, _workers_here(run)), turn,
            )
            for root, plan, cfg, teacher in loaded
        ]  # fmt: skip
        device = self.stores[0].teacher.device.type
        self.jobs_at_a_time = _SHARDS_AT_A_TIME[device]
        self.render_threads = 1 if device == "cpu" else min(_MOST_RENDER_THREADS, len(os.sched_getaffinity(0)))
        if self.render_threads > 1:  # what is known of tars is read once, not by each thread
            with contextlib.suppress(BadImageError):
                self.images.read_image(0)

    def __call__(self, job: Job) -> Extracted:
        return Extracted(
            extract_shard(job.shard, stores=self.stores, images=self.images, render_threads=self.render_threads)
        )


def _load(cfg: ExtractConfig, plan: StorePlan) -> Teacher:
    """The teacher that a store is made with.

    Raises:
        ConfigError: its weights, or what else decides its tokens, are others here.
    """
    teacher = load_teacher(
        resolve_teacher(cfg), weights=cfg.weights, device=cfg.run.device, precision=plan.teacher["precision"],
        is_compiled=cfg.run.compile, channels_last=cfg.run.channels_last,
    )  # fmt: skip
    if teacher.fingerprint != plan.teacher_fingerprint:
        raise ConfigError(
            f"this worker's weights of {cfg.teacher!r} are {teacher.fingerprint}, the store's are "
            f"{plan.teacher_fingerprint}; give every machine the same weights file"
        )
    found = teacher.spec.identity() | {"precision": teacher.precision}
    if found != plan.teacher:
        changed = [name for name in sorted({*found, *plan.teacher}) if found.get(name) != plan.teacher.get(name)]
        listed = "; ".join(f"{name} is {found.get(name)}, the store's is {plan.teacher.get(name)}" for name in changed)
        raise ConfigError(
            f"this worker's teacher {cfg.teacher!r} is not the one that the store was begun with: {listed}; give every "
            "machine the same files and the same versions of the libraries, or begin another store"
        )
    return teacher


def _workers_here(run: ExecutionConfig) -> int:
    """Processes that share this machine's memory, as far as the settings tell."""
    return 1 if run.executor == "inline" else run.cpu_workers(len(os.sched_getaffinity(0)))
