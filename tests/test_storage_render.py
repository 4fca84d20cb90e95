"""Rendering a view is cut, antialiased resize, flip: torchvision's pixels, up to a grey level here and there."""

import os
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import simplejpeg
from cykooz_resizer import CpuExtensions, Resizer
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf

from storage.decode import decode_image
from storage.resize import resize
from storage.views import RandomResizedCrop, Renderer, View
from tests.fixtures.memory import PEAK_KB

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ("bilinear", "bicubic")
SIDE = st.one_of(st.integers(1, 12), st.integers(1, 700))


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def whole(image: NDArray[np.uint8], *, flip: bool = False) -> View:
    return View(top=0, left=0, height=image.shape[0], width=image.shape[1], flip=flip)


def torchvisions(image: NDArray[np.uint8], view: View, kernel: str, out_px: int) -> NDArray[np.uint8]:
    box = (view.top, view.left, view.height, view.width)
    theirs = tvf.resized_crop(Image.fromarray(image), *box, [out_px, out_px], InterpolationMode(kernel))
    return np.asarray(tvf.hflip(theirs) if view.flip else theirs)


def gaps(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> NDArray[np.int64]:
    return np.abs(ours.astype(np.int64) - theirs)


BOXES = [(0, 0, 60, 80), (7, 11, 40, 53), (20, 3, 1, 1), (59, 0, 1, 80), (0, 70, 60, 3), (10, 30, 32, 32)]


@pytest.mark.parametrize("out_px", [8, 32, 100])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("box", BOXES)
def test_rendering_is_torchvisions_resized_crop(box: tuple[int, int, int, int], kernel: Any, out_px: int) -> None:
    image, (top, left, height, width) = noise(60, 80), box
    for flip in (False, True):
        view = View(top=top, left=left, height=height, width=width, flip=flip)
        found = Renderer(kernel=kernel).render_view(image, view, out_px)
        assert found.shape == (out_px, out_px, 3) and found.dtype == np.uint8 and found.flags.c_contiguous
        assert gaps(found, torchvisions(image, view, kernel, out_px)).max() <= 2


@pytest.mark.parametrize("kernel", KERNELS)
def test_photographs_differ_by_one_level_in_few_of_their_values(kernel: Any) -> None:
    """With the other order of the two axes 20 % would, and by up to 11 levels where bicubic clips."""
    found = []
    image = np.asarray(Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"))
    for number in range(30):
        view = RandomResizedCrop(min_scale=0.08).view("portrait", number, image.shape[:2])
        pixels = Renderer(kernel=kernel).render_view(image, view, 224)
        found.append(gaps(pixels, torchvisions(image, view, kernel, 224)))
    assert np.max(found) <= 2
    assert np.mean(np.array(found) > 0) < 0.005
    assert np.mean(np.array(found) > 1) < 1e-5


@settings(max_examples=150)
@given(
    image_hw=st.tuples(SIDE, SIDE), out_px=st.integers(1, 300), kernel=st.sampled_from(KERNELS), seed=st.integers(0, 99)
)
def test_any_size_to_any_size(image_hw: tuple[int, int], out_px: int, kernel: Any, seed: int) -> None:
    image = noise(*image_hw, seed)
    found = Renderer(kernel=kernel).render_view(image, whole(image), out_px)
    assert gaps(found, torchvisions(image, whole(image), kernel, out_px)).max() <= 2


def slowly_resized(pixels: NDArray[np.uint8], out_px: int) -> NDArray[np.float64]:
    """The definition of antialiased bilinear: a triangle as wide as the reduction, over each axis in turn."""
    result = pixels.astype(np.float64)
    for axis in (1, 0):
        size = result.shape[axis]
        step = size / out_px
        centres = (np.arange(out_px)[:, None] + 0.5) * step
        weights = np.clip(1 - np.abs(np.arange(size) + 0.5 - centres) / max(step, 1), 0, None)
        weights /= weights.sum(1, keepdims=True)
        result = np.moveaxis(np.tensordot(weights, result, (1, axis)), 0, axis)
    return result


@pytest.mark.parametrize("out_px", [8, 31, 100])
@pytest.mark.parametrize("box", BOXES)
def test_rendering_is_an_antialiased_average(box: tuple[int, int, int, int], out_px: int) -> None:
    image, (top, left, height, width) = noise(60, 80), box
    found = Renderer().render_view(image, View(top=top, left=left, height=height, width=width), out_px)
    slow = slowly_resized(image[top : top + height, left : left + width], out_px)
    assert np.abs(found - slow).max() < 1.51  # rounded to a byte twice: after the rows and after the columns


@pytest.mark.parametrize("image_hw", [(1, 1), (1, 5000), (20_000, 3), (700, 300)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_plain_colour_stays_what_it_is(image_hw: tuple[int, int], kernel: Any) -> None:
    for level in (0, 1, 127, 254, 255):
        image = np.full((*image_hw, 3), level, np.uint8)
        assert (Renderer(kernel=kernel).render_view(image, whole(image), 96) == level).all()


def test_a_box_of_the_output_size_is_a_plain_cut() -> None:
    image = noise(60, 80)
    cut = image[5:37, 9:41]
    for flip, expected in ((False, cut), (True, cut[:, ::-1])):
        view = View(top=5, left=9, height=32, width=32, flip=flip)
        np.testing.assert_array_equal(Renderer().render_view(image, view, 32), expected)


def test_nothing_outside_the_box_shows() -> None:
    inside, view = noise(60, 80), View(top=10, left=20, height=30, width=40)
    around = np.full_like(inside, 255)
    around[10:40, 20:60] = inside[10:40, 20:60]
    pair = [Renderer(kernel="bicubic").render_view(pixels, view, 64) for pixels in (inside, around)]
    np.testing.assert_array_equal(*pair)


@pytest.mark.parametrize("box", [(0, 0, 61, 80), (0, 1, 60, 80), (-1, 0, 10, 10), (0, -3, 10, 10), (5, 5, 0, 9)])
def test_a_view_of_another_image_is_refused(box: tuple[int, int, int, int]) -> None:
    """A slice would quietly give less than was asked for."""
    top, left, height, width = box
    with pytest.raises(ValueError, match="does not lie inside an image of 60 x 80 pixels"):
        Renderer().render_view(noise(60, 80), View(top=top, left=left, height=height, width=width), 32)


@pytest.mark.parametrize("kernel", KERNELS)
def test_grey_pictures_render_as_if_they_were_rgb(kernel: Any) -> None:
    grey_HW, renderer = noise(61, 47)[..., 0], Renderer(kernel=kernel)
    for number in range(20):
        view = RandomResizedCrop().view("grey", number, (61, 47))
        for out_px in (16, 32, 90):
            expected = renderer.render_view(np.repeat(grey_HW[..., None], 3, 2), view, out_px)
            np.testing.assert_array_equal(renderer.render_view(grey_HW, view, out_px), expected)


# The library behind it


def test_the_renderer_tells_what_decides_the_pixels() -> None:
    version = metadata.version("cykooz-resizer")
    expected = {"kernel": "bicubic", "library": "cykooz-resizer", "version": version}
    assert Renderer(kernel="bicubic").describe() == expected


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_processor_gives_the_same_bytes(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library has a way of its own for each generation of instructions; a store may be filled by several."""
    image = noise(181, 243)
    best = {out_px: resize(image, out_px, kernel) for out_px in (64, 300)}
    tried = set()
    for extensions in (CpuExtensions.none, CpuExtensions.sse4_1, CpuExtensions.avx2):

        def limited(extensions: CpuExtensions = extensions) -> Resizer:
            resizer = Resizer()
            resizer.cpu_extensions = extensions
            tried.add(resizer.cpu_extensions)
            return resizer

        monkeypatch.setattr("storage.resize.Resizer", limited)
        for out_px, expected in best.items():
            np.testing.assert_array_equal(resize(image, out_px, kernel), expected)
    assert len(tried) >= 2


def test_threads_do_not_disturb_each_other() -> None:
    images = [noise(300, 400, seed) for seed in range(4)]
    expected = [resize(image, 128, "bilinear") for image in images]
    wrong: list[int] = []

    def work(number: int) -> None:
        wrong.extend(number for _ in range(25) if (resize(images[number], 128, "bilinear") != expected[number]).any())

    workers = [threading.Thread(target=work, args=(number % 4,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_other_threads_go_on_while_one_decodes_or_resizes() -> None:
    """Both let go of the interpreter lock; at a thousand views a second they would hold it all the time."""
    image = np.resize(noise(500, 500), (4000, 4000, 3))
    data = simplejpeg.encode_jpeg(image)
    for work in (lambda: decode_image(data), lambda: resize(image, 6000, "bicubic")):
        worker, ticks = threading.Thread(target=work), 0
        worker.start()
        while worker.is_alive():
            time.sleep(0.001)
            ticks += 1
        assert ticks >= 8


HUGE = """
import pathlib, numpy as np
from storage.views import Renderer, View

view = View(top=1, left=1, height=9998, width=11998)
Renderer().render_view(np.zeros((40, 40, 3), np.uint8), View(top=0, left=0, height=40, width=40), 224)
image = np.ones((10_000, 12_000, 3), np.uint8)
before = peak_kb()
Renderer().render_view(image, view, 224)
taken = peak_kb() - before
print(taken, len(list(pathlib.Path("/proc/self/task").iterdir())))
"""


def test_the_largest_image_takes_two_copies_of_its_crop_and_no_threads() -> None:
    child = subprocess.run(
        [sys.executable, "-c", PEAK_KB + HUGE], cwd=ROOT, capture_output=True, text=True, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    taken_kb, threads = map(int, child.stdout.split())
    assert 1.9 * 360_000 < taken_kb < 2.1 * 360_000 and threads == 1
