"""Training without a store: the teacher runs in every step. For comparison; what is to be trained once is trained so
too.

This package knows no teacher. Whoever asks for an online run names a function that makes one; everything else is as
with a store, whose records are those of `LiveTeacher.reader`.
"""

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from distill.objective import Decoded
from storage.image_list import ImageList
from storage.schema import Schema
from storage.store import FeatureReader


class LiveReader(FeatureReader):
    """Has the plan, the images and the views of a store, and instead of tokens the pixels that the teacher looks at:
    `new_batch` and `read_encoded` know `pixels` (B, px, px, 3) uint8 alone."""

    input_px: int
    """Of the teacher."""
    shares_pixels: bool
    """Set where the student looks at the same pixels: then they are not rendered twice."""


class LiveTeacher(Protocol):
    """A teacher, and the store that it would fill."""

    @property
    def reader(self) -> "LiveReader":
        """That store."""

    def __call__(self, encoded: Mapping[str, Tensor]) -> Decoded:
        """Whitened tokens of these pixels, on the device; never changed, never with a gradient."""


class LiveSource(Schema):
    """Where a live teacher comes from, as data."""

    entry: str
    """`module:function`, called with `settings`, the images and the device."""
    settings: dict[str, Any]

    def open(self, images: ImageList, device: torch.device) -> LiveTeacher:
        """Load the teacher."""
        module, _, name = self.entry.partition(":")
        teacher: LiveTeacher = getattr(importlib.import_module(module), name)(self.settings, images, device)
        return teacher
