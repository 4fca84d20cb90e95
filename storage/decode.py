"""How image bytes become pixels. The bytes are untrusted: sizes are checked before memory is taken."""

import contextlib
import io
import warnings
from collections.abc import Iterator

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from storage.errors import BadImageError

DECODERS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What is decoded, whatever a file is called. Pillow knows rarely tested kinds, and one that starts a program (EPS)."""
MAX_IMAGE_PIXELS = 120_000_000
"""Larger images are refused from their header: a 12 kB file can claim gigabytes."""

_JPEG_START = b"\xff\xd8\xff"
_PLAIN_JPEG = {"YCbCr": "RGB", "RGB": "RGB", "Gray": "GRAY"}
"""The colours of a JPEG that is decoded without Pillow, and what they become. CMYK has a convention of its own."""
_JPEG_DAMAGE = ("remature end of", "bad Huffman code", "found marker")
"""In the decoder's warnings: parts of the picture are missing, and it would fill them with grey."""

warnings.filterwarnings("ignore", module=r"PIL\.")  # about odd files; catch_warnings is not safe with threads


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """Encoded bytes to pixels: alpha is dropped, CMYK is converted, 16-bit grey keeps its high byte, animations give
    their first frame, and the EXIF orientation is ignored (as in torchvision's ImageFolder and timm).

    JPEGs are decoded by libjpeg-turbo directly, faster than by Pillow and to the same pixels; all other kinds, and the
    rare JPEGs that only Pillow takes, by Pillow. The peak of memory is once the pixels for a JPEG, twice for a
    progressive one, 3.4 times for a PNG, 6 times for 16-bit grey.

    Returns:
        (H, W, 3) RGB; (H, W) for a grey picture, which is cut and resized at a third of the cost. `render_view` makes
        RGB of both, with the same pixels as if it had been RGB from the start.

    Raises:
        BadImageError: not an image, truncated, or larger than `MAX_IMAGE_PIXELS`.
    """
    pixels = _decode_plain_jpeg(data) if data[:3] == _JPEG_START else None
    return _decode_with_pillow(data) if pixels is None else pixels


def read_size(data: bytes) -> tuple[int, int]:
    """Height and width of the pixels that `decode_image` would give, by the header alone.

    Raises:
        BadImageError: not an image, or too large. What comes behind the header is not looked at.
    """
    if data[:3] == _JPEG_START:
        with contextlib.suppress(ValueError):  # Pillow decides
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            _check_size(int(height), int(width))
            return int(height), int(width)
    with _pillows_errors():
        image = _open_with_pillow(data)
        return image.height, image.width


def _decode_plain_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """Pixels, or None for Pillow to decide."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(int(height), int(width))
        if colours not in _PLAIN_JPEG:
            return None
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, _PLAIN_JPEG[colours])
    except ValueError as error:
        if any(sign in str(error) for sign in _JPEG_DAMAGE):
            raise BadImageError(f"truncated or damaged: {error}") from error
        return None
    return pixels[..., 0] if colours == "Gray" else pixels


def _decode_with_pillow(data: bytes) -> NDArray[np.uint8]:
    with _pillows_errors():
        image = _open_with_pillow(data)
        if image.mode.startswith("I"):
            return _high_byte(np.array(image))
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")  # and what it was is free
        return np.asarray(image)


def _open_with_pillow(data: bytes) -> Image.Image:
    """An image of which the header alone was read."""
    image: Image.Image = Image.open(io.BytesIO(data), formats=DECODERS)
    _check_size(image.height, image.width)
    return image


@contextlib.contextmanager
def _pillows_errors() -> Iterator[None]:
    """Whatever Pillow raises becomes one error."""
    try:
        yield
    except BadImageError:
        raise
    except Image.DecompressionBombError as error:
        raise BadImageError(str(error)) from error
    except UnidentifiedImageError as error:  # its own text holds a memory address: not the same in two runs
        raise BadImageError("not an image of a known kind") from error
    except Exception as error:  # Pillow's plugins raise almost anything on damaged files
        raise BadImageError(
            f"cannot be decoded: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def _check_size(height: int, width: int) -> None:
    if width * height > MAX_IMAGE_PIXELS:
        raise BadImageError(f"{width} x {height} pixels, more than the limit of {MAX_IMAGE_PIXELS:,}")


def _high_byte(grey_HW: NDArray[np.integer]) -> NDArray[np.uint8]:
    """16-bit grey, in integers of any width. In place: such a picture is large already."""
    np.right_shift(grey_HW, 8, out=grey_HW)
    return np.clip(grey_HW, 0, 255, out=grey_HW).astype(np.uint8)
