"""How long an extraction would take: a trial of it, and what that tells."""

import importlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console

from extract.config import ExtractConfig
from pipeline.planning import Plan, StagePlan
from storage.errors import DecantError
from storage.folder import find_plan
from storage.receipts import without_receipt
from storage.stage import stop_on_signals


def show_estimate(plan: Plan, seconds: float, console: Console) -> None:
    """Try the extraction that a plan has in store, for some seconds; nothing where there is none, or no time for it."""
    stores = [item for item in plan.stores() if item.action != "skip"]
    if not stores or not seconds:
        return
    console.print(f"trying the extraction for about {seconds:g} s (--trial, TRIAL=; 0 for none) ...")
    extraction, filling = importlib.import_module("extract.trial"), importlib.import_module("extract.filling")
    cfgs = [_settings(item) for item in stores]
    targets = [filling.Target(cfg, item.folder) for cfg, item in zip(cfgs, stores, strict=True)]
    images = plan.images.split(cfgs[0].split)
    try:
        with stop_on_signals() as stop:
            trial = extraction.run_trial(targets, images, seconds=seconds, stop=stop)
    except DecantError as error:
        console.print(f"no estimate: {error}")
        return
    for line in _lines(trial, max(_images_left(item, len(images)) for item in stores), cfgs):
        console.print(line, soft_wrap=True)


def _lines(trial: Any, images_left: int, cfgs: Sequence[ExtractConfig]) -> Iterator[str]:
    workers = f"{trial.workers} worker{'s' if trial.workers > 1 else ''}"
    yield (
        f"extraction: {trial.images_per_second:,.1f} images/s with {workers} ({cfgs[0].run.executor}), "
        f"{_duration(3600 * trial.hours_for(images_left))} for the {images_left:,} images that are left"
    )
    memory = f"{trial.peak_memory_bytes / 1e9:,.1f} GB of memory a worker"
    sizes = " and ".join(map(str, trial.batch_sizes))
    if trial.peak_gpu_bytes:
        yield f"memory: {trial.peak_gpu_bytes / 1e9:,.1f} GB of GPU memory and {memory}, batches of {sizes} views"
    else:
        cores = os.cpu_count()
        yield f"memory: {memory}, batches of {sizes} views; no GPU is used: the teacher runs on {cores} CPU cores"
    if trial.bottleneck is not None:
        yield str(trial.bottleneck)


def _settings(item: StagePlan) -> ExtractConfig:
    assert isinstance(item.settings, ExtractConfig)
    return item.settings


def _images_left(item: StagePlan, num_images: int) -> int:
    """Images of shards that are not there yet."""
    if item.is_again:
        return num_images
    try:
        begun = find_plan(item.folder)
    except DecantError:
        begun = None
    if begun is None:
        return num_images
    return sum(len(begun.images_of_shard(index)) for index in without_receipt(item.folder, begun))


def _duration(seconds: float) -> str:
    """As people say it."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    if seconds < 5400:
        return f"about {round(seconds / 60)} minutes"
    return f"about {seconds / 3600:,.1f} hours"
