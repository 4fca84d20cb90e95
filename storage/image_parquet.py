"""Parquet files of images, as Hugging Face's hub keeps data sets, as a source of images."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from storage.data_files import DataFile
from storage.errors import BadImageError, InputError
from storage.held_values import HeldValues
from storage.image_source import MAX_IMAGE_BYTES, ImageEntry, file_splits
from storage.parquet_footer import REMEDY
from storage.parquet_table import Images, ImageTable

HELD_BYTES = 512 * 2**20
"""Of row groups in memory, in one process. Where images are read in the order of their keys, each is unpacked once."""
_LIST_THREADS = 8
_SUFFIX = ".parquet"


class ParquetImages:
    """Files such as `train-00000-of-00294.parquet`, one row an image; keys are `<file's stem>/<row, 8 digits>`.

    Where the names of the files tell `train` from `val` (or `test`), that is the division. Listing reads the footers
    and the labels. An image is read with its row group.
    """

    def __init__(self, files: Sequence[DataFile]) -> None:
        self.files = {file.name.removesuffix(_SUFFIX): file for file in sorted(files, key=_first_key)}
        if len(self.files) != len(files):
            raise InputError(f"two of the {len(files)} Parquet files have the same name; give one folder of them")
        self._tables: dict[str, ImageTable] = {}
        self._groups = HeldValues(HELD_BYTES, Images.num_bytes)

    def __getstate__(self) -> dict[str, Any]:
        return {"files": list(self.files.values())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def list_images(self) -> list[ImageEntry]:
        """Raises DamagedError or InputError where a file cannot be used, or holds other columns than the others."""
        splits = file_splits(list(self.files))
        with ThreadPoolExecutor(_LIST_THREADS) as pool:
            listed = list(pool.map(self._list_file, self.files, splits))
        first, *others = (self._tables[stem] for stem in self.files)
        for other in others:
            if other.columns != first.columns:
                raise InputError(
                    f"{first.file.place} and {other.file.place} do not belong together: {first.columns} and "
                    f"{other.columns}; give files of one data set"
                )
        entries = [entry for part in listed for entry in part]
        if not entries:
            raise InputError(f"no row in {len(listed)} Parquet file(s) at {first.file.place}; expected images")
        return entries

    def _list_file(self, stem: str, split: str | None) -> list[ImageEntry]:
        stat, table = self.files[stem].stat(), self._table(stem)
        table.check_sizes()
        columns, count = table.columns, table.num_rows
        labels = table.read_values(columns.label) if columns.label else [None] * count
        names = table.read_values(columns.name) if columns.name else [None] * count
        return [
            ImageEntry(f"{stem}/{row:08d}", _class_name(table, label), split, *stat, name or "")
            for row, (label, name) in enumerate(zip(labels, names, strict=True))
        ]

    def read_bytes(self, key: str) -> bytes:
        """Raises DamagedError or InputError where it is the file that cannot be used."""
        stem, _, digits = key.rpartition("/")
        if stem not in self.files or not (digits.isascii() and digits.isdigit() and len(digits) == 8):
            raise BadImageError("no longer in the Parquet files")
        table, row = self._table(stem), int(digits)
        if row >= table.num_rows:
            raise BadImageError("no longer in the Parquet files")
        group = table.group_of(row)
        images = self._groups.get((stem, group), table.image_bytes(group), lambda: table.read_images(group))
        data = images.read(row - table.group_starts[group])
        if data is None:
            raise BadImageError("the row holds no image: it is empty, or only names a file")
        if len(data) > MAX_IMAGE_BYTES:
            raise BadImageError(f"larger than {MAX_IMAGE_BYTES >> 20} MiB")
        return bytes(data)

    def _table(self, stem: str) -> ImageTable:
        table = self._tables.get(stem)
        if table is None:
            table = self._tables[stem] = ImageTable(self.files[stem])
        return table


def _first_key(file: DataFile) -> str:
    """Files in the order of their images' keys."""
    return file.name.removesuffix(_SUFFIX) + "/"


def _class_name(table: ImageTable, label: int | str | None) -> str | None:
    """What a label is called; -1 stands for none, as in test parts."""
    names = table.columns.classes
    if label is None or label == -1:
        return None
    if isinstance(label, str) or not names:
        return str(label)
    if not 0 <= label < len(names):
        raise InputError(f"{table.file.place} holds the label {label}, but names {len(names)} classes; {REMEDY}")
    return names[label]
