"""A teacher in the training loop: what a store would hold, computed whenever it is asked for. The control for what a
store costs and saves.

Views, pixels, precision and whitening are those of an extraction with the same settings. Encodings, token subsets and
kept views are not imitated: tokens are whole and exact (float16, as the whitening gives them), and the teacher looks at
pixels that were never a JPEG, also where the settings say `layout=wds` or `keep_views`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from extract.backends import load_teacher
from extract.config import ExtractConfig
from extract.plan import fit_on, plan_before_fit, shared_whitening
from extract.render import read_patiently
from extract.resolve import resolve_teacher
from extract.sample import iter_sample
from extract.teacher import Teacher, choose_precision
from extract.whiten import Whitened, Whitener
from storage.decode import read_size
from storage.encodings import Fields
from storage.errors import BadImageError, InputError
from storage.image_list import ImageList
from storage.records import ImageKey, StoreManifest, StorePlan
from storage.shards import VIEW_FIELDS, view_to_row
from storage.store import FeatureReader
from storage.views import Renderer, View, load_sampler
from storage.whitening import NO_STATISTICS, Statistics


def open_live(settings: Mapping[str, Any], images: ImageList, device: torch.device) -> "OnlineTeacher":
    """Load a teacher that answers in every training step. What its whitening learns, it learns here.

    Args:
        settings: the JSON of an `ExtractConfig`.
        images: those that a store would be made from; all of them count as usable that could be read when they were
            listed.
        device: where the teacher works: this process's own, whatever `extract.run.device` says.

    Raises:
        ConfigError: settings, or a whitening to share, that do not fit.
        InputError: no weights, no images, or images that nothing can be learnt from.
    """
    cfg = ExtractConfig.checked(settings, "extract").stored_exactly()
    if not len(images):
        raise InputError(f"no image to train on in {images.location}; lower data.eval_fraction")
    teacher = load_teacher(
        resolve_teacher(cfg), weights=cfg.weights, device=device.type,
        precision=choose_precision(cfg.precision, device.type), is_compiled=cfg.run.compile,
        channels_last=cfg.run.channels_last,
    )  # fmt: skip
    plan = plan_before_fit(cfg, images, teacher)
    shared = None if cfg.whitening_from is None else shared_whitening(plan, cfg.whitening_from)
    fitted = shared or fit_on(plan, functools.partial(iter_sample, plan, images, teacher, cfg.fit_views))
    statistics = NO_STATISTICS if fitted is None else fitted.statistics
    if fitted is not None:
        plan = plan.model_copy(update={"whitening": fitted.whitening})
    whitener = Whitener(plan.whitening, statistics, teacher.device)
    whitener.of = f" of teacher {plan.features.teacher!r}"
    return OnlineTeacher(OnlineReader(plan, images, statistics, teacher.spec.input_px), teacher, whitener)


class OnlineTeacher:
    """A teacher, and the store that it would fill."""

    def __init__(self, reader: "OnlineReader", teacher: Teacher, whitener: Whitener) -> None:
        self.reader, self.teacher, self.whitener = reader, teacher, whitener

    def __call__(self, encoded: Mapping[str, Tensor]) -> Whitened:
        """Whitened tokens of `pixels` (B, px, px, 3) uint8, on the device, in the precision of the settings even where
        the student's is another.

        Raises:
            BadTokensError: the teacher gave values that are not finite, or too large.
        """
        pixels_BHWC = encoded["pixels"]
        rows = [f"number {row} of the batch" for row in range(len(pixels_BHWC))]
        with torch.no_grad(), torch.autocast(self.teacher.device.type, enabled=False):
            # the whitener's results are no inference tensors, which a loss could not keep for its backward pass
            return self.whitener(self.teacher(pixels_BHWC), rows)


class OnlineReader(FeatureReader):
    """What a store is asked for in training, without the store: plan, images and views, and in the place of tokens the
    pixels that the teacher looks at. Safe to use from several threads."""

    shares_pixels: bool
    """Whoever trains has the teacher's pixels anyway, since the student looks at the same: none are rendered here."""

    def __init__(self, plan: StorePlan, images: ImageList, statistics: Statistics, input_px: int) -> None:
        manifest = StoreManifest(
            plan=plan, metadata=(), receipts=("made online",) * plan.num_shards, num_records=plan.num_records,
            num_bytes=0,
        )  # fmt: skip
        super().__init__(f"{plan.features.teacher!r} at work on {images.location}", manifest)
        self.input_px, self.shares_pixels = input_px, False
        self._images, self._statistics = images, statistics
        self._sampler, self._renderer = load_sampler(plan.sampler), Renderer(kernel=plan.renderer["kernel"])
        self._heights_N, self._widths_N = np.zeros((2, plan.num_images), np.int32)
        """Of the images that were met, in pixels; 0 for others. Threads that meet the same one note the same."""

    def load_images(self) -> ImageList:
        return self._images

    def load_statistics(self) -> Statistics:
        return self._statistics

    def usable_images(self) -> NDArray[np.int64]:
        """Those that could be read when they were listed. One that cannot be decoded is an error in the step that meets
        it: a store would have a hole there, which nobody knows of yet."""
        return np.flatnonzero(self._images.digests.rows_N16.any(1))

    def new_batch(self, size: int, allocate: Callable[..., NDArray[Any]] = np.empty) -> Fields:
        """`pixels` (size, px, px, 3) uint8; nothing where they are shared."""
        shape = (size, self.input_px, self.input_px, 3)
        return {} if self.shares_pixels else {"pixels": allocate(shape, np.uint8)}

    def read_encoded(self, records_B: NDArray[np.int64], out: Mapping[str, NDArray[Any]]) -> None:
        """Render what the teacher looks at.

        Raises:
            InputError: an image cannot be used, or is another one than when it was listed.
            IndexError: there is no such record.
        """
        self.locate(records_B)
        if self.shares_pixels:
            return
        for record, out_HWC in zip(records_B.tolist(), out["pixels"], strict=True):
            position, view_index = divmod(record, self.plan.views_per_image)
            try:
                image_HWC = read_patiently(self._images, position)
            except BadImageError as error:
                raise self._unusable(position, error) from error
            self._heights_N[position], self._widths_N[position] = image_HWC.shape[:2]
            out_HWC[:] = self._renderer.render_view(image_HWC, self._view(position, view_index), self.input_px)

    def read_jpegs(self, records_B: NDArray[np.int64]) -> list[bytes]:
        raise InputError(f"{self.location} keeps no rendered views; render them from the images")

    def rows(self, name: str, records_B: NDArray[np.int64]) -> NDArray[Any]:
        """`views` (B, F) int32 alone: the teacher says the rest. Of an image that was not met before, the file is read
        for its size. Raises what `read_encoded` does."""
        if name != "views":
            raise AssertionError(f"{name} of {self.location}: known when the teacher has answered")
        self.locate(records_B)
        views = [self._view(*divmod(record, self.plan.views_per_image)) for record in records_B.tolist()]
        return np.array([view_to_row(view) for view in views], np.int32).reshape(-1, len(VIEW_FIELDS))

    def _view(self, position: int, view_index: int) -> View:
        if not self._widths_N[position]:
            try:
                size_hw = read_size(self._images.source.read_bytes(self._images.keys[position]))
            except BadImageError as error:
                raise self._unusable(position, error) from error
            # the height first: another thread takes the width for a sign that both are there
            self._heights_N[position], self._widths_N[position] = size_hw
        image_hw = int(self._heights_N[position]), int(self._widths_N[position])
        return self._sampler.view(ImageKey(self._images.keys[position]), view_index, image_hw)

    def _unusable(self, position: int, error: BadImageError) -> InputError:
        key = self._images.keys[position]
        return InputError(
            f"image {key!r} of {self._images.location} cannot be used ({error}), and an online run has no store in "
            f"which it could be a hole; mend or remove it, or leave it out: --set 'data.skip=[\"{key}\"]'"
        )
