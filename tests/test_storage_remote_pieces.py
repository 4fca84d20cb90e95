"""Pieces of files over http: at the same time, neighbours joined, never more bytes than were asked for."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import storage.remote
from storage.errors import InputError
from storage.files import Piece
from storage.remote import JOIN_GAP_BYTES, RemoteFiles
from tests.fixtures.folder_server import FolderServer, serving


def test_only_what_failed_is_asked_for_again(tmp_path: Path, serve: Any, pauses: list[float]) -> None:
    for number in range(20):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 100)
    server = serve(tmp_path)
    server.trouble = {"^7$": ["503", "503"], "^9$": ["cut"]}
    targets = [bytearray(10) for _ in range(20)]
    RemoteFiles(server.url).read_pieces([Piece(str(n), 5, [target], 10) for n, target in enumerate(targets)])
    assert targets == [bytes([number]) * 10 for number in range(20)]
    assert server.asked == {str(n): {7: 3, 9: 2}.get(n, 1) for n in range(20)}


def test_pieces_are_asked_for_at_the_same_time(tmp_path: Path, serve: Any) -> None:
    for number in range(16):
        (tmp_path / str(number)).write_bytes(bytes(10))
    server = serve(tmp_path)
    server.delay_seconds = 0.1
    RemoteFiles(server.url).read_pieces([Piece(str(n), 0, [bytearray(10)], 10) for n in range(16)])
    assert server.most_running >= 8


def test_neighbours_come_in_one_request(tmp_path: Path, serve: Any) -> None:
    (tmp_path / "x").write_bytes(bytes(10 * JOIN_GAP_BYTES))
    server = serve(tmp_path)
    near = [Piece("x", n * 1000, [bytearray(900)], 900) for n in (3, 1, 2, 0)]
    far = [Piece("x", 5 * JOIN_GAP_BYTES, [bytearray(10)], 10)]
    RemoteFiles(server.url).read_pieces(near + far)
    assert sorted(server.asked_ranges) == ["bytes=0-3899", f"bytes={5 * JOIN_GAP_BYTES}-{5 * JOIN_GAP_BYTES + 9}"]


@pytest.fixture(scope="module")
def long_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FolderServer, bytes]]:
    folder = tmp_path_factory.mktemp("served")
    data = np.random.default_rng(0).bytes(300_000)
    for name in ("a", "b"):
        (folder / name).write_bytes(data if name == "a" else data[::-1])
    with serving(folder) as server:
        yield server, data


pieces = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(0, 299_000), st.lists(st.integers(0, 300), min_size=1, max_size=3)),
    max_size=12,
)


@given(pieces, st.integers(1000, 200_000), st.integers(1000, 400_000))
def test_any_pieces_are_what_the_files_hold(
    long_file: tuple[FolderServer, bytes], wanted: list[tuple[str, int, list[int]]], joined: int, in_flight: int
) -> None:
    """In any order, overlapping, twice, empty, in several buffers; joined and grouped in any way."""
    server, data = long_file
    content = {"a": data, "b": data[::-1]}
    made = [Piece(name, start, [bytearray(size) for size in sizes], sum(sizes)) for name, start, sizes in wanted]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.remote, "MAX_JOINED_BYTES", joined)
        patch.setattr(storage.remote, "MAX_IN_FLIGHT_BYTES", in_flight)
        RemoteFiles(server.url).read_pieces(made)
    for piece in made:
        assert b"".join(piece.targets) == content[piece.name][piece.offset : piece.offset + piece.num_bytes]


def test_a_server_without_ranges_never_sends_a_whole_shard(tmp_path: Path, serve: Any) -> None:
    """What is longer than what was asked for is refused by its header, before it fills the memory."""
    with open(tmp_path / "x", "wb") as file:
        file.truncate(2**20)
    server = serve(tmp_path)
    server.trouble = {"x": ["no ranges"] * 100}
    files = RemoteFiles(server.url)
    for ask in (lambda: files.read_pieces([Piece("x", 0, [bytearray(9)], 9)]), lambda: files.read_end("x", 9)):
        with pytest.raises(InputError, match="asked for 9 bytes of x, the server sends 1,048,576"):
            ask()
    with pytest.raises(InputError, match="byte ranges"):
        files.read_pieces([Piece("x", 2**20 - 9, [bytearray(2**20)], 2**20)])
    assert len(files.read("x")) == 2**20  # whole is what was asked for
    storage_limit = storage.remote.MAX_WHOLE_BYTES
    try:
        storage.remote.MAX_WHOLE_BYTES = 2**19
        server.trouble.clear()
        with pytest.raises(InputError, match="larger than"):
            files.read("x")
    finally:
        storage.remote.MAX_WHOLE_BYTES = storage_limit


def test_a_digest_takes_little_memory(tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from storage.fingerprint import digest_file

    monkeypatch.setattr(storage.remote, "MAX_IN_FLIGHT_BYTES", 2**16)
    monkeypatch.setattr(storage.remote, "DIGEST_BLOCK_BYTES", 2**14)
    (tmp_path / "x").write_bytes(np.random.default_rng(1).bytes(3 * 2**16 + 5))
    server = serve(tmp_path)
    assert RemoteFiles(server.url).digest("x") == digest_file(tmp_path / "x")
    lengths = [int(b) - int(a) + 1 for a, b in re.findall(r"(\d+)-(\d+)", " ".join(server.asked_ranges))]
    assert max(lengths) == 2**14 and sum(lengths) == 3 * 2**16 + 5
