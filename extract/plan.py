"""A store's plan: who the teacher is, and what whitening and the encoding learn from a sample of views."""

import contextlib
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from extract.backends import load_teacher
from extract.config import ExtractConfig
from extract.fit import Fitted, fit_whitening
from extract.precision import Agreement, compare_with_float32
from extract.resolve import resolve_teacher
from extract.sample import SampleBatch, iter_sample, iter_sample_views
from extract.teacher import PRECISIONS, Teacher, choose_precision
from extract.whiten import Whitener
from storage.encodings import fit_encoding, is_fitted, unfitted
from storage.errors import ConfigError, DamagedError, InputError
from storage.files import LocalFiles
from storage.folder import find_plan
from storage.image_index import ImageList
from storage.jpeg import ViewCodec
from storage.reader import open_store
from storage.records import StoredViews, StorePlan
from storage.whitening import NO_STATISTICS, STATISTICS_FILE, MeanStd, Pca, Statistics, load_statistics

Sample = Callable[[], Iterable[SampleBatch]]
"""Begins the sample anew; nothing is computed before."""
_COMPARED_VIEWS = 16
"""Enough to see a precision that fails, and seconds even for a large teacher on a GPU."""


class PlannedStore(NamedTuple):
    """All that `create_store` needs to know."""

    plan: StorePlan
    statistics: Statistics
    """What a fitted whitening learnt."""
    agreement: Agreement | None = None
    """How near the teacher's fast path is to plain float32; None where it is that itself."""


def build_plan(
    cfg: ExtractConfig, images: ImageList, out_dir: Path, whitening_from: Path | str | None = None
) -> PlannedStore:
    """Load the teacher once, here, to learn who it is; workers load their own copies and compare.

    A store that has begun in `out_dir` keeps what it learnt, and its precision where the settings leave that open: on
    another machine a fit may differ in its last digits, and `auto` may mean something else.

    Args:
        whitening_from: a finished store whose whitening this one shares, so that their tokens can be compared.

    Raises:
        ConfigError: that store is of another teacher or whitening.
        DamagedError: what the begun store's whitening learnt is gone, and a fit gives something else.
        InputError: images or tokens that nothing can be learnt from.
    """
    learns = not is_fitted(cfg.encoding) or not cfg.whitening.is_fitted
    begun = find_plan(out_dir)
    precision = _precision_of(cfg, begun)
    is_exact = precision == "float32" and not cfg.run.compile
    teacher = load_teacher(
        resolve_teacher(cfg), weights=cfg.weights, device="cpu" if is_exact and not learns else cfg.run.device,
        precision=precision, is_compiled=cfg.run.compile, channels_last=cfg.run.channels_last,
        gpus=max(1, int(cfg.run.gpus_per_worker)),
    )  # fmt: skip
    plan = plan_before_fit(cfg, images, teacher)
    sample: Sample = functools.partial(iter_sample, plan, images, teacher, cfg.fit_views)
    agreement = None
    if not is_exact:
        agreement = compare_with_float32(
            teacher, iter_sample_views(plan, images, teacher.spec.input_px, _COMPARED_VIEWS)
        )
    shared = None if whitening_from is None else shared_whitening(plan, whitening_from)
    if begun is not None and _without_fit(begun, plan) == plan:
        return PlannedStore(begun, _statistics_of_begun(begun, out_dir, shared, sample), agreement)
    fitted = shared or fit_on(plan, sample)
    if fitted is not None:
        plan = plan.model_copy(update={"whitening": fitted.whitening})
    statistics = NO_STATISTICS if fitted is None else fitted.statistics
    if not is_fitted(plan.encoding):
        whitener = Whitener(plan.whitening, statistics, teacher.device)
        whitened = [whitener(tokens_BTC, keys).tokens_BTC.cpu().numpy() for tokens_BTC, keys in sample()]
        plan = plan.model_copy(update={"encoding": fit_encoding(plan.encoding, whitened)})
    return PlannedStore(plan, statistics, agreement)


def _precision_of(cfg: ExtractConfig, begun: StorePlan | None) -> str:
    if cfg.precision == "auto" and begun is not None and begun.teacher.get("precision") in PRECISIONS:
        return str(begun.teacher["precision"])
    return choose_precision(cfg.precision, cfg.run.device)


def plan_before_fit(cfg: ExtractConfig, images: ImageList, teacher: Teacher) -> StorePlan:
    """The plan as far as settings, images and teacher decide it."""
    views = None
    if cfg.keeps_views:
        codec = ViewCodec(px=teacher.spec.input_px, quality=cfg.view_quality)
        views = StoredViews(px=teacher.spec.input_px, codec=codec.describe())
    return StorePlan(
        backend=cfg.layout,
        features=teacher.features,
        whitening=cfg.whitening,
        encoding=cfg.encoding,
        token_subset=cfg.token_subset,
        stored_views=views,
        labels_fingerprint=images.labels_fingerprint if cfg.layout == "wds" else "",
        sampler=cfg.sampler.to_json(),
        renderer=cfg.renderer.describe(),
        images_fingerprint=images.fingerprint,
        teacher_fingerprint=teacher.fingerprint,
        teacher=teacher.spec.identity() | {"precision": teacher.precision},
        num_images=len(images),
        views_per_image=cfg.views,
        images_per_shard=cfg.images_per_shard,
    )


def _without_fit(begun: StorePlan, plan: StorePlan) -> StorePlan:
    """The plan of a store that has begun, without what it learnt and `plan` did not yet."""
    encoding = begun.encoding if is_fitted(plan.encoding) else unfitted(begun.encoding)
    return begun.model_copy(update={"whitening": begun.whitening.unfitted(), "encoding": encoding})


def fit_on(plan: StorePlan, sample: Sample) -> Fitted | None:
    """What a plan's whitening learns of a sample; None where it learns nothing.

    Raises:
        InputError: views that nothing can be learnt from.
    """
    return fit_whitening(plan.whitening, sample()) if isinstance(plan.whitening, MeanStd | Pca) else None


def shared_whitening(plan: StorePlan, location: Path | str) -> Fitted | None:
    """The whitening of another store; None where it learns nothing.

    Raises:
        ConfigError: it is not one that this store can share.
    """
    other = open_store(location)
    if other.plan.whitening.unfitted() != plan.whitening:
        raise ConfigError(
            f"{location} is whitened by {other.plan.whitening.unfitted().to_json()}, these settings are "
            f"{plan.whitening.to_json()}; give WHITENING={other.plan.whitening.kind} (extract.whitening)"
        )
    if (other.plan.teacher_fingerprint, other.plan.features) != (plan.teacher_fingerprint, plan.features):
        raise ConfigError(
            f"{location} holds tokens of teacher {other.plan.features.teacher!r} (weights "
            f"{other.plan.teacher_fingerprint}), these settings are {plan.features.teacher!r} "
            f"({plan.teacher_fingerprint}): its whitening is of no use here; give the same TEACHER and WEIGHTS"
        )
    if not isinstance(other.plan.whitening, MeanStd | Pca):
        return None
    return Fitted(other.plan.whitening, other.statistics)


def _statistics_of_begun(begun: StorePlan, root: Path, shared: Fitted | None, sample: Sample) -> Statistics:
    """What the whitening of a store in `root` learnt: from its file or, where that is damaged, from wherever the same
    is to be had."""
    if shared is not None and shared.whitening == begun.whitening:
        return shared.statistics
    try:
        return load_statistics(LocalFiles(root), begun.whitening, begun.features.channels)
    except DamagedError as error:
        again = None
        with contextlib.suppress(InputError):  # too few tokens where the whitening is another store's
            again = fit_on(begun.model_copy(update={"whitening": begun.whitening.unfitted()}), sample)
        if again is not None and again.whitening == begun.whitening:
            return again.statistics
        raise DamagedError(
            f"{root / STATISTICS_FILE} is damaged or gone, and a fit gives other numbers here than when the store was "
            f"begun; copy it from another store of the same extraction, or delete {root} and give the command again"
        ) from error
