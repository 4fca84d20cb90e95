"""Content hashes. Nothing that differs between machines (paths, times, host names) may go into one."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import crc32c as _crc32c
from blake3 import blake3

FINGERPRINT_CHARS = 32
"""128 bits in hex: no two contents will ever share one by accident."""


def digest_bytes(data: bytes | memoryview) -> str:
    return blake3(data).hexdigest()[:FINGERPRINT_CHARS]


def digest_parts(parts: Iterable[bytes | memoryview]) -> str:
    """Digest of a sequence of byte strings; the boundaries count."""
    hasher = blake3()
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.hexdigest()[:FINGERPRINT_CHARS]


def digest_pieces(pieces: Iterable[bytes | memoryview]) -> str:
    """Digest of the pieces' concatenation: that of the file they are written to."""
    hasher = blake3()
    for piece in pieces:
        hasher.update(piece)
    return hasher.hexdigest()[:FINGERPRINT_CHARS]


def digest_json(value: Any) -> str:
    """Digest of canonical JSON: sorted keys, no spaces, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return digest_bytes(text.encode())


def digest_file(path: Path) -> str:
    hasher = blake3()  # one thread: those of a pool do not live on in a forked process, which would wait for ever
    hasher.update_mmap(path)
    return hasher.hexdigest()[:FINGERPRINT_CHARS]


def short(fingerprint: str) -> str:
    """The few characters that people read and folders carry."""
    return fingerprint[:10]


def crc32c(data: Any) -> int:
    """Checksum of a buffer; other threads run meanwhile."""
    return int(_crc32c.crc32c(data))


def crc32c_bytes(data: Any) -> bytes:
    """The checksum as the Zarr codec `crc32c` writes it behind the data."""
    return crc32c(data).to_bytes(4, "little")
