"""Images to the views that teachers look at: read and decoded once, rendered once a size, encoded once a quality."""

import errno
import random
import time
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from extract.jobs import ENDS_WORKERS
from extract.timing import Meter
from storage.errors import BadImageError, InputError
from storage.image_list import ImageList
from storage.jpeg import decode_view, encode_view
from storage.records import ImageKey, StorePlan
from storage.ring import iter_filled
from storage.views import Renderer, View, load_sampler

_PAUSES_SECONDS = (0.2, 1.0, 5.0)
_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.ECONNRESET, errno.EHOSTDOWN,
            errno.ENETDOWN, errno.ENETUNREACH, errno.EREMOTEIO, errno.ENFILE, errno.EMFILE}  # fmt: skip
"""What a network's file system says in a bad moment. A file that is missing, or not ours to read, stays so."""


class Look(NamedTuple):
    """How a teacher looks at a view."""

    px: int
    """Side of its input."""
    quality: int | None
    """Of the JPEG whose decoded pixels it sees, where its store keeps the views."""

    @classmethod
    def of(cls, plan: StorePlan, px: int) -> "Look":
        """The look of the teacher whose tokens fill a store."""
        return cls(px, None if plan.stored_views is None else plan.stored_views.codec["quality"])


class Picture(NamedTuple):
    """A rendered view; `jpeg` is what the store keeps of it."""

    pixels_HWC: NDArray[np.uint8]
    jpeg: bytes | None


class RenderedView(NamedTuple):
    key: ImageKey
    view_index: int
    view: View
    pictures: dict[Look, Picture]


class UnusableImage(NamedTuple):
    key: ImageKey
    reason: str


class ViewRenderer:
    """Renders the views of a store's images, once for each look. Safe to use from several threads."""

    def __init__(
        self, plan: StorePlan, images: ImageList, looks: Iterable[Look], excluded: Collection[str] = (),
        meter: Meter | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            plan: only its views are asked for, in which stores that are filled together agree.
            excluded: keys of images that are not to be looked at, since they end the process that does.
            meter: is told how long reading and rendering take.
        """
        self.excluded, self.meter = frozenset(excluded), meter or Meter()
        self.images, self.views_per_image = images, plan.views_per_image
        self.sampler, self.renderer = load_sampler(plan.sampler), Renderer(kernel=plan.renderer["kernel"])
        self.looks = frozenset(looks)

    def render(self, position: int, num_views: int | None = None) -> list[RenderedView] | UnusableImage:
        """All views of one image, or the first few.

        Raises:
            InputError: the image changed since it was listed.
        """
        with self.meter.measure("decode"):
            return self._render(ImageKey(self.images.keys[position]), position, num_views)

    def _render(self, key: ImageKey, position: int, num_views: int | None) -> list[RenderedView] | UnusableImage:
        if key in self.excluded:
            return UnusableImage(key, ENDS_WORKERS)
        try:
            image_HWC = read_patiently(self.images, position)
        except BadImageError as error:
            return UnusableImage(key, str(error))
        image_hw = image_HWC.shape[0], image_HWC.shape[1]
        views = [self.sampler.view(key, number, image_hw) for number in range(num_views or self.views_per_image)]
        return [RenderedView(key, number, view, self._pictures(image_HWC, view)) for number, view in enumerate(views)]

    def _pictures(self, image_HWC: NDArray[np.uint8], view: View) -> dict[Look, Picture]:
        plain = {px: self.renderer.render_view(image_HWC, view, px) for px in {look.px for look in self.looks}}
        return {look: _picture(plain[look.px], look) for look in self.looks}

    def iter_rendered(
        self, positions: range, *, threads: int, ahead: int
    ) -> Iterator[list[RenderedView] | UnusableImage]:
        """`render` of consecutive images, in order. Threads work on up to `ahead` images that nobody has asked for yet,
        so memory is bounded; close the iterator to end them."""
        return iter_filled(
            lambda position, _: self.render(position), lambda: None, positions.start, positions.stop, threads=threads,
            depth=ahead + 1,
        )  # fmt: skip


def read_patiently(images: ImageList, position: int) -> NDArray[np.uint8]:
    """`ImageList.read_image`, again after a pause where a disk or a network had a bad moment.

    Raises what that does, after the last attempt.
    """
    for pause in _PAUSES_SECONDS:
        try:
            return images.read_image(position)
        except (BadImageError, InputError) as error:
            if not _may_pass(error):
                raise
        time.sleep(pause * random.uniform(0.5, 1.5))
    return images.read_image(position)


def _may_pass(error: BaseException) -> bool:
    """Whether a bad moment is behind an error, however often it was told on: an image, its tar, the tar's disk."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _PASSING:
            return True
        cause = cause.__cause__
    return False


def _picture(pixels_HWC: NDArray[np.uint8], look: Look) -> Picture:
    if look.quality is None:
        return Picture(pixels_HWC, None)
    # the teacher looks at the pixels that students will decode
    jpeg = encode_view(pixels_HWC, look.quality)
    decoded_HWC = np.empty_like(pixels_HWC, order="C")
    decode_view(jpeg, look.px, decoded_HWC)
    return Picture(decoded_HWC, jpeg)
