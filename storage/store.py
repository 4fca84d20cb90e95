"""What every store can be asked, whatever it lies on."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.encodings import Fields
from storage.errors import DamagedError
from storage.image_list import ImageList
from storage.records import FeatureRecord, ImageKey, StoreManifest
from storage.shards import HEIGHT, row_to_view
from storage.views import View
from storage.whitening import Statistics


class FeatureReader(ABC):
    """Random and sequential access to a store. Safe to use from several threads, and picklable."""

    def __init__(self, location: str, manifest: StoreManifest) -> None:
        self.location, self.manifest = location, manifest
        self.plan = manifest.plan

    # ---- what a layout brings ----------------------------------------------------------------------------------------

    @abstractmethod
    def load_images(self) -> ImageList:
        """Ordered keys, labels and digests of the images in the store."""

    @abstractmethod
    def read_encoded(self, records_B: NDArray[np.int64], out: Mapping[str, NDArray[Any]]) -> None:
        """Read tokens as they are stored, for decoding elsewhere with `plan.encoding`; compressed ones are
        decompressed.

        Args:
            out: C-contiguous arrays as `new_batch` makes them.

        Raises:
            DamagedError: a record is a hole, or is not what was committed.
            IndexError: the store has no such record.
        """

    @abstractmethod
    def read_jpegs(self, records_B: NDArray[np.int64]) -> list[bytes]:
        """The rendered views of records.

        Raises:
            InputError: the store keeps none.
            DamagedError: one is not what was committed.
        """

    @abstractmethod
    def rows(self, name: str, records_B: NDArray[np.int64]) -> NDArray[Any]:
        """What is stored beside the tokens: `views` (B, F) int32, `token_mean`, `token_std`, `token_scale` (B, T)."""

    @abstractmethod
    def load_statistics(self) -> Statistics:
        """What a fitted whitening learnt, checked; no rows for the others."""

    def hint(self, records_B: NDArray[np.int64], *, views: bool = False) -> None:
        """Tell the system that the tokens of these records, and their rendered views, will be read soon; returns at
        once."""
        return

    # ---- images ------------------------------------------------------------------------------------------------------

    @cached_property
    def images(self) -> ImageList:
        """Ordered keys, labels and digests of the images in the store."""
        return self.load_images()

    def record_number(self, key: str, view_index: int) -> int:
        """Position of a record in the arrays.

        Raises:
            KeyError: the store has no such image or view.
        """
        if not 0 <= view_index < self.plan.views_per_image:
            raise KeyError(f"view {view_index} of {key!r}: the store has {self.plan.views_per_image} views an image")
        return self.images.position(key) * self.plan.views_per_image + view_index

    def usable_images(self) -> NDArray[np.int64]:
        """Positions of the images that have tokens, in store order."""
        has_shard_S = np.array([bool(digest) for digest in self.manifest.receipts])
        is_usable_N = np.repeat(has_shard_S, self.plan.images_per_shard)[: self.plan.num_images]
        for bad in self.manifest.bad_images:
            is_usable_N[self.images.position(bad.key)] = False
        return np.flatnonzero(is_usable_N)

    # ---- tokens ----------------------------------------------------------------------------------------------------

    def new_batch(self, size: int, allocate: Callable[..., NDArray[Any]] = np.empty) -> Fields:
        """Buffers for the encoded tokens of `size` records, to be reused: `tokens` (B, T, C), and for int8
        `token_scale` (B, T). `allocate(shape, dtype)` may give pinned memory."""
        return {name: allocate((size, *field.shape), np.dtype(field.dtype)) for name, field in self.plan.fields.items()}

    def read_batch(self, records_B: NDArray[np.int64], out_BTC: NDArray[np.float16]) -> None:
        """Read whitened tokens into a C-contiguous (B, T, C) buffer; the same errors as `read_encoded`."""
        if out_BTC.dtype != np.float16 or out_BTC.shape != (len(records_B), *self.plan.shape_TC):
            raise AssertionError(f"buffer {out_BTC.dtype} {out_BTC.shape} for {len(records_B)} of {self.plan.shape_TC}")
        is_decoded = self.plan.fields.keys() == {"tokens"}
        fields = {"tokens": out_BTC} if is_decoded else self.new_batch(len(records_B))
        self.read_encoded(records_B, fields)
        self.plan.encoding.decode(fields, out_BTC)

    @cached_property
    def statistics(self) -> Statistics:
        """What the store's whitening learnt of a sample: see `plan.whitening`.

        Raises:
            DamagedError: it is not what was committed.
        """
        return self.load_statistics()

    def raw_tokens(self, records_B: NDArray[np.int64]) -> NDArray[np.float32]:
        """The teacher's own tokens (B, T, C): whitening undone. They are off by `whitening.restored_error` of what the
        whitened ones are off (by rounding to float16, and their encoding's `error_bound`), times the token's deviation.
        """
        tokens_BTC = np.empty((len(records_B), *self.plan.shape_TC), np.float16)
        self.read_batch(records_B, tokens_BTC)
        return self.unwhiten(tokens_BTC, records_B)

    def unwhiten(self, tokens_BTC: NDArray[np.floating], records_B: NDArray[np.int64]) -> NDArray[np.float32]:
        """The same for whitened tokens that were read already."""
        mean_BT, std_BT = self.token_statistics(records_B)
        scaled_BTC = tokens_BTC.astype(np.float32) * std_BT[..., None] + mean_BT[..., None]
        return self.plan.whitening.restore(scaled_BTC, self.statistics)

    def positions(self, records_B: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Positions (B, T) of the stored tokens among all of a view's; None where the store keeps all."""
        subset, total = self.plan.token_subset, self.plan.features.num_tokens
        if subset is None:
            return None
        images, views = np.divmod(records_B, self.plan.views_per_image)
        keys = [self.images.keys[image] for image in images.tolist()]
        return np.stack([subset.positions(key, view, total) for key, view in zip(keys, views.tolist(), strict=True)])

    # ---- what belongs to the tokens ----------------------------------------------------------------------------------

    def views(self, records_B: NDArray[np.int64]) -> list[View]:
        """The views that belong to records; the same errors as `read_encoded`."""
        rows_BF = self.rows("views", records_B)
        for record in records_B[rows_BF[:, HEIGHT] == 0]:
            raise self.hole(record)
        return [row_to_view(row_F) for row_F in rows_BF]

    def token_statistics(self, records_B: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and standard deviation, before whitening, of the stored tokens of some records, each (B, T)."""
        return self.rows("token_mean", records_B), self.rows("token_std", records_B)

    def read(self, key: ImageKey, view_index: int) -> FeatureRecord:
        """One record by name."""
        return self._record(key, view_index, self.record_number(key, view_index))

    def iter_shard(self, index: int, *, skip: int = 0) -> Iterator[FeatureRecord]:
        """The records of one shard in order, without holes; `skip` leaves out the first ones."""
        bad = {bad.key for bad in self.manifest.bad_images}
        names = [
            (ImageKey(self.images.keys[image]), view, image * self.plan.views_per_image + view)
            for image in self.plan.images_of_shard(index)
            if self.images.keys[image] not in bad
            for view in range(self.plan.views_per_image)
        ]
        for name in names[skip:]:
            yield self._record(*name)

    def _record(self, key: ImageKey, view_index: int, number: int) -> FeatureRecord:
        records_B = np.array([number])
        tokens_BTC = np.empty((1, *self.plan.shape_TC), np.float16)
        self.read_batch(records_B, tokens_BTC)
        mean_BT, std_BT = self.token_statistics(records_B)
        jpeg = self.read_jpegs(records_B)[0] if self.plan.stored_views else None
        return FeatureRecord(key, view_index, self.views(records_B)[0], tokens_BTC[0], mean_BT[0], std_BT[0], jpeg)

    def locate(self, records_B: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard and slot of records."""
        if len(records_B) and not 0 <= records_B.min() <= records_B.max() < self.plan.num_records:
            raise self.outside(records_B)
        shards_B, slots_B = np.divmod(records_B, self.plan.records_per_shard)
        return shards_B, slots_B

    def outside(self, records_B: NDArray[np.int64]) -> IndexError:
        return IndexError(f"records {records_B} of {self.location}, which has {self.plan.num_records}")

    def hole(self, record: int | np.int64) -> DamagedError:
        return DamagedError(f"record {record} of {self.location} is a hole: its image was unusable")
