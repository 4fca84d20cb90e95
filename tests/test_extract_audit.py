"""An audit makes random records again: a store that holds something else fails it, whatever was done to it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from extract.audit import Audit, audit_store
from extract.config import ExecutionConfig, ExtractConfig
from extract.run import run
from extract.whiten import Whitener
from extract.worker import load_store_teacher
from storage.encodings import Int8
from storage.errors import DamagedError
from storage.image_index import load_index
from storage.image_list import ImageList
from storage.reader import open_store
from storage.receipts import receipt_path
from storage.records import FeatureRecord
from storage.writer import ShardWriter

CFG = ExtractConfig(
    teacher="toy", views=2, records_per_shard=6, run=ExecutionConfig(executor="inline", batch_size=4, device="cpu")
)
MakeIndex = Callable[..., tuple[Path, object]]


def audit(cfg: ExtractConfig, root: Path, images: ImageList | None, num_records: int = 100) -> Audit:
    store = open_store(root, allow_unfinished=True)
    teacher = load_store_teacher(cfg, store.plan)
    whitener = Whitener.of_store(root, store.plan, "cpu")
    return audit_store(store, teacher, whitener, num_records=num_records, seed=3, images=images)


@pytest.fixture
def made(make_index: MakeIndex, tmp_path: Path) -> Callable[..., tuple[ExtractConfig, Path, ImageList]]:
    def make(**changes: object) -> tuple[ExtractConfig, Path, ImageList]:
        data, _ = make_index()
        cfg = CFG.model_copy(update=changes)
        run(cfg, {"data": data}, tmp_path / "store")
        return cfg, tmp_path / "store", load_index(data).split("train")

    return make


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"layout": "wds"}, {"encoding": Int8()}, {"token_fraction": 0.4}, {"keep_views": True},
        {"precision": "bfloat16"}, {"views": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_store_that_holds_what_it_should_passes(
    made: Callable[..., tuple[ExtractConfig, Path, ImageList]], changes: dict[str, object]
) -> None:
    cfg, root, images = made(**changes)
    found = audit(cfg, root, images)
    assert found.is_good, found
    assert found.num_records == 16 * cfg.views
    if not changes:
        assert found.worst_error < 0.01
    if cfg.keeps_views:
        assert audit(cfg, root, None).is_good, "from the views that it keeps"


def commit_wrong(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[FeatureRecord], FeatureRecord]) -> None:
    """A writer that commits something else, with checksums that match."""
    append = ShardWriter.append
    monkeypatch.setattr(ShardWriter, "append", lambda writer, record: append(writer, spoil(record)))


def flip(record: FeatureRecord) -> FeatureRecord:
    if not record.key.endswith("003.png"):
        return record
    tokens_TC = record.tokens_TC.copy()
    tokens_TC.view(np.uint16)[2, 3] ^= 1 << 13  # the exponent
    return record._replace(tokens_TC=tokens_TC)


def shift(record: FeatureRecord) -> FeatureRecord:
    return record._replace(tokens_TC=np.roll(record.tokens_TC, 1, axis=0)) if record.view_index else record


def lose(record: FeatureRecord) -> FeatureRecord:
    """A value that compares as false with whatever limit there is."""
    if not record.key.endswith("003.png"):
        return record
    tokens_TC = record.tokens_TC.copy()
    tokens_TC[2, 3] = np.nan
    return record._replace(tokens_TC=tokens_TC)


@pytest.mark.parametrize("spoil", [flip, shift, lose])
def test_a_wrong_value_anywhere_is_found(
    made: Callable[..., tuple[ExtractConfig, Path, ImageList]], monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[FeatureRecord], FeatureRecord],
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        commit_wrong(patch, spoil)
        cfg, root, images = made(run=CFG.run.model_copy(update={"audit_records": 0}))
    found = audit(cfg, root, images)
    assert not found.is_good
    assert "NOT what the teacher says" in str(found)
    assert (found.worst_record.split()[0].endswith("003.png")) == (spoil is not shift)
    assert np.isinf(found.worst_error) == np.isinf(found.worst_relative) == (spoil is lose)


def test_an_unfinished_store_and_one_with_holes_can_be_audited(
    made: Callable[..., tuple[ExtractConfig, Path, ImageList]],
) -> None:
    cfg, root, images = made()
    shutil.copytree(root, root.with_name("part"))
    (root.with_name("part") / "manifest.json").unlink()
    receipt_path(root.with_name("part"), 2).unlink()
    found = audit(cfg, root.with_name("part"), images)
    assert found.is_good
    assert found.num_records == 2 * (16 - 3)


def test_every_extraction_ends_with_an_audit(
    make_index: MakeIndex, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data, _ = make_index()
    commit_wrong(monkeypatch, shift)
    for _ in range(2):  # the same command does not pass it over
        with pytest.raises(DamagedError, match=r"not finished: audit: 8 random records are NOT what the teacher says"):
            run(CFG, {"data": data}, tmp_path / "store")
        assert not (tmp_path / "store" / "manifest.json").exists()
