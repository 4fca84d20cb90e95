"""One shard: read, render, forward, whiten, commit. Runs in one process and knows nothing of Ray."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from extract.backends import load_teacher
from extract.batch_size import choose_batch_size
from extract.config import ExtractConfig
from extract.resolve import resolve_teacher
from extract.teacher import Teacher
from extract.whiten import whiten
from storage.errors import BadImageError, ConfigError, InputError
from storage.folder import load_plan
from storage.image_index import ImageList, load_index
from storage.jpeg import decode_view, encode_view
from storage.records import FeatureRecord, ImageKey, ShardEntry, StorePlan
from storage.views import Renderer, View, ViewSampler, load_sampler
from storage.writer import ShardWriter


class _Rendered(NamedTuple):
    key: ImageKey
    view_index: int
    view: View
    pixels_HWC: NDArray[np.uint8]
    jpeg: bytes | None


class _Unusable(NamedTuple):
    key: ImageKey
    reason: str


def extract_shard(
    index: int, *, root: Path, plan: StorePlan, images: ImageList, teacher: Teacher, batch_size: int
) -> ShardEntry:
    """Compute and commit one whole shard.

    Unusable images become holes and are listed in the receipt.

    Raises:
        InputError: an image changed since it was listed.
        DiskError: no room.
    """
    writer = ShardWriter(root, plan, images, index)
    renderer = ViewRenderer(plan, images, teacher.spec.input_px)
    with ThreadPoolExecutor(1) as pool:
        shard_images = pool.map(renderer.render, plan.images_of_shard(index))
        views = itertools.chain.from_iterable(shard_images)
        for batch in _batches(views, writer, batch_size):
            raw_BTC = teacher(torch.from_numpy(np.stack([view.pixels_HWC for view in batch])))
            white = whiten(raw_BTC, [view.key for view in batch])
            tokens_BTC, mean_BT, std_BT = (part.cpu().numpy() for part in white)
            for number, view in enumerate(batch):
                kept = _kept_tokens(plan, view)
                writer.append(
                    FeatureRecord(
                        view.key, view.view_index, view.view, tokens_BTC[number][kept], mean_BT[number][kept],
                        std_BT[number][kept], view.jpeg,
                    )
                )  # fmt: skip
    return writer.commit()


def _kept_tokens(plan: StorePlan, view: _Rendered) -> NDArray[np.int64] | slice:
    if plan.token_subset is None:
        return slice(None)
    return plan.token_subset.positions(view.key, view.view_index, plan.features.num_tokens)


class ViewRenderer:
    """Images to the views that the teacher looks at."""

    def __init__(self, plan: StorePlan, images: ImageList, out_px: int) -> None:
        self.plan, self.images, self.out_px = plan, images, out_px
        self.sampler: ViewSampler = load_sampler(plan.sampler)
        self.renderer = Renderer(kernel=plan.renderer["kernel"])

    def render(self, position: int) -> list[_Rendered | _Unusable]:
        """All views of one image."""
        key = ImageKey(self.images.keys[position])
        try:
            image_HWC = self.images.read_image(position)
        except BadImageError as error:
            return [_Unusable(key, str(error))]
        image_hw = image_HWC.shape[0], image_HWC.shape[1]
        drawn = [self.sampler.view(key, number, image_hw) for number in range(self.plan.views_per_image)]
        return [self._render_view(key, number, image_HWC, view) for number, view in enumerate(drawn)]

    def _render_view(self, key: ImageKey, number: int, image_HWC: NDArray[np.uint8], view: View) -> _Rendered:
        pixels_HWC = self.renderer.render_view(image_HWC, view, self.out_px)
        if self.plan.stored_views is None:
            return _Rendered(key, number, view, pixels_HWC, None)
        # the teacher looks at the pixels that students will decode
        jpeg = encode_view(pixels_HWC, self.plan.stored_views.codec["quality"])
        decoded_HWC = np.empty_like(pixels_HWC, order="C")
        decode_view(jpeg, self.out_px, decoded_HWC)
        return _Rendered(key, number, view, decoded_HWC, jpeg)


def _batches(views: Iterator[_Rendered | _Unusable], writer: ShardWriter, batch_size: int) -> Iterator[list[_Rendered]]:
    batch: list[_Rendered] = []
    for view in views:
        if isinstance(view, _Unusable):
            writer.mark_bad(view.key, view.reason)
            continue
        batch.append(view)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def sample_tokens(plan: StorePlan, images: ImageList, teacher: Teacher, num_views: int) -> NDArray[np.float16]:
    """Whitened tokens (R, T, C) of views of images that are spread evenly over the list, one view each.

    Raises:
        InputError: none of these images can be used.
    """
    renderer = ViewRenderer(plan, images, teacher.spec.input_px)
    positions = np.unique(np.linspace(0, len(images) - 1, min(num_views, len(images))).astype(np.int64))
    rendered = [view for position in positions.tolist() for view in renderer.render(position)[:1]]
    views = [view for view in rendered if isinstance(view, _Rendered)]
    if not views:
        raise InputError(
            f"none of {len(positions)} images of {images.location} can be decoded; is it the right folder?"
        )
    batch_size = choose_batch_size(teacher)
    batches = [views[first : first + batch_size] for first in range(0, len(views), batch_size)]
    tokens = [
        whiten(teacher(torch.from_numpy(np.stack([v.pixels_HWC for v in batch]))), [v.key for v in batch]).tokens_BTC
        for batch in batches
    ]
    sample: NDArray[np.float16] = torch.cat([part.cpu() for part in tokens]).numpy()
    return sample


class Worker:
    """A loaded teacher and an open store plan; `worker(index)` extracts shard `index`."""

    def __init__(self, cfg: ExtractConfig, data: Path, root: Path) -> None:
        torch.set_num_threads(cfg.run.threads)
        self.root = root
        self.plan = load_plan(root)
        self.images = load_index(data).split(cfg.split)
        self.teacher = load_teacher(
            resolve_teacher(cfg), weights=cfg.weights, device=cfg.run.device, precision=self.plan.teacher["precision"],
            is_compiled=cfg.run.compile, channels_last=cfg.run.channels_last,
        )  # fmt: skip
        if self.teacher.fingerprint != self.plan.teacher_fingerprint:
            raise ConfigError(
                f"this worker's weights of {cfg.teacher!r} are {self.teacher.fingerprint}, the store's are "
                f"{self.plan.teacher_fingerprint}; give every machine the same weights file"
            )
        self.batch_size = choose_batch_size(self.teacher, cfg.run.batch_size)

    def __call__(self, index: int) -> ShardEntry:
        return extract_shard(
            index, root=self.root, plan=self.plan, images=self.images, teacher=self.teacher, batch_size=self.batch_size
        )
