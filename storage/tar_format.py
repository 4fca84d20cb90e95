"""The WebDataset layout: a tar a shard that holds all there is of its records, and an offset index beside it.

    shards/00017.tar        members of record 000000123, in this order:
        000000123.json          key, label, class, view index, view; token positions, for a part of the tokens
        000000123.jpg           the rendered view, where the store keeps them
        000000123.stats.npy     (2, T) float32: mean and standard deviation of each token before whitening
        000000123.scale.npy     (T,) float16, for int8
        000000123.tokens.npy    (T, C) float16 or int8; compressed encodings: .tokens.zst, .tokens.blosc
    shards/00017.index.npy  one row a slot: where these lie, their crc32c, the view (`INDEX_DTYPE`)
    dataset.json            the plan, for whoever finds the tars alone

A record without tokens has no members. Names are record numbers, never image keys: those may hold dots, `../` or
anything else, and stand in the JSON. Headers carry no time and no owner, so equal records give equal bytes.
"""

import json
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.encodings import BitRound, Zstd
from storage.errors import DamagedError
from storage.files import REMEDY, Files, Piece
from storage.fingerprint import crc32c
from storage.jpeg import max_view_bytes
from storage.npy import npy_bytes, npy_header, read_npy
from storage.records import ShardEntry, StorePlan
from storage.shards import VIEW_FIELDS, Layout, PackedRecord, Pieces, ShardContent, SmallFiles, Spans, check_crc32c
from storage.tar_archive import BLOCK, TarArchive

INDEX_DTYPE = np.dtype(
    [
        ("tokens_offset", "<i8"), ("tokens_bytes", "<u4"),
        ("jpeg_offset", "<i8"), ("jpeg_bytes", "<u4"), ("jpeg_crc32c", "<u4"),
        ("stats_offset", "<i8"), ("stats_crc32c", "<u4"), ("scale_offset", "<i8"), ("scale_crc32c", "<u4"),
        *((name, "<i4") for name in VIEW_FIELDS),
    ]
)  # fmt: skip
"""Offsets are those of the values, behind a member's tar and `.npy` headers; -1 where there is none."""
NO_RECORD = np.array([(-1, 0, -1, 0, 0, -1, 0, -1, 0, *(0,) * len(VIEW_FIELDS))], INDEX_DTYPE)[0]


def tar_name(index: int) -> str:
    return f"shards/{index:05d}.tar"


def index_name(index: int) -> str:
    return f"shards/{index:05d}.index.npy"


def encode_metadata(plan: StorePlan) -> dict[str, bytes]:
    """What describes the tars to whoever finds them without this program."""
    return {"dataset.json": json.dumps({"decant": plan.to_json()}, indent=1, sort_keys=True).encode() + b"\n"}


def find_plan(files: Files) -> StorePlan | None:
    """The copy of the plan in `dataset.json`."""
    try:
        return StorePlan.model_validate(json.loads(files.read("dataset.json"))["decant"])
    except (DamagedError, ValueError, KeyError, TypeError):
        return None


def tokens_suffix(plan: StorePlan) -> str:
    """How the member with the tokens is called."""
    if isinstance(plan.encoding, Zstd):
        return "tokens.zst"
    return "tokens.blosc" if isinstance(plan.encoding, BitRound) else "tokens.npy"


# ---- writing ---------------------------------------------------------------------------------------------------------


def pack(plan: StorePlan, content: ShardContent) -> dict[str, Pieces]:
    """The tar of one shard and its index."""
    tar, first = TarArchive(), content.shard * plan.records_per_shard
    rows = np.full(plan.records_per_shard, NO_RECORD, INDEX_DTYPE)
    for slot, record in enumerate(content.records):
        if record is not None:
            rows[slot] = _pack_record(tar, f"{first + slot:09d}", record, plan, content.classes)
    return {tar_name(content.shard): tar.close(), index_name(content.shard): [npy_bytes(rows)]}


def _pack_record(
    tar: TarArchive, name: str, record: PackedRecord, plan: StorePlan, classes: tuple[str, ...]
) -> tuple[Any, ...]:
    facts = {
        "key": record.key,
        "label": record.label,
        "class": classes[record.label] if 0 <= record.label < len(classes) else None,
        "view_index": record.view_index,
        "view": dict(zip(VIEW_FIELDS, record.view_F.tolist(), strict=True)),
    }
    if plan.token_subset is not None:
        positions = plan.token_subset.positions(record.key, record.view_index, plan.features.num_tokens)
        facts["token_positions"] = positions.tolist()
    tar.add(f"{name}.json", json.dumps(facts, sort_keys=True, separators=(",", ":")).encode())
    jpeg = (-1, 0, 0)
    if record.jpeg is not None:
        jpeg = tar.add(f"{name}.jpg", record.jpeg), len(record.jpeg), crc32c(record.jpeg)
    stats_2T = np.stack([record.small["token_mean"], record.small["token_std"]]).astype("<f4")
    stats = tar.add_array(f"{name}.stats.npy", stats_2T)
    scale = (-1, 0)
    if "token_scale" in record.small:
        scale = tar.add_array(f"{name}.scale.npy", record.small["token_scale"])
    field = plan.fields["tokens"]
    header = npy_header(field.dtype, field.shape) if plan.encoding.compressor() is None else b""
    tokens = tar.add(f"{name}.{tokens_suffix(plan)}", header, record.tokens)
    return tokens, len(record.tokens), *jpeg, *stats, *scale, *record.view_F.tolist()


# ---- reading ---------------------------------------------------------------------------------------------------------


def _is_sound(rows: NDArray[Any], plan: StorePlan, tar_bytes: int) -> bool:
    """Whether an index stays inside its tar, and is one that our writer could make."""
    tokens, tokens_bytes = plan.num_kept_tokens, rows["tokens_bytes"].astype(np.int64)
    jpeg_bytes = rows["jpeg_bytes"].astype(np.int64)
    has_record = rows["tokens_offset"] != -1
    least = most = plan.fields["tokens"].num_bytes
    if plan.encoding.compressor() is not None:
        least, most = 1, 2 * most + 1024  # no compressor makes a record longer than that
    most_jpeg = max_view_bytes(plan.stored_views.px) if plan.stored_views else 0
    sizes: dict[str, tuple[bool, Any]] = {
        "tokens": (True, tokens_bytes),
        "jpeg": (plan.stored_views is not None, jpeg_bytes),
        "stats": (True, 8 * tokens),
        "scale": ("token_scale" in plan.fields, 2 * tokens),
    }
    is_sound_R = ~has_record | ((tokens_bytes >= least) & (tokens_bytes <= most))
    is_sound_R &= (jpeg_bytes <= most_jpeg) & ((jpeg_bytes > 0) == (rows["jpeg_offset"] != -1))
    for kind, (is_kept, num_bytes) in sizes.items():
        offsets = rows[f"{kind}_offset"]
        is_inside = (offsets >= BLOCK) & (offsets <= tar_bytes - num_bytes)
        is_sound_R &= np.where(has_record & is_kept, is_inside, offsets == -1)
    return bool(is_sound_R.all())


class TarShard:
    """One shard: its offset index parsed."""

    def __init__(self, plan: StorePlan, entry: ShardEntry, files: SmallFiles) -> None:
        self._plan, self._files = plan, files
        self._tar, self._name = tar_name(entry.index), index_name(entry.index)
        self._digest = entry.file(self._name).digest
        rows = self._index(keep=False)
        if not _is_sound(rows, plan, entry.file(self._tar).num_bytes):
            raise DamagedError(f"{files.files.location}/{self._name} leads out of its tar; {REMEDY}")
        lengths_R, size = rows["tokens_bytes"].copy(), plan.fields["tokens"].num_bytes
        if plan.encoding.compressor() is None:
            lengths_R = np.broadcast_to(np.uint32(size), lengths_R.shape)
        self.tokens = Spans(self._tar, rows["tokens_offset"].copy(), lengths_R, entry.crc32c_R)

    def _index(self, *, keep: bool = True) -> NDArray[Any]:
        data = self._files.read(self._name, self._digest, keep=keep)
        return read_npy(
            f"{self._files.files.location}/{self._name}", data, INDEX_DTYPE, (self._plan.records_per_shard,)
        )

    @cached_property
    def jpegs(self) -> Spans:
        """Where the rendered views lie."""
        rows = self._index(keep=False)
        offsets, lengths, checksums = (rows[name].copy() for name in ("jpeg_offset", "jpeg_bytes", "jpeg_crc32c"))
        return Spans(self._tar, offsets, lengths, checksums)

    def rows(self, name: str, slots: NDArray[np.int64]) -> NDArray[Any]:
        """Rows of a small array, from the index or from the members of each record."""
        index = self._index()[slots]
        if name == "views":
            return np.stack([index[field] for field in VIEW_FIELDS], axis=-1)
        tokens = self._plan.num_kept_tokens
        if name == "token_scale":
            return self._members("scale", index, np.empty((len(slots), tokens), "<f2"))
        stats_n2T = self._members("stats", index, np.empty((len(slots), 2, tokens), "<f4"))
        return stats_n2T[:, 0 if name == "token_mean" else 1]

    def _members(self, kind: str, index: NDArray[Any], out: NDArray[Any]) -> NDArray[Any]:
        """Read a small member of each record; the rows of holes come back as NaN."""
        tar = self._tar
        offsets, checksums = index[f"{kind}_offset"], index[f"{kind}_crc32c"]
        out[offsets < 0] = np.nan
        wanted = np.flatnonzero(offsets >= 0)
        targets = [memoryview(out[row]).cast("B") for row in wanted]
        self._files.files.read_pieces(
            [Piece(tar, int(offsets[row]), (to,), to.nbytes) for row, to in zip(wanted, targets, strict=True)]
        )
        for row, data in zip(wanted, targets, strict=True):
            check_crc32c(data, int(checksums[row]), f"a {kind} member of {self._files.files.location}/{tar}")
        return out


TAR = Layout(encode_metadata, pack, TarShard, find_plan)
