"""Odd, damaged and hostile images: every kind gives RGB or one reason, and never much memory."""

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from storage.decode import MAX_IMAGE_PIXELS, decode_image
from storage.errors import BadImageError

ROOT = Path(__file__).resolve().parent.parent
HEIGHT, WIDTH = 24, 40


def pixels() -> NDArray[np.uint8]:
    """Blocks of 8 x 8, which JPEG keeps nearly exact."""
    small = np.random.default_rng(0).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3))
    return small.repeat(8, 0).repeat(8, 1).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(data: bytes) -> NDArray[np.uint8]:
    image = decode_image(data)
    assert image.mode in ("RGB", "L")
    return np.asarray(image.convert("RGB"))


RGB = Image.fromarray(pixels())


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "GIF", "WEBP"])
def test_lossless_kinds_are_exact(kind: str) -> None:
    data = encoded(RGB, kind, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(decoded(data), pixels())


def test_jpegs_grey_and_cmyk_ones_too() -> None:
    for image in (RGB, RGB.convert("CMYK")):
        assert np.abs(decoded(encoded(image, "JPEG", quality=95, subsampling=0)).astype(int) - pixels()).mean() < 3
    grey = decoded(encoded(RGB.convert("L"), "JPEG", quality=95))
    assert (grey[..., 0] == grey[..., 1]).all() and (grey[..., 0] == grey[..., 2]).all()
    assert np.abs(grey[..., 0].astype(int) - np.asarray(RGB.convert("L"))).mean() < 3


@pytest.mark.filterwarnings("ignore:Palette images")
def test_alpha_is_dropped() -> None:
    alpha = Image.fromarray(np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH)).astype(np.uint8))
    rgba = RGB.copy()
    rgba.putalpha(alpha)
    np.testing.assert_array_equal(decoded(encoded(rgba, "PNG")), pixels())
    palette = RGB.convert("P", palette=Image.Palette.ADAPTIVE, colors=256)
    data = encoded(palette, "PNG", transparency=bytes(range(256)))
    np.testing.assert_array_equal(decoded(data), np.asarray(palette.convert("RGB")))
    data = encoded(palette, "PNG", transparency=3)
    np.testing.assert_array_equal(decoded(data), np.asarray(palette.convert("RGB")))
    grey_alpha = Image.merge("LA", (RGB.convert("L"), alpha))
    np.testing.assert_array_equal(decoded(encoded(grey_alpha, "PNG"))[..., 1], np.asarray(RGB.convert("L")))


def test_one_bit_images_are_black_and_white() -> None:
    image = RGB.convert("1")
    np.testing.assert_array_equal(decoded(encoded(image, "PNG"))[..., 2], np.asarray(image) * 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_their_high_byte(kind: str) -> None:
    values = (np.arange(HEIGHT * WIDTH) * 68).astype(np.uint16).reshape(HEIGHT, WIDTH)
    found = decoded(encoded(Image.fromarray(values), kind))
    assert len(np.unique(found)) > 200  # a plain `convert` makes nearly all of it white
    np.testing.assert_array_equal(found, np.repeat((values >> 8)[..., None], 3, 2))


def test_animations_give_their_first_frame() -> None:
    other = Image.fromarray(255 - pixels())
    for kind in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(RGB, kind, save_all=True, append_images=[other], **options)
        np.testing.assert_array_equal(decoded(data), pixels())


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_the_name_and_the_orientation_do_not_matter() -> None:
    """Bytes decide the kind (a PNG may be called .JPEG); orientations are ignored, as torchvision and timm do."""
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decoded(encoded(RGB, "JPEG", exif=exif)).shape == (HEIGHT, WIDTH, 3)
    broken = encoded(RGB, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff\xff")
    assert decoded(broken).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("image_hw", [(1, 1), (1, 5000), (5000, 1)])
def test_thin_images_are_images(image_hw: tuple[int, int]) -> None:
    assert decoded(encoded(Image.new("RGB", image_hw[::-1], (1, 2, 3)), "PNG")).shape == (*image_hw, 3)


# What is refused

NOT_IMAGES = {
    "empty": (b"", "not an image of a known kind"),
    "page": (b"<!DOCTYPE html><html>404 not found</html>", "not an image of a known kind"),
    "text": (b"version https://git-lfs.github.com/spec/v1\n", "not an image of a known kind"),
    "program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not an image of a known kind"),
    "cut": (encoded(RGB, "JPEG")[:-40], "truncated"),
    "cut PNG": (encoded(RGB, "PNG")[:-30], "cannot be decoded"),
    "header only": (encoded(RGB, "PNG")[:40], "not an image of a known kind"),
}


@pytest.mark.parametrize("name", NOT_IMAGES)
def test_what_is_no_image_has_a_reason_that_is_the_same_every_time(name: str) -> None:
    data, expected = NOT_IMAGES[name]
    reasons = set()
    for _ in range(2):
        with pytest.raises(BadImageError, match=expected) as error:
            decode_image(bytes(bytearray(data)))
        reasons.add(str(error.value))
    assert len(reasons) == 1 and "0x" not in reasons.pop()


@pytest.mark.filterwarnings("ignore")
def test_damage_gives_an_image_or_a_short_reason() -> None:
    generator = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"):
        whole = encoded(RGB, kind)
        for _ in range(150):
            data = bytearray(whole)
            for offset in generator.integers(0, min(len(data), 120), 2):
                data[offset] = generator.integers(0, 256)
            try:
                assert decode_image(bytes(data)).mode in ("RGB", "L")
            except BadImageError as error:
                reason = str(error)
                assert "\n" not in reason and not re.search(r"0x[0-9a-f]{4}", reason) and len(reason) < 200, reason


BOMB = """
import io, resource, sys, warnings
from PIL import Image
from storage.decode import decode_image
from storage.errors import BadImageError

def refused(side):
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    assert len(file.getvalue()) < 40_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        decode_image(file.getvalue())
    except BadImageError as error:
        print(side, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)

refused(14_000)
refused(11_000)
file = io.BytesIO()
Image.new("P", (9, 9)).save(file, "PNG", transparency=bytes(9))
decode_image(file.getvalue())
warnings.warn("others still warn", stacklevel=1)
"""


def test_bombs_are_refused_from_their_header_and_pillows_warnings_are_not_shown() -> None:
    child = subprocess.run([sys.executable, "-c", BOMB], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = child.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["14000", "11000"]
    assert all(int(line.split()[1]) < 20_000 for line in lines), lines  # in kB; the pixels would be 363,000 and more
    assert f"limit of {MAX_IMAGE_PIXELS:,}" in lines[1]
    assert "others still warn" in child.stderr and child.stderr.count("Warning") == 1
