"""Students and teachers whose tokens differ: in the grid, in CLS, in registers."""

import pytest
import torch
import torch.nn.functional as F

from distill.student import DistillModel
from distill.targets import select_targets
from distill.token_grid import GridResampler
from storage.errors import ConfigError
from tests.fixtures.students import NETWORKS, SWINV2, TOY, VIT, features, shake, some_images, timm_student


@pytest.mark.parametrize("to_hw", [(7, 7), (2, 2), (3, 5), (4, 4)])
def test_resampling_is_torchs_and_leaves_tokens_in_front_alone(to_hw: tuple[int, int]) -> None:
    tokens_BTC = torch.randn(2, 2 + 16, 6, generator=torch.Generator().manual_seed(1))
    found = GridResampler((4, 4), to_hw)(tokens_BTC)
    map_BCHW = tokens_BTC[:, 2:].transpose(1, 2).unflatten(2, (4, 4))
    expected = F.interpolate(map_BCHW, size=to_hw, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
    assert torch.equal(found[:, :2], tokens_BTC[:, :2])
    torch.testing.assert_close(found[:, 2:], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [8, 200])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_predictions_come_to_the_teachers_grid(channels: int, prefix: int) -> None:
    """Wherever it is narrower: a 1x1 convolution and a resampling commute."""
    teacher = features(prefix, (7, 7), channels)
    model = shake(DistillModel(TOY, [teacher], drop_path=0, grid="resample")).eval()
    images = some_images(side=32)
    with torch.no_grad():
        [pred_BTC] = model(images)
        projected_BTC = model.projectors[0](model.student.forward_features(images))
    map_BCHW = projected_BTC[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    grid_BTC = F.interpolate(map_BCHW, size=(7, 7), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
    expected = torch.cat([projected_BTC[:, :1], grid_BTC], dim=1) if prefix else grid_BTC
    torch.testing.assert_close(pred_BTC, expected, rtol=1e-4, atol=1e-4)
    assert pred_BTC.shape == select_targets(torch.zeros(2, prefix + 49, channels), teacher).shape
    assert model.notes == ("the student's 4x4 predictions are resampled to the 7x7 tokens of made-up",)
    assert not [name for name in model.state_dict() if "resampl" in name], "constants are not saved"


def test_several_teachers_each_get_what_they_have() -> None:
    teachers = [features(1, (4, 4), 24), features(5, (7, 7), 8), features(0, (2, 2), 40)]
    model = DistillModel(TOY, teachers, drop_path=0, grid="resample")
    predictions = model(some_images(side=32))
    for pred_BTC, teacher, has_cls in zip(predictions, teachers, (True, True, False), strict=True):
        targets_BTC = torch.zeros(2, teacher.num_tokens, teacher.channels)
        assert pred_BTC.shape == select_targets(targets_BTC, teacher, has_cls=has_cls).shape
    assert model.has_cls == (True, True, False)
    assert len(model.notes) == 2


def test_a_student_without_cls_does_not_learn_it() -> None:
    for cfg in (SWINV2, NETWORKS["registers without CLS"][0]):
        model = DistillModel(cfg, [features(1)], drop_path=0)
        assert model.has_cls == (False,)
        [pred_BTC] = model(some_images())
        assert pred_BTC.shape == select_targets(torch.zeros(2, 17, 24), features(1), has_cls=False).shape
        assert model.notes == ("the student has no CLS token, so that of made-up is not learnt",)


def test_registers_of_the_student_are_not_learnt() -> None:
    cfg = NETWORKS["registers"][0]
    model = shake(DistillModel(cfg, [features(1)], drop_path=0)).eval()
    with torch.no_grad():
        [pred_BTC] = model(some_images())
        tokens_BTC = model.student.forward_features(some_images())
        expected = model.projectors[0](tokens_BTC[:, [0, *range(4, 20)]])
    torch.testing.assert_close(pred_BTC, expected)


def test_an_input_size_that_would_fit_is_named_where_there_is_one() -> None:
    with pytest.raises(
        ConfigError, match=r"4x4 \(64 px, one token for 16\).*7x7; set distill.student.input_px=112, or "
    ):
        DistillModel(VIT, [features(grid=(7, 7))], drop_path=0)


def test_drop_path_that_does_nothing_is_told() -> None:
    cfg = timm_student("vgg11")
    assert DistillModel(cfg, [features(0, (2, 2))], drop_path=0.1).notes == (
        "timm's network has no drop path, so distill.drop_path=0.1 does nothing",
    )
    for student in (VIT, SWINV2, TOY.model_copy(update={"input_px": 32})):
        model = DistillModel(student, [features(0)], drop_path=0.1)
        assert model.notes == ()
