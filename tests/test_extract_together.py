"""Several stores filled in one pass over the images: each has the bytes that it would have alone, whatever happens."""

import os
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import extract.render
import extract.worker
from extract.run import run, run_together
from extract.teacher import Teacher
from storage.errors import ConfigError, DiskError, StoreBusyError
from storage.lock import hold_lock
from storage.records import ShardEntry
from storage.views import CentreCrop, Renderer
from storage.writer import ShardWriter
from tests.fixtures.together import ALONE, Files, MakeIndex, TreeBytes, read_all, targets


def test_stores_have_the_bytes_that_they_have_alone(
    alone: tuple[Path, Files], tree_bytes: TreeBytes, tmp_path: Path
) -> None:
    data, files = alone
    outcomes = run_together(targets(tmp_path / "together"), {"data": data})
    assert read_all(tree_bytes, tmp_path / "together") == files
    for name, metrics in zip(ALONE, outcomes, strict=True):
        assert isinstance(metrics, dict)
        again = run(ALONE[name], {"data": data}, tmp_path / "together" / name)
        passing = ("together_with", "extracted_views_per_second", "run", "audit")
        assert {key: value for key, value in metrics.items() if key not in passing} == {
            key: value for key, value in again.items() if key not in passing
        }
        assert (metrics["together_with"], again["together_with"]) == (["toy"] * 3, [])
        assert metrics["extracted_views_per_second"] > 0


def test_an_image_is_decoded_once_and_rendered_once_a_size(
    make_index: MakeIndex, decoded: Counter[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rendered: Counter[int] = Counter()
    encoded: Counter[int] = Counter()
    render_view, encode_view = Renderer.render_view, extract.render.encode_view

    def note_size(self: Renderer, image: Any, view: Any, px: int) -> Any:
        rendered[px] += 1
        return render_view(self, image, view, px)

    def note_quality(pixels: Any, quality: int) -> bytes:
        encoded[quality] += 1
        return encode_view(pixels, quality)

    monkeypatch.setattr(Renderer, "render_view", note_size)
    monkeypatch.setattr(extract.render, "encode_view", note_quality)
    data, _ = make_index()
    stores = [target for target in targets(tmp_path) if target[0].encoding.kind == "fp16"]  # a fit looks at views, too
    run_together(
        [*stores, (ALONE["tars"].model_copy(update={"token_fraction": 0.3}), tmp_path / "more")], {"data": data}
    )
    assert decoded == Counter(range(16))
    assert (rendered, encoded) == (Counter({32: 32}), Counter({95: 32, 60: 32}))


def test_shards_side_by_side_make_the_same_bytes(
    alone: tuple[Path, Files], monkeypatch: pytest.MonkeyPatch, tree_bytes: TreeBytes, tmp_path: Path
) -> None:
    """As on a GPU: one shard's forward pass while others are rendered and committed."""
    data, files = alone
    monkeypatch.setitem(extract.worker._SHARDS_AT_A_TIME, "cpu", 3)
    at_work: list[int] = []
    most = 0
    commit, speak = ShardWriter.commit, Teacher.__call__

    def note_forward(self: Teacher, pixels: torch.Tensor) -> torch.Tensor:
        at_work.append(1)
        assert len(at_work) == 1, "one forward pass at a time"
        time.sleep(0.002)
        tokens = speak(self, pixels)
        at_work.pop()
        return tokens

    def note_commit(self: ShardWriter) -> ShardEntry:
        nonlocal most
        most = max(most, len(threading.enumerate()))
        return commit(self)

    monkeypatch.setattr(Teacher, "__call__", note_forward)
    monkeypatch.setattr(ShardWriter, "commit", note_commit)
    run_together(targets(tmp_path / "together"), {"data": data})
    assert read_all(tree_bytes, tmp_path / "together") == files
    assert most >= 4


def test_what_is_rendered_ahead_is_bounded(
    make_index: MakeIndex, decoded: Counter[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A shard may hold thousands of images; two batches of the largest size are rendered before they are needed."""
    data, _ = make_index(per_class=40)
    lead: list[int] = []
    speak = Teacher.__call__

    def note(self: Teacher, pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        lead.append(2 * sum(decoded.values()) - sum(seen))
        return speak(self, pixels)

    seen: list[int] = []
    monkeypatch.setattr(Teacher, "__call__", note)
    run(ALONE["plain"].model_copy(update={"records_per_shard": 1000}), {"data": data}, tmp_path / "store")
    assert sum(seen) == 2 * 64
    assert max(lead) <= 3 * 4


def test_settings_in_which_stores_must_agree_are_named(make_index: MakeIndex, tmp_path: Path) -> None:
    data, _ = make_index()
    for name, value in (
        ("split", "eval"), ("views", 3), ("sampler", CentreCrop()), ("renderer", Renderer(kernel="bicubic")),
        ("records_per_shard", 8),
    ):  # fmt: skip
        other = ALONE["plain"].model_copy(update={name: value})
        with pytest.raises(ConfigError, match=rf"but extract\.{name} is .* for 'toy' and .* for 'toy'"):
            run_together([(ALONE["plain"], tmp_path / "one"), (other, tmp_path / "other")], {"data": data})
    with pytest.raises(ConfigError, match=r"two of the stores .* are the same"):
        run_together(
            [(ALONE["plain"], tmp_path / "one"), (ALONE["plain"], tmp_path / "x" / ".." / "one")], {"data": data}
        )
    assert not (tmp_path / "one").exists()


def test_stores_that_fit_one_by_one_but_not_together_are_refused(
    make_index: MakeIndex, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data, _ = make_index()
    usage = type("Usage", (), {"free": 45_000})  # the stores need 31 kB each
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    stores = [(ALONE["plain"], tmp_path / "one"), (ALONE["plain"], tmp_path / "other")]
    with pytest.raises(DiskError, match=r"the 2 stores need 0\.0\d\d MB .* 0\.045 MB are free"):
        run_together(stores, {"data": data})
    for cfg, root in stores:
        run(cfg, {"data": data}, root)


def test_a_store_that_is_being_written_refuses_all(
    make_index: MakeIndex, tree_bytes: TreeBytes, tmp_path: Path
) -> None:
    data, _ = make_index()
    busy = tmp_path / "tars"
    with hold_lock(busy), pytest.raises(StoreBusyError, match=f"{busy} is being written by process {os.getpid()}"):
        run_together(targets(tmp_path), {"data": data})
    assert not any(tree_bytes(tmp_path / name) for name in ("plain", "large", "tars") if (tmp_path / name).exists())
    run_together(targets(tmp_path, ["plain", "tars"]), {"data": data})
