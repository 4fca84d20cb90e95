"""A running mean of the weights over the steps; of the statistics that normalisation keeps, too."""

import torch
from torch import Tensor, nn

from distill.parallel import spread_like


class Ema:
    """weights = decay * weights + (1 - decay) * the model's, after each step; spread as the model's are."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.mean = {name: tensor.detach().clone() for name, tensor in averaged(model).items()}

    @torch.no_grad()
    def update(self) -> None:
        means = [_local(mean) for mean in self.mean.values()]
        torch._foreach_lerp_(means, [_local(tensor) for tensor in averaged(self.model).values()], 1 - self.decay)

    def load(self, state: dict[str, Tensor]) -> None:
        """Whole mean weights by the names of the model's tensors."""
        for name, mean in self.mean.items():
            mean.copy_(spread_like(state[name], mean))

    @torch.no_grad()
    def apply(self) -> None:
        """Give the model the mean weights; at the end, when it is not trained on."""
        for name, tensor in averaged(self.model).items():
            tensor.copy_(self.mean[name])


def averaged(model: nn.Module) -> dict[str, Tensor]:
    """What there is a mean of: parameters, and buffers such as BatchNorm's mean and variance; no counters."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    return dict(model.named_parameters()) | buffers


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.data
