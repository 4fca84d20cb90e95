"""Which Zarr arrays a store has: their shapes, types, chunks and meaning, and the `zarr.json` files that say so."""

import json
import math
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

NOT_BY_TOKEN = {
    "tokens": ArrayMeaning(
        ("record", "token", "channel"),
        "whitened tokens, encoded as decant.encoding says; decant.whitening says how to undo it, with whitening.npy",
    ),
    "token_mean": ArrayMeaning(("record", "token"), "0: tokens are not whitened one by one"),
    "token_std": ArrayMeaning(("record", "token"), "1: tokens are not whitened one by one"),
}
"""The same where the whitening is not by token."""


def encode_metadata(plan: StorePlan) -> dict[str, bytes]:
    """The metadata files of the group and its arrays. Written here, because zarr-python's differ between its versions,
    and a store must not; the tests hold them against zarr-python's all the same."""
    records, shard, (tokens, channels) = plan.num_records, plan.records_per_shard, plan.shape_TC
    meanings = MEANINGS if plan.whitening.is_per_token else MEANINGS | NOT_BY_TOKEN
    dtype = np.dtype(plan.fields["tokens"].dtype)
    codecs = [*_values(dtype), *_compressor(plan), CRC32C]
    arrays = {
        "tokens": _array(
            "tokens", dtype, (records, tokens, channels), (shard, tokens, channels),
            [_sharding((1, tokens, channels), codecs)], meanings,
        )
    }  # fmt: skip
    for name, (row, dtype) in small_arrays(plan).items():
        arrays[name] = _array(name, dtype, (records, *row), (shard, *row), [*_values(dtype), CRC32C], meanings)
    if plan.stored_views is not None:
        capacity, dtype = jpeg_capacity(plan), np.dtype("u1")
        codecs = [_sharding((JPEG_CHUNK_BYTES,), _values(dtype))]
        arrays["view_jpegs"] = _array("view_jpegs", dtype, (plan.num_shards * capacity,), (capacity,), codecs, meanings)
    group = {"attributes": {"decant": plan.to_json()}, "zarr_format": 3, "node_type": "group"}
    files = {"zarr.json": group} | {f"{name}/zarr.json": array for name, array in arrays.items()}
    texts = {name: json.dumps(value, indent=1, sort_keys=True, allow_nan=False) for name, value in files.items()}
    return {name: text.encode() for name, text in texts.items()}


CRC32C = {"name": "crc32c"}


def _array(
    name: str, dtype: np.dtype[Any], shape: tuple[int, ...], chunk: tuple[int, ...], codecs: list[Any],
    meanings: dict[str, ArrayMeaning],
) -> dict[str, Any]:  # fmt: skip
    """The metadata of one array. Source: the Zarr v3 core specification, "Array metadata"."""
    dimensions, description = meanings[name]
    fill = fill_value(dtype)
    return {
        "shape": shape,
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN" if math.isnan(fill) else fill,
        "codecs": codecs,
        "attributes": {"description": description},
        "dimension_names": dimensions,
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def _values(dtype: np.dtype[Any]) -> list[dict[str, Any]]:
    """Numbers to bytes."""
    return [{"name": "bytes"} | ({"configuration": {"endian": "little"}} if dtype.itemsize > 1 else {})]


def _sharding(inner_chunk: tuple[int, ...], codecs: list[dict[str, Any]]) -> dict[str, Any]:
    """Many inner chunks in one file, whose index is at its end."""
    index_codecs = [*_values(np.dtype("<u8")), CRC32C]
    configuration = {
        "chunk_shape": inner_chunk, "codecs": codecs, "index_codecs": index_codecs, "index_location": "end",
    }  # fmt: skip
    return {"name": "sharding_indexed", "configuration": configuration}


def _compressor(plan: StorePlan) -> list[dict[str, Any]]:
    """A codec of the Zarr core, so that every library has it; the bytes are those of `encoding.compressor()`."""
    encoding = plan.encoding
    if isinstance(encoding, Zstd):
        return [{"name": "zstd", "configuration": {"level": encoding.level, "checksum": False}}]
    if isinstance(encoding, BitRound):
        blosc = {"typesize": 2, "cname": encoding.compressor_name, "clevel": encoding.level, "shuffle": "bitshuffle"}
        return [{"name": "blosc", "configuration": blosc | {"blocksize": 0}}]
    return []


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
