"""The demo's photographs: a package's list becomes a folder of class folders, once and as a whole."""

import errno
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import demo_data
from pipeline.demo_data import prepare_solar_cells
from storage.errors import DamagedError, DiskError, InputError

LIST = """images/cell1.png  1.0  mono
images/cell2.png 0.0 poly

images/cell3.png 0.3333 poly
images/cell4.png 0.6667 mono
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small package of the same shape; gives its data folder."""
    data = tmp_path / "elpv_dataset" / "data"
    (data / "images").mkdir(parents=True)
    (data / "labels.csv").write_text(LIST)
    for number in range(1, 5):
        (data / "images" / f"cell{number}.png").write_bytes(b"picture %d" % number)
    spec = SimpleNamespace(origin=str(data.parent / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "elpv_dataset" else None)
    return data


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_cells_are_sorted_by_their_probability(package: Path, tmp_path: Path) -> None:
    made = prepare_solar_cells(tmp_path / "cells")
    assert made == tmp_path / "cells"
    assert files(made) == {
        "defective/cell1.png": b"picture 1", "functional/cell2.png": b"picture 2", "functional/cell3.png": b"picture 3",
        "defective/cell4.png": b"picture 4",
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")] == []


def test_once_made_it_is_kept(package: Path, tmp_path: Path) -> None:
    made = prepare_solar_cells(tmp_path / "cells")
    (package / "labels.csv").unlink()
    (made / "defective" / "cell1.png").write_bytes(b"mine")
    assert files(prepare_solar_cells(tmp_path / "cells"))["defective/cell1.png"] == b"mine"


def test_half_a_copy_is_not_taken_for_the_whole(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy: Callable[..., object] = demo_data.shutil.copyfile

    def full(source: Path, target: Path) -> None:
        if source.name == "cell3.png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        copy(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(demo_data.shutil, "copyfile", full)
        with pytest.raises(DiskError, match=r"the disk is full .*100\.0 MB needed"):
            prepare_solar_cells(tmp_path / "cells")
    assert not (tmp_path / "cells").exists()
    assert len(files(prepare_solar_cells(tmp_path / "cells"))) == 4


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install elpv-dataset"):
        prepare_solar_cells(tmp_path / "cells")


def test_a_damaged_list_is_named(package: Path, tmp_path: Path) -> None:
    (package / "labels.csv").write_text("images/cell1.png many mono\n")
    with pytest.raises(DamagedError, match=r"labels\.csv is not a list .* reinstall elpv-dataset"):
        prepare_solar_cells(tmp_path / "cells")
    assert not (tmp_path / "cells").exists()
