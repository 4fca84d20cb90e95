"""A teacher from a Python file of the user's own: `my_teacher.py`, or `my_teacher.py:function`.

The function returns `(module, TeacherSpec)`; the module takes normalised images (B, 3, H, W) and gives tokens
(B, T, C), prefix tokens first. Such a file is run: it is the user's own code, unlike a weights file.
"""

import functools
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from extract.beside import Beside, modules_beside
from extract.built import Built
from extract.spec import TeacherSpec
from storage.errors import ConfigError, InputError, OwnTeacherError, first_line
from storage.fingerprint import digest_file, digest_parts, short
from storage.schema import first_problem

DEFAULT_FUNCTION = "teacher"

_FAILURES = (Exception, SystemExit)
"""Of a user's code: one that exits would take our command with it, and look like its success."""


class _Source(NamedTuple):
    path: Path
    function: str

    @classmethod
    def parse(cls, name: str) -> "_Source":
        file, _, function = name.partition(".py:")
        return cls(Path(f"{file}.py" if function else name).expanduser(), function or DEFAULT_FUNCTION)

    def digest(self) -> str:
        """Of the file's bytes, the function's name, and the modules beside the file that it imports."""
        beside = sorted(modules_beside(self.path).items())
        parts = [digest_file(self.path), self.function]
        parts += [part for name, path in beside for part in (name, digest_file(path))]
        return digest_parts([part.encode() for part in parts])


def describe(name: str) -> TeacherSpec:
    """What the file's function says of its teacher; the file's digest is part of who it is.

    Raises:
        InputError: no such file.
        ConfigError: no such function, or it fails, or gives something else.
    """
    source = _Source.parse(name)
    if not source.path.is_file():
        raise InputError(f"no file {source.path}, which TEACHER={name} names; a teacher of your own is a Python file")
    return _describe(source, source.digest()).model_copy(update={"model": name})


@functools.lru_cache(maxsize=8)
def _describe(source: _Source, digest: str) -> TeacherSpec:
    spec = _make(source, Beside(source.path))[1]
    return spec.model_copy(update={"library": "python", "code_digest": digest})


def build(spec: TeacherSpec) -> Built:
    """The module that the file's function makes; its weights are whatever it has filled in.

    Raises:
        ConfigError: as `describe`; or the file has changed since.
    """
    source = _Source.parse(spec.model)
    found = source.digest()
    if found != spec.code_digest:
        raise ConfigError(
            f"{source.path} is {short(found)}, expected {short(spec.code_digest)}: it, or a file beside it that it "
            "imports, was changed while it was in use; give the command again"
        )
    beside = Beside(source.path)
    module = _make(source, beside)[0]

    def forward(images_BCHW: Tensor) -> Tensor:
        try:
            with beside.importable():
                tokens_BTC: Tensor = module(images_BCHW)
        except torch.OutOfMemoryError:
            raise  # is answered with a smaller batch
        except _FAILURES as error:
            shape = tuple(images_BCHW.shape)
            raise OwnTeacherError(
                f"the module of {spec.model} failed on images {shape}: {_where_it_failed(error, source.path)}"
            ) from error
        found = _kind(tokens_BTC)
        expected = (len(images_BCHW), *spec.feature_spec().shape_TC)
        if found != expected:
            raise ConfigError(
                f"the module of {spec.model} gave {found} for {len(images_BCHW)} images, expected tokens {expected}: "
                f"its TeacherSpec says {spec.num_prefix_tokens} prefix tokens, a grid of {spec.input_px} / "
                f"{spec.patch_px} px and {spec.channels} channels"
            )
        return tokens_BTC

    return Built(module, forward)


def _kind(made: Any) -> tuple[int, ...] | str:
    """The shape of a tensor, or what else it is."""
    if not isinstance(made, Tensor):
        return type(made).__name__
    return "a tensor on the meta device, without values," if made.is_meta else tuple(made.shape)


def _make(source: _Source, beside: Beside) -> tuple[nn.Module, TeacherSpec]:
    where = f"{source.path}:{source.function}"
    function = getattr(_run_file(source.path, beside), source.function, None)
    if not callable(function):
        raise ConfigError(
            f"{source.path} has no function {source.function!r}; define `def {source.function}()` that returns "
            "(module, TeacherSpec), or name yours: TEACHER=FILE.py:function"
        )
    try:
        with beside.importable():
            made = function()
    except _FAILURES as error:
        raise ConfigError(f"{where} failed: {_where_it_failed(error, source.path)}") from error
    if not (isinstance(made, tuple) and len(made) == 2):
        raise ConfigError(f"{where} returned {type(made).__name__}, expected (module, TeacherSpec)")
    module, spec = made
    if not isinstance(module, nn.Module) or not isinstance(spec, TeacherSpec):
        found = f"({type(module).__name__}, {type(spec).__name__})"
        raise ConfigError(f"{where} returned {found}, expected (torch.nn.Module, extract.spec.TeacherSpec)")
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise ConfigError(
            f"{where} returned a module on the meta device, which has no values; fill its weights in there"
        )
    if spec.weights.startswith("hub"):
        raise ConfigError(
            f"{where} says weights={spec.weights!r}, but only a library's own models are downloaded; fill the module "
            "in there and leave TeacherSpec.weights out"
        )
    return module, spec


def _run_file(path: Path, beside: Beside) -> Any:
    """The file as a module."""
    name = f"teacher_file_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise ConfigError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    try:
        with beside.importable():
            found.loader.exec_module(module)
    except _FAILURES as error:
        raise ConfigError(f"{path} cannot be imported: {_where_it_failed(error, path)}") from error
    return module


def _where_it_failed(error: BaseException, path: Path) -> str:
    """One line: the error, and the last line of the user's file that it came through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
    first = first_problem(error) if isinstance(error, ValidationError) else first_line(error)
    return f"{type(error).__name__}: {first}" + (f" (line {line} of {path})" if line else "")
