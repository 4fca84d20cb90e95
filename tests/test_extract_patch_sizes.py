"""A file of a network with other patches fits in all but its patch embedding, and timm would resample that."""

from pathlib import Path

import pytest
import timm
import torch

from extract.backends import load_teacher
from extract.teachers import find_teacher
from storage.errors import InputError

TINY = {"embed_dim": 32, "depth": 1, "num_heads": 2}
ROW = find_teacher("dino-s").model_copy(update={"options": TINY, "channels": 32, "input_px": 64})


@pytest.mark.parametrize(("patch_px", "input_px"), [(8, 32), (32, 128), (8, 224)])
def test_a_file_with_other_patches_is_refused(patch_px: int, input_px: int, tmp_path: Path) -> None:
    """DINO publishes ViT-S/8 beside ViT-S/16; with the same number of tokens, even the positions have one shape."""
    other = timm.create_model("vit_small_patch16_224", num_classes=0, img_size=input_px, patch_size=patch_px, **TINY)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    with pytest.raises(
        InputError, match=rf"its patches are {patch_px} x {patch_px} px, expected 16 x 16: it is another"
    ):
        load_teacher(ROW, weights=tmp_path / "other.pth", device="cpu")


def test_a_file_of_another_grid_is_resampled(tmp_path: Path) -> None:
    same = timm.create_model("vit_small_patch16_224", num_classes=0, img_size=96, **TINY)
    torch.save(same.state_dict(), tmp_path / "same.pth")
    assert load_teacher(ROW, weights=tmp_path / "same.pth", device="cpu").features.grid_hw == (4, 4)
