"""Does a store hold what its teacher says? Random records are made again, by the images and the teacher, and compared
with what is stored."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from extract.render import Look, UnusableImage, ViewRenderer
from extract.teacher import Teacher
from extract.whiten import Whitener
from storage.encodings import Encoding
from storage.image_list import ImageList
from storage.jpeg import decode_view
from storage.records import FeatureRecord, StorePlan
from storage.store import FeatureReader

_LIMITS = {"float32": 0.01, "float16": 0.05, "bfloat16": 0.15}
"""Largest relative error of a token, by the precision of the teacher's matrix products: rounding to float16, other
batches, other machines. Another image, view or weights give an error near 1."""
_ENCODING_LIMIT = 0.045
"""What a lossy encoding adds: a cosine of 0.999, which int8 keeps for every token, is an angle of so much."""
_BATCH = 8


class Audit(NamedTuple):
    """What an audit found. Errors are of whitened values; a token's relative error is that of its vector's length."""

    num_records: int
    worst_error: float
    """Largest absolute difference of a value."""
    mean_error: float
    """Mean absolute difference."""
    worst_relative: float
    """Largest relative error of a token."""
    limit: float
    """That `worst_relative` must not exceed."""
    worst_record: str
    """Image and view of the worst token."""
    num_unusable: int
    """Records that could not be made again, because their image is unusable now."""

    @property
    def is_good(self) -> bool:
        return self.worst_relative <= self.limit and not self.num_unusable

    def __str__(self) -> str:
        verdict = "as the teacher says" if self.is_good else "NOT what the teacher says"
        unusable = f", {self.num_unusable} records' images cannot be used now" if self.num_unusable else ""
        return (
            f"audit: {self.num_records} random records are {verdict}: error of whitened values at most "
            f"{self.worst_error:.2g}, {self.mean_error:.2g} in the mean; relative error of a token at most "
            f"{self.worst_relative:.2g} (limit {self.limit:.2g}) at {self.worst_record}{unusable}"
        )


def audit_store(
    store: FeatureReader, teacher: Teacher, whitener: Whitener, *, num_records: int, seed: int,
    images: ImageList | None = None,
) -> Audit:  # fmt: skip
    """Compare random records of a store, finished or not, with what the teacher gives for their views.

    Args:
        teacher: the one that the store was made with.
        images: those of the store, where they lie now; None looks at the views that the store keeps.

    Raises:
        InputError: an image is another one now; or there are neither images nor views.
        DamagedError: what is stored is not what was committed.
    """
    look = _look_of(store.plan, teacher.spec.input_px)
    worst = _Worst()
    num_unusable = 0
    renderer = None if images is None else ViewRenderer(store.plan, images, [look])
    for records in _batches(store, num_records, seed):
        wanted, pixels = [], []
        for record in records:
            view_HWC = _stored_view(record, look) if renderer is None else _rendered(renderer, store, record, look)
            if view_HWC is None:
                num_unusable += 1
            else:
                wanted.append(record)
                pixels.append(view_HWC)
        if wanted:
            white = whitener(teacher(torch.from_numpy(np.stack(pixels))), [record.key for record in wanted])
            for record, tokens_TC in zip(wanted, white.tokens_BTC.cpu().numpy(), strict=True):
                worst.add(record, _kept(store, record, tokens_TC))
    limit = _LIMITS[teacher.precision] + _lossy(store.plan.encoding)
    return worst.audit(limit, num_unusable)


def _batches(store: FeatureReader, num_records: int, seed: int) -> Iterator[Sequence[FeatureRecord]]:
    """Random records that the store has, a few at a time."""
    plan, random = store.plan, np.random.default_rng(seed)
    bad = {bad.key for bad in store.manifest.bad_images}
    missing = {index for index, digest in enumerate(store.manifest.receipts) if not digest}
    chosen: list[FeatureRecord] = []
    found = 0
    for number in random.permutation(plan.num_records)[: 100 * num_records].tolist():
        position, view_index = divmod(number, plan.views_per_image)
        key = store.images.keys[position]
        if found == num_records:
            break
        if key in bad or position // plan.images_per_shard in missing:
            continue
        chosen.append(store.read(key, view_index))  # type: ignore[arg-type]
        found += 1
        if len(chosen) == _BATCH:
            yield chosen
            chosen = []
    if chosen:
        yield chosen


def _look_of(plan: StorePlan, px: int) -> Look:
    """How the teacher looked at views; those that were added to a store later, it never saw."""
    look = Look.of(plan, px)
    is_seen = plan.stored_views is not None and plan.stored_views.seen_by_teacher
    return look if is_seen else look._replace(quality=None)


def _rendered(
    renderer: ViewRenderer, store: FeatureReader, record: FeatureRecord, look: Look
) -> NDArray[np.uint8] | None:
    views = renderer.render(store.images.position(record.key), num_views=record.view_index + 1)
    return None if isinstance(views, UnusableImage) else views[record.view_index].pictures[look].pixels_HWC


def _stored_view(record: FeatureRecord, look: Look) -> NDArray[np.uint8]:
    assert record.jpeg is not None
    pixels_HWC = np.empty((look.px, look.px, 3), np.uint8)
    decode_view(record.jpeg, look.px, pixels_HWC)
    return pixels_HWC


def _kept(store: FeatureReader, record: FeatureRecord, tokens_TC: NDArray[np.float16]) -> NDArray[np.float16]:
    """Of all tokens of a view, those that the store keeps."""
    positions_1S = store.positions(np.array([store.record_number(record.key, record.view_index)]))
    return tokens_TC if positions_1S is None else tokens_TC[positions_1S[0]]


def _lossy(encoding: Encoding) -> float:
    return 0.0 if encoding.is_exact else _ENCODING_LIMIT


class _Worst:
    """Errors, as they are met."""

    def __init__(self) -> None:
        self.num_records = self.num_values = 0
        self.largest = self.total = 0.0
        self.relative, self.name = -1.0, "none"

    def add(self, record: FeatureRecord, expected_TC: NDArray[np.float16]) -> None:
        found_TC, wanted_TC = record.tokens_TC.astype(np.float64), expected_TC.astype(np.float64)
        error_TC = np.abs(found_TC - wanted_TC)
        error_TC[np.isnan(error_TC)] = math.inf  # NaN would be below every limit
        # a token of nearly no length would have a large relative error whatever was stored
        lengths_T = np.maximum(np.linalg.norm(wanted_TC, axis=1), 0.1 * math.sqrt(wanted_TC.shape[1]))
        relative = float((np.linalg.norm(error_TC, axis=1) / lengths_T).max())
        self.num_records += 1
        self.num_values += error_TC.size
        self.total += float(error_TC.sum())
        self.largest = max(self.largest, float(error_TC.max()))
        if relative > self.relative:
            self.relative, self.name = relative, f"{record.key} view {record.view_index}"

    def audit(self, limit: float, num_unusable: int) -> Audit:
        mean = self.total / self.num_values if self.num_values else 0.0
        return Audit(
            self.num_records, self.largest, mean, max(0.0, self.relative), limit, self.name, num_unusable
        )  # fmt: skip
