"""How fast an extraction would go: the whole pipeline for some seconds, on random images, with all its workers.

The shards are real ones of stores of their own, in a private folder on the disk of the stores. Each is removed once it
was committed, the folder at the end; nothing else is written.
"""

import contextlib
import functools
import random
import resource
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from extract.config import ExecutionConfig, ExtractConfig
from extract.driver import drive
from extract.extraction import write_extraction
from extract.filling import Target
from extract.jobs import FailedJob, Job
from extract.plan import build_plan
from extract.pools import open_pool
from extract.teacher import choose_device
from extract.timing import Bottleneck, StageSeconds, find_bottleneck
from extract.worker import Worker
from storage.atomic import write_file
from storage.errors import InputError
from storage.folder import encode_metadata
from storage.image_list import ImageList
from storage.lock import hold_lock, is_held
from storage.receipts import receipt_path
from storage.records import ShardEntry
from storage.stage import StopRequest
from storage.whitening import Pca

_MOST_SHARDS = 2000
"""More than any machines make in a trial."""
_CPU_RECORDS = 16
"""Of a shard on a CPU, where a whole one may take minutes; on a GPU shards are as large as they will be."""
_PREFIX = ".trial-"
_SAMPLE_VIEWS = 16
"""That are learnt from: what is learnt changes no arithmetic."""


class Trial(NamedTuple):
    """What a trial has measured."""

    images: int
    seconds: float
    """In which these images were extracted, by all workers together."""
    start_seconds: float
    """Until the last worker was up."""
    workers: int
    batch_sizes: tuple[int, ...]
    """Views in one forward pass, teacher by teacher."""
    stage_seconds: StageSeconds
    """Where the time of all workers went."""
    peak_gpu_bytes: int
    """Of the worker that took most; 0 without a GPU."""
    peak_memory_bytes: int
    """Of the worker that took most: resident memory of its process."""

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    @property
    def bottleneck(self) -> Bottleneck | None:
        return find_bottleneck(self.stage_seconds, self.seconds * self.workers)

    def hours_for(self, num_images: int) -> float:
        """How long an extraction of so many images would take."""
        return (self.start_seconds + num_images / self.images_per_second) / 3600


class Tried(NamedTuple):
    """What a worker says of a shard of a trial."""

    entries: tuple[ShardEntry, ...]
    seconds: StageSeconds
    batch_sizes: tuple[int, ...]
    peak_gpu_bytes: int
    peak_memory_bytes: int


class TrialWorker(Worker):
    """A worker that also says how much memory it takes."""

    def __call__(self, job: Job) -> Tried:  # type: ignore[override]
        extracted = super().__call__(job)
        has_gpu = self.stores[0].teacher.device.type == "cuda"
        return Tried(
            extracted.entries,
            extracted.seconds,
            tuple(store.batch_size for store in self.stores),
            max(map(torch.cuda.max_memory_reserved, range(torch.cuda.device_count())), default=0) if has_gpu else 0,
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )


def run_trial(
    targets: Sequence[Target], images: ImageList, *, seconds: float = 20.0, seed: int = 0,
    stop: StopRequest | None = None,
) -> Trial:  # fmt: skip
    """Extract random images of a data set for some seconds, as `run_together` would do it with the same settings.

    Takes `seconds` beside what it takes to load the teachers, or less where there are few images; more where one shard
    takes longer. The stores themselves are not looked at: they may be there, half done or locked.

    Args:
        targets: only the disk that each folder is to lie on counts.
        images: those to be extracted.
        seed: decides which images are taken.

    Raises:
        InputError: there is no image, or a shard could not be extracted; says why.
        Interrupted: a stop was asked for.
    """
    if not len(images):
        raise InputError(f"there is no image in {images.location}, so nothing can be tried")
    stop = StopRequest() if stop is None else stop  # one that is not set counts as false
    run = targets[0].cfg.run.model_copy(update={"max_attempts": 1, "recycle_after": 0})
    cfgs = [_trial_settings(target.cfg) for target in targets]
    sample = _random_shards(images, cfgs[0].images_per_shard, seed)
    jobs = [Job(shard) for shard in range(-(-len(sample) // cfgs[0].images_per_shard))]
    random.Random(seed).shuffle(jobs)
    with _private_folders([target.root for target in targets]) as roots:
        for cfg, root in zip(cfgs, roots, strict=True):
            planned = build_plan(cfg, sample, root)
            # as `create_store` does, but for the room of a whole store, which may be there already
            for name, data in encode_metadata(planned.plan, sample, planned.statistics).items():
                write_file(root / name, data)
            write_extraction(root, cfg, sample)
        torch.cuda.empty_cache()
        return _measure(roots, run, jobs, seconds, stop)


def _measure(
    roots: Sequence[Path], run: ExecutionConfig, jobs: Sequence[Job], seconds: float, stop: StopRequest
) -> Trial:
    clock, done = _Clock(), list[Tried]()
    with open_pool(run, functools.partial(TrialWorker, roots, run), len(jobs), stop) as pool:
        outcomes = drive(pool, jobs, run, find_committed=lambda job: None, stop=stop, note=clock.note)
        with contextlib.closing(outcomes):  # type: ignore[type-var]
            for outcome in outcomes:
                if isinstance(outcome, FailedJob):
                    raise InputError(f"a trial of the extraction failed: {outcome.reason}")
                for root, entry in zip(roots, outcome.entries, strict=True):
                    _remove_shard(root, entry)
                done.append(outcome)
                clock.ended.append(time.monotonic())
                if clock.ended[-1] - clock.ups[-1] >= seconds and len(done) >= len(clock.ups):
                    break
    began = clock.begin(seconds)
    counted = [tried for tried, ended in zip(done, clock.ended, strict=True) if ended > began]
    return Trial(
        images=sum(tried.entries[0].num_images for tried in counted),
        seconds=clock.ended[-1] - began,
        start_seconds=clock.ups[-1] - clock.asked,
        workers=len(clock.ups),
        batch_sizes=done[0].batch_sizes,
        stage_seconds=functools.reduce(StageSeconds.plus, (tried.seconds for tried in counted)),
        peak_gpu_bytes=max(tried.peak_gpu_bytes for tried in done),
        peak_memory_bytes=max(tried.peak_memory_bytes for tried in done),
    )


class _Clock:
    """When workers came up and shards were done; monotonic seconds."""

    def __init__(self) -> None:
        self.asked = time.monotonic()
        self.ups: list[float] = []
        self.ended: list[float] = []

    def note(self, kind: str, **facts: object) -> None:
        """Hears it from the driver."""
        if kind == "worker up":
            self.ups.append(time.monotonic())

    def begin(self, seconds: float) -> float:
        """From when on the work counts: since all workers were up. Where the images came to an end before that, or soon
        after, since the first one was."""
        return self.ups[-1] if self.ended[-1] - self.ups[-1] >= seconds / 2 else self.ups[0]


def _trial_settings(cfg: ExtractConfig) -> ExtractConfig:
    """The same work in shards that end within seconds."""
    records = cfg.records_per_shard
    if choose_device(cfg.run.device).type == "cpu":
        records = min(records, _CPU_RECORDS)
    views = cfg.fit_views if isinstance(cfg.whitening, Pca) else min(cfg.fit_views, _SAMPLE_VIEWS)
    return cfg.model_copy(update={"records_per_shard": records, "fit_views": views})


def _random_shards(images: ImageList, images_per_shard: int, seed: int) -> ImageList:
    """The images of random shards: neighbours, as an extraction reads them."""
    num_shards = -(-len(images) // images_per_shard)
    is_taken_S = np.zeros(num_shards, np.bool_)
    is_taken_S[np.random.default_rng(seed).permutation(num_shards)[:_MOST_SHARDS]] = True
    return images.select(is_taken_S.repeat(images_per_shard)[: len(images)])


def _remove_shard(root: Path, entry: ShardEntry) -> None:
    for file in entry.files:
        (root / file.name).unlink(missing_ok=True)
    receipt_path(root, entry.index).unlink(missing_ok=True)


@contextlib.contextmanager
def _private_folders(roots: Sequence[Path]) -> Iterator[list[Path]]:
    """A folder for each store, on its disk but not in it; removed with all that is in them. So is what a trial has left
    that was killed: its lock is free."""
    made: list[Path] = []
    with contextlib.ExitStack() as held:
        for root in roots:
            place = next(folder for folder in root.absolute().parents if folder.is_dir())
            for left in set(place.glob(f"{_PREFIX}*")) - set(made):
                if not is_held(left):
                    shutil.rmtree(left, ignore_errors=True)
            made.append(place / f"{_PREFIX}{secrets.token_hex(4)}")
            held.callback(shutil.rmtree, made[-1], ignore_errors=True)
            held.enter_context(hold_lock(made[-1]))
        yield [folder / "store" for folder in made]  # one level down, where nobody takes it for a store
