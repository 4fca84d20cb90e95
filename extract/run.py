"""The extraction stage: fill a store, or go on filling it.

python -m pipeline extract --teacher clip-l --data /data/imagenet --views 4
"""

import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from extract.backends import Teacher, load_teacher
from extract.cluster import FailedJob, run_jobs
from extract.config import ExtractConfig
from extract.teachers import find_teacher
from extract.whiten import SETTINGS as WHITENING
from extract.worker import Worker, sample_tokens
from storage.encodings import Encoding, fit_encoding, is_fitted
from storage.errors import InputError, QuarantineError
from storage.folder import create_store, find_plan, finish_store, sweep
from storage.image_index import ImageList, load_index
from storage.jpeg import ViewCodec
from storage.lock import hold_lock
from storage.receipts import committed_shards, read_receipt
from storage.records import ShardEntry, StoredViews, StorePlan
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
        "bytes": manifest.num_bytes,
        "bad_images": [bad.to_json() for bad in manifest.bad_images],
        "extracted_views_per_second": round(extracted / seconds, 2) if pending else None,
    }


def build_plan(cfg: ExtractConfig, images: ImageList, out_dir: Path) -> StorePlan:
    """Load the teacher once, here, to learn who it is; workers load their own copies and compare."""
    spec = find_teacher(cfg.teacher)
    device = "cpu" if is_fitted(cfg.encoding) else cfg.run.device
    teacher = load_teacher(spec, weights=cfg.weights, input_px=cfg.input_px, device=device)
    row = spec.model_dump(mode="json", exclude={"weights", "state_keys", "licence"}) | {"input_px": teacher.input_px}
    views = None
    if cfg.keeps_views:
        codec = ViewCodec(px=teacher.input_px, quality=cfg.view_quality)
        views = StoredViews(px=teacher.input_px, codec=codec.describe())
    plan = StorePlan(
        backend=cfg.layout,
        features=teacher.features,
        whitening=WHITENING,
        encoding=cfg.encoding,
        token_subset=cfg.token_subset,
        stored_views=views,
        labels_fingerprint=images.labels_fingerprint if cfg.layout == "wds" else "",
        sampler=cfg.sampler.to_json(),
        renderer=cfg.renderer.describe(),
        images_fingerprint=images.fingerprint,
        teacher_fingerprint=teacher.fingerprint,
        teacher=row,
        num_images=len(images),
        views_per_image=cfg.views,
        images_per_shard=cfg.images_per_shard,
    )
    if is_fitted(plan.encoding):
        return plan
    return plan.model_copy(update={"encoding": _fitted_encoding(cfg, plan, images, teacher, out_dir)})


def _fitted_encoding(
    cfg: ExtractConfig, plan: StorePlan, images: ImageList, teacher: Teacher, out_dir: Path
) -> Encoding:
    """The encoding with what it learns from a sample of views; that of the store in `out_dir`, where it has begun: on
    another machine a fit may differ in its last digits, and with it the store."""
    begun = find_plan(out_dir)
    if begun is not None and begun.model_copy(update={"encoding": cfg.encoding}) == plan:
        return begun.encoding
    return fit_encoding(plan.encoding, sample_tokens(plan, images, teacher, cfg.fit_views, cfg.run.batch_size))


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
