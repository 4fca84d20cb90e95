"""Content digests of a data set's images, taken once: only new and changed files are read again.

What is known is kept in the cache folder, with the size, modification time and inode that each file had. It is saved
now and then, so an interrupted pass goes on where it was. The cache may be deleted, or damaged, at any time.
"""

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from storage.atomic import read_regular, write_file
from storage.columns import DIGEST_BYTES, Digests, Keys, cut_columns, encode_columns, open_columns
from storage.errors import BadImageError, DamagedError, DiskError
from storage.fingerprint import digest_bytes
from storage.image_source import ImageEntry, ImageSource
from storage.schema import Schema
from storage.stage import Progress

THREADS = 16
"""Most of them wait for the disk."""
BLOCK_IMAGES = 64
SAVE_SECONDS = 30.0
"""Between two savings during a pass; more where that would take a larger share of the time than the next."""
SAVE_SHARE = 0.05
UNREADABLE = bytes(DIGEST_BYTES).hex()
"""Stands for the digest of an image that could not be read. Such an image is tried again every time."""


class _Header(Schema):
    format: Literal["decant digest cache"] = "decant digest cache"
    version: Literal[1] = 1
    num_images: int = Field(ge=0)
    key_bytes: int = Field(ge=0)


class _Known(NamedTuple):
    """Digests and the files that they were taken of."""

    keys: Keys
    stats_N3: NDArray[np.uint64]
    """Size in bytes, modification time and inode; only ever compared for equality."""
    digests_N16: NDArray[np.uint8]

    def select(self, is_taken_N: NDArray[np.bool_]) -> "_Known":
        return _Known(self.keys.select(is_taken_N), self.stats_N3[is_taken_N], self.digests_N16[is_taken_N])


def take_digests(
    source: ImageSource, entries: Sequence[ImageEntry], keys: Keys, cache_path: Path, progress: Progress
) -> Digests:
    """The digest of each image, from the cache where its file has not changed.

    Args:
        entries: in the order of `keys`.

    Raises:
        DiskError: the cache cannot be written.
    """
    images = _Known(keys, _stats(entries), np.zeros((len(entries), DIGEST_BYTES), np.uint8))
    is_known_N = _fill_known(images, _load(cache_path))
    pending = np.flatnonzero(~is_known_N).tolist()
    if not pending:
        return Digests(images.digests_N16)
    progress.start(len(entries), "images", done=len(entries) - len(pending))
    is_saved, saved_at, pause, began, num_bytes = True, time.monotonic(), SAVE_SECONDS, time.monotonic(), 0
    try:
        for block in _read_blocks(source, entries, pending):
            for position, digest in block.digests.items():
                images.digests_N16[position] = np.frombuffer(bytes.fromhex(digest), np.uint8)
                is_known_N[position], is_saved = True, False
            num_bytes += block.num_bytes
            now = time.monotonic()
            progress.advance(block.num_images, read=f"{num_bytes / 1e6 / max(1e-9, now - began):,.0f} MB/s")
            if not is_saved and now - saved_at > pause:
                _save(cache_path, images.select(is_known_N))
                is_saved, saved_at = True, time.monotonic()
                pause = max(SAVE_SECONDS, (saved_at - now) / SAVE_SHARE)
    finally:  # also when interrupted
        if not is_saved:
            _save(cache_path, images.select(is_known_N))
    return Digests(images.digests_N16)


def _stats(entries: Sequence[ImageEntry]) -> NDArray[np.uint64]:
    """File systems have times beyond the year 2262: the low 64 bits are enough to tell a change."""
    values = (value % 2**64 for entry in entries for value in (entry.num_bytes, entry.stamp, entry.inode))
    return np.fromiter(values, "<u8", 3 * len(entries)).reshape(-1, 3)


def _fill_known(images: _Known, cache: _Known | None) -> NDArray[np.bool_]:
    """Fill in the digests of files that are the same as in the cache; tells which."""
    if cache is None:
        return np.zeros(len(images.keys), np.bool_)
    rows_N = cache.keys.match(images.keys)
    is_known_N = rows_N >= 0
    is_known_N[is_known_N] = (cache.stats_N3[rows_N[is_known_N]] == images.stats_N3[is_known_N]).all(axis=1)
    images.digests_N16[is_known_N] = cache.digests_N16[rows_N[is_known_N]]
    return is_known_N


class _Block(NamedTuple):
    num_images: int
    num_bytes: int
    digests: dict[int, str]
    """Position to digest; without the unreadable images."""


def _read_blocks(source: ImageSource, entries: Sequence[ImageEntry], pending: list[int]) -> Iterator[_Block]:
    """Read and digest images in several threads, a bounded number of blocks ahead."""

    def read(block: list[int]) -> _Block:
        digests, num_bytes = {}, 0
        for position in block:
            with contextlib.suppress(BadImageError):
                data = source.read_bytes(entries[position].key)
                digests[position] = digest_bytes(data)
                num_bytes += len(data)
        return _Block(len(block), num_bytes, digests)

    blocks = (pending[first : first + BLOCK_IMAGES] for first in range(0, len(pending), BLOCK_IMAGES))
    with ThreadPoolExecutor(THREADS) as pool:
        ahead = deque(pool.submit(read, block) for block in itertools.islice(blocks, 2 * THREADS))
        try:
            while ahead:
                yield ahead.popleft().result()
                ahead.extend(pool.submit(read, block) for block in itertools.islice(blocks, 1))
        finally:
            for future in ahead:
                future.cancel()


def _load(path: Path) -> _Known | None:
    """The cache; None where there is none that can be used."""
    try:
        text, body = open_columns(path, read_regular(path))
        header = _Header.from_file(path, text)
        count = header.num_images
        lengths_N, block, stats_N3, digests_N16 = cut_columns(
            path, body,
            [("<u4", (count,)), ("u1", (header.key_bytes,)), ("<u8", (count, 3)), ("u1", (count, DIGEST_BYTES))],
        )  # fmt: skip
    except (OSError, DamagedError, DiskError):
        return None
    keys = Keys(block, lengths_N)
    return None if keys.problem() else _Known(keys, stats_N3, digests_N16)


def _save(path: Path, known: _Known) -> None:
    header = _Header(num_images=len(known.keys), key_bytes=len(known.keys.block))
    columns: list[NDArray[Any]] = [known.keys.lengths_N, known.keys.block, known.stats_N3, known.digests_N16]
    write_file(path, encode_columns(header.model_dump_json().encode(), columns))
