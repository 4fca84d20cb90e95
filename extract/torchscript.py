"""OpenAI's CLIP files: TorchScript archives, read as data.

`torch.jit.load` would compile the code in the archive and run its `__setstate__` methods; `torch.load` refuses them.
Here only the structure (`data.pkl`) and the tensors' records are looked at; code is never opened.
"""

import mmap
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from extract.inert_pickle import Instance, RefusedError, TensorRef, read_inert
from storage.errors import InputError

_DTYPES = {
    "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Double": torch.float64,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip
AGAIN = "if it was downloaded, delete it, and it is downloaded again"
"""What to do with a file whose bytes make no sense."""
_LOCAL_HEADER_BYTES = 30
_LONGEST_NAME = 250
"""Of a tensor, with the modules that it is in."""


class Record(NamedTuple):
    """Where a record's bytes lie in an archive."""

    start: int
    num_bytes: int
    crc32: int


def list_records(path: Path) -> dict[str, Record]:
    """The uncompressed records of an archive as torch writes them, by their names without the archive's own.

    Tensors are never compressed there, so nothing that is opened can be larger than the file. Compressed records (the
    code of TorchScript) are left out.

    Raises:
        InputError: not such an archive; cut off; records of the same name, outside of the file, in one another, or
            compressed where tensors lie.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return _records(path, archive.infolist(), file.seek(0, 2))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, IndexError) as error:
        raise InputError(f"{path} is not a readable archive of weights, or is cut off ({error}); {AGAIN}") from error


def _records(path: Path, entries: list[zipfile.ZipInfo], file_bytes: int) -> dict[str, Record]:
    records: dict[str, Record] = {}
    with path.open("rb") as file:
        for entry in entries:
            name = entry.filename.partition("/")[2]
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                if not name.startswith(("code/", ".data/")):
                    raise InputError(
                        f"{path}: record {entry.filename} is compressed or encrypted; torch stores it plain"
                    )
                continue
            file.seek(entry.header_offset)
            header = file.read(_LOCAL_HEADER_BYTES)
            if len(header) < _LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04":
                raise InputError(f"{path}: there is no record {entry.filename} where the archive's directory says")
            lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            start = entry.header_offset + _LOCAL_HEADER_BYTES + lengths
            if start + entry.file_size > file_bytes or entry.compress_size != entry.file_size:
                raise InputError(f"{path}: record {entry.filename} does not lie inside the file")
            if name in records:
                raise InputError(f"{path} holds the record {entry.filename} twice")
            records[name] = Record(start, entry.file_size, entry.CRC)
    for before, after in pairwise(sorted(records.values())):
        if before.start + before.num_bytes > after.start:
            raise InputError(f"{path}: records lie in one another; it is damaged, or made to exhaust memory")
    return records


def is_torchscript(records: Mapping[str, Record]) -> bool:
    return "constants.pkl" in records


def read_torchscript(path: Path, records: Mapping[str, Record]) -> dict[str, Tensor]:
    """The tensors of a TorchScript module, named as its `state_dict` names them.

    They lie in the file's pages (a private map): no second copy is in memory, and none may be used once the file has
    changed.

    Raises:
        InputError: damaged, or asks for more than tensors.
    """
    archive = _Archive(path, records)
    try:
        root = read_inert(archive.read("data.pkl"))
        if not isinstance(root, Instance):
            raise RefusedError(f"a {type(root).__name__} instead of a module")
        return {name: archive.tensor(name, tensor) for name, tensor in _walk_tensors(root)}
    except RefusedError as error:
        raise InputError(
            f"{path} is a TorchScript archive that holds {error}: more than tensors, and it is not opened; save the "
            "model's state_dict as safetensors"
        ) from error


def _walk_tensors(
    root: Any, *, most_names: int = 100_000, most_tensors: int = 20_000, most_levels: int = 100
) -> Iterator[tuple[str, TensorRef]]:
    """The tensors of a tree of modules, by the dotted names of attributes, as a module's `state_dict` has them.

    Raises:
        RefusedError: a module that contains itself, names that are far too long, or far too many names or tensors
            (modules shared by modules that are shared).
    """
    left, tensors_left, pending = most_names, most_tensors, [("", root, 0)]
    while pending:
        prefix, module, level = pending.pop()
        if level > most_levels:
            raise RefusedError(f"modules inside modules more than {most_levels} deep")
        for name, value in module.state.items() if isinstance(module.state, dict) else ():
            left -= 1
            tensors_left -= isinstance(value, TensorRef)
            if left < 0 or tensors_left < 0:
                raise RefusedError(f"more than {most_names} attributes or {most_tensors} tensors")
            if not isinstance(value, (TensorRef, Instance)):
                continue
            if not isinstance(name, str) or len(prefix) + len(name) > _LONGEST_NAME:
                raise RefusedError(f"a tensor or module with a name of more than {_LONGEST_NAME} characters")
            if isinstance(value, TensorRef):
                yield f"{prefix}{name}", value
            else:
                pending.append((f"{prefix}{name}.", value, level + 1))


def check_records(path: Path, records: Mapping[str, Record]) -> None:
    """Read every record once.

    Raises:
        InputError: other bytes than were written.
    """
    archive = _Archive(path, records)
    for name in records:
        archive.sound(name)


class _Archive:
    def __init__(self, path: Path, records: Mapping[str, Record]) -> None:
        with path.open("rb") as file:
            self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.path, self._records = path, records
        self._sound: set[str] = set()
        self._copies: dict[int, Tensor] = {}
        if "byteorder" in records and self.read("byteorder") != b"little":
            raise InputError(f"{path} was written on a big-endian machine; save it as safetensors there")

    def read(self, name: str) -> bytes:
        record = self.sound(name)
        return self._content[record.start : record.start + record.num_bytes]

    def tensor(self, name: str, ref: TensorRef) -> Tensor:
        """A tensor in the file's own pages."""
        if ref.storage.type_name not in _DTYPES:
            raise RefusedError(f"tensors of type {ref.storage.type_name}")
        dtype = _DTYPES[ref.storage.type_name]
        record = self.sound(f"data/{ref.storage.key}")
        count = ref.storage.num_elements
        if count * dtype.itemsize != record.num_bytes:
            raise InputError(
                f"{self.path}: record data/{ref.storage.key} has {record.num_bytes} bytes, expected "
                f"{count * dtype.itemsize} for {name}"
            )
        if 0 in ref.size:
            return torch.empty_strided(ref.size, ref.stride, dtype=dtype)
        return self._flat(record, dtype).as_strided(ref.size, ref.stride, ref.offset)

    def _flat(self, record: Record, dtype: torch.dtype) -> Tensor:
        """All elements of a record: in the file's pages, or in one copy where other programs than torch put them."""
        if record.start % dtype.itemsize == 0:
            count = record.num_bytes // dtype.itemsize
            return torch.frombuffer(self._content, dtype=dtype, count=count, offset=record.start)
        if record.start not in self._copies:
            part = self._content[record.start : record.start + record.num_bytes]
            self._copies[record.start] = torch.frombuffer(bytearray(part), dtype=torch.uint8)
        return self._copies[record.start].view(dtype)

    def sound(self, name: str) -> Record:
        """A record with the checksum that it was written with; torch can be told to write 0 instead of one.

        Raises:
            InputError: no such record, or other bytes than were written.
        """
        if name not in self._records:
            raise InputError(f"{self.path} has no record {name}; it is damaged or not a whole file")
        record = self._records[name]
        if name not in self._sound:
            with memoryview(self._content) as view, view[record.start : record.start + record.num_bytes] as part:
                if record.crc32 and zlib.crc32(part) != record.crc32:
                    raise InputError(f"{self.path}: record {name} is damaged (its crc32 differs); {AGAIN}")
            self._sound.add(name)
        return record
