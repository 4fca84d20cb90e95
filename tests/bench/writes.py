"""Writing a shard of 512 records, against a plain file of the same bytes."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from storage.fingerprint import crc32c, digest_bytes
from tests.bench.made_up import RECORD_BYTES, SHARD_RECORDS, VIT_B, begin_store, tokens_of, write_shard
from tests.bench.results import Section
from tests.bench.timing import Clock, Contender, cpu_seconds, is_installed, one_core, race, speed_rows, wall_seconds

ROUNDS, DURABLE_ROUNDS = 15, 9
TARGET = 0.8
SHAPE_RTC = (SHARD_RECORDS, *VIT_B.shape_TC)


class Place:
    """A folder that is emptied before each run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)


@contextmanager
def without_fsync() -> Iterator[None]:
    """All files stay in the page cache."""
    with mock.patch("os.fsync", lambda descriptor: None), mock.patch("os.fdatasync", lambda descriptor: None):
        yield


def measure(folder: Path) -> list[Section]:
    """In the page cache by CPU time, and on the disk by wall time."""
    tokens_RTC = np.stack([tokens_of(record) for record in range(SHARD_RECORDS)])
    with one_core(), without_fsync():
        ways = [*ours(folder, tokens_RTC), *checksums(tokens_RTC), *peers(folder, tokens_RTC)]
        cached = _section(
            "Writing a shard, page cache",
            ways,
            folder,
            tokens_RTC,
            cpu_seconds,
            ROUNDS,
            "no fsync, one core, CPU seconds",
        )
    on_disk = _section(
        "Writing a shard, on disk",
        ours(folder, tokens_RTC),
        folder,
        tokens_RTC,
        wall_seconds,
        DURABLE_ROUNDS,
        "fsync included, wall seconds",
    )
    return [cached, on_disk]


def _section(
    title: str, ways: list[Contender], folder: Path, tokens_RTC: Any, clock: Clock, rounds: int, how: str
) -> Section:
    contenders = [_plain_file(Place(folder / "plain"), tokens_RTC), *ways]
    seconds = race(contenders, rounds=rounds, clock=clock)
    shutil.rmtree(folder)
    unit = "GB/CPU-s" if clock is cpu_seconds else "GB/s"
    by_round = clock is wall_seconds
    method = f"{SHARD_RECORDS} records of {RECORD_BYTES:,} bytes; {how}, best of {rounds} rounds that take turns"
    if by_round:
        method += ", ratios as the median of those within a round"
    return Section(
        title, method, speed_rows(contenders, seconds, gigabytes=tokens_RTC.nbytes / 1e9, unit=unit, by_round=by_round)
    )


def _plain_file(place: Place, tokens_RTC: Any) -> Contender:
    def write() -> None:
        with open(place.folder / "tokens.bin", "wb", buffering=0) as file:
            file.write(memoryview(tokens_RTC).cast("B"))
            os.fsync(file.fileno())

    return Contender("one plain file of the same bytes", "limit", write, prepare=place.clear)


def ours(folder: Path, tokens_RTC: Any) -> list[Contender]:
    """Append and commit, in both layouts."""
    return [
        _shard(Place(folder / "zarr"), "zarr", "this store, Zarr", tokens_RTC),
        _shard(Place(folder / "wds"), "wds", "this store, WebDataset", tokens_RTC),
    ]


def checksums(tokens_RTC: Any) -> list[Contender]:
    """What the checksums of a shard take by themselves."""
    return [
        Contender(
            "its checksums alone: crc32c of each record", "reference",
            lambda: [crc32c(tokens_TC) for tokens_TC in tokens_RTC],
        ),
        Contender("its digest alone: BLAKE3", "reference", lambda: digest_bytes(memoryview(tokens_RTC).cast("B"))),
    ]  # fmt: skip


def _shard(place: Place, backend: str, name: str, tokens_RTC: Any) -> Contender:
    begun: list[Any] = []

    def prepare() -> None:
        place.clear()
        begun[:] = begin_store(place.folder / "store", SHARD_RECORDS, backend=backend)

    def run() -> None:
        write_shard(place.folder / "store", *begun, 0, lambda position: tokens_RTC[position])

    note = "crc32c of each record, digest of each file, receipt"
    return Contender(name, "ours", run, prepare=prepare, target=TARGET, note=note)


def peers(folder: Path, tokens_RTC: Any) -> list[Contender]:
    """Others, into one sharded array or one database of the same records."""
    ways: list[tuple[str, str, Callable[[Path, Any], None]]] = [
        ("tensorstore, one call a shard", "tensorstore", _tensorstore),
        ("zarr-python, write_empty_chunks=True", "zarr", lambda place, tokens: _zarr(place, tokens, True)),
        ("zarr-python, defaults", "zarr", lambda place, tokens: _zarr(place, tokens, False)),
        ("LMDB, sync off", "lmdb", _lmdb),
        ("webdataset's ShardWriter, .npy members", "webdataset", _webdataset),
    ]
    contenders = []
    for number, (name, package, write) in enumerate(ways):
        place = Place(folder / f"peer-{number}")
        run = _bound(write, place.folder, tokens_RTC) if is_installed(package) else None
        contenders.append(Contender(name, "peer", run, prepare=place.clear))
    return contenders


def _bound(write: Callable[[Path, Any], None], folder: Path, tokens_RTC: Any) -> Callable[[], None]:
    return lambda: write(folder, tokens_RTC)


def _zarr(folder: Path, tokens_RTC: Any, write_empty_chunks: bool) -> None:
    import zarr

    array = zarr.create_array(
        str(folder / "array"), shape=SHAPE_RTC, chunks=(1, *VIT_B.shape_TC), shards=SHAPE_RTC, dtype="<f2",
        compressors=None, filters=None, fill_value=0, config={"write_empty_chunks": write_empty_chunks},
    )  # fmt: skip
    array[:] = tokens_RTC


def _tensorstore(folder: Path, tokens_RTC: Any) -> None:
    import tensorstore as ts

    inner = {"chunk_shape": [1, *VIT_B.shape_TC], "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}]}
    array = ts.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{folder / 'array'}/"},
            "context": {"file_io_sync": False},
            "metadata": {
                "shape": list(SHAPE_RTC),
                "data_type": "float16",
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(SHAPE_RTC)}},
                "codecs": [{"name": "sharding_indexed", "configuration": inner}],
            },
        },
        create=True,
    ).result()
    array.write(tokens_RTC).result()


def _lmdb(folder: Path, tokens_RTC: Any) -> None:
    import lmdb

    environment = lmdb.open(str(folder), map_size=2 * tokens_RTC.nbytes, sync=False, metasync=False)
    with environment.begin(write=True) as transaction:
        for record, tokens_TC in enumerate(tokens_RTC):
            transaction.put(f"{record:08d}".encode(), memoryview(tokens_TC).cast("B"), append=True)
    environment.close()


def _webdataset(folder: Path, tokens_RTC: Any) -> None:
    import webdataset as wds

    with wds.ShardWriter(f"{folder}/%05d.tar", maxcount=SHARD_RECORDS, verbose=0) as sink:
        for record, tokens_TC in enumerate(tokens_RTC):
            sink.write({"__key__": f"{record:06d}", "tokens.npy": tokens_TC})
