"""Stores of format 2 that are kept in the repository: every later version reads them, equal to the last bit."""

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from storage.encodings import BitRound, Zstd
from storage.errors import DamagedError
from storage.reader import open_store
from storage.records import FORMAT_VERSION
from storage.verify import iter_damage

GOLDEN = Path(__file__).parent / "golden"
made_by = SimpleNamespace(**runpy.run_path(str(GOLDEN / "make.py")))
ALL = pytest.mark.parametrize("name", sorted(made_by.STORES))


def test_all_stores_are_of_the_format_that_is_written() -> None:
    """A new format gets new golden stores beside these, which stay as long as the format can be read."""
    found = {path.name for path in GOLDEN.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert found == set(made_by.STORES)
    versions = {json.loads((GOLDEN / name / "plan.json").read_bytes())["format_version"] for name in found}
    assert versions == {FORMAT_VERSION} == {2}


@ALL
def test_every_value_is_read(name: str) -> None:
    """Compared with the formulas of the format's document, worked out slowly in make.py."""
    store, plan, jpegs = open_store(GOLDEN / name, check="always"), made_by.plan_of(name), made_by.load_jpegs()
    assert store.plan == plan
    assert (*store.images.keys,) == made_by.KEYS and list(store.images.labels) == [0, 0, 1]
    assert store.images.fingerprint == plan.images_fingerprint
    assert [bad.key for bad in store.manifest.bad_images] == [made_by.BAD]
    for number in range(plan.num_records):
        if number // 2 == 1:
            with pytest.raises(DamagedError, match="is a hole"):
                store.read(made_by.BAD, number % 2)
            continue
        truth, kept = made_by.whitened_record(number, jpegs, plan), made_by.kept_tokens(number, plan)
        expected = made_by.expected_tokens(truth.tokens_TC[kept], plan)
        found = store.read(truth.key, truth.view_index)
        np.testing.assert_array_equal(found.tokens_TC.view(np.uint16), expected.pop("decoded").view(np.uint16))
        np.testing.assert_array_equal(found.token_mean_T, truth.token_mean_T[kept])
        np.testing.assert_array_equal(found.token_std_T, truth.token_std_T[kept])
        assert found.view == truth.view and found.jpeg == (truth.jpeg if plan.stored_views else None)
        encoded = store.new_batch(1)
        store.read_encoded(np.array([number]), encoded)
        assert encoded.keys() == expected.keys()
        for field, values in expected.items():
            assert encoded[field].dtype == values.dtype
            np.testing.assert_array_equal(encoded[field][0], values)
        if plan.token_subset is not None:
            assert store.positions(np.array([number])).tolist() == [kept]


@ALL
def test_the_teachers_tokens_come_back(name: str) -> None:
    """Whitening undone by the words of the format's document, one token at a time, in float64."""
    store, plan = open_store(GOLDEN / name), made_by.plan_of(name)
    statistics = made_by.statistics_of(plan)
    np.testing.assert_array_equal(store.statistics, statistics)
    for number in (0, 1, 4, 5):
        record = store.read(made_by.KEYS[number // 2], number % 2)
        for token, found_C in enumerate(store.raw_tokens(np.array([number]))[0]):
            white_C = record.tokens_TC[token].astype(np.float64)
            expected_C = white_C * record.token_std_T[token] + record.token_mean_T[token]
            if plan.whitening.kind == "mean_std":
                expected_C = white_C * statistics[1] + statistics[0]
            if plan.whitening.kind == "pca":
                expected_C = np.linalg.solve(statistics[1:].astype(np.float64), white_C) + statistics[0]
            np.testing.assert_allclose(found_C, expected_C, rtol=1e-6, atol=1e-5)


@ALL
def test_every_byte_is_what_was_committed(name: str) -> None:
    assert not [damage for _, found in iter_damage(GOLDEN / name) for damage in found]


@ALL
def test_a_flipped_bit_is_found(name: str, tmp_path: Path) -> None:
    """In every file there is, so no byte of a store is without a checksum."""
    shutil.copytree(GOLDEN / name, tmp_path / name)
    for path in sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])
        assert [damage for _, found in iter_damage(tmp_path / name) for damage in found], path
        path.write_bytes(data)


@ALL
def test_the_same_bytes_are_written_today(
    name: str, tmp_path: Path, tree_bytes: Callable[[Path], dict[str, bytes]]
) -> None:
    """A change here is a change of the format, or of what a plan's fingerprint covers.

    Compressed records are the exception: another version of the compressor may choose other bytes for the same values.
    They, and the files that hold digests of them, are held to their values alone.
    """
    made_by.write_store(tmp_path / name, name)
    found, expected = tree_bytes(tmp_path / name), tree_bytes(GOLDEN / name)
    assert found.keys() == expected.keys()
    is_compressed = isinstance(made_by.plan_of(name).encoding, BitRound | Zstd)
    of_compressed = ("tokens/c/", "shards/", "receipts/", "manifest.json") if is_compressed else ()
    for file in expected:
        assert found[file] == expected[file] or file.startswith(of_compressed), file
    one, two = open_store(tmp_path / name), open_store(GOLDEN / name)
    for shard in range(one.plan.num_shards):
        for mine, kept in zip(one.iter_shard(shard), two.iter_shard(shard), strict=True):
            np.testing.assert_array_equal(mine.tokens_TC, kept.tokens_TC)
