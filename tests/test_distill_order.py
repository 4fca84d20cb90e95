"""The order of images and views: a pure function of (seed, step) that covers everything exactly once."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from distill.order import BLOCK_IMAGES, POOL_IMAGES, WINDOW_SHARDS, Draw, EpochOrder, ViewOrder, num_steps


def usable(num_images: int, bad: set[int]) -> NDArray[np.int64]:
    """Positions without some bad ones; at least one is left."""
    kept = [position for position in range(num_images) if position not in bad]
    return np.array(kept or [0], np.int64)


ORDERS = {
    "num_images": st.integers(1, 60),
    "bad": st.sets(st.integers(0, 59), max_size=10),
    "images_per_shard": st.integers(1, 70),
    "seed": st.integers(0, 2**40),
}


@settings(max_examples=150, deadline=None)
@given(**ORDERS, batch_size=st.integers(1, 100), epochs=st.integers(1, 6))
def test_every_epoch_covers_every_usable_image_once(
    num_images: int, bad: set[int], images_per_shard: int, seed: int, batch_size: int, epochs: int
) -> None:
    positions = usable(num_images, bad)
    order = EpochOrder(positions, images_per_shard, seed)
    steps = -(-len(positions) * epochs // batch_size)
    draws = [order.batch(step, batch_size) for step in range(steps)]
    assert all(len(draw.positions_B) == len(draw.epochs_B) == batch_size for draw in draws)
    seen = Counter(
        (int(epoch), int(position))
        for draw in draws
        for epoch, position in zip(draw.epochs_B, draw.positions_B, strict=True)
    )
    assert all(seen[epoch, int(position)] == 1 for epoch in range(epochs) for position in positions)
    assert {position for _, position in seen} <= set(positions.tolist())
    flat = np.concatenate([draw.epochs_B for draw in draws])
    assert (np.diff(flat) >= 0).all()


@settings(max_examples=60, deadline=None)
@given(**ORDERS, batch_size=st.integers(1, 40), steps=st.lists(st.integers(0, 500), min_size=1, max_size=6))
def test_a_batch_depends_on_nothing_but_its_step(
    num_images: int, bad: set[int], images_per_shard: int, seed: int, batch_size: int, steps: list[int]
) -> None:
    """Whatever was asked before, as after a resume or from several threads."""
    positions = usable(num_images, bad)
    order, views = EpochOrder(positions, images_per_shard, seed), ViewOrder(num_images, 3, seed)
    for step in steps:
        draw = order.batch(step, batch_size)
        fresh = EpochOrder(positions, images_per_shard, seed).batch(step, batch_size)
        assert np.array_equal(draw.positions_B, fresh.positions_B)
        assert np.array_equal(draw.epochs_B, fresh.epochs_B)
        assert np.array_equal(views.views(draw), ViewOrder(num_images, 3, seed).views(fresh))


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    positions = np.arange(100)
    orders = [tuple(EpochOrder(positions, 7, seed).epoch(epoch)) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({*orders, tuple(positions)}) == 7


def neighbours(order_N: NDArray[np.int64], group: int, batch: int) -> float:
    """How many others of its group (a block, a shard) an image meets in its batch, on average."""
    batches = (order_N[: len(order_N) // batch * batch] // group).reshape(-1, batch)
    counts = [np.unique(row, return_counts=True)[1] for row in batches]
    return float(np.mean([(count * (count - 1)).sum() / batch for count in counts]))


def test_the_disk_sees_whole_blocks() -> None:
    """Neighbours in ascending order, shorter only at the end of a shard, and in another order for each epoch."""
    per_shard, shards = 5 * BLOCK_IMAGES + 3, 40
    order = EpochOrder(np.arange(per_shard * shards), per_shard, seed=3)
    epochs = [order.reading(epoch) for epoch in (0, 1)]
    for reading in epochs:
        starts = np.flatnonzero(np.diff(reading, prepend=-9) != 1)
        lengths = np.diff(starts, append=len(reading))
        assert set((reading[starts] % per_shard).tolist()) <= {0, *range(0, per_shard, BLOCK_IMAGES)}
        assert (lengths >= BLOCK_IMAGES).mean() > 0.8
        assert np.mean(lengths) < 1.1 * BLOCK_IMAGES, "blocks of a shard are apart"
    assert not np.array_equal(epochs[0], epochs[1])


def test_reads_stay_within_a_window_of_shards() -> None:
    """Or every shard file would be opened again and again."""
    per_shard, shards = 64, 2 * WINDOW_SHARDS + 2  # three windows of 172, 171 and 171 shards
    reading = EpochOrder(np.arange(per_shard * shards), per_shard, seed=3).reading(0)
    first, last = (reading[part] // per_shard for part in (slice(0, 172 * per_shard), slice(-171 * per_shard, None)))
    assert (len(set(first.tolist())), len(set(last.tolist()))) == (172, 171)
    assert not set(first.tolist()) & set(last.tolist())
    assert np.ptp(first) > shards // 2, "shards are permuted"


def test_batches_are_mixed_nearly_as_by_a_full_shuffle() -> None:
    """An image meets few of the neighbours that it was read with: pools of 512 blocks, batches of 256."""
    per_shard, images = 512, 6 * POOL_IMAGES
    order = EpochOrder(np.arange(images), per_shard, seed=3)
    full = np.random.default_rng(0).permutation(images)
    block, shard = neighbours(order.epoch(0), BLOCK_IMAGES, 256), neighbours(order.epoch(0), per_shard, 256)
    assert neighbours(order.reading(0), BLOCK_IMAGES, 256) == pytest.approx(15, abs=0.1), "what pools are for"
    assert block == pytest.approx(15 * 255 / POOL_IMAGES, rel=0.1)
    assert shard < neighbours(full, per_shard, 256) + block + 0.2
    last = order.epoch(0)[-256:]
    assert neighbours(last, BLOCK_IMAGES, 256) < 3, "also at the end of an epoch"


def test_a_small_data_set_is_shuffled_fully() -> None:
    """Neighbours in the store are no nearer to each other than any two images."""
    images = 2099
    distances, expected = [], images / 3
    for seed in range(20):
        places = EpochOrder(np.arange(images), 64, seed).epoch(0).argsort()
        distances.append(np.abs(np.diff(places)).mean())
    assert np.mean(distances) == pytest.approx(expected, rel=0.02)
    assert neighbours(EpochOrder(np.arange(images), 64, 0).epoch(0), BLOCK_IMAGES, 256) < 2.2  # 15 * 255 / 2098 = 1.8


@settings(max_examples=60, deadline=None)
@given(
    num_images=st.integers(1, 60), per_shard=st.integers(1, 30), pool=st.integers(1, 40), batch_size=st.integers(1, 50),
)  # fmt: skip
def test_every_image_is_announced_once_an_epoch_and_before_it_is_needed(
    num_images: int, per_shard: int, pool: int, batch_size: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.order.POOL_IMAGES", pool)
        order = EpochOrder(np.arange(num_images), per_shard, seed=5)
        steps = -(-5 * num_images // batch_size)
        announced: Counter[tuple[int, int]] = Counter()
        for step in range(steps):
            announced.update(pairs(order.coming(step, batch_size)))
            first_number = step * batch_size
            for number, pair in enumerate(pairs(order.batch(step, batch_size)), first_number):
                assert number < 2 * min(pool, num_images) or announced[pair] == 1
        assert set(announced.values()) <= {1}


def pairs(draw: Draw) -> list[tuple[int, int]]:
    return list(zip(draw.epochs_B.tolist(), draw.positions_B.tolist(), strict=True))


def test_an_epoch_of_imagenet_is_drawn_in_a_second_or_two() -> None:
    started = time.process_time()
    EpochOrder(np.arange(1_281_167), 512, seed=0).batch(0, 256)
    assert time.process_time() - started < 5


def test_an_epoch_is_a_fair_shuffle() -> None:
    """Every image comes first equally often."""
    first = Counter(int(EpochOrder(np.arange(6), 2, seed).epoch(0)[0]) for seed in range(1200))
    assert all(150 < first[position] < 250 for position in range(6))


@pytest.mark.parametrize(
    ("images", "epochs", "batch", "steps"), [(10, 3, 5, 6), (10, 3, 4, 7), (3, 1, 256, 1), (1281140, 100, 2048, 62555)]
)
def test_steps_of_a_training(images: int, epochs: int, batch: int, steps: int) -> None:
    assert num_steps(images, epochs, batch) == steps


# ---- views -----------------------------------------------------------------------------------------------------------


def views_of_epoch(order: ViewOrder, epoch: int) -> NDArray[np.int64]:
    images = np.arange(order.num_images)
    return order.views(Draw(images, np.full(order.num_images, epoch)))


@settings(max_examples=60, deadline=None)
@given(num_images=st.integers(1, 40), num_views=st.integers(1, 9), seed=st.integers(0, 99), cycle=st.integers(0, 5))
def test_a_cycle_of_epochs_shows_every_view_of_every_image_once(
    num_images: int, num_views: int, seed: int, cycle: int
) -> None:
    order = ViewOrder(num_images, num_views, seed)
    epochs = range(cycle * num_views, (cycle + 1) * num_views)
    seen_KN = np.stack([views_of_epoch(order, epoch) for epoch in epochs])
    assert (np.sort(seen_KN, axis=0) == np.arange(num_views)[:, None]).all()


def test_images_cycles_and_seeds_differ_in_their_views() -> None:
    order = ViewOrder(200, 4, seed=0)
    cycles = [np.stack([views_of_epoch(order, 4 * cycle + place) for place in range(4)], axis=1) for cycle in range(3)]
    assert len({tuple(row) for row in cycles[0].tolist()}) == 24, "all orders of four views occur"
    for one, other in ((0, 1), (1, 2), (0, 2)):
        same = (cycles[one] == cycles[other]).all(axis=1).mean()
        assert same < 0.15, "an image's order is drawn anew for each cycle"
    assert not np.array_equal(cycles[0][:, 0], views_of_epoch(ViewOrder(200, 4, seed=1), 0))


def test_a_batch_across_epochs_takes_each_images_own_epoch() -> None:
    order = ViewOrder(5, 3, seed=2)
    draw = Draw(np.array([4, 0, 0, 3, 4]), np.array([2, 2, 3, 3, 11]))
    expected = [views_of_epoch(order, epoch)[position] for position, epoch in zip(*draw, strict=True)]
    assert order.views(draw).tolist() == expected
