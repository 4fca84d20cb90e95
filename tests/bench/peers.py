"""How others read the same records, one shuffled batch at a time, as their documentation says.

A peer writes its files below a folder and gives back a function (records_B, out_BTC) that fills the caller's buffer.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.bench.made_up import BATCH, RECORD_BYTES, SHARD_RECORDS, VIT_B, WARM_RECORDS, tokens_of

ReadBatch = Callable[[NDArray[np.int64], NDArray[np.float16]], None]


class Peer(NamedTuple):
    """One way of others to read."""

    name: str
    package: str
    open: Callable[[Path, Path], ReadBatch]
    """(a folder of its own, our zarr store) to a reader."""
    batches: int | None = None
    """How many batches it reads in one round of six, where it is slow; None for all in every round."""
    note: str = ""
    is_sequential: bool = False
    """It cannot read by number; each batch is the next one."""


def all_tokens() -> Iterator[NDArray[np.float16]]:
    return map(tokens_of, range(WARM_RECORDS))


def zarr_one_by_one(folder: Path, store: Path) -> ReadBatch:
    import zarr

    array: Any = zarr.open_group(str(store), mode="r")["tokens"]

    def read(records_B: NDArray[np.int64], out_BTC: NDArray[np.float16]) -> None:
        for slot, record in enumerate(records_B):
            out_BTC[slot] = array[int(record)]

    return read


def zarr_oindex(folder: Path, store: Path) -> ReadBatch:
    import zarr

    array: Any = zarr.open_group(str(store), mode="r")["tokens"]

    def read(records_B: NDArray[np.int64], out_BTC: NDArray[np.float16]) -> None:
        out_BTC[:] = array.oindex[records_B]

    return read


def tensorstore(folder: Path, store: Path) -> ReadBatch:
    return _tensorstore(store, cache_bytes=0)


def tensorstore_cached(folder: Path, store: Path) -> ReadBatch:
    return _tensorstore(store, cache_bytes=100_000_000)


def _tensorstore(store: Path, cache_bytes: int) -> ReadBatch:
    import tensorstore as ts

    array = ts.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{store / 'tokens'}/"},
            "context": {"cache_pool": {"total_bytes_limit": cache_bytes}},
            "recheck_cached_data": "open",
        },
        read=True,
    ).result()

    def read(records_B: NDArray[np.int64], out_BTC: NDArray[np.float16]) -> None:
        out_BTC[:] = array[records_B].read().result()

    return read


def webdataset_pipeline(folder: Path, store: Path) -> ReadBatch:
    import webdataset as wds

    with wds.ShardWriter(f"{folder}/%05d.tar", maxcount=SHARD_RECORDS, verbose=0) as sink:
        for record, tokens_TC in enumerate(all_tokens()):
            sink.write({"__key__": f"{record:06d}", "tokens.npy": tokens_TC})
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    stream: Iterator[Any] = iter(())

    def read(records_B: NDArray[np.int64], out_BTC: NDArray[np.float16]) -> None:
        nonlocal stream
        if records_B[0] == 0:
            stream = iter(wds.WebDataset(urls, shardshuffle=False).decode().to_tuple("tokens.npy"))
        for slot in range(len(records_B)):
            (out_BTC[slot],) = next(stream)

    return read


def memory_map(folder: Path, store: Path) -> ReadBatch:
    path = folder / "tokens.bin"
    with open(path, "wb") as file:
        file.writelines(all_tokens())
    array = np.memmap(path, np.float16, "r", shape=(WARM_RECORDS, *VIT_B.shape_TC))

    def read(records_B: NDArray[np.int64], out_BTC: NDArray[np.float16]) -> None:
        for slot, record in enumerate(records_B):
            out_BTC[slot] = array[record]

    return read


def lmdb(folder: Path, store: Path) -> ReadBatch:
    import lmdb

    size = 2 * WARM_RECORDS * RECORD_BYTES
    environment = lmdb.open(str(folder), map_size=size, sync=False, metasync=False, lock=False)
    with environment.begin(write=True) as transaction:
        for record, tokens_TC in enumerate(all_tokens()):
            transaction.put(f"{record:08d}".encode(), memoryview(tokens_TC).cast("B"), append=True)

    def read(records_B: NDArray[np.int64], out_BTC: NDArray[np.float16]) -> None:
        with environment.begin(buffers=True) as transaction:
            for slot, record in enumerate(records_B):
                data = transaction.get(f"{record:08d}".encode())
                out_BTC[slot] = np.frombuffer(data, np.float16).reshape(VIT_B.shape_TC)

    return read


def hdf5(folder: Path, store: Path) -> ReadBatch:
    import h5py

    with h5py.File(folder / "tokens.h5", "w") as file:
        dataset = file.create_dataset("tokens", (WARM_RECORDS, *VIT_B.shape_TC), "<f2")
        for record, tokens_TC in enumerate(all_tokens()):
            dataset[record] = tokens_TC
    array = h5py.File(folder / "tokens.h5", "r")["tokens"]

    def read(records_B: NDArray[np.int64], out_BTC: NDArray[np.float16]) -> None:
        for slot, record in enumerate(records_B):
            array.read_direct(out_BTC, np.s_[int(record)], np.s_[slot])

    return read


def safetensors(folder: Path, store: Path) -> ReadBatch:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    for shard in range(WARM_RECORDS // SHARD_RECORDS):
        records = range(shard * SHARD_RECORDS, (shard + 1) * SHARD_RECORDS)
        save_file({"tokens": np.stack([tokens_of(record) for record in records])}, folder / f"{shard}.safetensors")
    files = [safe_open(path, framework="numpy") for path in sorted(folder.glob("*.safetensors"))]
    shards = [file.get_slice("tokens") for file in files]

    def read(records_B: NDArray[np.int64], out_BTC: NDArray[np.float16]) -> None:
        for slot, record in enumerate(records_B):
            shard, place = divmod(int(record), SHARD_RECORDS)
            out_BTC[slot] = shards[shard][place : place + 1][0]

    return read


def parquet(folder: Path, store: Path) -> ReadBatch:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind, path = pa.binary(RECORD_BYTES), folder / "tokens.parquet"
    with pq.ParquetWriter(path, pa.schema([("tokens", kind)]), compression="none", use_dictionary=False) as writer:
        for first in range(0, WARM_RECORDS, BATCH):
            rows = [tokens_of(record).tobytes() for record in range(first, first + BATCH)]
            writer.write_table(pa.table({"tokens": pa.array(rows, kind)}), row_group_size=BATCH)
    file = pq.ParquetFile(path)

    def read(records_B: NDArray[np.int64], out_BTC: NDArray[np.float16]) -> None:
        groups_B, places_B = np.divmod(records_B, BATCH)
        for group in np.unique(groups_B):
            column = file.read_row_group(int(group), columns=["tokens"])["tokens"].chunk(0)
            for slot in np.flatnonzero(groups_B == group):
                data = column[int(places_B[slot])].as_buffer()
                out_BTC[slot] = np.frombuffer(data, np.float16).reshape(VIT_B.shape_TC)

    return read


PEERS = (
    Peer("zarr-python, one record a call", "zarr", zarr_one_by_one, 4, "checks crc32c"),
    Peer("zarr-python, oindex of a batch", "zarr", zarr_oindex, 1, "checks crc32c"),
    Peer("tensorstore, a batch a call, no cache", "tensorstore", tensorstore, 8, "checks crc32c"),
    Peer("tensorstore, a batch a call, 100 MB cache", "tensorstore", tensorstore_cached, 8, "checks crc32c"),
    Peer("webdataset's own pipeline, .npy members", "webdataset", webdataset_pipeline, 8, "sequential", True),
    Peer("np.memmap, every page mapped before", "numpy", memory_map),
    Peer("LMDB", "lmdb", lmdb),
    Peer("HDF5, contiguous, read_direct", "h5py", hdf5),
    Peer("safetensors, get_slice of 512-record files", "safetensors", safetensors),
    Peer("Parquet, row groups of 64", "pyarrow", parquet, 1),
)


def folder_of(root: Path, peer: Peer) -> Path:
    """Made when it is asked for."""
    folder = root / peer.open.__name__
    folder.mkdir(parents=True)
    return folder
