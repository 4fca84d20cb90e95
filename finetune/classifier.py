"""A student with a head.

The paper's fine-tuning: mean of the patch tokens, a fresh LayerNorm, a linear head; the shared relative-position table
is copied into every block, which from then on has its own. Networks of timm's that are no BEiT get the pooling and the
head that timm gives them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models import group_parameters
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from distill.checkpoint import load_weights
from distill.initial_weights import begin_beit
from distill.student import build_beit, build_student, build_timm
from distill.student_config import BeitStudent, StudentConfig
from storage.errors import ConfigError, DamagedError

_SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
_BLOCK_TABLE = ".attn.relative_position_bias_table"


def build_classifier(cfg: StudentConfig, *, num_classes: int, drop_path: float, weights: Path | None) -> nn.Module:
    """A classifier from random weights, or from a distilled student's.

    Raises:
        ConfigError: timm does not build this network.
        DamagedError: the weights are not those of this student.
    """
    if weights is None:
        return _from_scratch(cfg, num_classes, drop_path)
    student = load_weights(weights)
    with torch.device("meta"):
        expected = build_student(cfg, drop_path=drop_path).state_dict()
    wrong = _misfits(student, expected)
    if wrong:
        raise DamagedError(
            f"{weights} is not a student of this shape: {len(wrong)} tensors differ, such as {wrong[0]}; "
            "run `make distill FORCE=1`"
        )
    model = _from_scratch(cfg, num_classes, drop_path)
    model.load_state_dict(classifier_state(student, model.state_dict()), strict=False)
    return model


def _from_scratch(cfg: StudentConfig, num_classes: int, drop_path: float) -> nn.Module:
    if not isinstance(cfg, BeitStudent):
        return build_timm(cfg, drop_path=drop_path, num_classes=num_classes, global_pool=None)
    own = cfg.model_copy(update={"positions": "per_block"}) if cfg.positions == "shared" else cfg
    model: nn.Module = build_beit(own, drop_path=drop_path, num_classes=num_classes, global_pool="avg")
    begin_beit(model, cut_off=None)
    return model


def _misfits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Tensors that are missing, too many or of another shape."""
    shapes, wanted = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (found, expected))
    return [
        f"{name} (found {shapes.get(name, 'none')}, expected {wanted.get(name, 'none')})"
        for name in sorted(shapes | wanted)
        if shapes.get(name) != wanted.get(name)
    ]


def classifier_state(student: Mapping[str, Tensor], classifier: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A distilled student's tensors under the names of the classifier: all that both have.

    The head begins anew. So does the norm of a classifier that normalises behind the pooling: the student's final norm
    was learnt for every token.
    """
    state = {name: tensor for name, tensor in student.items() if name in classifier}
    if _SHARED_TABLE in student and _SHARED_TABLE not in classifier:
        state |= {name: student[_SHARED_TABLE].clone() for name in classifier if name.endswith(_BLOCK_TABLE)}
    return state


def layer_lr_scale(model: nn.Module, decay: float) -> Callable[[str], float]:
    """Layer-wise learning-rate decay: 1 for the head, `decay` for the last block, once more for each before it.

    Raises:
        ConfigError: timm does not say which layers the network has.
    """
    if decay == 1:
        return lambda name: 1.0
    number_of = _layer_numbers(model)
    last = max(number_of.values())
    return lambda name: float(decay ** (last - number_of[name]))


def _layer_numbers(model: Any) -> dict[str, int]:
    """Each parameter's layer, as timm counts them: 0 before the blocks, the largest is the head's.

    In SwinV2, timm counts the merging of patches to the block behind it and the last norm to the block before it; here
    the former belongs to the block before it and the latter to the head (authors' optimizer.py, `get_swin_layer`).
    """
    if not hasattr(model, "group_matcher"):
        raise ConfigError(f"timm does not say which layers {type(model).__name__} has; set finetune.layer_decay=1")
    number_of: dict[str, int] = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    if isinstance(model, SwinTransformerV2):
        last = max(number_of.values())
        for name in number_of:
            if ".downsample." in name:
                number_of[name] -= 1
            elif name.startswith("norm."):
                number_of[name] = last
    return number_of


@torch.inference_mode()
def count_correct(logits_BN: Tensor, labels_B: Tensor) -> int:
    return int((logits_BN.argmax(1) == labels_B).sum())
