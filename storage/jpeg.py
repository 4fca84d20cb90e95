"""Rendered views as JPEG: kept beside their tokens, they are several times cheaper to read than the original image.

A view is encoded before the teacher sees it, so the teacher and every student look at the same decoded pixels.
"""

from typing import Any, Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from pydantic import Field

from storage.errors import BadImageError
from storage.schema import Schema

_SUBSAMPLING = "420"
_BLOCK_PX = 16
"""Side of a block whose colours are halved both ways; libjpeg-turbo fills the picture up to whole blocks."""


class ViewCodec(Schema):
    """How views are stored."""

    kind: Literal["jpeg"] = "jpeg"
    px: int = Field(ge=1, le=4096)
    """Side of a view in pixels."""
    quality: int = Field(default=95, ge=1, le=100)

    def describe(self) -> dict[str, Any]:
        """What decides the pixels that the teacher sees: the settings and the library that carries them out."""
        return {
            **self.to_json(),
            "subsampling": _SUBSAMPLING,
            "library": "simplejpeg",
            "version": simplejpeg.__version__,
        }


def encode_view(pixels_HWC: NDArray[np.uint8], quality: int = 95) -> bytes:
    """A square RGB view as JPEG with halved colours (4:2:0).

    Raises:
        ValueError: `pixels_HWC` is not a square of RGB bytes.
    """
    px = pixels_HWC.shape[0]
    if pixels_HWC.shape != (px, px, 3) or pixels_HWC.dtype != np.uint8:
        raise ValueError(f"a view is (px, px, 3) uint8, found {pixels_HWC.shape} {pixels_HWC.dtype}")
    contiguous = np.ascontiguousarray(pixels_HWC)
    data: bytes = simplejpeg.encode_jpeg(contiguous, quality=quality, colorsubsampling=_SUBSAMPLING)
    return data


def decode_view(data: bytes | memoryview, px: int, out_HWC: NDArray[np.uint8]) -> None:
    """Decode a stored view straight into the caller's memory. `out_HWC` holds nothing of use when this raises.

    Raises:
        BadImageError: `data` is not a whole px x px colour JPEG.
        ValueError: `out_HWC` is not a contiguous (px, px, 3) uint8 array.
    """
    if out_HWC.shape != (px, px, 3) or out_HWC.dtype != np.uint8 or not out_HWC.flags.c_contiguous:
        raise ValueError(f"expected room for ({px}, {px}, 3) contiguous bytes, found {out_HWC.shape} {out_HWC.dtype}")
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)  # a microsecond
        if (height, width, colours) != (px, px, "YCbCr"):
            raise BadImageError(f"not a view of {px} x {px} YCbCr pixels but {height} x {width} {colours}")
        simplejpeg.decode_jpeg(data, "RGB", buffer=out_HWC)
    except ValueError as error:
        raise BadImageError(f"not a whole JPEG: {error}") from error


def max_view_bytes(px: int) -> int:
    """No stored view of `px` x `px` pixels is larger, whatever it shows and at any quality. It is libjpeg-turbo's own
    bound: 3 bytes a pixel of all whole blocks, and 2,048 for the header. Real views need a sixth of that."""
    whole_px = -(-px // _BLOCK_PX) * _BLOCK_PX
    return 3 * whole_px * whole_px + 2048
