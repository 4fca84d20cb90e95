"""Odd and damaged images: every kind gives RGB or one reason."""

import re

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from storage.decode import decode_image
from storage.errors import BadImageError
from tests.fixtures.pictures import HEIGHT, RGB, WIDTH, encoded, pixels


def decoded(data: bytes) -> NDArray[np.uint8]:
    """As RGB, whether the picture is grey or not."""
    image = decode_image(data)
    assert is_picture(image)
    return np.repeat(image[..., None], 3, 2) if image.ndim == 2 else image


def is_picture(image: NDArray[np.uint8]) -> bool:
    return image.dtype == np.uint8 and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3))


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
    "cut": (encoded(RGB, "JPEG")[:-40], "truncated or damaged: Premature end of JPEG file"),
    "without its end": (encoded(RGB, "JPEG")[:-2], "truncated or damaged: Premature end of JPEG file"),
    "half of its header": (encoded(RGB, "JPEG")[:200], "cannot be decoded"),
    "a JPEG's first bytes": (encoded(RGB, "JPEG")[:3], "not an image of a known kind"),
    "cut CMYK": (encoded(RGB.convert("CMYK"), "JPEG")[:-40], "truncated"),
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
                assert is_picture(decode_image(bytes(data)))
            except BadImageError as error:
                reason = str(error)
                assert "\n" not in reason and not re.search(r"0x[0-9a-f]{4}", reason) and len(reason) < 200, reason
