"""Stores in buckets: uploaded to a real object-store server on this machine, and read there as from a disk."""

import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage import upload
from storage.errors import ConfigError, DamagedError, InputError
from storage.files import Files, open_files
from storage.reader import FeatureReader, open_store
from storage.remote import RemoteFiles
from storage.upload import upload_store
from storage.verify import check_structure, iter_damage

ROOT = Path(__file__).resolve().parent.parent
SECRET = "made-up-secret-access-key"
VARIANTS = [
    {"backend": "zarr"},
    {"backend": "zarr", "view_px": 16},
    {"backend": "wds", "view_px": 16},
    {"backend": "zarr", "encoding": {"kind": "zstd"}},
    {"backend": "wds", "view_px": 16, "encoding": {"kind": "bit_round"}},
    {"backend": "wds", "view_px": 16, "encoding": {"kind": "int8", "channel_scale": [0.125] * 8}},
]
HOLES = (2, 4)


class Requests(logging.Handler):
    """What the server was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        found = re.search(r"(GET|HEAD|PUT|POST|DELETE) (\S+)", record.getMessage())
        if found:
            self.lines.append(f"{found[1]} {found[2]}")

    def take(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Requests]]:
    from moto.server import ThreadedMotoServer

    log, requests = logging.getLogger("werkzeug"), Requests()
    level, propagates = log.level, log.propagate
    log.setLevel(logging.INFO)
    log.addHandler(requests)
    log.propagate = False
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}", requests
    moto.stop()
    log.removeHandler(requests)
    log.setLevel(level)
    log.propagate = propagates


@pytest.fixture
def environment(server: tuple[str, Requests], monkeypatch: pytest.MonkeyPatch) -> str:
    """Only what the usual variables say; the server's address."""
    for name in [
        name for name in os.environ if name.startswith(("AWS_", "FSSPEC_")) or name.lower().endswith("_proxy")
    ]:
        monkeypatch.delenv(name)
    values = {
        "AWS_ENDPOINT_URL": server[0], "AWS_ACCESS_KEY_ID": "made-up", "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return server[0]


@pytest.fixture(scope="module")
def client(server: tuple[str, Requests]) -> Any:
    import boto3

    return boto3.client(
        "s3", endpoint_url=server[0], region_name="us-east-1", aws_access_key_id="made-up", aws_secret_access_key=SECRET
    )


@pytest.fixture
def s3(client: Any, environment: str) -> Any:
    """The library that others use, and only what the usual variables say."""
    return client


@pytest.fixture
def bucket(s3: Any, request: pytest.FixtureRequest) -> str:
    """A new one for each test."""
    name = f"bucket-{abs(hash(request.node.nodeid)):x}"
    s3.create_bucket(Bucket=name)
    return name


def sent(s3: Any, bucket: str, prefix: str = "") -> dict[str, bytes]:
    """Every object of a bucket."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    return {key: s3.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


def publish(s3: Any, bucket: str) -> None:
    for key in sent(s3, bucket):
        s3.put_object_acl(Bucket=bucket, Key=key, ACL="public-read")


def everything(reader: FeatureReader) -> dict[str, Any]:
    """All that a store tells of its records, without the holes, in a shuffled order."""
    views = reader.plan.views_per_image
    usable_B = (reader.usable_images()[:, None] * views + np.arange(views)).ravel()
    records_B = np.random.default_rng(0).permutation(usable_B)
    tokens_BTC = np.empty((len(records_B), *reader.plan.shape_TC), np.float16)
    reader.read_batch(records_B, tokens_BTC)
    return {
        "tokens": tokens_BTC, "views": reader.views(records_B), "images": reader.images,
        "jpegs": reader.read_jpegs(records_B) if reader.plan.stored_views else None,
        "mean": reader.token_statistics(records_B)[0], "std": reader.token_statistics(records_B)[1],
    }  # fmt: skip


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(found[name], value)
        else:
            assert found[name] == value, name


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_store_in_a_bucket_is_read_as_from_a_disk(make_store: Any, s3: Any, bucket: str, changes: Any) -> None:
    root, plan, images = make_store(num_images=5, bad=HOLES, **changes)
    upload_store(root, f"s3://{bucket}/a/store")
    publish(s3, bucket)
    expected = everything(open_store(root))
    for url in (f"s3://{bucket}/a/store/", f"{os.environ['AWS_ENDPOINT_URL']}/{bucket}/a/store"):
        reader = open_store(url)
        assert_same(everything(reader), expected)
        assert reader.manifest == open_store(root).manifest
        for local, remote in zip(open_store(root).iter_shard(1), reader.iter_shard(1), strict=True):
            assert local[:3] == remote[:3] and local.jpeg == remote.jpeg
            np.testing.assert_array_equal(local.tokens_TC, remote.tokens_TC)
        with pytest.raises(DamagedError, match="is a hole"):
            reader.read(images.keys[HOLES[0]], 0)
    assert dict(iter_damage(url)) == {index: [] for index in range(plan.num_shards)}  # over http, the slower way


@pytest.mark.parametrize("backend", ["zarr", "wds"])
def test_requests_a_batch(
    make_store: Any, bucket: str, environment: str, server: tuple[str, Requests], backend: str
) -> None:
    """Opening asks for the manifest; a shard's first use for its receipt and index; a record for one range at most."""
    features = {"teacher": "made-up", "num_prefix_tokens": 1, "grid_hw": (16, 16), "channels": 160}  # 82 kB a record
    root, plan, _ = make_store(num_images=24, images_per_shard=12, view_px=16, backend=backend, features=features)
    upload_store(root, f"s3://{bucket}/store")
    requests = server[1]
    requests.take()
    reader = open_store(f"s3://{bucket}/store")
    assert len(requests.take()) == 2 and not reader.files._held[1].dircache  # type: ignore[attr-defined]
    out_BTC = np.empty((24, *plan.shape_TC), np.float16)
    records_B = np.arange(0, 48, 2)  # every second one, so no two records touch
    reader.read_batch(records_B, out_BTC)
    first = requests.take()
    assert len(first) == 24 + 2 * 2, first
    reader.read_batch(records_B, out_BTC)
    assert len(requests.take()) == 24
    reader.read_batch(np.arange(24), out_BTC)
    assert len(requests.take()) == 1  # neighbours come together
    reader.views(records_B)
    assert len(requests.take()) == (2 if backend == "zarr" else 0)
    reader.hint(records_B)
    assert requests.take() == []


def test_an_upload_sends_the_manifest_last_and_goes_on(
    make_store: Any, s3: Any, bucket: str, server: tuple[str, Requests], tree_bytes: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    root, _, _ = make_store(num_images=12)
    url, requests, put = f"s3://{bucket}/store", server[1], upload._put

    def stop_in_the_middle(local: Any, remote: Any, name: str) -> None:
        if name == "receipts/00001.json":
            raise KeyboardInterrupt
        put(local, remote, name)

    monkeypatch.setattr(upload, "_put", stop_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        upload_store(root, url)
    with pytest.raises(InputError, match="holds no store"):
        open_store(url)
    monkeypatch.setattr(upload, "_put", put)
    before = sent(s3, bucket)
    assert "store/receipts/00001.json" not in before and "store/manifest.json" not in before
    requests.take()
    upload_store(root, url)
    puts = [line.split("/store/")[1] for line in requests.take() if line.startswith("PUT")]
    assert puts[-1] == "manifest.json" and sorted(puts[-5:-1]) == puts[-5:-1]
    assert all(f"store/{name}" not in before for name in puts if "/00001.json" not in name and "/1" not in name)
    assert {f"store/{name}": data for name, data in tree_bytes(root).items()} == sent(s3, bucket)
    upload_store(root, url)
    assert [line for line in requests.take() if line.startswith("PUT")] == []


def test_an_upload_mends_what_is_gone_or_short(make_store: Any, s3: Any, bucket: str) -> None:
    root, _, _ = make_store()
    url = f"s3://{bucket}/store"
    upload_store(root, url)
    before = sent(s3, bucket)
    s3.delete_object(Bucket=bucket, Key="store/tokens/c/1/0/0")
    s3.put_object(Bucket=bucket, Key="store/views/c/0/0", Body=b"short")
    s3.put_object(Bucket=bucket, Key="store/receipts/00002.json", Body=before["store/receipts/00001.json"])
    s3.put_object(Bucket=bucket, Key="store/tokens/c/2/0/0", Body=before["store/tokens/c/0/0/0"])
    upload_store(root, url)
    assert sent(s3, bucket) == before


def test_what_may_not_be_uploaded(make_store: Any, begin_store: Any, s3: Any, bucket: str) -> None:
    root, _, _ = make_store()
    other, _, _ = make_store("other", images_per_shard=4)
    url = f"s3://{bucket}/store"
    upload_store(root, url)
    with pytest.raises(ConfigError, match="holds another store"):
        upload_store(other, url)
    s3.delete_object(Bucket=bucket, Key="store/manifest.json")
    with pytest.raises(ConfigError, match=r"plan\.json differs"):
        upload_store(other, url)
    with pytest.raises(InputError, match="unfinished"):
        upload_store(begin_store("unfinished")[0], f"s3://{bucket}/unfinished")
    with pytest.raises(ConfigError, match="nothing can be written"):
        upload_store(root, "http://127.0.0.1:1/store")
    path = other / "tokens/c/1/0/0"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match="not uploaded"):
        upload_store(other, f"s3://{bucket}/damaged")
    assert "damaged/manifest.json" not in sent(s3, bucket) and "damaged/tokens/c/1/0/0" not in sent(s3, bucket)


@pytest.mark.parametrize("backend", ["zarr", "wds"])
def test_damage_in_a_bucket_is_noticed(make_store: Any, s3: Any, bucket: str, backend: str) -> None:
    root, plan, _ = make_store(num_images=6, backend=backend, view_px=16)
    url = f"s3://{bucket}/store"
    upload_store(root, url)
    name = "store/tokens/c/{}/0/0" if backend == "zarr" else "store/shards/{:05d}.tar"
    key, whole = name.format(1), sent(s3, bucket)
    changed = bytes(byte ^ 4 for byte in whole[key])
    cases = {
        "missing": None, "emptied": b"", "cut short": whole[key][:700], "changed": changed,
        "swapped": whole[name.format(0)],
    }  # fmt: skip
    records_B = np.arange(plan.records_per_shard, 2 * plan.records_per_shard)
    out_BTC = np.empty((len(records_B), *plan.shape_TC), np.float16)
    for kind, data in cases.items():
        if data is None:
            s3.delete_object(Bucket=bucket, Key=key)
        else:
            s3.put_object(Bucket=bucket, Key=key, Body=data)
        with pytest.raises(DamagedError):
            reader = open_store(url)
            reader.read_batch(records_B, out_BTC)
            reader.read_jpegs(records_B)
        if kind in ("missing", "swapped"):
            found = [damage for _, damages in iter_damage(url) for damage in damages]
            assert [(damage.shard, damage.name) for damage in found] == [(1, key.removeprefix("store/"))], found
            assert kind in found[0].found, found
    s3.put_object(Bucket=bucket, Key=key, Body=whole[key])
    s3.put_object(Bucket=bucket, Key="store/receipts/00001.json", Body=whole["store/receipts/00000.json"])
    with pytest.raises(DamagedError, match="not the committed receipt"):
        open_store(url).read_batch(records_B, out_BTC)


def test_an_unfinished_store_in_a_bucket(make_store: Any, s3: Any, bucket: str) -> None:
    root, _, _ = make_store()
    url = f"s3://{bucket}/store"
    upload_store(root, url)
    publish(s3, bucket)
    for name in ("manifest.json", "receipts/00001.json"):
        s3.delete_object(Bucket=bucket, Key=f"store/{name}")
    with pytest.raises(InputError, match="unfinished"):
        open_store(url)
    reader = open_store(url, allow_unfinished=True)
    assert reader.usable_images().tolist() == [0, 1, 2, 6, 7]
    assert len(check_structure(url).damage) == 1
    with pytest.raises(InputError, match="cannot be listed over http"):
        open_store(f"{os.environ['AWS_ENDPOINT_URL']}/{bucket}/store", allow_unfinished=True)


def test_refusals_say_what_to_do_and_no_secrets(
    make_store: Any, s3: Any, bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(url: str, match: str) -> None:
        with pytest.raises(InputError, match=match) as caught:
            open_store(url)
        assert SECRET not in str(caught.value) and "made-up" not in str(caught.value)

    url = f"s3://{bucket}/store"
    refused(url, "holds no store")
    refused("s3://no-such-bucket-here/store", "404 NoSuchBucket.*check the bucket's name")
    upload_store(make_store()[0], url)
    refused(f"{os.environ['AWS_ENDPOINT_URL']}/{bucket}/store", "403.*read by everyone")  # nothing in it is public
    with monkeypatch.context() as without:
        without.delenv("AWS_ACCESS_KEY_ID")
        refused(url, "Unable to locate credentials.*AWS_PROFILE")
    with monkeypatch.context() as nowhere:
        nowhere.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        nowhere.setattr("storage.remote.time.sleep", lambda seconds: None)
        refused(url, r"5 times; check the network and the endpoint \(AWS_ENDPOINT_URL\)")
    assert SECRET not in capsys.readouterr().err


def test_readers_in_threads_and_processes(
    make_store: Any, bucket: str, environment: str, fork: Callable[[Callable[[], object]], int]
) -> None:
    """The parent has connections open when it forks; parent and children read on, at the same time."""
    root, _, _ = make_store(num_images=8)
    upload_store(root, f"s3://{bucket}/store")
    expected, reader = everything(open_store(root)), open_store(f"s3://{bucket}/store")
    assert_same(everything(reader), expected)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(everything, [reader, reader, open_store(f"s3://{bucket}/store"), reader]):
            assert_same(found, expected)
    children = [fork(lambda: assert_same(everything(reader), expected)) for _ in range(2)]
    assert_same(everything(reader), expected)
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert_same(everything(reader), expected)
    code = (
        "import pickle, sys, numpy; reader = pickle.load(sys.stdin.buffer); out = reader.new_batch(16)\n"
        "reader.read_encoded(numpy.arange(16), out); sys.stdout.buffer.write(out['tokens'].tobytes())"
    )
    spawned = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, input=pickle.dumps(reader), capture_output=True, check=True
    )
    out = open_store(root).new_batch(16)
    open_store(root).read_encoded(np.arange(16), out)
    assert spawned.stdout == out["tokens"].tobytes()


@pytest.mark.skipif(not hasattr(os, "setuid") or os.getuid() != 0, reason="becoming other users takes root")
def test_a_local_store_is_shared_by_users_who_may_only_read(
    make_store: Any, tmp_path: Path, fork: Callable[[Callable[[], object]], int]
) -> None:
    """Several other users read a folder at once in which they may write nothing; nothing in it changes."""
    root, _, _ = make_store(view_px=16, backend="wds")
    shared = Path("/tmp") / f"decant-shared-{os.getpid()}"  # below folders that every user may pass
    try:
        shutil.copytree(root, shared)
        for path in [shared, *shared.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = {path: path.stat().st_mtime_ns for path in [shared, *shared.rglob("*")]}
        expected = everything(open_store(root))

        def read_as(user: int) -> None:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            with pytest.raises(PermissionError):
                (shared / "made").write_bytes(b"")
            assert_same(everything(open_store(shared)), expected)
            assert not [damage for _, found in iter_damage(shared) for damage in found]

        for child in [fork(lambda user=user: read_as(user)) for user in (65_534, 54_321)]:  # type: ignore[misc]
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert before == {path: path.stat().st_mtime_ns for path in [shared, *shared.rglob("*")]}
    finally:
        shutil.rmtree(shared, ignore_errors=True)


def test_both_implementations_answer_alike(make_store: Any, s3: Any, bucket: str) -> None:
    """Every operation of `Files`, on a disk, in a bucket and over http."""
    root, _, _ = make_store()
    (root / "empty").write_bytes(b"")
    upload_store(root, f"s3://{bucket}/store")
    s3.put_object(Bucket=bucket, Key="store/empty", Body=b"")
    publish(s3, bucket)
    url = f"{os.environ['AWS_ENDPOINT_URL']}/{bucket}/store"
    local: Files = open_files(root)
    for remote in (RemoteFiles(f"s3://{bucket}/store"), RemoteFiles(url), open_files(f"s3://{bucket}/store")):
        for name in ("plan.json", "empty", "tokens/c/0/0/0"):
            assert remote.read(name) == local.read(name) and remote.size(name) == local.size(name)
            assert remote.exists(name) and remote.digest(name) == local.digest(name) if name != "empty" else True
            for num_bytes in (1, 10, 10**9):
                assert remote.read_end(name, num_bytes) == local.read_end(name, num_bytes)
        for name in ("nothing", "tokens/c/9/0/0"):
            assert not remote.exists(name) and remote.size(name) is None
            for ask in (remote.read, remote.digest, partial(remote.read_end, num_bytes=3)):
                with pytest.raises(DamagedError, match="is missing"):
                    ask(name)
        if remote.location.startswith("s3"):
            for folder in ("", "receipts", "tokens", "nothing"):
                assert remote.names(folder) == local.names(folder)
