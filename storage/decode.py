"""How image bytes become pixels. The bytes are untrusted: sizes are checked before memory is taken."""

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from storage.errors import BadImageError

DECODERS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What is decoded, whatever a file is called. Pillow knows rarely tested kinds, and one that starts a program (EPS)."""
MAX_IMAGE_PIXELS = 120_000_000
"""Larger images are refused from their header: a 12 kB file can claim gigabytes."""

warnings.filterwarnings("ignore", module=r"PIL\.")  # about odd files; catch_warnings is not safe with threads


def decode_image(data: bytes) -> Image.Image:
    """Encoded bytes to a picture: alpha is dropped, CMYK is converted, 16-bit grey keeps its high byte, animations give
    their first frame, and the EXIF orientation is ignored (as in torchvision's ImageFolder and timm).

    Returns:
        Mode RGB; mode L for a grey picture, which is cut and resized at a third of the cost. `render_view` makes RGB of
        both, with the same pixels as if it had been RGB from the start.

    Raises:
        BadImageError: not an image, truncated, or larger than `MAX_IMAGE_PIXELS`.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=DECODERS)
        width, height = image.size
        if width * height > MAX_IMAGE_PIXELS:
            raise BadImageError(f"{width} x {height} pixels, more than the limit of {MAX_IMAGE_PIXELS:,}")
        if image.mode.startswith("I"):
            grey = np.asarray(image).astype(np.uint32)
            image = Image.fromarray((grey >> 8).clip(0, 255).astype(np.uint8))
        return image.convert("L" if image.mode in ("1", "L") else "RGB")
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
