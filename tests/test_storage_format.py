"""docs/format.md: its examples run, and give what the store's own reader gives; its tables name all there is."""

import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.encodings import ENCODINGS, fit_encoding
from storage.jpeg import max_view_bytes
from storage.layouts import LAYOUTS
from storage.reader import open_store
from storage.records import FeatureSpec, FileEntry, ShardEntry, StoreManifest, StorePlan
from storage.shards import PackedRecord, ShardContent
from storage.tar_format import INDEX_DTYPE
from storage.whitening import WHITENINGS
from storage.zarr_metadata import MEANINGS

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
TEXT = (ROOT / "docs" / "format.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the examples leave behind, run one after the other."""
    monkeypatch.chdir(ROOT)
    return dict(run_examples())


@cache
def run_examples() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for number, source in enumerate(blocks("python")):
        exec(compile(source, f"docs/format.md, example {number}", "exec"), found)
    return found


def test_the_examples_give_what_the_reader_gives(names: dict[str, Any]) -> None:
    int8, fp16 = open_store(GOLDEN / "zarr_int8_views"), open_store(GOLDEN / "zarr_fp16")
    key = int8.images.keys[2]
    assert names["manifest"] == int8.manifest.to_json() and names["plan"] == fp16.plan.to_json()
    assert (*names["keys"],) == (*int8.images.keys,)
    assert (*names["classes"],) == int8.images.classes and names["labels"].tolist() == list(int8.images.labels)
    record = int8.read(key, 1)
    np.testing.assert_array_equal(names["tokens_TC"], record.tokens_TC)
    expected_TC = record.tokens_TC * record.token_std_T[:, None] + record.token_mean_T[:, None]
    np.testing.assert_array_equal(names["teachers_TC"], expected_TC)
    assert names["jpeg"] == record.jpeg
    subset = open_store(GOLDEN / "zarr_zstd_subset")
    np.testing.assert_array_equal(names["one_record_TC"], subset.read(key, 0).tokens_TC)
    assert [names["positions"].tolist()] == subset.positions(np.array([5])).tolist()
    np.testing.assert_array_equal(names["record_TC"], fp16.read(key, 0).tokens_TC)


def test_the_example_of_whitening_gives_what_the_reader_gives(names: dict[str, Any]) -> None:
    store = open_store(GOLDEN / "zarr_fp16_pca")
    tokens_TC = store.read(store.images.keys[2], 1).tokens_TC
    np.testing.assert_allclose(names["unwhiten"](tokens_TC), store.raw_tokens(np.array([5]))[0], rtol=1e-6, atol=1e-5)


def test_the_examples_of_tars_give_what_the_reader_gives(names: dict[str, Any]) -> None:
    store = open_store(GOLDEN / "wds_fp16_views")
    key = store.images.keys[2]
    expected_TC = store.read(key, 0).tokens_TC
    assert (names["facts"]["key"], names["facts"]["view_index"], names["facts"]["class"]) == (key, 0, "b")
    np.testing.assert_array_equal(names["tar_TC"], expected_TC)
    np.testing.assert_array_equal(names["random_access_TC"], expected_TC)
    assert [name for name, *_ in names["samples"]] == ["000000000", "000000001", "000000004", "000000005"]
    for _, pixels, tokens_TC, facts in names["samples"]:
        assert pixels.shape == (16, 16, 3)
        np.testing.assert_array_equal(tokens_TC, store.read(facts["key"], facts["view_index"]).tokens_TC)


@pytest.mark.parametrize("command", blocks("bash"))
def test_the_commands_run(command: str) -> None:
    done = subprocess.run(["bash", "-ec", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "000000001.tokens.npy" in done.stdout.split()


def test_the_tables_name_everything() -> None:
    """A field that is added to the format is told here, or this fails."""
    names = {f"`{name}`" for name in (*MEANINGS, *ENCODINGS, *WHITENINGS)}
    for schema in (StorePlan, StoreManifest, ShardEntry, FileEntry):
        names |= {f"`{name}`" for name in schema.model_fields}
    assert not {name for name in names if name not in TEXT}


def test_the_index_is_as_told() -> None:
    words = {"<i8": "int64", "<u4": "uint32", "<i4": "int32"}
    cells = [row.split("|") for row in TEXT.split("| field | type | | field | type |")[1].splitlines()[2:7]]
    told = [(name, kind) for part in (1, 4) for row in cells for name, kind in [(row[part], row[part + 1])]]
    flat = [(name.strip(" `"), kind.replace("each", "").strip()) for names, kind in told for name in names.split(",")]
    assert flat == [(name, words[INDEX_DTYPE[name].str]) for name in INDEX_DTYPE.names or ()]
    assert f"rows of {INDEX_DTYPE.itemsize} bytes" in TEXT


@pytest.mark.parametrize(
    ("backend", "kind", "expected"),
    [("zarr", "fp16", 304_208), ("wds", "fp16", 307_295), ("zarr", "int8", 153_306), ("wds", "int8", 157_279)],
)
def test_the_sizes_are_as_told(
    image_list: Callable[..., Any], store_plan: Callable[..., StorePlan], backend: str, kind: str, expected: int
) -> None:
    features = FeatureSpec(teacher="made-up", num_prefix_tokens=1, grid_hw=(14, 14), channels=768)
    encoding = fit_encoding(ENCODINGS[kind], np.ones((1, *features.shape_TC), np.float16))
    plan = store_plan(image_list(8), features=features, views_per_image=1, images_per_shard=8, backend=backend,
                      encoding=encoding)  # fmt: skip
    fields = encoding.encode(np.ones(features.shape_TC, np.float16))
    tokens, stats_T = fields.pop("tokens").tobytes(), np.ones(197, np.float32)
    small = {"token_mean": stats_T, "token_std": stats_T, **fields}
    records = [PackedRecord("n01440764/n01440764_10026.JPEG", 5, 0, np.ones(5, np.int32), tokens, 0, small, None)] * 8
    files = LAYOUTS[backend].pack(plan, ShardContent(0, list(records), ()))
    found = sum(len(piece) for pieces in files.values() for piece in pieces) / 8
    a_shard = 2 * 512 + 1024  # the tar's end and the index's header
    assert abs(found - expected) < a_shard / 8
    assert f"{expected:,}" in TEXT


@pytest.mark.parametrize("px", [1, 16, 224, 225])
def test_the_bound_of_jpegs_is_as_told(px: int) -> None:
    p = -(-px // 16) * 16
    assert "3 * p * p + 2048" in TEXT and max_view_bytes(px) == 3 * p * p + 2048
