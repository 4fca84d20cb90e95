"""Where image bytes come from: a folder of class folders, or tars of images (WebDataset). And how bytes become pixels.

Files are untrusted: nothing is unpacked to disk or unpickled, and sizes are checked before memory is taken.
"""

import io
import os
import re
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from storage.errors import BadImageError, DamagedError, InputError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
MAX_IMAGE_BYTES = 256 * 2**20
MAX_IMAGE_PIXELS = 120_000_000
"""Larger images are refused from their header: a 12 kB file can claim gigabytes."""

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
    """Changes when the file is replaced (modification time in ns); only ever compared for equality."""


class ImageSource(Protocol):
    """Anything that lists images and hands out their encoded bytes."""

    def list_images(self) -> list[ImageEntry]: ...
    def read_bytes(self, key: str) -> bytes: ...


def open_images(location: str) -> ImageSource:
    """Open a data set by its path: a folder of class folders, a folder of tars, one tar, or `{000..009}.tar`.

    A folder (or the tars' names) may be divided into `train` and `val` (or `test`).

    Raises:
        InputError: nothing there that can be used.
    """
    path = Path(location).expanduser()
    if re.search(r"\{.*\}|[*?]", path.name):
        tars = _expand(path)
    elif path.is_file() and path.suffix == ".tar":
        tars = [path]
    elif path.is_dir():
        tars = sorted(path.glob("*.tar"))
    elif path.exists():
        raise InputError(f"{location} is a file of another kind; give a folder of class folders, or tars of images")
    else:
        raise InputError(f"no such data: {location} (looked in {path.absolute()}); give DATA=<folder of class folders>")
    return TarImages(tars) if tars else FolderImages(path)


def _expand(pattern: Path) -> list[Path]:
    """`{000..009}` and `*` in the last part of a path, the way WebDataset users write them."""
    import braceexpand

    tars = sorted({tar for name in braceexpand.braceexpand(pattern.name) for tar in pattern.parent.glob(name)})
    if not tars:
        raise InputError(f"no tar matches {pattern}; check the folder and the range of numbers")
    return tars


def _split_of(name: str) -> str | None:
    word = re.split(r"[^a-z]", name.lower(), maxsplit=1)[0]
    return "train" if word in _TRAIN_NAMES else "eval" if word in _EVAL_NAMES else None


class FolderImages:
    """`root/<class>/**/<file>`, or `root/train/<class>/...` with `root/val/<class>/...`; images directly in `root` have
    no label. Keys are paths relative to `root`. Hidden files and folders are passed over."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def list_images(self) -> list[ImageEntry]:
        folders = {entry.name for entry in os.scandir(self.root) if entry.is_dir()}
        is_divided = any(_split_of(f) == "train" for f in folders) and any(_split_of(f) == "eval" for f in folders)
        entries = sorted(self._walk(is_divided))
        if not entries:
            raise InputError(
                f"no image in {self.root}; expected {self.root}/<class>/<image> with one of "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}"
            )
        return entries

    def _walk(self, is_divided: bool) -> Iterator[ImageEntry]:
        for folder, subfolders, files in os.walk(self.root, followlinks=True):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            parts = Path(folder).relative_to(self.root).parts
            split = _split_of(parts[0]) if is_divided and parts else None
            labels = parts[1:] if split else parts
            for file in files:
                if file.startswith(".") or os.path.splitext(file)[1].lower() not in IMAGE_SUFFIXES:
                    continue
                stat = os.stat(os.path.join(folder, file))
                key = "/".join((*parts, file))
                yield ImageEntry(key, labels[0] if labels else None, split, stat.st_size, stat.st_mtime_ns)

    def read_bytes(self, key: str) -> bytes:
        path = self.root / key
        try:
            if path.stat().st_size > MAX_IMAGE_BYTES:
                raise BadImageError(f"larger than {MAX_IMAGE_BYTES >> 20} MiB")
            return path.read_bytes()
        except OSError as error:
            raise BadImageError(f"cannot be read: {os.strerror(error.errno or 0)}") from error


class TarImages:
    """Tars in WebDataset's layout: members `<key>.<image suffix>` and, for the label, `<key>.cls`.

    Headers are scanned once; images are then read by offset. Nothing is unpacked.
    """

    def __init__(self, tars: list[Path]) -> None:
        self.tars = tars
        self._offsets: dict[str, tuple[Path, int, int]] = {}

    def list_images(self) -> list[ImageEntry]:
        entries: list[ImageEntry] = []
        for tar in self.tars:
            entries.extend(self._scan(tar))
        if not entries:
            raise InputError(
                f"no image in {len(self.tars)} tar(s) at {self.tars[0].parent}; expected <key>.jpg, <key>.cls"
            )
        return entries

    def _scan(self, tar: Path) -> Iterator[ImageEntry]:
        stamp, split = tar.stat().st_mtime_ns, _split_of(tar.name)
        found: dict[str, tuple[str, int, int]] = {}
        labels: dict[str, str] = {}
        try:
            with tarfile.open(tar, "r:") as archive:
                for member in archive:
                    stem, suffix = split_member(member.name)
                    if not member.isreg():
                        continue
                    if f".{suffix}" in IMAGE_SUFFIXES:
                        self._refuse_repeat(stem, member.name, tar, found)
                        found[stem] = (suffix, member.offset_data, member.size)
                    elif suffix in ("cls", "cls.txt") and member.size <= 4096:
                        file = archive.extractfile(member)
                        labels[stem] = file.read().decode("utf-8", "replace").strip() if file else ""
                end = archive.offset
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DamagedError(f"{tar} is not a whole, uncompressed tar: {error}; fetch or make it again") from error
        with open(tar, "rb") as file:
            file.seek(end)
            if file.read(512) != bytes(512):
                raise DamagedError(f"{tar} ends without the end-of-archive mark at byte {end}: it was cut short")
        for stem, (suffix, offset, size) in found.items():
            key = f"{stem}.{suffix}"
            self._offsets[key] = (tar, offset, size)
            yield ImageEntry(key, labels.get(stem), split, size, stamp)

    def _refuse_repeat(self, stem: str, member: str, tar: Path, found: dict[str, tuple[str, int, int]]) -> None:
        earlier = [key for key in (f"{stem}{suffix}" for suffix in IMAGE_SUFFIXES) if key in self._offsets]
        if stem in found or earlier:
            where = tar if stem in found else self._offsets[earlier[0]][0]
            raise InputError(f"the key {stem!r} stands twice: in {where} and as {member} in {tar}; keys must be unique")

    def read_bytes(self, key: str) -> bytes:
        if not self._offsets:
            self.list_images()
        tar, offset, size = self._offsets[key]
        if size > MAX_IMAGE_BYTES:
            raise BadImageError(f"larger than {MAX_IMAGE_BYTES >> 20} MiB")
        with open(tar, "rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise BadImageError(f"{tar.name} ends {size - len(data)} bytes too early")
        return data


def split_member(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key is everything up to the first dot of the last path component."""
    folder, _, file = name.removeprefix("./").rpartition("/")
    stem, _, suffix = file.partition(".")
    return (f"{folder}/{stem}" if folder else stem), suffix.lower()


def decode_image(data: bytes) -> Image.Image:
    """Encoded bytes to an RGB picture: alpha is dropped, CMYK and grey are converted, 16-bit grey keeps its high byte,
    animations give their first frame, and the EXIF orientation is ignored (as in torchvision's ImageFolder and timm).

    Raises:
        BadImageError: not an image, truncated, or larger than `MAX_IMAGE_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(io.BytesIO(data))
            width, height = image.size
            if width * height > MAX_IMAGE_PIXELS:
                raise BadImageError(f"{width} x {height} pixels, more than the limit of {MAX_IMAGE_PIXELS:,}")
            if image.mode.startswith("I"):
                grey = np.asarray(image).astype(np.uint32)
                image = Image.fromarray((grey >> 8).clip(0, 255).astype(np.uint8))
            return image.convert("RGB")
    except BadImageError:
        raise
    except Image.DecompressionBombError as error:
        raise BadImageError(str(error)) from error
    except UnidentifiedImageError as error:  # its own text holds a memory address: not the same in two runs
        raise BadImageError("not an image of a known kind") from error
    except Exception as error:  # Pillow's plugins raise almost anything on damaged files
        raise BadImageError(
            f"cannot be decoded: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
