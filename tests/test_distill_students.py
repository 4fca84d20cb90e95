"""Students of all kinds: what any network of timm's gives as tokens, and what is no student."""

from typing import Any

import pytest
import timm
import torch

from distill.student import DistillModel, build_student, checkpoint_activations
from distill.student_config import STUDENTS, BeitStudent, StudentConfig, TimmStudent, read_student
from distill.token_layout import TokenLayout, find_layout, student_tokens
from storage.errors import ConfigError, DamagedError
from tests.fixtures.students import NETWORKS, SWINV2, TOY, VIT, features, shake, some_images, timm_student


@pytest.mark.parametrize("name", NETWORKS)
def test_tokens_of_any_network_are_prefix_then_grid_row_by_row(name: str) -> None:
    cfg, expected, form = NETWORKS[name]
    student = shake(build_student(cfg, drop_path=0.1)).eval()
    assert find_layout(student, cfg.input_px, name) == expected
    with torch.no_grad():
        tokens_BTC = student_tokens(student, some_images())
        whole = student.forward_features(some_images())
    prefix, _, (height, width), channels = expected
    assert tokens_BTC.shape == (2, prefix + height * width, channels)
    for row in range(height):
        for column in range(width):
            place = prefix + row * width + column
            index: dict[str, Any] = {"sequence": (..., place, slice(None)), "NHWC": (slice(None), row, column),
                                     "NCHW": (..., row, column)}  # fmt: skip
            assert torch.equal(tokens_BTC[:, place], whole[index[form]])


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_are_timms_own_and_all_that_learn_are_trained(name: str) -> None:
    """The file loads into timm's network; what tokens do not depend on is frozen, for nothing would train it."""
    cfg, *_ = NETWORKS[name]
    model = DistillModel(
        cfg, [features(0, find_layout(build_student(cfg, drop_path=0), 64, name).grid_hw)], drop_path=0
    )
    shake(model)
    model(some_images())[0].square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name
    frozen = {key for key, value in model.student.named_parameters() if not value.requires_grad}
    assert frozen <= {"head.norm.weight", "head.norm.bias"}
    assert all(module.training for module in model.modules())
    own = timm.create_model(
        cfg.model, num_classes=0, **cfg.arguments, **({} if "conv" in cfg.model else {"img_size": 64})
    )
    assert model.student.state_dict().keys() >= own.state_dict().keys() - {"fc_norm.weight", "fc_norm.bias"}


def test_layouts_are_found_without_memory_too() -> None:
    """The paper's sizes: 86.9 million and 3 billion parameters."""
    for name, width, millions in (("swinv2-b", 1024, 86.9), ("swinv2-g", 4096, 2997.5)):
        with torch.device("meta"):
            student = build_student(STUDENTS[name], drop_path=0.1)
        assert find_layout(student, 224, name) == TokenLayout(0, False, (7, 7), width)
        assert sum(value.numel() for value in student.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(
    ("cfg", "said"),
    [
        (timm_student("vit_tiny_patch16_244"), "unknown timm model 'vit_tiny_patch16_244'; did you mean 'vit_tiny_p"),
        (timm_student("vit_tiny_patch16_224", windows=3),
         "timm does not build vit_tiny_patch16_224 at 64 px with {'windows': 3}: .*'windows'; change distill.student."),
        (timm_student("swinv2_tiny_window8_256", window_size=[3, 3, 3]), "Expected 4 stage window sizes"),
        (timm_student("crossvit_tiny_240"), "crossvit_tiny_240 cannot be a student of 64 px: .*set distill.student."),
        (timm_student("convnext_atto", input_px=16), "cannot be a student of 16 px"),
    ],
)  # fmt: skip
def test_networks_that_are_no_student_are_refused(cfg: TimmStudent, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DistillModel(cfg, [features()], drop_path=0.1, grid="resample")


def test_a_network_without_a_map_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    student = build_student(VIT, drop_path=0)
    for found, said in ((torch.zeros(1, 7), "gives shape \\(1, 7\\), not a map"), ([], "gives a list, not a map"),
                        (torch.zeros(1, 8, 4), "gives 7 tokens for a square image")):  # fmt: skip
        monkeypatch.setattr(student, "forward_features", lambda images, found=found: found)
        with pytest.raises(ConfigError, match=f"ViT {said}.*distill.student.model"):
            find_layout(student, 64, "ViT")


@pytest.mark.parametrize("name", ["img_size", "pretrained", "checkpoint_path", "drop_path_rate"])
def test_arguments_that_are_set_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"arguments.{name} is not free"):
        TimmStudent.checked({"model": "vit_tiny_patch16_224", "arguments": {name: 1}}, "distill.student")


def test_a_student_is_saved_with_its_kind_and_old_ones_are_beits() -> None:
    for cfg in (*STUDENTS.values(), VIT):
        assert read_student("file", cfg.model_dump_json().encode()) == cfg
    assert read_student("file", b'{"width": 48, "heads": 3}') == BeitStudent(width=48, heads=3)
    for text in (b"{}x", b'{"kind": "resnet"}', b'{"kind": "timm"}', b'{"kind": "timm", "model": "a", "width": 3}'):
        with pytest.raises(DamagedError, match="file does not say which student"):
            read_student("file", text)


# ---- activations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [TOY.model_copy(update={"input_px": 64}), VIT, SWINV2])
def test_checkpointed_activations_change_no_gradient(cfg: StudentConfig) -> None:
    """Nor what drop path draws."""
    gradients = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        student = shake(build_student(cfg, drop_path=0.5))
        if is_checkpointed:
            checkpoint_activations(student)
        torch.manual_seed(1)
        student_tokens(student, some_images(4)).square().mean().backward()
        gradients.append({name: value.grad for name, value in student.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_a_network_that_cannot_is_refused() -> None:
    student = build_student(timm_student("resnet18"), drop_path=0)
    checkpoint_activations(student)
    with pytest.raises(ConfigError, match=r"cannot checkpoint the activations of VGG; set .*=false"):
        checkpoint_activations(build_student(timm_student("vgg11"), drop_path=0))
