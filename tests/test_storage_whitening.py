"""Whitening in a store: what undoes it, and the file of what it learnt."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numbers
from numpy.typing import NDArray

from storage.convert import convert_store, plan_conversion
from storage.errors import ConfigError, DamagedError
from storage.files import LocalFiles
from storage.folder import create_store, finish_store, load_plan, needed_bytes
from storage.npy import npy_bytes
from storage.reader import open_store
from storage.records import StorePlan
from storage.verify import STORE, iter_damage
from storage.whitening import (
    NO_STATISTICS,
    STATISTICS_FILE,
    WHITENINGS,
    LayerNorm,
    MeanStd,
    NoWhitening,
    Pca,
    encode_statistics,
    find_whitening,
    load_statistics,
    parse_statistics,
    statistics_files,
)
from tests.fixtures.any_store import BACKENDS
from tests.fixtures.whitenings import MADE_UP

FITTED = ("mean_std", "pca")


# ---- the records -----------------------------------------------------------------------------------------------------


def test_the_default_is_the_papers_and_its_json_stays() -> None:
    assert json.dumps(LayerNorm().to_json()) == '{"kind": "layer_norm", "eps": 1e-05}'
    assert [*WHITENINGS] == ["layer_norm", "mean_std", "pca", "none"]
    assert [whitening.is_fitted for whitening in WHITENINGS.values()] == [True, False, False, True]
    assert [whitening.is_per_token for whitening in WHITENINGS.values()] == [True, False, False, False]
    assert [whitening.num_rows(8) for whitening in WHITENINGS.values()] == [0, 2, 9, 0]
    with pytest.raises(ConfigError, match="unknown whitening 'pcs'; did you mean 'pca'"):
        find_whitening("pcs")


@pytest.mark.parametrize("kind", WHITENINGS)
def test_fitted_ones_know_their_statistics(kind: str) -> None:
    whitening, statistics = MADE_UP[kind]
    assert whitening.is_fitted and whitening.unfitted() == WHITENINGS[kind]
    assert type(whitening).model_validate(json.loads(json.dumps(whitening.to_json()))) == whitening
    files = statistics_files(whitening, statistics)
    assert [*files] == ([STATISTICS_FILE] if kind in FITTED else [])
    if kind in FITTED:
        with pytest.raises(AssertionError, match=f"not the statistics of the plan's {kind}"):
            statistics_files(whitening, statistics * 2)


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def whiten_slowly(kind: str, raw_NC: NDArray[Any], statistics: NDArray[Any]) -> NDArray[np.float64]:
    """By the words of docs/format.md, in float64."""
    raw_NC, statistics = raw_NC.astype(np.float64), statistics.astype(np.float64)
    if kind == "mean_std":
        return np.asarray((raw_NC - statistics[0]) / statistics[1])
    return np.asarray((raw_NC - statistics[0]) @ statistics[1:].T)


@pytest.mark.parametrize("kind", FITTED)
@settings(max_examples=60)
@given(data=st.data())
def test_restoring_undoes_whitening_within_the_bound(kind: str, data: st.DataObject) -> None:
    whitening, statistics = MADE_UP[kind]
    raw_NC = data.draw(numbers.arrays(np.float32, (3, 8), elements=st.floats(-50, 50, width=32)))
    white_NC = whiten_slowly(kind, raw_NC, statistics)
    stored_NC = white_NC.astype(np.float16).astype(np.float32)
    found_NC = whitening.restore(stored_NC, statistics)
    assert found_NC.dtype == np.float32
    rounding_NC = np.abs(white_NC) * 2**-11 + 2**-25
    arithmetic_N1 = 2**-20 * np.sqrt(8) * np.linalg.norm(raw_NC - statistics[0], axis=1, keepdims=True) + 1e-6
    bound_NC = whitening.restored_error(rounding_NC, statistics) + arithmetic_N1
    assert (np.abs(found_NC - raw_NC) <= bound_NC).all()


@pytest.mark.parametrize("kind", ["layer_norm", "none"])
def test_others_have_nothing_to_restore(kind: str) -> None:
    tokens_NC = np.arange(8, dtype=np.float32)[None]
    whitening = WHITENINGS[kind]
    assert whitening.restore(tokens_NC, NO_STATISTICS) is tokens_NC
    assert whitening.restored_error(tokens_NC, NO_STATISTICS) is tokens_NC


def test_restoring_by_components_is_the_inverse() -> None:
    _, statistics = MADE_UP["pca"]
    identity_CC = np.eye(8, dtype=np.float32)
    restored_CC = Pca().restore(identity_CC, statistics) - statistics[0]
    np.testing.assert_allclose(restored_CC, np.linalg.inv(statistics[1:].astype(np.float64).T), rtol=1e-5, atol=1e-5)


# ---- stores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WHITENINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_store_gives_the_teachers_tokens(make: Any, backend: str, kind: str) -> None:
    whitening, statistics = MADE_UP[kind]
    made = make(backend, whitening=whitening)
    np.testing.assert_array_equal(made.reader.statistics, statistics)
    records_B = np.array([0, 9, 4, 9])
    found_BTC = made.reader.raw_tokens(records_B)
    for row, number in enumerate(records_B.tolist()):
        record = made.truth[number]
        scaled_TC = record.tokens_TC.astype(np.float64) * record.token_std_T[:, None] + record.token_mean_T[:, None]
        expected_TC = scaled_TC
        if kind == "mean_std":
            expected_TC = scaled_TC * statistics[1] + statistics[0]
        if kind == "pca":
            expected_TC = scaled_TC @ np.linalg.inv(statistics[1:].astype(np.float64).T) + statistics[0]
        np.testing.assert_allclose(found_BTC[row], expected_TC, rtol=1e-5, atol=2e-5)
        np.testing.assert_array_equal(
            made.reader.unwhiten(record.tokens_TC[None], np.array([number]))[0], found_BTC[row]
        )


def test_statistics_are_part_of_the_stores_identity(make_store: Any) -> None:
    whitening, statistics = MADE_UP["pca"]
    root, plan, images = make_store(whitening=whitening)
    reader = open_store(root)
    assert [file.name for file in reader.manifest.metadata if file.name == STATISTICS_FILE] == [STATISTICS_FILE]
    np.testing.assert_array_equal(np.load(root / STATISTICS_FILE, allow_pickle=False), statistics)
    other = statistics * np.float32(1 + 2**-23)
    changed = whitening.model_copy(update={"statistics": _digest(other)})
    assert plan.model_copy(update={"whitening": changed}).fingerprint != plan.fingerprint
    with pytest.raises(ConfigError, match=r"holds another store: whitening\.statistics"):
        create_store(root, plan.model_copy(update={"whitening": changed}), images, other)
    with pytest.raises(AssertionError, match="not the statistics"):
        create_store(root, plan, images, other)
    plain = plan.model_copy(update={"whitening": LayerNorm()})
    assert needed_bytes(plan) - needed_bytes(plain) == statistics.nbytes


def _digest(statistics: NDArray[np.float32]) -> str:
    from storage.fingerprint import digest_bytes

    return digest_bytes(encode_statistics(statistics))


@pytest.mark.parametrize("kind", FITTED)
def test_converting_keeps_the_whitening(make_store: Any, tmp_path: Path, kind: str) -> None:
    root, _, _ = make_store(whitening=MADE_UP[kind][0], view_px=8)
    source = open_store(root)
    for backend, encoding in (("wds", None), ("zarr", "int8")):
        from storage.encodings import find_encoding

        plan = plan_conversion(source, backend=backend, encoding=encoding and find_encoding(encoding))  # type: ignore[arg-type]
        target = tmp_path / f"to_{backend}"
        convert_store(source, target, plan)
        assert open_store(target).plan.whitening == source.plan.whitening
        assert (target / STATISTICS_FILE).read_bytes() == (root / STATISTICS_FILE).read_bytes()
        records_B = np.array([0, 5])
        np.testing.assert_allclose(open_store(target).raw_tokens(records_B), source.raw_tokens(records_B), atol=0.5)
        assert not [damage for _, found in iter_damage(target) for damage in found]


# ---- damage ----------------------------------------------------------------------------------------------------------


def damage_file(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "swapped":
        path.write_bytes(encode_statistics(np.load(path) + 1))
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes({"emptied": b"", "cut short": data[:-1], "too long": data + b"\0", "changed": flipped}[how])


@pytest.mark.parametrize("how", ["missing", "emptied", "cut short", "too long", "changed", "swapped"])
@pytest.mark.parametrize("kind", FITTED)
@pytest.mark.parametrize("is_finished", [True, False])
def test_damage_is_found_and_named(make_store: Any, kind: str, how: str, is_finished: bool) -> None:
    root, plan, images = make_store(whitening=MADE_UP[kind][0])
    if not is_finished:
        (root / "manifest.json").unlink()
    damage_file(root / STATISTICS_FILE, how)
    found = [damage for shard, damages in iter_damage(root) for damage in damages if damage.name == STATISTICS_FILE]
    assert [damage.shard for damage in found] == [STORE]
    reader = open_store(root, allow_unfinished=True)
    with pytest.raises(DamagedError, match=STATISTICS_FILE):
        reader.raw_tokens(np.array([0]))
    with pytest.raises(DamagedError, match=STATISTICS_FILE):
        finish_store(root)
    create_store(root, plan, images, MADE_UP[kind][1])  # as a repair does, which has found or fitted them again
    finish_store(root)
    assert not [damage for _, damages in iter_damage(root) for damage in damages]
    assert np.isfinite(open_store(root).raw_tokens(np.array([0]))).all()


@pytest.mark.parametrize(
    ("statistics", "problem"),
    [
        (np.zeros((2, 8), np.float32), "whiten nothing"),
        (np.full((2, 8), np.nan, np.float32), "whiten nothing"),
        (-np.ones((2, 8), np.float32), "whiten nothing"),
        (np.ones((2, 7), np.float32), "no .npy file of 2 x 8 float32"),
        (np.ones((2, 8), np.float64), "no .npy file of 2 x 8 float32"),
        (np.ones((8, 2), np.float32).T, "no .npy file of 2 x 8 float32"),
    ],
)
def test_statistics_that_cannot_be(statistics: NDArray[Any], problem: str) -> None:
    """Whole and named by a plan, but not by one that this program wrote."""
    from storage.fingerprint import digest_bytes

    data = npy_bytes(statistics)
    with pytest.raises(DamagedError, match=problem):
        parse_statistics("whitening.npy", data, MeanStd(statistics=digest_bytes(data)), 8)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    from storage.fingerprint import digest_bytes

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    np.save(tmp_path / STATISTICS_FILE, np.array([[Bomb()] * 8] * 2), allow_pickle=True)
    digest = digest_bytes((tmp_path / STATISTICS_FILE).read_bytes())
    with pytest.raises(DamagedError):
        load_statistics(LocalFiles(tmp_path), MeanStd(statistics=digest), 8)
    assert not (tmp_path / "exploded").exists()


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with open(tmp_path / STATISTICS_FILE, "wb") as file:
        file.truncate(2**40)
    with pytest.raises(DamagedError, match="1,099,511,627,776 bytes, expected 64 and a header"):
        load_statistics(LocalFiles(tmp_path), MeanStd(statistics="0" * 32), 8)


def test_a_plan_that_names_no_statistics(make_store: Any) -> None:
    root, plan, _ = make_store()
    assert load_plan(root) == plan
    files = LocalFiles(root)
    assert load_statistics(files, NoWhitening(), 8) is NO_STATISTICS
    with pytest.raises(DamagedError, match="is missing"):
        load_statistics(files, Pca(), 8)
    for wrong in ({"kind": "zca"}, {"kind": "pca", "statistics": "../x"}, {"kind": "mean_std", "eps": 0}, {}):
        with pytest.raises(ValueError, match="whitening"):
            StorePlan.model_validate(plan.to_json() | {"whitening": wrong})
