"""The Zarr v3 layout: arrays that any Zarr library reads.

    tokens       (R, T, C)  sharded: one inner chunk a record, one shard file a shard; holes are missing chunks
    token_mean   (R, T)     one chunk a shard, as all below; float32
    token_std    (R, T)     float32
    token_scale  (R, T)     float16, for int8
    token_positions (R, T)  int32, for a store of a part of the tokens: which of a view's tokens these are
    views        (R, 5)     int32: top, left, height, width, flip; all 0 for a hole
    view_jpegs   (bytes,)   uint8, sharded: the JPEGs of a shard one after the other, its unused end missing
    view_spans   (R, 2)     int64: where a record's JPEG begins and ends in `view_jpegs`
    view_crc32c  (R,)       uint32: of that JPEG

Record r is view r % K of image r // K. A token chunk, a small chunk and a shard index end with their crc32c. A shard
file is written here in one pass and its index is parsed here once, because the library's own path costs 0.6 ms of CPU a
record (it reads the shard index again for each); zarr-python and tensorstore are the reference in the tests.

Source of the layout: the Zarr v3 `sharding_indexed` codec specification, index at the end; see docs/format.md.
"""

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import DamagedError
from storage.files import REMEDY
from storage.fingerprint import crc32c_bytes
from storage.jpeg import max_view_bytes
from storage.records import ShardEntry, StorePlan
from storage.shards import Layout, Pieces, ShardContent, SmallFiles, Spans
from storage.zarr_metadata import (
    JPEG_CHUNK_BYTES,
    encode_metadata,
    fill_value,
    find_plan,
    jpeg_capacity,
    small_arrays,
)

CRC_BYTES = 4
MISSING = np.uint64(2**64 - 1)


def token_shard_name(index: int) -> str:
    return f"tokens/c/{index}/0/0"


def chunk_name(array: str, index: int) -> str:
    return f"{array}/c/{index}" + ("" if array == "view_crc32c" else "/0")


def jpeg_shard_name(index: int) -> str:
    return f"view_jpegs/c/{index}"


# ---- writing ---------------------------------------------------------------------------------------------------------


def pack(plan: StorePlan, content: ShardContent) -> dict[str, Pieces]:
    """The files of one shard."""
    capacity, index = plan.records_per_shard, content.shard
    arrays = {
        name: np.full((capacity, *row), fill_value(dtype), dtype) for name, (row, dtype) in small_arrays(plan).items()
    }
    tokens = _ShardFile(capacity)
    jpegs: Pieces = []
    jpeg_end = index * jpeg_capacity(plan) if plan.stored_views else 0
    for slot, record in enumerate(content.records):
        if record is None:
            continue
        tokens.add(slot, record.tokens, record.crc32c.to_bytes(CRC_BYTES, "little"))
        arrays["views"][slot] = record.view_F
        for name, values in record.small.items():
            arrays[name][slot] = values
        if plan.token_subset is not None:
            positions = plan.token_subset.positions(record.key, record.view_index, plan.features.num_tokens)
            arrays["token_positions"][slot] = positions
        if record.jpeg is not None:
            jpegs.append(record.jpeg)
            arrays["view_spans"][slot] = jpeg_end, jpeg_end + len(record.jpeg)
            arrays["view_crc32c"][slot] = int.from_bytes(crc32c_bytes(record.jpeg), "little")
            jpeg_end += len(record.jpeg)
    packed = {token_shard_name(index): tokens.close()}
    packed |= {chunk_name(name, index): encode_chunk(values) for name, values in arrays.items()}
    if plan.stored_views is not None:
        packed[jpeg_shard_name(index)] = _pack_jpegs(jpegs, jpeg_capacity(plan))
    return packed


class _ShardFile:
    """A sharded chunk under construction: parts one after the other, then the index over all slots."""

    def __init__(self, slots: int) -> None:
        self.pieces: Pieces = []
        self.index = np.full((slots, 2), MISSING, "<u8")
        self.offset = 0

    def add(self, slot: int, *parts: bytes | memoryview) -> None:
        num_bytes = sum(map(len, parts))
        self.index[slot] = self.offset, num_bytes
        self.offset += num_bytes
        self.pieces += parts

    def close(self) -> Pieces:
        return self.pieces + encode_chunk(self.index)


def _pack_jpegs(jpegs: Pieces, capacity: int) -> Pieces:
    """JPEGs end to end, cut into inner chunks without a checksum between them; the last one is filled up with zeros."""
    num_bytes = sum(map(len, jpegs))
    file = _ShardFile(capacity // JPEG_CHUNK_BYTES)
    chunks = -(-num_bytes // JPEG_CHUNK_BYTES)
    for slot in range(chunks):
        file.index[slot] = slot * JPEG_CHUNK_BYTES, JPEG_CHUNK_BYTES
    file.pieces = [*jpegs, bytes(chunks * JPEG_CHUNK_BYTES - num_bytes)]
    return file.close()


def encode_chunk(values: NDArray[Any]) -> Pieces:
    """One array chunk: little-endian values, then their crc32c."""
    data = np.ascontiguousarray(values).tobytes()
    return [data, crc32c_bytes(data)]


# ---- reading ---------------------------------------------------------------------------------------------------------


def decode_chunk(path: str, data: bytes, dtype: str | np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The inverse of `encode_chunk`.

    Raises:
        DamagedError: wrong length or checksum.
    """
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize + CRC_BYTES
    if len(data) != expected:
        raise DamagedError(f"{path} has {len(data)} bytes, expected {expected}; {REMEDY}")
    if crc32c_bytes(memoryview(data)[:-CRC_BYTES]) != data[-CRC_BYTES:]:
        raise DamagedError(f"{path} does not match its checksum; {REMEDY}")
    return np.frombuffer(data, dtype, count=int(np.prod(shape))).reshape(shape)


def decode_token_index(
    path: str, data: bytes, plan: StorePlan, file_bytes: int
) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """Byte offset (-1 for a hole) and stored bytes (any number for a hole) of each record.

    Raises:
        DamagedError: wrong checksum, or an index that no writer of ours makes.
    """
    index = decode_chunk(path, data, "<u8", (plan.records_per_shard, 2))
    offsets, lengths = index[:, 0], index[:, 1]
    is_hole = offsets == MISSING
    starts, sizes = offsets[~is_hole], lengths[~is_hole]
    most = 2 * plan.fields["tokens"].num_bytes + 1024  # no compressor makes a record longer than that
    is_inside = (sizes > CRC_BYTES) & (sizes <= most) & (starts <= file_bytes) & (starts + sizes <= file_bytes)
    is_sound = np.array_equal(is_hole, lengths == MISSING) and bool(np.all(is_inside))
    if is_sound and plan.encoding.compressor() is None:
        is_sound = bool(np.all(sizes == plan.fields["tokens"].num_bytes + CRC_BYTES))
    if not is_sound:
        raise DamagedError(f"{path} has an impossible index; {REMEDY}")
    if plan.encoding.compressor() is None:
        stored = np.broadcast_to(np.uint32(plan.fields["tokens"].num_bytes), is_hole.shape)
    else:
        stored = np.where(is_hole, 0, lengths - np.uint64(CRC_BYTES)).astype(np.uint32)
    return np.where(is_hole, np.uint64(0), offsets).astype(np.int64) - is_hole, stored


class ZarrShard:
    """One shard: its token index parsed, its small arrays read when they are asked for."""

    def __init__(self, plan: StorePlan, entry: ShardEntry, files: SmallFiles) -> None:
        self._plan, self._files, self._index = plan, files, entry.index
        self._arrays = small_arrays(plan)
        self._digests = {file.name: file.digest for file in entry.files}  # the entry itself takes much more memory
        self._jpeg_bytes = entry.file(jpeg_shard_name(entry.index)).num_bytes if plan.stored_views else 0
        name, slots = token_shard_name(entry.index), plan.records_per_shard
        tail = files.files.read_end(name, slots * 16 + CRC_BYTES)
        path = f"{files.files.location}/{name}"
        offsets, lengths = decode_token_index(path, tail, plan, entry.file(name).num_bytes)
        is_hole_R = offsets < 0  # the checksum of a hole is 0
        is_sound = len(entry.crc32c_R) == slots and np.count_nonzero(~is_hole_R) == entry.num_records
        if not is_sound or np.any(is_hole_R & (entry.crc32c_R != 0)):
            raise DamagedError(f"{path} has records and holes in other places than its receipt; {REMEDY}")
        self.tokens = Spans(name, offsets, lengths, entry.crc32c_R)

    @cached_property
    def jpegs(self) -> Spans:
        """Where the rendered views lie.

        Raises:
            DamagedError: not inside their file.
        """
        views = self._plan.stored_views
        assert views is not None
        slots = np.arange(self._plan.records_per_shard)
        spans, checksums = self.rows("view_spans", slots), self.rows("view_crc32c", slots)
        (starts, stops), name = spans.T, jpeg_shard_name(self._index)
        first, is_hole = self._index * jpeg_capacity(self._plan), stops == 0
        is_inside = (first <= starts) & (starts < stops) & (stops <= first + self._jpeg_bytes)
        if not np.all(is_hole | (is_inside & (stops - starts <= max_view_bytes(views.px)))):
            raise DamagedError(f"{self._files.files.location}/{name}: view_spans lead out of it; {REMEDY}")
        offsets, lengths = np.where(is_hole, -1, starts - first), np.where(is_hole, 0, stops - starts)
        return Spans(name, offsets, lengths.astype(np.uint32), checksums)

    def _digest(self, file: str) -> str:
        if file not in self._digests:
            raise DamagedError(f"the receipt of shard {self._index} names no {file}; {ShardEntry.remedy}")
        return self._digests[file]

    def rows(self, name: str, slots: NDArray[np.int64]) -> NDArray[Any]:
        """Rows of a small array."""
        row, dtype = self._arrays[name]
        file = chunk_name(name, self._index)
        data = self._files.read(file, self._digest(file))  # so its own crc32c needs no look
        shape = (self._plan.records_per_shard, *row)
        if len(data) != int(np.prod(shape)) * dtype.itemsize + CRC_BYTES:
            raise DamagedError(f"{self._files.files.location}/{file} is no chunk of {shape} {dtype}; {REMEDY}")
        return np.frombuffer(data, dtype, count=int(np.prod(shape))).reshape(shape)[slots]


ZARR = Layout(encode_metadata, pack, ZarrShard, find_plan)
