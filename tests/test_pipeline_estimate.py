"""What `plan` tells of an extraction's cost, and that its trial leaves nothing behind."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMOKE = ("--preset", "smoke", "--work", "runs")
TRY = ("--trial", "0.5")


def test_a_plan_tells_how_long_an_extraction_takes(
    decant: Callable[..., Any], make_images: Callable[..., Path], tmp_path: Path
) -> None:
    outcome = decant("plan", *SMOKE, "--data", make_images(), "--executor", "inline", *TRY)
    assert outcome.code == 0, outcome.err
    found = re.search(r"extraction: ([\d,.]+) images/s with 1 worker \(inline\), about \d+ s for the 16", outcome.out)
    assert found is not None, outcome.out
    assert float(found[1].replace(",", "")) > 0
    assert "GB of memory a worker, batches of " in outcome.out
    assert "no GPU is used: the teacher runs on " in outcome.out
    assert "bound by " in outcome.out
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["cache", "data"], "nothing was run"


def test_only_what_is_left_is_estimated(
    decant: Callable[..., Any], make_images: Callable[..., Path], tmp_path: Path
) -> None:
    data = make_images()
    arguments = (*SMOKE, "--data", data, "--executor", "inline", "--set", "extract.records_per_shard=4")
    assert decant("extract", *arguments).code == 0
    assert "extraction: " not in decant("plan", *arguments, *TRY).out, "there is nothing to extract"
    receipt = sorted((tmp_path / "runs" / "stores").glob("*/receipts/*.json"))[0]
    store = receipt.parent.parent
    for path in (receipt, store / "manifest.json", store / "result.json"):
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    outcome = decant("plan", *arguments, *TRY)
    assert "for the 2 images that are left" in outcome.out
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


def test_without_weights_there_is_one_line_and_no_estimate(
    decant: Callable[..., Any], make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "nothing"))
    arguments = ("--teacher", "dino-b", "--data", make_images(), "--executor", "inline", "--work", "runs")
    outcome = decant("plan", *arguments, *TRY)
    assert outcome.code == 0
    assert "no estimate: " in outcome.out
    assert "cannot be had" in outcome.out


def test_a_store_that_does_not_fit_is_said_loudly(
    decant: Callable[..., Any], make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    outcome = decant("plan", *SMOKE, "--data", make_images())
    assert outcome.code == 0
    assert "this does not fit: choose another --work" in outcome.out
