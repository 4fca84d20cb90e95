"""Data sets behind a URL: what lies in a folder there, files of many images, and class folders."""

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from operator import attrgetter
from typing import Any, BinaryIO, NamedTuple, cast
from urllib.parse import quote, unquote, urlsplit

from storage.answers import MissingObjectError
from storage.connect import CONCURRENT, EXTRAS
from storage.data_files import FileStat, LostFileError
from storage.errors import BadImageError, ConfigError, InputError
from storage.fingerprint import digest_bytes
from storage.image_folder import is_divided, no_image_in, place_in
from storage.image_source import IMAGE_SUFFIXES, MAX_IMAGE_BYTES, ImageEntry
from storage.remote import JOIN_GAP_BYTES, RemoteFiles, Span

BLOCK_BYTES = 8 * 2**20
"""Longer spans come through several connections."""
_LISTING_BYTES = 10**9
"""What a listing may be: 1.28 M names are a few hundred MB."""
_MAX_DEPTH = 8
"""Of folders: a server can make up any number of them."""
_TAGS = ("ETag", "etag", "generation", "LastModified", "Last-Modified", "mtime", "updated")
"""What tells a change of an object, best first."""


def open_folder(url: str) -> RemoteFiles:
    """What lies below a URL.

    Raises:
        ConfigError: a URL that holds a password, which would be written into settings and lists, or a query.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise ConfigError(
            f"the URL of the data at {parts.netloc.rpartition('@')[2]} holds a user name or a password, which files of "
            "settings would show; put them where the server's library looks for them (~/.netrc, AWS_PROFILE)"
        )
    return RemoteFiles(url)


class Listing(NamedTuple):
    """What lies directly in a folder."""

    folders: list[str]
    files: dict[str, FileStat | None]
    """By name; None where a listing does not tell."""


def list_folder(files: RemoteFiles, folder: str) -> Listing:
    """Raises InputError where there is no such folder, or the server has no listings."""
    base = files.path(_quoted(files, folder)).rstrip("/")
    try:
        found = files.ask(
            folder, lambda system, seconds: system.ls(f"{base}/", detail=True, timeout=seconds), _LISTING_BYTES
        )  # fmt: skip
    except MissingObjectError as error:
        raise InputError(f"no such data: {files.location}/{folder} ({_listable(files)})") from error
    listing = Listing([], {})
    for entry in found:
        where, _, name = str(entry["name"]).rstrip("/").rpartition("/")
        is_link = _is_http(files)
        if where.rpartition("://")[2] != base.rpartition("://")[2] or (is_link and set(name) & set("?#")):
            continue  # links of a page that lead elsewhere; the folder itself
        name = unquote(name) if is_link else name
        if name.startswith(".") or "/" in name:
            continue
        if entry["type"] == "directory":
            listing.folders.append(name)
        else:
            listing.files[name] = None if entry["size"] is None else _stat(entry)
    return Listing(sorted(listing.folders), dict(sorted(listing.files.items())))


def match_files(files: RemoteFiles, names: Sequence[str]) -> list["RemoteFile"]:
    """Files by their names, of which those with `*` are looked up in a listing."""
    listed = list_folder(files, "").files if any("*" in name for name in names) else {}
    found: dict[str, RemoteFile] = {}
    for name in names:
        matching = [other for other in listed if fnmatchcase(other, name)] if "*" in name else [name]
        if not matching:
            raise InputError(f"no file matches {files.location}/{name}; check the URL and the range of numbers")
        found |= {match: RemoteFile(files, match) for match in matching}
    return [found[name] for name in sorted(found)]


class RemoteFile:
    """A file of many images behind a URL."""

    def __init__(self, files: RemoteFiles, name: str) -> None:
        """`name`: below `files`."""
        self.files, self._path = files, _quoted(files, name)
        self.place, self.name = f"{files.location}/{name}", name.rpartition("/")[2]
        self.identity = self.place.encode()

    def stat(self) -> FileStat:
        """Asked for each time, so that a change is noticed. Raises LostFileError where there is no such file."""
        info = self.files.info(self._path)
        if info is None:
            raise LostFileError(self.place, "is missing")
        return _stat(info)

    def open(self) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(_Ahead(self, self.stat().num_bytes)))

    def read(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, size), by ranges; fewer where the file ends.

        Raises:
            LostFileError: it is gone.
            InputError: the server refuses, or cannot be reached.
        """
        blocks = [[Span(self._path, *block) for block in _blocks(*span)] for span in spans]
        wanted = [block for span in blocks for block in span]
        try:
            found = self.files.fetch(wanted) if wanted else {}
        except MissingObjectError as error:
            raise LostFileError(self.place, "is missing") from error
        return [b"".join(found[block] for block in span) for span in blocks]


class _Ahead(io.RawIOBase):
    """A file that is read from header to header: what follows a header, as far as that costs nothing, comes with it."""

    def __init__(self, file: RemoteFile, num_bytes: int) -> None:
        self._file, self._num_bytes, self._place = file, num_bytes, 0
        self._start, self._block = 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._num_bytes}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        inside = self._place - self._start
        if not 0 <= inside < len(self._block):
            ahead = min(max(len(buffer), JOIN_GAP_BYTES), self._num_bytes - self._place)
            self._start, inside = self._place, 0
            self._block = self._file.read([(self._place, ahead)])[0] if ahead > 0 else b""
        data = self._block[inside : inside + len(buffer)]
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


class RemoteImages:
    """Class folders behind a URL, divided and labelled as those on a disk are."""

    def __init__(self, files: RemoteFiles) -> None:
        self.files = files

    def list_images(self) -> list[ImageEntry]:
        """Raises InputError where there is no image, or a folder that cannot be listed."""
        entries: list[ImageEntry] = []
        divided = False
        with ThreadPoolExecutor(CONCURRENT // 2) as pool:
            for parts, listing in self._walk(pool):
                divided = is_divided(listing.folders) if not parts else divided
                label, split = place_in(parts, divided)
                keys = ["/".join((*parts, name)) for name in listing.files if _is_image(name)]
                stats = pool.map(self._stat, keys, (listing.files[key.rpartition("/")[2]] for key in keys))
                entries += [ImageEntry(key, label, split, *stat) for key, stat in zip(keys, stats, strict=True)]
        if not entries:
            raise no_image_in(self.files.location)
        return sorted(entries, key=attrgetter("key"))

    def _walk(self, pool: ThreadPoolExecutor) -> Iterator[tuple[tuple[str, ...], Listing]]:
        """The root, then all folders below."""
        level: list[tuple[str, ...]] = [()]
        for _ in range(_MAX_DEPTH):
            listings = list(pool.map(lambda parts: list_folder(self.files, "/".join(parts)), level))
            yield from zip(level, listings, strict=True)
            level = [(*parts, name) for parts, found in zip(level, listings, strict=True) for name in found.folders]
        if level:
            raise InputError(f"{self.files.location}/{'/'.join(level[0])} lies more than {_MAX_DEPTH} folders deep")

    def _stat(self, key: str, known: FileStat | None) -> FileStat:
        """As a listing tells it, or the server; of an object that is gone since, nothing."""
        info = None if known else self.files.info(_quoted(self.files, key))
        return known or (_stat(info) if info else FileStat(0, 0, 0))

    def read_bytes(self, key: str) -> bytes:
        """Raises InputError where it is the server that cannot be reached."""
        span = Span(_quoted(self.files, key), 0, MAX_IMAGE_BYTES + 1)
        try:
            data = self.files.fetch([span])[span]
        except MissingObjectError as error:
            raise BadImageError("cannot be read: no such object") from error
        if len(data) > MAX_IMAGE_BYTES:
            raise BadImageError(f"larger than {MAX_IMAGE_BYTES >> 20} MiB")
        return data


def _blocks(offset: int, num_bytes: int) -> Iterator[tuple[int, int]]:
    """Start and end of parts that are fetched at a time."""
    end = offset + num_bytes
    return ((start, min(start + BLOCK_BYTES, end)) for start in range(offset, end, BLOCK_BYTES))


def _stat(info: dict[str, Any]) -> FileStat:
    tag = next((str(info[name]) for name in _TAGS if info.get(name)), "")
    return FileStat(int(info["size"]), int(digest_bytes(tag.strip('"').encode())[:15], 16), 0)


def _is_image(name: str) -> bool:
    stem, dot, suffix = name.rpartition(".")
    return bool(stem) and dot + suffix.lower() in IMAGE_SUFFIXES


def _is_http(files: RemoteFiles) -> bool:
    return EXTRAS[files.scheme] == "http"


def _quoted(files: RemoteFiles, name: str) -> str:
    """A name as it stands in a URL; object stores take names as they are."""
    return quote(name) if _is_http(files) else name


def _listable(files: RemoteFiles) -> str:
    if _is_http(files):
        return "over http a folder is listed only where the server has a page of it; name the files: x-{000..009}.tar"
    return "nothing lies there; check the bucket and the folder"
