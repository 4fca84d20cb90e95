"""Tars of images (WebDataset) as a source of images."""

import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from storage.data_files import DataFile, LostFileError, for_each
from storage.errors import BadImageError, DamagedError, InputError
from storage.image_source import IMAGE_SUFFIXES, MAX_IMAGE_BYTES, ImageEntry, file_splits
from storage.tar_members import Member, TarMembers, TarStat, load_members, members_path, save_members


class TarImages:
    """Tars in WebDataset's layout: members `<key>.<image suffix>` and, for the label, `<key>.cls`; or tars of such
    tars, one a class, as ImageNet's archives are.

    Where the names of the tars tell `train` from `val` (or `test`), that is the division. Headers are scanned once;
    images are then read by offset. Nothing is unpacked.
    """

    def __init__(self, tars: Sequence[DataFile], cache_dir: Path | None = None) -> None:
        """`cache_dir` keeps what a scan has found."""
        self.tars, self.cache_dir = tars, cache_dir
        self._members: TarMembers | None = None

    def list_images(self) -> list[ImageEntry]:
        self._members = members = self._find_members()
        splits = file_splits([tar.name.removesuffix(".tar") for tar in self.tars])
        if not len(members):
            raise InputError(
                f"no image in {len(self.tars)} tar(s), first {self.tars[0].place}; expected <key>.jpg, <key>.cls"
            )
        classes = (*members.classes, None)  # -1 stands for the last one
        rows = zip(members.keys, *(column.tolist() for column in members.columns), strict=True)
        return [
            ImageEntry(key, classes[label], splits[tar], size, members.tars[tar].stamp, members.tars[tar].inode)
            for key, label, tar, _, size in rows
        ]

    def _find_members(self) -> TarMembers:
        """From the cache, where the tars are still the same; else by a scan."""
        stats = for_each(TarStat.of, self.tars)
        path = members_path(self.cache_dir, stats) if self.cache_dir else None
        if path and (known := load_members(path, stats)):
            return known
        members = TarMembers.of(stats, _scan_all(self.tars))
        if path and len(members):
            save_members(path, members)
        return members

    def read_bytes(self, key: str) -> bytes:
        if self._members is None:
            self._members = self._find_members()
        member = self._members.find(key)
        if member is None:
            raise BadImageError("no longer in the tars")
        if member.num_bytes > MAX_IMAGE_BYTES:
            raise BadImageError(f"larger than {MAX_IMAGE_BYTES >> 20} MiB")
        tar = self.tars[member.tar]
        try:
            (data,) = tar.read([(member.offset, member.num_bytes)])
        except LostFileError as error:
            raise BadImageError(f"{tar.name} {error.reason}") from error
        if len(data) != member.num_bytes:
            raise BadImageError(f"{tar.name} ends {member.num_bytes - len(data)} bytes too early")
        return data


class _Part(NamedTuple):
    """A tar: a file of its own, or a member of another one."""

    file: BinaryIO
    name: str
    """For messages."""
    start: int
    num_bytes: int


class _Found(NamedTuple):
    """An image in a tar."""

    member: Member
    name: str
    """Of the member itself."""
    part: str
    """The tar that it stands in, for messages."""


def _scan_all(tars: Sequence[DataFile]) -> Iterator[Member]:
    """The images of all tars, in any order.

    Raises:
        DamagedError: a tar is not whole.
        InputError: a key stands twice, or a tar cannot be read.
    """
    earlier: dict[str, str] = {}
    for found in for_each(_scan_file, tars, range(len(tars))):
        for member, name, part in found:
            stem = member.key.rpartition(".")[0]
            if stem in earlier:
                raise InputError(
                    f"the key {stem!r} stands twice: in {earlier[stem]} and as {name} in {part}; keys must be unique"
                )
            earlier[stem] = part
            yield member


def _scan_file(tar: DataFile, number: int) -> list[_Found]:
    try:
        with tar.open() as file:
            return list(_scan(_Part(file, tar.place, 0, tar.stat().num_bytes), number))
    except OSError as error:
        raise _not_whole(tar.place, error) from error


def _scan(part: _Part, number: int, outer: str | None = None) -> Iterator[_Found]:
    """Read the headers of a tar.

    A tar inside a tar is read in its place, as the archives of ImageNet are made: its images have its name in front of
    their keys and, unless they bring a label, for their class.
    """
    found: list[tuple[str, str, tarfile.TarInfo]] = []
    labels: dict[str, str] = {}
    nested: list[tuple[str, _Part]] = []
    prefix = "" if outer is None else f"{outer}/"
    try:
        with tarfile.open(fileobj=io.BufferedReader(_Window(part)), mode="r:") as archive:
            for member in archive:
                if member.size < 0:  # tarfile would go backwards, for ever
                    raise tarfile.ReadError(f"member {member.name!r} has a negative size")
                stem, suffix = split_member(member.name)
                stem = prefix + stem
                if not member.isreg() or member.issparse():
                    continue
                if f".{suffix}" in IMAGE_SUFFIXES:
                    found.append((stem, suffix, member))
                elif suffix in ("cls", "cls.txt") and member.size <= 4096:
                    file = archive.extractfile(member)
                    labels[stem] = file.read().decode("utf-8", "replace").strip() if file else ""
                elif suffix == "tar" and outer is None:
                    inner = part._replace(
                        name=f"{member.name} in {part.name}", start=member.offset_data, num_bytes=member.size
                    )
                    nested.append((stem, inner))
            end = archive.offset
    except (tarfile.TarError, OSError, EOFError) as error:
        raise _not_whole(part.name, error) from error
    _check_end(part, end)
    for stem, suffix, info in found:
        offset = part.start + info.offset_data
        image = Member(f"{stem}.{suffix}", number, offset, info.size, labels.get(stem) or outer)
        yield _Found(image, info.name, part.name)
    for stem, inner in nested:
        yield from _scan(inner, number, stem)


class _Window(io.RawIOBase):
    """A part of a file as a file, which ends where the part does."""

    def __init__(self, part: _Part) -> None:
        self._part, self._place = part, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._part.num_bytes}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        room = max(0, min(len(buffer), self._part.num_bytes - self._place))
        self._part.file.seek(self._part.start + self._place)
        data = self._part.file.read(room)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def _not_whole(name: str, error: Exception) -> DamagedError:
    return DamagedError(f"{name} is not a whole, uncompressed tar: {error}; fetch or make it again")


def _check_end(part: _Part, end: int) -> None:
    """A whole tar ends in zeros and nothing else; `tarfile` takes a cut, a damaged header or zeros inside for the end.

    Raises:
        DamagedError: says where the members stop.
    """
    remedy = "it was cut short or damaged; fetch or make it again"
    file = io.BufferedReader(_Window(part))
    file.seek(end)
    if file.read(512) != bytes(512):
        raise DamagedError(f"{part.name} has no end-of-archive mark at byte {end}: {remedy}")
    while data := file.read(2**20):
        if any(data):
            raise DamagedError(f"{part.name} goes on after its end-of-archive mark at byte {end}: {remedy}")


def split_member(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key is everything up to the first dot of the last path component."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, suffix = file.partition(".")
    return folder + slash + stem, suffix.lower()
