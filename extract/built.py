"""What the builders of `backends.py` give."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

Forward = Callable[[Tensor], Tensor]
"""Normalised images (B, 3, H, W) to tokens (B, T, C), prefix tokens first, then the grid by rows."""

State = dict[str, Tensor]
"""Tensors by name, as in a weights file."""


class Built(NamedTuple):
    """A network and its tap."""

    module: nn.Module
    """What its weights are: the network up to its last norm, and CLIP's projection, without heads and decoders, so that
    those do not change who a teacher is. Whatever the tap: the blocks after an earlier one are part of it too."""
    forward: Forward
    fit: Callable[[State], State] = lambda state: state
    """Tensors of a weights file to those of the module, as the library itself does it for its own files: other names,
    position embeddings of another grid."""
