"""Where a student's tokens are: any network of timm's, read as (B, T, C) with prefix tokens first, then the grid."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from storage.errors import ConfigError, first_line


class TokenLayout(NamedTuple):
    """The tokens of one student at one input size."""

    num_prefix_tokens: int
    """CLS and registers, in front of the grid."""
    has_cls: bool
    """The first of them is a CLS token."""
    grid_hw: tuple[int, int]
    width: int


def student_tokens(student: nn.Module, images_BCHW: Tensor) -> Tensor:
    """Tokens (B, T, C) of the last block, through the final norm where the network has one.

    timm's networks give sequences (B, T, C), or maps (B, H, W, C) or (B, C, H, W).
    """
    network: Any = student
    features: Tensor = network.forward_features(images_BCHW)
    if features.ndim != 4:
        return features
    return features.flatten(1, 2) if _is_channels_last(network, features) else features.flatten(2).transpose(1, 2)


def find_layout(student: nn.Module, input_px: int, name: str) -> TokenLayout:
    """The layout of a network's tokens, found by one image without content. Parameters that the tokens do not depend
    on, such as a norm behind timm's pooling, are frozen: nothing would train them.

    Args:
        name: of the network, for errors.

    Raises:
        ConfigError: it gives no map of tokens, or cannot take images of this size.
    """
    features = _empty_image_features(student, input_px, name)
    used = _leaves(features)
    for parameter in student.parameters():
        if id(parameter) not in used:
            parameter.requires_grad_(False)
    if features.ndim == 4:
        height, width, channels = _map_sizes(student, features)
        return TokenLayout(0, has_cls=False, grid_hw=(height, width), width=channels)
    has_cls_token = getattr(student, "cls_token", None) is not None
    num_prefix_tokens = int(getattr(student, "num_prefix_tokens", has_cls_token))
    num_tokens = features.shape[1] - num_prefix_tokens
    return TokenLayout(
        num_prefix_tokens, _has_cls(student, num_prefix_tokens), _square(num_tokens, name), features.shape[2]
    )


def _empty_image_features(student: Any, input_px: int, name: str) -> Tensor:
    """What timm's `forward_features` gives for one image, with the graph behind it."""
    device = next(student.parameters()).device
    was_training = student.training
    student.eval()
    try:
        with torch.enable_grad():
            features = student.forward_features(torch.zeros(1, 3, input_px, input_px, device=device))
    except (AssertionError, AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{name} cannot be a student of {input_px} px: {first_line(error)}; set distill.student.input_px, or "
            "another distill.student.model"
        ) from error
    finally:
        student.train(was_training)
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        found = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else f"a {type(features).__name__}"
        raise ConfigError(f"{name} gives {found}, not a map of tokens; set another distill.student.model")
    return features


def _leaves(tensor: Tensor) -> set[int]:
    """Identities of the parameters that a tensor was computed from."""
    found, seen, waiting = set(), set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [parent for parent, _ in node.next_functions]
    return found


def _is_channels_last(network: Any, features: Tensor) -> bool:
    """timm says it of some networks; else the dimension that has as many values as the network has features."""
    stated = str(getattr(network, "output_fmt", ""))
    if stated in ("NHWC", "NCHW"):
        return stated == "NHWC"
    width = int(network.num_features)
    return features.shape[1] != width and features.shape[3] == width


def _map_sizes(network: Any, features: Tensor) -> tuple[int, int, int]:
    """Height, width and channels of a map (1, ...)."""
    _, first, second, third = features.shape
    return (first, second, third) if _is_channels_last(network, features) else (second, third, first)


def _has_cls(network: Any, num_prefix_tokens: int) -> bool:
    """Some networks have registers and no CLS token."""
    if num_prefix_tokens == 0:
        return False
    stated = getattr(network, "has_class_token", None)
    return bool(stated) if stated is not None else getattr(network, "cls_token", None) is not None


def _square(num_tokens: int, name: str) -> tuple[int, int]:
    """Height and width of a sequence's grid: a square, as all inputs are."""
    side = math.isqrt(max(0, num_tokens))
    if num_tokens < 1 or side * side != num_tokens:
        raise ConfigError(
            f"{name} gives {num_tokens} tokens for a square image, which is no square grid; set another "
            "distill.student.model"
        )
    return side, side
