"""Checkpoints of any upstream: which network is taken, and what is refused without being opened."""

import argparse
import collections
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from extract.checkpoints import read_checkpoint
from extract.inert_pickle import RefusedError, read_inert
from extract.torchscript import list_records
from storage.errors import InputError

ONE, OTHER = {"a.w": torch.ones(2)}, {"a.w": torch.zeros(2)}


def save(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("content", "branch"),
    [
        (ONE, ""),
        (ONE, "teacher"),
        ({"model": ONE, "optimizer": {"state": {0: {"step": 1}}}, "epoch": 3}, ""),
        ({"state_dict": {"module.a.w": ONE["a.w"]}}, ""),
        ({"module": {"_orig_mod.a.w": ONE["a.w"]}}, ""),
        ({"module.a.w": ONE["a.w"], "module.a.n": None}, ""),
        ({"_orig_mod.module.a.w": ONE["a.w"]}, ""),
        ({"module._orig_mod.a.w": ONE["a.w"]}, ""),
        ({"_orig_mod.module._orig_mod.a.w": ONE["a.w"]}, ""),
        (
            {"student": OTHER, "teacher": {"backbone.a.w": ONE["a.w"]}, "dino_loss": {"center": torch.zeros(3)}},
            "teacher",
        ),
        ({"student": ONE, "teacher": OTHER}, "student"),
        ({"state_dict": {"model": ONE}}, ""),
        ({"model": ONE, "args": argparse.Namespace(lr=np.float64(1), n=np.int64(3)), "best": np.float32(2)}, ""),
        (ONE | {"input_resolution": 224, "name": "x", "nothing": None}, ""),
        (collections.OrderedDict(ONE), ""),
    ],
)
def test_the_network_is_found(content: Any, branch: str, tmp_path: Path) -> None:
    found = read_checkpoint(save(content, tmp_path / "w.pth"), branch)
    assert list(found) == ["a.w"]
    assert torch.equal(found["a.w"], ONE["a.w"])


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"student": ONE, "teacher": OTHER}, "holds several networks (student, teacher); save the one"),
        ({"backbone.a": torch.ones(1), "a": torch.ones(1)}, "under the same name with and without 'backbone.'"),
        ({"a": torch.ones(2).to_sparse()}, "holds more than tensors (torch._utils._rebuild_sparse_tensor)"),
        ({"a": torch.ones(1).expand(10**9)}, "shape (1000000000,) that is larger than its storage of 1"),
        (
            {"a": torch.empty(3, device="meta")},
            "holds more than tensors (torch._utils._rebuild_meta_tensor_no_storage)",
        ),
        ({"a": [torch.ones(1)]}, "is not a dictionary of tensors"),
        ({}, "is not a dictionary of tensors"),
    ],
)
def test_what_is_no_network_is_refused(content: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(told)):
        read_checkpoint(save(content, tmp_path / "w.pth"))


def test_a_branch_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = save({"student": ONE, "model_ema": OTHER}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"several networks \(student, model_ema\); expected one called 'teacher'"):
        read_checkpoint(path, "teacher")


class Settings(dict):  # type: ignore[type-arg]
    """Some package's own class."""


def test_a_class_that_is_not_harmless_is_named_with_a_way_out(tmp_path: Path) -> None:
    path = save({"model": ONE, "config": Settings(lr=1)}, tmp_path / "w.pth")
    with pytest.raises(InputError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert re.search(r"holds more than tensors \([\w.]+\.Settings\) and is not opened", message)
    assert f"torch.load({str(path)!r}, map_location='cpu', weights_only=False)" in message
    assert "safetensors.torch.save_file(" in message
    assert "\n" not in message


def test_settings_of_every_upstream_are_harmless(tmp_path: Path) -> None:
    """Also a schedule's milestones, a set, a type, and numbers of numpy among the tensors."""
    other = {"milestones": collections.Counter([30, 60]), "set": {1, 2}, "size": torch.Size([2]), "type": torch.float16}
    other |= {"device": torch.device("cpu"), "seed": 2**63, "ids": {0: torch.zeros(1)}}
    path = save({"model": ONE | {"scale": np.float32(2)}, "optimizer": other}, tmp_path / "w.pth")
    assert list(read_checkpoint(path)) == ["a.w"]


class CfgNode(dict):  # type: ignore[type-arg]
    """Settings as yacs pickles them: a dictionary with attributes."""


def test_the_authors_settings_are_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their checkpoints hold a tree of yacs' settings beside student, projector, teacher, optimiser and schedule."""
    monkeypatch.setattr(CfgNode, "__module__", "yacs.config")
    monkeypatch.setitem(sys.modules, "yacs.config", sys.modules[__name__])
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    config = CfgNode(BASE=[""], LR=1.2e-3, AMP=True, SIZE=(1, 2), DEV=CfgNode(PRED_FEAT="CLIP_400M"))
    config.__dict__.update(__immutable__=True, __deprecated_keys__=set(), __renamed_keys__={}, __new_allowed__=False)
    model = {"encoder.w": torch.ones(2), "feature_model.w": torch.ones(3).half(), "decoder.0.bias": torch.ones(1)}
    content = {"model": model, "optimizer": {"state": {}}, "scaler": {"scale": 65536.0}, "epoch": 299, "config": config}
    assert list(read_checkpoint(save(content, tmp_path / "w.pth"))) == list(model)


def test_settings_are_filled_item_by_item_and_not_copied() -> None:
    assert read_inert(b"\x80\x02cyacs.config\nCfgNode\n)\x81X\x01\x00\x00\x00aK\x01s.") == {"a": 1}
    with pytest.raises(RefusedError, match=r"a call of yacs\.config CfgNode"):
        read_inert(b"\x80\x02cyacs.config\nCfgNode\n}\x85R.")
    with pytest.raises(RefusedError, match=r"an object of yacs\.config CfgNode"):
        read_inert(b"\x80\x02cyacs.config\nCfgNode\n}\x85\x81.")


def test_a_few_bytes_that_many_tensors_share_are_refused(tmp_path: Path) -> None:
    """Each tensor would be copied when it becomes float32."""
    whole = torch.randn(10_000)
    assert len(read_checkpoint(save({"a": whole, "tied": whole}, tmp_path / "w.pth"))) == 2
    with pytest.raises(InputError, match="most are the same bytes"):
        read_checkpoint(save({str(i): whole for i in range(100)}, tmp_path / "w.pth"))


def test_a_flip_in_a_tensor_is_noticed(tmp_path: Path) -> None:
    path = save({"a": torch.arange(1000.0), "b": torch.ones(10)}, tmp_path / "w.pth")
    whole = path.read_bytes()
    at = list_records(path)["data/0"].start + 100
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(InputError, match="record data/0 is damaged"):
        read_checkpoint(path)


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = save(ONE, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert {record.crc32 for record in list_records(path).values()} == {0}
    assert torch.equal(read_checkpoint(path)["a.w"], ONE["a.w"])
