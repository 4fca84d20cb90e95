"""All that a training has learnt so far, as whole tensors by name."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distill.ema import Ema
from distill.optim import load_optimizer_tensors, optimizer_tensors
from distill.parallel import spread_like, whole


class TrainState(NamedTuple):
    """What a checkpoint holds, and what it is put back into."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None = None

    def tensors(self, *, wanted: bool = True) -> dict[str, Tensor]:
        """On the CPU, as `gather` does it."""
        return gather(self._named(), wanted=wanted)

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self.model.state_dict().items():
            yield f"model.{name}", value
        for name, value in optimizer_tensors(self.optimizer):
            yield f"optimizer.{name}", value
        if self.ema is not None:
            for name, value in self.ema.mean.items():
                yield f"ema.{name}", value

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put the tensors of a checkpoint back."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "ema": {}}
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            parts[part][name] = value
        own = self.model.state_dict()
        self.model.load_state_dict({name: spread_like(value, own[name]) for name, value in parts["model"].items()})
        load_optimizer_tensors(self.optimizer, self._spread(parts["optimizer"]))
        if self.ema is not None:
            self.ema.load(parts["ema"])

    def _spread(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The optimiser's tensors as its parameters lie: those of a parameter's shape as that parameter does."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        found = {}
        for key, value in tensors.items():
            parameter = parameters[int(key.partition(".")[0])]
            found[key] = spread_like(value, parameter) if value.shape == parameter.shape else value
        return found


def gather(named: Iterable[tuple[str, Tensor]], *, wanted: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU; of those that are spread over processes, every process must ask at the same time, and
    those that do not want them keep none. One after the other: no device can hold all of a model that had to be spread.
    """
    found = {}
    for name, value in named:
        all_of_it = whole(value)
        if wanted:
            found[name] = all_of_it.detach().cpu().contiguous()
    return found
