"""What extraction stores in other layouts and encodings, held against the plain store and the live teacher."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from extract.backends import load_teacher
from extract.config import ExecutionConfig, ExtractConfig
from extract.run import run
from extract.teachers import find_teacher
from storage.encodings import BitRound, Int8, Zstd
from storage.errors import ConfigError
from storage.jpeg import decode_view
from storage.reader import open_store
from storage.receipts import receipt_path
from storage.store import FeatureReader

CFG = ExtractConfig(teacher="toy", views=2, records_per_shard=6, run=ExecutionConfig(executor="inline", batch_size=8))
Extract = Callable[..., FeatureReader]


@pytest.fixture
def extract(make_index: Callable[..., tuple[Path, object]], tmp_path: Path) -> Extract:
    """Extract a store with some settings changed."""
    data, _ = make_index(per_class=5)

    def make(name: str = "store", **changes: object) -> FeatureReader:
        run(CFG.model_copy(update=changes), {"data": data}, tmp_path / name)
        return open_store(tmp_path / name, check="always")

    return make


def all_tokens(store: FeatureReader) -> np.ndarray:
    tokens_RTC = np.empty((store.plan.num_records, *store.plan.shape_TC), np.float16)
    store.read_batch(np.arange(store.plan.num_records), tokens_RTC)
    return tokens_RTC


@pytest.mark.parametrize("changes", [{"layout": "wds"}, {"keep_views": True, "view_quality": 80}])
def test_the_teacher_looks_at_the_views_that_are_stored(extract: Extract, changes: dict[str, object]) -> None:
    store = extract(**changes)
    teacher = load_teacher(find_teacher("toy"), device="cpu")
    assert store.plan.stored_views is not None
    assert store.plan.stored_views.seen_by_teacher
    assert store.plan.stored_views.codec["quality"] == changes.get("view_quality", 95)
    for record in store.iter_shard(0):
        pixels_HWC = np.empty((32, 32, 3), np.uint8)
        decode_view(record.jpeg, 32, pixels_HWC)
        raw_TC = teacher(torch.from_numpy(pixels_HWC)[None])[0]
        expected_TC = F.layer_norm(raw_TC, raw_TC.shape[-1:], eps=1e-5)
        np.testing.assert_allclose(record.tokens_TC.astype(np.float32), expected_TC, rtol=2**-10, atol=1e-4)


def test_a_layout_changes_no_token(extract: Extract) -> None:
    kept = extract("zarr", keep_views=True)
    tars = extract("wds", layout="wds")
    np.testing.assert_array_equal(all_tokens(kept), all_tokens(tars))
    assert kept.manifest.fingerprint != tars.manifest.fingerprint


@pytest.mark.parametrize("encoding", [Int8(), BitRound(keep_bits=6), Zstd()])
def test_encoded_tokens_stay_within_their_bound(extract: Extract, encoding: Int8 | BitRound | Zstd) -> None:
    plain_RTC = all_tokens(extract("plain")).astype(np.float32)
    store = extract("encoded", encoding=encoding)
    fields = store.new_batch(store.plan.num_records)
    store.read_encoded(np.arange(store.plan.num_records), fields)
    error_RTC = np.abs(all_tokens(store).astype(np.float32) - plain_RTC)
    assert (error_RTC <= store.plan.encoding.error_bound(plain_RTC, fields)).all()
    if isinstance(encoding, Int8):
        assert len(store.plan.encoding.channel_scale) == store.plan.features.channels


def test_a_subset_holds_the_tokens_of_its_positions(extract: Extract) -> None:
    plain_RTC = all_tokens(extract("plain"))
    store = extract("thin", token_fraction=0.4)
    records = np.arange(store.plan.num_records)
    positions_RT = store.positions(records)
    assert positions_RT.shape == (len(records), 7)  # of 17, rounded up
    np.testing.assert_array_equal(all_tokens(store), np.take_along_axis(plain_RTC, positions_RT[..., None], axis=1))


def test_what_was_fitted_is_kept_when_extraction_goes_on(
    extract: Extract, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fingerprint = extract(encoding=Int8()).manifest.fingerprint
    receipt_path(tmp_path / "store", 1).unlink()
    (tmp_path / "store" / "manifest.json").unlink()
    monkeypatch.setattr("extract.plan.iter_sample", lambda *args: pytest.fail("fitted again"))
    assert extract(encoding=Int8()).manifest.fingerprint == fingerprint


def test_another_encoding_is_another_store(extract: Extract, tmp_path: Path) -> None:
    extract()
    with pytest.raises(ConfigError, match="holds another store: encoding"):
        extract(encoding=Zstd())
    shutil.rmtree(tmp_path / "store")
    extract(encoding=Zstd())
