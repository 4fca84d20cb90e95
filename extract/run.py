"""The extraction stage: fill a store, or go on filling it; or several stores in one pass over the images.

python -m pipeline extract --teacher clip-l,dino-b --data /data/imagenet --views 4
"""

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from extract.config import ExtractConfig
from extract.filling import Filling, Target
from extract.final_audit import audit_filling
from extract.plan import build_plan
from extract.preflight import check_place
from extract.retry import forget_failures
from extract.sharing import fill_with_others
from storage.errors import ConfigError, InputError, QuarantineError
from storage.image_index import load_index
from storage.lock import hold_lock
from storage.stage import Progress, SilentProgress, stop_on_signals

_SHARED = ("split", "views", "sampler", "renderer", "records_per_shard")
"""Settings in which stores agree that are filled in one pass: the images, their views, and what a job is."""


def run(
    cfg: ExtractConfig, inputs: Mapping[str, Path], out_dir: Path, progress: Progress | None = None, *,
    retry_failed: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Extract every missing shard of the store `out_dir` and finish it.

    Args:
        inputs: `data`, an image index file; `extract`, a finished store whose fitted whitening is taken, if that is to
            be shared.
        retry_failed: try again what earlier runs gave up.

    Returns:
        The stage's metrics.

    Raises:
        QuarantineError: some shards were given up; all others are committed.
        InputError: too many unusable images, or none at all.
    """
    [outcome] = run_together([(cfg, out_dir)], inputs, progress, retry_failed=retry_failed)
    if isinstance(outcome, QuarantineError):
        raise outcome
    return outcome


def run_together(
    stores: Sequence[tuple[ExtractConfig, Path]], inputs: Mapping[str, Path], progress: Progress | None = None, *,
    retry_failed: bool = False,
) -> list[dict[str, Any] | QuarantineError]:  # fmt: skip
    """`run` for several stores in one pass: each image is read and decoded once, rendered once a size, and goes through
    every teacher that still lacks it. Each store gets the bytes that it would get alone.

    Args:
        stores: settings and folder of each one; they differ in what they like but the views. How to work is said by
            the first one's `run`, batch sizes by each.

    Returns:
        Each store's metrics, or why it is not whole.

    Raises:
        ConfigError: the stores cannot be filled in one pass; names the setting.
        StoreBusyError: another process writes one of them; nothing is done then.
        DiskError: there is no room for them, or nothing can be written there.
        InputError: too many unusable images, or none at all.
    """
    progress = progress or SilentProgress()
    targets = [Target(cfg, root) for cfg, root in stores]
    _check_agreement(targets)
    with contextlib.ExitStack() as held:
        for target in targets:  # a lock is never waited for, so the order does not matter
            held.enter_context(hold_lock(target.root))
        images = load_index(inputs["data"]).split(targets[0].cfg.split)
        if not len(images):
            raise InputError(
                f"no image is in the {targets[0].cfg.split!r} part of {images.location}; raise data.eval_fraction "
                "above 0"
            )
        check_place(targets, len(images))
        planned = [  # a signal ends this at once: there is nothing yet that could be lost
            build_plan(target.cfg, images, target.root, target.cfg.whitening_from or inputs.get("extract"))
            for target in targets
        ]
        torch.cuda.empty_cache()  # workers load the teachers again, perhaps on the same GPU
        for target, store in zip(targets, planned, strict=True):
            if store.agreement is not None:
                progress.say(f"{target.cfg.teacher}: {store.agreement}")
            if retry_failed:
                forget_failures(target.root, store.plan, progress)
        started = time.monotonic()
        with stop_on_signals() as stop:
            fillings = [Filling.begin(*target, store, images) for target, store in zip(targets, planned, strict=True)]
            watch = fill_with_others(fillings, progress, stop)
            stop.check()  # nobody has, since the last shard
        seconds = time.monotonic() - started  # and from now on a signal ends this at once again
        return [_finish(filling, fillings, seconds, watch.summary(), progress) for filling in fillings]


def _finish(
    filling: Filling, fillings: Sequence[Filling], seconds: float, summary: dict[str, Any], progress: Progress
) -> dict[str, Any] | QuarantineError:
    try:
        filling.check_whole()
    except QuarantineError as error:
        return error
    audit = audit_filling(filling, progress)
    others = [other.cfg.teacher for other in fillings if other is not filling]
    metrics = {"run": summary, "audit": None if audit is None else audit._asdict()}
    return filling.finish(seconds, others) | metrics


def _check_agreement(targets: Sequence[Target]) -> None:
    first, *others = targets
    for other in others:
        for name in _SHARED:
            here, there = getattr(first.cfg, name), getattr(other.cfg, name)
            if here != there:
                raise ConfigError(
                    f"stores that are filled in one pass look at the same views, but extract.{name} is {here} for "
                    f"{first.cfg.teacher!r} and {there} for {other.cfg.teacher!r}; extract one after the other"
                )
    roots = [target.root.resolve() for target in targets]
    twice = next((root for number, root in enumerate(roots) if root in roots[:number]), None)
    if twice is not None:
        raise ConfigError(f"two of the stores that are to be filled in one pass are the same, {twice}; name one")
