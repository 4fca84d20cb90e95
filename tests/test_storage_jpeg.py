"""Rendered views as JPEG: small, bounded, decoded in place, and refused when they are not what was stored."""

import io
import json
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from storage.errors import BadImageError
from storage.jpeg import ViewCodec, decode_view, encode_view, max_view_bytes


def smooth(px: int) -> NDArray[np.uint8]:
    rows, columns = np.mgrid[0:px, 0:px] / px
    return (np.stack([rows, columns, 1 - rows], axis=-1) * 255).astype(np.uint8)


def decoded(data: bytes, px: int) -> NDArray[np.uint8]:
    out_HWC = np.empty((px, px, 3), np.uint8)
    decode_view(data, px, out_HWC)
    return out_HWC


@pytest.mark.parametrize("px", [1, 15, 16, 17, 224])
@pytest.mark.parametrize("quality", [75, 95, 100])
def test_a_view_comes_back_nearly_as_it_was(px: int, quality: int) -> None:
    pixels = smooth(px)
    data = encode_view(pixels, quality)
    found = decoded(data, px)
    np.testing.assert_array_equal(found, np.asarray(Image.open(io.BytesIO(data))))
    assert np.abs(found.astype(int) - pixels).mean() < 4
    assert encode_view(pixels, quality) == data, "the same bytes every time"
    assert encode_view(pixels[:, ::-1][:, ::-1], quality) == data, "also from memory that is not contiguous"


def test_the_default_is_quality_95_with_halved_colours() -> None:
    pixels = smooth(64)
    assert encode_view(pixels) == encode_view(pixels, 95) != encode_view(pixels, 94)
    assert simplejpeg.decode_jpeg_header(encode_view(pixels)) == (64, 64, "YCbCr", "420")


def test_views_land_in_the_callers_batch_and_nowhere_else() -> None:
    batch_BHWC = np.full((3, 32, 32, 3), 7, np.uint8)
    decode_view(memoryview(encode_view(smooth(32))), 32, batch_BHWC[1])
    np.testing.assert_array_equal(batch_BHWC[1], decoded(encode_view(smooth(32)), 32))
    assert (batch_BHWC[[0, 2]] == 7).all()


def jpeg(image: NDArray[np.uint8], mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).convert(mode).save(file, "JPEG")
    return file.getvalue()


NOT_THE_VIEW = {
    "larger": (jpeg(smooth(33)), "not a view of 32 x 32 YCbCr pixels but 33 x 33 YCbCr"),
    "smaller": (jpeg(smooth(31)), "but 31 x 31"),
    "as many pixels": (jpeg(smooth(64)[:16]), "but 16 x 64"),
    "grey": (jpeg(smooth(32), "L"), "but 32 x 32 Gray"),
    "CMYK": (jpeg(smooth(32), "CMYK"), "but 32 x 32 CMYK"),
    "empty": (b"", "not a whole JPEG"),
    "zeros": (bytes(900), "not a whole JPEG"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(99), "not a whole JPEG"),
    "cut": (jpeg(smooth(32))[:-2], "not a whole JPEG: Premature end"),
    "half": (jpeg(smooth(32))[:700], "not a whole JPEG: Premature end"),
    "header": (jpeg(smooth(32))[:30], "not a whole JPEG"),
}


@pytest.mark.parametrize("name", NOT_THE_VIEW)
def test_other_bytes_are_refused_and_neighbours_stay_untouched(name: str) -> None:
    data, reason = NOT_THE_VIEW[name]
    batch_BHWC = np.full((3, 32, 32, 3), 7, np.uint8)
    with pytest.raises(BadImageError, match=reason):
        decode_view(data, 32, batch_BHWC[1])
    assert (batch_BHWC[[0, 2]] == 7).all()


@settings(max_examples=200)
@given(damage=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=9))
def test_damage_never_writes_outside_the_view(damage: list[tuple[int, int]]) -> None:
    """A flipped bit may give other pixels (records have checksums for that), never another place."""
    data = bytearray(encode_view(smooth(32)))
    for offset, value in damage:
        data[offset % len(data)] = value
    batch_BHWC = np.full((3, 32, 32, 3), 7, np.uint8)
    try:
        decode_view(bytes(data), 32, batch_BHWC[1])
    except BadImageError as error:
        assert len(str(error)) < 200
    assert (batch_BHWC[[0, 2]] == 7).all()


@pytest.mark.parametrize(
    "out_HWC",
    [
        np.empty((32, 31, 3), np.uint8),
        np.empty((32, 32), np.uint8),
        np.empty((32, 32, 3), np.int8),
        np.empty((32, 32, 6), np.uint8)[..., ::2],
    ],
    ids=["another size", "grey", "another type", "not contiguous"],
)
def test_room_of_another_shape_is_refused(out_HWC: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="expected room for"):
        decode_view(encode_view(smooth(32)), 32, out_HWC)


@pytest.mark.parametrize("pixels", [np.zeros((8, 9, 3), np.uint8), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3))])
def test_only_square_rgb_bytes_are_views(pixels: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match=r"a view is \(px, px, 3\) uint8, found"):
        encode_view(pixels)


@pytest.mark.parametrize("px", [1, 8, 16, 17, 96, 224, 225])
@pytest.mark.parametrize("quality", [95, 100])
def test_no_view_is_larger_than_the_bound(px: int, quality: int) -> None:
    generator = np.random.default_rng(px)
    noise = generator.integers(0, 256, (px, px, 3)).astype(np.uint8)
    black_and_white = (noise >> 7) * np.uint8(255)
    board = np.repeat(((np.indices((px, px)).sum(0) % 2) * 255).astype(np.uint8)[..., None], 3, axis=2)
    for worst in (noise, black_and_white, board, 255 - board):
        assert len(encode_view(worst, quality)) <= max_view_bytes(px)


def test_the_bound_is_known_and_not_wasteful() -> None:
    assert max_view_bytes(224) == 3 * 224 * 224 + 2048 == 152_576
    assert max_view_bytes(1) == 3 * 16 * 16 + 2048
    noise = np.random.default_rng(0).integers(0, 2, (224, 224, 3)).astype(np.uint8) * np.uint8(255)
    assert len(encode_view(noise, 100)) > 0.7 * max_view_bytes(224)


@given(px=st.integers(1, 4096), quality=st.integers(1, 100))
def test_the_codec_is_equal_to_its_json(px: int, quality: int) -> None:
    codec = ViewCodec(px=px, quality=quality)
    assert ViewCodec.model_validate(json.loads(json.dumps(codec.to_json()))) == codec
    assert codec.describe() == {
        "kind": "jpeg", "px": px, "quality": quality, "subsampling": "420", "library": "simplejpeg",
        "version": simplejpeg.__version__,
    }  # fmt: skip


@pytest.mark.parametrize(
    "values", [{}, {"px": 0}, {"px": 224, "quality": 0}, {"px": 224, "quality": 101}, {"px": 5000}]
)
def test_wrong_codecs_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        ViewCodec.model_validate(values)
