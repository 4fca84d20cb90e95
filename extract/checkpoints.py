"""Weights files as the upstreams publish them: which kind of file, which of its networks, and names without wrappers.

Nothing in a file is ever executed: safetensors, TorchScript archives read as data, and torch's own files through its
loader for weights only.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from extract.torchscript import is_torchscript, list_records, read_torchscript
from storage.errors import InputError

_NETWORKS = ("state_dict", "model", "module", "student", "teacher", "model_ema")
"""What upstream checkpoints call a network, beside its optimiser, epoch and settings."""

_WHOLE_FILE_PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""
_BACKBONE = "backbone."
"""What DINO's and its successors' checkpoints put before a network's names; heads stand beside it."""

_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    np._core.multiarray.scalar,  # type: ignore[attr-defined]
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
]
"""Data that upstream checkpoints keep beside tensors: command lines, and numbers of numpy."""


def read_checkpoint(path: Path, branch: str = "") -> dict[str, Tensor]:
    """The tensors of one network, without the prefixes of wrappers. They may lie in the file's pages.

    Args:
        branch: the network to take where a file holds several.

    Raises:
        InputError: unreadable; holds more than tensors and harmless data; no network in it, or several and none of them
            is `branch`.
    """
    content = _read(path)
    network = _choose_network(path, content, branch)
    tensors = {name: value for name, value in network.items() if isinstance(value, Tensor)}
    file_bytes = path.stat().st_size
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized:
            raise InputError(f"{path}: {name} is not a plain dense tensor; export the model's state_dict")
        if tensor.is_meta or tensor.numel() * tensor.element_size() > file_bytes:
            raise InputError(f"{path}: {name} of shape {tuple(tensor.shape)} says to be larger than the whole file")
    return _without_wrappers(path, tensors)


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(16)
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _read_safetensors(path)
    if not start.startswith(b"PK"):
        return _read_torch(path, is_archive=False)
    records = list_records(path)
    return read_torchscript(path, records) if is_torchscript(records) else _read_torch(path, is_archive=True)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _read_torch(path: Path, *, is_archive: bool) -> Any:
    """Whatever `torch.save` was given, of tensors and harmless data.

    Args:
        is_archive: in the format since torch 1.6, whose tensors need not be copied out of the file.
    """
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise _unreadable(path, error) from error
    except Exception as error:  # pickle's own error classes: the file asks for code to be run
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({found[1]})" if found else f" ({_first_line(error)})"
        raise InputError(
            f"{path} holds more than tensors{what} and is not opened: nothing in a weights file is ever run. If you "
            "trust it, convert it where its packages are installed: "
            f"`d = torch.load({str(path)!r}, map_location='cpu', weights_only=False)`, then "
            "`safetensors.torch.save_file({k: v.contiguous() for k, v in d['model'].items()}, 'weights.safetensors')`"
        ) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is not a readable weights file: {_first_line(error)}")


def _choose_network(path: Path, content: Any, branch: str) -> Mapping[str, Any]:
    """The tensors by name inside a checkpoint of any upstream."""
    for _ in range(3):  # wrappers in wrappers
        if not isinstance(content, Mapping):
            break
        found = [name for name in (*_NETWORKS, branch) if name and isinstance(content.get(name), Mapping)]
        if not found:
            break
        if branch in found:
            content = content[branch]
        elif len(set(found)) == 1:
            content = content[found[0]]
        else:
            raise InputError(
                f"{path} holds several networks ({', '.join(found)}); "
                + (f"expected one called {branch!r}" if branch else "save the one that is the teacher by itself")
            )
    if not isinstance(content, Mapping) or not _is_state(content):
        raise InputError(f"{path} is not a dictionary of tensors; export the model's state_dict")
    return content


def _is_state(content: Mapping[Any, Any]) -> bool:
    """Tensors by name, perhaps with a few plain numbers (OpenAI's `input_resolution`)."""
    is_named = all(isinstance(name, str) for name in content)
    is_plain = all(value is None or isinstance(value, (Tensor, int, float, str)) for value in content.values())
    return is_named and is_plain and any(isinstance(value, Tensor) for value in content.values())


def _without_wrappers(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {name: name for name in tensors}
    for prefix in _WHOLE_FILE_PREFIXES:
        if all(name.startswith(prefix) for name in names.values()):
            names = {full: name.removeprefix(prefix) for full, name in names.items()}
    names = {full: name.removeprefix(_BACKBONE) for full, name in names.items()}
    if len(set(names.values())) < len(names):
        raise InputError(f"{path} has tensors under the same name with and without {_BACKBONE!r}; which are meant?")
    return {names[full]: tensor for full, tensor in tensors.items()}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
