"""Uploads: the manifest goes last, what is there is not sent again, what is gone or short is mended."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage import upload
from storage.errors import ConfigError, DamagedError, InputError
from storage.reader import open_store
from storage.upload import upload_store
from storage.verify import iter_damage
from storage.whitening import STATISTICS_FILE
from tests.fixtures.object_server import Requests, sent
from tests.fixtures.whitenings import MADE_UP


def test_an_upload_sends_the_manifest_last_and_goes_on(
    make_store: Any, s3: Any, bucket: str, object_server: tuple[str, Requests],
    tree_bytes: Callable[[Path], dict[str, bytes]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    root, _, _ = make_store(num_images=12)
    url, requests, put = f"s3://{bucket}/store", object_server[1], upload._put

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


def test_what_whitening_learnt_travels(make_store: Any, s3: Any, bucket: str) -> None:
    """And is checked on its way and where it is read."""
    root, _, _ = make_store(whitening=MADE_UP["pca"][0])
    url = f"s3://{bucket}/store"
    data = (root / STATISTICS_FILE).read_bytes()
    (root / STATISTICS_FILE).write_bytes(data[:-1] + b"x")
    with pytest.raises(DamagedError, match=r"whitening\.npy is not what was committed, so it is not uploaded"):
        upload_store(root, url)
    (root / STATISTICS_FILE).write_bytes(data)
    upload_store(root, url)
    records_B = np.array([0, 5])
    np.testing.assert_array_equal(open_store(url).raw_tokens(records_B), open_store(root).raw_tokens(records_B))
    s3.put_object(Bucket=bucket, Key=f"store/{STATISTICS_FILE}", Body=data[:-1] + b"x")
    assert [damage.name for _, found in iter_damage(url) for damage in found] == [STATISTICS_FILE]
    with pytest.raises(DamagedError, match=r"store/whitening\.npy is not the pca whitening that plan\.json names"):
        open_store(url).raw_tokens(records_B)
