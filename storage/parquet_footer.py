"""The footer of a Parquet file: which columns there are, and where each row group's part of them lies.

It is parsed twice: here, so that every number is checked, and by pyarrow, which knows the types. pyarrow alone would
not do: asked about a damaged row group, it ends the process.
"""

from typing import Any, NamedTuple

from storage.data_files import DataFile
from storage.errors import ConfigError, DamagedError, first_line
from storage.file_parts import FileParts
from storage.thrift import Struct, read_struct

REMEDY = "fetch or make it again"

_END_BYTES = 64 * 2**10
"""Footers are rarely larger; a larger one takes a second read."""
_MAX_FOOTER_BYTES = 64 * 2**20
_MAGIC = b"PAR1"

# Numbers of fields in the format's own description, parquet.thrift.
_NUM_ROWS, _ROW_GROUPS = 3, 4  # of FileMetaData
_COLUMNS, _GROUP_ROWS = 1, 3  # of RowGroup
_META_DATA = 3  # of ColumnChunk
_PATH, _UNPACKED, _PACKED, _DATA_PAGE, _DICTIONARY_PAGE = 3, 6, 7, 9, 11  # of ColumnMetaData


class Chunk(NamedTuple):
    """The part of a row group that is one column's."""

    start: int
    num_bytes: int
    unpacked_bytes: int
    """As the footer has it."""


class Footer(NamedTuple):
    """What the end of a file says."""

    metadata: Any
    """The same for pyarrow."""
    num_bytes: int
    """Of the file."""
    group_rows: list[int]
    """Rows of each row group."""
    chunks: dict[str, list[Chunk]]
    """One a row group, by the column's path."""


def read_footer(file: DataFile) -> Footer:
    """Read the end of a file.

    Raises:
        DamagedError: it is not that of a whole Parquet file.
        ConfigError: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow.parquet import read_metadata
    except ImportError as error:
        extra = "pip install 'decant-fd[parquet]'"
        raise ConfigError(f"reading {file.place} takes more packages ({error}): {extra}") from error
    num_bytes = file.stat().num_bytes
    start = max(0, num_bytes - _END_BYTES)
    (end,) = file.read([(start, num_bytes - start)])
    size = int.from_bytes(end[-8:-4], "little") + 8
    if len(end) < 12 or end[-4:] != _MAGIC or size > min(num_bytes, _MAX_FOOTER_BYTES):
        raise DamagedError(f"{file.place} does not end as a Parquet file does: cut short, or another kind; {REMEDY}")
    if size > len(end):
        start = num_bytes - size
        (end,) = file.read([(start, size)])
    try:
        metadata = read_metadata(pyarrow.PythonFile(FileParts(num_bytes, {start: end}), mode="r"))
        group_rows, chunks = _parse(end[len(end) - size :], num_bytes)
        leaves = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
        if group_rows and list(chunks) != leaves:
            raise ValueError(f"row groups have the columns {', '.join(chunks)}, the file {', '.join(leaves)}")
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DamagedError(f"{file.place} is damaged: {first_line(error)}; {REMEDY}") from error
    return Footer(metadata, num_bytes, group_rows, chunks or {leaf: [] for leaf in leaves})


def _parse(data: bytes, file_bytes: int) -> tuple[list[int], dict[str, list[Chunk]]]:
    """Rows of the row groups, and their chunks by column. Raises ValueError."""
    try:
        footer, _ = read_struct(data)
        groups = footer[_ROW_GROUPS]
        rows = [int(group[_GROUP_ROWS]) for group in groups]
        found = [{_path(column): _chunk(column[_META_DATA]) for column in group[_COLUMNS]} for group in groups]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its footer lacks {error}") from error
    if min(rows, default=0) < 0 or sum(rows) != footer.get(_NUM_ROWS):
        raise ValueError(f"{footer.get(_NUM_ROWS)} rows, in row groups of {sum(rows)}")
    paths = list(found[0]) if found else []
    for group, columns in zip(groups, found, strict=True):
        if list(columns) != paths or len(group[_COLUMNS]) != len(paths):
            raise ValueError(f"row groups with the columns {', '.join(paths)} and {', '.join(columns)}")
        for path, chunk in columns.items():
            if min(chunk) < 0 or chunk.start + chunk.num_bytes > file_bytes:
                raise ValueError(f"column {path} lies at {chunk.start} + {chunk.num_bytes} of {file_bytes}")
    return rows, {path: [columns[path] for columns in found] for path in paths}


def _path(column: Struct) -> str:
    return b".".join(column[_META_DATA][_PATH]).decode()


def _chunk(meta: Struct) -> Chunk:
    start = min(int(meta[_DATA_PAGE]), int(meta.get(_DICTIONARY_PAGE) or meta[_DATA_PAGE]))
    return Chunk(start, int(meta[_PACKED]), int(meta[_UNPACKED]))
