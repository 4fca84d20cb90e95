"""Which Zarr arrays a store has: their shapes, types, chunks and meaning, and the `zarr.json` files that say so."""

import json
from typing import Any, NamedTuple

import numpy as np

from storage.encodings import BitRound, Zstd
from storage.errors import DamagedError
from storage.files import Files
from storage.jpeg import max_view_bytes
from storage.records import StorePlan
from storage.shards import VIEW_FIELDS, small_dtypes

JPEG_CHUNK_BYTES = 2**16


class ArrayMeaning(NamedTuple):
    """What an array tells about itself to other programs."""

    dimensions: tuple[str, ...]
    """Names of the axes, for libraries that join arrays by them."""
    description: str


MEANINGS = {
    "tokens": ArrayMeaning(
        ("record", "token", "channel"),
        "whitened tokens, encoded as decant.encoding says; times token_std plus token_mean they are the teacher's own",
    ),
    "token_mean": ArrayMeaning(("record", "token"), "mean over the channels of the teacher's own token"),
    "token_std": ArrayMeaning(("record", "token"), "what whitening divided the teacher's own token by"),
    "token_scale": ArrayMeaning(
        ("record", "token"), "tokens * token_scale * decant.encoding.channel_scale are the decoded tokens"
    ),
    "token_positions": ArrayMeaning(("record", "token"), "position of a stored token among all tokens of its view"),
    "views": ArrayMeaning(
        ("record", "view_field"), f"{', '.join(VIEW_FIELDS)}: a crop in source pixels, then a horizontal flip"
    ),
    "view_jpegs": ArrayMeaning(("byte",), "the rendered views as JPEG, one after the other"),
    "view_spans": ArrayMeaning(("record", "span"), "start, stop: a record's JPEG is view_jpegs[start:stop]"),
    "view_crc32c": ArrayMeaning(("record",), "crc32c of a record's JPEG"),
}


def encode_metadata(plan: StorePlan) -> dict[str, bytes]:
    """The metadata files of the group and its arrays. Made in memory, because zarr-python would first delete what is in
    the folder, locks and shards included."""
    import zarr
    from zarr.codecs import Crc32cCodec
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}
    records, shard, (tokens, channels) = plan.num_records, plan.records_per_shard, plan.shape_TC
    attributes = {"decant": json.loads(json.dumps(plan.to_json(), sort_keys=True))}  # equal plans, equal bytes
    group = zarr.create_group(MemoryStore(files), attributes=attributes)

    def create(name: str, dtype: np.dtype[Any], **how: Any) -> None:
        dimensions, description = MEANINGS[name]
        group.create_array(
            name, dtype=dtype, filters=None, fill_value=fill_value(dtype), dimension_names=dimensions,
            attributes={"description": description}, **how,
        )  # fmt: skip

    dtype = np.dtype(plan.fields["tokens"].dtype)
    create(
        "tokens", dtype, shape=(records, tokens, channels), chunks=(1, tokens, channels),
        shards=(shard, tokens, channels), compressors=(*_compressors(plan), Crc32cCodec()),
    )  # fmt: skip
    for name, (row, dtype) in small_arrays(plan).items():
        create(name, dtype, shape=(records, *row), chunks=(shard, *row), compressors=Crc32cCodec())
    if plan.stored_views is not None:
        capacity = jpeg_capacity(plan)
        create(
            "view_jpegs", np.dtype("u1"), shape=(plan.num_shards * capacity,), chunks=(JPEG_CHUNK_BYTES,),
            shards=(capacity,), compressors=None,
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


def small_arrays(plan: StorePlan) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape of a row, and type, of the arrays with one chunk a shard."""
    tokens = plan.num_kept_tokens
    arrays: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
        name: ((tokens,), np.dtype(dtype)) for name, dtype in small_dtypes(plan).items()
    }
    if plan.token_subset is not None:
        arrays["token_positions"] = ((tokens,), np.dtype("<i4"))
    arrays["views"] = ((len(VIEW_FIELDS),), np.dtype("<i4"))
    if plan.stored_views is not None:
        arrays |= {"view_spans": ((2,), np.dtype("<i8")), "view_crc32c": ((), np.dtype("<u4"))}
    return arrays


def jpeg_capacity(plan: StorePlan) -> int:
    """Bytes that a shard of `view_jpegs` spans: more than its JPEGs can ever have."""
    assert plan.stored_views is not None
    most = plan.records_per_shard * max_view_bytes(plan.stored_views.px)
    return -(-most // JPEG_CHUNK_BYTES) * JPEG_CHUNK_BYTES


def fill_value(dtype: np.dtype[Any]) -> float:
    """What holes read as."""
    return float("nan") if dtype.kind == "f" else 0


def find_plan(files: Files) -> StorePlan | None:
    """The copy of the plan among the group's attributes."""
    try:
        return StorePlan.model_validate(json.loads(files.read("zarr.json"))["attributes"]["decant"])
    except (DamagedError, ValueError, KeyError, TypeError):
        return None
