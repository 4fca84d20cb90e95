"""What the student sees of each record: the view that the teacher saw, from the store or rendered from its image."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from distill.prefetch import ImageCache
from storage.errors import BadImageError, DamagedError, InputError
from storage.files import REMEDY
from storage.image_list import ImageList
from storage.jpeg import ViewCodec, decode_view
from storage.store import FeatureReader
from storage.views import Renderer, View


class Pixels(Protocol):
    """Where pixels come from. Safe to use from several threads."""

    are_stored: bool
    """They come from the store, not from images."""
    warning: str
    """Why they may differ from those that the teacher saw; empty where they are the same."""

    def fill(self, records_B: NDArray[np.int64], out_BHWC: NDArray[np.uint8]) -> None:
        """Put the views of records into the caller's memory."""


def open_pixels(reader: FeatureReader, location: str, side_px: int, cache_bytes: int, *, cache_dir: str = "") -> Pixels:
    """The best source of views of `side_px`: those that the store keeps, if they have that size; else the images, if
    they are at hand; else the stored views resized.

    Args:
        location: where the images of the store lie on this machine; empty if they do not.
        cache_bytes: memory for decoded images.
        cache_dir: what is known of tars at `location`; without it they are scanned.

    Raises:
        InputError: there are neither images nor stored views.
    """
    stored = reader.plan.stored_views
    if stored is not None and (stored.px == side_px or not location):
        return StoredPixels(reader, side_px)
    if not location:
        raise InputError(f"{reader.location} keeps no rendered views; say where its images are (DATA=...)")
    images = reader.images.at(location, cache_dir)
    images.source.list_images()  # tars: the scan, once, before threads start
    return RenderedPixels(reader, images, cache_bytes)


class StoredPixels:
    """Views that were rendered before the teacher saw them."""

    are_stored = True

    def __init__(self, reader: FeatureReader, side_px: int) -> None:
        assert reader.plan.stored_views is not None
        self.reader, self.stored_px = reader, reader.plan.stored_views.px
        self.renderer = Renderer(kernel=reader.plan.renderer["kernel"])
        codec = reader.plan.stored_views.codec
        here = ViewCodec(px=self.stored_px, quality=codec["quality"]).describe()
        reasons = [
            "" if reader.plan.stored_views.seen_by_teacher else "the stored views were added when the teacher was done",
            "" if side_px == self.stored_px else f"stored views of {self.stored_px} px are resized to {side_px} px",
            _difference("the store's views were encoded", codec, here),
        ]
        self.warning = "; ".join(filter(None, reasons))

    def fill(self, records_B: NDArray[np.int64], out_BHWC: NDArray[np.uint8]) -> None:
        """Raises DamagedError: a view is not what was committed, or no picture."""
        for record, jpeg, out_HWC in zip(records_B, self.reader.read_jpegs(records_B), out_BHWC, strict=True):
            try:
                self._decode(jpeg, out_HWC)
            except BadImageError as error:
                raise DamagedError(
                    f"the view of record {record} of {self.reader.location} is {error}; {REMEDY}"
                ) from error

    def _decode(self, jpeg: bytes, out_HWC: NDArray[np.uint8]) -> None:
        if len(out_HWC) == self.stored_px:
            decode_view(jpeg, self.stored_px, out_HWC)
            return
        side = self.stored_px
        stored_HWC = np.empty((side, side, 3), np.uint8)
        decode_view(jpeg, side, stored_HWC)
        whole = View(top=0, left=0, height=side, width=side)  # it was cut and mirrored when it was stored
        out_HWC[:] = self.renderer.render_view(stored_HWC, whole, len(out_HWC))


class RenderedPixels:
    """Views cut from the original images."""

    are_stored = False

    def __init__(self, reader: FeatureReader, images: ImageList, cache_bytes: int) -> None:
        self.reader, self.keys = reader, images.keys
        self.images = ImageCache(images, cache_bytes)
        self.renderer = Renderer(kernel=reader.plan.renderer["kernel"])
        self.warning = _difference("the store's views were rendered", reader.plan.renderer, self.renderer.describe())
        if reader.plan.stored_views is not None and reader.plan.stored_views.seen_by_teacher:
            self.warning = "the teacher saw stored JPEGs of another size, these views come from the images"

    def fill(self, records_B: NDArray[np.int64], out_BHWC: NDArray[np.uint8]) -> None:
        """Raises InputError: an image that the teacher saw is gone or has changed."""
        positions_B = (records_B // self.reader.plan.views_per_image).tolist()
        for position, view, out_HWC in zip(positions_B, self.reader.views(records_B), out_BHWC, strict=True):
            try:
                image = self.images.read(position)
            except BadImageError as error:
                raise InputError(
                    f"image {self.keys[position]!r} was readable when its features were extracted and is not now "
                    f"({error}); bring it back, or give the command again: the changed data set gets a store of its own"
                ) from error
            out_HWC[:] = self.renderer.render_view(image, view, len(out_HWC))


def _difference(what: str, stored: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    if stored == here:
        return ""
    return f"{what} by {stored['library']} {stored['version']}, here it is {here['library']} {here['version']}"
