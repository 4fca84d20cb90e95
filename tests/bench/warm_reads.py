"""Shuffled reads of records that lie in the page cache, against `preadv` of the same bytes."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from storage.reader import open_store
from storage.tar_format import tar_name
from storage.zarr_format import CRC_BYTES, token_shard_name
from tests.bench.made_up import (
    BATCH,
    RECORD_BYTES,
    SHARD_RECORDS,
    VIT_B,
    WARM_RECORDS,
    check_batch,
    shared_batch,
    shuffled_batches,
)
from tests.bench.peers import PEERS, Peer, ReadBatch, folder_of
from tests.bench.results import Role, Section
from tests.bench.timing import Contender, cpu_seconds, is_installed, one_core, race, speed_rows

ROUNDS, SLOW = 42, 6
"""Slow peers take part in one round of six."""
GIGABYTES = WARM_RECORDS * RECORD_BYTES / 1e9


def plain_preadv(files: list[Path], offsets_R: NDArray[np.int64]) -> ReadBatch:
    """The limit: records whose places are known, read by nothing but the system call."""
    descriptors = [os.open(path, os.O_RDONLY) for path in files]

    def read(records_B: NDArray[np.int64], out_BTC: NDArray[np.float16]) -> None:
        for slot, record in enumerate(records_B.tolist()):
            descriptor = descriptors[record // SHARD_RECORDS]
            os.preadv(descriptor, [memoryview(out_BTC[slot]).cast("B")], int(offsets_R[record]))

    return read


def plain_zarr(root: Path, num_records: int = WARM_RECORDS) -> ReadBatch:
    """`preadv` of the Zarr layout's shard files, where a record and its checksum follow each other."""
    files = [root / token_shard_name(shard) for shard in range(num_records // SHARD_RECORDS)]
    return plain_preadv(files, np.arange(num_records) % SHARD_RECORDS * (RECORD_BYTES + CRC_BYTES))


def plain_tars(root: Path) -> ReadBatch:
    """`preadv` of the WebDataset layout's tars, whose members are found by their values."""
    import tarfile

    files = [root / tar_name(shard) for shard in range(WARM_RECORDS // SHARD_RECORDS)]
    offsets = []
    for path in files:
        with tarfile.open(path) as tar:
            members = [member for member in tar if member.name.endswith(".tokens.npy")]
        offsets += [member.offset_data + member.size - RECORD_BYTES for member in members]
    return plain_preadv(files, np.array(offsets, np.int64))


def our_reader(root: Path, check: str) -> ReadBatch:
    reader = open_store(root, check=check)
    return lambda records_B, out_BTC: reader.read_encoded(records_B, {"tokens": out_BTC})


def measure(zarr_store: Path, wds_store: Path, folder: Path) -> Section:
    """`zarr_store` has at least as many records as are read here."""
    shuffled = shuffled_batches(WARM_RECORDS)
    contenders = [
        _contender("raw preadv, Zarr shards", "limit", plain_zarr(zarr_store), shuffled),
        _contender("this store, Zarr, unchecked", "ours", our_reader(zarr_store, "never"), shuffled, target=0.95),
        _contender("this store, Zarr, crc32c checked", "ours", our_reader(zarr_store, "always"), shuffled),
        *(_peer(peer, folder, zarr_store) for peer in PEERS),
        _contender("raw preadv, WebDataset tars", "limit", plain_tars(wds_store), shuffled),
        _contender("this store, WebDataset, unchecked", "ours", our_reader(wds_store, "never"), shuffled, target=0.95),
        _contender("this store, WebDataset, crc32c checked", "ours", our_reader(wds_store, "always"), shuffled),
    ]
    with one_core():
        seconds = race(contenders, rounds=ROUNDS, clock=cpu_seconds)
    method = (
        f"{WARM_RECORDS:,} records of {RECORD_BYTES:,} bytes in the page cache, in shuffled batches of {BATCH} into "
        f"one buffer of the caller; one core, CPU seconds, best of {ROUNDS} rounds that take turns (slow peers: "
        f"{ROUNDS // SLOW}, on a part of the records)"
    )
    rows = speed_rows(contenders, seconds, gigabytes=GIGABYTES, unit="GB/CPU-s")
    return Section("Shuffled reads, warm", method, rows)


def _peer(peer: Peer, folder: Path, zarr_store: Path) -> Contender:
    if not is_installed(peer.package):
        return Contender(peer.name, "peer", None)
    read = peer.open(folder_of(folder, peer), zarr_store)
    batches = shuffled_batches(WARM_RECORDS)
    if peer.is_sequential:
        batches = [np.arange(n * len(batch), (n + 1) * len(batch)) for n, batch in enumerate(batches)]
    return _contender(peer.name, "peer", read, batches[: peer.batches], note=peer.note)


def _contender(
    name: str,
    role: Role,
    read: ReadBatch,
    batches: list[NDArray[np.int64]],
    *,
    target: float | None = None,
    note: str = "",
) -> Contender:
    """Ready to be timed; what it reads was checked once."""
    out_BTC = shared_batch()
    for records_B in batches[:2]:
        out_BTC[:] = VIT_B.num_tokens
        read(records_B, out_BTC)
        check_batch(records_B, out_BTC)

    def run() -> None:
        for records_B in batches:
            read(records_B, out_BTC)

    share = sum(map(len, batches)) / WARM_RECORDS
    every = SLOW if share < 1 else 1
    return Contender(name, role, run, share=share, every=every, target=target, note=note)
