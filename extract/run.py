"""The extraction stage: fill a store, or go on filling it.

python -m pipeline extract --teacher clip-l --data /data/imagenet --views 4
"""

import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from extract.cluster import FailedJob, run_jobs
from extract.config import ExtractConfig
from extract.plan import build_plan
from extract.worker import Worker
from storage.errors import InputError, QuarantineError
from storage.folder import create_store, finish_store, sweep
from storage.image_index import ImageList, load_index
from storage.lock import hold_lock
from storage.receipts import committed_shards, read_receipt
from storage.records import ShardEntry
from storage.stage import Progress, SilentProgress, stop_on_signals


def run(
    cfg: ExtractConfig, inputs: Mapping[str, Path], out_dir: Path, progress: Progress | None = None
) -> dict[str, Any]:
    """Extract every missing shard of the store `out_dir` and finish it.

    Args:
        inputs: `data`, an image index file.

    Returns:
        The stage's metrics.

    Raises:
        QuarantineError: some shards were given up; all others are committed.
        InputError: too many unusable images, or none at all.
    """
    progress = progress or SilentProgress()
    images = load_index(inputs["data"]).split(cfg.split)
    if not len(images):
        raise InputError(
            f"no image is in the {cfg.split!r} part of {images.location}; raise data.eval_fraction above 0"
        )
    plan = build_plan(cfg, images, out_dir)
    started = time.monotonic()
    with hold_lock(out_dir), stop_on_signals() as stop:
        create_store(out_dir, plan, images)
        sweep(out_dir, plan)
        done = committed_shards(out_dir, plan)
        pending = [index for index in range(plan.num_shards) if index not in done]
        if done:
            progress.say(f"resuming: {len(done)} of {plan.num_shards} shards are done")
        num_bad = _check_bad(cfg, images, done)
        progress.start(len(images), "images", done=sum(entry.num_images for entry in done.values()))
        make_worker = functools.partial(Worker, cfg, inputs["data"], out_dir)
        failed: list[FailedJob] = []
        for outcome in run_jobs(
            pending, make_worker, cfg.run, find_committed=functools.partial(read_receipt, out_dir, plan), stop=stop
        ):
            if isinstance(outcome, FailedJob):
                failed.append(outcome)
                progress.say(f"shard {outcome.job} is given up: {outcome.reason}")
                continue
            done[outcome.index] = outcome
            num_bad = _check_bad(cfg, images, done) if outcome.bad_images else num_bad
            progress.advance(outcome.num_images, shards=f"{len(done)}/{plan.num_shards}", bad=num_bad)
        if failed:
            raise QuarantineError(
                f"{len(failed)} of {plan.num_shards} shards were given up after {cfg.run.max_attempts} attempts "
                f"(first: shard {failed[0].job}: {failed[0].reason}); all others are safe: give the same command again"
            )
        manifest = finish_store(out_dir)
    seconds = time.monotonic() - started
    extracted = sum(done[index].num_records for index in pending)
    return {
        "store_fingerprint": manifest.fingerprint,
        "teacher": cfg.teacher,
        "images": plan.num_images,
        "views_per_image": plan.views_per_image,
        "records": sum(entry.num_records for entry in done.values()),
        "shards": plan.num_shards,
        "tokens": plan.features.num_tokens,
        "channels": plan.features.channels,
        "layout": plan.backend,
        "encoding": plan.encoding.kind,
        "precision": plan.teacher["precision"],
        "bytes": manifest.num_bytes,
        "bad_images": [bad.to_json() for bad in manifest.bad_images],
        "extracted_views_per_second": round(extracted / seconds, 2) if pending else None,
    }


def _check_bad(cfg: ExtractConfig, images: ImageList, done: Mapping[int, ShardEntry]) -> int:
    """Count unusable images.

    Raises:
        InputError: more than `max_bad_fraction` allows.
    """
    bad = [bad for entry in done.values() for bad in entry.bad_images]
    allowed = max(1, int(cfg.max_bad_fraction * len(images)))
    if len(bad) > allowed:
        listed = "; ".join(f"{image.key}: {image.reason}" for image in bad[:5])
        raise InputError(
            f"{len(bad)} of {len(images)} images of {images.location} are unusable, {allowed} are allowed ({listed}); "
            "mend or remove them, or raise extract.max_bad_fraction"
        )
    return len(bad)
