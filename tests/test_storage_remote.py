"""Stores over http from a server that misbehaves: what passes is asked for again, the rest is said in words."""

import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import storage.remote
from storage.answers import understand
from storage.errors import ConfigError, DamagedError, DecantError, InputError
from storage.files import Piece
from storage.reader import open_store
from storage.remote import RemoteFiles
from storage.verify import iter_damage
from tests.fixtures.folder_server import FolderServer, Handler


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
        ("https://host/store?token=abc", "no URL of a store"),
        ("https://host/store#part", "no URL of a store"),
        ("s3:///store", "no URL of a store"),
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
