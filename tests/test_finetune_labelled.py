"""Labelled batches: every image once an epoch, the same ones for the same (seed, step), bad ones left out."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.config import TrainRunConfig
from distill.prefetch import ImageCache
from finetune.config import FinetuneConfig
from finetune.labelled import LabelledBatch, LabelledImages
from storage.image_index import ImageIndex, build_index
from storage.views import RandomResizedCrop, Renderer

Make = Callable[..., LabelledImages]


@pytest.fixture
def index(make_images: Callable[..., Path], tmp_path: Path) -> ImageIndex:
    """21 images of three classes, all of them for training."""
    root = make_images(classes=("a", "b", "c"), per_class=7)
    return build_index(str(root), eval_fraction=0.0, seed=0, cache_dir=tmp_path / "cache")


@pytest.fixture
def labelled(index: ImageIndex) -> Make:
    def make(*, seed: int = 0, **settings: object) -> LabelledImages:
        cfg = FinetuneConfig.model_validate({"epochs": 3, "batch_size": 6, "renderer": Renderer()} | settings)
        return LabelledImages(images=ImageCache(index.split("train"), 1 << 20), cfg=cfg, input_px=16, seed=seed)

    return make


def assert_same(first: list[LabelledBatch], second: list[LabelledBatch]) -> None:
    assert [batch.keys for batch in first] == [batch.keys for batch in second]
    for one, other in zip(first, second, strict=True):
        assert one.step == other.step
        assert torch.equal(one.images_BHWC, other.images_BHWC)
        assert torch.equal(one.labels_B, other.labels_B)


def test_batches_are_a_function_of_seed_and_step(labelled: Make) -> None:
    whole = list(labelled().train_batches(0))
    assert [batch.step for batch in whole] == list(range(21 * 3 // 6))
    assert_same(whole, list(labelled().train_batches(0)))
    assert_same(whole[4:], list(labelled().train_batches(4)))
    other_threads = labelled(run=TrainRunConfig(loaders=5, prefetch=1, image_cache_mb=0))
    assert_same(whole, list(other_threads.train_batches(0)))
    other_seed = list(labelled(seed=1).train_batches(0))
    assert [batch.keys for batch in other_seed] != [batch.keys for batch in whole]


def test_every_image_comes_once_an_epoch_in_a_new_order_and_crop(labelled: Make, index: ImageIndex) -> None:
    data = labelled(epochs=4, batch_size=7)
    batches = list(data.train_batches(0))
    keys = [key for batch in batches for key in batch.keys]
    epochs = [keys[start : start + 21] for start in range(0, len(keys), 21)]
    assert len(epochs) == 4
    assert all(Counter(epoch) == Counter(index.split("train").keys) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    crops = {key: [] for key in epochs[0]}
    for batch in batches:
        for key, pixels in zip(batch.keys, batch.images_BHWC, strict=True):
            crops[key].append(pixels.numpy().tobytes())
    assert sum(len(set(seen)) for seen in crops.values()) > 3.5 * 21, "each epoch draws another crop"


def test_labels_belong_to_their_images(labelled: Make, index: ImageIndex) -> None:
    for batch in labelled().train_batches(0):
        assert [index.classes[label] for label in batch.labels_B] == [key.split("/")[0] for key in batch.keys]


def test_pixels_are_those_of_the_drawn_view(labelled: Make, index: ImageIndex) -> None:
    """Epoch 0 of seed 0 is view 0 of the sampler, rendered by the one renderer; no other change."""
    sampler, renderer, images = (
        RandomResizedCrop(min_scale=0.2, seed=9),
        Renderer(kernel="bicubic"),
        index.split("train"),
    )
    batch = next(iter(labelled(sampler=sampler, renderer=renderer).train_batches(0)))
    for key, pixels in zip(batch.keys, batch.images_BHWC, strict=True):
        image = images.read_image(images.keys.index(key))
        view = sampler.view(key, 0, image.shape[:2])
        np.testing.assert_array_equal(pixels, renderer.render_view(image, view, 16))


def test_vertical_flip_turns_about_half_of_the_views_over(labelled: Make) -> None:
    plain, flipped = (
        [pixels for batch in labelled(epochs=8, vertical_flip=on).train_batches(0) for pixels in batch.images_BHWC]
        for on in (False, True)
    )
    is_turned = [torch.equal(a.flip(0), b) for a, b in zip(plain, flipped, strict=True)]
    is_same = [torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    assert all(turned != same for turned, same in zip(is_turned, is_same, strict=True))
    assert 0.3 < np.mean(is_turned) < 0.7


@pytest.mark.parametrize("batch_size", [1, 6, 7, 50])
def test_evaluation_sees_every_image_once_in_order(labelled: Make, index: ImageIndex, batch_size: int) -> None:
    data, images = labelled(batch_size=batch_size), index.split("train")
    batches = list(data.eval_batches())
    assert [key for batch in batches for key in batch.keys] == list(images.keys)
    assert [int(label) for batch in batches for label in batch.labels_B] == list(images.labels)
    first = images.read_image(0)
    view = data.cfg.eval_sampler.view(images.keys[0], 0, first.shape[:2])
    np.testing.assert_array_equal(batches[0].images_BHWC[0], Renderer().render_view(first, view, 16))
    assert_same(batches, list(labelled(batch_size=batch_size, vertical_flip=True, seed=5).eval_batches()))


def test_unusable_images_are_left_out(make_images: Callable[..., Path], tmp_path: Path) -> None:
    root = make_images(classes=("a", "b"), per_class=4)
    (root / "a" / "001.png").write_bytes(b"no picture")
    cut = root / "b" / "002.png"
    cut.write_bytes(cut.read_bytes()[:300])
    images = build_index(str(root), eval_fraction=0.0, seed=0, cache_dir=tmp_path / "cache").split("train")
    cfg = FinetuneConfig(epochs=2, batch_size=4)
    data = LabelledImages(images=ImageCache(images, 0), cfg=cfg, input_px=8, seed=0)
    usable = set(images.keys) - {"a/001.png", "b/002.png"}
    assert [len(batch.keys) for batch in data.eval_batches()] == [3, 3]
    assert {key for batch in data.eval_batches() for key in batch.keys} == usable
    train = list(data.train_batches(0))
    assert len(train) == data.steps == 4
    assert Counter(key for batch in train for key in batch.keys) == dict.fromkeys(usable, 2)
    assert all(len(batch.images_BHWC) == len(batch.labels_B) == len(batch.keys) for batch in train)


def test_a_batch_of_unusable_images_is_empty_and_has_a_shape(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "0.png").write_bytes(b"no picture")
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "1.png")
    location = str(tmp_path / "images")
    images = build_index(location, eval_fraction=0.0, seed=0, cache_dir=tmp_path / "cache").split("train")
    data = LabelledImages(images=ImageCache(images, 0), cfg=FinetuneConfig(batch_size=1), input_px=8, seed=0)
    shapes = [tuple(batch.images_BHWC.shape) for batch in data.eval_batches()]
    assert shapes == [(0, 8, 8, 3), (1, 8, 8, 3), (0, 8, 8, 3), (1, 8, 8, 3)]
