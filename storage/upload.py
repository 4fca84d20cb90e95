"""A finished local store to an object store. Whoever reads it there sees all of it or none.

The order is that of writing on a disk: a shard's objects, then its receipt; the metadata; the manifest last. A receipt
holds the digests of its shard's files and is sent after them, so a receipt that is there already, byte for byte, says
that this shard came over whole; one that differs is removed before its shard's objects are replaced.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from storage.answers import MissingObjectError
from storage.connect import EXTRAS
from storage.errors import ConfigError, DamagedError
from storage.files import REMEDY, LocalFiles
from storage.fingerprint import digest_file
from storage.reader import load_manifest
from storage.receipts import parse_receipt, receipt_name
from storage.records import FileEntry, StorePlan
from storage.remote import RemoteFiles
from storage.stage import Progress, SilentProgress

MANIFEST = "manifest.json"
SHARDS_AT_A_TIME = 8
"""Most of a small object's time is a round trip."""


def upload_store(root: Path, url: str, progress: Progress | None = None) -> None:
    """Copy a finished store to `url`; goes on with what is there already.

    Raises:
        InputError: no finished store at `root`; the bucket refuses, or cannot be reached.
        ConfigError: a URL that nothing can be written to, or one that holds another store.
        DamagedError: a local file is not what was committed; it is not sent.
    """
    progress = progress or SilentProgress()
    local, remote = LocalFiles(root), RemoteFiles(url)
    if EXTRAS[remote.scheme] == "http":
        raise ConfigError(f"nothing can be written to {remote.location}; upload to s3:// or gs://")
    manifest = load_manifest(local)
    _refuse_other_store(local, remote)
    progress.start(manifest.plan.num_shards, "shards")
    pool = ThreadPoolExecutor(SHARDS_AT_A_TIME, "upload")
    try:
        plan = manifest.plan
        for sent in pool.map(lambda index: _upload_shard(local, remote, plan, index), range(plan.num_shards)):
            progress.advance(1, sent=sent)
    finally:
        pool.shutdown(cancel_futures=True)
    for entry in manifest.metadata:
        if _read_if_there(remote, entry.name) != local.read(entry.name):
            _send(local, remote, entry)
    if _read_if_there(remote, MANIFEST) != local.read(MANIFEST):
        _put(local, remote, MANIFEST)


def _refuse_other_store(local: LocalFiles, remote: RemoteFiles) -> None:
    """Take a URL that holds nothing, or a part of the same store."""
    for name in (MANIFEST, "plan.json"):
        found = _read_if_there(remote, name)
        if found is not None and found != local.read(name):
            raise ConfigError(
                f"{remote.location} holds another store than {local.location} (its {name} differs); choose another URL"
            )


def _upload_shard(local: LocalFiles, remote: RemoteFiles, plan: StorePlan, index: int) -> int:
    """Send what is not there of a shard; returns the number of objects sent."""
    name = receipt_name(index)
    receipt = local.read(name)
    entry = parse_receipt(local, plan, index, receipt)
    found = _read_if_there(remote, name)
    is_same = found == receipt
    if found is not None and not is_same:
        remote.ask(name, lambda system, seconds: system.rm_file(remote.path(name), timeout=seconds))
    missing = [file for file in entry.files if not is_same or remote.size(file.name) != file.num_bytes]
    for file in missing:
        _send(local, remote, file)
    if not is_same:
        _put(local, remote, name)
    return len(missing) + (not is_same)


def _send(local: LocalFiles, remote: RemoteFiles, file: FileEntry) -> None:
    """Send a file whose digest is known.

    Raises:
        DamagedError: it is not what was committed.
    """
    path = local.root / file.name
    if local.size(file.name) != file.num_bytes or (file.num_bytes and digest_file(path) != file.digest):
        raise DamagedError(f"{path} is not what was committed, so it is not uploaded; {REMEDY}")
    _put(local, remote, file.name)


def _put(local: LocalFiles, remote: RemoteFiles, name: str) -> None:
    """Send a file; the object is there when all of its bytes are."""
    source = os.fspath(local.root / name)
    put: Callable[..., None] = lambda system, seconds: system.put_file(source, remote.path(name), timeout=seconds)  # noqa: E731
    remote.ask(name, put, local.size(name) or 0)


def _read_if_there(remote: RemoteFiles, name: str) -> bytes | None:
    try:
        return remote.read(name)
    except MissingObjectError:
        return None
