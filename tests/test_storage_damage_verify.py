"""Verifying: several damages at once, what is no damage, samples of the shards."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from storage.errors import DecantError, InputError
from storage.folder import load_plan
from storage.layouts import LAYOUTS
from storage.reader import open_store
from storage.records import FORMAT_VERSION
from storage.verify import STORE, Damage, check_structure, discard_shard, iter_damage, iter_data_damage, sample_shards
from tests.fixtures.stores import everything
from tests.fixtures.whole_store import WholeStore, flip


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


def test_several_damages_at_once_are_all_listed_and_mended(whole_store: WholeStore) -> None:
    by_shard = {STORE: {"images.bin", "plan.json"}, 0: {whole_store.files_of(0)[0]}, 1: {whole_store.files_of(1)[-1]}}
    for name in set().union(*by_shard.values()):
        flip(whole_store.root / name, -1)
    found = {index: {problem.name for problem in damage} for index, damage in iter_damage(whole_store.root)}
    assert found == by_shard
    for index in found:
        discard_shard(whole_store.root, index)
    whole_store.extract()
    assert everything(open_store(whole_store.root)) == whole_store.truth


def test_an_unfinished_store_and_no_store(whole_store: WholeStore, tmp_path: Path) -> None:
    (whole_store.root / "manifest.json").unlink()
    (damage,) = whole_store.problems()
    assert (damage.shard, damage.name) == (STORE, "manifest.json") and damage.found.startswith("missing: all shards")
    (whole_store.root / "receipts/00001.json").unlink()
    found = dict(iter_damage(whole_store.root))
    assert found[0] == [] and found[1][0].found.startswith("missing: not extracted yet")
    shutil.copy(whole_store.root / "receipts/00000.json", whole_store.root / "receipts/00001.json")
    assert dict(iter_damage(whole_store.root))[1][0].found == "swapped: the receipt of shard 0"
    with pytest.raises(InputError, match=r"holds no store \(no plan\.json\)"):
        list(iter_damage(tmp_path))


def test_the_images_of_an_unfinished_store(whole_store: WholeStore, make_store: Any) -> None:
    """There is no manifest yet to hold their digest; the plan has their fingerprint."""
    other, _, _ = make_store("other", num_images=7)
    discard_shard(whole_store.root, 1)
    shutil.copy(other / "images.bin", whole_store.root)
    assert Damage(STORE, "images.bin", "swapped: the images of another store") in whole_store.problems()
    with pytest.raises(DecantError, match="is not the image list of this store"):
        open_store(whole_store.root, allow_unfinished=True).images  # noqa: B018


def test_a_store_of_a_newer_program_is_not_called_damaged(whole_store: WholeStore) -> None:
    newer = load_plan(whole_store.root).model_copy(update={"format_version": FORMAT_VERSION + 1})
    (whole_store.root / "plan.json").write_bytes(newer.to_file())
    with pytest.raises(InputError, match="update it"):
        list(iter_damage(whole_store.root))


def test_without_a_manifest_and_a_plan_nothing_is_guessed(whole_store: WholeStore) -> None:
    metadata = LAYOUTS[whole_store.plan.backend].metadata(whole_store.plan)
    for name in ("plan.json", "images.bin", "manifest.json", *metadata):
        (whole_store.root / name).write_text("")
    ((index, damage),) = iter_damage(whole_store.root)
    assert index == STORE and {problem.name for problem in damage} == {"plan.json", "images.bin", "manifest.json"}


def test_a_sample_of_the_shards(make_store: Any) -> None:
    root, plan, _ = make_store(num_images=30)
    names = [f"tokens/c/{shard}/0/0" for shard in range(plan.num_shards)]
    for name in names:
        flip(root / name, 0)
    structure = check_structure(root)
    assert not structure.damage and sorted(structure.shards) == list(range(10))
    for fraction, count in ((0, 0), (0.01, 1), (0.1, 1), (0.25, 3), (0.5, 5), (1, 10)):
        chosen = sample_shards(structure.shards, fraction, seed=3)
        assert len(chosen) == count == len(set(chosen)) and chosen == sorted(chosen)
        found = dict(iter_data_damage(structure, chosen))
        assert found.pop(STORE) == []
        assert {index: [damage.name for damage in damages] for index, damages in found.items()} == {
            index: [names[index]] for index in chosen
        }
    draws = {tuple(sample_shards(range(10), 0.3, seed)) for seed in range(20)}
    assert len(draws) > 10 and sample_shards(range(10), 0.3, 5) == sample_shards(range(10), 0.3, 5)
