"""Data sets behind URLs: the same images as on the disk, by byte ranges, and every refusal in words."""

import functools
import http.server
import io
import os
import pickle
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import storage.data_files
import storage.remote_data
from storage.errors import BadImageError, ConfigError, DamagedError, InputError
from storage.image_index import ImageIndex, build_index
from storage.images import open_images
from tests.fixtures.folder_server import FolderServer
from tests.fixtures.parquet import hub_table
from tests.fixtures.tars import add, contents

MakeImages = Callable[..., Path]


@pytest.fixture
def put(s3: Any, bucket: str, tmp_path: Path) -> Callable[[Path], str]:
    """Copy a folder into a bucket; gives its URL."""

    def copy(root: Path) -> str:
        for path in root.rglob("*"):
            if path.is_file():
                s3.put_object(Bucket=bucket, Key=f"{root.name}/{path.relative_to(root)}", Body=path.read_bytes())
        return f"s3://{bucket}/{root.name}"

    return copy


@pytest.fixture
def pages() -> Iterator[Callable[[Path], str]]:
    """Serve a folder with a page of each folder, as common servers do."""
    servers = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None: ...

    def serve(root: Path) -> str:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(root)))
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def listed(location: str | Path) -> list[tuple[str, str | None, str | None]]:
    return [(entry.key, entry.class_name, entry.split) for entry in open_images(str(location)).list_images()]


def build(location: str | Path, cache: Path) -> ImageIndex:
    return build_index(str(location), eval_fraction=0.3, seed=0, cache_dir=cache)


def assert_same(url: str, root: Path, cache: Path) -> None:
    """The same list, division, digests and pixels; workers get them from the list alone."""
    index, truth = build(url, cache), build(root, cache)
    assert list(index.rows) == list(truth.rows) and index.classes == truth.classes
    assert index.fingerprint == truth.fingerprint and index.location == url
    images = pickle.loads(pickle.dumps(ImageIndex.from_file(cache, index.to_file()))).images
    np.testing.assert_array_equal(images.read_image(1), truth.images.read_image(1))


def test_class_folders_in_a_bucket(make_images: MakeImages, put: Callable[[Path], str], tmp_path: Path) -> None:
    root = make_images("divided/train", per_class=3).parent
    make_images("divided/val", per_class=1)
    (root / "train" / "dark" / "é %41+#.png").write_bytes((root / "train" / "dark" / "000.png").read_bytes())
    (root / "train" / ".hidden.png").write_bytes(b"x")
    (root / "readme.txt").write_bytes(b"x")
    url = put(root)
    assert_same(url, root, tmp_path / "cache")
    assert listed(url + "/train") == listed(root / "train")
    with pytest.raises(InputError, match=f"no image in {url}/val/none|no such data: {url}/val/none"):
        open_images(f"{url}/val/none").list_images()


def test_class_folders_on_pages(
    make_images: MakeImages, pages: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    root = make_images("some images", per_class=2)
    (root / "dark" / "é %41+#?.png").write_bytes((root / "dark" / "000.png").read_bytes())
    (root / "readme.txt").write_bytes(b"x")
    url = pages(root)
    assert_same(url, root, tmp_path / "cache")
    with pytest.raises(InputError, match=r"no such data: .*/none.*name the files"):
        open_images(f"{url}/none").list_images()


@pytest.fixture
def tars(tmp_path: Path, make_images: MakeImages) -> Path:
    """Plain tars, and one of tars."""
    root, images = tmp_path / "tars", make_images(per_class=4)
    root.mkdir()
    for number, name in enumerate(("train-000", "train-001", "val-000")):
        with tarfile.open(root / f"{name}.tar", "w") as archive:
            for path in sorted(images.rglob("*.png"))[number::3]:
                add(archive, f"{path.parent.name}-{path.name}", path.read_bytes())
                add(archive, f"{path.parent.name}-{path.stem}.cls", path.parent.name.encode())
            add(archive, f"large-{number}.bin", bytes(2**20))
    with tarfile.open(root / "train-002.tar", "w") as archive:
        for name in ("n01", "n02"):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as part:
                add(part, f"{name}_1.JPEG", (images / "dark" / "000.png").read_bytes())
            add(archive, f"{name}.tar", inner.getvalue())
    return root


def test_tars_in_a_bucket_and_over_http(
    tars: Path, put: Callable[[Path], str], serve: Callable[[Path], FolderServer], tmp_path: Path
) -> None:
    url, server = put(tars), serve(tars.parent)
    for place in (url, f"{url}/*.tar", f"{url}/{{train-{{000..002}},val-000}}.tar"):
        assert_same(place, tars, tmp_path / "cache")
    over_http = f"{server.url}/tars/{{train-{{000..002}},val-000}}.tar"
    assert contents(over_http) == contents(tars)
    assert_same(over_http, tars, tmp_path / "cache")
    assert listed(f"{server.url}/tars/train-001.tar") == listed(tars / "train-001.tar")
    with pytest.raises(InputError, match=r"no such data: http.*over http a folder is listed only"):
        open_images(f"{server.url}/tars")
    with pytest.raises(InputError, match=r"no such data: http.*name the files"):
        open_images(f"{server.url}/tars/*.tar")


def test_a_tar_is_listed_by_its_headers_and_known_afterwards(
    tars: Path, serve: Callable[[Path], FolderServer], tmp_path: Path
) -> None:
    server, cache = serve(tars.parent), tmp_path / "cache"
    cache.mkdir()
    for name in ("big",):
        with tarfile.open(tars / f"{name}.tar", "w") as archive:
            for number in range(6):
                add(archive, f"{number}.png", bytes([number]) * 2**20)
    url = f"{server.url}/tars/big.tar"
    source = open_images(url, cache)
    entries = source.list_images()
    ranges = [text.removeprefix("bytes=").split("-") for text in server.asked_ranges if text]
    fetched = sum(int(last) + 1 - int(first) for first, last in ranges)
    assert len(entries) == 6 and fetched < 2**20 and len(ranges) < 20
    server.asked_ranges.clear()
    again = open_images(url, cache)
    assert again.list_images() == entries and not any(server.asked_ranges), "one question whether it has changed"
    assert again.read_bytes("3.png") == bytes([3]) * 2**20
    assert [text for text in server.asked_ranges if text] == [
        f"bytes={3 * (2**20 + 512) + 512}-{4 * (2**20 + 512) - 1}"
    ]


@pytest.mark.parametrize("kind", ["s3", "http"])
def test_parquet_files(
    make_images: MakeImages, put: Callable[[Path], str], serve: Callable[[Path], FolderServer], tmp_path: Path,
    kind: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import pyarrow.parquet as pq

    root = tmp_path / "hub"
    (root / "data").mkdir(parents=True)
    files = sorted(make_images(per_class=6).rglob("*.png"))
    for name, part in {"train-00000-of-00001": files[::2], "validation-00000-of-00001": files[1::2]}.items():
        labels = [int(file.parent.name == "light") for file in part]
        table = hub_table([file.read_bytes() for file in part], labels, ["dark", "light"])
        pq.write_table(table, root / "data" / f"{name}.parquet", row_group_size=2)
    monkeypatch.setattr(storage.remote_data, "BLOCK_BYTES", 5000)  # a row group in several requests
    names = "{train,validation}-00000-of-00001.parquet"
    url = put(root) if kind == "s3" else f"{serve(root).url}/data/{names}"
    assert_same(url, root, tmp_path / "cache")
    if kind == "s3":
        assert_same(f"{url}/data", root, tmp_path / "cache")


def test_a_file_url_is_a_path(make_images: MakeImages, tmp_path: Path) -> None:
    root = make_images(per_class=4)
    assert build(f"file://{root}", tmp_path / "cache") == build(root, tmp_path / "cache")


def test_a_changed_object_is_read_again_and_no_other(
    make_images: MakeImages, put: Callable[[Path], str], s3: Any, bucket: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    root = make_images(per_class=3)
    url, cache = put(root), tmp_path / "cache"
    first = build(url, cache)
    read: list[str] = []
    read_bytes = storage.remote_data.RemoteImages.read_bytes
    monkeypatch.setattr(
        storage.remote_data.RemoteImages, "read_bytes", lambda self, key: read.append(key) or read_bytes(self, key)
    )
    assert build(url, cache) == first and read == []
    data = bytearray((root / "dark" / "001.png").read_bytes())
    data[-1] ^= 1  # of the same size
    s3.put_object(Bucket=bucket, Key="images/dark/001.png", Body=bytes(data))
    second = build(url, cache)
    assert read == ["dark/001.png"] and second.fingerprint != first.fingerprint


# Refusals


def test_credentials_are_refused_and_never_shown(tmp_path: Path) -> None:
    for url in (
        "https://someone:secret-word@host/x.tar", "https://secret-word@host/data", "s3://key:secret-word@bucket/x-*.tar",
        "https://host/x.tar?token=secret-word", "https://host/x-{0..3}.tar?sig=secret-word", "https://host/x#secret-word",
    ):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            build(url, tmp_path / "cache")
        assert ("secret-word" not in str(caught.value) and "host" in str(caught.value)) or "bucket" in str(caught.value)
        assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


def test_what_is_not_there(put: Callable[[Path], str], tars: Path, serve: Callable[[Path], FolderServer]) -> None:
    url, server = put(tars), serve(tars.parent)
    for place in (f"{url}/none.tar", f"{url}/train-{{000..009}}.tar", f"{server.url}/tars/none.parquet"):
        with pytest.raises(InputError, match=r"(none.tar|train-003.tar|none.parquet) is missing; put it there"):
            contents(place)
    with pytest.raises(InputError, match=f"no file matches {url}/x-\\*.tar"):
        open_images(f"{url}/x-*.tar")
    with pytest.raises(InputError, match="check the bucket's name"):
        open_images("s3://no-such-bucket-anywhere/data")
    with pytest.raises(ConfigError, match="unknown kind of URL 'ftp'"):
        open_images("ftp://host/data")
    source = open_images(url)
    source.list_images()
    (tars / "val-000.tar").unlink()
    over_http = open_images(f"{server.url}/tars/train-001.tar")
    key = over_http.list_images()[0].key
    (tars / "train-001.tar").unlink()
    with pytest.raises(BadImageError, match=r"^train-001\.tar is missing$"):
        over_http.read_bytes(key)


@pytest.mark.parametrize(("trouble", "words"), [("503", "503.*5 times"), ("403", "403 Forbidden")])
def test_a_server_that_fails_is_no_bad_image(
    tars: Path, serve: Callable[[Path], FolderServer], pauses: list[float], trouble: str, words: str
) -> None:
    server = serve(tars.parent)
    source = open_images(f"{server.url}/tars/train-000.tar")
    key = source.list_images()[0].key
    server.trouble = {"tar": [trouble] * 100}
    with pytest.raises(InputError, match=words):
        source.read_bytes(key)
    server.trouble = {"tar": ["503", "cut"]}
    assert source.read_bytes(key)


def test_a_cut_tar_is_damaged(tars: Path, put: Callable[[Path], str]) -> None:
    path = tars / "train-000.tar"
    path.write_bytes(path.read_bytes()[:5000])
    url = put(tars)
    with pytest.raises(DamagedError, match=f"{url}/train-000.tar"):
        contents(url)
