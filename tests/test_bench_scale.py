"""The scale trial's data, steps and arithmetic, with few records. No speed is measured here."""

from pathlib import Path

import pytest

from storage.image_index import build_index
from tests.bench.scale import AIM, growth, rows
from tests.bench.scale_data import CLASS_IMAGES, images, make_folders, make_tars
from tests.bench.scale_steps import SHAPES, Measured, run, tokens_of

SMALL, LARGE = CLASS_IMAGES, 2 * CLASS_IMAGES


def test_images_differ_and_can_be_decoded() -> None:
    from storage.decode import decode_image

    first, second = images(2)
    assert first != second
    assert decode_image(first).tolist() == decode_image(second).tolist()


def test_parts_of_the_data_hold_the_same_images_in_folders_and_in_tars(tmp_path: Path) -> None:
    folders, tars = make_folders(tmp_path, [SMALL, LARGE]), make_tars(tmp_path, [SMALL, LARGE])
    for count in (SMALL, LARGE):
        in_folder, in_tar = (
            build_index(str(place), eval_fraction=0, seed=0, cache_dir=tmp_path / "cache").images
            for place in (folders[count], tars[count])
        )
        expected = [f"{number:08d}.jpg" for number in range(count)]
        assert list(in_tar.keys) == expected
        assert sorted(in_folder.digests) == sorted(in_tar.digests)
        assert len(set(in_tar.digests)) == count


def test_every_step_is_taken_and_measured(tmp_path: Path) -> None:
    folders, tars = make_folders(tmp_path, [LARGE]), make_tars(tmp_path, [LARGE])
    steps = run(LARGE, folders[LARGE], tars[LARGE], tmp_path)
    questions = [name.removeprefix("16 a shard: ") for name in steps if name.startswith("16 a shard")]
    assert [f"{shape}: {question}" for shape in SHAPES for question in questions] == list(steps)[-18:]
    assert min(step.seconds for step in steps.values()) > 0
    assert min(step.peak_bytes for step in steps.values()) > 2**20


def test_any_two_records_differ() -> None:
    assert len({tokens_of(record).tobytes() for record in range(1000)}) == 1000


@pytest.mark.parametrize(("power", "expected"), [(1, 1.0), (2, 2.0), (0, 0.5)])
def test_growth_is_the_time_a_record_after_one_doubling(power: int, expected: float) -> None:
    counts = [25, 50, 100, 200]
    assert growth(counts, [count**power * 1e-3 for count in counts]) == pytest.approx(expected)


def test_what_grows_faster_than_the_data_misses_its_aim() -> None:
    found = {
        count: {"linear": Measured(count * 1e-3, 10**6), "quadratic": Measured(count**2 * 1e-3, 10**6 * count)}
        for count in (100, 50, 200)
    }
    linear, quadratic = rows(found)
    assert (linear.is_met, quadratic.is_met) == (True, False)
    assert linear.target == quadratic.target == AIM
    assert quadratic.note == "x4.00, x4.00; 5 records/CPU-s; 50 to 200 MB"
    assert (linear.value, linear.rounds) == (0.2, (0.05, 0.1, 0.2))
