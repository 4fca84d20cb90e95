"""Folders are layers: every import of every file is read and held against the table, and the check is shown to bite."""

import ast
import importlib
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("storage", "extract", "distill", "finetune", "pipeline")
HEAVY = {"torch", "torchvision", "timm", "open_clip", "ray"}

FORBIDDEN: dict[str, set[str]] = {
    "storage": {*HEAVY, "extract", "distill", "finetune", "pipeline"},
    "extract": {"distill", "finetune", "pipeline", "ray"},
    "distill": {"extract", "finetune", "pipeline", "open_clip", "ray"},
    "finetune": {"extract", "pipeline", "open_clip", "ray"},
    "pipeline": HEAVY,
}
RAY_FILES = {"extract/ray_pool.py", "extract/ray_session.py", "distill/launch_ray.py"}
"""The only files that may import ray."""


def imports_of(source: str) -> set[tuple[str, bool]]:
    """Top-level names that a file imports anywhere, also inside functions; True for those under TYPE_CHECKING."""
    tree = ast.parse(source)
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which package is meant"
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            argument = node.args[0]
            names = [argument.value] if isinstance(argument, ast.Constant) and isinstance(argument.value, str) else []
        found |= {(name.split(".")[0], id(node) in typing_only) for name in names}
    return found


def violations(file: str, source: str) -> set[str]:
    """Imports of one file that the table forbids. `file` is its path from the root."""
    forbidden = FORBIDDEN[file.split("/", maxsplit=1)[0]] - ({"ray"} if file in RAY_FILES else set())
    return {name for name, typing_only in imports_of(source) if name in forbidden and not typing_only}


def project_files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", project_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_table(path: Path) -> None:
    assert violations(str(path.relative_to(ROOT)), path.read_text()) == set()


@pytest.mark.parametrize(
    ("file", "source", "caught"),
    [
        ("storage/planted.py", "import torch", {"torch"}),
        ("storage/planted.py", "def f():\n    from torch import nn", {"torch"}),
        ("distill/planted.py", "import extract.backends", {"extract"}),
        ("extract/planted.py", "from distill import loss", {"distill"}),
        ("extract/planted.py", "import ray", {"ray"}),
        ("extract/ray_pool.py", "import ray", set()),
        ("finetune/planted.py", "import importlib\nimportlib.import_module('extract.run')", {"extract"}),
        ("pipeline/planted.py", "try:\n    import timm\nexcept ImportError:\n    pass", {"timm"}),
        ("storage/planted.py", "import numpy, zarr", set()),
    ],
)
def test_planted_violations_are_caught(file: str, source: str, caught: set[str]) -> None:
    assert violations(file, source) == caught


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_come_from_this_checkout(package: str) -> None:
    folder = ROOT / package
    module = next(path.stem for path in sorted(folder.glob("*.py")) if path.stem not in ("__init__", "__main__"))
    assert Path(importlib.import_module(package).__file__ or "").parent == folder
    assert Path(importlib.import_module(f"{package}.{module}").__file__ or "").parent == folder


def test_no_other_distribution_claims_our_names() -> None:
    owners = metadata.packages_distributions()
    for package in PACKAGES:
        assert set(owners.get(package, ["decant-fd"])) == {"decant-fd"}, package


@pytest.mark.parametrize("package", PACKAGES)
def test_init_files_map_the_folder_and_import_nothing(package: str) -> None:
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    docstring = ast.get_docstring(tree) or ""
    assert len(tree.body) == 1
    named = {line.split()[0] for line in docstring.splitlines() if ".py" in line}
    files = {path.name for path in (ROOT / package).glob("*.py")} - {"__init__.py", "__main__.py"}
    assert files == named


def test_listing_settings_stays_light() -> None:
    """`make plan` must not load a deep-learning library."""
    import subprocess

    code = "import pipeline.cli, sys; print([m for m in ('torch', 'timm', 'open_clip', 'ray') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_top_level_holds_what_it_should() -> None:
    import subprocess

    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        return  # an unpacked source archive has no list of files
    top = {line.split("/")[0] for line in listing.stdout.splitlines()}
    usual = {
        "Makefile",
        "README.md",
        "pyproject.toml",
        "constraints.txt",
        "LICENSE",
        ".ci",
        "docs",
        ".gitignore",
        ".gitattributes",
    }
    assert top <= {*PACKAGES, "tests"} | usual
