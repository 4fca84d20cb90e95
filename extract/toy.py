"""The toy teacher: a tiny fixed network for tests and for a first look."""

import torch
from torch import Tensor, nn

from extract.built import Built
from extract.spec import TeacherSpec


class ToyTeacher(nn.Module):
    """Patches, one mixing step, a norm. Its weights come from a seed."""

    def __init__(self, spec: TeacherSpec) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, spec.channels, spec.patch_px, stride=spec.patch_px)
        self.mix = nn.Linear(spec.channels, spec.channels)
        self.norm = nn.LayerNorm(spec.channels)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        grid_BTC = self.patch(images_BCHW).flatten(2).transpose(1, 2)
        prefix_B1C = grid_BTC.mean(1, keepdim=True)
        tokens_BTC = torch.cat([prefix_B1C, grid_BTC], dim=1)
        normed_BTC: Tensor = self.norm(tokens_BTC + self.mix(tokens_BTC.tanh()))
        return normed_BTC


def build(spec: TeacherSpec) -> Built:
    module = ToyTeacher(spec)
    return Built(module, module)
