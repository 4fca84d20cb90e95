"""A worker: the teachers and stores of one process, whoever started it."""

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from extract.backends import load_teacher
from extract.batch_size import choose_batch_size
from extract.config import ExecutionConfig, ExtractConfig
from extract.extraction import load_extraction
from extract.jobs import Job
from extract.resolve import resolve_teacher
from extract.shard import OpenStore, extract_shard
from extract.teacher import Teacher
from extract.timing import Meter, StageSeconds
from extract.whiten import Whitener
from storage.errors import BadImageError, ConfigError
from storage.folder import load_plan
from storage.records import ShardEntry, StorePlan

_MOST_RENDER_THREADS = 16
_SHARDS_AT_A_TIME = {"cpu": 1, "cuda": 2}
"""While one is read, encoded or committed, a GPU has another one. A CPU would only change between them."""


class Extracted(NamedTuple):
    """What a worker says of a job."""

    entries: tuple[ShardEntry, ...]
    """The receipts, in the order of the stores; none for a shard that was only probed."""
    seconds: StageSeconds = StageSeconds()
    is_ours: bool = True
    """False where the shards were found committed: by another driver, or by a worker that could not say so."""
    num_done_again: int = 0
    """Views that went beyond the teacher's precision since the last job, and were done again in float32."""


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
        loaded = [(root, plan, cfg, load_store_teacher(cfg, plan)) for root, plan, cfg in opened]
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
        self.may_shrink = run.batch_size == 0
        """Whether a job that ended a worker is tried with smaller batches: perhaps memory ran out."""
        self.check_stop: Callable[[], None] = lambda: None
        """Called between batches; raises where the work is to end."""
        self.render_threads = run.render_threads or _render_threads(run, device)
        if self.render_threads > 1:  # what is known of tars is read once, not by each thread
            with contextlib.suppress(BadImageError):
                self.images.read_image(0)

    def __call__(self, job: Job) -> Extracted:
        meter = Meter()
        entries = extract_shard(
            job if self.may_shrink else job._replace(halvings=0), stores=self.stores, images=self.images,
            render_threads=self.render_threads, meter=meter, check_stop=self.check_stop,
        )  # fmt: skip
        return Extracted(
            entries, meter.seconds, num_done_again=sum(s.teacher.take_num_done_again() for s in self.stores)
        )


def load_store_teacher(cfg: ExtractConfig, plan: StorePlan) -> Teacher:
    """The teacher that a store is made with.

    Raises:
        ConfigError: its weights, or what else decides its tokens, are others here.
    """
    teacher = load_teacher(
        resolve_teacher(cfg), weights=cfg.weights, device=cfg.run.device, precision=plan.teacher["precision"],
        is_compiled=cfg.run.compile, channels_last=cfg.run.channels_last, gpus=max(1, int(cfg.run.gpus_per_worker)),
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


def _render_threads(run: ExecutionConfig, device: str) -> int:
    """Of a GPU's share of the machine's cores; on a CPU, workers share them already."""
    if device == "cpu":
        return 1
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*"))) or 1
    workers = max(1, int(gpus / run.gpus_per_worker))
    return max(1, min(_MOST_RENDER_THREADS, len(os.sched_getaffinity(0)) // workers))
