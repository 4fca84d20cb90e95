"""A list of images in memory and on disk: keys, labels and content digests in columns, 60 bytes an image.

A file of columns (columns.py) with a header {location, cache_dir, classes, num_images, key_bytes, is_divided}, the keys
of images that were `skipped` where there are any, and

    key_lengths   uint32, N       bytes of each key
    keys          UTF-8           in ascending order
    labels        int32, N        position in `classes`; -1 without a label
    digests       16 bytes, N     of the encoded image
    is_eval       uint8, N        1 for a held-out image; only in the index of a whole data set
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from storage.columns import DIGEST_BYTES, Digests, Keys, as_run, cut_columns, encode_columns, open_columns, raw_bytes
from storage.decode import decode_image
from storage.errors import DamagedError, InputError
from storage.fingerprint import digest_bytes, digest_parts
from storage.image_source import ImageSource
from storage.images import open_images
from storage.schema import Schema


class _Header(Schema):
    format: Literal["decant image list"] = "decant image list"
    version: Literal[1] = 1
    location: str
    cache_dir: str
    classes: tuple[str, ...]
    num_images: int = Field(ge=0)
    key_bytes: int = Field(ge=0)
    is_divided: bool
    skipped: tuple[str, ...] = ()
    """Only in a file where it is not empty."""


class ImageList:
    """Ordered images: what a store is made from. Never changed after it was made."""

    def __init__(
        self, *, location: str, classes: Sequence[str], keys: Keys | Iterable[str],
        labels: NDArray[np.int32] | Sequence[int], digests: Digests | Iterable[str], cache_dir: str = "",
        skipped: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """
        Args:
            location: where the images lie; no part of their identity.
            keys: in ascending order.
            labels: position in `classes`; -1 without a label.
            digests: of the encoded images, in hex; zeros for an image that could not be read.
            cache_dir: what is known of the tars at `location`; empty for nothing.
            skipped: keys of images of the data set that were left out on purpose; no part of the list's identity.
        """
        self.location, self.cache_dir, self.classes = location, cache_dir, tuple(classes)
        self.skipped = tuple(skipped)
        self.keys = keys if isinstance(keys, Keys) else Keys.encode(keys)
        self.labels_N = np.asarray(labels, np.int32)
        self.digests = digests if isinstance(digests, Digests) else Digests.encode(digests)
        if not len(self.keys) == len(self.labels_N) == len(self.digests):
            raise AssertionError(f"{len(self.keys)} keys, {len(self.labels_N)} labels, {len(self.digests)} digests")

    def __len__(self) -> int:
        return len(self.keys)

    def __eq__(self, other: object) -> bool:
        """The same images, lying in the same place."""
        return isinstance(other, ImageList) and self.at(self.location).to_file() == other.at(other.location).to_file()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self):,} images of {self.location!r}, {len(self.classes):,} classes>"

    @property
    def labels(self) -> "memoryview[int]":
        """Python's numbers, one an image; `labels_N` is the same as an array."""
        return self.labels_N.data

    @cached_property
    def source(self) -> ImageSource:
        return open_images(self.location, Path(self.cache_dir) if self.cache_dir else None)

    @cached_property
    def fingerprint(self) -> str:
        """Over the ordered keys and contents."""
        return digest_parts(
            raw_bytes(column) for column in (self.keys.lengths_N, self.keys.block, self.digests.rows_N16)
        )

    @cached_property
    def labels_fingerprint(self) -> str:
        """Over the labels and the names of the classes."""
        return digest_parts([*(name.encode() for name in self.classes), self.labels.tobytes()])

    def position(self, key: str) -> int:
        """Raises KeyError where there is no such image."""
        found = self.keys.find(key)
        if found is None:
            raise KeyError(key)
        return found

    def at(self, location: str, cache_dir: str = "") -> "ImageList":
        """The same images, lying elsewhere."""
        return ImageList(
            location=location, classes=self.classes, keys=self.keys, labels=self.labels_N, digests=self.digests,
            cache_dir=cache_dir, skipped=self.skipped,
        )  # fmt: skip

    def select(self, is_taken_N: NDArray[np.bool_], skipped: Sequence[str] = ()) -> "ImageList":
        """Some of the images, in the same order; those of a folder of their own take no memory.

        Args:
            skipped: those that were left out of this part.
        """
        rows = as_run(is_taken_N)
        return ImageList(
            location=self.location, classes=self.classes, keys=self.keys.select(rows), labels=self.labels_N[rows],
            digests=Digests(self.digests.rows_N16[rows]), cache_dir=self.cache_dir, skipped=skipped,
        )  # fmt: skip

    def read_image(self, position: int) -> NDArray[np.uint8]:
        """Decode one image, after checking that it is the one that was listed: (H, W, 3) RGB, or (H, W) grey.

        Raises:
            BadImageError: it cannot be read or decoded.
            InputError: it is not the image that was listed when the run began.
        """
        key = self.keys[position]
        data = self.source.read_bytes(key)
        if self.digests[position] != digest_bytes(data):
            raise InputError(
                f"image {key!r} of {self.location} has changed since it was listed; give the command again: "
                "the changed data set gets a store of its own"
            )
        return decode_image(data)

    def to_file(self) -> bytes:
        """The bytes of its file."""
        return encode_images(self, None)

    @classmethod
    def from_file(cls, path: Path | str, data: bytes) -> "ImageList":
        """Parse a file that `to_file` made.

        Raises:
            DamagedError: it is not what was written.
        """
        images, is_eval_N = decode_images(path, data, "run `make verify`, then `make extract`")
        if is_eval_N is not None:
            raise DamagedError(f"{path} is the list of a whole data set; expected that of a store")
        return images


class Decoded(NamedTuple):
    """What a file holds."""

    images: ImageList
    is_eval_N: NDArray[np.bool_] | None


def encode_images(images: ImageList, is_eval_N: NDArray[np.bool_] | None) -> bytes:
    """A file of images, divided or not."""
    keys = images.keys
    header = _Header(
        location=images.location, cache_dir=images.cache_dir, classes=images.classes, num_images=len(images),
        key_bytes=len(keys.block), is_divided=is_eval_N is not None, skipped=images.skipped,
    )  # fmt: skip
    columns: list[NDArray[Any]] = [keys.lengths_N, keys.block, images.labels_N.astype("<i4"), images.digests.rows_N16]
    return encode_columns(
        header.model_dump_json(exclude=None if images.skipped else {"skipped"}).encode(),
        columns if is_eval_N is None else [*columns, is_eval_N.astype(np.uint8)],
    )


def decode_images(path: Path | str, data: bytes, remedy: str) -> Decoded:
    """Parse and check a file of images; its columns are views of `data`.

    Raises:
        DamagedError: it is not what was written; ends with the `remedy`.
    """
    try:
        text, body = open_columns(path, data)
        header = _Header.from_file(path, text)
        count = header.num_images
        lengths_N, block, labels_N, digests_N16, is_eval_N = cut_columns(
            path, body,
            [("<u4", (count,)), ("u1", (header.key_bytes,)), ("<i4", (count,)), ("u1", (count, DIGEST_BYTES)),
             ("u1", (count * header.is_divided,))],
        )  # fmt: skip
        keys = Keys(block, lengths_N)
        problem = keys.problem()
        if count and not -1 <= labels_N.min() <= labels_N.max() < len(header.classes):
            problem = f"labels from {labels_N.min()} to {labels_N.max()} of {len(header.classes)} classes"
        elif len(is_eval_N) and is_eval_N.max() > 1:
            problem = "a split that is neither train nor eval"
        if problem:
            raise DamagedError(f"{path} holds {problem}")
    except DamagedError as error:
        raise DamagedError(f"{error}; {remedy}") from error
    images = ImageList(
        location=header.location, classes=header.classes, keys=keys, labels=labels_N, digests=Digests(digests_N16),
        cache_dir=header.cache_dir, skipped=header.skipped,
    )  # fmt: skip
    return Decoded(images, is_eval_N.astype(np.bool_) if header.is_divided else None)
