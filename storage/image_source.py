"""What a source of images is: anything that lists images and hands out their encoded bytes.

Files are untrusted: nothing is unpacked to disk or unpickled, and sizes are checked before memory is taken.
"""

import re
from typing import NamedTuple, Protocol

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
MAX_IMAGE_BYTES = 256 * 2**20

_TRAIN_NAMES = ("train", "training")
_EVAL_NAMES = ("val", "valid", "validation", "test")


class ImageEntry(NamedTuple):
    """One image as a source lists it, before anything of it is read."""

    key: str
    class_name: str | None
    split: str | None
    """`train` or `eval` where the data set says so itself."""
    num_bytes: int
    stamp: int
    """Modification time of the file in ns; only ever compared for equality."""
    inode: int = 0
    """Of the file: changes when another one takes its place, whatever its time says."""
    name: str = ""
    """What the image's own file was called, where the key does not tell it."""


class ImageSource(Protocol):
    """Anything that lists images and hands out their encoded bytes."""

    def list_images(self) -> list[ImageEntry]: ...
    def read_bytes(self, key: str) -> bytes: ...


def split_of(word: str) -> str | None:
    return "train" if word in _TRAIN_NAMES else "eval" if word in _EVAL_NAMES else None


def file_split(name: str) -> str | None:
    """Files of many images are named `imagenet1k-validation-00.tar`: the word may stand anywhere."""
    return next(filter(None, map(split_of, re.split(r"[^a-z]+", name.lower()))), None)


def file_splits(names: list[str]) -> list[str | None]:
    """The part that each file of a data set belongs to; none where their names do not tell `train` from `val`."""
    found = [file_split(name) for name in names]
    return found if {"train", "eval"} <= set(found) else [None] * len(names)
