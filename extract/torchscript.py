"""OpenAI's CLIP files: TorchScript archives, read as data.

`torch.jit.load` would compile the code in the archive and run its `__setstate__` methods; `torch.load` refuses them.
Here only the structure (`data.pkl`) and the tensors' records are looked at; code is never opened.
"""

import math
import mmap
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from extract.inert_pickle import Instance, RefusedError, TensorRef, read_inert, walk_tensors
from storage.errors import InputError

_DTYPES = {
    "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Double": torch.float64,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip
_LOCAL_HEADER_BYTES = 30


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
        InputError: not such an archive; cut off; records of the same name, outside of the file, or compressed where
            tensors lie.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return _records(path, archive.infolist(), file.seek(0, 2))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, IndexError) as error:
        raise InputError(f"{path} is not a readable archive of weights, or is cut off ({error})") from error


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
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    archive = _Archive(path, content, records)
    try:
        root = read_inert(archive.read("data.pkl"))
        if not isinstance(root, Instance):
            raise RefusedError(f"a {type(root).__name__} instead of a module")
        return {name: archive.tensor(name, tensor) for name, tensor in walk_tensors(root)}
    except RefusedError as error:
        raise InputError(
            f"{path} is a TorchScript archive that holds {error}: more than tensors, and it is not opened; save the "
            "model's state_dict as safetensors"
        ) from error


class _Archive:
    def __init__(self, path: Path, content: mmap.mmap, records: Mapping[str, Record]) -> None:
        self.path, self._content, self._records = path, content, records
        self._sound: set[str] = set()
        if "byteorder" in records and self.read("byteorder") != b"little":
            raise InputError(f"{path} was written on a big-endian machine; save it as safetensors there")

    def read(self, name: str) -> bytes:
        record = self._record(name)
        return self._content[record.start : record.start + record.num_bytes]

    def tensor(self, name: str, ref: TensorRef) -> Tensor:
        """A tensor in the file's own pages."""
        if ref.storage.type_name not in _DTYPES:
            raise RefusedError(f"tensors of type {ref.storage.type_name}")
        dtype = _DTYPES[ref.storage.type_name]
        record = self._record(f"data/{ref.storage.key}")
        count, num_elements = ref.storage.num_elements, math.prod(ref.size)
        if count * dtype.itemsize != record.num_bytes:
            raise InputError(
                f"{self.path}: record data/{ref.storage.key} has {record.num_bytes} bytes, expected "
                f"{count * dtype.itemsize} for {name}"
            )
        if num_elements == 0:
            return torch.empty_strided(ref.size, ref.stride, dtype=dtype)
        last = ref.offset + sum((side - 1) * step for side, step in zip(ref.size, ref.stride, strict=True))
        if last >= count or num_elements > count:
            raise InputError(f"{self.path}: {name} of shape {ref.size} is larger than its record of {count} elements")
        if record.start % dtype.itemsize:
            flat = torch.frombuffer(bytearray(self.read(f"data/{ref.storage.key}")), dtype=dtype)
        else:
            flat = torch.frombuffer(self._content, dtype=dtype, count=count, offset=record.start)
        return flat.as_strided(ref.size, ref.stride, ref.offset)

    def _record(self, name: str) -> Record:
        """Raises InputError: no such record, or other bytes than were written."""
        if name not in self._records:
            raise InputError(f"{self.path} has no record {name}; it is damaged or not a whole file")
        record = self._records[name]
        if name not in self._sound:
            with memoryview(self._content) as view, view[record.start : record.start + record.num_bytes] as part:
                if zlib.crc32(part) != record.crc32:
                    raise InputError(f"{self.path}: record {name} is damaged (its crc32 differs); download it again")
            self._sound.add(name)
        return record
