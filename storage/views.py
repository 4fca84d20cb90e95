"""Views: which part of an image is looked at, and its pixels.

A view is a deterministic function of (seed, image key, view index), so any process draws the same one. It is stored
with the tokens that belong to it and never drawn again: a teacher's map must not be flipped or cropped afterwards.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, model_validator

from storage.resize import RESIZE_LIBRARY, Kernel, resize, resize_version
from storage.schema import Schema


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A crop box in integer source pixels, then an optional horizontal flip. It does not hold an output size, so that a
    teacher and a student of different input sizes see the same crop."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


class RandomResizedCrop(Schema):
    """Inception-style crop and flip, the paper's only augmentation in distillation.

    The distribution is that of `torchvision.transforms.RandomResizedCrop` followed by `RandomHorizontalFlip`.
    """

    kind: Literal["random_resized_crop"] = "random_resized_crop"
    min_scale: float = Field(default=0.67, gt=0, le=1)
    """Smallest share of the image's area; the paper's code uses 0.67 for 100 epochs and 0.08 for 300."""
    max_scale: float = Field(default=1.0, gt=0, le=1)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of width / height."""
    flip_probability: float = Field(default=0.5, ge=0, le=1)
    seed: int = 0

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        if self.min_scale > self.max_scale or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError("min_scale may not exceed max_scale; ratio is two positive numbers, the smaller one first")
        return self

    def view(self, key: str, view_index: int, image_hw: tuple[int, int]) -> View:
        """Draw view number `view_index` of image `key`."""
        generator = keyed_generator(self.seed, key, view_index)
        image_height, image_width = image_hw
        area = image_height * image_width
        log_ratio = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            target_area = area * generator.uniform(self.min_scale, self.max_scale)
            ratio = math.exp(generator.uniform(*log_ratio))
            width = round(math.sqrt(target_area * ratio))
            height = round(math.sqrt(target_area / ratio))
            if 0 < width <= image_width and 0 < height <= image_height:
                top = int(generator.integers(0, image_height - height + 1))
                left = int(generator.integers(0, image_width - width + 1))
                break
        else:
            width = min(image_width, max(1, round(image_height * self.ratio[1])))
            height = min(image_height, max(1, round(image_width / self.ratio[0])))
            top, left = (image_height - height) // 2, (image_width - width) // 2
        flip = bool(generator.random() < self.flip_probability)
        return View(top=top, left=left, height=height, width=width, flip=flip)


class CentreCrop(Schema):
    """The largest centred square, times `fraction`: the usual evaluation view (0.875 is resize 256, crop 224)."""

    kind: Literal["centre_crop"] = "centre_crop"
    fraction: float = Field(default=0.875, gt=0, le=1)

    def view(self, key: str, view_index: int, image_hw: tuple[int, int]) -> View:
        """The same view for every index."""
        side = max(1, round(min(image_hw) * self.fraction))
        return View(top=(image_hw[0] - side) // 2, left=(image_hw[1] - side) // 2, height=side, width=side)


ViewSampler = RandomResizedCrop | CentreCrop
_SAMPLER: TypeAdapter[ViewSampler] = TypeAdapter(Annotated[ViewSampler, Field(discriminator="kind")])


def load_sampler(values: dict[str, Any]) -> ViewSampler:
    """A sampler from its JSON, as a store's plan holds it."""
    return _SAMPLER.validate_python(values)


def keyed_generator(seed: int, key: str, number: int) -> np.random.Generator:
    """A counter-based generator that belongs to (seed, key, number) and to no process, worker or order of work."""
    words = hashlib.blake2b(f"{seed}\0{number}\0{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(words, "<u8")))


class Renderer(Schema):
    """How a view becomes pixels. Recorded in the store, so that a student that would see other pixels is warned."""

    kernel: Kernel = "bilinear"
    """Resize filter, antialiased; the paper's distillation uses bilinear."""

    def describe(self) -> dict[str, Any]:
        """What decides the pixels: the settings and the library that carries them out."""
        return {"kernel": self.kernel, "library": RESIZE_LIBRARY, "version": resize_version()}

    def render_view(self, image: NDArray[np.uint8], view: View, out_px: int) -> NDArray[np.uint8]:
        """Cut, resize and flip: the only place in the project that does so.

        Args:
            image: (H, W, 3) RGB or (H, W) grey, as `decode_image` gives it.
            out_px: side of the result in pixels.

        Returns:
            (out_px, out_px, 3) uint8, which may not be writable.

        Raises:
            ValueError: the view does not lie inside the image.
        """
        bottom, right = view.top + view.height, view.left + view.width
        if not (0 <= view.top < bottom <= image.shape[0] and 0 <= view.left < right <= image.shape[1]):
            raise ValueError(f"{view} does not lie inside an image of {image.shape[0]} x {image.shape[1]} pixels")
        # cut first, as torchvision does: a resize with a box would let pixels from outside in at its edges
        pixels = resize(image[view.top : bottom, view.left : right], out_px, self.kernel)
        if pixels.ndim == 2:  # grey
            pixels = np.repeat(pixels[..., None], 3, axis=2)
        return _mirrored(pixels) if view.flip else pixels


def _mirrored(pixels_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Left and right exchanged. One channel at a time: numpy copies triples of bytes five times more slowly."""
    mirrored_HWC = np.empty_like(pixels_HWC)
    for channel in range(3):
        mirrored_HWC[..., channel] = pixels_HWC[:, ::-1, channel]
    return mirrored_HWC
