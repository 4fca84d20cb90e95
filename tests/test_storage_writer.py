"""Writing shards: what goes in comes out, and a commit is whole or not there."""

import functools
import itertools
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import storage.writer
from storage.atomic import create_file
from storage.errors import ConfigError, DamagedError
from storage.folder import create_store, finish_store, needed_bytes
from storage.image_index import ImageList
from storage.reader import open_store
from storage.receipts import committed_shards, read_receipt
from storage.records import FeatureRecord, ImageKey, StorePlan
from storage.verify import iter_damage
from storage.views import View
from storage.writer import ShardWriter


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


both_layouts = pytest.mark.parametrize("backend", ["zarr", "wds"])


class Case(NamedTuple):
    """A store's shape, what is unusable in it, and the order in which its records come."""

    num_images: int
    views: int
    images_per_shard: int
    bad: frozenset[int]
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_images = draw(st.integers(1, 9))
    return Case(
        num_images,
        draw(st.integers(1, 3)),
        draw(st.integers(1, 10)),
        draw(st.frozensets(st.integers(0, num_images - 1))),
        draw(st.integers(0, 2**32)),
    )


def record_of(plan: StorePlan, key: str, view_index: int, generator: np.random.Generator) -> FeatureRecord:
    tokens, channels = plan.features.shape_TC
    top, left, height, width = generator.integers(1, 2**31 - 1, 4).tolist()
    view = View(top=top, left=left, height=height, width=width, flip=bool(generator.integers(2)))
    tokens_TC = generator.integers(0, 2**16, (tokens, channels)).astype(np.uint16).view(np.float16)  # NaN, too
    mean_T, std_T = generator.normal(size=(2, tokens)).astype(np.float32)
    return FeatureRecord(ImageKey(key), view_index, view, tokens_TC, mean_T, std_T)


def assert_equal(found: FeatureRecord, expected: FeatureRecord) -> None:
    assert found[:3] == expected[:3]
    assert found.jpeg == expected.jpeg
    for ours, theirs in zip(found[3:6], expected[3:6], strict=True):
        assert ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes() and ours.shape == theirs.shape


@both_layouts
def test_what_goes_in_comes_out(begin_store: Any, backend: str) -> None:
    names = map(str, itertools.count())

    @settings(max_examples=50)
    @given(case=cases())
    def check(case: Case) -> None:
        shape = {"num_images": case.num_images, "views_per_image": case.views}
        round_trip(case, *begin_store(next(names), **shape, images_per_shard=case.images_per_shard, backend=backend))

    check()


def round_trip(case: Case, root: Path, plan: StorePlan, images: ImageList) -> None:
    generator, order = np.random.default_rng(case.seed), random.Random(case.seed)
    expected = {
        position * case.views + view: record_of(plan, images.keys[position], view, generator)
        for position in range(case.num_images)
        if position not in case.bad
        for view in range(case.views)
    }
    for index in order.sample(range(plan.num_shards), plan.num_shards):
        writer = ShardWriter(root, plan, images, index)
        positions = plan.images_of_shard(index)
        numbers = [n for n in expected if n // case.views in positions]
        for number in order.sample(numbers, len(numbers)):
            writer.append(expected[number])
        for position in case.bad.intersection(positions):
            writer.mark_bad(images.keys[position], "unusable")
        entry = writer.commit()
        assert entry.num_images == len(positions) and entry.num_records == len(numbers)
    manifest = finish_store(root)
    assert [bad.key for bad in manifest.bad_images] == [images.keys[position] for position in sorted(case.bad)]
    assert not any(damage for _, damage in iter_damage(root))

    reader = open_store(root)
    assert reader.usable_images().tolist() == [p for p in range(case.num_images) if p not in case.bad]
    for number, record in expected.items():
        assert_equal(reader.read(record.key, record.view_index), record)
        assert reader.record_number(record.key, record.view_index) == number
    for index in range(plan.num_shards):
        wanted = [record for n, record in expected.items() if n // case.views in plan.images_of_shard(index)]
        for skip in {0, 1, len(wanted), len(wanted) + 1}:
            for found, record in zip(reader.iter_shard(index, skip=skip), wanted[skip:], strict=True):
                assert_equal(found, record)
    if not expected:
        return
    records_B = np.array(order.choices(list(expected), k=12))
    out_BTC = np.full((12, *plan.features.shape_TC), 7, np.float16)
    reader.read_batch(records_B, out_BTC)
    means_BT, stds_BT = reader.token_statistics(records_B)
    views = reader.views(records_B)
    for row, number in enumerate(records_B.tolist()):
        record = expected[number]
        assert_equal(record._replace(tokens_TC=out_BTC[row], view=views[row]), record)
        assert_equal(record._replace(token_mean_T=means_BT[row], token_std_T=stds_BT[row]), record)


# Commits


@both_layouts
def test_committing_again_changes_nothing(begin_store: Any, fill_shard: Any, tree_bytes: Any, backend: str) -> None:
    root, plan, images = begin_store(backend=backend)
    first = fill_shard(root, plan, images, 0).commit()
    before = tree_bytes(root)
    assert fill_shard(root, plan, images, 0).commit() == first
    assert tree_bytes(root) == before
    with pytest.raises(DamagedError, match="shard 0 was committed before with other bytes"):
        fill_shard(root, plan, images, 0, seed=1).commit()
    assert tree_bytes(root) == before


@both_layouts
def test_two_writers_of_one_shard_at_once(
    begin_store: Any, fill_shard: Any, tree_bytes: Any, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """A job that was thought lost may still run. Equal bytes are fine; of unequal ones no mixture is left behind."""
    root, plan, images = begin_store(backend=backend)
    first = fill_shard(root, plan, images, 0)

    def commit_of_another(seed: int) -> None:
        monkeypatch.setattr(storage.writer, "create_file", create_file)
        fill_shard(root, plan, images, 0, seed=seed).commit()

    def create_late(path: Path, data: bytes, private: Path, *, seed: int) -> bool:
        commit_of_another(seed)
        return create_file(path, data, private)

    monkeypatch.setattr(storage.writer, "create_file", functools.partial(create_late, seed=0))
    entry = first.commit()
    assert read_receipt(root, plan, 0) == entry
    (root / "receipts/00000.json").unlink()
    monkeypatch.setattr(storage.writer, "create_file", functools.partial(create_late, seed=1))
    with pytest.raises(DamagedError, match="other bytes"):
        first.commit()
    assert read_receipt(root, plan, 0) is None
    assert first.commit() == entry and not any(damage for index, damage in iter_damage(root) if index == 0)


@both_layouts
def test_a_damaged_receipt_is_replaced(begin_store: Any, fill_shard: Any, backend: str) -> None:
    root, plan, images = begin_store(backend=backend)
    entry = fill_shard(root, plan, images, 0).commit()
    (root / "receipts/00000.json").write_text("{}")
    assert read_receipt(root, plan, 0) is None
    fill_shard(root, plan, images, 0).commit()
    assert read_receipt(root, plan, 0) == entry


def test_a_shard_that_is_not_whole_is_not_committed(begin_store: Any, fill_shard: Any, tree_bytes: Any) -> None:
    root, plan, images = begin_store()
    before = tree_bytes(root)
    whole = fill_shard(root, plan, images, 1)
    missing, surplus = ShardWriter(root, plan, images, 1), fill_shard(root, plan, images, 1)
    generator = np.random.default_rng(0)
    for key in missing.keys:
        missing.append(record_of(plan, key, 0, generator))
    surplus.mark_bad(surplus.keys[0], "but it has records")
    for writer, wrong, first in ((missing, 3, 1), (surplus, 2, 0)):
        with pytest.raises(AssertionError, match=f"shard 1: {wrong} records missing or of bad images, first {first}$"):
            writer.commit()
    assert tree_bytes(root) == before
    whole.commit()
    assert list(committed_shards(root, plan)) == [1]


def test_records_that_do_not_fit_are_refused(begin_store: Any) -> None:
    root, plan, images = begin_store()
    writer = ShardWriter(root, plan, images, 0)
    record = record_of(plan, images.keys[0], 0, np.random.default_rng(0))
    for changed in (
        record._replace(tokens_TC=record.tokens_TC.astype(np.float32)),
        record._replace(tokens_TC=record.tokens_TC[:-1]),
        record._replace(token_mean_T=record.token_mean_T[:-1]),
        record._replace(token_std_T=record.token_std_T[:, None]),
        record._replace(jpeg=b"no views are stored"),
        record._replace(view_index=2),
        record._replace(view_index=-1),
    ):
        with pytest.raises(AssertionError):
            writer.append(changed)
    with pytest.raises(KeyError):
        writer.append(record._replace(key=images.keys[3]))  # an image of the next shard


@both_layouts
def test_tokens_that_change_before_their_commit_are_never_read(backend: str, begin_store: Any) -> None:
    """`append` copies nothing; who reuses the memory too early is told by the first read."""
    root, plan, images = begin_store(num_images=1, views_per_image=1, backend=backend)
    writer = ShardWriter(root, plan, images, 0)
    record = record_of(plan, images.keys[0], 0, np.random.default_rng(0))
    writer.append(record)
    record.tokens_TC[0, 0] += 1 if np.isfinite(record.tokens_TC[0, 0]) else -record.tokens_TC[0, 0]
    record.tokens_TC[1] = 0
    writer.commit()
    finish_store(root)
    with pytest.raises(DamagedError, match=r"record 0 in .* is damaged"):
        open_store(root).read(images.keys[0], 0)


# Beginning and ending


def test_another_plan_never_shares_a_folder(begin_store: Any, store_plan: Any, tree_bytes: Any) -> None:
    root, _, images = begin_store()
    before = tree_bytes(root)
    for changes in ({"backend": "wds"}, {"views_per_image": 3}, {"teacher_fingerprint": "others"}):
        (name,) = changes
        with pytest.raises(ConfigError, match=f"holds another store: {name} is .*; choose another folder"):
            create_store(root, store_plan(images, **changes), images)
    assert tree_bytes(root) == before


@both_layouts
def test_metadata_that_changed_meanwhile_is_not_sealed(backend: str, begin_store: Any, fill_shard: Any) -> None:
    """The manifest holds digests of what it finds: damage from before would count as right for ever."""
    root, plan, images = begin_store(num_images=1, backend=backend)
    fill_shard(root, plan, images, 0).commit()
    names = ["images.bin", "plan.json", *(["dataset.json"] if backend == "wds" else ["zarr.json", "tokens/zarr.json"])]
    for name in names:
        whole = (root / name).read_bytes()
        (root / name).write_bytes(whole[:-1] + b" ")
        with pytest.raises(DamagedError, match=rf"{name} (has changed|does not match its own digest)"):
            finish_store(root)
        (root / name).write_bytes(whole)
    finish_store(root)
    assert not any(damage for _, damage in iter_damage(root))


@both_layouts
@pytest.mark.parametrize("encoding", [{"kind": "fp16"}, {"kind": "int8", "channel_scale": [0.25] * 64}])
@pytest.mark.parametrize("subset", [None, {"fraction": 0.25, "seed": 1}])
def test_the_room_that_is_asked_for_is_enough(
    backend: str, encoding: dict[str, Any], subset: dict[str, Any] | None, make_store: Any
) -> None:
    features = {"teacher": "made-up", "num_prefix_tokens": 1, "grid_hw": (14, 14), "channels": 64}
    root, plan, _ = make_store(
        num_images=12, backend=backend, encoding=encoding, token_subset=subset, features=features, images_per_shard=6
    )
    taken = open_store(root).manifest.num_bytes
    assert taken <= needed_bytes(plan) <= 1.25 * taken
