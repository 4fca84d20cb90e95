"""A folder of class folders as a source of images."""

import contextlib
import errno
import functools
import os
import re
import stat
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from storage.atomic import open_regular
from storage.errors import BadImageError, InputError
from storage.image_source import IMAGE_SUFFIXES, MAX_IMAGE_BYTES, ImageEntry, split_of

_LIST_THREADS = 16
_FOLDERS_AT_ONCE = 32
_SLOW_SECONDS = 50e-6
"""To list one file; 5e-6 where the system has it in memory."""


def _folder_split(name: str) -> str | None:
    """`train2017` is one; `bullet_train` is a class."""
    return split_of(re.split(r"[^a-z]", name.lower(), maxsplit=1)[0])


def is_divided(subfolders: Iterable[str]) -> bool:
    """Whether the folders directly in a data set are its parts, not its classes."""
    return {"train", "eval"} <= set(map(_folder_split, subfolders))


def place_in(parts: Sequence[str], divided: bool) -> tuple[str | None, str | None]:
    """Class and part of the images in a folder, from the names of the folders that lead to it."""
    split = _folder_split(parts[0]) if divided and parts else None
    labels = parts[1:] if split else parts
    return (labels[0] if labels else None), split


def no_image_in(place: str) -> InputError:
    return InputError(
        f"no image in {place}; expected {place}/<class>/<image> with one of {', '.join(sorted(IMAGE_SUFFIXES))}"
    )


class FolderImages:
    """`root/<class>/**/<file>`, or `root/train/<class>/...` with `root/val/<class>/...`; images directly in `root` have
    no label. Keys are paths relative to `root`. Hidden files and folders are passed over."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def list_images(self) -> list[ImageEntry]:
        """Raises InputError when there is no image, or a folder that cannot be listed."""
        entries: list[ImageEntry] = []
        divided = False
        for folder in _walk(self.root):
            parts = folder.place.parts
            if not parts:
                divided = is_divided(name for name, _ in folder.subfolders)
            label, split = place_in(parts, divided)
            prefix = "".join(f"{part}/" for part in parts)
            entries += [ImageEntry(prefix + name, label, split, *found) for name, found in folder.files]
        if not entries:
            raise no_image_in(str(self.root))
        return sorted(entries, key=attrgetter("key"))

    def read_bytes(self, key: str) -> bytes:
        try:
            with open(open_regular(os.path.join(self.root, key)), "rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size > MAX_IMAGE_BYTES:
                    raise BadImageError(f"larger than {MAX_IMAGE_BYTES >> 20} MiB")
                return file.read()
        except OSError as error:
            raise BadImageError(f"cannot be read: {error.strerror}") from error


class _Identity(NamedTuple):
    """Of a folder, under whatever name."""

    device: int
    inode: int


class _Place(NamedTuple):
    """A folder to be listed."""

    parts: tuple[str, ...]
    """The names from the root to it."""
    above: frozenset[_Identity]
    """It and all folders that it lies in."""


class _Folder(NamedTuple):
    """What one folder holds."""

    place: _Place
    subfolders: list[tuple[str, _Identity]]
    files: list[tuple[str, tuple[int, int, int]]]
    """Name of an image; its size in bytes, modification time in ns and inode."""


def _walk(root: Path) -> Iterator[_Folder]:
    """The root, then all folders below. Where a file takes long to answer for, as on a network, several folders are
    listed at a time; elsewhere threads would only wait for each other."""
    with _can_be_listed(str(root)):
        found = os.stat(root)
    waiting = deque([_Place((), frozenset({_Identity(found.st_dev, found.st_ino)}))])
    is_slow = False
    with ThreadPoolExecutor(_LIST_THREADS) as pool:
        while waiting:
            places = [waiting.popleft() for _ in range(min(_FOLDERS_AT_ONCE, len(waiting)))]
            began, num_files = time.perf_counter(), 0
            for folder in (pool.map if is_slow else map)(functools.partial(_list_folder, root), places):
                num_files += len(folder.files)
                yield folder
                waiting.extend(
                    _Place((*folder.place.parts, name), folder.place.above | {identity})
                    for name, identity in folder.subfolders
                    if identity not in folder.place.above  # a link to a folder that it lies in
                )
            is_slow = is_slow or time.perf_counter() - began > _SLOW_SECONDS * max(num_files, 100)


def _list_folder(root: Path, place: _Place) -> _Folder:
    """List one folder, with one system call a file. Raises InputError."""
    folder = _Folder(place, [], [])
    path = os.path.join(root, *place.parts)
    with _can_be_listed(path), os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                found = entry.stat()
                folder.subfolders.append((entry.name, _Identity(found.st_dev, found.st_ino)))
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                try:
                    found = entry.stat()
                except OSError:  # a link to nowhere, or back to itself: an unusable image, counted with the others
                    folder.files.append((entry.name, (0, 0, 0)))
                    continue
                if stat.S_ISREG(found.st_mode):  # reading a pipe would wait for ever
                    folder.files.append((entry.name, (found.st_size, found.st_mtime_ns, found.st_ino)))
    return folder


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # as for a link to nowhere
            return False
        raise


@contextlib.contextmanager
def _can_be_listed(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"the folder {path} cannot be listed: {os.strerror(error.errno or 0)}; make it readable, or move it away"
        ) from error
