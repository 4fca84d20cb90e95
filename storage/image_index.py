"""The list of images that a run works on: keys, labels, content digests and the split, fixed before any work.

Content decides identity: two folders with the same keys and bytes are the same data set, wherever they lie, and a
replaced image makes another one.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from storage.atomic import make_folder, read_regular, write_file
from storage.columns import Keys
from storage.errors import ConfigError, DamagedError, InputError
from storage.fingerprint import digest_json, digest_parts
from storage.image_digests import take_digests
from storage.image_list import ImageList, decode_images, encode_images
from storage.image_source import ImageEntry
from storage.images import open_images, place_of
from storage.skipped_images import find_skipped
from storage.stage import Progress, SilentProgress

__all__ = ["FILE_NAME", "ImageIndex", "ImageList", "ImageRow", "Split", "build_index", "hold_out", "load_index",
           "order_classes", "require_labels", "save_index"]  # fmt: skip

Split = Literal["train", "eval"]

FILE_NAME = "images.bin"
"""Of the image list in a store."""


class ImageRow(NamedTuple):
    """One image of an index."""

    key: str
    label: int
    digest: str
    split: Split


class ImageIndex:
    """All images of a data set, and which of them are held out."""

    def __init__(self, images: ImageList, is_eval_N: NDArray[np.bool_]) -> None:
        if len(images) != len(is_eval_N):
            raise AssertionError(f"{len(images)} images, {len(is_eval_N)} splits")
        self.images, self.is_eval_N = images, is_eval_N
        self.location, self.classes = images.location, images.classes

    @classmethod
    def of_rows(cls, location: str, classes: Sequence[str], rows: Sequence[ImageRow]) -> "ImageIndex":
        """From one row an image, ordered by key."""
        images = ImageList(
            location=location, classes=classes, keys=[row.key for row in rows], labels=[row.label for row in rows],
            digests=[row.digest for row in rows],
        )  # fmt: skip
        return cls(images, np.array([row.split == "eval" for row in rows], np.bool_))

    @property
    def rows(self) -> Iterator[ImageRow]:
        """One image after another, in key order; columns are faster."""
        images = self.images
        columns = zip(images.keys, images.labels, images.digests, self.is_eval_N.tolist(), strict=True)
        return (ImageRow(key, label, digest, "eval" if held else "train") for key, label, digest, held in columns)

    def __len__(self) -> int:
        return len(self.images)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ImageIndex)
            and self.images == other.images
            and np.array_equal(self.is_eval_N, other.is_eval_N)
        )

    __hash__ = None  # type: ignore[assignment]

    def split(self, name: Split) -> ImageList:
        """The images of one split, in key order."""
        return self.images.select(self.is_eval_N == (name == "eval"), self.images.skipped if name == "train" else ())

    @cached_property
    def fingerprint(self) -> str:
        """Over classes, keys, labels, contents and the split."""
        parts = (digest_json(self.classes).encode(), self.images.fingerprint.encode())
        return digest_parts(
            (*parts, self.images.labels_N.astype("<i4").tobytes(), self.is_eval_N.astype(np.uint8).tobytes())
        )

    def to_file(self) -> bytes:
        """The bytes of its file."""
        return encode_images(self.images, self.is_eval_N)

    @classmethod
    def from_file(cls, path: Path, data: bytes) -> "ImageIndex":
        """Parse a file that `to_file` made.

        Raises:
            DamagedError: it is not what was written.
        """
        remedy = "delete it and give the command again"
        images, is_eval_N = decode_images(path, data, remedy)
        if is_eval_N is None:
            raise DamagedError(f"{path} is the image list of a store; expected that of a whole data set; {remedy}")
        return cls(images, is_eval_N)


def build_index(
    location: str, *, eval_fraction: float, seed: int, cache_dir: Path, skip: Sequence[str] = (),
    progress: Progress | None = None,
) -> ImageIndex:  # fmt: skip
    """List a data set, digest its images and divide it.

    Where the data set has no `val` or `test` part of its own, `eval_fraction` of each class is held out: a function of
    the image keys and the seed alone, so it is the same on every machine.

    Args:
        cache_dir: keeps digests from one call to the next.
        skip: names of images, or of lists of them, that are left out of the train part; nobody moves to the other part
            because of it.
        progress: hears of the images that have to be read, and of those that are left out.

    Raises:
        InputError: no image, a class too small to divide, or a name that is no text.
    """
    progress = progress or SilentProgress()
    place = place_of(location)
    cache_dir = cache_dir.absolute()
    source = open_images(location, cache_dir)
    make_folder(cache_dir)
    try:
        f"{place} {cache_dir}".encode()
        entries = sorted(source.list_images(), key=attrgetter("key"))
        keys = Keys.encode(entry.key for entry in entries)
    except UnicodeEncodeError as error:
        raise InputError(f"the name {error.object!r} in {location} is not valid UTF-8; rename it") from None
    classes = order_classes(entry.class_name for entry in entries if entry.class_name is not None)
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(classes)} | {None: -1}
    labels = np.fromiter((numbers[entry.class_name] for entry in entries), np.int32, len(entries))
    if any(entry.split for entry in entries):
        is_eval_N = np.fromiter((entry.split == "eval" for entry in entries), np.bool_, len(entries))
    else:
        is_eval_N = np.array([split == "eval" for split in hold_out(entries, eval_fraction, seed)], np.bool_)
    is_skipped_N = find_skipped(entries, is_eval_N, skip, progress)
    skipped = list[str]()
    if is_skipped_N.any():
        skipped = [entries[position].key for position in np.flatnonzero(is_skipped_N)]
        entries = [entries[position] for position in np.flatnonzero(~is_skipped_N)]
        keys, labels, is_eval_N = keys.select(~is_skipped_N), labels[~is_skipped_N], is_eval_N[~is_skipped_N]
    cache_path = cache_dir / f"digests-{digest_json(place)[:16]}.bin"
    digests = take_digests(source, entries, keys, cache_path, progress)
    images = ImageList(
        location=place, classes=classes, keys=keys, labels=labels, digests=digests, cache_dir=str(cache_dir),
        skipped=skipped,
    )  # fmt: skip
    return ImageIndex(images, is_eval_N)


def order_classes(names: Iterable[str]) -> tuple[str, ...]:
    """By name; names that all are numbers, as in `.cls` members, by number, so that class 10 is the one after 9."""
    unique = set(names)
    if all(name.isascii() and name.isdigit() for name in unique):
        return tuple(sorted(unique, key=lambda name: (int(name), name)))
    return tuple(sorted(unique))


def hold_out(entries: Sequence[ImageEntry], fraction: float, seed: int) -> list[Split]:
    """Mark `fraction` of each class as `eval`, at least one image and never a whole class."""
    by_class: dict[str | None, list[int]] = {}
    for position, entry in enumerate(entries):
        by_class.setdefault(entry.class_name, []).append(position)
    splits: list[Split] = ["train"] * len(entries)
    if fraction == 0:
        return splits
    for class_name, positions in by_class.items():
        if len(positions) < 2:
            raise InputError(
                f"class {class_name!r} has one image ({entries[positions[0]].key}); two are needed to train and to "
                "evaluate: add images, remove the class, or use all for training with --set data.eval_fraction=0"
            )
        positions.sort(key=lambda p: hashlib.sha256(f"{seed}/{entries[p].key}".encode()).digest())
        for position in positions[: min(len(positions) - 1, max(1, round(fraction * len(positions))))]:
            splits[position] = "eval"
    return splits


def load_index(path: Path) -> ImageIndex:
    """Read an index file; the input `data` of every stage."""
    return ImageIndex.from_file(path, read_regular(path))


def save_index(path: Path, index: ImageIndex) -> None:
    write_file(path, index.to_file())


def require_labels(images: ImageList, purpose: str) -> None:
    """Refuse images without labels, or of one class, where labels are what is learnt.

    Raises:
        ConfigError: says what is missing.
    """
    if len(images.classes) < 2 or (images.labels_N < 0).any():
        found = f"{len(images.classes)} class(es)" if images.classes else "no labels"
        raise ConfigError(
            f"{purpose} needs labelled images of two classes or more, found {found} in {images.location}; "
            "put the images into one folder a class, or give tars with .cls members"
        )
