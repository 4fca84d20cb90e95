"""The commands about stores, as a user gives them: verify, repair, convert; a student from a store made elsewhere."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.stages import STAGES
from storage.lock import hold_lock
from storage.reader import open_store
from tests.fixtures.runs import folder_of
from tests.fixtures.whole_store import flip

Decant = Callable[..., Any]
Run = tuple[Path, Path]
Read = Callable[[Path], dict[str, bytes]]


# ---- verify ----------------------------------------------------------------------------------------------------------


def test_verify_tells_what_it_looked_at(decant: Decant, copy_run: Run) -> None:
    _, work = copy_run
    outcome = decant("verify", "--work", work)
    assert outcome.code == 0
    assert outcome.out.count("structure whole: ") == 2
    assert "4 of 4 shards" in outcome.out
    assert "2 stores are whole" in outcome.out
    assert "2 stores are whole in structure" in decant("verify", "--work", work, "--read-data", "0%").out
    assert "whole as far as 5% of the data tell" in decant("verify", "--work", work, "--read-data", "5%").out


def test_verify_names_the_damage_and_the_repair_and_changes_nothing(
    decant: Decant, copy_run: Run, tree_bytes: Read
) -> None:
    _, work = copy_run
    store = folder_of(work, "extract")
    flip(store / "tokens" / "c" / "1" / "0" / "0")
    (store / "views" / "c" / "2" / "0").write_bytes(b"")
    before = tree_bytes(store)
    outcome = decant("verify", "--work", work)
    assert outcome.code == 6
    assert f"{store}: shard 1: tokens/c/1/0/0: changed: digest" in outcome.out
    assert f"{store}: shard 2: views/c/2/0: emptied: 0 bytes, committed" in outcome.out
    assert "2 parts of the stores are damaged or missing; run `make repair`" in outcome.err
    assert outcome.err.splitlines()[-1] == f"then: decant repair --work {work}"
    assert tree_bytes(store) == before


def test_the_structure_alone_does_not_show_a_flipped_bit(decant: Decant, copy_run: Run) -> None:
    _, work = copy_run
    flip(folder_of(work, "extract") / "tokens" / "c" / "1" / "0" / "0")
    assert decant("verify", "--work", work, "--read-data", "0%").code == 0
    assert decant("verify", "--work", work, "--read-data", "100%").code == 6


def test_verify_takes_stores_by_name(decant: Decant, copy_run: Run) -> None:
    _, work = copy_run
    store = folder_of(work, "extract")
    flip(folder_of(work, "extract_eval") / "tokens" / "c" / "0" / "0" / "0")
    assert "1 stores are whole" in decant("verify", store).out
    assert decant("verify", store.parent / "none").code == 2


@pytest.mark.parametrize("text", ["5", "half", "-1%", "101%"])
def test_a_share_that_is_none_is_refused(decant: Decant, tmp_path: Path, text: str) -> None:
    outcome = decant("verify", "--work", tmp_path, "--read-data", text)
    assert outcome.code == 2
    assert "expected a percentage such as 5%" in outcome.err


def test_verify_without_stores(decant: Decant, tmp_path: Path) -> None:
    outcome = decant("verify", "--work", tmp_path)
    assert outcome.code == 0
    assert "no store in" in outcome.out


# ---- repair ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["extract", "extract_eval"])
def test_repair_makes_the_damaged_shard_again_and_touches_no_other(
    decant: Decant, copy_run: Run, tree_bytes: Read, stage: str
) -> None:
    _, work = copy_run
    store = folder_of(work, stage)
    before = tree_bytes(store)
    stamps = {path: path.stat().st_mtime_ns for path in (store / "tokens" / "c").rglob("0") if path.is_file()}
    flip(store / "tokens" / "c" / "0" / "0" / "0")
    outcome = decant("repair", "--work", work)
    assert outcome.code == 0, outcome.err
    assert "1 parts were made again" in outcome.out
    assert tree_bytes(store) == before
    assert {path.parent.parent.name for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp} == {"0"}
    assert "2 stores are whole" in decant("verify", "--work", work).out
    assert decant("plan", "--work", work).out.count(" skip ") == len(STAGES), "its student is still up to date"
    assert "nothing to repair" in decant("repair", "--work", work).out


@pytest.mark.parametrize("name", ["manifest.json", "images.bin", "plan.json", "zarr.json", "receipts/00001.json"])
def test_repair_mends_what_is_no_data(decant: Decant, copy_run: Run, tree_bytes: Read, name: str) -> None:
    _, work = copy_run
    store = folder_of(work, "extract")
    before = tree_bytes(store)
    flip(store / name)
    assert decant("verify", "--work", work).code == 6
    assert decant("repair", "--work", work).code == 0
    assert tree_bytes(store) == before


def test_repair_needs_no_result_of_its_own_settings(decant: Decant, copy_run: Run, tree_bytes: Read) -> None:
    _, work = copy_run
    store = folder_of(work, "extract")
    before = tree_bytes(store)
    (store / "result.json").unlink()
    flip(store / "tokens" / "c" / "3" / "0" / "0")
    assert decant("repair", "--work", work).code == 0
    assert tree_bytes(store) == before


def test_repair_says_when_nothing_tells_how_a_store_was_made(decant: Decant, copy_run: Run) -> None:
    _, work = copy_run
    store = folder_of(work, "extract")
    current = json.loads((work / "current.json").read_text())
    current["extract"]["views"] = 7
    (work / "current.json").write_text(json.dumps(current))
    (store / "result.json").unlink()
    flip(store / "tokens" / "c" / "3" / "0" / "0")
    outcome = decant("repair", "--work", work)
    assert outcome.code == 2
    assert "has no readable result.json and is not of the last command's settings" in outcome.err
    assert (store / "receipts" / "00003.json").exists(), "nothing was forgotten"


def test_repair_leaves_a_store_alone_that_is_being_written(decant: Decant, copy_run: Run) -> None:
    store = folder_of(copy_run[1], "extract")
    (store / "receipts" / "00003.json").unlink()
    with hold_lock(store):
        assert decant("repair", "--work", copy_run[1]).code == 4
    assert (store / "manifest.json").exists()


# ---- convert, and students of stores made elsewhere ------------------------------------------------------------------


def test_a_converted_store_holds_the_same_tokens(decant: Decant, copy_run: Run, tmp_path: Path) -> None:
    images, work = copy_run
    store = folder_of(work, "extract")
    missing = decant("convert", store, tmp_path / "tars", "--layout", "wds")
    assert missing.code == 2
    assert "keeps no rendered views; say where its images are (--data, DATA=...)" in missing.err
    outcome = decant("convert", store, tmp_path / "tars", "--layout", "wds", "--data", images)
    assert outcome.code == 0, outcome.err
    assert f"{tmp_path / 'tars'}: wds, fp16, 32 records" in outcome.out
    source, target = open_store(store), open_store(tmp_path / "tars")
    records = np.arange(source.plan.num_records)
    for reader in (source, target):
        assert reader.plan.num_records == 32
    tokens = [np.empty((32, *source.plan.shape_TC), np.float16) for _ in range(2)]
    source.read_batch(records, tokens[0])
    target.read_batch(records, tokens[1])
    np.testing.assert_array_equal(*tokens)
    assert "1 stores are whole" in decant("verify", tmp_path / "tars").out
    unknown = decant("convert", store, tmp_path / "x", "--encoding", "int9")
    assert unknown.code == 2
    assert "unknown encoding 'int9'; did you mean 'int8'?" in unknown.err


@pytest.mark.parametrize("encoding", ["fp16", "int8"])
def test_a_student_from_a_store_of_tars_needs_no_images(
    decant: Decant, copy_run: Run, tmp_path: Path, encoding: str
) -> None:
    images, work = copy_run
    store = folder_of(work, "extract")
    tars = tmp_path / "tars"
    assert decant("convert", store, tars, "--layout", "wds", "--encoding", encoding, "--data", images).code == 0
    shutil.rmtree(images)
    outcome = decant("distill", "--preset", "smoke", "--store", tars, "--work", tmp_path / "other")
    assert outcome.code == 0, outcome.err
    assert "the stored views were added when the teacher was done" in outcome.out
    student = folder_of(tmp_path / "other", "distill")
    history = json.loads((student / "result.json").read_text())["metrics"]
    assert history["final_loss"] < history["first_loss"]
    assert "distill skip" in decant("plan", "--work", tmp_path / "other").out
    blocked = decant("evaluate", "--work", tmp_path / "other")
    assert blocked.code == 2
    assert "evaluate and extract_eval need extract, which is not done" in blocked.err


def test_extraction_into_tars_ends_in_a_student(decant: Decant, copy_run: Run, tmp_path: Path) -> None:
    images, _ = copy_run
    arguments = ["--preset", "smoke", "--data", images, "--work", tmp_path / "other", "--layout", "wds"]
    outcome = decant("run", *arguments, "--encoding", "int8", "--set", "extract.token_fraction=0.5")
    assert outcome.code == 0, outcome.err
    store = open_store(folder_of(tmp_path / "other", "extract"))
    assert (store.plan.backend, store.plan.encoding.kind, store.plan.num_kept_tokens) == ("wds", "int8", 9)
    assert "warning" not in outcome.out
    held_out = open_store(folder_of(tmp_path / "other", "extract_eval"))
    assert (held_out.plan.backend, held_out.plan.encoding.kind, held_out.plan.num_kept_tokens) == ("zarr", "fp16", 17)


def test_repair_forgives_the_bad_images_of_a_finished_store(
    decant: Decant, make_images: Callable[..., Path], tmp_path: Path, tree_bytes: Read
) -> None:
    images, work = make_images(per_class=10), tmp_path / "runs"
    for name in ("dark/001.png", "light/002.png"):
        (images / name).write_bytes(b"no picture")
    allowed = ("--set", "extract.max_bad_fraction=0.3")
    assert decant("extract", "--preset", "smoke", "--data", images, "--work", work, *allowed).code == 0
    store = folder_of(work, "extract")
    before = tree_bytes(store)
    flip(store / "tokens" / "c" / "1" / "0" / "0")
    outcome = decant("repair", "--work", work)
    assert outcome.code == 0, outcome.err
    assert tree_bytes(store) == before


def test_a_converted_store_is_not_repaired_by_extraction(
    decant: Decant, copy_run: Run, tmp_path: Path, tree_bytes: Read
) -> None:
    _, work = copy_run
    packed = tmp_path / "packed"
    assert decant("convert", folder_of(work, "extract"), packed, "--encoding", "int8").code == 0
    flip(packed / "tokens" / "c" / "1" / "0" / "0")
    before = tree_bytes(packed)
    outcome = decant("repair", packed, "--work", work)
    assert outcome.code == 2
    assert "it was converted; convert its source again, into another folder" in outcome.err
    assert tree_bytes(packed) == before


@pytest.mark.parametrize("target", ["s3://bucket/store", "gs://bucket/store"])
def test_what_is_behind_a_url_is_only_read(decant: Decant, copy_run: Run, tmp_path: Path, target: str) -> None:
    _, work = copy_run
    converted = decant("convert", folder_of(work, "extract"), target)
    assert converted.code == 2
    assert f"{target} is a URL, and stores behind URLs are read-only; convert to a folder" in converted.err
    assert decant("repair", target, "--work", work).code == 2
    assert not list(tmp_path.glob("s3*")) and not list(tmp_path.glob("gs*"))


@pytest.mark.parametrize("fraction", ["0", "-1", "2", "nan"])
def test_a_share_of_tokens_that_is_none_is_refused(
    decant: Decant, copy_run: Run, tmp_path: Path, fraction: str
) -> None:
    _, work = copy_run
    outcome = decant("convert", folder_of(work, "extract"), tmp_path / "x", "--token-fraction", fraction)
    assert outcome.code == 2
    assert not (tmp_path / "x").exists()


def test_verify_goes_on_where_a_file_cannot_be_read(decant: Decant, copy_run: Run) -> None:
    _, work = copy_run
    store = folder_of(work, "extract")
    for name in ("tokens/c/2/0/0", "receipts/00001.json"):
        (store / name).unlink()
        (store / name).mkdir()
    outcome = decant("verify", "--work", work)
    assert outcome.code == 6
    assert "shard 2: tokens/c/2/0/0: unreadable" in outcome.out
    assert "receipts/00001.json: " in outcome.out
    assert "3 of 4 shards" not in outcome.out
