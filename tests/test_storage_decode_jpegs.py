"""JPEGs do not go through Pillow, and have its pixels; one that is cut is never taken for a whole one."""

import io
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from storage.decode import decode_image
from storage.errors import BadImageError
from tests.fixtures.pictures import RGB, encoded, photograph

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
