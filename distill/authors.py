"""The authors' released distilled checkpoints as students of this project.

Their files hold the student as `encoder.*`, the projector as `decoder.*` and the frozen teacher as `feature_model.*`
(models/feature_distillation.py). The student's shape stands nowhere; its tensors tell it.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distill.student import build_student
from distill.student_config import BeitStudent, Positions, StudentConfig, TimmStudent
from storage.errors import ConfigError, InputError

_STUDENT = "encoder."
_NOT_THE_STUDENT = ("decoder.", "feature_model.", "ln_tgt.")
_SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
_BLOCK_TABLE = "blocks.0.attn.relative_position_bias_table"
_BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")
"""Constants that the network makes itself."""
_SWINV2 = "swinv2_base_window8_256"
_SWINV2_ARGUMENTS: dict[str, Any] = {
    "patch_size": 4, "embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 8,
    "mlp_ratio": 4.0,
}  # fmt: skip
"""What timm's network of that name has unless told otherwise."""
_WIDTH_OF_A_HEAD = 64
"""In all of the authors' ViTs; only where positions are absolute does no tensor tell the number of heads."""


def from_authors(tensors: Mapping[str, Tensor]) -> tuple[StudentConfig, dict[str, Tensor]]:
    """The student in a checkpoint: its shape, and its tensors by timm's names.

    A ViT's key bias, if there is one, is left out: it adds the same to all scores of a query, which softmax takes out.

    Raises:
        InputError: these are not the tensors of a student that the authors' code distilled, or not all of them.
    """
    found = _student_tensors(tensors)
    if "cls_token" in found:
        cfg, state = _vit(found)
    elif "layers.0.blocks.0.attn.logit_scale" in found:
        cfg, state = _swinv2(found)
    else:
        raise InputError(
            f"no student of the authors' among {len(tensors)} tensors, such as {_some(tensors)}; expected a ViT with a "
            "CLS token or a SwinV2, as their main_fd.py saves it"
        )
    _check(cfg, state)
    return cfg, {name: value.float() for name, value in state.items()}


def _student_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what stands beside the student, and without prefixes."""
    bare = {name.removeprefix("module."): value for name, value in tensors.items()}
    if any(name.startswith(_STUDENT) for name in bare):
        others = [name for name in bare if not name.startswith((_STUDENT, *_NOT_THE_STUDENT))]
        if others:
            raise InputError(
                f"{len(others)} tensors are neither student, teacher nor projector, such as {_some(others)}; expected "
                "a checkpoint of the authors' main_fd.py"
            )
        bare = {name.removeprefix(_STUDENT): value for name, value in bare.items() if name.startswith(_STUDENT)}
    if any(name.startswith(("head.", "fc_norm.")) for name in bare):
        raise InputError(
            "this is a classifier that the authors fine-tuned: its final norm was learnt behind the pooling; give the "
            "distilled model that it was made from"
        )
    return bare


def _vit(found: Mapping[str, Tensor]) -> tuple[StudentConfig, dict[str, Tensor]]:
    patches = _take(found, "patch_embed.proj.weight", 4)
    width, patch_px = patches.shape[0], patches.shape[2]
    positions: Positions
    if _SHARED_TABLE in found:
        positions, table = "shared", _take(found, _SHARED_TABLE, 2)
    elif _BLOCK_TABLE in found:
        positions, table = "per_block", _take(found, _BLOCK_TABLE, 2)
    else:
        positions, table = "absolute", _take(found, "pos_embed", 3)
    if positions == "absolute":
        side, heads = math.isqrt(table.shape[1] - 1), width // _WIDTH_OF_A_HEAD
    else:
        side, heads = (math.isqrt(table.shape[0] - 3) + 1) // 2, table.shape[1]
    values = {
        "input_px": side * patch_px, "patch_px": patch_px, "width": width, "depth": _count(found, r"blocks\.(\d+)\."),
        "heads": heads, "mlp_ratio": _take(found, "blocks.0.mlp.fc1.weight", 2).shape[0] / width,
        "layer_scale": 0.1 if "blocks.0.gamma_1" in found else 0.0, "positions": positions,
    }  # fmt: skip
    try:
        cfg = BeitStudent.checked(values, "the shape that the tensors tell")
    except ConfigError as error:
        raise InputError(f"{error}; the file may be cut or of another network") from error
    return cfg, {name: value for name, value in found.items() if not name.endswith((*_BUFFERS, ".k_bias"))}


def _swinv2(found: Mapping[str, Tensor]) -> tuple[StudentConfig, dict[str, Tensor]]:
    patches = _take(found, "patch_embed.proj.weight", 4)
    stages = range(_count(found, r"layers\.(\d+)\."))
    depths = [_count(found, rf"layers\.{stage}\.blocks\.(\d+)\.") for stage in stages]
    heads = [_take(found, f"layers.{stage}.blocks.0.attn.logit_scale", 3).shape[0] for stage in stages]
    windows = [_window(found, stage) for stage in stages]
    sides = {_side(found, stage, windows[stage]) << stage for stage in stages}
    if len(sides) != 1:
        raise InputError(
            f"the maps of the {len(windows)} stages would be of images of different sizes; the file may be cut"
        )
    arguments = {
        "patch_size": patches.shape[2], "embed_dim": patches.shape[0], "depths": depths, "num_heads": heads,
        "window_size": max(windows),
        "mlp_ratio": _take(found, "layers.0.blocks.0.mlp.fc1.weight", 2).shape[0] / patches.shape[0],
    }  # fmt: skip
    told = {name: value for name, value in arguments.items() if value != _SWINV2_ARGUMENTS[name]}
    cfg = TimmStudent(model=_SWINV2, input_px=sides.pop() * patches.shape[2], arguments=told)
    state: dict[str, Tensor] = {}
    for name, value in found.items():
        if not name.endswith(_BUFFERS):
            state |= {_timms_name(own): value for own in _block_names(name, depths)}
    return cfg, state


def _window(found: Mapping[str, Tensor], stage: int) -> int:
    """A stage's window: half of the table of distances between its tokens, which must be spaced as in the paper."""
    own = f"layers.{stage}.blocks.0.attn.relative_coords_table"
    table = _take(found, f"layers.{stage}.rel_pos_bias.relative_coords_table" if own not in found else own, 4)
    window = (table.shape[1] + 1) // 2
    apart = torch.arange(1 - window, window, dtype=torch.float32) * 8 / max(1, window - 1)
    expected = apart.sign() * (apart.abs() + 1).log2() / 3
    grid = torch.stack(torch.meshgrid(expected, expected, indexing="ij"), dim=-1)
    if table.shape[1:] != grid.shape or not torch.allclose(table[0].float(), grid, atol=1e-5):
        raise InputError(
            f"stage {stage} spaces its relative positions otherwise than timm's SwinV2 (norm8_log); it cannot be taken"
        )
    return window


def _side(found: Mapping[str, Tensor], stage: int, window: int) -> int:
    """Tokens on a side of a stage's map: the mask of shifted windows has a row a window; without one, there is one."""
    mask = found.get(f"layers.{stage}.blocks.1.attn_mask")
    return window * (1 if mask is None else math.isqrt(mask.shape[0]))


def _block_names(name: str, depths: list[int]) -> list[str]:
    """A tensor's names once every block has its own: blocks of a stage may share one position MLP."""
    shared = re.fullmatch(r"layers\.(\d+)\.rel_pos_bias\.(.+)", name)
    if shared is None:
        return [name]
    stage = int(shared[1])
    return [f"layers.{stage}.blocks.{block}.attn.{shared[2]}" for block in range(depths[stage])]


def _timms_name(name: str) -> str:
    """timm merges patches at the beginning of a stage, the authors at the end of the one before."""
    merging = re.fullmatch(r"layers\.(\d+)\.(downsample\..+)", name)
    if merging:
        return f"layers.{int(merging[1]) + 1}.{merging[2]}"
    return name.replace(".rpe_mlp.", ".cpb_mlp.")


def _check(cfg: StudentConfig, state: Mapping[str, Tensor]) -> None:
    """Every tensor has a place and every place a tensor, of its shape and with finite values."""
    with torch.device("meta"):
        expected = build_student(cfg, drop_path=0.0).state_dict()
    wrong = [
        f"{name} (found {_shape(state, name)}, expected {_shape(expected, name)})"
        for name in sorted(state.keys() | expected.keys())
        if _shape(state, name) != _shape(expected, name)
    ]
    if wrong:
        raise InputError(
            f"the tensors are not those of {cfg.label} at {cfg.input_px} px: {len(wrong)} differ, such as {wrong[0]}; "
            "the file may be cut, or of a network that the authors' configurations do not have"
        )
    broken = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise InputError(f"{broken[0]} has values that are not finite; load the file anew, or an earlier checkpoint")


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | str:
    return tuple(tensors[name].shape) if name in tensors else "none"


def _take(found: Mapping[str, Tensor], name: str, ndim: int) -> Tensor:
    tensor = found.get(name)
    if tensor is None or tensor.ndim != ndim or 0 in tensor.shape:
        raise InputError(f"{name} is {_shape(found, name)}, expected {ndim} dimensions; the file may be cut")
    return tensor


def _count(found: Mapping[str, Tensor], pattern: str) -> int:
    """Blocks or stages, by the numbers in their names: from 0, without a gap."""
    numbers = {int(match[1]) for name in found if (match := re.match(pattern, name))}
    if numbers != set(range(len(numbers))) or not numbers:
        raise InputError(
            f"names like {pattern!r} have the numbers {sorted(numbers)[:50]}, expected 0, 1, ...; the file may be cut"
        )
    return len(numbers)


def _some(names: Mapping[str, Tensor] | list[str]) -> str:
    return ", ".join(list(names)[:3]) or "none"
