"""A store's folder: one plan, metadata that is mended, leftovers that are swept, a manifest that comes last."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from storage.errors import ConfigError, DamagedError, DiskError, InputError
from storage.folder import create_store, finish_store, load_plan, sweep
from storage.receipts import committed_shards
from storage.records import FORMAT_VERSION


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"teacher_fingerprint": "others"}, "teacher_fingerprint is 'weights', expected 'others'"),
        ({"views_per_image": 3}, "views_per_image is 2, expected 3"),
        ({"images_per_shard": 2}, "images_per_shard is 3, expected 2"),
        ({"whitening": {"kind": "layer_norm", "eps": 1e-6}}, "whitening.eps is 1e-05, expected 1e-06"),
        ({"sampler": {"kind": "centre_crop", "fraction": 1.0}}, "sampler.fraction is 0.875, expected 1.0"),
        ({"teacher": {"input_px": 256}}, "teacher.input_px is None, expected 256"),
    ],
)
def test_two_plans_never_share_a_folder(
    begin_store: Any, tree_bytes: Any, store_plan: Any, changes: dict[str, object], difference: str
) -> None:
    root, _, images = begin_store()
    before = tree_bytes(root)
    with pytest.raises(ConfigError, match=re.escape(f"store holds another store: {difference}; choose another")):
        create_store(root, store_plan(images, **changes), images)
    assert tree_bytes(root) == before


def test_other_images_are_another_plan(begin_store: Any, image_list: Any, store_plan: Any) -> None:
    root, plan, _ = begin_store()
    other = image_list(9)
    with pytest.raises(ConfigError, match=r"images_fingerprint is .*; num_images is 8, expected 9"):
        create_store(root, store_plan(other), other)
    with pytest.raises(AssertionError, match="made for other images"):
        create_store(root, plan, other)


def test_the_same_plan_is_accepted_and_nothing_is_touched(make_store: Any, tree_bytes: Any) -> None:
    root, plan, images = make_store()
    before, times = tree_bytes(root), {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    create_store(root, plan, images)
    assert tree_bytes(root) == before and {path: path.stat().st_mtime_ns for path in root.rglob("*")} == times


def test_a_store_is_made_around_what_lies_in_its_folder(tmp_path: Path, image_list: Any, store_plan: Any) -> None:
    """The lock is held, and the state of the run is written, before there is a store."""
    root, images = tmp_path / "store", image_list(2)
    for name in ("LOCK", "state.json", "tokens/c/0/0/0"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    inode = (root / "LOCK").stat().st_ino
    create_store(root, store_plan(images), images)
    assert (root / "LOCK").stat().st_ino == inode and (root / "state.json").read_text() == "state.json"
    assert (root / "tokens/c/0/0/0").exists()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("{}"), lambda path: path.write_text("")])
@pytest.mark.parametrize(
    "name",
    [
        "plan.json",
        "images.bin",
        "zarr.json",
        *(f"{array}/zarr.json" for array in ("tokens", "token_mean", "token_std", "views")),
    ],
)
def test_lost_metadata_is_written_again(make_store: Any, tree_bytes: Any, damage: Any, name: str) -> None:
    root, plan, images = make_store()
    before = tree_bytes(root)
    damage(root / name)
    create_store(root, plan, images)
    assert tree_bytes(root) == before


def test_shards_of_an_unknown_plan_are_not_touched(make_store: Any, store_plan: Any, tree_bytes: Any) -> None:
    root, plan, images = make_store()
    (root / "plan.json").unlink()
    with pytest.raises(ConfigError, match="holds another store: views_per_image"):
        create_store(root, store_plan(images, views_per_image=1), images)
    (root / "zarr.json").write_text("{")
    before = tree_bytes(root)
    with pytest.raises(DamagedError, match=r"nothing tells of what; delete the folder"):
        create_store(root, plan, images)
    assert tree_bytes(root) == before
    shutil.rmtree(root / "receipts")
    create_store(root, plan, images)
    assert load_plan(root) == plan and not committed_shards(root, plan)


def test_a_plan_of_a_newer_program_is_refused(begin_store: Any) -> None:
    root, plan, images = begin_store()
    (root / "plan.json").write_bytes(plan.model_copy(update={"format_version": FORMAT_VERSION + 1}).to_file())
    with pytest.raises(InputError, match=rf"format {FORMAT_VERSION + 1}, .* up to {FORMAT_VERSION}; update it"):
        create_store(root, plan, images)


def test_a_small_disk_is_refused_before_the_work(
    tmp_path: Path, image_list: Any, store_plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = image_list(1000)
    plan = store_plan(images, features={"teacher": "t", "num_prefix_tokens": 1, "grid_hw": (16, 16), "channels": 1024})
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 10**9))
    with pytest.raises(DiskError, match=r"needs 1,056\.976 MB at .*store, where 1,000\.000 MB are free"):
        create_store(tmp_path / "store", plan, images)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 10**10))
    create_store(tmp_path / "store", plan, images)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 0))
    create_store(tmp_path / "store", plan, images)  # it is there already, perhaps nearly full


# Sweeping and finishing


def test_sweep_removes_what_was_left_behind_and_nothing_else(make_store: Any, tree_bytes: Any) -> None:
    root, plan, _ = make_store()
    before = tree_bytes(root)
    for name in (
        "attempts/00001.abc/tokens_c_1_0_0", ".plan.json.1.partial", "receipts/.00000.json.2.partial",
        "tokens/.zarr.json.3.partial",
    ):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("left behind")
    sweep(root, plan)
    assert tree_bytes(root) == before and not (root / "attempts").exists()


def test_sweep_forgets_shards_whose_files_are_gone(make_store: Any) -> None:
    root, plan, _ = make_store()
    (root / "views/c/0/0").unlink()
    os.truncate(root / "tokens/c/1/0/0", 100)
    assert list(committed_shards(root, plan)) == [2]
    (root / "receipts/00002.json").write_bytes((root / "receipts/00000.json").read_bytes())
    sweep(root, plan)
    assert not list((root / "receipts").iterdir()) and not committed_shards(root, plan)
    assert not (root / "manifest.json").exists()


def test_a_store_with_missing_shards_is_not_finished(begin_store: Any, fill_shard: Any) -> None:
    root, plan, images = begin_store()
    fill_shard(root, plan, images, 1).commit()
    with pytest.raises(DamagedError, match=r"2 of 3 shards of .*store are missing, first 0"):
        finish_store(root)
    assert not (root / "manifest.json").exists()


def test_two_stores_of_one_plan_are_equal_byte_for_byte(make_store: Any, tree_bytes: Any) -> None:
    one, other = (make_store(name, bad=(3,))[0] for name in ("one", "other"))
    assert tree_bytes(one) == tree_bytes(other)
    assert str(one).encode() not in b"".join(tree_bytes(one).values())  # a store can be moved
