"""One shard: read, render, forward, whiten, commit. Runs in one process and knows nothing of Ray."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from extract.backends import Teacher, load_teacher
from extract.config import ExtractConfig
from extract.teachers import find_teacher
from extract.whiten import whiten
from storage.errors import BadImageError, ConfigError
from storage.image_index import ImageList, load_index
from storage.records import FeatureRecord, ImageKey, ShardEntry, StorePlan
from storage.views import Renderer, View, ViewSampler, load_sampler
from storage.writer import ShardWriter, load_plan


class _Rendered(NamedTuple):
    key: ImageKey
    view_index: int
    view: View
    pixels_HWC: NDArray[np.uint8]


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
    sampler, renderer = load_sampler(plan.sampler), Renderer(kernel=plan.renderer["kernel"])
    with ThreadPoolExecutor(1) as pool:
        shard_images = pool.map(
            lambda position: _render_image(images, position, sampler, renderer, plan.views_per_image, teacher.input_px),
            plan.images_of_shard(index),
        )
        views = itertools.chain.from_iterable(shard_images)
        for batch in _batches(views, writer, batch_size):
            raw_BTC = teacher(torch.from_numpy(np.stack([view.pixels_HWC for view in batch])))
            white = whiten(raw_BTC, [view.key for view in batch])
            tokens_BTC, mean_BT, std_BT = (part.cpu().numpy() for part in white)
            for number, view in enumerate(batch):
                writer.append(
                    FeatureRecord(
                        view.key, view.view_index, view.view, tokens_BTC[number], mean_BT[number], std_BT[number]
                    )
                )
    return writer.commit()


def _render_image(
    images: ImageList, position: int, sampler: ViewSampler, renderer: Renderer, views: int, out_px: int
) -> list[_Rendered | _Unusable]:
    key = ImageKey(images.keys[position])
    try:
        image = images.read_image(position)
    except BadImageError as error:
        return [_Unusable(key, str(error))]
    drawn = [sampler.view(key, number, (image.shape[0], image.shape[1])) for number in range(views)]
    return [
        _Rendered(key, number, view, renderer.render_view(image, view, out_px)) for number, view in enumerate(drawn)
    ]


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


class Worker:
    """A loaded teacher and an open store plan; `worker(index)` extracts shard `index`."""

    def __init__(self, cfg: ExtractConfig, data: Path, root: Path) -> None:
        torch.set_num_threads(cfg.run.threads)
        self.root, self.batch_size = root, cfg.run.batch_size
        self.plan = load_plan(root)
        self.images = load_index(data).split(cfg.split)
        self.teacher = load_teacher(
            find_teacher(cfg.teacher), weights=cfg.weights, input_px=cfg.input_px, device=cfg.run.device
        )
        if self.teacher.fingerprint != self.plan.teacher_fingerprint:
            raise ConfigError(
                f"this worker's weights of {cfg.teacher!r} are {self.teacher.fingerprint}, the store's are "
                f"{self.plan.teacher_fingerprint}; give every machine the same weights file"
            )

    def __call__(self, index: int) -> ShardEntry:
        return extract_shard(
            index, root=self.root, plan=self.plan, images=self.images, teacher=self.teacher, batch_size=self.batch_size
        )
