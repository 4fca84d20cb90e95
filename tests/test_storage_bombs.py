"""Compressed records that claim another size than a record has: no memory is taken for them."""

from collections.abc import Callable
from typing import Any

import numcodecs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.encodings import BitRound, Encoding, Zstd
from storage.errors import DamagedError
from storage.folder import finish_store
from storage.reader import open_store
from storage.writer import ShardWriter

COMPRESSED = pytest.mark.parametrize("encoding", [Zstd(), BitRound()], ids=repr)


class Replaced:
    """A compressor that stores something else."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def encode(self, _: Any) -> bytes:
        return self.data


@COMPRESSED
@pytest.mark.parametrize("backend", ["zarr", "wds"])
@pytest.mark.parametrize("num_bytes", [0, 1, 110, 111, 113, 2**25])
def test_a_record_of_another_size_is_damage(
    begin_store: Callable[..., Any], made_up_record: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
    encoding: Encoding, backend: str, num_bytes: int,
) -> None:  # fmt: skip
    root, plan, images = begin_store(num_images=1, backend=backend, encoding=encoding, images_per_shard=1)
    bomb = encoding.compressor().encode(bytes(num_bytes))
    writer = ShardWriter(root, plan, images, 0)
    with monkeypatch.context() as patched:
        patched.setattr(type(encoding), "compressor", lambda self: Replaced(bytes(bomb)))
        for view in range(2):
            writer.append(made_up_record(plan, images.keys[0], view))
        writer.commit()
    finish_store(root)
    with pytest.raises(DamagedError, match=r"expected 112|has an impossible index|leads out of its tar"):
        open_store(root).read_batch(np.array([0]), np.empty((1, *plan.shape_TC), np.float16))


@given(st.one_of(st.binary(max_size=600), st.integers(0, 2**17 + 9).map(bytes)), st.integers(1, 19))
def test_the_claimed_size_is_read_from_the_header(content: bytes, level: int) -> None:
    assert Zstd().content_bytes(bytes(numcodecs.Zstd(level=level).encode(content))) in (len(content), -1)
    blosc = numcodecs.Blosc(cname="zstd", clevel=1 + level % 9, shuffle=numcodecs.Blosc.BITSHUFFLE)
    assert BitRound().content_bytes(bytes(blosc.encode(content))) == len(content)
    if len(content) >= 112:
        assert Zstd().content_bytes(bytes(numcodecs.Zstd(level=level).encode(content))) == len(content)


@given(st.binary(max_size=40))
def test_any_bytes_have_some_size(data: bytes) -> None:
    for encoding in (Zstd(), BitRound()):
        assert encoding.content_bytes(data) >= -1
        assert encoding.content_bytes(b"\x28\xb5\x2f\xfd" + data) >= -1
