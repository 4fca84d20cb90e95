"""What `make teachers` prints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from extract.teachers import TEACHERS
from pipeline.teacher_table import teacher_lines


def test_every_teacher_has_a_line_with_all_that_is_known_of_it() -> None:
    header, *lines = teacher_lines(TEACHERS.values(), None)
    assert header.split("  ")[-1] == "model"
    rows = {line[2:].split()[0]: line for line in lines[: len(TEACHERS)]}
    assert set(rows) == set(TEACHERS)
    row = ["*", "clip-l", "224", "16x16", "1", "1024", "304", "M", "162", "526", "MIT", "hub"]
    assert rows["clip-l"].split() == [*row, "open_clip:ViT-L-14-quickgelu/openai"]
    assert [name for name, line in rows.items() if line.startswith("*")] == [
        s.name for s in TEACHERS.values() if s.paper
    ]
    assert "2,998 M" in rows["swinv2-g"]
    assert "your file" in rows["swinv2-g"]
    assert "timm:NAME" in lines[-1]


@pytest.mark.parametrize("width", [80, 100])
def test_on_a_narrow_screen_nothing_is_folded(width: int) -> None:
    lines = list(teacher_lines(TEACHERS.values(), width))
    assert max(map(len, lines[: 2 * len(TEACHERS) + 2])) <= width
    assert lines[3] == "     MIT, hub, open_clip:ViT-B-16-quickgelu/openai"
    assert max(map(len, lines)) <= 100


def test_the_command_prints_whole_lines_when_piped(decant: Callable[..., Any]) -> None:
    printed = decant("teachers").out
    assert all(name in printed for name in TEACHERS)
    assert (
        "dinov3-7b 256 16x16 5 4096 6,716 M 3,549 2,138 DINOv3-License hub timm:vit_7b_patch16_dinov3.lvd1689m"
        in printed
    )


def test_the_plan_says_what_a_teacher_costs(decant: Callable[..., Any], make_images: Callable[..., Path]) -> None:
    """A view's operations, times images and views; not at another size, for which nobody has counted them."""
    images = make_images(per_class=10)
    count = 20
    arguments = ("plan", "--teacher", "swinv2-g", "--weights", "random", "--data", images, "--set")
    outcome = decant(*arguments, "data.eval_fraction=0")
    assert f"{count} images to train on" in outcome.out
    expected = (
        f"teacher (swinv2-g): 2,998 M parameters, 1,007 GFLOP a view, {count * 4 * 1007.2 / 1e6:.3g} PFLOP in all"
    )
    assert expected in outcome.out
    assert "GFLOP" not in decant(*arguments, "extract.input_px=192", "--set", "data.eval_fraction=0").out
