"""Weights files as the upstreams publish them: which kind of file, which of its networks, and names without wrappers.

Nothing in a file is ever executed: safetensors, TorchScript archives read as data, and torch's own files through its
loader for weights only.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from extract.inert_pickle import MOST_BYTES, NoPickleError, RefusedError, read_inert
from extract.torchscript import AGAIN, Record, check_records, is_torchscript, list_records, read_torchscript
from storage.errors import InputError, first_line

_MOST_SHARING = 4
"""How often tensors may have the same bytes (tied weights) on average: they are copied when they are used."""
_NETWORKS = ("state_dict", "model", "module", "student", "teacher", "model_ema")
"""What upstream checkpoints call a network, beside its optimiser, epoch and settings."""

_WHOLE_FILE_PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""
_BACKBONE = "backbone."
"""What DINO's and its successors' checkpoints put before a network's names; heads stand beside it."""


class _Ignored:
    """Data that upstream checkpoints keep beside tensors, of which nothing is kept: command lines, numbers of numpy."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


_PICKLES_BEFORE_TENSORS = 5
"""In torch's older format: a magic number, a version, the machine, the content, the names of the tensors' storages."""
_HARMLESS: list[Any] = [
    (_Ignored, name)
    for name in ("argparse.Namespace", "numpy.dtype", "numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar")
]
_HARMLESS.append((OrderedDict, "yacs.config.CfgNode"))  # settings; a dictionary that torch lets itself be filled


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
    file_bytes, num_bytes = path.stat().st_size, sum(tensor.nbytes for tensor in tensors.values())
    if num_bytes > _MOST_SHARING * file_bytes:
        raise InputError(
            f"{path} has tensors of {num_bytes} bytes in a file of {file_bytes}: most are the same bytes; export the "
            "model's state_dict as safetensors"
        )
    return _without_wrappers(path, tensors)


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(16)
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _read_safetensors(path)
    if not start.startswith(b"PK"):
        return _read_torch(path, {})
    records = list_records(path)
    if is_torchscript(records):
        return read_torchscript(path, records)
    check_records(path, records)
    return _read_torch(path, records)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _read_torch(path: Path, records: Mapping[str, Record]) -> Any:
    """Whatever `torch.save` was given, of tensors and harmless data.

    torch's own loader for weights only runs no code, but its few functions can be told to make huge things.
    So `inert_pickle` looks through the structure first.

    Args:
        records: of an archive, the format since torch 1.6, whose tensors need not be copied out of the file.
    """
    try:
        _look_through(path, records.get("data.pkl"))
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=bool(records))
    except NoPickleError as error:
        raise _unreadable(path, error) from error
    except (RefusedError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path} holds more than tensors ({first_line(error)}) and is not opened: nothing in a weights file is "
            "ever run. If you trust it, convert it where its packages are installed: "
            f"`d = torch.load({str(path)!r}, map_location='cpu', weights_only=False)`, then "
            "`safetensors.torch.save_file({k: v.contiguous() for k, v in d['model'].items()}, 'weights.safetensors')`"
        ) from error
    except Exception as error:  # of any kind, when bytes are missing or make no sense
        raise _unreadable(path, error) from error


def _look_through(path: Path, structure: Record | None) -> None:
    """Raises RefusedError: the file asks for more than tensors and harmless data, or for more than it holds."""
    with path.open("rb") as file:
        if structure:
            file.seek(structure.start)
            read_inert(file.read(min(structure.num_bytes, MOST_BYTES + 1)))
            return
        start = io.BytesIO(file.read(MOST_BYTES))
    for _ in range(_PICKLES_BEFORE_TENSORS):
        read_inert(start)


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is not a readable weights file: {first_line(error)}; {AGAIN}")


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
    is_plain = all(
        value is None or isinstance(value, (Tensor, _Ignored, int, float, str)) for value in content.values()
    )
    return is_named and is_plain and any(isinstance(value, Tensor) for value in content.values())


def _without_wrappers(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {name: name for name in tensors}
    while found := [prefix for prefix in _WHOLE_FILE_PREFIXES if all(n.startswith(prefix) for n in names.values())]:
        names = {full: name.removeprefix(found[0]) for full, name in names.items()}
    names = {full: name.removeprefix(_BACKBONE) for full, name in names.items()}
    if len(set(names.values())) < len(names):
        raise InputError(f"{path} has tensors under the same name with and without {_BACKBONE!r}; which are meant?")
    return {names[full]: tensor for full, tensor in tensors.items()}
