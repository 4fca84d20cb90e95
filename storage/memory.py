"""A store in memory: the fake for tests, and the reference that the layouts on disk are held against."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.encodings import Fields
from storage.errors import InputError
from storage.image_list import ImageList
from storage.records import BadImage, FeatureRecord, StoreManifest, StorePlan
from storage.shards import VIEW_FIELDS, small_dtypes, view_to_row
from storage.store import FeatureReader
from storage.whitening import NO_STATISTICS, Statistics


class MemoryStore(FeatureReader):
    """Plain arrays over all records."""

    def __init__(
        self, plan: StorePlan, images: ImageList, records: Iterable[FeatureRecord], bad: Iterable[BadImage] = (),
        statistics: Statistics = NO_STATISTICS,
    ) -> None:  # fmt: skip
        """`records` in any order; every image has all its views, or is one of `bad`."""
        self._images, self._statistics = images, statistics
        count, tokens = plan.num_records, plan.num_kept_tokens
        self._tokens: Fields = {
            name: np.zeros((count, *field.shape), field.dtype) for name, field in plan.fields.items()
        }
        self._small: Fields = {
            name: np.full((count, tokens), np.nan, dtype) for name, dtype in small_dtypes(plan).items()
        }
        self._small["views"] = np.zeros((count, len(VIEW_FIELDS)), np.int32)
        self._jpegs: dict[int, bytes] = {}
        self._present: set[int] = set()
        for record in records:
            self._put(plan, images.position(record.key) * plan.views_per_image + record.view_index, record)
        manifest = StoreManifest(
            plan=plan, metadata=(), receipts=("memory",) * plan.num_shards, num_records=len(self._present),
            num_bytes=sum(array.nbytes for array in self._tokens.values()), bad_images=tuple(bad),
        )  # fmt: skip
        super().__init__("memory", manifest)

    def _put(self, plan: StorePlan, number: int, record: FeatureRecord) -> None:
        for name, values in plan.encoding.encode(record.tokens_TC).items():
            self._tokens[name][number] = values
            if name in self._small:
                self._small[name][number] = values
        self._small["token_mean"][number] = record.token_mean_T
        self._small["token_std"][number] = record.token_std_T
        self._small["views"][number] = view_to_row(record.view)
        if record.jpeg is not None:
            self._jpegs[number] = record.jpeg
        self._present.add(number)

    def load_images(self) -> ImageList:
        return self._images

    def load_statistics(self) -> Statistics:
        return self._statistics

    def read_encoded(self, records_B: NDArray[np.int64], out: Mapping[str, NDArray[Any]]) -> None:
        self.locate(records_B)
        for name, field in self.plan.fields.items():
            found = out[name]
            if found.dtype != field.dtype or found.shape != (len(records_B), *field.shape):
                raise AssertionError(f"buffer {name} {found.dtype} {found.shape} for {len(records_B)} of {field}")
        for record in records_B:
            if int(record) not in self._present:
                raise self.hole(record)
        for name in self.plan.fields:
            out[name][:] = self._tokens[name][records_B]

    def read_jpegs(self, records_B: NDArray[np.int64]) -> list[bytes]:
        if self.plan.stored_views is None:
            raise InputError(f"{self.location} keeps no rendered views; render them from the images")
        self.locate(records_B)
        for record in records_B:
            if int(record) not in self._present:
                raise self.hole(record)
        return [self._jpegs[record] for record in records_B.tolist()]

    def rows(self, name: str, records_B: NDArray[np.int64]) -> NDArray[Any]:
        self.locate(records_B)
        return np.asarray(self._small[name][records_B])
