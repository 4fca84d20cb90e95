"""A store goes to a bucket and a student comes from there, on a machine that has neither the store nor the images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.stages import STAGES
from pipeline.workspace import Workspace

Decant = Callable[..., Any]


@pytest.fixture
def bucket(bucket: str) -> str:
    """Where a store may go, on an object-store server of this machine."""
    return f"s3://{bucket}/toy"


def test_a_store_travels_by_bucket(decant: Decant, copy_run: tuple[Path, Path], tmp_path: Path, bucket: str) -> None:
    images, work = copy_run
    [(store, _)] = Workspace(work).results(STAGES["extract"])
    assert decant("convert", store, tmp_path / "tars", "--layout", "wds", "--data", images).code == 0
    outcome = decant("upload", tmp_path / "tars", bucket)
    assert outcome.code == 0, outcome.err
    assert f"{bucket} holds the store; train from it with STORE={bucket}" in outcome.out
    assert "1 stores are whole" in decant("verify", bucket).out

    elsewhere = ["--preset", "smoke", "--work", tmp_path / "other"]
    remote = decant("distill", *elsewhere, "--store", bucket)
    assert remote.code == 0, remote.err
    local = decant("distill", "--preset", "smoke", "--work", tmp_path / "third", "--store", tmp_path / "tars")
    assert local.code == 0, local.err
    students = [Workspace(tmp_path / name).results(STAGES["distill"])[0][0] for name in ("other", "third")]
    assert students[0].name == students[1].name, "a store is known by its content, wherever it lies"
    assert len({(student / "student.safetensors").read_bytes() for student in students}) == 1
    plan = decant("plan", *elsewhere, "--store", tmp_path / "tars")
    assert "distill skip" in plan.out
    assert json.loads((students[0] / "result.json").read_text())["inputs"].keys() == {"store"}


def test_no_such_store(decant: Decant, tmp_path: Path, bucket: str) -> None:
    outcome = decant("distill", "--preset", "smoke", "--work", tmp_path, "--store", f"{bucket}-none")
    assert outcome.code == 2
    assert f"{bucket}-none holds no store" in outcome.err
