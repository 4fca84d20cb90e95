"""Reading a store: whole records straight into the caller's buffer.

Each shard's index is parsed once; a record is then one `pread`, checked against its crc32c. No memory map: cold random
reads through one are five times slower.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from storage import zarr_format
from storage.errors import DamagedError, InputError
from storage.image_index import ImageList
from storage.records import FeatureRecord, ImageKey, StoreManifest, refuse_newer
from storage.views import View
from storage.zarr_format import CRC_BYTES


class _Shard(NamedTuple):
    path: Path
    offsets_R: NDArray[np.int64]
    views_RF: NDArray[np.int32]


def open_store(root: Path) -> "FeatureReader":
    """Open a finished store; its manifest tells everything else.

    Raises:
        InputError: no store there, an unfinished one, or one of a newer format.
        DamagedError: the manifest cannot be read.
    """
    return FeatureReader(root, load_manifest(root))


def load_manifest(root: Path) -> StoreManifest:
    """Read what `open_store` needs to know; it raises the same."""
    path = root / "manifest.json"
    if not path.exists():
        state = (
            "an unfinished store: run `make extract` to complete it" if (root / "plan.json").exists() else "no store"
        )
        raise InputError(f"{root} holds {state} (no manifest.json)")
    text = path.read_bytes()
    refuse_newer(path, text)
    return StoreManifest.from_file(path, text)


@contextlib.contextmanager
def _missing_is_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedError(f"{path} is missing; run `make verify`, then `make extract`") from error


class FeatureReader:
    """Random and sequential access to a finished store. Safe to use from several threads."""

    def __init__(self, root: Path, manifest: StoreManifest) -> None:
        self.root, self.manifest = root, manifest
        self.plan = manifest.plan
        self._shards: dict[int, _Shard] = {}
        self._lock = threading.Lock()

    @cached_property
    def images(self) -> ImageList:
        """Ordered keys, labels and digests of the images in the store."""
        path = self.root / "images.json"
        with _missing_is_damage(path):
            images = ImageList.from_file(path, path.read_bytes())
        if images.fingerprint != self.plan.images_fingerprint:
            raise DamagedError(f"{path} is not the image list of this store; run `make verify`, then `make extract`")
        return images

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {key: position for position, key in enumerate(self.images.keys)}

    def record_number(self, key: str, view_index: int) -> int:
        """Position of a record in the arrays.

        Raises:
            KeyError: the store has no such image or view.
        """
        if not 0 <= view_index < self.plan.views_per_image:
            raise KeyError(f"view {view_index} of {key!r}: the store has {self.plan.views_per_image} views an image")
        return self._positions[key] * self.plan.views_per_image + view_index

    def usable_images(self) -> NDArray[np.int64]:
        """Positions of the images that have tokens, in store order."""
        bad = {bad.key for bad in self.manifest.bad_images}
        return np.array([p for p, key in enumerate(self.images.keys) if key not in bad], np.int64)

    def read_batch(self, records_B: NDArray[np.int64], out_BTC: NDArray[np.float16]) -> None:
        """Read whitened tokens into a C-contiguous (B, T, C) buffer.

        Raises:
            DamagedError: a record is a hole or does not match its checksum.
            IndexError: the store has no such record.
        """
        record_bytes = self.plan.features.record_bytes
        if out_BTC.dtype != np.float16 or out_BTC.shape != (len(records_B), *self.plan.features.shape_TC):
            raise AssertionError(f"buffer {out_BTC.dtype} {out_BTC.shape} for {len(records_B)} of {self.plan.features}")
        shards_B, slots_B = self._locate(records_B)
        for shard_number in np.unique(shards_B):
            shard = self._shard(int(shard_number))
            with _missing_is_damage(shard.path):
                descriptor = os.open(shard.path, os.O_RDONLY)
            try:
                for position in np.flatnonzero(shards_B == shard_number):
                    offset = int(shard.offsets_R[slots_B[position]])
                    if offset < 0:
                        raise self._hole(records_B[position])
                    crc = bytearray(CRC_BYTES)
                    target = memoryview(out_BTC[position]).cast("B")
                    got = os.preadv(descriptor, [target, crc], offset)
                    if got != record_bytes + CRC_BYTES or zarr_format.crc32c(target) != crc:
                        raise DamagedError(
                            f"record {records_B[position]} in {shard.path} does not match its checksum; "
                            "run `make verify` to find all damage, then `make extract` to repair it"
                        )
            finally:
                os.close(descriptor)

    def views(self, records_B: NDArray[np.int64]) -> list[View]:
        """The views that belong to records; the same errors as `read_batch`."""
        views = []
        for record, shard, slot in zip(records_B, *self._locate(records_B), strict=True):
            top, left, height, width, flip = self._shard(int(shard)).views_RF[slot].tolist()
            if height == 0:
                raise self._hole(record)
            views.append(View(top=top, left=left, height=height, width=width, flip=bool(flip)))
        return views

    def statistics(self, shard: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and standard deviation of every token before whitening, each (records, T)."""
        shape = (self.plan.records_per_shard, self.plan.features.num_tokens)
        mean, std = (self._small(array, shard, "<f4", shape) for array in ("token_mean", "token_std"))
        return mean, std

    def token_statistics(self, records_B: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and standard deviation, before whitening, of the tokens of some records, each (B, T)."""
        shards_B, slots_B = self._locate(records_B)
        loaded = {int(shard): self.statistics(int(shard)) for shard in np.unique(shards_B)}
        pairs = [[part[slot] for part in loaded[int(shard)]] for shard, slot in zip(shards_B, slots_B, strict=True)]
        mean_BT, std_BT = (np.stack(part) for part in zip(*pairs, strict=True))
        return mean_BT, std_BT

    def read(self, key: ImageKey, view_index: int) -> FeatureRecord:
        """One record by name."""
        number = np.array([self.record_number(key, view_index)])
        shard, slot = divmod(int(number[0]), self.plan.records_per_shard)
        tokens_BTC = np.empty((1, *self.plan.features.shape_TC), np.float16)
        self.read_batch(number, tokens_BTC)
        mean, std = self.statistics(shard)
        return FeatureRecord(key, view_index, self.views(number)[0], tokens_BTC[0], mean[slot], std[slot])

    def iter_shard(self, index: int, *, skip: int = 0) -> Iterator[FeatureRecord]:
        """The records of one shard in order, without holes; `skip` leaves out the first ones."""
        bad = {bad.key for bad in self.manifest.shards[index].bad_images}
        names = (
            (ImageKey(self.images.keys[position]), view)
            for position in self.plan.images_of_shard(index)
            if self.images.keys[position] not in bad
            for view in range(self.plan.views_per_image)
        )
        for number, (key, view) in enumerate(names):
            if number >= skip:
                yield self.read(key, view)

    def _locate(self, records_B: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard and slot of records."""
        if np.any((records_B < 0) | (records_B >= self.plan.num_records)):
            raise IndexError(f"records {records_B} of {self.root}, which has {self.plan.num_records}")
        shards_B, slots_B = np.divmod(records_B, self.plan.records_per_shard)
        return shards_B, slots_B

    def _hole(self, record: np.int64) -> DamagedError:
        return DamagedError(f"record {record} of {self.root} is a hole: its image was unusable")

    def _shard(self, index: int) -> _Shard:
        shard = self._shards.get(index)
        if shard is None:
            with self._lock:
                shard = self._shards.setdefault(index, self._load_shard(index))
        return shard

    def _load_shard(self, index: int) -> _Shard:
        path = self.root / zarr_format.token_shard_name(index)
        capacity = self.plan.records_per_shard
        tail_bytes = zarr_format.index_bytes(capacity)
        with _missing_is_damage(path), open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - tail_bytes))
            tail = file.read()
        offsets = zarr_format.decode_shard_index(path, tail, capacity, self.plan.features.record_bytes)
        views = self._small("views", index, "<i4", (capacity, len(zarr_format.VIEW_FIELDS)))
        return _Shard(path, offsets, views)

    def _small(self, array: str, shard: int, dtype: str, shape: tuple[int, int]) -> NDArray[Any]:
        path = self.root / zarr_format.chunk_name(array, shard)
        with _missing_is_damage(path):
            data = path.read_bytes()
        return zarr_format.decode_chunk(path, data, dtype, shape)
