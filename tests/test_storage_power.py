"""Loss of power: what a receipt or manifest stands for is on the disk before it, folders' entries included."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.folder import finish_store


@pytest.fixture
def durable(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The inodes of all files and folders as they were fsynced, forgotten again when a folder gets a new entry."""
    kept: set[int] = set()
    kinds = {"replace": os.replace, "link": os.link, "mkdir": os.mkdir}

    def changing(name: str) -> Callable[..., None]:
        def change(*arguments: Any, **options: Any) -> None:
            kinds[name](*arguments, **options)
            kept.discard(Path(arguments[0 if name == "mkdir" else 1]).parent.stat().st_ino)

        return change

    for name in kinds:
        monkeypatch.setattr(os, name, changing(name))
    monkeypatch.setattr(os, "fsync", lambda descriptor: kept.add(os.fstat(descriptor).st_ino))
    return kept


@pytest.mark.parametrize(("backend", "folder"), [("zarr", "tokens"), ("wds", "shards")])
def test_a_receipt_is_written_after_everything_else_is_safe(
    begin_store: Any, tmp_path: Path, fill_shard: Any, durable: set[int], monkeypatch: pytest.MonkeyPatch,
    backend: str, folder: str,
) -> None:  # fmt: skip
    root, plan, images = begin_store("new/store", num_images=5, backend=backend, view_px=8)
    link, seen = os.link, []

    def unsafe(top: Path) -> list[Path]:
        paths = [top, *(path for path in top.rglob("*") if "attempts" not in path.parts)]
        return [path for path in paths if path.stat().st_ino not in durable and ".partial" not in path.name]

    def checked(source: Path, target: Path) -> None:
        seen.append(target.name)
        assert stat.S_ISREG(source.stat().st_mode) and source.stat().st_ino in durable
        assert [path for path in unsafe(root) if path not in (root, root / "receipts")] == []
        link(source, target)

    assert unsafe(tmp_path / "new") == []
    monkeypatch.setattr(os, "link", checked)
    fill_shard(root, plan, images, 0).commit()
    assert seen == ["00000.json"]
    monkeypatch.setattr(os, "link", link)
    fill_shard(root, plan, images, 1).commit()
    finish_store(root)
    assert unsafe(root / "receipts") == [] and unsafe(root / folder) == []
    assert (root / "manifest.json").stat().st_ino in durable and root.stat().st_ino in durable
