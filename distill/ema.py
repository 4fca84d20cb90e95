"""A running mean of the weights over the steps."""

import torch
from torch import Tensor, nn

from distill.parallel import spread_like


class Ema:
    """weights = decay * weights + (1 - decay) * the model's, after each step; spread as the model's are."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.mean = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        means = [_local(mean) for mean in self.mean.values()]
        torch._foreach_lerp_(means, [_local(parameter) for parameter in self.model.parameters()], 1 - self.decay)

    def load(self, state: dict[str, Tensor]) -> None:
        """Whole mean weights by the names of the model's parameters."""
        for name, mean in self.mean.items():
            mean.copy_(spread_like(state[name], mean))

    @torch.no_grad()
    def apply(self) -> None:
        """Give the model the mean weights; at the end, when it is not trained on."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self.mean[name])


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.data
