"""The list of images that a run works on: keys, labels, content digests and the split, fixed before any work.

Content decides identity: two folders with the same keys and bytes are the same data set, wherever they lie, and a
replaced image makes another one. Digests are taken once and kept as long as no size and modification time changes.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from PIL import Image

from storage.atomic import write_file
from storage.decode import decode_image
from storage.errors import BadImageError, ConfigError, DamagedError, InputError
from storage.fingerprint import digest_bytes, digest_json, digest_parts
from storage.images import ImageEntry, ImageSource, open_images
from storage.schema import Sealed

Split = Literal["train", "eval"]


class ImageList(Sealed):
    """Ordered images of one split: what a store is made from."""

    location: str
    """Where the images lie; no part of their identity."""
    classes: tuple[str, ...]
    keys: tuple[str, ...]
    labels: tuple[int, ...]
    """Position in `classes`; -1 without a label."""
    digests: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def source(self) -> ImageSource:
        return open_images(self.location)

    @cached_property
    def fingerprint(self) -> str:
        """Over the ordered keys and contents."""
        return digest_parts(part.encode() for pair in zip(self.keys, self.digests, strict=True) for part in pair)

    def read_image(self, position: int) -> Image.Image:
        """Decode one image, after checking that it is the one that was listed.

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


class ImageIndex(Sealed):
    """All images of a data set."""

    remedy: ClassVar[str] = "delete it and give the command again"

    location: str
    classes: tuple[str, ...]
    entries: tuple[tuple[str, int, str, Split], ...]
    """Key, label, digest and split of each image, ordered by key."""

    def split(self, name: Split) -> ImageList:
        """The images of one split, in key order."""
        rows = [entry for entry in self.entries if entry[3] == name]
        keys, labels, digests, _ = zip(*rows, strict=True) if rows else ((), (), (), ())
        return ImageList(location=self.location, classes=self.classes, keys=keys, labels=labels, digests=digests)

    @cached_property
    def fingerprint(self) -> str:
        """Over keys, labels, contents and the split."""
        return digest_json([self.classes, self.entries])


def build_index(location: str, *, eval_fraction: float, seed: int, cache_dir: Path) -> ImageIndex:
    """List a data set, digest its images and divide it.

    Where the data set has no `val` or `test` part of its own, `eval_fraction` of each class is held out: a function of
    the image keys and the seed alone, so it is the same on every machine.

    Raises:
        InputError: no image, a class too small to divide, or a name that is no text.
    """
    source = open_images(location)
    entries = sorted(source.list_images())
    for entry in entries:
        _refuse_bytes(entry.key, location)
    digests = _digests(source, entries, location, cache_dir)
    classes = order_classes(entry.class_name for entry in entries if entry.class_name is not None)
    numbers = {name: number for number, name in enumerate(classes)}
    if any(entry.split for entry in entries):
        splits: Sequence[Split] = ["eval" if entry.split == "eval" else "train" for entry in entries]
    else:
        splits = hold_out(entries, eval_fraction, seed)
    rows = tuple(
        (entry.key, -1 if entry.class_name is None else numbers[entry.class_name], digest, split)
        for entry, digest, split in zip(entries, digests, splits, strict=True)
    )
    return ImageIndex(location=str(Path(location).expanduser().absolute()), classes=classes, entries=rows)


def order_classes(names: Iterable[str]) -> tuple[str, ...]:
    """By name; names that all are numbers, as in `.cls` members, by number, so that class 10 is the one after 9."""
    unique = set(names)
    if all(name.isascii() and name.isdigit() for name in unique):
        return tuple(sorted(unique, key=lambda name: (int(name), name)))
    return tuple(sorted(unique))


def _refuse_bytes(key: str, location: str) -> None:
    try:
        key.encode()
    except UnicodeEncodeError:
        raise InputError(f"the name {key!r} in {location} is not valid UTF-8; rename this image") from None


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
    return ImageIndex.from_file(path, path.read_bytes())


def save_index(path: Path, index: ImageIndex) -> None:
    write_file(path, index.to_file(indent=None))


def require_labels(images: ImageList, purpose: str) -> None:
    """Refuse images without labels, or of one class, where labels are what is learnt.

    Raises:
        ConfigError: says what is missing.
    """
    if len(images.classes) < 2 or -1 in images.labels:
        found = f"{len(images.classes)} class(es)" if images.classes else "no labels"
        raise ConfigError(
            f"{purpose} needs labelled images of two classes or more, found {found} in {images.location}; "
            "put the images into one folder a class, or give tars with .cls members"
        )


class _DigestCache(Sealed):
    """May be deleted, or damaged, at any time."""

    listing: str
    digests: tuple[str, ...]


def _digests(source: ImageSource, entries: Sequence[ImageEntry], location: str, cache_dir: Path) -> list[str]:
    listing = digest_json([(entry.key, entry.num_bytes, entry.stamp) for entry in entries])
    path = cache_dir / f"digests-{digest_json(str(Path(location).expanduser().absolute()))[:16]}.json"
    with contextlib.suppress(FileNotFoundError, DamagedError):
        cached = _DigestCache.from_file(path, path.read_bytes())
        if cached.listing == listing:
            return list(cached.digests)

    def digest(entry: ImageEntry) -> str:
        try:
            return digest_bytes(source.read_bytes(entry.key))
        except BadImageError as error:
            return f"unreadable: {error}"

    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(digest, entries, chunksize=64))
    write_file(path, _DigestCache(listing=listing, digests=tuple(digests)).to_file(indent=None))
    return digests
