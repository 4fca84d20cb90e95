"""The modules that lie beside a user's Python file: which it imports, and how they are imported without meeting those
of another file under the same name."""

import ast
import contextlib
import functools
import importlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

_OURS = frozenset({"storage", "extract", "distill", "finetune", "pipeline"})
"""Packages that a file means by these names wherever it lies: they are imported already."""
_ONE_AT_A_TIME = threading.RLock()
"""The interpreter has one table of modules."""


def modules_beside(file: Path) -> dict[str, Path]:
    """The modules in a file's folder that it imports, and those that these import, by dotted name; read from the import
    statements, also those inside functions. Nothing is run."""
    folder, found = file.resolve().parent, dict[str, Path]()
    waiting = [*_imports(file.read_bytes(), package="")]
    while waiting:
        name = waiting.pop()
        path = _place(folder, name)
        if path is not None and name not in found and _top(name) not in _OURS:
            found[name] = path
            package = name if path.stem == "__init__" else name.rpartition(".")[0]
            waiting += _imports(path.read_bytes(), package)
    return found


@functools.lru_cache(maxsize=4096)  # plans ask several times, perhaps about a large package
def _imports(source: bytes, package: str) -> list[str]:
    """Dotted names that a file may import, with the packages that they are in.

    Args:
        package: of the file, for its relative imports.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []  # whoever imports it says so
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join(filter(None, [*parents, node.module or ""]))
            names += [f"{base}.{alias.name}".removeprefix(".") for alias in node.names]  # a module, or a name in one
    return [".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)]


def _place(folder: Path, name: str) -> Path | None:
    base = folder.joinpath(*name.split("."))
    return next((path for path in (base / "__init__.py", base.with_name(f"{base.name}.py")) if path.is_file()), None)


def _top(name: str) -> str:
    return name.partition(".")[0]


class Beside:
    """The modules beside one file, once imported: nobody else sees them."""

    def __init__(self, file: Path) -> None:
        self._folder = file.resolve().parent
        self._modules: dict[str, ModuleType] = {}

    @contextlib.contextmanager
    def importable(self) -> Iterator[None]:
        """While it lasts, files of the folder can be imported, as in a script."""
        with _ONE_AT_A_TIME:
            others = dict(sys.modules)
            writes_bytecode, sys.dont_write_bytecode = not sys.dont_write_bytecode, True  # it is stale for a second
            sys.path.insert(0, str(self._folder))
            importlib.invalidate_caches()
            sys.modules.update(self._modules)
            try:
                yield
            finally:
                sys.path.remove(str(self._folder))
                sys.dont_write_bytecode = not writes_bytecode
                taken = {_top(name) for name in others} - {_top(name) for name in self._modules}
                for name in [name for name in sys.modules if _top(name) not in taken]:
                    if self._holds(name, sys.modules[name]):
                        self._modules[name] = sys.modules.pop(name)
                sys.modules.update({name: others[name] for name in self._modules if name in others})

    def _holds(self, name: str, module: ModuleType) -> bool:
        """Whether a module is a file of the folder, or a folder in it."""
        base = self._folder.joinpath(*name.split("."))
        file = getattr(module, "__file__", None)
        if file is None:
            return str(base) in getattr(module, "__path__", ())
        return Path(file).parent == base or Path(file).with_name(Path(file).name.partition(".")[0]) == base
