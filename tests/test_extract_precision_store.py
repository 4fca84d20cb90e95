"""The precision of a whole extraction: recorded, compared with float32, kept when it goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from extract.backends import load_teacher
from extract.config import ExecutionConfig, ExtractConfig
from extract.extraction import write_extraction
from extract.measure import measure
from extract.run import run
from extract.teachers import TEACHERS, find_teacher
from extract.worker import Worker
from storage.decode import decode_image
from storage.errors import ConfigError
from storage.image_index import load_index
from storage.reader import open_store
from storage.stage import SilentProgress

CFG = ExtractConfig(
    teacher="toy", views=2, records_per_shard=6, precision="bfloat16",
    run=ExecutionConfig(executor="inline", device="cpu"),
)  # fmt: skip


class Heard(SilentProgress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def test_a_fast_store_holds_the_fast_tokens_and_says_how_near_they_are(
    make_index: Callable[..., Any], tmp_path: Path
) -> None:
    data, images = make_index()
    progress = Heard()
    metrics = run(CFG, {"data": data}, tmp_path / "store", progress)
    reader = open_store(tmp_path / "store")
    assert reader.plan.teacher["precision"] == metrics["precision"] == "bfloat16"
    found = metrics["against_float32"]
    assert found["num_views"] == min(16, 2 * len(images))
    assert 0.99 < found["worst_cosine"] <= found["mean_cosine"] < 1
    assert [line for line in progress.said if line.startswith("toy: bfloat16 against plain float32 on")]
    teacher = load_teacher(find_teacher("toy"), device="cpu", precision="bfloat16")
    record = next(iter(reader.iter_shard(0)))
    image = decode_image((Path(images.location) / record.key).read_bytes())
    pixels = torch.from_numpy(np.array(CFG.renderer.render_view(image, record.view, 32)))[None]
    for tokens, is_there in ((teacher(pixels), True), (teacher.in_float32(pixels), False)):
        white = torch.nn.functional.layer_norm(tokens[0], tokens.shape[-1:]).half().numpy()
        is_near = np.allclose(record.tokens_TC.astype(np.float32), white.astype(np.float32), atol=2e-3)
        assert is_near == is_there


def test_float32_is_compared_with_nothing(make_index: Callable[..., Any], tmp_path: Path) -> None:
    data, _ = make_index()
    progress = Heard()
    metrics = run(CFG.model_copy(update={"precision": "auto"}), {"data": data}, tmp_path / "store", progress)
    assert (metrics["precision"], metrics["against_float32"]) == ("float32", None)
    assert not [line for line in progress.said if "float32" in line]


def test_a_store_goes_on_in_its_own_precision(make_index: Callable[..., Any], tmp_path: Path) -> None:
    """Begun on one machine and continued on another, `auto` would mean something else there."""
    data, _ = make_index()
    auto, store = CFG.model_copy(update={"precision": "auto"}), tmp_path / "store"
    run(CFG, {"data": data}, store)
    before = (store / "manifest.json").read_bytes()
    (store / "manifest.json").unlink()
    (store / "receipts" / "00001.json").unlink()
    assert run(auto, {"data": data}, store)["precision"] == "bfloat16"
    assert (store / "manifest.json").read_bytes() == before
    with pytest.raises(ConfigError, match=r"teacher\.precision is 'bfloat16', expected 'float32'"):
        run(CFG.model_copy(update={"precision": "float32"}), {"data": data}, store)
    assert run(auto, {"data": data}, tmp_path / "another")["precision"] == "float32"


def test_every_precision_is_measured_on_the_same_views(make_index: Callable[..., Any], monkeypatch: Any) -> None:
    monkeypatch.setattr("extract.measure._LEAST_SECONDS", 0.01)
    data, images = make_index()
    found = list(measure(CFG, data, ["float32", "bfloat16", "float16"], num_views=5))
    assert [row.agreement.precision for row in found] == ["float32", "bfloat16", "float16"]
    assert {row.agreement.num_views for row in found} == {min(5, len(images))}
    exact, brain, half = (row.agreement for row in found)
    assert exact.worst_cosine == 1
    assert brain.worst_cosine < half.worst_cosine < 1, "float16 has eight times the resolution"
    assert all(row.views_per_second > 0 and row.batch_size == 32 for row in found)


def test_a_worker_whose_teacher_is_another_stops(
    make_index: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are the same, but not what is done with them: another version of a library, or of a user's file."""
    data, _ = make_index()
    run(CFG, {"data": data}, tmp_path / "store")
    write_extraction(tmp_path / "store", CFG, load_index(data).split("train"))
    Worker([tmp_path / "store"], CFG.run)
    changed = find_teacher("toy").model_copy(update={"mean": (0.5, 0.5, 0.5)})
    monkeypatch.setitem(TEACHERS, "toy", changed)
    with pytest.raises(
        ConfigError, match=r"'toy' is not the one .*: mean is \[0\.5, 0\.5, 0\.5\], the store's is \[0\.48"
    ):
        Worker([tmp_path / "store"], CFG.run)
