"""Stores whose whitening is fitted: what is learnt, kept, learnt again and lent."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from extract.config import ExecutionConfig, ExtractConfig
from extract.run import run
from extract.sample import SampleBatch
from storage.encodings import MIN_CHANNEL_SCALE, Int8
from storage.errors import ConfigError, DamagedError, InputError
from storage.reader import open_store
from storage.receipts import receipt_path
from storage.store import FeatureReader
from storage.whitening import STATISTICS_FILE, MeanStd, NoWhitening, Pca, Whitening

Extract = Callable[..., FeatureReader]
FITTED = pytest.mark.parametrize("whitening", [MeanStd(), Pca()], ids=lambda whitening: whitening.kind)


@pytest.fixture
def extract(make_index: Any, tmp_path: Path) -> Extract:
    """A store of the toy teacher, of 12 images in 2 views each."""
    data, _ = make_index(per_class=6, eval_fraction=0.0)

    def make(name: str = "store", **changes: Any) -> FeatureReader:
        inputs = {"data": data} | changes.pop("inputs", {})
        settings = {"teacher": "toy", "views": 2, "records_per_shard": 8, "run": ExecutionConfig(executor="inline")}
        run(ExtractConfig(**(settings | changes)), inputs, tmp_path / name)
        return open_store(tmp_path / name)

    return make


def all_tokens(store: FeatureReader) -> NDArray[np.float16]:
    tokens_RTC = np.empty((store.plan.num_records, *store.plan.shape_TC), np.float16)
    store.read_batch(np.arange(store.plan.num_records), tokens_RTC)
    return tokens_RTC


@FITTED
@pytest.mark.parametrize("layout", ["zarr", "wds"])
def test_a_store_holds_the_teachers_tokens_whitened_by_the_sample(
    extract: Extract, whitening: Whitening, layout: str
) -> None:
    store = extract(whitening=whitening, layout=layout)
    plain = extract("plain", layout=layout)
    raw_RTC, records = plain.raw_tokens(np.arange(24)), np.arange(24)
    fitted = store.plan.whitening
    assert isinstance(fitted, MeanStd | Pca) and fitted.num_tokens == 24 * store.plan.features.num_tokens
    white_NC = all_tokens(store).astype(np.float64).reshape(-1, store.plan.features.channels)
    np.testing.assert_allclose(white_NC.mean(0), 0, atol=5e-3)
    std_C = white_NC.std(0)
    np.testing.assert_allclose(std_C[:-1], 1, atol=2e-2)
    if isinstance(whitening, Pca):  # the teacher ends in a norm, so there is a direction in which tokens never vary
        assert std_C[-1] < 0.01
    np.testing.assert_allclose(store.raw_tokens(records), raw_RTC, atol=1e-2)
    mean_RT, std_RT = store.token_statistics(records)
    assert (mean_RT == 0).all() and (std_RT == 1).all()


def test_none_stores_the_teachers_own_tokens(extract: Extract) -> None:
    raw_RTC = extract("plain").raw_tokens(np.arange(24))
    np.testing.assert_allclose(all_tokens(extract(whitening=NoWhitening())), raw_RTC, rtol=2e-3, atol=2e-3)


@FITTED
def test_int8_is_fitted_on_tokens_that_are_whitened_already(extract: Extract, whitening: Whitening) -> None:
    store, exact = extract(whitening=whitening, encoding=Int8()), extract("exact", whitening=whitening)
    assert store.plan.whitening == exact.plan.whitening
    assert isinstance(store.plan.encoding, Int8)
    true_RTC = all_tokens(exact)
    std_C = true_RTC.astype(np.float32).reshape(-1, true_RTC.shape[-1]).std(axis=0)
    np.testing.assert_allclose(store.plan.encoding.channel_scale, np.maximum(std_C, MIN_CHANNEL_SCALE), rtol=1e-2)
    fields = store.plan.encoding.encode(true_RTC)
    error_RTC = np.abs(all_tokens(store).astype(np.float32) - true_RTC)
    assert (error_RTC <= store.plan.encoding.error_bound(true_RTC, fields)).all()


def test_the_same_command_gives_the_same_store(
    extract: Extract, tmp_path: Path, tree_bytes: Callable[[Path], dict[str, bytes]]
) -> None:
    for whitening in (MeanStd(), Pca()):
        first, second = (
            extract(f"{whitening.kind}{number}", whitening=whitening, encoding=Int8()) for number in range(2)
        )
        assert first.manifest == second.manifest
        assert tree_bytes(Path(first.location)) == tree_bytes(Path(second.location))


@FITTED
def test_what_was_learnt_is_kept_when_extraction_goes_on(
    extract: Extract, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, whitening: Whitening
) -> None:
    fingerprint = extract(whitening=whitening, encoding=Int8()).manifest.fingerprint
    receipt_path(tmp_path / "store", 1).unlink()
    (tmp_path / "store" / "manifest.json").unlink()
    monkeypatch.setattr("extract.plan.iter_sample", lambda *args: pytest.fail("fitted again"))
    assert extract(whitening=whitening, encoding=Int8()).manifest.fingerprint == fingerprint


def test_a_file_that_is_gone_is_learnt_again_if_it_is_the_same(
    extract: Extract, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    extract(whitening=Pca())
    path = tmp_path / "store" / STATISTICS_FILE
    data = path.read_bytes()
    path.unlink()
    extract(whitening=Pca())
    assert path.read_bytes() == data
    path.write_bytes(data[:-1])
    other = torch.randn(20, 17, 24, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("extract.plan.iter_sample", lambda *args: iter([SampleBatch(other, ["x"] * 20)]))  # type: ignore[list-item]
    with pytest.raises(DamagedError, match=r"whitening\.npy is damaged or gone, and a fit gives other numbers here"):
        extract(whitening=Pca())


def test_another_store_lends_its_whitening(extract: Extract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lender = extract("lender", whitening=Pca(), sampler={"kind": "random_resized_crop", "seed": 9})
    own = extract("own", whitening=Pca())
    assert own.plan.whitening != lender.plan.whitening
    monkeypatch.setattr("extract.plan.iter_sample", lambda *args: pytest.fail("fitted"))
    for number, given_as in enumerate(({"whitening_from": str(tmp_path / "lender")},
                                       {"inputs": {"extract": tmp_path / "lender"}})):  # fmt: skip
        borrower = extract(f"borrower{number}", whitening=Pca(), **given_as)
        assert borrower.plan.whitening == lender.plan.whitening
        np.testing.assert_array_equal(borrower.statistics, lender.statistics)
        np.testing.assert_allclose(
            borrower.raw_tokens(np.arange(24)), own.raw_tokens(np.arange(24)), atol=3e-2, rtol=1e-3
        )
    with pytest.raises(ConfigError, match="give WHITENING=pca"):
        extract("other", whitening=MeanStd(), whitening_from=str(tmp_path / "lender"))
    shutil.rmtree(tmp_path / "lender" / "receipts")
    (tmp_path / "lender" / "manifest.json").unlink()
    with pytest.raises(InputError, match="unfinished store"):
        extract("none", whitening=Pca(), whitening_from=str(tmp_path / "lender"))


def test_too_few_images_are_refused_before_a_store_is_begun(extract: Extract, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"raise extract\.fit_views to"):
        extract(whitening=Pca(), fit_views=1)
    assert not (tmp_path / "store" / "plan.json").exists()
    extract(whitening=Pca(), fit_views=1000)
