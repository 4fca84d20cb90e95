"""The bytes of our Zarr v3 arrays, as any Zarr library reads them.

    tokens      (R, T, C) float16   sharded: one inner chunk a record, one shard file a shard; holes are missing chunks
    token_mean  (R, T)    float32   one chunk a shard
    token_std   (R, T)    float32   one chunk a shard
    views       (R, 5)    int32     one chunk a shard: top, left, height, width, flip; all 0 for a hole

Record r is view r % K of image r // K. Every chunk and every shard index ends with its crc32c. A shard file is written
here in one pass and its index is parsed here once, because the library's own path costs 0.6 ms of CPU a record
(shard index read again for each); zarr-python creates the metadata and is the reference in the tests.

Source of the layout: the Zarr v3 `sharding_indexed` codec specification, index at the end.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from storage.errors import DamagedError
from storage.records import StorePlan

CRC_BYTES = 4
MISSING = np.uint64(2**64 - 1)
ARRAYS = ("tokens", "token_mean", "token_std", "views")
VIEW_FIELDS = ("top", "left", "height", "width", "flip")


def token_shard_name(index: int) -> str:
    return f"tokens/c/{index}/0/0"


def chunk_name(array: str, index: int) -> str:
    return f"{array}/c/{index}/0"


def encode_metadata(plan: StorePlan) -> dict[str, bytes]:
    """The metadata files of the group and its arrays. Made in memory, because zarr-python would first delete what is in
    the folder, locks and shards included."""
    import zarr
    from zarr.codecs import Crc32cCodec
    from zarr.storage import MemoryStore

    tokens, channels = plan.features.shape_TC
    records, shard = plan.num_records, plan.records_per_shard
    files: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(files), attributes={"decant": plan.to_json()})
    crc = Crc32cCodec()
    group.create_array(
        "tokens", shape=(records, tokens, channels), chunks=(1, tokens, channels), shards=(shard, tokens, channels),
        dtype="float16", compressors=crc, filters=None, fill_value=float("nan"),
    )  # fmt: skip
    for name in ("token_mean", "token_std"):
        group.create_array(
            name, shape=(records, tokens), chunks=(shard, tokens), dtype="float32", compressors=crc, filters=None,
            fill_value=float("nan"),
        )  # fmt: skip
    group.create_array(
        "views", shape=(records, len(VIEW_FIELDS)), chunks=(shard, len(VIEW_FIELDS)), dtype="int32", compressors=crc,
        filters=None, fill_value=0,
    )  # fmt: skip
    return {name: buffer.to_bytes() for name, buffer in files.items()}


def read_plan(root: Path) -> StorePlan | None:
    """The copy of the plan among the group's attributes, for when plan.json is damaged or gone."""
    try:
        return StorePlan.model_validate(json.loads((root / "zarr.json").read_bytes())["attributes"]["decant"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def crc32c(data: bytes | memoryview) -> bytes:
    return int(google_crc32c.value(bytes(data) if isinstance(data, memoryview) else data)).to_bytes(CRC_BYTES, "little")


def encode_chunk(values: NDArray[np.generic]) -> bytes:
    """One array chunk: little-endian values, then their crc32c."""
    data = np.ascontiguousarray(values).tobytes()
    return data + crc32c(data)


def decode_chunk(path: Path, data: bytes, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The inverse of `encode_chunk`.

    Raises:
        DamagedError: wrong length or checksum.
    """
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize + CRC_BYTES
    if len(data) != expected:
        raise DamagedError(f"{path} has {len(data)} bytes, expected {expected}; run `make verify`, then `make extract`")
    if crc32c(data[:-CRC_BYTES]) != data[-CRC_BYTES:]:
        raise DamagedError(f"{path} does not match its checksum; run `make verify`, then `make extract`")
    return np.frombuffer(data, dtype, count=int(np.prod(shape))).reshape(shape)


def encode_token_shard(
    tokens_RTC: NDArray[np.float16], is_present_R: NDArray[np.bool_], capacity: int
) -> Iterator[bytes]:
    """The pieces of one shard file: the present records in order, then the index over `capacity` chunk slots."""
    index = np.full((capacity, 2), MISSING, "<u8")
    offset = 0
    for slot in np.flatnonzero(is_present_R):
        record = encode_chunk(tokens_RTC[slot])
        index[slot] = offset, len(record)
        offset += len(record)
        yield record
    yield encode_chunk(index)


def index_bytes(capacity: int) -> int:
    return capacity * 16 + CRC_BYTES


def decode_shard_index(path: Path, tail: bytes, capacity: int, record_bytes: int) -> NDArray[np.int64]:
    """Byte offset of each record in its shard file; -1 for a hole.

    Raises:
        DamagedError: wrong checksum, or an index that no writer of ours makes.
    """
    index = decode_chunk(path, tail, "<u8", (capacity, 2))
    offsets, lengths = index[:, 0], index[:, 1]
    is_hole = offsets == MISSING
    if not np.array_equal(is_hole, lengths == MISSING) or np.any(lengths[~is_hole] != record_bytes + CRC_BYTES):
        raise DamagedError(f"{path} has an impossible index; run `make verify`, then `make extract`")
    return np.where(is_hole, -1, offsets).astype(np.int64)


def pad_records(values: NDArray[np.generic], capacity: int, fill: float) -> NDArray[np.generic]:
    """Extend the last shard's rows to a whole chunk, as the format wants."""
    missing = capacity - len(values)
    return np.concatenate([values, np.full((missing, *values.shape[1:]), fill, values.dtype)]) if missing else values


def is_hole_R(views_RF: NDArray[np.int32]) -> NDArray[np.bool_]:
    """A view without height holds no tokens."""
    is_hole: NDArray[np.bool_] = views_RF[:, VIEW_FIELDS.index("height")] == 0
    return is_hole
