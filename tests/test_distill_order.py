"""The order of images and views: a pure function of (seed, step) that covers everything exactly once."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from distill.order import WINDOW_SHARDS, Draw, EpochOrder, ViewOrder, num_steps


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


def test_reads_stay_within_a_window_of_shards() -> None:
    """A full shuffle would touch every shard file all the time; no shuffle would show neighbours together."""
    per_shard, shards = 10, 5 * WINDOW_SHARDS
    epoch = EpochOrder(np.arange(per_shard * shards), per_shard, seed=3).epoch(0)
    window = per_shard * WINDOW_SHARDS
    for start in range(0, len(epoch), window):
        in_window = set((epoch[start : start + window] // per_shard).tolist())
        assert len(in_window) == WINDOW_SHARDS
        assert in_window != set(range(start // per_shard, start // per_shard + WINDOW_SHARDS)), "shards are permuted"
        assert len(set((epoch[start : start + per_shard] // per_shard).tolist())) > 4, "and mixed"


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
