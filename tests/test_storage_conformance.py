"""One contract, three stores: Zarr, tars and memory give the same answers and refuse the same questions.

The truth is what was made up for each record; the store in memory is the slower way to it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import DamagedError, InputError
from storage.jpeg import decode_view
from tests.fixtures.any_store import BACKENDS, BAD, ENCODINGS, SUBSET, Made, assert_equal


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


# ---- what goes in comes out ------------------------------------------------------------------------------------------


def test_every_record_by_name_and_by_shard(made: Made) -> None:
    reader, numbers = made.reader, list(made.truth)
    tokens = dict(zip(numbers, made.tokens(numbers), strict=True))
    for number, expected in made.truth.items():
        assert reader.record_number(expected.key, expected.view_index) == number
        assert_equal(reader.read(expected.key, expected.view_index), expected, tokens[number])
    for shard in range(made.plan.num_shards):
        wanted = [n for n in numbers if n // made.plan.views_per_image in made.plan.images_of_shard(shard)]
        for skip in (0, 1, len(wanted), len(wanted) + 1):
            for found, number in zip(reader.iter_shard(shard, skip=skip), wanted[skip:], strict=True):
                assert_equal(found, made.truth[number], tokens[number])


def test_batches_in_any_order_with_repeats(made: Made) -> None:
    generator = np.random.default_rng(0)
    for size in (1, 5, 40):
        records_B = generator.choice(list(made.truth), size)
        np.testing.assert_array_equal(made.read(records_B), made.tokens(records_B))
        views = [made.truth[number].view for number in records_B.tolist()]
        assert made.reader.views(records_B) == views
        mean_BT, std_BT = made.reader.token_statistics(records_B)
        np.testing.assert_array_equal(mean_BT, [made.truth[number].token_mean_T for number in records_B.tolist()])
        np.testing.assert_array_equal(std_BT, [made.truth[number].token_std_T for number in records_B.tolist()])
        made.reader.hint(records_B)
    assert made.read([]).shape == (0, *made.plan.shape_TC)


def test_encoded_batches_are_decoded_elsewhere(made: Made) -> None:
    records_B = np.random.default_rng(1).choice(list(made.truth), 12)
    encoded = made.reader.new_batch(12)
    assert encoded.keys() == made.plan.fields.keys()
    made.reader.read_encoded(records_B, encoded)
    out_BTC = np.empty((12, *made.plan.shape_TC), np.float16)
    made.plan.encoding.decode(encoded, out_BTC)
    np.testing.assert_array_equal(out_BTC, made.tokens(records_B))
    for row, number in enumerate(records_B.tolist()):
        for name, values in made.plan.encoding.encode(made.truth[number].tokens_TC).items():
            assert encoded[name].dtype == values.dtype
            np.testing.assert_array_equal(encoded[name][row], values)


def test_the_raw_features_come_back(made: Made) -> None:
    """tokens * std + mean, as far from the originals as the encoding says at most."""
    for number, expected in made.truth.items():
        record = made.reader.read(expected.key, expected.view_index)
        scale_T1, shift_T1 = record.token_std_T[:, None], record.token_mean_T[:, None]
        raw_TC = record.tokens_TC.astype(np.float64) * scale_T1 + shift_T1
        original_TC = (
            expected.tokens_TC.astype(np.float64) * expected.token_std_T[:, None] + expected.token_mean_T[:, None]
        )
        bound_TC = made.plan.encoding.error_bound(
            expected.tokens_TC, made.plan.encoding.encode(expected.tokens_TC)
        ) * np.abs(scale_T1)
        assert (np.abs(raw_TC - original_TC) <= bound_TC + 1e-12).all(), number


def test_positions_tell_which_tokens_are_kept(made: Made) -> None:
    records_B = np.array(list(made.truth))
    positions_BT = made.reader.positions(records_B)
    if made.plan.token_subset is None:
        assert positions_BT is None and made.plan.shape_TC == made.plan.features.shape_TC
        return
    assert positions_BT is not None and positions_BT.shape == (len(records_B), 3)
    for row, record in enumerate(made.truth.values()):
        expected = SUBSET.positions(record.key, record.view_index, made.plan.features.num_tokens)
        np.testing.assert_array_equal(positions_BT[row], expected)


def test_rendered_views(made: Made) -> None:
    records_B = np.random.default_rng(2).choice(list(made.truth), 9)
    if made.plan.stored_views is None:
        with pytest.raises(InputError, match="keeps no rendered views; render them from the images"):
            made.reader.read_jpegs(records_B)
        return
    jpegs = made.reader.read_jpegs(records_B)
    assert jpegs == [made.truth[number].jpeg for number in records_B.tolist()]
    assert made.reader.read_jpegs(records_B[:0]) == []
    decode_view(jpegs[0], 8, np.empty((8, 8, 3), np.uint8))


# ---- holes and wrong questions ---------------------------------------------------------------------------------------


def test_bad_images_are_holes(made: Made) -> None:
    reader = made.reader
    assert reader.usable_images().tolist() == [0, 2, 3, 4, 5, 7]
    assert [bad.key for bad in reader.manifest.bad_images] == [reader.images.keys[number] for number in BAD]
    jpegs = [lambda records: reader.read_jpegs(np.array(records))] if made.plan.stored_views else []
    for hole in (2, 3, 12, 13):
        reads: list[Callable[..., Any]] = [made.read, lambda records: reader.views(np.array(records)), *jpegs]
        for read in reads:
            with pytest.raises(DamagedError, match=f"record {hole} of .* is a hole: its image was unusable"):
                read([0, hole, 4])
        with pytest.raises(DamagedError, match="is a hole"):
            reader.read(reader.images.keys[hole // 2], hole % 2)
        for statistics_BT in reader.token_statistics(np.array([0, hole])):
            assert np.isfinite(statistics_BT[0]).all() and np.isnan(statistics_BT[1]).all()


def test_names_that_do_not_exist(plain: Made) -> None:
    for key in ("a/none.png", "", "a/0000.png/"):
        with pytest.raises(KeyError):
            plain.reader.read(key, 0)  # type: ignore[arg-type]
    for view_index in (-1, 2):
        with pytest.raises(KeyError, match="has 2 views an image"):
            plain.reader.read(plain.reader.images.keys[0], view_index)  # type: ignore[arg-type]


def test_numbers_that_do_not_exist(plain: Made) -> None:
    reader = plain.reader
    reads: list[Callable[[Any], Any]] = [
        plain.read, reader.views, reader.token_statistics, reader.read_jpegs, lambda n: reader.rows("views", n)
    ]  # fmt: skip
    for record in (-1, 16, 17, 10**6, -(10**6)):
        for read in reads:
            with pytest.raises(IndexError, match="which has 16"):
                read(np.array([0, record]))


def test_buffers_that_do_not_fit(made: Made) -> None:
    (tokens, channels), records_B = made.plan.shape_TC, np.array([0, 1])
    for out in (
        np.empty((2, tokens, channels), np.float32),
        np.empty((2, tokens, channels), np.int16),
        np.empty((2, tokens, channels + 1), np.float16),
        np.empty((1, tokens, channels), np.float16),
        np.empty((3, tokens, channels), np.float16),
    ):
        with pytest.raises(AssertionError, match="buffer"):
            made.reader.read_batch(records_B, out)
    for name, values in made.reader.new_batch(3).items():
        wrong = made.reader.new_batch(2) | {name: values}
        with pytest.raises(AssertionError, match=f"buffer {name}"):
            made.reader.read_encoded(records_B, wrong)


def test_a_buffer_is_filled_in_place(made: Made) -> None:
    large_BTC = np.full((9, *made.plan.shape_TC), 7, np.float16)
    made.reader.read_batch(np.array([5, 5, 0]), large_BTC[2:5])
    np.testing.assert_array_equal(large_BTC[2:5], made.tokens([5, 5, 0]))
    assert (large_BTC[:2] == 7).all() and (large_BTC[5:] == 7).all()


# ---- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("num_images", "bad", "changes"),
    [
        (1, (), {}),
        (1, (), {"images_per_shard": 1, "views_per_image": 1}),
        (1, (0,), {}),
        (2, (0, 1), {"images_per_shard": 4}),
        (5, (), {"views_per_image": 3, "images_per_shard": 7}),
        (7, (0, 3, 6), {"images_per_shard": 2}),
    ],
)
def test_odd_shapes(make: Any, backend: str, num_images: int, bad: tuple[int, ...], changes: Any) -> None:
    made = make(backend, num_images=num_images, bad=bad, **changes, view_px=8)
    assert made.reader.usable_images().tolist() == [image for image in range(num_images) if image not in bad]
    assert made.reader.manifest.num_records == len(made.truth)
    found = [record for shard in range(made.plan.num_shards) for record in made.reader.iter_shard(shard)]
    for record, expected in zip(found, made.truth.values(), strict=True):
        assert_equal(record, expected, expected.tokens_TC)
    if made.truth:
        np.testing.assert_array_equal(made.read(made.truth), made.tokens(made.truth))


def test_all_stores_give_the_same(make: Callable[..., Made]) -> None:
    """Any question to any two stores of the same content."""
    stores = [make(backend, encoding=ENCODINGS["int8"], token_subset=SUBSET, view_px=8) for backend in BACKENDS]
    memory = stores[-1]

    @settings(max_examples=60)
    @given(st.lists(st.sampled_from(sorted(memory.truth)), min_size=1, max_size=20))
    def check(records: list[int]) -> None:
        records_B, expected = np.array(records), memory.read(records)
        for store in stores[:-1]:
            np.testing.assert_array_equal(store.read(records), expected)
            assert store.reader.views(records_B) == memory.reader.views(records_B)
            assert store.reader.read_jpegs(records_B) == memory.reader.read_jpegs(records_B)
            for name in ("token_mean", "token_std", "token_scale", "views"):
                np.testing.assert_array_equal(
                    store.reader.rows(name, records_B), memory.reader.rows(name, records_B), strict=True
                )

    check()
