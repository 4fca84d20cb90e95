"""Images a second from JPEG bytes to pixels, against bare `simplejpeg.decode_jpeg` of the same bytes.

    make bench

Original photographs are decoded, cropped as `RandomResizedCrop` does and resized with antialiasing; stored views are
only decoded. One core, CPU seconds, the best of several rounds in which all take turns. No torch tensor is made float.
Nothing here asserts a time; what is asserted is that all contenders give the same pixels, but for rounding.
"""

import io
import platform
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.io import decode_jpeg
from torchvision.transforms.v2 import functional as tvf

from storage.decode import decode_image
from storage.jpeg import decode_view, encode_view
from storage.views import RandomResizedCrop, Renderer, View
from tests.bench.timing import Contender, cpu_seconds, one_core, race

NUM_PHOTOGRAPHS, HEIGHT, WIDTH, VIEW_PX, ROUNDS = 64, 375, 500, 224, 12
NOISE = 7.5
"""Grey levels; makes the files as large as those of ImageNet's photographs of that size (95 kB)."""
LIBRARIES = ("simplejpeg", "cykooz-resizer", "pillow", "torchvision")


def photographs() -> list[bytes]:
    """500 x 375 JPEGs of quality 94: parts of a real photograph with a sensor's noise."""
    source = np.asarray(Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"))
    generator = np.random.default_rng(0)
    files = []
    for _ in range(NUM_PHOTOGRAPHS):
        top, left = (
            int(generator.integers(size - side + 1))
            for size, side in zip(source.shape[:2], (HEIGHT, WIDTH), strict=True)
        )
        part_HWC = source[top : top + HEIGHT, left : left + WIDTH]
        noisy_HWC = np.clip(part_HWC + generator.normal(0, NOISE, part_HWC.shape), 0, 255).astype(np.uint8)
        files.append(simplejpeg.encode_jpeg(noisy_HWC, quality=94, colorsubsampling="420"))
    return files


def views() -> list[View]:
    sampler = RandomResizedCrop(min_scale=0.08)
    return [sampler.view(f"{number}", 0, (HEIGHT, WIDTH)) for number in range(NUM_PHOTOGRAPHS)]


def render(data: bytes, view: View) -> NDArray[np.uint8]:
    return Renderer().render_view(decode_image(data), view, VIEW_PX)


def pillow_and_torchvision(data: bytes, view: View) -> torch.Tensor:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    cut = tvf.resized_crop(image, view.top, view.left, view.height, view.width, [VIEW_PX, VIEW_PX])
    return tvf.pil_to_tensor(tvf.horizontal_flip(cut) if view.flip else cut)


def torchvision_alone(data: bytes, view: View) -> torch.Tensor:
    image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    cut = tvf.resized_crop(image, view.top, view.left, view.height, view.width, [VIEW_PX, VIEW_PX], antialias=True)
    return tvf.horizontal_flip(cut) if view.flip else cut


def simplejpeg_and_pillow(data: bytes, view: View) -> NDArray[np.uint8]:
    image = simplejpeg.decode_jpeg(data)[view.top : view.top + view.height, view.left : view.left + view.width]
    pixels = np.asarray(Image.fromarray(image).resize((VIEW_PX, VIEW_PX), Image.Resampling.BILINEAR))
    return np.ascontiguousarray(pixels[:, ::-1]) if view.flip else pixels


def original_contenders() -> list[Contender]:
    work = list(zip(photographs(), views(), strict=True))

    def over_all(one: Callable[[bytes, View], object]) -> Callable[[], None]:
        def run() -> None:
            for data, view in work:
                one(data, view)

        return run

    return [
        Contender(
            "bare simplejpeg decode of originals", "limit", over_all(lambda data, _: simplejpeg.decode_jpeg(data))
        ),
        Contender("original decoded and cropped (antialiased)", "ours", over_all(render), target=0.7),
        Contender("  simplejpeg + Pillow", "peer", over_all(simplejpeg_and_pillow)),
        Contender("  Pillow + torchvision.transforms.v2", "peer", over_all(pillow_and_torchvision)),
        Contender("  torchvision.io + transforms.v2", "peer", over_all(torchvision_alone)),
    ]


def stored_contenders() -> list[Contender]:
    stored = [encode_view(render(data, view)) for data, view in zip(photographs(), views(), strict=True)]
    batch_BHWC = np.empty((len(stored), VIEW_PX, VIEW_PX, 3), np.uint8)

    def over_all(one: Callable[[bytes, NDArray[np.uint8]], object]) -> Callable[[], None]:
        def run() -> None:
            for number, data in enumerate(stored):
                one(data, batch_BHWC[number])

        return run

    return [
        Contender(
            "bare simplejpeg decode of stored views", "limit", over_all(lambda data, _: simplejpeg.decode_jpeg(data))
        ),
        Contender(
            "stored view decoded, into a batch", "ours",
            over_all(lambda data, out_HWC: decode_view(data, VIEW_PX, out_HWC)), target=0.9,
        ),
        Contender("  Pillow", "peer", over_all(lambda data, _: np.asarray(Image.open(io.BytesIO(data))))),
        Contender(
            "  torchvision.io", "peer",
            over_all(lambda data, _: decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))),
        ),
    ]  # fmt: skip


def check_pixels() -> None:
    """Assert that crops differ by rounding alone (two roundings: one an axis), and that stored views do not differ."""
    for data, view in list(zip(photographs(), views(), strict=True))[:16]:
        ours_HWC = render(data, view)
        for theirs_HWC in (
            pillow_and_torchvision(data, view).permute(1, 2, 0).numpy(),
            torchvision_alone(data, view).permute(1, 2, 0).numpy(),
            simplejpeg_and_pillow(data, view),
        ):
            assert theirs_HWC.shape == ours_HWC.shape
            assert np.abs(theirs_HWC.astype(int) - ours_HWC).max() <= 2
        stored, decoded_HWC = encode_view(ours_HWC), np.empty((VIEW_PX, VIEW_PX, 3), np.uint8)
        decode_view(stored, VIEW_PX, decoded_HWC)
        np.testing.assert_array_equal(decoded_HWC, np.asarray(Image.open(io.BytesIO(stored))))


def measure() -> list[dict[str, Any]]:
    """Rows with `what`, `role`, `images_per_second` (of CPU time), `ratio` to `limit_name`, `target` and each round's
    `seconds`, once all contenders are known to give the right pixels."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_pixels()
    rows = []
    for contenders in (original_contenders(), stored_contenders()):
        with one_core(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision.io is on its way out and says so at each call
            seconds = race(contenders, rounds=ROUNDS, clock=cpu_seconds)
        limit = contenders[0].name
        for contender in contenders:
            best = min(seconds[contender.name])
            rows.append(
                {
                    "what": contender.name, "role": contender.role, "images_per_second": NUM_PHOTOGRAPHS / best,
                    "ratio": min(seconds[limit]) / best, "limit_name": limit, "target": contender.target,
                    "seconds": seconds[contender.name],
                }
            )  # fmt: skip
    return rows


def test_pixels(capsys: pytest.CaptureFixture[str]) -> None:
    rows = measure()
    size_kb = np.mean([len(data) for data in photographs()]) / 1e3
    with capsys.disabled():
        print(
            f"\n{NUM_PHOTOGRAPHS} photographs of {WIDTH} x {HEIGHT}, {size_kb:.0f} kB; views of {VIEW_PX} px;", end=" "
        )
        print(f"best of {ROUNDS} rounds; {platform.machine()}, Python {platform.python_version()},", end=" ")
        print(", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES))
        for row in rows:
            print(f"  {row['what']:44} {row['images_per_second']:7,.0f} images/CPU-s   {row['ratio']:5.2f}")
