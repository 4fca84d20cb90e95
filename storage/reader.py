"""Reading a store: whole records straight into the caller's buffers.

Each shard's index is parsed once; a record is then one `preadv`, checked against the receipt's crc32c when `check` says
so. Both layouts and remote stores take this path. A reader may be used from many threads, and travels to other
processes; it opens nothing before its first read.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from storage.encodings import BitRound, Encoding, Zstd
from storage.errors import DamagedError, InputError
from storage.files import REMEDY, Files, Piece
from storage.fingerprint import crc32c, digest_bytes
from storage.image_index import FILE_NAME as IMAGES_FILE
from storage.image_list import ImageList
from storage.layouts import LAYOUTS
from storage.locations import open_files
from storage.receipts import parse_receipt, receipt_name
from storage.records import StoreManifest, StorePlan, refuse_other
from storage.shards import OpenShard, SmallFiles, check_crc32c
from storage.store import FeatureReader
from storage.whitening import Statistics, load_statistics

Check = Literal["once", "always", "never"]
"""Which reads compare a record with its checksum: the first of each record, every one, or none."""


def open_store(root: Path | str, *, check: Check = "once", allow_unfinished: bool = False) -> FeatureReader:
    """Open a store by its path or URL; its manifest tells everything else.

    Args:
        check: what a damaged record costs to find. A check takes nearly as long as a read; `once` makes the first
            epochs pay, as many as there are views.
        allow_unfinished: take a store whose extraction has not ended; the images of missing shards are unusable.

    Raises:
        InputError: no store there, an unfinished one, or one of another format.
        DamagedError: the manifest cannot be read.
    """
    files = open_files(root)
    return FileReader(files, load_manifest(files, allow_unfinished=allow_unfinished), check)


def load_manifest(files: Files, *, allow_unfinished: bool = False) -> StoreManifest:
    """Read what `open_store` needs to know; it raises the same."""
    path = f"{files.location}/manifest.json"
    if files.exists("manifest.json"):
        text = files.read("manifest.json")
        refuse_other(path, text)
        manifest = StoreManifest.from_file(path, text)
        if len(manifest.receipts) != manifest.plan.num_shards:
            found = f"{len(manifest.receipts)} receipts for {manifest.plan.num_shards} shards"
            raise DamagedError(f"{path} names {found}; {manifest.remedy}")
        return manifest
    if not files.exists("plan.json"):
        raise InputError(f"{files.location} holds no store (no manifest.json)")
    if not allow_unfinished:
        raise InputError(
            f"{files.location} holds an unfinished store (no manifest.json): complete it with the command that began "
            "it, `make extract` or `make convert`"
        )
    text = files.read("plan.json")
    plan_path = f"{files.location}/plan.json"
    refuse_other(plan_path, text)
    return _manifest_so_far(files, StorePlan.from_file(plan_path, text))


def _manifest_so_far(files: Files, plan: StorePlan) -> StoreManifest:
    """A manifest of the shards that are there."""
    found = set(files.names("receipts"))
    texts = [
        files.read(receipt_name(index)) if Path(receipt_name(index)).name in found else b""
        for index in range(plan.num_shards)
    ]
    entries = [parse_receipt(files, plan, index, text) for index, text in enumerate(texts) if text]
    return StoreManifest(
        plan=plan,
        metadata=(),
        receipts=tuple(digest_bytes(text) if text else "" for text in texts),
        num_records=sum(entry.num_records for entry in entries),
        num_bytes=sum(entry.num_bytes for entry in entries),
        bad_images=tuple(bad for entry in entries for bad in entry.bad_images),
    )


class _Table(NamedTuple):
    """The token spans of a shard for reading one at a time: a memoryview gives plain integers, and at once."""

    name: str
    offsets: memoryview
    lengths: memoryview
    crc32c: memoryview


class _Fetched(NamedTuple):
    """A record's stored bytes, as they were read."""

    record: int
    name: str
    data: memoryview | bytearray
    crc32c: int
    """What its checksum should be."""


class FileReader(FeatureReader):
    """A store in files, in any layout."""

    def __init__(self, files: Files, manifest: StoreManifest, check: Check = "once") -> None:
        super().__init__(files.location, manifest)
        self.files, self.check = files, check
        self._small_files = SmallFiles(files)
        self._fields, self._compressor = self.plan.fields, self.plan.encoding.compressor()
        self._slots_a_shard = self.plan.records_per_shard
        self._shards: dict[int, OpenShard] = {}
        self._tables: dict[int, _Table] = {}
        self._is_checked = np.zeros(self.plan.num_records if check == "once" else 0, np.bool_)

    def __reduce__(self) -> tuple[Any, ...]:
        return FileReader, (self.files, self.manifest, self.check)

    def load_images(self) -> ImageList:
        path = f"{self.location}/{IMAGES_FILE}"
        data = self.files.read(IMAGES_FILE)
        images = ImageList.from_file(path, data)
        committed = [file.digest for file in self.manifest.metadata if file.name == IMAGES_FILE]  # labels included
        if images.fingerprint != self.plan.images_fingerprint or (committed and digest_bytes(data) != committed[0]):
            raise DamagedError(f"{path} is not the image list of this store (manifest.json names another); {REMEDY}")
        return images

    def load_statistics(self) -> Statistics:
        return load_statistics(self.files, self.plan.whitening, self.plan.features.channels)

    def read_encoded(self, records_B: NDArray[np.int64], out: Mapping[str, NDArray[Any]]) -> None:
        # Plain integers and one pass: at 25 us a record, numpy's fixed costs would be a tenth of the read.
        for name, field in self._fields.items():
            buffer = out[name]
            if buffer.dtype != field.dtype or buffer.shape != (len(records_B), *field.shape):
                raise AssertionError(f"buffer {name} {buffer.dtype} {buffer.shape} for {len(records_B)} of {field}")
        records = records_B.tolist()
        if not records:
            return
        if not 0 <= min(records) <= max(records) < self.plan.num_records:
            raise self.outside(records_B)
        check = self.check == "always" or (self.check == "once" and not self._is_checked[records_B].all())
        fetched: list[_Fetched] = []
        self.files.read_pieces(
            self._pieces(records, out["tokens"], fetched, keep=check or self._compressor is not None)
        )
        if check:
            for found in fetched:
                if crc32c(found.data) != found.crc32c:
                    raise DamagedError(f"record {found.record} in {self.location}/{found.name} is damaged; {REMEDY}")
            if self.check == "once":
                self._is_checked[records_B] = True
        if self._compressor is not None:
            for found, place in zip(fetched, out["tokens"], strict=True):
                where = f"record {found.record} in {self.location}/{found.name}"
                _decompress(self.plan.encoding, found.data, place.data.cast("B"), where)
        for name in self._fields.keys() - {"tokens"}:
            out[name][:] = self.rows(name, records_B)

    def _pieces(
        self, records: list[int], tokens: NDArray[Any], fetched: list[_Fetched], *, keep: bool
    ) -> Iterator[Piece]:
        """What to read, made between the reads: threads would wait for each other while a whole batch is prepared."""
        compressor, size, slots_a_shard = self._compressor, self._fields["tokens"].num_bytes, self._slots_a_shard
        memory = tokens.data.cast("B")
        for row, record in enumerate(records):
            shard, slot = divmod(record, slots_a_shard)
            table = self._tables.get(shard) or self._open_table(shard)
            offset, length = table.offsets[slot], table.lengths[slot]
            if offset < 0:
                raise self.hole(record)
            target = memory[row * size : row * size + size] if compressor is None else bytearray(length)
            if keep:
                fetched.append(_Fetched(record, table.name, target, table.crc32c[slot]))
            yield Piece(table.name, offset, (target,), length)

    def read_jpegs(self, records_B: NDArray[np.int64]) -> list[bytes]:
        if self.plan.stored_views is None:
            raise InputError(f"{self.location} keeps no rendered views; render them from the images")
        shards_B, slots_B = self.locate(records_B)
        pieces, checksums = [], []
        for record, shard, slot in zip(records_B.tolist(), shards_B.tolist(), slots_B.tolist(), strict=True):
            spans = self._shard(shard).jpegs
            if spans.offsets_R[slot] < 0:
                raise self.hole(record)
            length = int(spans.lengths_R[slot])
            pieces.append(Piece(spans.name, int(spans.offsets_R[slot]), (bytearray(length),), length))
            checksums.append(int(spans.crc32c_R[slot]))
        self.files.read_pieces(pieces)
        for record, (name, _, (data,), _), checksum in zip(records_B.tolist(), pieces, checksums, strict=True):
            check_crc32c(data, checksum, f"the view of record {record} in {self.location}/{name}")
        return [bytes(piece.targets[0]) for piece in pieces]

    def rows(self, name: str, records_B: NDArray[np.int64]) -> NDArray[Any]:
        shards_B, slots_B = self.locate(records_B)
        shards = set(shards_B.tolist()) or {0}  # no rows, but of the right shape
        parts = {shard: self._shard(shard).rows(name, slots_B[shards_B == shard]) for shard in shards}
        first = next(iter(parts.values()))
        out = np.empty((len(records_B), *first.shape[1:]), first.dtype)
        for shard, rows in parts.items():
            out[shards_B == shard] = rows
        return out

    def hint(self, records_B: NDArray[np.int64], *, views: bool = False) -> None:
        shards_B, slots_B = self.locate(records_B)
        spans = []
        for shard in np.unique(shards_B).tolist():
            opened, slots = self._shard(shard), np.sort(slots_B[shards_B == shard])
            for table in (opened.tokens, opened.jpegs) if views else (opened.tokens,):
                spans += _joined(table.name, table.offsets_R[slots].tolist(), table.lengths_R[slots].tolist())
        self.files.hint(spans)

    def _open_table(self, index: int) -> _Table:
        spans = self._shard(index).tokens
        table = _Table(spans.name, spans.offsets_R.data, spans.lengths_R.data, spans.crc32c_R.data)
        return self._tables.setdefault(index, table)

    def _shard(self, index: int) -> OpenShard:
        # threads may open a shard at the same time, which costs less than waiting for each other's reads
        return self._shards.get(index) or self._shards.setdefault(index, self._open_shard(index))

    def _open_shard(self, index: int) -> OpenShard:
        expected = self.manifest.receipts[index]
        if not expected:
            raise InputError(f"shard {index} of {self.location} is not extracted yet; run `make extract`")
        data = self.files.read(receipt_name(index))
        if digest_bytes(data) != expected:
            found = f"{self.location}/{receipt_name(index)} is not the committed receipt that manifest.json names"
            raise DamagedError(f"{found}; {REMEDY}")
        entry = parse_receipt(self.files, self.plan, index, data)
        if len(entry.crc32c_R) != self.plan.records_per_shard:
            raise DamagedError(f"{self.location}/{receipt_name(index)} has too few checksums; {REMEDY}")
        return LAYOUTS[self.plan.backend].open_shard(self.plan, entry, self._small_files)


def _decompress(encoding: Encoding, data: Any, place: memoryview, where: str) -> None:
    """Decompress one record into its place; no memory is taken for what it claims."""
    assert isinstance(encoding, Zstd | BitRound)
    found = encoding.content_bytes(data)
    if found != len(place):
        raise DamagedError(f"{where} has {found:,} bytes, expected {len(place):,}; {REMEDY}")
    codec: Any = encoding.compressor()
    try:
        codec.decode(data, out=place)
    except (RuntimeError, ValueError) as error:
        raise DamagedError(f"{where} cannot be decompressed ({error}); {REMEDY}") from error


def _joined(name: str, offsets: list[int], lengths: list[int]) -> list[tuple[str, int, int]]:
    """Neighbouring records as one span; holes are left out."""
    spans: list[tuple[str, int, int]] = []
    for offset, length in zip(offsets, lengths, strict=True):
        if offset < 0:
            continue
        if spans and 0 <= offset - (spans[-1][1] + spans[-1][2]) < 4096:  # a checksum, or headers, lie between
            spans[-1] = name, spans[-1][1], offset + length - spans[-1][1]
        else:
            spans.append((name, offset, length))
    return spans
