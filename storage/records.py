"""The nouns of the store: views, tokens, shards, plan and manifest.

Letters in names: B batch, R records, T tokens (prefix tokens such as CLS first, then the grid row by row), C channels,
H and W pixels, N images, K views an image.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NewType, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field as Setting
from pydantic import StringConstraints

from storage.encodings import AnyEncoding, Field, Fp16
from storage.errors import DamagedError, InputError
from storage.fingerprint import digest_json, digest_pieces
from storage.schema import Schema, Sealed, unsealed
from storage.token_subset import TokenSubset
from storage.views import View
from storage.whitening import AnyWhitening

FORMAT_VERSION = 2
"""Of the store's layout on disk, see docs/format.md; a reader refuses a newer one. Format 1 was never released."""

Backend = Literal["zarr", "wds", "memory"]
"""Layouts: sharded Zarr arrays, WebDataset tars, and arrays in memory."""

ImageKey = NewType("ImageKey", str)
"""Names an image inside its data set; never an index."""


class FeatureSpec(Schema):
    """The shape of one view's tokens."""

    teacher: str
    num_prefix_tokens: int = Setting(ge=0)
    """CLS and registers, in front of the grid."""
    grid_hw: tuple[int, int]
    channels: int = Setting(ge=1)

    @property
    def num_tokens(self) -> int:
        return self.num_prefix_tokens + self.grid_hw[0] * self.grid_hw[1]

    @property
    def shape_TC(self) -> tuple[int, int]:
        return self.num_tokens, self.channels

    @property
    def record_bytes(self) -> int:
        """Bytes of all tokens of one view as fp16."""
        return 2 * self.num_tokens * self.channels


class FeatureRecord(NamedTuple):
    """The whitened tokens of one view; `tokens_TC * std + mean` are the teacher's own. T counts the tokens that the
    store keeps: all of them, or those of its `TokenSubset`."""

    key: ImageKey
    view_index: int
    view: View
    tokens_TC: NDArray[np.float16]
    token_mean_T: NDArray[np.float32]
    token_std_T: NDArray[np.float32]
    jpeg: bytes | None = None
    """The rendered view as the teacher saw it, where the store keeps it."""


class StoredViews(Schema):
    """How a store keeps the rendered views."""

    px: int
    """Side, the teacher's input size."""
    codec: dict[str, Any]
    """What encoded them: settings, library and version."""
    seen_by_teacher: bool = True
    """The teacher looked at the decoded JPEGs themselves; False where they were added later."""


class BadImage(Schema):
    """An image that could not be used; its records are holes."""

    key: str
    reason: str


class FileEntry(Schema):
    """One committed file."""

    name: str
    """Path inside the store."""
    num_bytes: int
    digest: str

    @classmethod
    def describe(cls, name: str, pieces: Sequence[bytes | memoryview]) -> Self:
        """The entry of a file that holds these pieces."""
        return cls(name=name, num_bytes=sum(map(len, pieces)), digest=digest_pieces(pieces))


class ShardEntry(Sealed):
    """The receipt of a committed shard. A shard exists if and only if its receipt does and its files match it."""

    store: str
    """Fingerprint of the store's plan: a shard of another store of the same shape is not taken for one of this."""
    index: int
    num_images: int
    num_records: int
    """Records that hold tokens; holes are not counted."""
    files: tuple[FileEntry, ...]
    record_crc32c: Annotated[str, StringConstraints(pattern="^([0-9a-f]{8})*$")]
    """Of each record's stored tokens, 8 hex digits (little-endian) a record, zeros for a hole: what a read is checked
    against, so that a shard file which is whole but belongs elsewhere is noticed."""
    bad_images: tuple[BadImage, ...] = ()

    @property
    def crc32c_R(self) -> NDArray[np.uint32]:
        return np.frombuffer(bytes.fromhex(self.record_crc32c), "<u4")

    def file(self, name: str) -> FileEntry:
        """The entry of one of its files, by its path in the store.

        Raises:
            DamagedError: the receipt names no such file, so it is one of another store.
        """
        for file in self.files:
            if file.name == name:
                return file
        raise DamagedError(f"the receipt of shard {self.index} names no {name}; {self.remedy}")

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


class StorePlan(Sealed):
    """Everything that decides the content of a store, known before any work and never edited."""

    format_version: int = FORMAT_VERSION
    backend: Backend = "zarr"
    features: FeatureSpec
    whitening: AnyWhitening
    encoding: AnyEncoding = Fp16()
    token_subset: TokenSubset | None = None
    """None keeps all tokens."""
    stored_views: StoredViews | None = None
    """None keeps none: students render them from the images."""
    sampler: dict[str, Any]
    renderer: dict[str, Any]
    images_fingerprint: str
    """Over the ordered keys and the bytes of the images."""
    labels_fingerprint: str = ""
    """Over the labels, in layouts that store them beside the tokens; labels decide nothing else in a store."""
    teacher_fingerprint: str
    """Over the weights' tensors."""
    teacher: dict[str, Any]
    """The teacher's row of data: tap point, input size, normalisation."""
    num_images: int = Setting(ge=0)
    views_per_image: int = Setting(ge=1)
    images_per_shard: int = Setting(ge=1)

    @property
    def num_kept_tokens(self) -> int:
        """Tokens stored of each view."""
        tokens = self.features.num_tokens
        return tokens if self.token_subset is None else self.token_subset.num_kept(tokens)

    @property
    def shape_TC(self) -> tuple[int, int]:
        """Of one record's tokens."""
        return self.num_kept_tokens, self.features.channels

    @property
    def fields(self) -> dict[str, Field]:
        """The encoded arrays of one record."""
        return self.encoding.fields(self.shape_TC)

    @property
    def record_bytes(self) -> int:
        """Bytes of one record's tokens and their scales before any compression."""
        return sum(field.num_bytes for field in self.fields.values())

    @property
    def num_records(self) -> int:
        return self.num_images * self.views_per_image

    @property
    def records_per_shard(self) -> int:
        return self.images_per_shard * self.views_per_image

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.images_per_shard)

    @cached_property
    def fingerprint(self) -> str:
        return digest_json(self.to_json())

    def differences(self, wanted: Self) -> str:
        """The first fields in which another plan differs, for an error."""
        return "; ".join(list(_differences("", self.to_json(), wanted.to_json()))[:3])

    def images_of_shard(self, index: int) -> range:
        """Positions, in the store's image list, of the images of one shard."""
        first = index * self.images_per_shard
        return range(first, min(first + self.images_per_shard, self.num_images))


def _differences(name: str, found: Any, wanted: Any) -> Iterator[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            yield from _differences(f"{name}.{key}".lstrip("."), found.get(key), wanted.get(key))
    elif found != wanted:
        yield f"{name} is {found!r}, expected {wanted!r}"


class StoreManifest(Sealed):
    """Written last: a folder without it is not a store yet. Small, so that a store of 10,000 shards opens at once."""

    plan: StorePlan
    metadata: tuple[FileEntry, ...]
    """The files that belong to no shard."""
    receipts: tuple[str, ...]
    """Digest of each shard's receipt; empty for a shard that an unfinished store does not have yet."""
    num_records: int
    num_bytes: int
    bad_images: tuple[BadImage, ...] = ()
    skipped_images: tuple[str, ...] = ()
    """Keys of images of the data set that were left out on purpose; only in a file where there are any."""

    @property
    def fingerprint(self) -> str:
        return self.plan.fingerprint

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude=None if self.skipped_images else {"skipped_images"})


def refuse_other(path: Path | str, text: bytes) -> None:
    """Refuse a plan or manifest of another format; what is damaged or no plan is left to `from_file`.

    Raises:
        InputError: says both versions.
    """
    try:
        value = json.loads(unsealed(text) or b"{}")
        version = int(value.get("plan", value)["format_version"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return
    if version > FORMAT_VERSION:
        raise InputError(f"{path} has store format {version}, this program reads up to {FORMAT_VERSION}; update it")
    if version < FORMAT_VERSION:
        raise InputError(
            f"{path} has store format {version}, from before the first release; this program reads {FORMAT_VERSION}: "
            "extract it again"
        )
