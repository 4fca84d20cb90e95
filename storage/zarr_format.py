"""The Zarr v3 layout: arrays that any Zarr library reads.

    tokens       (R, T, C)  sharded: one inner chunk a record, one shard file a shard; holes are missing chunks
    token_mean   (R, T)     one chunk a shard, as all below; float32
    token_std    (R, T)     float32
    token_scale  (R, T)     float16, for int8
    views        (R, 5)     int32: top, left, height, width, flip; all 0 for a hole
    view_jpegs   (bytes,)   uint8, sharded: the JPEGs of a shard one after the other, its unused end missing
    view_spans   (R, 2)     int64: where a record's JPEG begins and ends in `view_jpegs`
    view_crc32c  (R,)       uint32: of that JPEG

Record r is view r % K of image r // K. A token chunk, a small chunk and a shard index end with their crc32c. A shard
file is written here in one pass and its index is parsed here once, because the library's own path costs 0.6 ms of CPU a
record (it reads the shard index again for each); zarr-python creates the metadata and is the reference in the tests.

Source of the layout: the Zarr v3 `sharding_indexed` codec specification, index at the end.
"""

import json
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.encodings import BitRound, Zstd
from storage.errors import DamagedError
from storage.files import REMEDY, Files
from storage.fingerprint import crc32c_bytes
from storage.jpeg import max_view_bytes
from storage.records import ShardEntry, StorePlan
from storage.shards import VIEW_FIELDS, Layout, Pieces, ShardContent, SmallFiles, Spans, small_dtypes

CRC_BYTES = 4
MISSING = np.uint64(2**64 - 1)
JPEG_CHUNK_BYTES = 2**16


def token_shard_name(index: int) -> str:
    return f"tokens/c/{index}/0/0"


def chunk_name(array: str, index: int) -> str:
    return f"{array}/c/{index}" + ("" if array == "view_crc32c" else "/0")


def jpeg_shard_name(index: int) -> str:
    return f"view_jpegs/c/{index}"


def jpeg_capacity(plan: StorePlan) -> int:
    """Bytes that a shard of `view_jpegs` spans: more than its JPEGs can ever have."""
    assert plan.stored_views is not None
    most = plan.records_per_shard * max_view_bytes(plan.stored_views.px)
    return -(-most // JPEG_CHUNK_BYTES) * JPEG_CHUNK_BYTES


def encode_metadata(plan: StorePlan) -> dict[str, bytes]:
    """The metadata files of the group and its arrays. Made in memory, because zarr-python would first delete what is in
    the folder, locks and shards included."""
    import zarr
    from zarr.codecs import Crc32cCodec
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}
    records, shard, (tokens, channels) = plan.num_records, plan.records_per_shard, plan.shape_TC
    group = zarr.create_group(MemoryStore(files), attributes={"decant": plan.to_json()})
    dtype = np.dtype(plan.fields["tokens"].dtype)
    group.create_array(
        "tokens", shape=(records, tokens, channels), chunks=(1, tokens, channels), shards=(shard, tokens, channels),
        dtype=dtype, compressors=(*_compressors(plan), Crc32cCodec()), filters=None, fill_value=_fill(dtype),
    )  # fmt: skip
    for name, (row, row_dtype) in _small_arrays(plan).items():
        group.create_array(
            name, shape=(records, *row), chunks=(shard, *row), dtype=row_dtype, compressors=Crc32cCodec(),
            filters=None, fill_value=_fill(row_dtype),
        )  # fmt: skip
    if plan.stored_views is not None:
        capacity = jpeg_capacity(plan)
        group.create_array(
            "view_jpegs", shape=(plan.num_shards * capacity,), chunks=(JPEG_CHUNK_BYTES,), shards=(capacity,),
            dtype="uint8", compressors=None, filters=None, fill_value=0,
        )  # fmt: skip
    return {name: buffer.to_bytes() for name, buffer in files.items()}


def _compressors(plan: StorePlan) -> tuple[Any, ...]:
    """Codecs of the Zarr core, so that every library has them; the bytes are those of `encoding.compressor()`."""
    from zarr.codecs import BloscCodec, ZstdCodec

    encoding = plan.encoding
    if isinstance(encoding, Zstd):
        return (ZstdCodec(level=encoding.level),)
    if isinstance(encoding, BitRound):
        name = encoding.compressor_name
        return (BloscCodec(typesize=2, cname=name, clevel=encoding.level, shuffle="bitshuffle"),)
    return ()


def _small_arrays(plan: StorePlan) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape of a row, and type, of the arrays with one chunk a shard."""
    tokens = plan.num_kept_tokens
    arrays: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
        name: ((tokens,), np.dtype(dtype)) for name, dtype in small_dtypes(plan).items()
    }
    arrays["views"] = ((len(VIEW_FIELDS),), np.dtype("<i4"))
    if plan.stored_views is not None:
        arrays |= {"view_spans": ((2,), np.dtype("<i8")), "view_crc32c": ((), np.dtype("<u4"))}
    return arrays


def _fill(dtype: np.dtype[Any]) -> float:
    """What holes read as."""
    return float("nan") if dtype.kind == "f" else 0


def find_plan(files: Files) -> StorePlan | None:
    """The copy of the plan among the group's attributes."""
    try:
        return StorePlan.model_validate(json.loads(files.read("zarr.json"))["attributes"]["decant"])
    except (DamagedError, ValueError, KeyError, TypeError):
        return None


# ---- writing ---------------------------------------------------------------------------------------------------------


def pack(plan: StorePlan, content: ShardContent) -> dict[str, Pieces]:
    """The files of one shard."""
    capacity, index = plan.records_per_shard, content.shard
    arrays = {
        name: np.full((capacity, *row), _fill(dtype), dtype) for name, (row, dtype) in _small_arrays(plan).items()
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
    """Byte offset (-1 for a hole) and stored bytes of each record.

    Raises:
        DamagedError: wrong checksum, or an index that no writer of ours makes.
    """
    index = decode_chunk(path, data, "<u8", (plan.records_per_shard, 2))
    offsets, lengths = index[:, 0], index[:, 1]
    is_hole = offsets == MISSING
    starts, sizes = offsets[~is_hole], lengths[~is_hole]
    is_inside = (sizes > CRC_BYTES) & (sizes < 2**31) & (starts <= file_bytes) & (starts + sizes <= file_bytes)
    is_sound = np.array_equal(is_hole, lengths == MISSING) and bool(np.all(is_inside))
    if is_sound and plan.encoding.compressor() is None:
        is_sound = bool(np.all(sizes == plan.fields["tokens"].num_bytes + CRC_BYTES))
    if not is_sound:
        raise DamagedError(f"{path} has an impossible index; {REMEDY}")
    stored = np.where(is_hole, 0, lengths - np.uint64(CRC_BYTES)).astype(np.uint32)
    return np.where(is_hole, np.uint64(0), offsets).astype(np.int64) - is_hole, stored


class ZarrShard:
    """One shard: its token index parsed, its small arrays read when they are asked for."""

    def __init__(self, plan: StorePlan, entry: ShardEntry, files: SmallFiles) -> None:
        self._plan, self._entry, self._files = plan, entry, files
        name, slots = token_shard_name(entry.index), plan.records_per_shard
        tail = files.files.read_end(name, slots * 16 + CRC_BYTES)
        path = f"{files.files.location}/{name}"
        offsets, lengths = decode_token_index(path, tail, plan, entry.file(name).num_bytes)
        self.tokens = Spans(name, offsets, lengths, entry.crc32c_R)

    @cached_property
    def jpegs(self) -> Spans:
        """Where the rendered views lie."""
        slots = np.arange(self._plan.records_per_shard)
        spans, checksums = self.rows("view_spans", slots), self.rows("view_crc32c", slots)
        offsets = np.where(spans[:, 1] > 0, spans[:, 0] - self._entry.index * jpeg_capacity(self._plan), -1)
        lengths = (spans[:, 1] - spans[:, 0]).astype(np.uint32)
        return Spans(jpeg_shard_name(self._entry.index), offsets, lengths, checksums)

    def rows(self, name: str, slots: NDArray[np.int64]) -> NDArray[Any]:
        """Rows of a small array."""
        row, dtype = _small_arrays(self._plan)[name]
        data = self._files.read(self._entry, chunk_name(name, self._entry.index))
        shape = (self._plan.records_per_shard, *row)
        return np.frombuffer(data, dtype, count=int(np.prod(shape))).reshape(shape)[slots]


ZARR = Layout(encode_metadata, pack, ZarrShard, find_plan)
