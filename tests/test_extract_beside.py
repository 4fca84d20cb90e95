"""Modules beside a teacher's file: imported whenever it runs, seen by nobody else, and part of who the teacher is."""

import os
import sys
from pathlib import Path

import pytest
import torch

from extract.backends import load_teacher
from extract.beside import modules_beside
from extract.resolve import identify_teacher
from extract.weights import weights_identity

PIXELS = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)

TEACHER = """
import torch
import at_import
from extract.spec import TeacherSpec

class Network(torch.nn.Module):
    def forward(self, images):
        from in_forward import VALUE
        return torch.full((len(images), 16, 3), float(VALUE + at_import.VALUE + self.value))

def teacher():
    import in_function
    network = Network()
    network.value = in_function.VALUE
    return network, TeacherSpec(name="x", input_px=32, patch_px=8, channels=3)
"""


def make(folder: Path, **values: int) -> str:
    """A teacher whose tokens are the sum of what three files beside it say."""
    folder.mkdir()
    (folder / "my_teacher.py").write_text(TEACHER)
    for name in ("at_import", "in_function", "in_forward"):
        (folder / f"{name}.py").write_text(f"VALUE = {values.get(name, 1)}\n")
    return str(folder / "my_teacher.py")


def token_of(name: str) -> float:
    return float(load_teacher(identify_teacher(name), device="cpu")(PIXELS)[0, 0, 0])


def test_they_are_imported_at_import_in_the_function_and_in_a_forward_pass(tmp_path: Path) -> None:
    assert token_of(make(tmp_path / "a", at_import=1, in_function=20, in_forward=300)) == 321
    assert str(tmp_path / "a") not in sys.path
    assert not {"at_import", "in_function", "in_forward"} & set(sys.modules)
    assert not list((tmp_path / "a").rglob("*.pyc"))


def test_two_teachers_have_their_own_under_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [make(tmp_path / "a", at_import=1), make(tmp_path / "b", in_forward=5)]
    here, there = [load_teacher(identify_teacher(name), device="cpu") for name in names]
    found = [float(teacher(PIXELS)[0, 0, 0]) for teacher in (here, there, here, there)]
    assert found == [3, 7, 3, 7]
    foreign = type(sys)("in_forward")
    foreign.VALUE = 9  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "in_forward", foreign)  # by somebody else, later
    assert float(there(PIXELS)[0, 0, 0]) == 7
    assert sys.modules["in_forward"] is foreign


@pytest.mark.parametrize("name", ["at_import", "in_function", "in_forward"])
def test_each_is_part_of_who_the_teacher_is(tmp_path: Path, name: str) -> None:
    teacher = make(tmp_path / "a")
    before, place = identify_teacher(teacher), tmp_path / "a" / f"{name}.py"
    assert token_of(teacher) == 3
    times = place.stat()
    place.write_text("VALUE = 2\n")  # as long as before, in the same second
    os.utime(place, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = identify_teacher(teacher)
    assert after.identity() != before.identity()
    assert weights_identity(after, None) != weights_identity(before, None)
    assert token_of(teacher) == 4
    assert identify_teacher(make(tmp_path / "b", **{name: 2})).identity() == after.identity(), "wherever they lie"
    (tmp_path / "a" / "unused.py").write_text("VALUE = 2\n")
    assert identify_teacher(teacher).identity() == after.identity()


def test_statements_of_all_kinds_are_followed(tmp_path: Path) -> None:
    files = {
        "main.py": "import torch, one\nfrom package.deep import name\ntry:\n    from two import *\nexcept E: pass\n",
        "one.py": "def f():\n    import three as x\n    import storage.stage\n    from main import teacher\n",
        "two.py": "syntax error\n",
        "three.py": "",
        "four.py": "",
        "package/__init__.py": "from . import inner\n",
        "package/inner.py": "from .other.last import *\n",
        "package/deep.py": "four = 1\n",
        "package/other/last.py": "from ..sibling import x\n",
        "package/sibling.py": "",
        "package/unused.py": "",
        "storage/stage.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = modules_beside(tmp_path / "main.py")
    inner = {"package", "package.inner", "package.deep", "package.other.last", "package.sibling"}
    assert set(found) == {"one", "two", "three", "main"} | inner
    assert found["package"] == tmp_path / "package" / "__init__.py"


def test_packages_and_folders_without_init_are_forgotten_too(tmp_path: Path) -> None:
    name = make(tmp_path / "a")
    (tmp_path / "a" / "plain").mkdir()
    (tmp_path / "a" / "whole").mkdir()
    (tmp_path / "a" / "plain" / "part.py").write_text("from whole.part import VALUE\n")
    (tmp_path / "a" / "whole" / "__init__.py").write_text("")
    (tmp_path / "a" / "whole" / "part.py").write_text("VALUE = 7\n")
    (tmp_path / "a" / "in_forward.py").write_text("from plain.part import VALUE\n")
    assert token_of(name) == 9
    assert not {module for module in sys.modules if module.partition(".")[0] in ("plain", "whole", "in_forward")}
