"""The index beside a tar is untrusted: it can neither run code, nor take memory, nor lead out of its tar."""

import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage import tar_format
from storage.encodings import Int8, Zstd
from storage.errors import DamagedError
from storage.files import LocalFiles
from storage.folder import finish_store, load_plan
from storage.npy import NPY_MAGIC, npy_bytes
from storage.reader import open_store
from storage.receipts import parse_receipt, receipt_name
from storage.records import FileEntry

INT8 = Int8(channel_scale=(1.0,) * 8)
BEFORE_THE_END = 10**9
"""Stands for the last byte of the tar, where nothing of more than a byte can begin."""


def forge_index(root: Path, data: bytes) -> None:
    """Put an index into shard 0, and make receipt and manifest agree."""
    name, receipt = tar_format.index_name(0), root / receipt_name(0)
    (root / name).write_bytes(data)
    entry = parse_receipt(LocalFiles(root), load_plan(root), 0, receipt.read_bytes())
    files = tuple(FileEntry.describe(name, [data]) if file.name == name else file for file in entry.files)
    receipt.write_bytes(entry.model_copy(update={"files": files}).to_file())
    finish_store(root)


def npy(header: str, body: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return NPY_MAGIC + len(text).to_bytes(2, "little") + text + body


DESCR = repr(tar_format.INDEX_DTYPE.descr)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00\xff\xff",
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (6,)}", b"cos\nsystem\n(S'touch here'\ntR."),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1000000000000,)}"),
        npy(f"{{'descr': {DESCR}, 'fortran_order': False, 'shape': (1000000000000,)}}"),
        npy(f"{{'descr': {DESCR}, 'fortran_order': False, 'shape': (6,)}}", bytes(5 * 72)),
        npy(f"{{'descr': {DESCR}, 'fortran_order': False, 'shape': (6,)}}", bytes(7 * 72)),
        npy("(" * 30_000),
        npy("__import__('os').system('touch here')"),
        npy("{[]: 1}"),
        npy("9" * 60_000),
        npy("\0"),
    ],
    ids=lambda data: data[10:40].decode(errors="replace"),
)
def test_a_hostile_index_is_damage(make_store: Callable[..., Any], data: bytes) -> None:
    """Nothing is unpickled or evaluated, and no memory is taken for what it claims."""
    root, _, _ = make_store(backend="wds", num_images=3)
    forge_index(root, data)
    tracemalloc.start()
    with pytest.raises(DamagedError, match=r"is no \.npy file of 6 rows of 72 bytes; run `make verify`"):
        open_store(root).read_batch(np.array([0]), np.empty((1, 7, 8), np.float16))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 5e6


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((f"{kind}_offset", value) for kind in ("tokens", "jpeg", "stats", "scale")
          for value in (-2, 0, BEFORE_THE_END, 2**62, -(2**63))),
        ("tokens_bytes", 0), ("tokens_bytes", 55), ("tokens_bytes", 2**32 - 1), ("jpeg_bytes", 2**32 - 1),
        ("jpeg_bytes", 0), ("jpeg_bytes", 2817), ("stats_offset", -1), ("jpeg_offset", -1), ("scale_offset", -1),
        ("tokens_offset", -1),
    ],
)  # fmt: skip
def test_an_index_that_leads_out_of_its_tar_is_damage(make_store: Callable[..., Any], name: str, value: int) -> None:
    root, _, _ = make_store(backend="wds", num_images=3, encoding=INT8, view_px=16)
    rows = np.load(root / tar_format.index_name(0))
    forge_index(root, npy_bytes(rows))
    open_store(root).read_batch(np.array([0]), np.empty((1, 7, 8), np.float16))
    end = (root / tar_format.tar_name(0)).stat().st_size
    rows[name][1] = end - 1 if value == BEFORE_THE_END else value
    forge_index(root, npy_bytes(rows))
    with pytest.raises(DamagedError, match="leads out of its tar"):
        open_store(root).read_batch(np.array([0]), np.empty((1, 7, 8), np.float16))


def test_a_compressed_record_cannot_ask_for_memory(make_store: Callable[..., Any]) -> None:
    root, _, _ = make_store(backend="wds", num_images=3, encoding=Zstd())
    rows = np.load(root / tar_format.index_name(0))
    with (root / tar_format.tar_name(0)).open("r+b") as tar:
        tar.truncate(2**32)  # sparse
    receipt = root / receipt_name(0)
    entry = parse_receipt(LocalFiles(root), load_plan(root), 0, receipt.read_bytes())
    longer = tuple(
        file.model_copy(update={"num_bytes": 2**32}) if file.name == tar_format.tar_name(0) else file
        for file in entry.files
    )
    receipt.write_bytes(entry.model_copy(update={"files": longer}).to_file())
    rows["tokens_bytes"][0] = 2**31
    forge_index(root, npy_bytes(rows))
    with pytest.raises(DamagedError, match="leads out of its tar"):
        open_store(root).read_batch(np.array([0]), np.empty((1, 7, 8), np.float16))


def test_members_are_never_taken_out(make_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading goes by offsets alone."""
    root, plan, _ = make_store(backend="wds", num_images=3, encoding=INT8, view_px=16)
    for name in ("open", "TarFile"):
        monkeypatch.setattr(tarfile, name, None)
    monkeypatch.setattr(np, "load", None)
    assert len(list(open_store(root).iter_shard(0))) == plan.records_per_shard
