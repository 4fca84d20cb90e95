"""A student with a head.

The paper's fine-tuning: mean of the patch tokens, a fresh LayerNorm, a linear head; the shared relative-position table
is copied into every block, which from then on has its own.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from timm.models.beit import Beit
from torch import Tensor

from distill.checkpoint import load_weights
from distill.student import build_student
from distill.student_config import StudentConfig
from storage.errors import DamagedError

_SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
_DROPPED = ("norm.",)
"""The distilled final norm normalises every token; here pooling comes first, with a norm of its own."""
_FRESH = ("fc_norm.", "head.")


def build_classifier(cfg: StudentConfig, *, num_classes: int, drop_path: float, weights: Path | None) -> Beit:
    """A classifier from random weights, or from a distilled student's.

    Raises:
        DamagedError: the weights are not those of this student.
    """
    model = build_student(
        cfg, drop_path=drop_path, num_classes=num_classes, global_pool="avg", use_shared_rel_pos_bias=False,
        use_rel_pos_bias=True,
    )  # fmt: skip
    if weights is not None:
        state = classifier_state(load_weights(weights), cfg.depth)
        wrong = _misfits(state, model.state_dict())
        if wrong:
            raise DamagedError(
                f"{weights} is not a student of this shape: {len(wrong)} tensors differ, such as {wrong[0]}; "
                "run `make distill FORCE=1`"
            )
        model.load_state_dict(state, strict=False)
    return model


def _misfits(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """Tensors that are missing, too many or of another shape, leaving out those that begin anew."""
    shapes, expected = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (state, wanted))
    return [
        f"{name} (found {shapes.get(name, 'none')}, expected {expected.get(name, 'none')})"
        for name in sorted(shapes | expected)
        if shapes.get(name) != expected.get(name) and not name.startswith(_FRESH)
    ]


def classifier_state(student: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """A distilled student's tensors under the names of the classifier."""
    state = {
        name: tensor for name, tensor in student.items() if name != _SHARED_TABLE and not name.startswith(_DROPPED)
    }
    if _SHARED_TABLE in student:
        for block in range(depth):
            state[f"blocks.{block}.attn.relative_position_bias_table"] = student[_SHARED_TABLE].clone()
    return state


def layer_lr_scale(depth: int, decay: float) -> Callable[[str], float]:
    """Layer-wise learning-rate decay: 1 for the head, `decay` for the last block, once more for each before it."""

    def scale(name: str) -> float:
        block = re.match(r"blocks\.(\d+)\.", name)
        if block:
            layer = int(block.group(1)) + 1
        elif name.startswith(("patch_embed.", "cls_token", "pos_embed", "rel_pos_bias.")):
            layer = 0
        else:
            layer = depth + 1
        return decay ** (depth + 1 - layer)

    return scale


@torch.inference_mode()
def count_correct(logits_BN: Tensor, labels_B: Tensor) -> int:
    return int((logits_BN.argmax(1) == labels_B).sum())
