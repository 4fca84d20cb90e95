"""Tars of images (WebDataset) as a source of images."""

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from storage.errors import BadImageError, DamagedError, InputError
from storage.image_source import IMAGE_SUFFIXES, MAX_IMAGE_BYTES, ImageEntry, split_of
from storage.tar_members import Member, TarMembers, TarStat, load_members, members_path, save_members


def _tar_split(name: str) -> str | None:
    """Tars are named `imagenet1k-validation-00.tar`: the word may stand anywhere."""
    return next(filter(None, map(split_of, re.split(r"[^a-z]+", name.lower()))), None)


class TarImages:
    """Tars in WebDataset's layout: members `<key>.<image suffix>` and, for the label, `<key>.cls`.

    Where the names of the tars tell `train` from `val` (or `test`), that is the division. Headers are scanned once;
    images are then read by offset. Nothing is unpacked.
    """

    def __init__(self, tars: list[Path], cache_dir: Path | None = None) -> None:
        """`cache_dir` keeps what a scan has found."""
        self.tars, self.cache_dir = tars, cache_dir
        self._members: TarMembers | None = None

    def list_images(self) -> list[ImageEntry]:
        self._members = members = self._find_members()
        is_divided = {"train", "eval"} <= {_tar_split(tar.stem) for tar in self.tars}
        splits = [_tar_split(tar.stem) if is_divided else None for tar in self.tars]
        if not len(members):
            raise InputError(
                f"no image in {len(self.tars)} tar(s) at {self.tars[0].parent}; expected <key>.jpg, <key>.cls"
            )
        classes = (*members.classes, None)  # -1 stands for the last one
        rows = zip(members.keys, *(column.tolist() for column in members.columns), strict=True)
        return [
            ImageEntry(key, classes[label], splits[tar], size, members.tars[tar].stamp, members.tars[tar].inode)
            for key, label, tar, _, size in rows
        ]

    def _find_members(self) -> TarMembers:
        """From the cache, where the tars are still the same; else by a scan."""
        stats = [TarStat.of(tar) for tar in self.tars]
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
            with open(tar, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), member.num_bytes, member.offset)
        except OSError as error:
            raise BadImageError(f"{tar.name} cannot be read: {os.strerror(error.errno or 0)}") from error
        if len(data) != member.num_bytes:
            raise BadImageError(f"{tar.name} ends {member.num_bytes - len(data)} bytes too early")
        return data


def _scan_all(tars: Sequence[Path]) -> Iterator[Member]:
    """The images of all tars. Raises what `_scan` raises."""
    earlier: dict[str, Path] = {}
    for number, tar in enumerate(tars):
        yield from _scan(tar, number, earlier)


def _scan(tar: Path, number: int, earlier: dict[str, Path]) -> Iterator[Member]:
    """The images of one tar; their keys, without suffixes, are entered into `earlier`.

    Raises:
        DamagedError: the tar is not whole.
        InputError: a key stands twice.
    """
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
                    if stem in earlier:
                        raise InputError(
                            f"the key {stem!r} stands twice: in {earlier[stem]} and as {member.name} in {tar}; "
                            "keys must be unique"
                        )
                    earlier[stem] = tar
                    found[stem] = (suffix, member.offset_data, member.size)
                elif suffix in ("cls", "cls.txt") and member.size <= 4096:
                    file = archive.extractfile(member)
                    labels[stem] = file.read().decode("utf-8", "replace").strip() if file else ""
            end = archive.offset
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DamagedError(f"{tar} is not a whole, uncompressed tar: {error}; fetch or make it again") from error
    _check_end(tar, end)
    for stem, (suffix, offset, size) in found.items():
        yield Member(f"{stem}.{suffix}", number, offset, size, labels.get(stem) or None)


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
