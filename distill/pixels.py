"""What the student sees of each record: the view that the teacher saw, from the store or rendered from its image."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from distill.prefetch import ImageCache
from storage.errors import BadImageError, DamagedError, InputError
from storage.files import REMEDY
from storage.image_list import ImageList
from storage.jpeg import decode_view
from storage.store import FeatureReader
from storage.views import Renderer


class Pixels(Protocol):
    """Where pixels come from. Safe to use from several threads."""

    def fill(self, records_B: NDArray[np.int64], out_BHWC: NDArray[np.uint8]) -> None:
        """Put the views of records into the caller's memory."""


def open_pixels(reader: FeatureReader, location: str, side_px: int, cache_bytes: int) -> Pixels:
    """The cheapest source of views of `side_px`: those that the store keeps, if they have that size, else the images.

    Args:
        location: where the images of the store lie on this machine; not looked at when the store keeps the views.
        cache_bytes: memory for decoded images.
    """
    stored = reader.plan.stored_views
    if stored is not None and stored.px == side_px:
        return StoredPixels(reader)
    images = reader.images.at(location)
    images.source.list_images()  # tars: the scan, once, before threads start
    return RenderedPixels(reader, images, cache_bytes)


class StoredPixels:
    """Views that were rendered before the teacher saw them."""

    def __init__(self, reader: FeatureReader) -> None:
        self.reader = reader

    def fill(self, records_B: NDArray[np.int64], out_BHWC: NDArray[np.uint8]) -> None:
        """Raises DamagedError: a view is not what was committed, or no picture."""
        for record, jpeg, out_HWC in zip(records_B, self.reader.read_jpegs(records_B), out_BHWC, strict=True):
            try:
                decode_view(jpeg, len(out_HWC), out_HWC)
            except BadImageError as error:
                raise DamagedError(
                    f"the view of record {record} of {self.reader.location} is {error}; {REMEDY}"
                ) from error


class RenderedPixels:
    """Views cut from the original images."""

    def __init__(self, reader: FeatureReader, images: ImageList, cache_bytes: int) -> None:
        self.reader, self.keys = reader, images.keys
        self.images = ImageCache(images, cache_bytes)
        self.renderer = Renderer(kernel=reader.plan.renderer["kernel"])

    def fill(self, records_B: NDArray[np.int64], out_BHWC: NDArray[np.uint8]) -> None:
        """Raises InputError: an image that the teacher saw is gone or has changed."""
        positions_B = (records_B // self.reader.plan.views_per_image).tolist()
        for position, view, out_HWC in zip(positions_B, self.reader.views(records_B), out_BHWC, strict=True):
            try:
                image = self.images.read(position)
            except BadImageError as error:
                raise InputError(
                    f"image {self.keys[position]!r} was readable when its features were extracted and is not now "
                    f"({error}); bring it back, or extract again"
                ) from error
            out_HWC[:] = self.renderer.render_view(image, view, len(out_HWC))
