"""Stores in buckets: uploaded to a real object-store server on this machine, and read there as from a disk."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.errors import DamagedError, InputError
from storage.files import Files
from storage.locations import open_files
from storage.reader import open_store
from storage.remote import RemoteFiles
from storage.upload import upload_store
from storage.verify import check_structure, iter_damage
from tests.fixtures.object_server import SECRET, Requests, publish, sent
from tests.fixtures.stores import everything

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = [
    {"backend": "zarr"},
    {"backend": "zarr", "view_px": 16},
    {"backend": "wds", "view_px": 16},
    {"backend": "zarr", "encoding": {"kind": "zstd"}},
    {"backend": "wds", "view_px": 16, "encoding": {"kind": "bit_round"}},
    {"backend": "wds", "view_px": 16, "encoding": {"kind": "int8", "channel_scale": [0.125] * 8}},
]
HOLES = (2, 4)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_store_in_a_bucket_is_read_as_from_a_disk(make_store: Any, s3: Any, bucket: str, changes: Any) -> None:
    root, plan, images = make_store(num_images=5, bad=HOLES, **changes)
    upload_store(root, f"s3://{bucket}/a/store")
    publish(s3, bucket)
    expected = everything(open_store(root))
    for url in (f"s3://{bucket}/a/store/", f"{os.environ['AWS_ENDPOINT_URL']}/{bucket}/a/store"):
        reader = open_store(url)
        assert everything(reader) == expected
        assert reader.manifest == open_store(root).manifest
        for local, remote in zip(open_store(root).iter_shard(1), reader.iter_shard(1), strict=True):
            assert local[:3] == remote[:3] and local.jpeg == remote.jpeg
            np.testing.assert_array_equal(local.tokens_TC, remote.tokens_TC)
        with pytest.raises(DamagedError, match="is a hole"):
            reader.read(images.keys[HOLES[0]], 0)
    assert dict(iter_damage(url)) == {index: [] for index in range(plan.num_shards)}  # over http, the slower way


@pytest.mark.parametrize("backend", ["zarr", "wds"])
def test_requests_a_batch(
    make_store: Any, bucket: str, bucket_environment: str, object_server: tuple[str, Requests], backend: str
) -> None:
    """Opening asks for the manifest; a shard's first use for its receipt and index; a record for one range at most."""
    features = {"teacher": "made-up", "num_prefix_tokens": 1, "grid_hw": (16, 16), "channels": 160}  # 82 kB a record
    root, plan, _ = make_store(num_images=24, images_per_shard=12, view_px=16, backend=backend, features=features)
    upload_store(root, f"s3://{bucket}/store")
    requests = object_server[1]
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
    assert len(requests.take()) == 2  # a small file a shard, which is then kept
    reader.views(records_B)
    assert requests.take() == []
    reader.hint(records_B)
    assert requests.take() == []


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
