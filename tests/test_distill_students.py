"""Students of all kinds: what any network of timm's gives as tokens, SwinV2 written out, and grids that differ."""

import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.student import DistillModel, build_student, checkpoint_activations
from distill.student_config import STUDENTS, BeitStudent, StudentConfig, TimmStudent, find_student, read_student
from distill.targets import select_targets
from distill.token_grid import GridResampler
from distill.token_layout import TokenLayout, find_layout, student_tokens
from storage.errors import ConfigError, DamagedError
from storage.records import FeatureSpec

TOY = find_student("toy")


def timm_student(model: str, input_px: int = 64, **arguments: Any) -> TimmStudent:
    return TimmStudent(model=model, input_px=input_px, arguments=arguments)


VIT = timm_student("vit_tiny_patch16_224", embed_dim=24, depth=2, num_heads=2)
SWINV2 = timm_student(
    "swinv2_tiny_window8_256", embed_dim=8, depths=[2, 2, 2], num_heads=[1, 2, 4], window_size=4, patch_size=4
)


def features(prefix: int = 1, grid: tuple[int, int] = (4, 4), channels: int = 24) -> FeatureSpec:
    return FeatureSpec(teacher="made-up", num_prefix_tokens=prefix, grid_hw=grid, channels=channels)


def some_images(count: int = 2, side: int = 64) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(5))


def shake(model: torch.nn.Module) -> Any:
    """Give every parameter a value of its own: zeros and ones hide mistakes."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


# ---- any network of timm's -------------------------------------------------------------------------------------------

NETWORKS: dict[str, tuple[TimmStudent, TokenLayout, str]] = {
    "plain ViT": (VIT, TokenLayout(1, True, (4, 4), 24), "sequence"),
    "registers": (timm_student("vit_tiny_patch16_224", embed_dim=24, depth=1, num_heads=2, reg_tokens=3),
                  TokenLayout(4, True, (4, 4), 24), "sequence"),
    "registers without CLS": (
        timm_student("vit_little_patch16_reg1_gap_256", embed_dim=24, depth=1, num_heads=2),
        TokenLayout(1, False, (4, 4), 24), "sequence"),
    "no prefix": (timm_student("resmlp_12_224"), TokenLayout(0, False, (4, 4), 384),
                  "sequence"),
    "two prefix tokens": (timm_student("deit_tiny_distilled_patch16_224", embed_dim=24, depth=1, num_heads=2),
                          TokenLayout(2, True, (4, 4), 24), "sequence"),
    "channels last": (SWINV2, TokenLayout(0, False, (4, 4), 32), "NHWC"),
    "channels first": (timm_student("convnext_atto", depths=[1, 1, 1, 1], dims=[8, 8, 8, 24]),
                       TokenLayout(0, False, (2, 2), 24), "NCHW"),
    "as many channels as rows": (timm_student("convnext_atto", depths=[1, 1, 1, 1], dims=[8, 8, 8, 2]),
                                 TokenLayout(0, False, (2, 2), 2), "NCHW"),
}  # fmt: skip


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
    assert model.training
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


# ---- SwinV2, written out ---------------------------------------------------------------------------------------------


def swinv2_bias(attention: Any, window: int, query: int, key: int) -> Tensor:
    """The position bias of one pair of tokens in a window: an MLP of the log-spaced distance, between 0 and 16."""
    (y, x), (v, u) = divmod(query, window), divmod(key, window)
    apart = torch.tensor([y - v, x - u]) * 8.0 / (window - 1)
    logarithmic = apart.sign() * (apart.abs() + 1).log2() / 3
    return 16 * torch.sigmoid(attention.cpb_mlp[2].weight @ F.relu(attention.cpb_mlp[0](logarithmic)))


def swinv2_window(attention: Any, tokens_TC: Tensor, window: int, region_T: Tensor) -> Tensor:
    """Cosine attention inside one window, among tokens that are neighbours in the image."""
    count, width = tokens_TC.shape
    heads = len(attention.logit_scale)
    bias = torch.cat([attention.q_bias, torch.zeros(width), attention.v_bias])
    query, key, value = ((tokens_TC @ attention.qkv.weight.T + bias).view(count, 3, heads, -1)).unbind(1)
    bias_TTH = torch.stack([torch.stack([swinv2_bias(attention, window, q, k) for k in range(count)])
                            for q in range(count)])  # fmt: skip
    mixed = []
    for head in range(heads):
        cosine = F.cosine_similarity(query[:, None, head], key[None, :, head], dim=-1)
        scores = cosine * attention.logit_scale[head].exp().clamp(max=100) + bias_TTH[:, :, head]
        scores = scores.masked_fill(region_T[:, None] != region_T[None], float("-inf"))
        mixed.append(scores.softmax(-1) @ value[:, head])
    projected: Tensor = attention.proj(torch.cat(mixed, dim=1))
    return projected


def swinv2_attend(attention: Any, map_HWC: Tensor, window: int, shift: int) -> Tensor:
    """Attention in windows that lie `shift` further down and right; what wraps around the edge is another region."""
    side = len(map_HWC)
    found = torch.empty_like(map_HWC)
    for top in range(shift, side + shift, window):
        for left in range(shift, side + shift, window):
            rows = [row for row in range(top, top + window) for _ in range(window)]
            columns = list(range(left, left + window)) * window
            region = torch.tensor(
                [2 * (row >= side) + (column >= side) for row, column in zip(rows, columns, strict=True)]
            )
            at = [row % side for row in rows], [column % side for column in columns]
            found[at] = swinv2_window(attention, map_HWC[at], window, region)
    return found


def swinv2_plainly(student: Any, image_CHW: Tensor, window: int) -> Tensor:
    """Res-post-norm: each branch ends with a norm. Patches are merged 2 x 2 in front of all stages but the first."""

    def norm(layer: Any, values: Tensor) -> Tensor:
        return F.layer_norm(values, values.shape[-1:], layer.weight, layer.bias, 1e-5)

    map_HWC = norm(student.patch_embed.norm, student.patch_embed.proj(image_CHW[None])[0].permute(1, 2, 0))
    for number, stage in enumerate(student.layers):
        if number:
            quarters = [map_HWC[y::2, x::2] for x in (0, 1) for y in (0, 1)]
            map_HWC = norm(stage.downsample.norm, torch.cat(quarters, dim=-1) @ stage.downsample.reduction.weight.T)
        for index, block in enumerate(stage.blocks):
            own = min(window, len(map_HWC))
            shift = own // 2 if index % 2 and own < len(map_HWC) else 0
            map_HWC = map_HWC + norm(block.norm1, swinv2_attend(block.attn, map_HWC, own, shift))
            map_HWC = map_HWC + norm(block.norm2, block.mlp.fc2(F.gelu(block.mlp.fc1(map_HWC))))
    return norm(student.norm, map_HWC).flatten(0, 1)


def test_swinv2_is_the_authors() -> None:
    """Maps of 16, 8 and 4 with windows of 4: shifted ones in the first two stages, one window in the last."""
    student = shake(build_student(SWINV2, drop_path=0.3)).eval()
    images = some_images()
    with torch.no_grad():
        found = student_tokens(student, images)
        expected = torch.stack([swinv2_plainly(student, image, 4) for image in images])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_how_swinv2_begins() -> None:
    student: Any = build_student(SWINV2, drop_path=0)
    blocks = [block for stage in student.layers for block in stage.blocks]
    for number, block in enumerate(blocks, start=1):
        for norm in (block.norm1, block.norm2):
            assert (norm.weight == 1e-5).all()
            assert (norm.bias == 0).all()
        assert not {"k_bias", "attn.k_bias"} & set(block.state_dict())
        assert torch.allclose(block.attn.logit_scale.exp(), torch.tensor(10.0))
        std = float(block.mlp.fc2.weight.detach().std()) * math.sqrt(2 * number)
        assert std == pytest.approx(0.02, rel=0.2)
    for layer in (student.patch_embed.proj, student.layers[1].downsample.reduction):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.2)


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


# ---- grids that differ -----------------------------------------------------------------------------------------------


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
