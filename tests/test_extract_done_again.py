"""Views that a lower precision cannot hold are done again in float32, each by itself, and that is said."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from extract.built import Forward
from extract.config import ExecutionConfig, ExtractConfig
from extract.events import events_path, read_tail
from extract.run import run
from extract.spec import TeacherSpec
from extract.teacher import Teacher
from extract.watch import DONE_AGAIN
from storage.stage import SilentProgress


class Bright(nn.Module):
    """Tokens that float16 cannot hold where an image is bright, and nothing can where it is all black."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3) * 5e4 + torch.arange(9).view(3, 3))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        cells_BTC = nn.functional.avg_pool2d(images_BCHW, 8).flatten(2).transpose(1, 2)
        tokens_BTC = cells_BTC @ self.weight
        return torch.where(images_BCHW.amax((1, 2, 3)).view(-1, 1, 1) <= 0, torch.nan, tokens_BTC)


SPEC = TeacherSpec(
    name="bright", library="python", input_px=32, patch_px=8, channels=3, mean=(0.0, 0.0, 0.0), std=(0.5, 0.5, 0.5)
)


def test_views_beyond_float16_are_done_again_each_by_itself() -> None:
    module = Bright()
    teacher = Teacher(SPEC, module, module, torch.device("cpu"), precision="float16")
    pixels_BHWC = torch.full((4, 32, 32, 3), 20, dtype=torch.uint8)
    pixels_BHWC[1] = 250
    pixels_BHWC[3, :8, :8] = 250
    tokens_BTC = teacher(pixels_BHWC)
    assert torch.isfinite(tokens_BTC).all()
    assert teacher.num_done_again == 2
    assert (teacher.take_num_done_again(), teacher.take_num_done_again()) == (2, 0)
    exact_BTC = teacher.in_float32(pixels_BHWC)
    for row in range(4):
        assert torch.equal(tokens_BTC[row], teacher(pixels_BHWC[row : row + 1])[0]), "whatever its neighbours are"
        assert torch.equal(tokens_BTC[row], exact_BTC[row]) == (row in (1, 3))


def test_what_float32_cannot_hold_either_stays_for_whitening_to_refuse() -> None:
    module = Bright()
    teacher = Teacher(SPEC, module, module, torch.device("cpu"), precision="float16")
    pixels_BHWC = torch.full((2, 32, 32, 3), 20, dtype=torch.uint8)
    pixels_BHWC[1] = 0
    tokens_BTC = teacher(pixels_BHWC)
    assert torch.isfinite(tokens_BTC[0]).all() and torch.isnan(tokens_BTC[1]).all()


def test_an_extraction_says_how_many_views_were_done_again(
    make_index: Callable[..., tuple[Path, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if float16 had no room for the first view of each batch."""
    data, _ = make_index()
    cfg = ExtractConfig(
        teacher="toy", views=2, records_per_shard=12, precision="float16",
        run=ExecutionConfig(executor="inline", batch_size=4, device="cpu"),
    )  # fmt: skip
    compute = Teacher._in_parts

    def overflow(teacher: Teacher, pixels_BHWC: Tensor, forward: Forward, precision: str) -> Tensor:
        tokens_BTC = compute(teacher, pixels_BHWC, forward, precision)
        if precision == "float16":
            tokens_BTC[0, 3, 5] = torch.inf
        return tokens_BTC

    monkeypatch.setattr(Teacher, "_in_parts", overflow)
    said = Listener()
    metrics = run(cfg, {"data": data}, tmp_path / "store", said)
    assert metrics["run"]["done_again"] == 8, "batches of 4 views in shards of 12, 12 and 8"
    assert any(line.startswith("8 views were beyond the teacher's precision") for line in said.lines)
    again = [event.facts for event in read_tail(events_path(tmp_path / "store")) if event.kind == DONE_AGAIN]
    assert again == [{"shard": 0, "views": 3}, {"shard": 1, "views": 3}, {"shard": 2, "views": 2}]


class Listener(SilentProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)
