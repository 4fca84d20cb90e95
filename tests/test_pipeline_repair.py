"""Repair finds out how a store was made: its teacher, its weights, its precision."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from extract.backends import load_teacher
from extract.teachers import find_teacher
from tests.fixtures.whole_store import flip

Decant = Callable[..., Any]
Read = Callable[[Path], dict[str, bytes]]

MINE = """
import torch
from extract.spec import TeacherSpec

class Network(torch.nn.Module):
    def forward(self, images):
        return torch.nn.functional.avg_pool2d(images, 8).flatten(2).transpose(1, 2)

def teacher():
    return Network(), TeacherSpec(name="mine", input_px=32, patch_px=8, channels=3)
"""


@pytest.fixture
def damaged(decant: Decant, make_images: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Extract a store and damage one shard of it."""

    def make(*arguments: object) -> Path:
        common = ("--views", 1, "--executor", "inline", "--work", tmp_path / "runs")
        made = decant("extract", "--data", make_images(), *common, *arguments)
        assert made.code == 0, made.err
        [store] = (path for path in (tmp_path / "runs" / "stores").iterdir() if path.is_dir())
        return store

    return make


def damage(store: Path) -> None:
    flip(store / "tokens" / "c" / "0" / "0" / "0")


def test_a_teacher_of_the_users_own(
    damaged: Callable[..., Path], decant: Decant, tree_bytes: Read, tmp_path: Path
) -> None:
    """Its name in the settings is a path, in the store it is what the file says."""
    (tmp_path / "my.py").write_text(MINE)
    store = damaged("--teacher", "my.py")
    before = tree_bytes(store)
    damage(store)
    (store / "result.json").unlink()
    outcome = decant("repair")
    assert outcome.code == 0, outcome.err
    assert tree_bytes(store) == before


def test_weights_that_a_command_before_the_last_gave(
    damaged: Callable[..., Path], decant: Decant, tree_bytes: Read, tmp_path: Path
) -> None:
    state = load_teacher(find_teacher("toy"), device="cpu").module.state_dict()
    torch.save({name: tensor * 2 for name, tensor in state.items()}, tmp_path / "weights.pt")
    store = damaged("--teacher", "toy", "--weights", "weights.pt")
    before = tree_bytes(store)
    current = json.loads((tmp_path / "runs" / "current.json").read_text())
    current["extract"] |= {"teacher": "mae-b", "weights": None}
    (tmp_path / "runs" / "current.json").write_text(json.dumps(current))
    damage(store)
    outcome = decant("repair")
    assert outcome.code == 0, outcome.err
    assert tree_bytes(store) == before
    (tmp_path / "weights.pt").rename(tmp_path / "moved.pt")
    damage(store)
    lost = decant("repair")
    assert lost.code == 2
    assert f"was made with other weights ({tmp_path / 'weights.pt'}) of teacher 'toy' than are there now" in lost.err
    assert (store / "receipts" / "00000.json").exists(), "nothing was forgotten"
    assert decant("extract", "--teacher", "toy", "--weights", "moved.pt").code == 0
    assert decant("repair").code == 0
    assert tree_bytes(store) == before


def test_the_stores_own_precision(
    damaged: Callable[..., Path], decant: Decant, tree_bytes: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made where `auto` was another one."""
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("extract.plan.choose_precision", lambda name, device: "bfloat16")
        store = damaged("--teacher", "toy")
    before = tree_bytes(store)
    assert json.loads((store / "result.json").read_text())["metrics"]["precision"] == "bfloat16"
    damage(store)
    assert decant("repair").code == 0
    assert tree_bytes(store) == before
    damage(store)
    (store / "result.json").unlink()
    assert decant("repair").code == 0
    assert tree_bytes(store) == before
