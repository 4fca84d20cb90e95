"""A store's plan: who the teacher is, and what whitening and the encoding learn from a sample of views."""

from pathlib import Path

from extract.backends import load_teacher
from extract.config import ExtractConfig
from extract.resolve import resolve_teacher
from extract.teacher import Teacher, choose_precision
from extract.worker import sample_tokens
from storage.encodings import Encoding, fit_encoding, is_fitted
from storage.folder import find_plan
from storage.image_index import ImageList
from storage.jpeg import ViewCodec
from storage.records import StoredViews, StorePlan
from storage.whitening import LayerNorm


def build_plan(cfg: ExtractConfig, images: ImageList, out_dir: Path) -> StorePlan:
    """Load the teacher once, here, to learn who it is; workers load their own copies and compare."""
    spec = resolve_teacher(cfg)
    device = "cpu" if is_fitted(cfg.encoding) else cfg.run.device
    precision = choose_precision(cfg.precision, cfg.run.device)
    teacher = load_teacher(spec, weights=cfg.weights, device=device, precision=precision)
    views = None
    if cfg.keeps_views:
        codec = ViewCodec(px=spec.input_px, quality=cfg.view_quality)
        views = StoredViews(px=spec.input_px, codec=codec.describe())
    plan = StorePlan(
        backend=cfg.layout,
        features=teacher.features,
        whitening=LayerNorm(),
        encoding=cfg.encoding,
        token_subset=cfg.token_subset,
        stored_views=views,
        labels_fingerprint=images.labels_fingerprint if cfg.layout == "wds" else "",
        sampler=cfg.sampler.to_json(),
        renderer=cfg.renderer.describe(),
        images_fingerprint=images.fingerprint,
        teacher_fingerprint=teacher.fingerprint,
        teacher=spec.identity() | {"precision": precision},
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
    return fit_encoding(plan.encoding, sample_tokens(plan, images, teacher, cfg.fit_views))
