"""The right bytes in the wrong place: files of another shard, of another store, of another writer."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from storage.errors import ConfigError, DamagedError, DecantError
from storage.folder import create_store, finish_store
from storage.layouts import LAYOUTS
from storage.reader import open_store
from storage.receipts import committed_shards
from storage.records import ShardEntry
from storage.verify import check_structure, discard_shard
from tests.fixtures.stores import everything
from tests.fixtures.whole_store import BAD, WholeStore


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


def copy(root: Path, one: str, other: str) -> None:
    shutil.copy(root / one, root / other)


def exchange(root: Path, one: str, other: str) -> None:
    first, second = (root / one).read_bytes(), (root / other).read_bytes()
    (root / one).write_bytes(second)
    (root / other).write_bytes(first)


def test_single_files_of_another_shard(whole_store: WholeStore) -> None:
    for one, other in zip(whole_store.files_of(0), whole_store.files_of(1), strict=True):
        for place in (
            lambda a, b: shutil.copy(whole_store.root / b, whole_store.root / a),
            lambda a, b: exchange(whole_store.root, a, b),
        ):
            for names in ((one, other), (other, one)):
                place(*names)
                if whole_store.changed():
                    whole_store.assert_mended(whole_store.assert_noticed(("swapped: holds the bytes of shard",)))
                whole_store.restore()


@pytest.mark.parametrize("with_receipts", [False, True])
@pytest.mark.parametrize("is_copy", [False, True])
def test_all_files_of_another_shard(whole_store: WholeStore, with_receipts: bool, is_copy: bool) -> None:
    receipts = ["receipts/00000.json", "receipts/00001.json"]
    pairs = list(zip(whole_store.files_of(0), whole_store.files_of(1), strict=True))
    for one, other in [*pairs, receipts] if with_receipts else pairs:
        if is_copy:
            copy(whole_store.root, one, other)
        else:
            exchange(whole_store.root, one, other)
    if with_receipts:  # those tell all: what they say of the files is not asked any more
        named = whole_store.changed().intersection(receipts)
        problems = whole_store.assert_noticed(("swapped: the receipt of",), named=named)
    else:
        problems = whole_store.assert_noticed(("swapped: holds the bytes of shard",))
    assert {problem.shard for problem in problems} == ({1} if is_copy else {0, 1})
    whole_store.assert_mended(problems)


def test_files_of_another_store_of_the_same_plan(whole_store: WholeStore, fill_shard: Any, tmp_path: Path) -> None:
    """As of a second run whose teacher gave other numbers: only digests can tell."""
    other = tmp_path / "other"
    shutil.copytree(whole_store.root, other)
    images = open_store(other).images
    (other / "manifest.json").unlink()
    for shard in range(2):
        discard_shard(other, shard)
        fill_shard(other, whole_store.plan, images, shard, bad=(images.keys[BAD],), seed=1).commit()
    finish_store(other)
    names = [name for name in whole_store.files_of(0) if (other / name).read_bytes() != whole_store.tree[name]]
    assert names
    for taken in (*([name] for name in names), names):
        for name in taken:
            shutil.copy(other / name, whole_store.root / name)
        whole_store.assert_mended(whole_store.assert_noticed(("changed", "cut short", "too long")))
        whole_store.restore()
    for name in (*names, "receipts/00000.json"):
        shutil.copy(other / name, whole_store.root / name)
    problems = whole_store.assert_noticed(
        ("swapped: not the receipt that the manifest names",), named={"receipts/00000.json"}
    )
    whole_store.assert_mended(problems)
    shutil.copy(other / "manifest.json", whole_store.root)
    with pytest.raises(DecantError, match=r"receipts/00000\.json is not the committed receipt"):
        everything(open_store(whole_store.root))
    assert {problem.shard for problem in whole_store.problems()} == {0, 1}


def test_metadata_of_another_store(whole_store: WholeStore, make_store: Any) -> None:
    other, _, _ = make_store("other", num_images=7, backend=whole_store.plan.backend, teacher_fingerprint="others")
    kinds = ("swapped", "too long", "cut short", "changed")
    for name in ("manifest.json", "images.bin", *LAYOUTS[whole_store.plan.backend].metadata(whole_store.plan)):
        if (other / name).exists():
            shutil.copy(other / name, whole_store.root / name)
        if whole_store.changed():
            whole_store.assert_mended(whole_store.assert_noticed(kinds))
    shutil.copy(other / "plan.json", whole_store.root)
    (problem,) = whole_store.assert_noticed(kinds)
    discard_shard(whole_store.root, problem.shard)
    with pytest.raises(ConfigError, match="holds another store"):  # which of both is meant, nobody can tell any more
        whole_store.extract()


def test_a_receipt_that_was_sealed_again(whole_store: WholeStore) -> None:
    """Whole and of this shard, but not the committed one."""
    name = "receipts/00001.json"
    entry = ShardEntry.from_file(Path(name), whole_store.tree[name])
    for changes in ({"num_records": 1}, {"record_crc32c": "00" * 24}, {"files": ()}, {"bad_images": ()}):
        (whole_store.root / name).write_bytes(entry.model_copy(update=changes).to_file())
        if whole_store.changed():
            whole_store.assert_mended(whole_store.assert_noticed(("swapped: not the receipt that the manifest names",)))


def test_a_copy_of_a_shard_under_a_new_number_is_not_looked_at(whole_store: WholeStore) -> None:
    """Nothing asks for it: no number of a record leads there."""
    for name in (*whole_store.files_of(1), "receipts/00001.json"):
        second = whole_store.root / name.replace("/c/1", "/c/2").replace("00001", "00002")
        second.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(whole_store.root / name, second)
    assert everything(open_store(whole_store.root)) == whole_store.truth and not whole_store.problems()
    whole_store.extract()
    assert not whole_store.changed()


def test_a_second_writer_that_died_between_its_files(whole_store: WholeStore, fill_shard: Any, tmp_path: Path) -> None:
    """It had other bytes, and had put some of them over those of a finished shard."""
    other = tmp_path / "other"
    images = open_store(whole_store.root).images
    create_store(other, whole_store.plan, images)
    fill_shard(other, whole_store.plan, images, 1, seed=1).commit()
    for count in range(1, len(whole_store.files_of(1)) + 1):
        for name in whole_store.files_of(1)[:count]:
            shutil.copy(other / name, whole_store.root / name)
        if whole_store.changed():
            whole_store.assert_mended(whole_store.assert_noticed(("changed", "cut short", "too long")))
        whole_store.restore()


@pytest.mark.parametrize("backend", ["zarr", "wds"])
def test_a_shard_of_another_store_is_not_taken_for_one_of_an_unfinished_store(
    backend: str, begin_store: Any, fill_shard: Any, make_store: Any
) -> None:
    """Same images, same shape, other weights; there is no manifest yet that would know better."""
    other, _, _ = make_store("other", backend=backend, num_images=6, teacher_fingerprint="others")
    root, plan, images = begin_store("store", backend=backend, num_images=6)
    fill_shard(root, plan, images, 0).commit()
    entry = ShardEntry.from_file("", (other / "receipts/00001.json").read_bytes())
    for name in (*(file.name for file in entry.files), "receipts/00001.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(other / name, root / name)
    assert set(committed_shards(root, plan)) == {0}
    with pytest.raises(DamagedError, match=r"1 of 2 shards of .* are missing"):
        finish_store(root)
    with pytest.raises(DamagedError, match=r"00001\.json is the receipt of a shard of another store"):
        open_store(root, allow_unfinished=True)
    assert [d.found for d in check_structure(root).damage if d.shard == 1] == ["swapped: the receipt of another store"]
    fill_shard(root, plan, images, 1).commit()
    finish_store(root)
    assert not check_structure(root).damage
