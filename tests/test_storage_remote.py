"""Stores over http from a server that misbehaves: what passes is asked for again, the rest is said in words."""

import os
import pickle
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import storage.remote
from storage.answers import understand
from storage.errors import ConfigError, DamagedError, DecantError, InputError
from storage.files import Piece
from storage.reader import open_store
from storage.remote import JOIN_GAP_BYTES, RemoteFiles
from storage.verify import iter_damage


class FolderServer(ThreadingHTTPServer):
    """Serves the files of a folder by ranges; `trouble` says what else happens to the next requests for a path."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.trouble: dict[str, list[str]] = {}
        self.asked: Counter[str] = Counter()
        self.asked_ranges: list[str] = []
        self.running = self.most_running = 0
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.delay_seconds = 0.0
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is no news."""


class Handler(BaseHTTPRequestHandler):
    server: FolderServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        server, name = self.server, self.path.partition("?")[0].removeprefix("/")
        with server.lock:
            server.asked[name] += 1
            server.asked_ranges.append(self.headers.get("Range", ""))
            server.running += 1
            server.most_running = max(server.most_running, server.running)
            troubles = next((todo for part, todo in server.trouble.items() if re.search(part, name) and todo), None)
            trouble = (troubles.pop(0) if len(troubles) > 1 or troubles[0] != "always" else "") if troubles else ""
        try:
            time.sleep(server.delay_seconds)
            self.answer(server.root / name, trouble)
        finally:
            with server.lock:
                server.running -= 1

    do_HEAD = do_GET

    def answer(self, path: Path, trouble: str) -> None:
        if trouble.isdecimal():
            self.send(int(trouble), b"<Error><Code>InWords</Code><Message>in words</Message></Error>")
        elif trouble == "hang up":
            self.hang_up()
        elif trouble == "silence":
            self.server.stopped.wait(30)
        elif not path.is_file():
            self.send(404, b"")
        else:
            data, header = path.read_bytes(), self.headers.get("Range")
            if header is None or trouble == "no ranges":
                self.send(200, data)
                return
            first, _, last = header.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(0, len(data) - int(last))
            part = data[start : int(last) + 1 if first else None]
            self.send(206, part, cut=trouble == "cut") if part else self.send(416, b"")

    def send(self, status: int, body: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.hang_up()

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *arguments: object) -> None:
        """Silent."""


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], FolderServer]]:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    servers = []

    def start(root: Path) -> FolderServer:
        server = FolderServer(root)
        threading.Thread(target=partial(server.serve_forever, 0.02), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stopped.set()
        server.shutdown()
        server.server_close()


@pytest.fixture(params=["http", "s3"])
def served(
    make_store: Any, serve: Callable[[Path], FolderServer], request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[FolderServer, Path, str]:  # fmt: skip
    """A store, its server and its URL. As far as reading goes, the server could be one of objects, too."""
    root, _, _ = make_store("bucket/store")
    server = serve(root.parent.parent)
    if request.param == "http":
        return server, root, f"{server.url}/bucket/store"
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "made-up", "AWS_SECRET_ACCESS_KEY": "made-up",
        "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return server, root, "s3://bucket/store"


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses between attempts, which are not made."""
    made: list[float] = []
    monkeypatch.setattr(storage.remote.time, "sleep", lambda seconds: made.append(seconds) if seconds else None)
    return made


@pytest.mark.parametrize(
    "troubles", [["503", "503"], ["hang up"] * 3, ["cut", "500", "429"], ["502", "hang up", "cut"]]
)
def test_what_passes_is_asked_for_again(
    served: tuple[FolderServer, Path, str], pauses: list[float], troubles: list[str]
) -> None:
    server, root, url = served
    expected = open_store(root).new_batch(16)
    open_store(root).read_encoded(np.arange(16), expected)
    server.trouble = {name: list(troubles) for name in ("manifest", "receipts/00000", "tokens/c/1", "tokens/c/2")}
    reader = open_store(url)
    found = reader.new_batch(16)
    reader.read_encoded(np.arange(16), found)
    np.testing.assert_array_equal(found["tokens"], expected["tokens"])
    assert not any(server.trouble.values())
    fewest = 4 * sum(trouble != "hang up" for trouble in troubles)  # the library asks once more after that one itself
    assert max(fewest, 4) <= len(pauses) <= 4 * len(troubles) and all(0.1 <= pause <= 1.2 for pause in pauses)
    assert len(set(pauses)) == len(pauses), "pauses are jittered"


def test_a_forked_process_opens_connections_of_its_own(
    served: tuple[FolderServer, Path, str], fork: Callable[[Callable[[], object]], int]
) -> None:
    """The parent has some open when it forks, and goes on reading through them."""
    server, root, url = served
    files, expected = RemoteFiles(url, timeout_seconds=20, attempts=1), (root / "plan.json").read_bytes()

    def read() -> None:
        for _ in range(3):
            assert files.read("plan.json") == expected

    read()
    for _ in range(3):
        assert os.waitstatus_to_exitcode(os.waitpid(fork(read), 0)[1]) == 0
        read()
    assert server.asked["bucket/store/plan.json"] == 3 * 7


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


@pytest.mark.parametrize(
    ("trouble", "over_http", "from_a_bucket"),
    [
        ("503", "503 Service Unavailable, 3 times; check the network", "503.*, 3 times; .*AWS_ENDPOINT"),
        ("hang up", "ServerDisconnected.*3 times", "closed.*3 times"),
        ("silence", "3 times; check the network", "3 times; check the network"),
        ("403", "403 Forbidden; check that the store may be read by everyone", "403.*; check AWS_PROFILE"),
        ("401", r"401 Unauthorized; .*netrc", "401.*; check AWS_PROFILE"),
        ("400", "400 Bad Request; check the URL", "400.*; check the URL"),
        ("no ranges", "does not answer byte ranges", ""),
    ],
)
def test_what_does_not_pass_is_said_in_time(
    served: tuple[FolderServer, Path, str], pauses: list[float], trouble: str, over_http: str, from_a_bucket: str
) -> None:
    server, _, url = served
    words = over_http if url.startswith("http") else from_a_bucket
    if not words:
        return  # object stores know ranges
    files = RemoteFiles(url, timeout_seconds=0.15 if trouble == "silence" else 20, attempts=3)
    server.trouble = {"tokens": [trouble] * 100}
    asked: list[Callable[[], object]] = [
        lambda: files.read_pieces([Piece("tokens/c/0/0/0", 0, [bytearray(10)], 10)]),
        lambda: files.exists("tokens/c/0/0/0"),
    ]
    if trouble != "no ranges":
        asked += [lambda: files.size("tokens/c/0/0/0"), lambda: files.digest("tokens/c/0/0/0")]
    for ask in asked:
        begun = time.monotonic()
        with pytest.raises(InputError, match=words) as caught:
            ask()
        assert time.monotonic() - begun < 15 and url in str(caught.value)
    assert len(pauses) == (2 * len(asked) if "3 times" in words else 0)


def test_a_server_that_answers_too_slowly_is_given_up(tmp_path: Path, serve: Any, pauses: list[float]) -> None:
    """Bytes that trickle in keep a connection alive, but not for ever."""

    (tmp_path / "x").write_bytes(bytes(100))
    server = serve(tmp_path)

    def trickle(handler: Handler, path: Path, trouble: str) -> None:
        handler.send_response(206)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            if server.stopped.wait(0.05):
                return

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "answer", trickle)
        begun = time.monotonic()
        with pytest.raises(InputError, match="Timeout"):
            RemoteFiles(server.url, timeout_seconds=0.2, attempts=2).read_end("x", 100)
        assert time.monotonic() - begun < 15


def test_missing_short_and_swapped_files(served: tuple[FolderServer, Path, str]) -> None:
    _, root, url = served
    path, receipt = root / "tokens/c/1/0/0", root / "receipts/00001.json"
    whole, out = path.read_bytes(), open_store(root).new_batch(6)
    records_B = np.arange(6, 12)
    cases: list[tuple[bytes | None, str]] = [
        (None, "is missing"), (b"", "bytes, expected|ends before|impossible|checksum"),
        (whole[:50], "bytes, expected"), ((root / "tokens/c/0/0/0").read_bytes(), "is damaged"),
    ]  # fmt: skip
    for data, words in cases:
        path.unlink() if data is None else path.write_bytes(data)
        with pytest.raises(DamagedError, match=words):
            open_store(url).read_encoded(records_B, out)
        if url.startswith("http"):  # whether an object is missing, s3fs asks a listing
            assert [damage.shard for _, found in iter_damage(url) for damage in found] == [1]
        path.write_bytes(whole)
    reader = open_store(url)
    reader.read_encoded(records_B, out)
    path.write_bytes(whole[:100])  # while it is being read
    with pytest.raises(DamagedError, match=r"tokens/c/1/0/0 ends before byte"):
        reader.read_encoded(records_B, out)
    path.write_bytes(whole)
    receipt.unlink()
    with pytest.raises(DamagedError, match=r"receipts/00001\.json is missing"):
        open_store(url).read_encoded(records_B, out)
    (root / "manifest.json").unlink()
    with pytest.raises(InputError, match="unfinished"):
        open_store(url)
    if url.startswith("http"):
        with pytest.raises(InputError, match="only finished stores"):
            open_store(url, allow_unfinished=True)
    (root / "plan.json").unlink()
    with pytest.raises(InputError, match="holds no store"):
        open_store(url)


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


@pytest.fixture(scope="module")
def long_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FolderServer, bytes]]:
    folder = tmp_path_factory.mktemp("served")
    data = np.random.default_rng(0).bytes(300_000)
    for name in ("a", "b"):
        (folder / name).write_bytes(data if name == "a" else data[::-1])
    server = FolderServer(folder)
    threading.Thread(target=partial(server.serve_forever, 0.02), daemon=True).start()
    yield server, data
    server.shutdown()
    server.server_close()


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


def test_neighbours_come_in_one_request(tmp_path: Path, serve: Any) -> None:
    (tmp_path / "x").write_bytes(bytes(10 * JOIN_GAP_BYTES))
    server = serve(tmp_path)
    near = [Piece("x", n * 1000, [bytearray(900)], 900) for n in (3, 1, 2, 0)]
    far = [Piece("x", 5 * JOIN_GAP_BYTES, [bytearray(10)], 10)]
    RemoteFiles(server.url).read_pieces(near + far)
    assert sorted(server.asked_ranges) == ["bytes=0-3899", f"bytes={5 * JOIN_GAP_BYTES}-{5 * JOIN_GAP_BYTES + 9}"]


def test_a_digest_takes_little_memory(tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from storage.fingerprint import digest_file

    monkeypatch.setattr(storage.remote, "MAX_IN_FLIGHT_BYTES", 2**16)
    monkeypatch.setattr(storage.remote, "DIGEST_BLOCK_BYTES", 2**14)
    (tmp_path / "x").write_bytes(np.random.default_rng(1).bytes(3 * 2**16 + 5))
    server = serve(tmp_path)
    assert RemoteFiles(server.url).digest("x") == digest_file(tmp_path / "x")
    lengths = [int(b) - int(a) + 1 for a, b in re.findall(r"(\d+)-(\d+)", " ".join(server.asked_ranges))]
    assert max(lengths) == 2**14 and sum(lengths) == 3 * 2**16 + 5


def test_nothing_is_opened_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.remote, "connect", lambda *arguments: pytest.fail("connected"))
    files = RemoteFiles("s3://bucket/folder/", timeout_seconds=3, attempts=2)
    again = pickle.loads(pickle.dumps(files))
    assert (again.location, again.timeout_seconds, again.attempts) == ("s3://bucket/folder", 3, 2)


def test_passwords_are_not_printed(pauses: list[float]) -> None:
    files = RemoteFiles("http://user:pass-word@127.0.0.1:9/store", attempts=2)
    for ask in (files.exists, files.size, files.read):
        with pytest.raises(InputError) as caught:
            ask("x")
        assert "pass-word" not in str(caught.value) and caught.value.__cause__ is None
        assert "127.0.0.1:9/store" in str(caught.value)
    assert "pass-word" not in files.location


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://host/store", "unknown kind of URL 'ftp'"),
        ("https://host/store?token=abc", "no store's URL"),
        ("https://host/store#part", "no store's URL"),
        ("s3:///store", "no store's URL"),
    ],
)
def test_urls_that_are_none(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        open_store(url)
    assert "abc" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "extra"), [("s3://bucket/store", "s3"), ("gs://bucket/x", "gcs"), ("https://h/x", "http")]
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, url: str, extra: str) -> None:
    import fsspec

    def missing(protocol: str) -> None:
        raise ImportError(f"Please install what {protocol} takes")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ConfigError, match=rf"pip install 'decant-fd\[{extra}\]'"):
        open_store(url)


def test_mistakes_of_the_program_are_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    files = RemoteFiles("s3://bucket/store")
    monkeypatch.setattr(storage.remote, "connect", lambda *arguments: object())
    with pytest.raises(AttributeError):
        files.read("x")
    assert understand(ValueError("x")).meaning == "bug" and not issubclass(ValueError, DecantError)
