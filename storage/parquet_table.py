"""A Parquet file with a column of images, read column by column and row group by row group.

Files are untrusted. Every byte is fetched here, and pyarrow sees only what has been measured: what a column chunk
unpacks to is known, and bounded, before anything of it is unpacked.
"""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from storage.data_files import DataFile
from storage.errors import DamagedError, InputError, first_line
from storage.file_parts import FileParts
from storage.parquet_columns import ImageColumns, find_columns
from storage.parquet_footer import REMEDY, read_footer
from storage.thrift import read_struct

MAX_CHUNK_BYTES = 2**30
"""Of one column in one row group, unpacked. Writers make row groups of 100 or 1,000 images, 10 to 100 MB."""
MAX_ROWS_A_FILE = 10**8
"""Rows have 8 digits in keys."""
_LEAST_ROW_BYTES = 16
"""No image is smaller: a file of a few bytes cannot have a million rows."""
_BATCH_ROWS = 256
_UNPACKED_SIZE, _PACKED_SIZE = 2, 3
"""Fields of a page's header."""


class ImageTable:
    """One file. Nothing stays open."""

    def __init__(self, file: DataFile) -> None:
        """Reads the footer.

        Raises:
            DamagedError: it is not a whole Parquet file.
            InputError: it has no column of images, or more rows than can be.
            ConfigError: pyarrow is not installed.
        """
        self.file, self._footer = file, read_footer(file)
        self.columns: ImageColumns = find_columns(file.place, self._footer.metadata, list(self._footer.chunks))
        self.group_starts = list(itertools.accumulate(self._footer.group_rows, initial=0))
        """The first row of each row group, and the number of all rows."""
        self.num_rows = self.group_starts[-1]
        if self.num_rows > min(MAX_ROWS_A_FILE, 1000 + self._footer.num_bytes // _LEAST_ROW_BYTES):
            raise InputError(
                f"{file.place} claims {self.num_rows:,} images in {self._footer.num_bytes:,} bytes; {REMEDY}"
            )

    def group_of(self, row: int) -> int:
        return bisect.bisect_right(self.group_starts, row) - 1

    def image_bytes(self, group: int) -> int:
        """What the images of a row group should take in memory."""
        return self._footer.chunks[self.columns.image][group].unpacked_bytes

    def check_sizes(self) -> None:
        """Raises InputError where a row group is too large to be read."""
        for group in range(len(self._footer.group_rows)):
            self._check_size(group, self.columns.image, self.image_bytes(group))

    def read_images(self, group: int) -> "Images":
        """The encoded images of one row group.

        Raises:
            DamagedError: the file is damaged.
            InputError: they take too much memory, or the file cannot be read.
        """
        return Images(self._read(self.columns.image, [group]))

    def read_values(self, leaf: str) -> list[Any]:
        """All values of a column of numbers or names; None where there is none. Raises as `read_images` does."""
        groups = [group for group, rows in enumerate(self._footer.group_rows) if rows]
        try:
            return [value for array in self._read(leaf, groups) for value in array.to_pylist()]
        except UnicodeDecodeError as error:
            raise self._damaged(error) from error

    def _read(self, leaf: str, groups: list[int]) -> list[Any]:
        """The arrays of a column, over row groups that are not empty."""
        chunks = [self._footer.chunks[leaf][group] for group in groups]
        for group, chunk in zip(groups, chunks, strict=True):
            self._check_size(group, leaf, max(chunk.num_bytes, chunk.unpacked_bytes))
        parts = self.file.read([(chunk.start, chunk.num_bytes) for chunk in chunks])
        largest_bytes = 0
        for group, chunk, data in zip(groups, chunks, parts, strict=True):
            if len(data) != chunk.num_bytes:
                raise DamagedError(f"{self.file.place} has become shorter; {REMEDY}")
            try:
                pages = measure_pages(data)
            except ValueError as error:
                raise self._damaged(error) from error
            self._check_size(group, leaf, pages.total_bytes)
            largest_bytes = max(largest_bytes, pages.largest_bytes)
        file = FileParts(
            self._footer.num_bytes, {chunk.start: data for chunk, data in zip(chunks, parts, strict=True)}
        )  # fmt: skip
        arrays = list(
            self._unpack(leaf, groups, file, max(1, min(_BATCH_ROWS, MAX_CHUNK_BYTES // (largest_bytes or 1))))
        )
        rows = sum(self._footer.group_rows[group] for group in groups)
        if sum(map(len, arrays)) != rows:
            raise DamagedError(f"{self.file.place}: column {leaf!r} has not {rows:,} rows; {REMEDY}")
        return arrays

    def _unpack(self, leaf: str, groups: list[int], file: FileParts, rows_at_once: int) -> Iterator[Any]:
        """A few rows at a time: one value in a page can stand in any number of rows."""
        import pyarrow
        from pyarrow.parquet import ParquetFile

        num_bytes = 0
        try:
            reader = ParquetFile(
                pyarrow.PythonFile(file, mode="r"), metadata=self._footer.metadata, pre_buffer=False,
                page_checksum_verification=True,
            )  # fmt: skip
            for batch in reader.iter_batches(rows_at_once, row_groups=groups, columns=[leaf], use_threads=False):
                num_bytes += batch.nbytes
                self._check_size(groups[0], leaf, num_bytes)
                column = batch.column(0)
                yield column.flatten()[0] if pyarrow.types.is_struct(column.type) else column
        except (pyarrow.ArrowException, OSError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> DamagedError:
        return DamagedError(f"{self.file.place} is damaged: {first_line(error)}; {REMEDY}")

    def _check_size(self, group: int, leaf: str, num_bytes: int) -> None:
        if num_bytes > MAX_CHUNK_BYTES:
            raise InputError(
                f"{self.file.place}: column {leaf!r} of row group {group} takes {num_bytes / 1e6:,.0f} MB or more, the "
                f"limit is {MAX_CHUNK_BYTES / 1e6:,.0f} MB; write the file again with fewer rows a group, such as 100"
            )


class Images:
    """The encoded images of one row group."""

    def __init__(self, arrays: Sequence[Any]) -> None:
        self._arrays = arrays
        self._starts = list(itertools.accumulate(map(len, arrays), initial=0))

    def num_bytes(self) -> int:
        """Of memory."""
        return sum(array.nbytes for array in self._arrays)

    def read(self, row: int) -> memoryview | None:
        """One image, where it lies; None for an empty row. `row` counts from the first of the group."""
        part = bisect.bisect_right(self._starts, row) - 1
        value = self._arrays[part][row - self._starts[part]]
        return memoryview(value.as_buffer()) if value.is_valid else None


class Pages(NamedTuple):
    """What a column chunk's pages take without compression."""

    total_bytes: int
    largest_bytes: int


def measure_pages(chunk: bytes) -> Pages:
    """Walk from header to header. The footer says it, too, but whoever unpacks the pages believes the pages.

    Raises:
        ValueError: they are not what they should be; says where.
    """
    place, total, largest = 0, 0, 0
    while place < len(chunk):
        header, start = read_struct(chunk, place)
        unpacked, packed = header.get(_UNPACKED_SIZE, -1), header.get(_PACKED_SIZE, -1)
        if not (
            isinstance(unpacked, int) and isinstance(packed, int) and unpacked >= 0 <= packed <= len(chunk) - start
        ):
            raise ValueError(f"no page at byte {place} of a column's {len(chunk)}")
        total, largest, place = total + unpacked, max(largest, unpacked), start + packed
    return Pages(total, largest)
