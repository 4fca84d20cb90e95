"""The grids of student and teacher: compared, or brought together."""

import torch
from torch import Tensor, nn

from distill.student_config import BeitStudent, StudentConfig
from storage.errors import ConfigError
from storage.records import FeatureSpec


def check_grids(cfg: StudentConfig, grid_hw: tuple[int, int], features: FeatureSpec) -> None:
    """Refuse a student whose token grid is not the teacher's.

    Args:
        grid_hw: the student's.

    Raises:
        ConfigError: names the input size that would fit, if there is one.
    """
    if grid_hw == features.grid_hw:
        return
    px, (height, width) = cfg.input_px, features.grid_hw
    patch_px = cfg.patch_px if isinstance(cfg, BeitStudent) else px / grid_hw[0]
    fits = height == width and patch_px == int(patch_px)
    kind = "patch" if isinstance(cfg, BeitStudent) else "one token for"
    raise ConfigError(
        f"the student's grid is {grid_hw[0]}x{grid_hw[1]} ({px} px, {kind} {patch_px:g}), the store of "
        f"{features.teacher!r} has {height}x{width}; "
        + (f"set distill.student.input_px={height * int(patch_px)}, or " if fits else "set ")
        + "distill.grid=resample to resample the student's predictions"
    )


class GridResampler(nn.Module):
    """Brings tokens of one grid to another: bilinear, with antialiasing where the new one is coarser.

    Two matrix products with constant matrices: their backward pass gives the same bits each time also on a GPU, which
    torch's interpolation does not.
    """

    rows_PH: Tensor
    columns_QW: Tensor

    def __init__(self, from_hw: tuple[int, int], to_hw: tuple[int, int]) -> None:
        super().__init__()
        self.from_hw, self.changes = from_hw, from_hw != to_hw
        self.register_buffer("rows_PH", _weights(from_hw[0], to_hw[0]), persistent=False)
        self.register_buffer("columns_QW", _weights(from_hw[1], to_hw[1]), persistent=False)

    def forward(self, tokens_BTC: Tensor) -> Tensor:
        """Tokens of the old grid, row by row, to those of the new one; tokens in front of the grid stay as they are."""
        if not self.changes:
            return tokens_BTC
        num_before = tokens_BTC.shape[1] - self.from_hw[0] * self.from_hw[1]
        map_BHWC = tokens_BTC[:, num_before:].unflatten(1, self.from_hw)
        rows_PH, columns_QW = self.rows_PH.to(map_BHWC.dtype), self.columns_QW.to(map_BHWC.dtype)
        map_BPWC = torch.einsum("ph,bhwc->bpwc", rows_PH, map_BHWC)
        grid_BTC = torch.einsum("qw,bpwc->bpqc", columns_QW, map_BPWC).flatten(1, 2)
        return torch.cat([tokens_BTC[:, :num_before].to(grid_BTC.dtype), grid_BTC], dim=1)


def _weights(from_length: int, to_length: int) -> Tensor:
    """The matrix (to, from) of the resampling of one side: triangles that reach one old or one new step, whichever is
    longer. As `torch.nn.functional.interpolate` with `antialias`."""
    step = from_length / to_length
    centre_P1 = (torch.arange(to_length, dtype=torch.float64, device="cpu").unsqueeze(1) + 0.5) * step
    place_H = torch.arange(from_length, dtype=torch.float64, device="cpu") + 0.5
    weight_PH = (1 - (place_H - centre_P1).abs() / max(step, 1)).clamp(min=0)
    return (weight_PH / weight_PH.sum(1, keepdim=True)).float()
