"""Tars of images (WebDataset) as a source of images."""

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from storage.errors import BadImageError, DamagedError, InputError
from storage.image_source import IMAGE_SUFFIXES, MAX_IMAGE_BYTES, ImageEntry, split_of


def _tar_split(name: str) -> str | None:
    """Tars are named `imagenet1k-validation-00.tar`: the word may stand anywhere."""
    return next(filter(None, map(split_of, re.split(r"[^a-z]+", name.lower()))), None)


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
    tar_file = tar.stat()
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
        yield ImageEntry(key, labels.get(stem) or None, split, size, tar_file.st_mtime_ns, tar_file.st_ino)


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
