"""Odd, damaged and hostile images: every kind gives RGB or one reason, and never much memory."""

import io
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import simplejpeg
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
    """As RGB, whether the picture is grey or not."""
    image = decode_image(data)
    assert is_picture(image)
    return np.repeat(image[..., None], 3, 2) if image.ndim == 2 else image


def is_picture(image: NDArray[np.uint8]) -> bool:
    return image.dtype == np.uint8 and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3))


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


PEAK = """
def peak_kb():  # since this program began; `getrusage` gives that of the program that started it, if that was larger
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
"""
BOMB = """
import io, sys, warnings
from PIL import Image
from storage.decode import decode_image
from storage.errors import BadImageError

def refused(side):
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    assert len(file.getvalue()) < 40_000
    before = peak_kb()
    try:
        decode_image(file.getvalue())
    except BadImageError as error:
        print(side, peak_kb() - before, error)

refused(14_000)
refused(11_000)
file = io.BytesIO()
Image.new("P", (9, 9)).save(file, "PNG", transparency=bytes(9))
decode_image(file.getvalue())
warnings.warn("others still warn", stacklevel=1)
"""


def test_bombs_are_refused_from_their_header_and_pillows_warnings_are_not_shown() -> None:
    child = subprocess.run([sys.executable, "-c", PEAK + BOMB], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = child.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["14000", "11000"]
    assert all(int(line.split()[1]) < 20_000 for line in lines), lines  # in kB; the pixels would be 363,000 and more
    assert f"limit of {MAX_IMAGE_PIXELS:,}" in lines[1]
    assert "others still warn" in child.stderr and child.stderr.count("Warning") == 1


# JPEGs, which do not go through Pillow


def photograph(height: int, width: int) -> Image.Image:
    return Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").resize((width, height))


PLAIN_JPEGS: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "progressive 4:4:4": {"progressive": True, "subsampling": 0},
    "low quality": {"quality": 20},
    "restart markers": {"restart_marker_rows": 1},
    "RGB inside": {"keep_rgb": True},
}


@pytest.mark.parametrize("image_hw", [(375, 500), (333, 251), (17, 1), (1, 1)])
@pytest.mark.parametrize("kind", PLAIN_JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_have_pillows_pixels(mode: str, kind: str, image_hw: tuple[int, int]) -> None:
    data = encoded(photograph(*image_hw).convert(mode), "JPEG", **{"quality": 94, **PLAIN_JPEGS[kind]})
    expected = np.asarray(Image.open(io.BytesIO(data)))
    found = decode_image(data)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("subsampling", ["440", "411"])
def test_rare_ratios_of_colours_have_pillows_pixels_too(subsampling: str) -> None:
    data = simplejpeg.encode_jpeg(np.asarray(photograph(99, 101)).copy(), colorsubsampling=subsampling)
    np.testing.assert_array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data))))


def test_most_jpegs_never_meet_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", None)
    for image in (RGB, RGB.convert("L")):
        decode_image(encoded(image, "JPEG"))


def test_a_jpeg_that_only_pillow_takes_is_decoded_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stray bytes before a marker are common in old files and mean nothing."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG", restart_marker_rows=1)
    first = data.index(b"\xff\xd0")
    odd = data[:first] + b"\0" * 40 + data[first:]
    with pytest.raises(ValueError, match="extraneous bytes before marker"):
        simplejpeg.decode_jpeg(odd)
    np.testing.assert_array_equal(decode_image(odd), np.asarray(Image.open(io.BytesIO(odd))))


def test_a_jpeg_with_missing_parts_is_refused_although_pillow_would_fill_them_with_grey() -> None:
    data = encoded(photograph(96, 128), "JPEG")
    with pytest.raises(BadImageError, match=r"truncated or damaged: .*premature end of data segment"):
        decode_image(data[: len(data) // 2] + b"\xff\xd9")


@pytest.mark.parametrize("progressive", [False, True])
def test_no_cut_jpeg_is_taken_for_a_whole_one(progressive: bool) -> None:
    data = encoded(photograph(40, 56), "JPEG", progressive=progressive)
    for length in range(len(data)):
        with pytest.raises(BadImageError):
            decode_image(data[:length])


def test_bytes_after_the_end_do_not_matter() -> None:
    data = encoded(RGB, "JPEG")
    np.testing.assert_array_equal(decode_image(data + b"camera's own data" * 99), decode_image(data))


MEASURE = """
import io, sys
from PIL import Image
from storage.decode import decode_image

for kind in ("JPEG", "PNG"):
    small = io.BytesIO()
    Image.new("RGB", (8, 8)).save(small, kind)
    decode_image(small.getvalue())
data = sys.stdin.buffer.read()
before = peak_kb()
pixels = decode_image(data)
print((peak_kb() - before) * 1024 / pixels.nbytes)
"""
LARGE: dict[str, tuple[str, str, dict[str, Any], float]] = {
    "JPEG": ("RGB", "JPEG", {}, 1.1),
    "grey JPEG": ("L", "JPEG", {}, 1.1),
    "progressive JPEG": ("RGB", "JPEG", {"progressive": True}, 2.2),  # keeps two bytes a coefficient
    "PNG": ("RGB", "PNG", {"compress_level": 1}, 3.6),  # Pillow keeps four bytes a pixel, and copies twice
    "PNG with alpha": ("RGBA", "PNG", {"compress_level": 1}, 3.6),
    "palette": ("P", "PNG", {"compress_level": 1}, 3.6),
    "16-bit PNG": ("I;16", "PNG", {"compress_level": 1}, 6.3),
    "1-bit PNG": ("1", "PNG", {}, 3.3),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_image_takes_a_small_multiple_of_its_pixels(name: str) -> None:
    mode, kind, options, multiple = LARGE[name]
    data = encoded(Image.new(mode, (4000, 3000)), kind, **options)
    child = subprocess.run(
        [sys.executable, "-c", PEAK + MEASURE], cwd=ROOT, input=data, capture_output=True, check=True
    )
    assert float(child.stdout) < multiple


@pytest.mark.parametrize("change_px", [0, 1])
def test_the_limit_holds_for_jpegs_before_any_memory_is_taken(change_px: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.decode.MAX_IMAGE_PIXELS", HEIGHT * WIDTH - change_px)
    for image in (RGB, RGB.convert("L"), RGB.convert("CMYK")):
        if change_px:
            monkeypatch.setattr(simplejpeg, "decode_jpeg", None)
            with pytest.raises(BadImageError, match="40 x 24 pixels, more than the limit of 959"):
                decode_image(encoded(image, "JPEG"))
        else:
            decode_image(encoded(image, "JPEG"))


def test_a_small_jpeg_that_claims_a_gigabyte_is_refused_from_its_header() -> None:
    data = bytearray(encoded(RGB, "JPEG"))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = (20_000).to_bytes(2, "big") * 2
    tracemalloc.start()
    try:
        with pytest.raises(BadImageError, match="20000 x 20000 pixels, more than the limit"):
            decode_image(bytes(data))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
