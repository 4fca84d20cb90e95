"""Files behind a plain URL: whole and as their name says, or not at all."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from extract.download import download_file, sha256_in

DATA = bytes(range(256)) * 5000
SHA256 = hashlib.sha256(DATA).hexdigest()


class Server(ThreadingHTTPServer):
    """Gives `DATA` under every name; `cut.*` says to be longer than it is, `endless.*` does not say its length."""

    asked: list[str]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(404 if "missing" in self.path else 200)
        if "endless" not in self.path:
            self.send_header("Content-Length", str(len(DATA) + 100 * ("cut" in self.path)))
        self.end_headers()
        self.wfile.write(DATA)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    running = Server(("127.0.0.1", 0), Handler)
    running.asked = []
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def url(server: Server, path: str) -> str:
    return f"http://127.0.0.1:{server.server_port}/{path}"


@pytest.mark.parametrize(
    "path", ["w.pth", f"w-{SHA256[:8]}.pth", f"w-{SHA256}.pth", f"{SHA256}/w.pt", "w-20230101.pth", "endless.pth"]
)
def test_a_whole_file_is_kept(path: str, server: Server, tmp_path: Path) -> None:
    found = download_file(url(server, path), tmp_path / "cache")
    assert found.read_bytes() == DATA
    assert found.name.endswith(path.rpartition("/")[2])
    assert download_file(url(server, path), tmp_path / "cache") == found
    assert len(server.asked) == 1
    assert list((tmp_path / "cache").iterdir()) == [found]


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("cut.pth", rf"lost after {len(DATA)} of {len(DATA) + 100} bytes"),
        ("w-0123abcd.pth", f"sha256 {SHA256}, expected 0123abcd as in its name"),
        (f"{'0' * 63}a/w.pt", f"sha256 {SHA256}, expected 0{{63}}a as in its name"),
        ("endless-0123abcd.pth", "expected 0123abcd"),
        ("missing.pth", "404"),
    ],
)
def test_another_file_is_not_kept(path: str, told: str, server: Server, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=told):
        download_file(url(server, path), tmp_path)
    assert not list(tmp_path.iterdir())


def test_files_of_one_name_are_not_taken_for_one_another(server: Server, tmp_path: Path) -> None:
    one, other = (download_file(url(server, f"{folder}/model.pth"), tmp_path) for folder in ("one", "other"))
    assert one != other
    assert server.asked == ["/one/model.pth", "/other/model.pth"]


def test_a_proxy_finds_machines_that_this_one_does_not_know(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert download_file("http://weights.invalid/w.pth", tmp_path).read_bytes() == DATA
    assert server.asked == ["http://weights.invalid/w.pth"]


@pytest.mark.parametrize(
    ("address", "digest"),
    [
        ("https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth", "b5f2ef4d"),
        (f"https://openaipublic.azureedge.net/clip/models/{SHA256}/ViT-B-16.pt", SHA256),
        ("https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth", ""),
        ("https://example.org/convnext-base_22k.pth?x=-0123abcd.pth", ""),
    ],
)
def test_the_hash_in_a_url(address: str, digest: str) -> None:
    assert sha256_in(address) == digest
