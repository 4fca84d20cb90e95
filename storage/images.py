"""Where image bytes come from: a folder of class folders, or tars of images (WebDataset).

Files are untrusted: nothing is unpacked to disk or unpickled, and sizes are checked before memory is taken.
"""

import os
import re
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from storage.errors import BadImageError, DamagedError, InputError

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
        tars = sorted(tar for tar in path.glob("*.tar") if not tar.name.startswith("."))
    elif path.exists():
        raise InputError(f"{location} is a file of another kind; give a folder of class folders, or tars of images")
    else:
        raise InputError(f"no such data: {location} (looked in {path.absolute()}); give DATA=<folder of class folders>")
    return TarImages(tars) if tars else FolderImages(path)


def _expand(pattern: Path) -> list[Path]:
    """`{000..009}` and `*` in the last part of a path, the way WebDataset users write them."""
    import braceexpand

    tars: set[Path] = set()
    for name in braceexpand.braceexpand(pattern.name):
        found = set(pattern.parent.glob(name))
        if not found:
            raise InputError(f"no tar matches {pattern.parent / name}; check the folder and the range of numbers")
        tars |= found
    return sorted(tars)


def _split_of(word: str) -> str | None:
    return "train" if word in _TRAIN_NAMES else "eval" if word in _EVAL_NAMES else None


def _folder_split(name: str) -> str | None:
    """`train2017` is one; `bullet_train` is a class."""
    return _split_of(re.split(r"[^a-z]", name.lower(), maxsplit=1)[0])


def _tar_split(name: str) -> str | None:
    """Tars are named `imagenet1k-validation-00.tar`: the word may stand anywhere."""
    return next(filter(None, map(_split_of, re.split(r"[^a-z]+", name.lower()))), None)


class FolderImages:
    """`root/<class>/**/<file>`, or `root/train/<class>/...` with `root/val/<class>/...`; images directly in `root` have
    no label. Keys are paths relative to `root`. Hidden files and folders are passed over."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def list_images(self) -> list[ImageEntry]:
        folders = {entry.name for entry in os.scandir(self.root) if entry.is_dir()}
        is_divided = {"train", "eval"} <= {_folder_split(name) for name in folders}
        entries = sorted(self._walk(is_divided))
        if not entries:
            raise InputError(
                f"no image in {self.root}; expected {self.root}/<class>/<image> with one of "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}"
            )
        return entries

    def _walk(self, is_divided: bool) -> Iterator[ImageEntry]:
        for folder, subfolders, files in os.walk(self.root, followlinks=True):
            subfolders[:] = [name for name in subfolders if not name.startswith(".") and not _is_loop(folder, name)]
            parts = Path(folder).relative_to(self.root).parts
            split = _folder_split(parts[0]) if is_divided and parts else None
            labels = parts[1:] if split else parts
            for file in files:
                if file.startswith(".") or os.path.splitext(file)[1].lower() not in IMAGE_SUFFIXES:
                    continue
                try:
                    found = os.stat(os.path.join(folder, file))
                except OSError:  # a link to nowhere: an unusable image, counted with the others
                    size, stamp = 0, 0
                else:
                    if not stat.S_ISREG(found.st_mode):
                        continue  # reading a pipe would wait for ever
                    size, stamp = found.st_size, found.st_mtime_ns
                yield ImageEntry("/".join((*parts, file)), labels[0] if labels else None, split, size, stamp)

    def read_bytes(self, key: str) -> bytes:
        path = self.root / key
        try:
            if path.stat().st_size > MAX_IMAGE_BYTES:
                raise BadImageError(f"larger than {MAX_IMAGE_BYTES >> 20} MiB")
            return path.read_bytes()
        except OSError as error:
            raise BadImageError(f"cannot be read: {os.strerror(error.errno or 0)}") from error


def _is_loop(folder: str, name: str) -> bool:
    """A link to a folder that it lies in."""
    path = Path(folder, name)
    return path.is_symlink() and Path(folder).resolve().is_relative_to(path.resolve())


class TarImages:
    """Tars in WebDataset's layout: members `<key>.<image suffix>` and, for the label, `<key>.cls`.

    Where the names of the tars tell `train` from `val` (or `test`), that is the division. Headers are scanned once;
    images are then read by offset. Nothing is unpacked.
    """

    def __init__(self, tars: list[Path]) -> None:
        self.tars = tars
        self._offsets: dict[str, tuple[Path, int, int]] = {}

    def list_images(self) -> list[ImageEntry]:
        is_divided = {"train", "eval"} <= {_tar_split(tar.stem) for tar in self.tars}
        entries: list[ImageEntry] = []
        offsets: dict[str, tuple[Path, int, int]] = {}
        for tar in self.tars:
            entries.extend(_scan(tar, _tar_split(tar.stem) if is_divided else None, offsets))
        self._offsets = offsets
        if not entries:
            raise InputError(
                f"no image in {len(self.tars)} tar(s) at {self.tars[0].parent}; expected <key>.jpg, <key>.cls"
            )
        return entries

    def read_bytes(self, key: str) -> bytes:
        if not self._offsets:
            self.list_images()
        if key not in self._offsets:
            raise BadImageError("no longer in the tars")
        tar, offset, size = self._offsets[key]
        if size > MAX_IMAGE_BYTES:
            raise BadImageError(f"larger than {MAX_IMAGE_BYTES >> 20} MiB")
        try:
            with open(tar, "rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise BadImageError(f"{tar.name} cannot be read: {os.strerror(error.errno or 0)}") from error
        if len(data) != size:
            raise BadImageError(f"{tar.name} ends {size - len(data)} bytes too early")
        return data


def _scan(tar: Path, split: str | None, offsets: dict[str, tuple[Path, int, int]]) -> Iterator[ImageEntry]:
    """List the images of one tar and enter them into `offsets`.

    Raises:
        DamagedError: the tar is not whole.
        InputError: a key stands twice.
    """
    stamp = tar.stat().st_mtime_ns
    found: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if member.size < 0:  # tarfile would go backwards, for ever
                    raise tarfile.ReadError(f"member {member.name!r} has a negative size")
                stem, suffix = split_member(member.name)
                if not member.isreg() or member.issparse():
                    continue
                if f".{suffix}" in IMAGE_SUFFIXES:
                    earlier = [tar] if stem in found else _tars_with(stem, offsets)
                    if earlier:
                        raise InputError(
                            f"the key {stem!r} stands twice: in {earlier[0]} and as {member.name} in {tar}; "
                            "keys must be unique"
                        )
                    found[stem] = (suffix, member.offset_data, member.size)
                elif suffix in ("cls", "cls.txt") and member.size <= 4096:
                    file = archive.extractfile(member)
                    labels[stem] = file.read().decode("utf-8", "replace").strip() if file else ""
            end = archive.offset
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DamagedError(f"{tar} is not a whole, uncompressed tar: {error}; fetch or make it again") from error
    _check_end(tar, end)
    for stem, (suffix, offset, size) in found.items():
        key = f"{stem}.{suffix}"
        offsets[key] = (tar, offset, size)
        yield ImageEntry(key, labels.get(stem) or None, split, size, stamp)


def _tars_with(stem: str, offsets: dict[str, tuple[Path, int, int]]) -> list[Path]:
    return [offsets[key][0] for key in (f"{stem}{suffix}" for suffix in IMAGE_SUFFIXES) if key in offsets]


def _check_end(tar: Path, end: int) -> None:
    """A whole tar ends in zeros and nothing else; `tarfile` takes a cut, a damaged header or zeros inside for the end.

    Raises:
        DamagedError: says where the members stop.
    """
    remedy = "it was cut short or damaged; fetch or make it again"
    with open(tar, "rb") as file:
        file.seek(end)
        if file.read(512) != bytes(512):
            raise DamagedError(f"{tar} has no end-of-archive mark at byte {end}: {remedy}")
        while data := file.read(2**20):
            if any(data):
                raise DamagedError(f"{tar} goes on after its end-of-archive mark at byte {end}: {remedy}")


def split_member(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key is everything up to the first dot of the last path component."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, suffix = file.partition(".")
    return folder + slash + stem, suffix.lower()
